"""Converts weights: Hugging Face or Meta -> a paxlike checkpoint, and back to Hugging Face.

    python scripts/convert.py --fdl_config=LLaMA7B --input=FOLDER --output=FOLDER [--to=paxlike|huggingface|peft]

What --input is shows from its files: a folder of Hugging Face or Meta becomes a checkpoint, a job_log_dir (or one
checkpoint) becomes a folder of Hugging Face. Tensors are read and written one at a time. With --fdl.USE_LORA=True
adapters are merged into the weights, or written alone in the format of PEFT, or read from there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
# Nothing is computed here: no accelerator is taken from a run.
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags as absl_flags

from configs import flags

_FLAGS = absl_flags.FlagValues()
INPUT = absl_flags.DEFINE_string("input", None, "Weights to convert.", flag_values=_FLAGS)
OUTPUT = absl_flags.DEFINE_string(
    "output", None, "A new job_log_dir, or a new folder of Hugging Face.", flag_values=_FLAGS
)
TO = absl_flags.DEFINE_enum(
    "to",
    None,
    ["paxlike", "huggingface", "peft"],
    "What to write; left out: what --input is not. huggingface merges adapters, peft writes them alone.",
    flag_values=_FLAGS,
)
DTYPE = absl_flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of the weights written.", flag_values=_FLAGS
)
MAX_SHARD_SIZE = absl_flags.DEFINE_string(
    "max_shard_size", None, "Of one file of Hugging Face, 5GB by default.", flag_values=_FLAGS
)
STEP = absl_flags.DEFINE_integer(
    "checkpoint_step",
    None,
    "Step of a paxlike checkpoint, the latest by default.",
    flag_values=_FLAGS,
)
USE = absl_flags.DEFINE_enum(
    "use", "params", ["params", "ema"], "Which weights of it: ema is averaged.", flag_values=_FLAGS
)


def main(argv: list[str]) -> int:
    """Returns the exit code of the process."""
    request, rest = flags.split(argv)
    if request.list:
        print(flags.list_configs())
        return 0
    if request.help:
        print(f"{__doc__}\n{_FLAGS.main_module_help() or _FLAGS.get_help()}")
        return 0
    flags.parse_absl(rest, _FLAGS)
    for flag in (INPUT, OUTPUT):
        if flag.value is None:
            raise flags.UsageError(f"--{flag.name}=FOLDER is missing; --help lists all flags")
    resolved = flags.resolve(request)
    for notice in resolved.notices:
        print(f"note: {notice}", file=sys.stderr)
    written = _convert(resolved)
    print(f"{OUTPUT.value}: {written}, {DTYPE.value}")
    if copied := _copy_companions(resolved, written):
        print(f"copied as they are: {', '.join(copied)}", file=sys.stderr)
    return 0


def _convert(resolved: flags.Resolved) -> str:
    import fiddle as fdl

    from paxlike.log.progress import Progress
    from paxlike.weights.convert import convert

    try:
        # No more than is needed: data need not be there.
        model, weights = fdl.build(resolved.tree.model), fdl.build(resolved.tree.weights)
    except ValueError as error:  # Fiddle adds a paragraph on where in the tree.
        raise flags.UsageError(str(error).split("\n\nFiddle context")[0]) from error
    if weights is None:
        raise flags.UsageError(
            f"{resolved.name} has no table of foreign weights: take a config of a published family"
        )
    progress: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress(total, description="convert", unit="tensor"))
        progress[0].update(done)

    if request := _of_adapters(resolved, model):
        return request()

    try:
        return convert(
            INPUT.value,
            OUTPUT.value,
            _shapes(model),
            weights,
            to=TO.value,
            dtype=DTYPE.value,
            max_shard_size=MAX_SHARD_SIZE.value,
            step=STEP.value,
            use=USE.value,
            config=resolved.json,
            config_text=resolved.text,
            report=report,
        )
    finally:
        for each in progress:
            each.close()


def _copy_companions(resolved: flags.Resolved, written: str) -> list[str]:
    """Tokenizer and the like; their names."""
    from paxlike.weights import companions

    source, output = Path(INPUT.value), Path(OUTPUT.value)
    if written == "paxlike":
        return companions.copy(companions.beside(source), output / companions.KEPT)
    if written != "huggingface":
        return []
    tokenizer, base = (
        Path(path) if (path := resolved.knobs.get(name)) else None
        for name in ("VOCAB_PATH", "CHECKPOINT_RESTORE_PATH")
    )
    return companions.copy(companions.gather(source, tokenizer, base), output)


def _of_adapters(resolved: flags.Resolved, model):
    """What converts adapters, where they are what is asked for; else None."""
    import functools

    import fiddle as fdl

    from paxlike.weights import is_foreign, peft
    from scripts import convert_lora

    source, output = Path(INPUT.value), Path(OUTPUT.value)
    from_peft = (source / peft.CONFIG).is_file()
    if convert_lora.adapter_of(model) is None:
        if from_peft or TO.value == "peft":
            raise flags.UsageError("adapters need a config that has them: --fdl.USE_LORA=True")
        return None
    if from_peft:
        return functools.partial(
            convert_lora.import_adapters,
            fdl.build(resolved.tree),
            source,
            output,
            config=resolved.json,
            text=resolved.text,
        )
    if is_foreign(source) or TO.value == "paxlike":
        return None  # the base alone
    size = {} if MAX_SHARD_SIZE.value is None else {"max_shard_size": MAX_SHARD_SIZE.value}
    return functools.partial(
        convert_lora.export,
        fdl.build(resolved.tree),
        source,
        output,
        to=TO.value or "huggingface",
        dtype=DTYPE.value,
        step=STEP.value,
        **size,
    )


def _shapes(model) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters; nothing is allocated."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from paxlike.checkpoint import arrays

    variables = jax.eval_shape(
        lambda: dict(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    )
    named = arrays.named_leaves(nn.meta.unbox(variables["params"]))
    # Adapters have no place in the files of a base.
    return {path: tuple(leaf.shape) for path, leaf in named.items() if "/lora/" not in path}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except (flags.UsageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
