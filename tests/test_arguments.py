"""Commands beside main.py: what is wrong with their command lines is one line."""

import pathlib
import re

import pytest

from paxlike.arguments import ArgumentParser

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="example")
    parser.add_argument("run")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--where", choices=["slurm", "local"])
    return parser


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run", "--nodse=2"], "unknown argument '--nodse=2'; did you mean --nodes?"),
        (["run", "--node=2"], "unknown argument '--node=2'; did you mean --nodes?"),
        (["run", "--xyz"], "unknown argument '--xyz'; --help lists all"),
        (["run", "again"], "unknown argument 'again'; --help lists all"),
        (["run", "--nodes=two"], "argument --nodes: invalid int value: 'two'"),
        (["run", "--where=there"], "argument --where: invalid choice: 'there'"),
        ([], "the following arguments are required: run"),
    ],
)
def test_an_error_is_one_line_and_status_2(words, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        _parser().parse_args(words)
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {line}") and shown.count("\n") == 1


def test_right_arguments_pass():
    flags = _parser().parse_args(["here", "--nodes=2", "--where=local"])
    assert (flags.run, flags.nodes, flags.where) == ("here", 2, "local")


def test_every_command_takes_it():
    files = [*(ROOT / "paxlike").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    plain = [str(f) for f in files if re.search(r"argparse\.ArgumentParser\(", f.read_text())]
    assert plain == []
