"""The small files that stand beside weights: tokenizer, chat template, how to generate. Copied as they are.

Weights that came from Hugging Face or Meta leave theirs in the folder `huggingface` of the job_log_dir, so that an
export finds them; a tokenizer that a config names stands for that of the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

KEPT = "huggingface"  # folder in a job_log_dir
GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def beside(source: Path) -> dict[str, Path]:
    """Name -> file, of the weights in `source`: a foreign folder, or a checkpoint or job_log_dir of paxlike."""
    for folder in _folders(source):
        found = {name: folder / name for name in (*TOKENIZER, GENERATION)}
        found = {name: path for name, path in found.items() if path.is_file()}
        if found:
            return found
    return {}


def of_tokenizer(path: Path) -> dict[str, Path]:
    """Name -> file, of a SentencePiece model, a `tokenizer.json`, or a folder with one."""
    folder = path if path.is_dir() else path.parent
    found = {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
    if path.is_file():
        own = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        other = "tokenizer.model" if own == "tokenizer.json" else "tokenizer.json"
        if folder / own != path:  # a name of its own: what lies beside it may be another's
            found = {}
        found.pop(other, None)
        found[own] = path
    return found


def gather(source: Path, tokenizer: Path | None, base: Path | None = None) -> dict[str, Path]:
    """What belongs beside an export of `source`: its own, else that of the weights it began with (`base`).

    A `tokenizer`, where one is named, takes the place of theirs.
    """
    found = beside(source) or (beside(base) if base is not None else {})
    named = {} if tokenizer is None else of_tokenizer(tokenizer)
    if named:
        found = {name: path for name, path in found.items() if name not in TOKENIZER} | named
    return found


def copy(files: Mapping[str, Path], folder: Path) -> list[str]:
    """Copies `files` into `folder`, which is made where there is none; their names, sorted."""
    if files:
        folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if path.resolve() != (folder / name).resolve():
            shutil.copyfile(path, folder / name)
    return sorted(files)


def _folders(source: Path) -> Iterator[Path]:
    yield source
    if (source / "params.json").is_file():  # Meta keeps one tokenizer above its models
        yield source.parent
    for run in (source, *source.absolute().parents[:2]):  # job_log_dir/checkpoints/checkpoint_*
        yield run / KEPT
