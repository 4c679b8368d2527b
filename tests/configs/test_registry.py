"""Names to configs, and the nearest right name."""

import re

import pytest
from commands import PILE, refused, resolve
from toy_package import gpt

from configs import flags
from configs.flags import UsageError
from configs.knobs import knobs
from paxlike.nearest import nearest

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
