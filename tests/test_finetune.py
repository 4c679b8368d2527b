"""Real work from end to end: pretrain a small LLaMA, fine-tune it on a task with certain answers, take it elsewhere.

The task is made of the library of this Python: is a function a method of a class? (`paxlike.data.method_task`)
"""

import functools
import json
import subprocess
import sys

import pytest

from paxlike.data import stdlib_text
from paxlike.data.method_task import QUESTION, write
from paxlike.data.tokenizers import train_sentencepiece
from tests import runs
from tests.runs import ROOT, environment

run = functools.partial(runs.run, quick=False)  # hundreds of steps

SMALL = {
    "NUM_KV_HEADS": 2,
    "MODEL_DIMS": 64,
    "HIDDEN_DIMS": 160,
    "MAX_SEQ_LEN": 160,
    "PERCORE_BATCH_SIZE": 16,
    "LR_COS_WARMUP": 5,
    "LR_COS_DECAY_START": 6,
    "SUMMARY_INTERVAL_STEPS": 20,
    "CHECKPOINT_EVERY_N_STEPS": "None",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    counts = write(str(folder), max_megabytes=6.0, max_characters=160)
    assert counts["train"] > 1000 and counts["validation"] > 100
    stdlib_text.write(str(folder), max_megabytes=1.0, heldout_percent=10.0)
    texts = [document.text for document in stdlib_text.documents(max_megabytes=1.0)]
    train_sentencepiece(texts, output=str(folder / "tiny.model"), vocab_size=512)
    return folder, {
        "TRAIN_FILES": str(folder / "train.jsonl"),
        "EVAL_FILES": str(folder / "heldout.jsonl"),
        "VOCAB_PATH": str(folder / "tiny.model"),
        "CACHE_DIR": str(folder / "cache"),
    }


def task(folder, text, **knobs):
    files = {key: text[key] for key in ("VOCAB_PATH", "CACHE_DIR")}
    files |= {"TRAIN_SET": "boolq", "TRAIN_FILES": folder / "methods_train.jsonl"}
    files |= {"BOOLQ_FILE": folder / "methods_validation.jsonl", "EVAL_SETS": '["BoolQ"]'}
    # Two single tokens of a small vocabulary.
    files |= {"BOOLQ_ANSWERS": '["a","b"]', "PACKED_INPUT": False, "EVAL_MAX_BATCHES": 8}
    return SMALL | files | knobs


def accuracy(job_log_dir):
    """boolq_acc of the newest evaluation."""
    newest = sorted((job_log_dir / "eval_out" / "BoolQ").glob("*.json"))[-1]
    return json.loads(newest.read_text())["metrics"]["boolq_acc"]["value"]


@pytest.fixture(scope="module")
def base(data):
    folder, text = data
    run(
        folder / "base",
        SMALL | text | {"MAX_STEPS": 80, "LR_COS_DECAY_END": 80, "PACKED_INPUT": True},
        config="QuickstartLLaMA",
    )
    return folder / "base"


def tuned(base, data, name, *, num_steps, **knobs):
    """A run on the task from the base; its job_log_dir, evaluated, and its knobs."""
    steps = {"MAX_STEPS": num_steps, "LR_COS_DECAY_END": num_steps, "CHECKPOINT_RESTORE_PATH": base}
    knobs = task(*data, **steps, EVAL_INTERVAL_STEPS=1000, **knobs)
    folder = base.parent / name
    for mode in ("train", "eval"):
        run(folder, knobs, f"--mode={mode}", config="QuickstartLLaMA")
    return folder, knobs


@pytest.fixture(scope="module")
def sft(base, data):
    return tuned(base, data, "sft", num_steps=100, LEARNING_RATE=3e-3)


@pytest.fixture(scope="module")
def lora(base, data):
    return tuned(base, data, "lora", num_steps=200, LEARNING_RATE=5e-3, USE_LORA=True, LORA_RANK=16)


def convert(source, output, knobs, *flags):
    """Through scripts/convert.py."""
    overrides = [f"--fdl.{name}={value}" for name, value in knobs.items()]
    sizes = [f"--fdl.{name}={value}" for name, value in {"NUM_LAYERS": 2, "NUM_HEADS": 4}.items()]
    sizes.append("--fdl.VOCAB_SIZE=512")
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "convert.py"),
            "--fdl_config=QuickstartLLaMA",
            *sizes,
            *overrides,
            f"--input={source}",
            f"--output={output}",
            *flags,
        ],
        env=environment(quick=False),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return output


