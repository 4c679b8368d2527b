"""The decode mode: weights from a checkpoint, continuations to the terminal and to a file."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax

from paxlike import parallel
from paxlike.checkpoint import Use
from paxlike.decode.generator import Generation, Generator, check_lengths, encode_prompts
from paxlike.decode.prompts import Prompt, read_prompts
from paxlike.decode.sampler import SamplingOptions
from paxlike.log.progress import Progress, duration
from paxlike.train.state import abstract_variables

if TYPE_CHECKING:
    from paxlike.experiment import Experiment

_MOST_SHOWN = 20  # continuations printed; a file takes more than a reader does


def decode(
    experiment: Experiment,
    job_log_dir: str,
    *,
    prompts: Sequence[str] = (),
    prompt_file: str | None = None,
    checkpoint: str | None = None,
    step: int | None = None,
    name: str | None = None,
    options: SamplingOptions | None = None,
    use: Use = "auto",
    stream: bool | None = None,
    config_text: str = "",
) -> int:
    """Continues `prompts` and those of `prompt_file`; returns the exit code of the process.

    Writes `decoder_out/<name>/decoder_out_<step>.jsonl` in `job_log_dir`, a line for each
    continuation, in the order of the prompts. Every process of a run calls it; the first one prints
    and writes. Other results of the same step that are there already stay: the new file gets a number,
    `decoder_out_<step>_2.jsonl`.

    Args:
      checkpoint: a job_log_dir, its checkpoints folder or one checkpoint; None is `job_log_dir`.
      step: of the checkpoint; None is the newest.
      name: of the output folder; None is the stem of `prompt_file`, or `prompts`.
      options: None takes those of the experiment.
      use: averaged weights where there are any, or one kind.
      stream: show the text as it comes; None does so where there is a single continuation.
      config_text: the resolved config of this start: warned of where it is of another model than was trained.

    Raises:
      ValueError: no prompt, a prompt that is too long, no tokenizer, no checkpoint, or nowhere to
        write.
    """
    options = options or experiment.sampling or SamplingOptions()
    asked = [Prompt(text) for text in prompts] + (read_prompts(prompt_file) if prompt_file else [])
    if not asked:
        raise ValueError(
            "nothing to decode: give --prompt=TEXT, as often as you like, or --prompt_file=FILE"
        )
    if experiment.tokenizer is None:
        raise ValueError(
            f"{experiment.name} has no tokenizer, and decoding needs one: set VOCAB_PATH"
        )
    max_length = _max_length(experiment)
    asked, ids = _encode(experiment, asked, max_length)  # refused before the weights are read
    texts = [prompt.text for prompt in asked]
    name = name or (Path(prompt_file).stem if prompt_file else "prompts")
    folder = _output_folder(Path(job_log_dir), name)
    if stream is None:
        stream = len(asked) * options.num_samples == 1
    mesh = experiment.mesh.build()
    # A token at a time cannot be spread over devices: over a context axis decoding is replicated.
    with parallel.activate(mesh, parallel.whole_rows(experiment.rules)):
        display = _Display(asked, options, stream)
        if note := _cut(ids, options.max_tokens, max_length):
            display.progress.write(note)
        with display.progress.busy("reading the weights"):
            abstract = abstract_variables(experiment.model, mesh)
            source = Path(checkpoint or job_log_dir)
            weights = experiment.read_variables(source, abstract, step=step, use=use)
        for line in weights.doubts(config_text=config_text, tokenizer=experiment.tokenizer):
            display.progress.write(f"warning: {line}")
        generator = Generator(
            experiment.model,
            weights.variables,
            experiment.tokenizer,
            options,
            max_length=max_length,
            kernels=experiment.kernels,
            say=display.progress.write,
        )
        results = generator.generate(
            texts, ids=ids, on_text=display.on_text if stream else None, on_result=display.on_result
        )
    display.close(results)
    if jax.process_index() == 0:
        about = {"seed": options.seed, "step": weights.step, "weights": weights.use}
        lines = [_fields(result, asked[result.prompt_index]) | about for result in results]
        file = _write(folder / f"decoder_out_{weights.step:08d}.jsonl", lines)
        throughput = generator.throughput
        display.progress.write(
            f"{len(results):,} continuations, {throughput.tokens:,} tokens in "
            f"{duration(throughput.seconds)} = {throughput.tokens_per_second:,.0f} tokens/s "
            f"(and {duration(throughput.compile_seconds)} of compiling), "
            f"{weights.use} of step {weights.step:,}: {file}"
        )
    return 0


def _encode(
    experiment: Experiment, asked: Sequence[Prompt], max_length: int
) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts with the text that is shown, a conversation as it is rendered, and what is fed for each."""
    shown, encoded, chat = [], [], experiment.chat
    if chat is not None:
        chat.check(experiment.tokenizer)
    for prompt in asked:
        messages = prompt.messages
        if chat is not None and not messages:
            messages = ({"role": "user", "content": prompt.text},)
        if not messages:
            shown.append(prompt)
            encoded += encode_prompts(experiment.tokenizer, [prompt.text], max_length)
            continue
        if chat is None:
            raise ValueError(
                "a prompt is a conversation ('messages'): set DECODE_CHAT=True, and CHAT_TEMPLATE"
            )
        text = chat.render(messages, experiment.tokenizer, add_generation_prompt=True)
        shown.append(dataclasses.replace(prompt, text=text))
        encoded.append(chat.prompt_ids(messages, experiment.tokenizer))
    check_lengths(encoded, max_length)
    return shown, encoded


