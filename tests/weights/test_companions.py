"""Files beside weights: which are found, and whose tokenizer it is."""

from paxlike.weights import companions


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{folder.name}/{name}")


def test_what_an_import_kept_is_found_from_a_checkpoint(tmp_path):
    write(tmp_path / "hf", "tokenizer.json", "generation_config.json", "model.safetensors")
    kept = companions.copy(companions.beside(tmp_path / "hf"), tmp_path / "run" / companions.KEPT)
    assert kept == ["generation_config.json", "tokenizer.json"]
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint_00000000"
    checkpoint.mkdir(parents=True)
    for source in (tmp_path / "run", checkpoint):
        assert sorted(companions.gather(source, None)) == kept
    assert sorted(companions.gather(tmp_path / "none", None, tmp_path / "run")) == kept


def test_a_named_tokenizer_takes_the_place_of_that_of_the_weights(tmp_path):
    write(tmp_path / "hf", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    write(tmp_path / "own", "mine.model", "tokenizer_config.json")
    found = companions.gather(tmp_path / "hf", tmp_path / "own" / "mine.model")
    assert found == {
        "generation_config.json": tmp_path / "hf" / "generation_config.json",
        "tokenizer.model": tmp_path / "own" / "mine.model",
    }
    companions.copy(found, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "own/mine.model"


def test_meta_keeps_its_tokenizer_above_its_models(tmp_path):
    write(tmp_path, "tokenizer.model")
    write(tmp_path / "llama-2-7b", "params.json", "consolidated.00.pth")
    assert companions.beside(tmp_path / "llama-2-7b") == {
        "tokenizer.model": tmp_path / "tokenizer.model"
    }
