"""A resolved config as text and as JSON, and back."""

import json
import re
import subprocess
import sys

import fiddle as fdl
import pytest
from commands import PILE, refused, resolve
from toy_package import gpt, parts

from configs import flags
from configs.flags import UsageError


def test_the_text_says_where_each_knob_came_from():
    environ = {"VOCAB_PATH": "/v"}
    text = resolve(PILE, "--fdl.NUM_LAYERS=1", "--fdl.seed=4", environ=environ).text
    lines = text.splitlines()
    assert lines[:2] == [
        "# toy_package.gpt.Pile126M",
        "# python main.py --fdl_config=toy_package.gpt.Pile126M --fdl.NUM_LAYERS=1 "
        "--fdl.VOCAB_PATH=/v --fdl.seed=4",
    ]
    assert re.search(r"^NUM_LAYERS +=\s+1 +\[command line\]$", text, re.M)
    assert re.search(r"^HIDDEN_DIMS +=\s+16 +\[class Pile126M\]$", text, re.M)
    assert re.search(r"^VOCAB_PATH +=\s+'/v' +\[environment VOCAB_PATH\]$", text, re.M)
    assert "\nmodel.blocks[0].norm.epsilon = 1e-06\n" in text  # a default that nobody set
    assert "\nseed = 4\n" in text


def test_the_command_in_the_text_gives_the_same_config():
    words = ["--fdl.MIXTURE={a: 1}", "--fdl.FPROP_DTYPE='8'", "--fdl.model.blocks[0].names=[x]"]
    resolved = resolve(PILE, *words, environ={"ENABLE_TE": "1"})
    command = subprocess.run(
        ["sh", "-c", f'for word in {resolved.command}; do echo "$word"; done'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    again = resolve(*command)
    assert (again.knobs, again.tree) == (resolved.knobs, resolved.tree)


def test_flat_text_is_the_same_in_every_process(root):
    code = (
        "import sys; sys.path.append('tests/configs')\n"
        "from configs import flags\n"
        f"print(flags.flat_text(flags.resolve(['main.py', {PILE!r}], {{}}).tree), end='')"
    )
    text = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert text == flags.flat_text(resolve(PILE).tree)
    assert "0x" not in text
    odd = fdl.Config(parts.Block, 1, activation=object(), dtype=f"{root}/data")
    assert "activation = <object object>" in flags.flat_text(odd)
    assert "dtype = '<repository>/data'" in flags.flat_text(odd)


def reload(path, *words, environ=None):
    return resolve(f"--fdl_config_file={path}", *words, environ=environ)


@pytest.fixture
def written(tmp_path):
    """The file of a run with knobs from every source, a fiddler and a node override."""
    resolved = resolve(
        PILE,
        "--fdl.NUM_LAYERS=3",
        "--fdl.ICI_MESH_SHAPE=[1,2,1]",
        "--fiddler=toy_package.fiddlers.smoke(steps=5)",
        "--fdl.model.blocks[0].remat=EVERYTHING",
        environ={"VOCAB_PATH": "/v"},
    )
    path = tmp_path / "config.json"
    path.write_text(resolved.json)
    return path, resolved


def test_a_written_config_comes_back_the_same(written):
    path, resolved = written
    again = reload(path)
    assert again.tree == resolved.tree
    assert (again.knobs, again.origins) == (resolved.knobs, resolved.origins)
    assert (again.text, again.json, again.notices) == (resolved.text, resolved.json, ())


def test_a_reloaded_config_can_be_changed(written):
    path, _ = written
    again = reload(path, "--fdl.MAX_STEPS=20", "--fdl.seed=4")
    assert again.knobs["NUM_LAYERS"] == 3
    assert again.origins["MAX_STEPS"] == again.origins["NUM_LAYERS"] == "command line"
    assert again.origins["VOCAB_PATH"] == "environment VOCAB_PATH"
    assert (again.tree.seed, again.tree.optimizer[0].steps) == (4, 5)
    assert again.tree.model.blocks[0].remat is parts.Remat.EVERYTHING
    assert again.notices == ()
    assert reload(path, "--fdl.seed=9").tree.seed == 9


def test_the_file_beats_the_environment_and_says_so(written):
    path, _ = written
    again = reload(path, environ={"VOCAB_PATH": "/other"})
    assert again.knobs["VOCAB_PATH"] == "/v"
    assert again.notices == (
        f"environment VOCAB_PATH has no effect: {path} says VOCAB_PATH='/v'; "
        "--fdl.VOCAB_PATH= changes it",
    )
    assert reload(path, environ={"VOCAB_PATH": "/v"}).notices == ()


def test_changed_code_is_noticed_and_the_written_tree_counts(written, monkeypatch):
    path, resolved = written
    expand = gpt.GPT.experiment

    def changed(self):
        config = expand(self)
        config.seed = 77
        return config

    monkeypatch.setattr(gpt.GPT, "experiment", changed)
    again = reload(path)
    assert again.tree == resolved.tree
    assert again.notices == (
        f"{path}: the code has changed since this config was written; the config is used as it was "
        "written (then -> now: seed: 1 -> 77)",
    )
    remade = reload(path, "--fdl.MAX_STEPS=20")
    assert remade.tree.seed == 77
    assert (
        "the config is made anew by today's code (then -> now: seed: 1 -> 77)" in remade.notices[0]
    )


def test_a_config_whose_class_is_gone_still_loads(written):
    path, _ = written
    stored = json.loads(path.read_text())
    stored["config"] = "toy_package.gpt.Gone"
    path.write_text(json.dumps(stored))
    again = reload(path, "--fdl.seed=3")
    assert again.config_class is None
    assert fdl.build(again.tree).seed == 3
    assert "toy_package.gpt.Gone does not exist" in again.notices[0]
    assert again.text
    assert flags.help_text(again)
    line = refused(f"--fdl_config_file={path}", "--fdl.NUM_LAYERS=1")
    assert "its knobs cannot be changed any more" in line


def test_a_bad_file_ends_in_one_line(written, tmp_path):
    path, _ = written
    stored = json.loads(path.read_text())

    def with_content(content: str) -> str:
        path.write_text(content)
        return refused(f"--fdl_config_file={path}")

    assert "cannot be read: No such file" in refused(f"--fdl_config_file={tmp_path}/none.json")
    assert "cannot be read: Is a directory" in refused(f"--fdl_config_file={tmp_path}")
    assert "is not JSON: " in with_content("{")
    assert "is not a config that a run of this version wrote" in with_content("{}")
    moved = json.dumps(stored).replace("toy_package.parts", "toy_package.moved")
    assert "today's code cannot load its tree (" in with_content(moved)
    assert "start from --fdl_config=toy_package.gpt.Pile126M" in with_content(moved)
    del stored["knobs"]
    assert "lacks 'knobs'" in with_content(json.dumps(stored))


def test_a_tree_that_cannot_be_written_says_so():
    resolved = resolve(PILE)
    resolved.tree.model.blocks[0].activation = lambda x: x
    with pytest.raises(UsageError, match="cannot be written as JSON: .*plain values and named"):
        _ = resolved.json
