"""Tokens become text as they arrive: whole characters, cut at stop strings, never taken back."""

from __future__ import annotations

from collections.abc import Sequence

_UNKNOWN = "\ufffd"  # what the bytes of an unfinished character decode to


class TextStream:
    """The text of one continuation, fed a few tokens at a time.

    Args of the constructor:
      tokenizer: anything with `decode(ids) -> str`.
      prompt: ids before the continuation; some tokenizers drop the space in front of the first
        piece they decode, so the continuation is what the whole decodes to beyond the prompt.
      stop_strings: the text ends before the first of these.
    """

    def __init__(self, tokenizer, prompt: Sequence[int] = (), stop_strings: Sequence[str] = ()):
        self._tokenizer, self._prompt, self._stops = tokenizer, list(prompt), tuple(stop_strings)
        self._prompt_text = tokenizer.decode(self._prompt)
        self._sent = 0
        self.tokens: list[int] = []
        self.text = ""
        self.is_stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """Takes more tokens; returns the text that is now certain, perhaps nothing.

        Of tokens beyond a stop string none are kept, however many arrive at once.
        """
        if self.is_stopped or not tokens:
            return ""
        first = len(self.tokens)
        self.tokens.extend(tokens)
        self.text = self._decode(self.tokens)
        if self._find_stop(self.text) is None:
            return self._send(len(self.text) - self._num_uncertain())
        for end in range(first + 1, len(self.tokens) + 1):
            text = self._decode(self.tokens[:end])
            cut = self._find_stop(text)
            if cut is not None:
                self.tokens, self.text, self.is_stopped = self.tokens[:end], text[:cut], True
                break
        return self._send(len(self.text))

    def finish(self) -> str:
        """The text that was held back in case of more."""
        return self._send(len(self.text))

    def _send(self, end: int) -> str:
        start, self._sent = self._sent, max(self._sent, end)
        return self.text[start : self._sent]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(self._prompt + tokens)
        if text.startswith(self._prompt_text):
            return text[len(self._prompt_text) :]
        return self._tokenizer.decode(tokens)

    def _find_stop(self, text: str) -> int | None:
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        return min(found, default=None)

    def _num_uncertain(self) -> int:
        """Characters at the end that more tokens may change: unfinished, or a stop string begun."""
        whole = len(self.text.rstrip(_UNKNOWN))
        held = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, whole), held, -1):
                if self.text.endswith(stop[:length], 0, whole):
                    held = length
                    break
        return len(self.text) - whole + held
