"""A second module: one name of its own, one that gpt.py has too, one imported."""

from toy_package.gpt import GPT, Pile126M  # noqa: F401


class Pile5B(GPT):
    """LLaMA 5B."""


class Llama7B(GPT):
    pass
