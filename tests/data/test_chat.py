import json

import pytest
from data.hf_folders import CHATML, GEMMA, LLAMA3, byte_level, word_boundary

from paxlike.data.chat import ChatTemplate
from paxlike.data.chat_templates import TEMPLATES
from paxlike.data.hf_tokenizer import HuggingFaceTokenizer
from paxlike.data.tokenizers import ByteTokenizer, train_sentencepiece

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "is it a cat?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "no\n\nquestion: is it?"},
    {"role": "assistant", "content": "it is\na naïve 漢字 cat"},
]
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer for each template by name."""
    root = tmp_path_factory.mktemp("hf")
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    return {
        "chatml": byte_level(root / "chatml", CHATML),
        "llama2": word_boundary(root / "llama2"),
        "llama3": byte_level(root / "llama3", LLAMA3, bos=begin, eos=end),
        "gemma": byte_level(root / "gemma", GEMMA, bos="<bos>", eos="<eos>"),
        "alpaca": word_boundary(root / "alpaca"),
        "plain": byte_level(root / "plain", ("<|endoftext|>",), eos="<|endoftext|>"),
    }


def answers(chat, tokenizer):
    """Scored runs of ids, as texts with the names of special tokens."""
    runs, before = [], False
    for number, scored in zip(chat.ids, chat.is_answer, strict=True):
        if scored and not before:
            runs.append([])
        if scored:
            runs[-1].append(number)
        before = scored
    special = {number: name for name, number in tokenizer.special_tokens().items()}
    ends = [special.get(run[-1]) for run in runs]
    return [(tokenizer.decode(run), end) for run, end in zip(runs, ends)]


END = {
    "chatml": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "alpaca": "</s>",
    "plain": "<|endoftext|>",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_answers_and_their_ends_are_scored_and_nothing_else(folders, name):
    tokenizer = HuggingFaceTokenizer(folders[name])
    template = ChatTemplate(name)
    template.check(tokenizer)
    (chat,) = template.encode([TALK], tokenizer)
    texts = [(text.strip(" "), end) for text, end in answers(chat, tokenizer)]
    assert texts == [("yes", END[name]), (TALK[-1]["content"], END[name])]
    (last,) = template.encode([TALK], tokenizer, answers="last")
    assert answers(last, tokenizer)[0][0].strip() == TALK[-1]["content"]
    assert len(answers(last, tokenizer)) == 1 and last.ids == chat.ids


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_training_sees_the_ids_that_generation_feeds(folders, name):
    """What stands before the last answer is, id by id, the prompt of that answer."""
    tokenizer = HuggingFaceTokenizer(folders[name])
    template = ChatTemplate(name)
    (chat,) = template.encode([TALK], tokenizer, answers="last")
    first = chat.is_answer.index(True)
    assert chat.ids[:first] == template.prompt_ids(TALK[:-1], tokenizer)


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_same_ids_as_transformers(folders, name):
    transformers = pytest.importorskip("transformers")
    tokenizer = HuggingFaceTokenizer(folders[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders[name])
    theirs.chat_template = TEMPLATES[name]
    options = {"tokenize": True, "return_dict": False}
    (chat,) = ChatTemplate(name).encode([TALK], tokenizer)
    assert chat.ids == theirs.apply_chat_template(TALK, **options)
    prompt = ChatTemplate(name).prompt_ids(TALK[:2], tokenizer)
    assert prompt == theirs.apply_chat_template(TALK[:2], add_generation_prompt=True, **options)


@pytest.mark.parity
@pytest.mark.parametrize("form", ["first", "rstrip", "gpt2"])
def test_forms_of_tokenizers_that_make_joining_hard(tmp_path, form):
    """A word boundary at the very beginning only; a special token that takes the white space behind it."""
    transformers = pytest.importorskip("transformers")
    if form == "first":
        folder, name = word_boundary(tmp_path, prepend_scheme="first"), "llama2"
    else:
        folder, name = byte_level(tmp_path, gpt2=form == "gpt2", rstrip=form == "rstrip"), "chatml"
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.chat_template = TEMPLATES[name]
    tokenizer = HuggingFaceTokenizer(folder)
    talk = TALK + TALK[1:] * 3
    (chat,) = ChatTemplate(name).encode([talk], tokenizer)
    assert chat.ids == theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert len(answers(chat, tokenizer)) == 8
    assert {end for _, end in answers(chat, tokenizer)} == {END[name]}


MARKED = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content + '<|im_end|>' }}\n{% endif %}{%- endfor -%}"
)


@pytest.mark.parity
def test_marks_of_generation_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = byte_level(tmp_path, template=MARKED)
    tokenizer = HuggingFaceTokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (chat,) = ChatTemplate().encode([TALK], tokenizer)
    assert chat.ids == expected["input_ids"]
    assert [int(m) for m in chat.is_answer] == list(expected["assistant_masks"])


def test_template_of_the_tokenizer_and_of_a_file(tmp_path):
    folder = byte_level(tmp_path / "t", template=TEMPLATES["chatml"])
    tokenizer = HuggingFaceTokenizer(folder)
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATES["chatml"])
    for template in (ChatTemplate(), ChatTemplate(str(file))):
        assert template.encode([TALK], tokenizer) == ChatTemplate("chatml").encode(
            [TALK], tokenizer
        )
    date = tmp_path / "date.jinja"
    date.write_text("{{ date if date is defined else 'none' }}{{ [1, '漢'] | tojson }}")
    assert ChatTemplate(str(date)).render([], tokenizer) == 'none[1, "漢"]'
    assert ChatTemplate(str(date), {"date": "today"}).render([], tokenizer).startswith("today[")


def test_sentencepiece_and_bytes(tmp_path):
    texts = ["the cat is a cat yes no [INST] question"] * 9
    model = train_sentencepiece(texts, output=str(tmp_path / "m.model"), vocab_size=285)
    for tokenizer in (model, BYTES):
        (chat,) = ChatTemplate("llama2").encode([TALK], tokenizer)
        assert chat.ids[0] == tokenizer.bos_id and chat.ids[-1] == tokenizer.eos_id
        assert chat.ids.count(tokenizer.eos_id) == 2
        texts = [(text.strip(), end) for text, end in answers(chat, tokenizer)]
        assert texts == [("yes", "</s>"), (TALK[-1]["content"], "</s>")]
    # A tokenizer_config.json beside the model brings its template.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "T"}))
    assert model.chat_template == "T"


def test_a_token_that_would_span_the_cut_is_cut(tmp_path):
    """The line ends before an answer are one token when generating: training must see it too."""
    tokenizer = HuggingFaceTokenizer(byte_level(tmp_path, gpt2=True))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    talk = [{"role": "user", "content": "is it\n\n"}, {"role": "assistant", "content": "yes"}]
    (chat,) = ChatTemplate(str(template)).encode([talk], tokenizer)
    assert chat.ids == tokenizer.encode("is it\n\n") + tokenizer.encode("yes")
    assert chat.ids != tokenizer.encode("is it\n\nyes")


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ messages | length }}", "message 2 as the beginning of the whole: mark its answers"),
        ("{{ raise_exception('only users') }}", "refuses it: only users"),
        ("{{ messages[9].role }}", "refuses it: "),
        ("{% if %}", "refuses it: "),
        ("{{ ().__class__.__mro__ }}", "refuses it: .*unsafe"),
    ],
)
def test_templates_that_do_not_work_end_in_one_line(tmp_path, source, message):
    path = tmp_path / "bad.jinja"
    path.write_text(source)
    with pytest.raises(ValueError, match=message) as error:
        ChatTemplate(str(path)).check(BYTES)
    assert "\n" not in str(error.value)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="'chatlm' is none of tokenizer, chatml, .*no path"):
        ChatTemplate("chatlm")
    with pytest.raises(ValueError, match=r"'chatml' needs the tokens <\|im_start\|>, <\|im_end\|>"):
        ChatTemplate("chatml").check(BYTES)
    with pytest.raises(ValueError, match="comes with no chat template: name one of chatml"):
        ChatTemplate().check(BYTES)
    with pytest.raises(ValueError, match="no chat template at '.*gone.jinja'"):
        ChatTemplate(str(tmp_path / "gone.jinja")).check(BYTES)
