"""Text is tokenised once, into files that are mapped into memory afterwards.

A cache folder holds one pair of .npy files per part of the source: the ids (uint16 or uint32),
every document ended by eos, and the offset in it at which each document ends. Any token is then
reachable at once, so the order of training is a pure function of (seed, step) and going to a step
costs nothing.

A part is written under a temporary name and renamed when whole; `cache.json` comes last and marks
the cache as finished. What is interrupted goes on at the first missing part. One process builds, by
a file lock that the system frees when the process dies; the others wait, or take over.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import socket
import time
import zlib
from collections.abc import Iterator

import numpy as np

from paxlike.data.progress import Progress
from paxlike.data.sources import DocumentSource, Files, Part
from paxlike.data.token_stream import (
    FINISHED,
    TokenStream,
    damage,
    damaged,
    shard_damage,
    shard_path,
)
from paxlike.data.tokenizers import Tokenizer

_FORMAT = 1  # raised when the files change meaning
_BATCH_CHARACTERS = 1 << 20


def cache_folder(source: DocumentSource, tokenizer: Tokenizer, cache_dir: str) -> str:
    """The folder of a source and a tokenizer: its name changes when either does."""
    source = _found(source)
    return os.path.join(cache_dir, f"{_slug(source.name)}-{_key(source, tokenizer)}")


def open_or_build(
    source: DocumentSource,
    tokenizer: Tokenizer,
    cache_dir: str,
    *,
    documents: tuple[float, float] = (0.0, 1.0),
    num_workers: int = 0,
    is_first: bool = True,
    patience: float = 600.0,
) -> TokenStream:
    """The token stream of a source, built where it is not there yet.

    `num_workers` processes tokenise (0: this process). `is_first` is true for process 0 of a run:
    the others leave it a few seconds to begin. What is damaged in a finished cache is built again.
    Raises ValueError where the cache can be neither read nor written, and TimeoutError where the
    process that builds shows no sign of life for `patience` seconds.
    """
    check_workers(num_workers)
    source = _found(source)
    folder = cache_folder(source, tokenizer, cache_dir)
    if _is_finished(folder):
        with contextlib.suppress(FileNotFoundError):  # the mark is off
            _take_mark_off_damage(folder)
    if not _is_finished(folder):
        _make_folder(folder)
        _build_or_wait(
            source, tokenizer, folder, num_workers=num_workers, is_first=is_first, patience=patience
        )
    return TokenStream.open(folder, documents=documents)


def check_workers(count: int) -> None:
    if count < 0:
        raise ValueError(f"num_workers={count} (TOKENIZE_WORKERS) must be 0 (this process) or more")


def _take_mark_off_damage(folder: str) -> None:
    """Makes a finished cache of which files are missing or cut off an unfinished one."""
    while found := damage(folder):
        try:
            with _lock(folder) as mine:
                if mine and (still := damage(folder)):
                    print(
                        f"the token cache {folder} is damaged ({still}): building it again",
                        flush=True,
                    )
                    os.remove(os.path.join(folder, FINISHED))
                if mine:
                    return
        except FileNotFoundError:
            raise
        except OSError:
            raise damaged(folder, found) from None
        time.sleep(0.2)


def _build_or_wait(source, tokenizer, folder, *, num_workers, is_first, patience) -> None:
    begun = told = time.monotonic()
    while not _is_finished(folder):
        waited = time.monotonic() - begun
        if is_first or waited > 5.0 or _signs_of_life(folder) is not None:
            with _lock(folder) as mine:
                if mine:
                    if not _is_finished(folder):
                        _build(source, tokenizer, folder, num_workers=num_workers)
                    return
        age = _signs_of_life(folder)
        silence = waited if age is None else min(age, waited)
        if silence > patience:
            raise TimeoutError(
                f"waited {waited:.0f} s for another process to finish {folder}, which has not "
                f"grown for {silence:.0f} s: is that process alive, and do all processes see this "
                "folder? Build it ahead with python -m paxlike.data.prepare"
            )
        if time.monotonic() - told > 10.0:
            told = time.monotonic()
            print(f"waiting for another process that tokenises into {folder}", flush=True)
        time.sleep(0.2)


def _build(source, tokenizer, folder: str, *, num_workers: int) -> None:
    """Writes the missing shards, then the marker."""
    parts = source.parts()
    dtype = np.dtype(np.uint16 if _largest_id(tokenizer) < 1 << 16 else np.uint32)
    missing = [i for i in range(len(parts)) if not _is_whole(folder, i, dtype)]
    _remove_leftovers(folder)
    total = sum(part.size for part in parts)
    done = total - sum(parts[i].size for i in missing)
    with Progress(f"tokenising {source.name}", unit="tokens") as progress:
        for part in _run(source, tokenizer, folder, parts, missing, dtype, num_workers, progress):
            done += part.size
            progress.set(
                _tokens_written(folder, dtype), note=f"{done / max(total, 1):.0%} of parts"
            )
    facts = [_read_json(shard_path(folder, i) + ".json") for i in range(len(parts))]
    if not sum(fact["documents"] for fact in facts):
        raise ValueError(f"no text in {source!r}: nothing to tokenise")
    crc = "".join(f"{fact['crc']:08x}{fact['tokens']:x}" for fact in facts)
    finished = {
        "format": _FORMAT,
        "digest": hashlib.sha256(crc.encode()).hexdigest()[:16],
        "dtype": dtype.name,
        "tokens": sum(fact["tokens"] for fact in facts),
        "documents": sum(fact["documents"] for fact in facts),
        "shards": [[fact["tokens"], fact["documents"]] for fact in facts],
        "tokenizer": tokenizer.digest(),
        "source": source.name,
    }
    _write_json(os.path.join(folder, FINISHED), finished)


def _run(source, tokenizer, folder, parts, missing, dtype, num_workers, progress) -> Iterator[Part]:
    """Writes shards, here or in other processes; yields each part that is done."""

    def show() -> None:
        progress.set(_tokens_written(folder, dtype))

    if num_workers <= 0:
        for i in missing:
            _write_shard(source, tokenizer, folder, i, parts[i], dtype, show)
            yield parts[i]
        return
    context = multiprocessing.get_context("spawn")  # fork is not safe beside JAX's threads
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        running = {
            pool.submit(_write_shard, source, tokenizer, folder, i, parts[i], dtype): parts[i]
            for i in missing
        }
        try:
            while running:
                finished, _ = concurrent.futures.wait(
                    running, timeout=1.0, return_when=concurrent.futures.FIRST_COMPLETED
                )
                show()
                _touch(folder)
                for future in finished:
                    if isinstance(error := future.exception(), ValueError):
                        raise ValueError(str(error)) from error  # one line, as in this process
                    future.result()
                    yield running.pop(future)
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(source, tokenizer, folder, index, part, dtype, show=None) -> None:
    """Tokenises one part; memory holds a megabyte of text at a time, whatever the part's size."""
    path = shard_path(folder, index)
    temporary = f"{path}.{socket.gethostname()}-{os.getpid()}"
    threads = 1 if show is None else os.cpu_count() or 1
    eos_id = tokenizer.eos_id
    ends, tokens, crc, beaten = [], 0, 0, 0.0
    try:
        with open(f"{temporary}.tokens.tmp", "wb") as file:
            _write_header(file, dtype, 0)
            for texts in _batches(_read(source, part)):
                encoded = tokenizer.encode_batch(texts, num_threads=threads)
                lengths = np.fromiter((len(ids) + 1 for ids in encoded), np.int64, len(encoded))
                for ids in encoded:
                    ids.append(eos_id)
                data = np.concatenate([np.asarray(ids, dtype) for ids in encoded])
                ends.append(tokens + np.cumsum(lengths))
                tokens += len(data)
                crc = zlib.crc32(data.data, crc)
                file.write(data.data)
                if show is not None and time.monotonic() - beaten > 0.5:
                    beaten = time.monotonic()
                    file.flush()
                    _touch(folder)
                    show()
            file.seek(0)
            _write_header(file, dtype, tokens)  # numpy pads the header so that the length can grow
            file.flush()
            os.fsync(file.fileno())
        with open(f"{temporary}.ends.tmp", "wb") as file:
            np.save(file, np.concatenate(ends) if ends else np.zeros(0, np.int64))
    except OSError as error:
        raise ValueError(
            f"cannot write the token cache in {folder}: {error.strerror}. Set cache_dir to a "
            "folder with room; what is done so far is kept"
        ) from error
    os.replace(f"{temporary}.tokens.tmp", f"{path}.tokens.npy")
    os.replace(f"{temporary}.ends.tmp", f"{path}.ends.npy")
    documents = sum(map(len, ends))
    _write_json(f"{path}.json", {"tokens": tokens, "documents": documents, "crc": crc})


