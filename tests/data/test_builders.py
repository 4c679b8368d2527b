import json
import subprocess
import sys

import pytest
import zstandard

from paxlike.data.builders.boolq import BoolQ
from paxlike.data.builders.my_lambada import MyLambada
from paxlike.data.builders.prepare import prepare
from paxlike.data.builders.the_pile import ThePile
from paxlike.data.lambada import Lambada
from paxlike.data.loader import Loader
from paxlike.data.sources import TfdsSource, tfds_datasets
from paxlike.data.tokenizers import ByteTokenizer

PILE = {
    "train/00": ["zero é", "one"],
    "train/01": ["two\nlines"],
    "val": ["held out"],
    "test": ["tested", "more"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of TFDS data sets, prepared from tiny files in the forms of the real ones."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("tfds")
    (raw / "train").mkdir()
    for name, texts in PILE.items():
        rows = [{"text": t, "meta": {"pile_set_name": "Tiny"}} for t in texts]
        data = "\n".join(map(json.dumps, rows)).encode()
        (raw / f"{name}.jsonl.zst").write_bytes(zstandard.compress(data))
    passages = "\n".join(json.dumps({"text": f"passage {i}"}) for i in range(3))
    (raw / "lambada_test.jsonl").write_text(passages)
    for name in ("train", "val", "test"):
        label = {} if name == "test" else {"label": True}
        row = {"question": "is it", "passage": f"{name} it is", "idx": 4, **label}
        (raw / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for builder in (ThePile, MyLambada, BoolQ):
        prepare(builder, data_dir=str(out), source=str(raw))
    return str(out)


def read(source):
    return [text for part in source.parts() for text in source.read(part)]


def test_the_pile(folder):
    texts = read(TfdsSource("the_pile/lm", "train", folder))
    assert sorted(texts) == sorted(PILE["train/00"] + PILE["train/01"])
    assert read(TfdsSource("the_pile/lm:1.0.0", "train", folder)) == texts
    assert read(TfdsSource("the_pile", "train", folder, part_records=1)) == texts
    assert read(TfdsSource("the_pile", "validation", folder)) == PILE["val"]
    assert len(read(TfdsSource("the_pile", "train[:2]", folder))) == 2
    record = TfdsSource("the_pile", "test", folder).records()[0]
    assert record["pile_set_name"] == b"Tiny"


def test_a_shard_of_the_pile_that_is_cut_off_is_named(tmp_path):
    for name in ("00", "val", "test"):
        line = json.dumps({"text": f"text {name}", "meta": {}}).encode()
        data = zstandard.compress(line)
        (tmp_path / f"{name}.jsonl.zst").write_bytes(data[:-1] if name == "val" else data)
    with pytest.raises(ValueError, match=r"/val\.jsonl\.zst ends in the middle of its data"):
        prepare(ThePile, data_dir=str(tmp_path / "tfds"), source=str(tmp_path))


def test_lambada_and_boolq(folder):
    assert sorted(read(TfdsSource("my_lambada", "test", folder))) == [
        f"passage {i}" for i in range(3)
    ]
    records = {s: TfdsSource("super_glue/boolq", s, folder).records()[0] for s in ("train", "test")}
    assert (records["train"]["label"], records["test"]["label"]) == (1, -1)
    assert records["train"]["passage"] == b"train it is"
    assert records["train"]["idx"] == 4


def test_what_is_there_is_named(folder):
    there = ["my_lambada:1.0.0", "super_glue/boolq:1.0.2", "the_pile/lm:1.0.0"]
    assert tfds_datasets(folder) == there
    with pytest.raises(
        ValueError, match=f"found no TFDS data set 'c4'.*; data sets there: {', '.join(there)}"
    ):
        TfdsSource("c4", data_dir=folder).parts()
    with pytest.raises(
        ValueError, match=r"has no split 'dev', only \['test', 'train', 'validation'\]"
    ):
        TfdsSource("the_pile", "dev", folder).parts()
    with pytest.raises(
        ValueError, match=r"no feature 'body', only \['pile_set_name', 'text'\]: set text_key"
    ):
        read(TfdsSource("the_pile", "test", folder, text_key="body"))
    with pytest.raises(ValueError, match=r"split 'train\[:x\]' cannot be read"):
        TfdsSource("the_pile", "train[:x]", folder).parts()


def test_fingerprint_is_of_the_data(folder):
    facts = TfdsSource("the_pile/lm", "train", folder).fingerprint()
    assert facts == TfdsSource("the_pile", "train", folder).fingerprint()
    assert facts != TfdsSource("the_pile", "test", folder).fingerprint()


def test_loaders_of_tfds(folder, tmp_path):
    tokenizer, cache = ByteTokenizer(), str(tmp_path)
    pile = Loader(TfdsSource("the_pile/lm", "train", folder), 8, tokenizer, cache_dir=cache)
    (batch,) = pile.epoch(global_batch=4)
    assert batch["num_bytes"].sum() == sum(
        len(t.encode()) for t in PILE["train/00"] + PILE["train/01"]
    )
    passages = TfdsSource("my_lambada", "test", folder)
    lambada = Loader(Lambada(passages), 96, tokenizer, packing="documents")
    (batch,) = lambada.epoch(global_batch=4)
    assert batch["example_weight"].tolist() == [1, 1, 1, 0]
    assert batch["num_bytes"].tolist() == [2, 2, 2, 0]  # a space and a digit


def test_reading_needs_no_tensorflow(folder):
    code = (
        "import sys; from paxlike.data.sources import TfdsSource; import paxlike.data.loader;"
        f"s = TfdsSource('my_lambada', 'test', {folder!r}); print(len(list(s.read(s.parts()[0]))));"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr


def test_a_second_preparation_keeps_what_is_there(folder):
    prepare(MyLambada, data_dir=folder, source=folder)  # an empty source: it is not read again


def test_source_that_lacks_files(tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere.*it should hold lambada_test.jsonl"):
        prepare(MyLambada, data_dir=str(tmp_path), source=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no files for train, validation, test: wanted NN"):
        prepare(ThePile, data_dir=str(tmp_path / "out"), source=str(tmp_path))
    (tmp_path / "lambada_test.jsonl").write_text("not json")
    with pytest.raises(ValueError, match="cannot prepare my_lambada|not JSON|Expecting value"):
        prepare(MyLambada, data_dir=str(tmp_path / "out"), source=str(tmp_path))


@pytest.mark.parametrize("script", ["the_pile", "lambada", "boolq"])
def test_scripts_without_network_end_in_one_line(root, tmp_path, script):
    # A proxy that refuses: what a machine without a network sees, wherever the test runs.
    env = {"PATH": "/usr/bin:/bin", "https_proxy": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    command = [sys.executable, str(root / "scripts" / f"download_{script}.py")]
    done = subprocess.run(
        [*command, "--data_dir", str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: cannot download")
    assert "pass --source FOLDER" in lines[0]


def test_script_with_a_local_source(root, tmp_path):
    (tmp_path / "lambada_test.jsonl").write_text(json.dumps({"text": "a b c"}))
    script = [sys.executable, str(root / "scripts" / "download_lambada.py")]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: set TFDS_DATA_DIR")
    env["TFDS_DATA_DIR"] = str(tmp_path / "tfds")
    done = subprocess.run(
        [*script, "--source", str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "test: 1 records" in done.stdout
    assert read(TfdsSource("my_lambada", "test", env["TFDS_DATA_DIR"])) == ["a b c"]
