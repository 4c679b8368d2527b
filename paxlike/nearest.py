"""Which of the right names a person probably meant.

Three kinds of slip are common: letters (`NUM_LAYER`), parts of a name (`ICI_MESH`, `BATCH_SIZE`)
and initials (`LR`); case never counts. Edit distance alone finds only the first.
"""

import difflib
import re
from collections.abc import Iterable, Sequence


def nearest(name: str, names: Iterable[str], *, limit: int = 3) -> list[str]:
    """The likeliest of `names`, best first; empty when nothing resembles `name`.

    >>> nearest("LR", ["LR_SCHEDULE", "LEARNING_RATE", "NUM_LAYERS"])
    ['LEARNING_RATE', 'LR_SCHEDULE']
    """
    scores = {candidate: _likeness(name, candidate) for candidate in names}
    best = max(scores.values(), default=0.0)
    # A sure hit needs no runners-up.
    floor = best if best >= 0.99 else max(0.6, best - 0.12)
    ranked = sorted(scores, key=lambda candidate: (-scores[candidate], len(candidate), candidate))
    return [candidate for candidate in ranked if scores[candidate] >= floor][:limit]


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """The question to close an error line with, or nothing when no name is near."""
    return ask([prefix + candidate for candidate in nearest(name, names)])


def ask(found: Sequence[str]) -> str:
    """`; did you mean A, B or C?`"""
    if not found:
        return ""
    return f"; did you mean {', '.join(found[:-1])}{' or ' if found[:-1] else ''}{found[-1]}?"


def _likeness(name: str, candidate: str) -> float:
    """1 for the same letters, less for initials, shared words, a part of the text, a few edits."""
    words, candidate_words = _words(name), _words(candidate)
    plain, candidate_plain = "".join(words), "".join(candidate_words)
    if plain == candidate_plain:
        return 1.0
    if len(plain) > 1 and plain == "".join(word[0] for word in candidate_words):
        return 0.9
    score = difflib.SequenceMatcher(None, plain, candidate_plain).ratio()
    share = len(plain) / len(candidate_plain)
    if len(plain) >= 2 and words == candidate_words[: len(words)]:
        score = max(score, 0.8 + 0.15 * share)
    elif f" {' '.join(words)} " in f" {' '.join(candidate_words)} ":
        score = max(score, 0.78 + 0.15 * share)
    elif len(plain) >= 3 and plain in candidate_plain:
        score = max(score, 0.65 + 0.2 * share)
    elif len(candidate_plain) >= 4 and candidate_plain in plain:
        score = max(score, 0.7)
    shared = {word for word in words if len(word) > 2} & set(candidate_words)
    if shared:
        first = 0.05 * (words[0] == candidate_words[0])
        shared_part = len(shared) / max(len(words), len(candidate_words))
        score = max(score, 0.5 + 0.4 * shared_part + first)
    return score


def _words(name: str) -> list[str]:
    """`NUM_LAYERS`, `numLayers` and `model.num_layers` as lower-case words."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return [word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word]
