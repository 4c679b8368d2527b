"""Chat templates: a conversation as text, as ids, and which of the ids the assistant wrote.

A template is a Jinja source as in Hugging Face's `tokenizer_config.json`, rendered in a sandbox; the
common ones are here by name. Which characters are an answer follows from the template alone: the text
of a conversation up to an answer must be the beginning of the text with it, so the answer is what is
added. A template that rewrites what came before can mark answers with `{% generation %}` instead.

Ids are cut where a model would meet the cut: what stands before an answer is encoded as it is when
that answer is generated, and the answer goes on from there. A token that would reach across the cut
(line ends before an answer, with GPT-2's rules) is never seen in training: it never comes generating.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from paxlike.data.chat_templates import NEEDS, TEMPLATES
from paxlike.data.tokenizers import Tokenizer

Message = Mapping[str, str]
Answers = Literal["all", "last"]
ANSWERS = ("all", "last")
Spans = list[tuple[int, int]]  # first character, and the one behind the last
_Writer = Callable[..., tuple[str, Spans]]

# Noncharacters of Unicode: no text has them.
_BEGIN, _END = "\ufdd0", "\ufdd1"


@dataclasses.dataclass(frozen=True)
class Chat:
    """Ids of a conversation, and for each whether it is scored: an answer with what ends it."""

    ids: list[int]
    is_answer: list[bool]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A way to write conversations.

    Attributes:
      name: `tokenizer` (the one that comes with the tokenizer), one of `chatml`, `llama2`, `llama3`,
        `gemma`, `alpaca`, `plain`, or a file with a Jinja source.
      variables: further values for the template, as `{"enable_thinking": False}`.
    """

    name: str = "tokenizer"
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.name not in (*TEMPLATES, "tokenizer") and not self._is_file:
            raise ValueError(
                f"chat template {self.name!r} is none of tokenizer, {', '.join(TEMPLATES)}, and no "
                "path of a .jinja file"
            )

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the template does not work with the tokenizer."""
        known = tokenizer.special_tokens()
        missing = [token for token in NEEDS.get(self.name, ()) if token not in known]
        if missing:
            raise ValueError(
                f"chat template {self.name!r} needs the tokens {', '.join(missing)}, which the tokenizer "
                "does not have: take the template of this model (tokenizer), or alpaca or plain"
            )
        self.encode(
            [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], tokenizer
        )

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; `add_generation_prompt` ends it where the assistant would begin."""
        return self._writer(tokenizer)(messages, add_generation_prompt)[0]

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """What a model is fed to answer: nothing has to be put before it."""
        text = self.render(messages, tokenizer, add_generation_prompt=True)
        return tokenizer.encode_template([text])[0]

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        tokenizer: Tokenizer,
        *,
        answers: Answers = "all",
    ) -> list[Chat]:
        """Ids of whole conversations, and which of them are answers (all, or only the last of each).

        Raises ValueError where the template refuses a conversation, or where it neither writes a
        conversation up to an answer as the beginning of the whole nor marks the answers.
        """
        write = self._writer(tokenizer)
        found = [self._answers(messages, write) for messages in conversations]
        names = _names(tokenizer)
        pieces = [_pieces(text, spans, names) for text, spans in found]
        texts = [text[p.start : p.cut] for (text, _), its in zip(found, pieces) for p in its]
        encoded = iter(tokenizer.encode_template(texts))
        return [
            _join(text, [(piece, next(encoded)) for piece in its], tokenizer, answers)
            for (text, _), its in zip(found, pieces)
        ]

    def source(self, tokenizer: Tokenizer) -> str:
        """The Jinja source."""
        if self._is_file:
            return _read(os.path.expanduser(self.name))
        if self.name != "tokenizer":
            return TEMPLATES[self.name]
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer comes with no chat template: name one of "
                f"{', '.join(TEMPLATES)}, or a .jinja file"
            )
        return tokenizer.chat_template

    @property
    def _is_file(self) -> bool:
        return self.name.endswith((".jinja", ".jinja2", ".j2"))

    def _writer(self, tokenizer: Tokenizer) -> _Writer:
        """A function that writes conversations: their text, and the spans of marked answers."""
        template = self._compiled(tokenizer)
        import jinja2

        begin = tokenizer.begin_ids
        values = {
            "bos_token": tokenizer.token(begin[0]) if begin else "",
            "eos_token": tokenizer.token(tokenizer.eos_id),
            "pad_token": tokenizer.token(tokenizer.pad_id),
            "tools": None,
            "documents": None,
            **self.variables,
        }

        def write(messages, add_generation_prompt=False):
            try:
                marked = template.render(
                    messages=list(messages), add_generation_prompt=add_generation_prompt, **values
                )
            except (jinja2.TemplateError, TypeError) as error:
                raise self._refused(error) from None
            return _take_marks(marked)

        return write

    def _compiled(self, tokenizer: Tokenizer) -> Any:
        source = self.source(tokenizer)
        try:
            import jinja2
        except ImportError:
            raise ValueError("chat templates need the package jinja2: install it") from None
        try:
            return _compile(source)
        except jinja2.TemplateError as error:
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:200]
        return ValueError(f"chat template {self.name!r} refuses it: {reason}")

    def _answers(self, messages: Sequence[Message], write: _Writer) -> tuple[str, Spans]:
        """The text of a conversation and the characters of it that are answers."""
        text, marked = write(messages)
        if marked:
            return text, marked
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = write(messages[:number], True)[0]
            upto = write(messages[: number + 1])[0]
            if not (upto.startswith(before) and text.startswith(upto)):
                raise ValueError(
                    f"chat template {self.name!r} does not write the conversation up to message "
                    f"{number + 1} as the beginning of the whole: mark its answers with "
                    "{% generation %}"
                )
            # The line end that some templates put behind an end-of-turn is not the model's to say.
            spans.append((len(before), len(upto.rstrip())))
        return text, spans


