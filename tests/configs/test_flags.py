"""The command line: what is ours, precedence, overrides, environment, fiddlers, and every error."""

import re

import fiddle as fdl
import pytest
from commands import PILE, refused, resolve
from toy_package import gpt, parts

from configs import flags
from configs.cli import registry, tree
from configs.cli.override import override
from configs.flags import UsageError

# What absl gets, and what not.


def test_split_takes_our_flags_in_every_form():
    line = (
        "main.py --mode=eval --fdl_config Tiny -fdl.NUM_LAYERS=2 --fdl.a.b[0] -1 --job_log_dir /x "
        "--fiddler=smoke --fiddler bf16(x=1) --fdl_help --fdl.NAME= -- --fdl_list"
    )
    request, rest = flags.split(line.split())
    assert request.config == "Tiny"
    assert request.overrides == (("NUM_LAYERS", "2"), ("a.b[0]", "-1"), ("NAME", ""))
    assert request.knob_overrides == (("NUM_LAYERS", "2"), ("NAME", ""))
    assert request.node_overrides == (("a.b[0]", "-1"),)
    assert request.fiddlers == ("smoke", "bf16(x=1)")
    assert (request.help, request.list) == ("config", False)
    assert rest == ["main.py", "--mode=eval", "--job_log_dir", "/x", "--", "--fdl_list"]


def test_a_flag_file_may_hold_our_flags(tmp_path):
    (tmp_path / "flags").write_text("--fdl.NUM_LAYERS=7\n--mode=eval\n")
    request, rest = flags.split(["main.py", f"--flagfile={tmp_path}/flags"])
    assert request.overrides == (("NUM_LAYERS", "7"),)
    assert rest == ["main.py", "--mode=eval"]
    with pytest.raises(UsageError, match="--flagfile: .*nowhere"):
        flags.split(["main.py", f"--flagfile={tmp_path}/nowhere"])


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--fdl_confg=x", r"unknown flag --fdl_confg; did you mean --fdl_config.*\?"),
        ("--fdl.=3", r"unknown flag --fdl\."),
        ("--fdl_set=a=1", r"--fdl_set does not exist here; write --fdl\.path=VALUE"),
        ("--fdl_tag.A=1", r"--fdl_tag.A does not exist here; write a function in configs/fid"),
        ("--fdl=config:a", r"--fdl does not exist here; write --fdl_config=NAME"),
        ("--exp=a", r"--exp does not exist here; write --fdl_config=NAME"),
        ("--fdl.NUM_LAYERS", r"--fdl\.NUM_LAYERS needs a value: --fdl\.NUM_LAYERS=\.\.\."),
        ("--fdl_config", r"--fdl_config needs a value: --fdl_config=\.\.\."),
    ],
)
def test_a_bad_flag_of_ours_ends_in_one_line(word, line):
    assert re.match(line, refused(word, "--mode=train"))


def test_absl_gets_the_rest(absl):
    assert flags.parse_absl(["main.py", "--mode=eval", "--job_log_dir", "x"], absl) == []
    assert (absl.mode, absl.job_log_dir) == ("eval", "x")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--job_dir=x", r"unknown flag --job_dir; did you mean --job_log_dir\?"),
        ("--modes=eval", r"unknown flag --modes; did you mean --mode\?"),
        ("--zzz=1", "unknown flag --zzz; --help lists all"),
        ("--fiddlers=a", r"unknown flag --fiddlers; did you mean --fiddler\?"),
        ("--NUM_LAYERS=2", r"unknown flag --NUM_LAYERS; a knob is written --fdl\.NUM_LAYERS=VALUE"),
        ("--model.depth=2", r"unknown flag --model\.depth; did you mean --fdl\.model\.depth\?"),
        ("--mode=evl", r"flag --mode=evl: value should be one of.*; did you mean eval\?"),
        ("--port=x", "flag --port=x: .*x"),
        ("--port", "Missing value for flag --port"),
        ("eval", "unexpected argument 'eval'; flags are written --name=value"),
    ],
)
def test_a_bad_flag_of_absl_ends_in_one_line(absl, word, line):
    with pytest.raises(UsageError, match=line) as error:
        flags.parse_absl(["main.py", word], absl)
    assert "\n" not in str(error.value)


# Knobs.