def _read(source: DocumentSource, part: Part) -> Iterator[str]:
    """The documents of a part; what fails here is no fault of the cache."""
    try:
        yield from source.read(part)
    except OSError as error:
        raise ValueError(f"{source.name} cannot be read: {error}") from error


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Non-empty texts in lists of about a megabyte."""
    batch, size = [], 0
    for text in texts:
        if text:
            batch.append(text)
            size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_header(file, dtype: np.dtype, count: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[bool]:
    """True where this process now holds the lock of the folder."""
    with open(os.path.join(folder, "lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise ValueError(
                f"no file locks in {folder} ({error.strerror}): move cache_dir to another disk"
            ) from None
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _found(source: DocumentSource) -> DocumentSource:
    return source.found if isinstance(source, Files) else source


def _key(source: DocumentSource, tokenizer: Tokenizer) -> str:
    facts = {
        "format": _FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer.digest(),
        "eos_id": tokenizer.eos_id,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _largest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.vocab_size - 1, tokenizer.eos_id)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")


def _is_finished(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, FINISHED))


def _is_whole(folder: str, index: int, dtype: np.dtype) -> bool:
    """Whether a shard is written, and its files are there in full."""
    try:
        facts = _read_json(shard_path(folder, index) + ".json")
        return not shard_damage(folder, index, facts["tokens"], facts["documents"], dtype)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        open(os.path.join(folder, "lock"), "a").close()
    except OSError as error:
        raise ValueError(
            f"cannot write the token cache in {folder}: {error.strerror}. Set cache_dir to a "
            "folder that can be written"
        ) from None


def _touch(folder: str) -> None:
    """Shows the processes that wait that this one is at work."""
    with open(os.path.join(folder, "heartbeat"), "w"):
        pass


def _signs_of_life(folder: str) -> float | None:
    """Seconds since the process that builds last wrote; None before it began."""
    try:
        return time.time() - os.stat(os.path.join(folder, "heartbeat")).st_mtime
    except FileNotFoundError:
        return None


def _tokens_written(folder: str, dtype: np.dtype) -> int:
    """Tokens in whole and in growing shards, read from the sizes of the files."""
    size = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".tokens.npy", ".tokens.tmp")):
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    size += max(entry.stat().st_size - 128, 0)
    return size // dtype.itemsize


def _remove_leftovers(folder: str) -> None:
    """Removes half-written files of processes that died on this machine: the lock is ours now."""
    for name in os.listdir(folder):
        if name.endswith(".tmp") and f".{socket.gethostname()}-" in name:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))


def _read_json(path: str) -> dict:
    with open(path) as file:
        return json.load(file)


def _write_json(path: str, value: dict) -> None:
    """Writes a file that is either whole or not there."""
    temporary = f"{path}.{socket.gethostname()}-{os.getpid()}.tmp"
    with open(temporary, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