def _cut(ids: Sequence[Sequence[int]], max_tokens: int, max_length: int) -> str:
    """A line where rows have no room for all the tokens that were asked for; empty where they have."""
    cut = sum(len(prompt) + max_tokens > max_length for prompt in ids)
    if not cut:
        return ""
    room = max_length - min(map(len, ids))
    return (
        f"note: rows have {max_length:,} tokens, prompt included: continuations of {cut:,} prompt(s) have fewer than "
        f"DECODE_MAX_TOKENS={max_tokens}, {room:,} at most behind the shortest"
    )


class _Display:
    """What the first process shows: the text as it comes, or a count and then the continuations."""

    def __init__(self, prompts: Sequence[Prompt], options: SamplingOptions, stream: bool):
        self._prompts, self._stream, self._shows = prompts, stream, jax.process_index() == 0
        self._total = len(prompts) * options.num_samples
        self._num_samples = options.num_samples
        self._done, self._last = 0, -1
        self.progress = Progress(
            self._total, description="decode", unit="prompt", enabled=self._shows
        )

    def on_text(self, index: int, text: str) -> None:
        if not self._shows:
            return
        if index != self._last:
            prompt = self._prompts[index // self._num_samples].text
            _print(f"{self._heading(index)}{prompt}")
            self._last = index
        _print(text)

    def on_result(self, index: int, result: Generation) -> None:
        del index, result
        self._done += 1
        if not self._stream:
            self.progress.update(self._done)

    def close(self, results: Sequence[Generation]) -> None:
        if not self._stream:
            self.progress.close()
        if not self._shows:
            return
        if self._stream:
            _print("\n")
            return
        for index, result in enumerate(results[:_MOST_SHOWN]):
            _print(f"{self._heading(index, result)}{result.prompt}{result.text}\n")
        if len(results) > _MOST_SHOWN:
            _print(f"\n... and {len(results) - _MOST_SHOWN:,} more in the file\n")

    def _heading(self, index: int, result: Generation | None = None) -> str:
        if self._total == 1:
            return ""
        prompt = self._prompts[index // self._num_samples]
        number = f"{index // self._num_samples + 1}" if prompt.id is None else prompt.id
        parts = [f"prompt {number}"]
        parts += [f"sample {index % self._num_samples + 1}"] if self._num_samples > 1 else []
        if result is not None:
            parts.append(f"{len(result.tokens)} tokens, ended by {result.finish_reason}")
        return f"\n=== {' | '.join(parts)} ===\n"


def _max_length(experiment: Experiment) -> int:
    """Tokens a row may have: the positions of the model, or the training length if unbounded."""
    positions = getattr(getattr(experiment.model, "position", None), "max_length", None)
    trained = getattr(experiment.train_data, "seq_len", None)
    length = positions or trained
    if not length:
        raise ValueError(
            f"{experiment.name} has no bound on positions and no training data: set MAX_SEQ_LEN"
        )
    return length


def _output_folder(job_log_dir: Path, name: str) -> Path:
    folder = job_log_dir / "decoder_out" / name
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot write to {folder}: {error.strerror}; choose another --job_log_dir"
            ) from None
        if not os.access(folder, os.W_OK):
            raise ValueError(
                f"cannot write to {folder}: it is read-only; choose another --job_log_dir"
            )
    return folder


def _fields(result: Generation, prompt: Prompt) -> dict[str, Any]:
    return {
        "id": result.prompt_index if prompt.id is None else prompt.id,
        "sample": result.sample_index,
        "prompt": result.prompt,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "tokens": result.tokens,
        "logprobs": [round(x, 6) for x in result.logprobs],
    }


def _write(file: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """All lines or none: the file appears when it is complete; where others are in it, one with a number.

    Returns the file that has them.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    stem, number = file.stem, 1
    try:
        while file.exists() and file.read_bytes() != text:
            number += 1
            file = file.with_stem(f"{stem}_{number}")
        unfinished = file.with_suffix(".tmp")
        unfinished.write_bytes(text)
        os.replace(unfinished, file)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror}") from None
    return file


def _print(text: str, stream: TextIO | None = None) -> None:
    """Writes at once, with question marks for what the terminal cannot show."""
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()
