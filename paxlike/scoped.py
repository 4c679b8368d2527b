"""A value that holds inside a `with` block, for all that is called there in the same thread."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Scoped(Generic[T]):
    """What is traced inside `with scoped.set(value)` reads `value` by `get`; outside it is `default`."""

    def __init__(self, name: str, default: T):
        self._variable: contextvars.ContextVar[T] = contextvars.ContextVar(name, default=default)

    def get(self) -> T:
        """The value of the innermost block, the default outside all."""
        return self._variable.get()

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Makes `get` return `value` until the block ends, however it ends."""
        token = self._variable.set(value)
        try:
            yield
        finally:
            self._variable.reset(token)