def test_untrained_for_the_task_it_guesses_and_fine_tuned_it_knows(base, data, sft, lora):
    folder = base.parent / "zero"
    run(folder, task(*data), "--mode=eval", f"--checkpoint={base}", config="QuickstartLLaMA")
    assert 0.35 < accuracy(folder) < 0.65
    assert accuracy(sft[0]) > 0.75
    assert accuracy(lora[0]) > 0.75


def test_a_checkpoint_of_adapters_is_small_and_goes_on(lora, sft):
    size = lambda run: sum(
        p.stat().st_size for p in (run / "checkpoints").rglob("*") if p.is_file()
    )
    assert size(lora[0]) < size(sft[0]) / 2
    folder, knobs = lora
    more = knobs | {"MAX_STEPS": 202, "LR_COS_DECAY_END": 202}
    done = run(folder, more, config="QuickstartLLaMA")
    assert "going on from the checkpoint of step 200" in done.stderr
    assert "reading frozen weights from" in done.stderr
    lost = {name: value for name, value in knobs.items() if name != "CHECKPOINT_RESTORE_PATH"}
    done = run(folder, lost, "--mode=eval", config="QuickstartLLaMA", expect=2)
    assert "name the weights that it was trained on with CHECKPOINT_RESTORE_PATH" in done.stderr


def test_adapters_through_the_format_of_peft(lora):
    folder, knobs = lora
    out = convert(folder, folder.parent / "peft", knobs, "--to=peft", "--checkpoint_step=200")
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    back = convert(out, folder.parent / "adapters", knobs)
    run(back, knobs, "--mode=eval", config="QuickstartLLaMA")
    assert (
        accuracy(back)
        == json.loads((folder / "eval_out/BoolQ/eval_out_00000200.json").read_text())["metrics"][
            "boolq_acc"
        ]["value"]
    )


def test_a_conversation_with_adapters(lora):
    folder, knobs = lora
    chat = knobs | {"DECODE_CHAT": True, "DECODE_MAX_TOKENS": 2, "DECODE_TEMPERATURE": 0}
    ask = ["--mode=decode", f"--prompt=def f(self): pass\nquestion: {QUESTION}?\nanswer:"]
    run(folder, chat | {"CHAT_TEMPLATE": "plain"}, *ask, config="QuickstartLLaMA")
    (file,) = (folder / "decoder_out" / "prompts").glob("*.jsonl")
    assert json.loads(file.read_text())["text"][0] in "ab"  # the words for yes and no
    done = run(folder, chat | {"CHAT_TEMPLATE": "llama3"}, *ask, config="QuickstartLLaMA", expect=2)
    assert "chat template 'llama3' needs the tokens <|start_header_id|>" in done.stderr


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sft", "lora"])
def test_hugging_face_gives_the_same_answers(name, data, sft, lora):
    torch = pytest.importorskip("torch", reason="the extra `parity`")
    transformers = pytest.importorskip("transformers", reason="the extra `parity`")
    from paxlike.data.tokenizers import SentencePieceTokenizer

    folder, knobs = {"sft": sft, "lora": lora}[name]
    step = {"sft": 100, "lora": 200}[name]
    out = convert(folder, folder.parent / f"hf_{name}", knobs, f"--checkpoint_step={step}")
    # What was exported is read by ours without a checkpoint of ours, adapters merged.
    plain = {k: v for k, v in knobs.items() if "LORA" not in k and "RESTORE" not in k}
    read = folder.parent / f"read_{name}"
    run(read, plain, "--mode=eval", f"--checkpoint={out}", config="QuickstartLLaMA")
    result = folder / "eval_out" / "BoolQ" / f"eval_out_{step:08d}.json"
    metrics = json.loads(result.read_text())["metrics"]
    assert accuracy(read) == metrics["boolq_acc"]["value"]

    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = SentencePieceTokenizer(data[1]["VOCAB_PATH"])
    no, yes = (tokenizer.encode(text)[0] for text in ("b", "a"))
    right = total = 0
    lines = (data[0] / "methods_validation.jsonl").read_text().splitlines()
    for line in lines[: metrics["boolq_acc"]["weight"].__int__()]:
        record = json.loads(line)
        prompt = f"{record['passage']}\nquestion: {QUESTION}?\nanswer:"
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)[-(SMALL["MAX_SEQ_LEN"] - 64) :]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        right += bool(logits[yes] > logits[no]) == record["answer"]
        total += 1
    assert right / total == pytest.approx(metrics["boolq_acc"]["value"], abs=1e-6)