def test_a_later_source_wins():
    environ = {"VOCAB_PATH": "/env.model"}
    assert resolve(PILE).knobs["VOCAB_PATH"] is None
    resolved = resolve(PILE, environ=environ)
    assert resolved.knobs["VOCAB_PATH"] == "/env.model"
    assert resolved.origins["VOCAB_PATH"] == "environment VOCAB_PATH"
    resolved = resolve(f"{PILE}(VOCAB_PATH='/call')", environ=environ)
    assert resolved.knobs["VOCAB_PATH"] == "/call"
    resolved = resolve(f"{PILE}(NUM_LAYERS=5)", "--fdl.VOCAB_PATH=/line", environ=environ)
    assert resolved.knobs["VOCAB_PATH"] == "/line"
    assert resolved.origins["VOCAB_PATH"] == resolved.origins["NUM_LAYERS"] == "command line"
    assert resolved.origins["HIDDEN_DIMS"] == "class Pile126M"
    assert resolved.origins["LEARNING_RATE"] == "class OptimizerKnobs"
    assert len(resolved.tree.model.blocks) == 5
    assert resolved.notices == ()


def test_knobs_reach_what_is_built():
    resolved = resolve(PILE, "--fdl.NUM_LAYERS=1", "--fdl.ICI_MESH_SHAPE=[1,2,1]")
    built = fdl.build(resolved.tree)
    assert isinstance(built, parts.Experiment)
    assert (len(built.model.blocks), built.mesh) == (1, (1, 2, 1))


def test_given_twice_the_last_counts_and_a_notice_says_so():
    resolved = resolve(f"{PILE}(NUM_LAYERS=5)", "--fdl.NUM_LAYERS=2", "--fdl.NUM_LAYERS=3")
    assert resolved.knobs["NUM_LAYERS"] == 3
    assert resolved.notices == ("--fdl.NUM_LAYERS is given 3 times; the last counts: 3",)
    assert resolve(PILE, "--fdl.NUM_LAYERS=3", "--fdl.NUM_LAYERS=3").notices == ()
    resolved = resolve("--fdl_config=toy_package.gpt.Pile5B", PILE)
    assert resolved.name == "toy_package.gpt.Pile126M"
    assert "--fdl_config is given more than once" in resolved.notices[0]
    resolved = resolve(PILE, "--fdl.seed=2", "--fdl.seed=3")
    assert (resolved.tree.seed, len(resolved.notices)) == (3, 1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--fdl.NUM_LAYERS=two"],
            "--fdl.NUM_LAYERS=two: int wanted, got 'two'; the default is 2 (transformer blocks)",
        ),
        (
            ["--fdl.LR_SCHEDULE=cosine"],
            "--fdl.LR_SCHEDULE=cosine: 'linear_rampup_cosine_decay' or "
            "'linear_rampup_exponential_decay' or 'constant' wanted, got cosine; "
            "the default is 'linear_rampup_cosine_decay' "
            "(how the learning rate changes over the steps of a run)",
        ),
        (
            ["--fdl.NUM_LAYER=2"],
            "--fdl.NUM_LAYER=2: Pile126M has no knob NUM_LAYER; did you mean --fdl.NUM_LAYERS?",
        ),
        (
            ["--fdl.SEED=2"],
            "--fdl.SEED=2: Pile126M has no knob SEED; did you mean "
            "--fdl.seed (a node of the tree)?",
        ),
        (
            ["--fdl.QUUX=2"],
            "--fdl.QUUX=2: Pile126M has no knob QUUX; "
            "--fdl_help --fdl_config=toy_package.gpt.Pile126M lists its knobs",
        ),
        (
            ["--fdl.LEARNING_RATE=1e400"],
            "--fdl.LEARNING_RATE=1e400 must be a finite number; the default is 0.001 (peak learning rate)",
        ),
        (["--fdl.MAX_STEPS=0"], "Pile126M: MAX_STEPS=0: nothing to do; give at least 1"),
        (["--fdl.HIDDEN_DIMS=7"], "Pile126M: HIDDEN_DIMS=7 is odd; make it even"),
    ],
)
def test_a_bad_knob_ends_in_one_line(words, line):
    assert refused(PILE, *words) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no config; give --fdl_config=NAME (--fdl_list lists all)"),
        ([PILE, "--fdl_config_file=x"], "--fdl_config and --fdl_config_file exclude each other"),
        ([f"{PILE}(3)"], "knobs are given by name, as in toy_package.gpt.Pile126M(NUM_LAYERS=2)"),
        ([f"{PILE}(NUM_LAYERS=two)"], "write NAME or NAME(ARGUMENT=value, ...), strings in quotes"),
        ([f"{PILE}(NUM_LAYERS=2"], "write NAME or NAME(ARGUMENT=value, ...), strings in quotes"),
        ([f"{PILE}(NUM_LAYER=2)"], "Pile126M has no knob NUM_LAYER; did you mean NUM_LAYERS?"),
        ([f"{PILE}(NUM_LAYERS='2')"], "Pile126M.NUM_LAYERS: int wanted, got '2'; the default is 2"),
    ],
)
def test_a_bad_config_flag_ends_in_one_line(words, line):
    assert line in refused(*words)


# The environment.


