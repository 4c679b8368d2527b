"""Small Hugging Face tokenizers, trained on the spot in the two forms that models use."""

import json
import os

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
TEXTS = [
    "the cat sat on the mat\n\nand it was asked: is it a cat? yes\nno user assistant system\n" * 8,
    "question: is grass green?\nanswer: yes no true false [INST] [/INST] naïve 漢字 \n\n\n" * 8,
]


# How Qwen and Llama 3 divide text; line ends stay together, unlike with GPT-2.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    folder,
    special=CHATML,
    *,
    bos=None,
    eos="<|im_end|>",
    template=None,
    gpt2=False,
    rstrip=False,
    **config,
):
    """A byte-level BPE, as of Qwen and Llama 3, or of GPT-2; returns the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if gpt2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, rstrip=rstrip) for name in special]
    )
    return _save(tokenizer, folder, bos, eos, template, config)


def word_boundary(folder, *, template=None, prepend_scheme=None, **config):
    """A BPE with word boundaries and byte fallback, as of Llama 2; returns the folder.

    `prepend_scheme` puts the boundary as newer files do.
    """
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    if prepend_scheme:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme, split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat", "yes", "no", "[INST] a [/INST]"] * 9, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    parts = json.loads(tokenizer.to_str())
    # Bytes are ordinary tokens of the vocabulary in the real files.
    parts["added_tokens"] = parts["added_tokens"][: len(special)]
    return _save(Tokenizer.from_str(json.dumps(parts)), folder, "<s>", "</s>", template, config)


def _save(tokenizer, folder, bos, eos, template, config):
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    values |= {"chat_template": template} if template else {}
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
        json.dump(values | config, file)
    return str(folder)
