"""The pages of --fdl_help and --help."""

import re
import sys

import pytest
from commands import PILE, resolve

from configs import flags
from configs.knobs import knobs


def page(*words, color=False, environ=None):
    request, _ = flags.split(["main.py", *words])
    return flags.help_page(request, environ or {}, color=color)


@pytest.mark.parametrize("config", ["toy_package.gpt.Pile126M", "toy_package.gpt.Pile5B"])
def test_the_help_fits_and_shows_each_knob_once(config):
    text = page(f"--fdl_config={config}", "--fdl_help", "--fdl.CLIP_GRADIENT_NORM_TO_VALUE=0.5")
    assert max(map(len, text.splitlines())) <= 100
    assert "\033" not in text
    table = text[: text.index("How to change it")]
    cls = flags.find_config(config)
    for knob in knobs(cls):
        assert len(re.findall(rf"^[ *>] {knob.name} ", table, re.M)) == 1
    for group in ("Size of the model", "Optimizer and schedule", "Mesh, batch and files"):
        assert table.count(f"\n{group}\n") == 1
    assert re.search(r"^> CLIP_GRADIENT_NORM_TO_VALUE +0\.5 +float\? ", table, re.M)
    assert re.search(r"^\* HIDDEN_DIMS +16 +int ", table, re.M)
    assert re.search(r"^  MAX_STEPS +10 +int +steps of the whole run$", table, re.M)
    assert "GPT-3" in table.splitlines()[1]
    words = " ".join(table.split())
    assert "one of linear_rampup_cosine_decay, linear_rampup_exponential_decay, constant" in words
    assert "(was None)" in words
    for line in flags.flat_text(resolve(f"--fdl_config={config}").tree).splitlines():
        if "clip" not in line:
            assert f"  {line}\n" in text


def test_the_examples_of_the_help_work():
    text = page("--fdl_config=toy_package.gpt.Pile5B", "--fdl_help")
    commands = re.findall(r"--fdl_config=(\S+) .*\\\n +(.*)\n", text)
    assert len(commands) == 3
    for config, flag in commands:
        assert resolve(f"--fdl_config={config}", flag.strip("'")).notices == ()


def test_the_help_is_coloured_on_a_terminal_only():
    coloured = page(PILE, "--fdl_help", color=True)
    assert "\033[1m" in coloured
    assert re.sub(r"\033\[\d+m", "", coloured) == page(PILE, "--fdl_help")


def test_the_help_names_the_environment_as_source():
    text = " ".join(page(PILE, "--fdl_help", environ={"VOCAB_PATH": "/v"}).split())
    assert "> VOCAB_PATH /v str? SentencePiece model file (was None), from environment" in text


def test_the_usage_lists_flags_and_configs():
    text = page("--help")
    assert max(map(len, text.splitlines())) <= 100
    for flag in ("--fdl_config=NAME", "--fdl.KNOB=VALUE", "--fiddler=NAME", "--fdl_list"):
        assert flag in text
    assert page("--fdl_help") == text


def test_the_usage_shows_the_flags_of_main(absl, monkeypatch):
    (this_module,) = absl.flags_by_module_dict()
    monkeypatch.setattr(sys, "argv", [this_module])
    text = flags.usage_text(flag_values=absl)
    assert re.search(r"^  --mode=train +<train\|eval>: what to do$", text, re.M)
    assert re.search(r"^  --job_log_dir=\.\.\. +folder of the run$", text, re.M)