def test_the_environment_gives_knobs_that_a_config_has():
    environ = {"ENABLE_TE": "1", "VOCAB_PATH": "", "ENABLE_FP8": "0", "OTHER": "x"}
    assert flags.environment_knobs(environ, gpt.Pile126M) == ({"ENABLE_TE": True}, [])
    assert resolve(PILE, environ={"ENABLE_TE": "0"}).knobs["ENABLE_TE"] is False


def test_a_variable_without_knob_is_said_to_have_no_effect():
    resolved = resolve(PILE, environ={"NVTE_FUSED_ATTN": "1"})
    assert resolved.notices == (
        "environment variable NVTE_FUSED_ATTN=1 has no effect: Pile126M has no knob "
        "USE_FUSED_ATTENTION or USE_CUDNN_FLASH_ATTENTION",
    )


def test_a_variable_of_the_wrong_type_is_refused():
    line = refused(PILE, environ={"ENABLE_TE": "yes"})
    assert line == "environment variable ENABLE_TE=yes: bool wanted (0 or 1)"


# Nodes of the tree.


@pytest.mark.parametrize(
    ("flag", "where", "value"),
    [
        ("seed=7", "seed", 7),
        ("mesh=[1,2,3]", "mesh", (1, 2, 3)),
        ("mesh[1]=4", "mesh", (1, 4, 1)),
        ("name=8", "name", "8"),
        ("model.tied=false", "model.tied", False),
        ("model.blocks[1].hidden=4", "model.blocks[1].hidden", 4),
        ("model.blocks[-1].dropout=1", "model.blocks[1].dropout", 1.0),
        ("model.blocks[0].norm.epsilon=1e-3", "model.blocks[0].norm.epsilon", 1e-3),
        ("model.blocks[0].norm=None", "model.blocks[0].norm", None),
        ("model.blocks[0].axes=[a,b]", "model.blocks[0].axes", ("a", "b")),
        ("model.blocks[0].shape=[3,4,5]", "model.blocks[0].shape", (3, 4, 5)),
        ("model.blocks[0].names=[x,1]", "model.blocks[0].names", ["x", "1"]),
        ("model.blocks[0].names[0]=y", "model.blocks[0].names", ["y"]),
        ("model.blocks[0].dtype=float16", "model.blocks[0].dtype", "float16"),
        ("model.blocks[0].remat=EVERYTHING", "model.blocks[0].remat", parts.Remat.EVERYTHING),
        ("model.blocks[0].extra={a: 1}", "model.blocks[0].extra", {"a": 1.0}),
        ("optimizer[0].b1=0.5", "optimizer[0].b1", 0.5),
        ("optimizer[0].clip=1", "optimizer[0].clip", 1.0),
        ("optimizer[1]=x", "optimizer[1]", "x"),
        ("eval_data['pile'].x=3", "eval_data['pile'].x", 3.0),
        ("eval_data[lambada]=3", "eval_data['lambada']", 3),
        ("eval_data={}", "eval_data", {}),
        ("model.blocks[0].table={b: 2}", "model.blocks[0].table", {"b": 2}),
        ("model.blocks[0].head=None", "model.blocks[0].head", None),
    ],
)
def test_a_node_is_set_and_nothing_else(flag, where, value):
    before, after = resolve(PILE).tree, resolve(PILE, f"--fdl.{flag}").tree
    found = {line.path: line.value for line in tree.lines(after)}[where]
    assert found == value
    assert type(found) is type(value)
    assert all(line.startswith(where) for line in tree.differences(before, after))


