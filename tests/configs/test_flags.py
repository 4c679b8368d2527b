"""The command line: values, names, overrides, precedence, reload, help, and every error."""

import json
import re
import subprocess
import sys

import fiddle as fdl
import pytest
from absl import flags as absl_flags
from toy_package import gpt, parts

from configs import flags
from configs.cli import registry, tree, values
from configs.cli.nearest import nearest
from configs.cli.override import override
from configs.flags import UsageError
from configs.knobs import knobs

PILE = "--fdl_config=toy_package.gpt.Pile126M"


def resolve(*words, environ=None):
    return flags.resolve(["main.py", *words], environ or {})


def refused(*words, environ=None) -> str:
    """The error line of a command; it must be one line."""
    with pytest.raises(UsageError) as error:
        resolve(*words, environ=environ)
    assert "\n" not in str(error.value)
    return str(error.value)


# Words to values.


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2", int, 2),
        ("-1", int, -1),
        ("1_000", int, 1000),
        ("1e-4", float, 1e-4),
        ("3", float, 3.0),
        ("inf", float, float("inf")),
        ("true", bool, True),
        ("False", bool, False),
        ("TRUE", bool, True),
        ("None", int | None, None),
        ("none", str | None, None),
        ("'None'", str | None, "None"),
        ("bfloat16", str, "bfloat16"),
        ('"bfloat16"', str, "bfloat16"),
        ("'bfloat16'", str, "bfloat16"),
        (r"\"bfloat16\"", str, "bfloat16"),
        ("", str, ""),
        ("''", str, ""),
        ("8", str, "8"),
        ("8", str | None, "8"),
        ("8", str | int, 8),
        ("true", str, "true"),
        ("3", float | int, 3),
        ("gs://bucket/a b.model", str, "gs://bucket/a b.model"),
        ("it's", str, "it's"),
        ("[1,8,1]", tuple[int, ...], (1, 8, 1)),
        ("(1, 8, 1)", tuple[int, ...], (1, 8, 1)),
        ("1,8,1", tuple[int, ...], (1, 8, 1)),
        ("(1,)", tuple[int, ...], (1,)),
        ("[]", tuple[int, ...], ()),
        ("[data,fsdp]", tuple[str, ...], ("data", "fsdp")),
        ("['a,b', \"c\", 3]", list[str], ("a,b", "c", "3")),
        ("[[1,2],[3]]", tuple[tuple[int, ...], ...], ((1, 2), (3,))),
        ("{a: 1, 'b': 0.5}", dict[str, float], {"a": 1.0, "b": 0.5}),
        ("{}", dict[str, float], {}),
    ],
)
def test_words_become_values_of_the_type(text, kind, value):
    parsed = values.parse(text, kind)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        ("2.5", int, "int wanted, got 2.5"),
        ("1e5", int, r"int wanted, got 100000.0 \(write 100000\)"),
        ("'2'", int, "int wanted, got '2'"),
        ("true", int, "int wanted, got True"),
        ("1", bool, "bool wanted, got 1"),
        ("yes", bool, "bool wanted, got 'yes'"),
        ("", int, "int wanted, got ''"),
        ("None", int, "int wanted, got None"),
        ("None", str, "str wanted, got None"),
        ("8", tuple[int, ...], r"\[int, \.\.\.\] wanted, got 8"),
        ("[1,a]", tuple[int, ...], "int wanted, got 'a'"),
        ("[1,8", tuple[int, ...], r"\[int, \.\.\.\] wanted, got \[1,8"),
        ("[1,[2]", tuple[int, ...], r"brackets or quotes do not close in 1,\[2"),
        ("[1]", dict[str, float], r"\{str: float\} wanted, got \[1\]"),
        ("{a}", dict[str, float], r"\{str: float\} wanted, got \{a\}"),
    ],
)
def test_words_of_another_type_are_refused(text, kind, line):
    with pytest.raises(values.WrongType, match=line):
        values.parse(text, kind)


@pytest.mark.parametrize("value", [(1, 8), "bfloat16", "8", "None", "a b", "", ["x", "true"], 1e-5])
def test_typed_values_come_back(value):
    back = values.parse_untyped(values.typed(value))
    assert back == (list(value) if isinstance(value, tuple) else value)


# Near names.


