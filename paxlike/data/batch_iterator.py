"""An iterator over batches that a thread makes ahead of the one who asks."""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

_POLL_SECONDS = 0.1


class BatchIterator:
    """`make(step)` for step = `start`, `start + 1`, ... up to `stop` (None: for ever).

    A thread keeps up to `prefetch` finished batches waiting. An exception in it is raised by
    `next()`. `close()` ends the thread; so do the end of the data, leaving a `with` block and the
    garbage collector.
    """

    def __init__(
        self,
        make: Callable[[int], dict[str, Any]],
        *,
        start: int = 0,
        stop: int | None = None,
        prefetch: int = 2,
    ):
        if prefetch < 1:
            raise ValueError(f"prefetch={prefetch} must be at least 1")
        self.step = start
        """Number of the batch that `next()` gives."""
        self.waited_seconds = 0.0
        """Time that `next()` has waited for data, in all."""
        self._stop = stop
        self._queue: queue.Queue = queue.Queue(prefetch)
        ended = threading.Event()
        # The thread must not refer to self: it would keep a forgotten iterator alive.
        thread = threading.Thread(
            target=_fill, args=(make, start, stop, self._queue, ended), name="batches", daemon=True
        )
        self._finalizer = weakref.finalize(self, _end, thread, ended)
        thread.start()

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, Any]:
        if not self._finalizer.alive or self.step == self._stop:
            self.close()
            raise StopIteration
        begun = time.perf_counter()
        batch, error = self._queue.get()
        self.waited_seconds += time.perf_counter() - begun
        if error is not None:
            self.close()
            raise error
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends the thread and waits for it; `next()` then raises StopIteration."""
        self._finalizer()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _fill(make, step: int, stop: int | None, ready: queue.Queue, ended: threading.Event) -> None:
    while not ended.is_set() and step != stop:
        item: tuple[Any, BaseException | None]
        try:
            item = make(step), None
        except BaseException as error:  # handed to the one who asks, who raises it
            item = None, error
        while not ended.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if item[1] is not None:
            return
        step += 1


def _end(thread: threading.Thread, ended: threading.Event) -> None:
    ended.set()
    if thread is not threading.current_thread():  # the garbage collector runs in any thread
        thread.join()