class _Piece(NamedTuple):
    """Text from a special token (or from the beginning) up to a cut, encoded in one go."""

    start: int
    cut: int
    is_answer: bool


def _pieces(text: str, spans: Spans, names: list[str]) -> list[_Piece]:
    """One piece for each cut.

    A special token divides a text for good, so a piece need not begin before the last one that ended
    an answer: the time of a long conversation grows with its length and not with its square. The
    token itself is in the piece, since it may take white space behind it.
    """
    pieces, start = [], 0
    for begin, end in spans:
        pieces += [_Piece(start, begin, False), _Piece(start, end, True)]
        last = next((name for name in names if text.endswith(name, start, end)), "")
        start = end - len(last) if last else start
    return [*pieces, _Piece(start, len(text), False)]


def _names(tokenizer: Tokenizer) -> list[str]:
    """Names that are special tokens wherever they stand, longest first."""
    special = tokenizer.special_tokens()
    names = sorted(special, key=len, reverse=True)
    found = zip(names, tokenizer.encode_template(names))
    return [name for name, ids in found if ids == [special[name]]]


def _join(text: str, encoded, tokenizer: Tokenizer, answers: Answers) -> Chat:
    """Ids piece by piece: each goes on with the ids that the text before it has on its own."""
    ids: list[int] = []
    is_answer: list[bool] = []
    start = before = cut = 0  # `before` ids come before the character `start`
    final = max((piece.cut for piece, _ in encoded if piece.is_answer), default=0)
    for piece, whole in encoded:
        if piece.start != start:
            start, before = piece.start, len(ids) - 1
        done = ids[before:]
        if whole[: len(done)] == done:
            new = whole[len(done) :]
        else:  # a token would span the cut
            (new,) = tokenizer.encode_template([_continuation(tokenizer, text[cut : piece.cut])])
        is_scored = piece.is_answer and (answers == "all" or piece.cut == final)
        ids += new
        is_answer += [is_scored] * len(new)
        cut = piece.cut
    return Chat(ids, is_answer)


def _continuation(tokenizer: Tokenizer, text: str) -> str:
    """`text` without its first space, where the tokenizer puts one before every text itself."""
    if text.startswith(" ") and len(tokenizer.encode(" a")) > len(tokenizer.encode("a")):
        return text[1:]
    return text


def _take_marks(marked: str) -> tuple[str, Spans]:
    """Text without the marks of `{% generation %}`, and where they stood."""
    if _BEGIN not in marked:
        return marked, []
    text, *pieces = marked.split(_BEGIN)
    spans = []
    for piece in pieces:
        inside, _, outside = piece.partition(_END)
        spans.append((len(text), len(text) + len(inside.rstrip())))
        text += inside + outside
    return text, spans


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}answer{% endgeneration %}` puts marks around an answer."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller):
            return _BEGIN + caller() + _END

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    # No `strftime_now`: rows must not depend on the day. Templates that ask whether it is defined
    # fall back to a fixed date; others get one by `variables`.
    return environment.from_string(source)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"no chat template at {path!r} ({error.strerror})") from None
