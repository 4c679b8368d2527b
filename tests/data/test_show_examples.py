import json

import pytest
from data.hf_folders import byte_level

from paxlike.data import show_examples


def test_command(tmp_path, capsys, caplog):
    folder = byte_level(tmp_path / "t")
    path = tmp_path / "s.jsonl"
    records = [{"prompt": "is it?", "completion": "yes"}, {"prompt": "no" * 99, "completion": "a"}]
    path.write_text("\n".join(map(json.dumps, records)))
    flags = ["--input", str(path), "--tokenizer", folder, "--template", "chatml"]
    show_examples.main([*flags, "--seq_len", "64", "--num", "1"])
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\n[[yes<|im_end|>]]\n" in shown
    assert "--- 2 examples of " in shown and "1 rows of 64" in shown
    assert "nono" not in shown
    assert "1 of 2 examples dropped" in caplog.text


def test_errors(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"x": "y"}')
    bytes_of = lambda name: ["--input", f"{tmp_path}/{name}", "--tokenizer", "bytes"]
    with pytest.raises(SystemExit, match="error: --input .* must be JSON lines"):
        show_examples.main(bytes_of("a.txt"))
    with pytest.raises(SystemExit, match="error: the tokenizer comes with no chat template"):
        show_examples.main(bytes_of("a.jsonl"))
    with pytest.raises(SystemExit, match="error: .*a.jsonl, line 1: none of prompt"):
        show_examples.main([*bytes_of("a.jsonl"), "--template", "plain"])
    with pytest.raises(SystemExit, match="error: examples for fine-tuning are kept apart"):
        show_examples.main([*bytes_of("a.jsonl"), "--template", "plain", "--packing", "none"])