@pytest.mark.parametrize(
    ("slip", "right"),
    [
        ("NUM_LAYER", "NUM_LAYERS"),
        ("NUMLAYERS", "NUM_LAYERS"),
        ("num_layers", "NUM_LAYERS"),
        ("LAYERS", "NUM_LAYERS"),
        ("ICI_MESH", "ICI_MESH_SHAPE"),
        ("LR", "LEARNING_RATE"),
        ("BATCH_SIZE", "PERCORE_BATCH_SIZE"),
        ("PER_CORE_BATCH_SIZE", "PERCORE_BATCH_SIZE"),
        ("CLIP_GRADIENT_NORM", "CLIP_GRADIENT_NORM_TO_VALUE"),
        ("DTYPE", "FPROP_DTYPE"),
        ("STEPS", "MAX_STEPS"),
        ("NUM_STEPS", "MAX_STEPS"),
        ("DROPOUT", "DROPOUT_PROB"),
        ("LEARNIGN_RATE", "LEARNING_RATE"),
        ("BATCH", "PERCORE_BATCH_SIZE"),
        ("HIDDEN_SIZE", "HIDDEN_DIMS"),
    ],
)
def test_a_slip_finds_the_right_name_first(slip, right):
    assert nearest(slip, [knob.name for knob in knobs(gpt.Pile126M)])[0] == right


def test_nothing_near_is_nothing():
    assert nearest("XYZZY", [knob.name for knob in knobs(gpt.Pile126M)]) == []


# Names to configs.


@pytest.mark.parametrize(
    "name",
    ["toy_package.gpt.Pile126M", "gpt.Pile126M", "Pile126M", "GPT5B", "toy_package.gpt.GPT5B"],
)
def test_a_config_is_found_by_path_unique_name_and_alias(name):
    found = flags.find_config(name, package="toy_package")
    assert found is (gpt.Pile5B if "GPT5B" in name else gpt.Pile126M)


def test_a_config_outside_the_package_is_found_by_its_path():
    assert resolve(PILE).config_class is gpt.Pile126M


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Pile126", r"no config of that name in toy_package; did you mean Pile126M\?"),
        ("pile126m", r"did you mean Pile126M\?"),
        ("Quux", r"no config of that name in toy_package; --fdl_list lists all"),
        ("Pile5B", r"is ambiguous; write toy_package.gpt.Pile5B or toy_package.llama.Pile5B"),
        ("gpt.Pile126", r"does not exist; did you mean toy_package.gpt.Pile126M\?"),
        ("gpt.GPT", r"is a set of knobs, not a config; configs made of it: Pile126M, Pile5B"),
        ("gpt.fdl", r"is no config but a module; --fdl_list lists all"),
        ("toy_package.llama", r"is a module; the configs in it: Pile5B, Llama7B$"),
        ("gtp.Quux", r"there is no module gtp; did you mean toy_package.gpt\?"),
        ("nowhere.Llama7B", r"no module nowhere; did you mean toy_package.llama.Llama7B\?"),
        ("zzz.Quux", r"there is no module zzz; Python finds modules in PYTHONPATH"),
    ],
)
def test_an_unknown_config_ends_in_one_line(name, line):
    with pytest.raises(UsageError, match=f"^--fdl_config={re.escape(name)}.*{line}") as error:
        flags.find_config(name, package="toy_package")
    assert "\n" not in str(error.value)


def test_the_listing_has_one_aligned_line_each():
    assert flags.list_configs(package="toy_package").splitlines() == [
        "toy_package.gpt.Pile126M   GPT-3 126M on the Pile",
        "toy_package.gpt.Pile5B     GPT-3 5B on the Pile (also GPT5B)",
        "toy_package.llama.Pile5B   LLaMA 5B",
        "toy_package.llama.Llama7B",
    ]


def test_a_module_that_cannot_be_imported_is_reported(tmp_path, monkeypatch):
    package = tmp_path / "half_broken"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text("from toy_package.gpt import GPT\nclass Fine(GPT): pass\n")
    (package / "typo.py").write_text(
        "from toy_package.gpt import GPT\n\nclass Bad(GPT):\n    NUM_LAYER = 3\n"
    )
    (package / "lost.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    listing = flags.list_configs(package="half_broken").splitlines()
    assert listing[0].startswith("half_broken.good.Fine")
    typo = (
        "half_broken.typo cannot be imported: Bad.NUM_LAYER: no base of Bad declares this knob; "
        "did you mean NUM_LAYERS? (typo.py:3)"
    )
    assert listing[1:] == [
        "not listed: half_broken.lost cannot be imported: "
        "ModuleNotFoundError: No module named 'no_such_module' (lost.py:1)",
        f"not listed: {typo}",
    ]
    with pytest.warns(UserWarning, match="half_broken.* cannot be imported") as caught:
        assert flags.find_config("Fine", package="half_broken").__name__ == "Fine"
    assert [str(warning.message) for warning in caught][1] == typo
    with pytest.raises(
        UsageError, match=r"--fdl_config=Bad: not found, but half_broken\.lost cannot"
    ):
        flags.find_config("Bad", package="half_broken")
    assert refused("--fdl_config=half_broken.typo.Bad") == typo


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


@pytest.fixture
def absl():
    own = absl_flags.FlagValues()
    absl_flags.DEFINE_string("job_log_dir", None, "folder of the run", flag_values=own)
    absl_flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do", flag_values=own)
    absl_flags.DEFINE_integer("port", 1, "a port", flag_values=own)
    return own


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


# Text and JSON.


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


# Help.


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
