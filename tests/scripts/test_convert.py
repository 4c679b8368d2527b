"""scripts/convert.py as it is typed: a tiny LLaMA and a tiny GPT-2 there and back, and its mistakes."""

import subprocess
import sys

import pytest

from paxlike.checkpoint import arrays, read_metadata

LLAMA = {"NUM_LAYERS": 2, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "DIMS_PER_HEAD": 8}
LLAMA |= {"MODEL_DIMS": 32, "HIDDEN_DIMS": 48, "VOCAB_SIZE": 64}
GPT = {"NUM_LAYERS": 2, "NUM_HEADS": 4, "MODEL_DIMS": 32, "HIDDEN_DIMS": 128, "VOCAB_SIZE": 64}
GPT |= {"MAX_SEQ_LEN": 16}


def run(root, config, knobs, *words):
    command = [sys.executable, "scripts/convert.py", f"--fdl_config={config}"]
    command += [f"--fdl.{name}={value}" for name, value in knobs.items()]
    return subprocess.run([*command, *words], cwd=root, capture_output=True, text=True, timeout=200)


def hugging_face(config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    if config == "LLaMA7B":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(rms_norm_eps=1e-5, **sizes))
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("config,knobs", [("LLaMA7B", LLAMA), ("Quickstart", GPT)])
def test_there_and_back(root, tmp_path, config, knobs):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = hugging_face(config)
    model.save_pretrained(tmp_path / "hf")
    beside = {"tokenizer.json": b"{}\n", "tokenizer_config.json": b'{"chat_template": "x"}'}
    for name, content in beside.items():
        (tmp_path / "hf" / name).write_bytes(content)
    beside["generation_config.json"] = (tmp_path / "hf" / "generation_config.json").read_bytes()
    done = run(root, config, knobs, f"--input={tmp_path}/hf", f"--output={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/run: paxlike, float32\n"
    assert "(100%)" in done.stderr
    assert any("mixer" in name for name in read_metadata(tmp_path / "run")["arrays"])
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_00000000"
    assert (
        f'"config": "configs.{"llama" if config == "LLaMA7B" else "gpt"}.'
        in (arrays.read_item(folder, "config")["json"])
    )
    words = ["--dtype=bfloat16", "--max_shard_size=20KB"]
    done = run(root, config, knobs, f"--input={tmp_path}/run", f"--output={tmp_path}/out", *words)
    assert done.returncode == 0, done.stderr
    for name, content in beside.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)


@pytest.mark.parametrize(
    "words,line",
    [
        (["--input=x"], "--output=FOLDER is missing; --help lists all flags"),
        (["--input=no", "--output=y", "--to=paxlike"], "no is no folder of Hugging Face or Meta"),
        (["--input=no", "--output=y"], "no weights in no: a checkpoint of paxlike (job_log_dir"),
        (["--outptu=y"], "unknown flag --outptu; did you mean --output?"),
        (["--to=tpu"], "flag --to=tpu: value should be one of <paxlike|huggingface|peft>"),
        (
            ["--input=no", "--output=y", "--to=peft"],
            "adapters need a config that has them: --fdl.USE_LORA=True",
        ),
    ],
)
def test_mistakes(root, words, line):
    done = run(root, "Quickstart", {}, *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert line in done.stderr


def test_help(root):
    done = run(root, "Quickstart", {}, "--help")
    assert done.returncode == 0 and "--max_shard_size" in done.stdout


def test_adapters_of_another_rank_are_refused(root, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    )
    done = run(
        root,
        "QuickstartLLaMA",
        {"USE_LORA": True, "CHECKPOINT_RESTORE_PATH": "base"},
        f"--input={tmp_path}",
        "--output=y",
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "has LORA_RANK=4, LORA_ALPHA=8, LORA_KIND=lora; this config has LORA_RANK=8" in done.stderr
    )