def test_an_override_of_a_default_leaves_the_default_alone():
    resolve(PILE, "--fdl.model.blocks[0].names[0]=y")
    assert fdl.build(resolve(PILE).tree).model.blocks[0].names == ["a"]


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("num_layers=2", r"the tree has no num_layers; did you mean --fdl\.NUM_LAYERS\?"),
        ("model.vocab=2", r"the tree has no model\.vocab; did you mean --fdl\.model\.vocab_size\?"),
        ("epsilon=2", r"no epsilon; did you mean --fdl\.model\.blocks\[0\]\.norm\.epsilon or"),
        ("modle.tied=true", r"the tree has no modle; did you mean --fdl\.model"),
        ("model.blocks[7].hidden=2", r"the tree has no model\.blocks\[7\]"),
        (
            "eval_data['piel']=2",
            r"no eval_data\['piel'\]; did you mean --fdl\.eval_data\['pile'\]\?",
        ),
        ("quux=2", r"the tree has no quux; --fdl_help shows the tree"),
        ("seed.x=2", r"seed has no parts that can be set, it is 1"),
        (
            "model.blocks[0].made.epsilon=2",
            r"model\.blocks\[0\]\.made has no parts that can be set, it is <made by .*Norm>",
        ),
        ("model..tied=true", r"not a path; write it like a\.b\[0\]\['key'\]\.c"),
        ("model[=true", r"not a path"),
        ("model tied=true", r"not a path"),
        ("seed=abc", r"--fdl\.seed=abc: int wanted, got 'abc'; it is 1 now"),
        ("seed=1.5", r"int wanted, got 1\.5; it is 1 now"),
        ("model.tied=1", r"bool wanted, got 1; it is True now"),
        ("model.blocks[0].dropout=a", r"float wanted, got 'a'; it is 0\.0 now"),
        ("optimizer[0].b1=nan", r"b1=nan must be a finite number; it is 0\.9 now"),
        ("optimizer[0].b1=true", r"float wanted, got True; it is 0\.9 now"),
        ("optimizer[0].steps=2.5", r"int wanted, got 2\.5; it is 10 now"),
        ("model.blocks[0].shape=3", r"\[int, \.\.\.\] wanted, got 3"),
        ("model.blocks[0].remat=SOME", r"one of NOTHING, EVERYTHING wanted, got SOME; it is Remat"),
        (
            "model=3",
            r"a node cannot be typed; set one of its parts \(blocks, vocab_size, tied\)$",
        ),
        ("model.blocks=[3]", r"a node cannot be typed; set one of its parts \(\[0\], \[1\]\)$"),
        (
            "eval_data=3",
            r"a node cannot be typed; set one of its parts \(\['pile'\], \['lambada'\]\)$",
        ),
        ("model.blocks[0].activation=gelu", r"such a value cannot be typed here; use --fiddler"),
        ("model.blocks[0].head=x", r"Norm or None wanted, which cannot be typed here; use --fidd"),
        ("model.blocks[0].table=3", r"a dictionary wanted, got 3; it is \{'a': 1\} now"),
    ],
)
def test_a_bad_node_override_ends_in_one_line(flag, line):
    assert re.search(line, refused(PILE, f"--fdl.{flag}"))


def test_a_shared_node_is_shown_once_and_stays_shared():
    norm = fdl.Config(parts.Norm)
    root = fdl.Config(parts.Model, [fdl.Config(parts.Block, 1, norm=norm) for _ in range(2)], 3)
    assert "blocks[1].norm = <same as blocks[0].norm>\n" in flags.flat_text(root)
    changed = override(root, "blocks[0].norm.epsilon", "0.5")
    built = fdl.build(changed)
    assert built.blocks[0].norm is built.blocks[1].norm
    assert built.blocks[1].norm.epsilon == 0.5
    assert norm.epsilon == 1e-6


# Fiddlers.


def test_fiddlers_come_after_knobs_and_before_nodes():
    resolved = resolve(
        PILE,
        "--fdl.optimizer[0].steps=9",
        "--fiddler=toy_package.fiddlers.smoke(steps=3)",
        "--fiddler=toy_package.fiddlers.renamed('x')",
        "--fdl.NUM_LAYERS=5",
    )
    assert len(resolved.tree.model.blocks) == 1
    assert (resolved.tree.optimizer[0].steps, resolved.tree.name) == (9, "x")
    assert resolved.knobs["NUM_LAYERS"] == 5


def test_a_fiddler_without_effect_is_noticed():
    fiddler = "toy_package.fiddlers.idle"
    assert resolve(PILE, f"--fiddler={fiddler}").notices == (
        f"--fiddler={fiddler} changed nothing",
    )


@pytest.mark.parametrize(
    ("fiddler", "line"),
    [
        ("toy_package.fiddlers.smok", r"has no function smok; did you mean smoke\?"),
        ("toy_package.fiddlers.qx", r"no function qx; there are: smoke, renamed, idle, misfit"),
        (
            "toy_package.fiddlers.renamed",
            r"missing a required argument: 'name'; write .*\(name: str\)",
        ),
        (
            "toy_package.fiddlers.smoke(step=3)",
            r"unexpected keyword argument 'step'; write .*steps",
        ),
        ("toy_package.fiddlers.smoke(3", r"write NAME or NAME\(ARGUMENT=value"),
        ("toy_package.fiddlers.misfit", r"does not fit this config: No parameter named 'modle'"),
        ("nowhere.smoke", r"--fiddler=nowhere.smoke: there is no module nowhere"),
    ],
)
def test_a_bad_fiddler_ends_in_one_line(fiddler, line):
    assert re.search(line, refused(PILE, f"--fiddler={fiddler}"))


def test_fiddlers_without_dots_are_those_of_the_package(tmp_path, monkeypatch):
    assert registry.find_fiddler("smoke", package="toy_package").__name__ == "smoke"
    (tmp_path / "no_fiddlers").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UsageError, match=r"--fiddler=x: there is no no_fiddlers/fiddlers\.py; give"
    ):
        registry.find_fiddler("x", package="no_fiddlers")
