"""The knobs of data and tokenizer, and the loaders that they make."""

from typing import Annotated, Any, Literal

import fiddle as fdl

from configs.bounds import AtLeast
from configs.knobs import Knobs
from paxlike.data.boolq import BoolQ
from paxlike.data.instruct import Instruct
from paxlike.data.lambada import Lambada
from paxlike.data.loader import Loader
from paxlike.data.mixtures import Mixture
from paxlike.data.open_tokenizer import open_tokenizer
from paxlike.data.sources import Files, JsonLines, TfdsSource
from paxlike.data.synthetic import SyntheticTokens


class DataKnobs(Knobs):
    """Data and tokenizer."""

    MAX_SEQ_LEN: Annotated[int, "tokens per row", AtLeast(1)] = 2048
    VOCAB_PATH: Annotated[
        str | None, "SentencePiece model, or tokenizer.json of Hugging Face, or a folder with one"
    ] = None
    BOS_ID: Annotated[int | None, "id where a row begins; None: the tokenizer's", AtLeast(0)] = None
    EOS_ID: Annotated[int | None, "id that ends a document; None: the tokenizer's", AtLeast(0)] = (
        None
    )
    TFDS_DATA_DIR: Annotated[str | None, "folder of prepared TFDS data sets; None: TFDS's own"] = (
        None
    )
    TRAIN_SET: Annotated[
        Literal["text", "boolq", "instruct"],
        "what is trained on: text, BoolQ, or prompts with answers and conversations",
    ] = "text"
    TRAIN_FILES: Annotated[
        str | None, "text or JSON-lines files (globs, comma-separated) in place of TFDS"
    ] = None
    TRAIN_WEIGHTS: Annotated[
        tuple[float, ...], "share of rows of each part of TRAIN_FILES between commas; (): one set"
    ] = ()
    EVAL_FILES: Annotated[str | None, "held-out files, as TRAIN_FILES"] = None
    TEXT_KEY: Annotated[str, "key of the text in JSON lines"] = "text"
    LAMBADA_FILE: Annotated[str | None, "JSON-lines file of LAMBADA in place of TFDS"] = None
    BOOLQ_FILE: Annotated[str | None, "JSON-lines file of BoolQ to evaluate, not TFDS"] = None
    BOOLQ_ANSWERS: Annotated[
        tuple[str, str], "yes and no as they are tokenised: with a space for byte-level tokenizers"
    ] = ("yes", "no")
    CHAT_TEMPLATE: Annotated[
        str,
        "instruct: tokenizer (its own), chatml, llama2, llama3, gemma, alpaca, plain, or a file",
    ] = "tokenizer"
    SCORED_ANSWERS: Annotated[
        Literal["all", "last"], "instruct: answers of a conversation that have weight"
    ] = "all"
    OVERLONG: Annotated[
        Literal["drop", "truncate_prompt", "truncate"], "instruct: examples longer than MAX_SEQ_LEN"
    ] = "drop"
    EVAL_SETS: Annotated[
        tuple[str, ...],
        "held-out sets: HeldOut, PileValidation, LambadaValidation, BoolQ, Instruct",
    ] = ()
    PACKED_INPUT: Annotated[
        bool, "attention stays inside each document (segments and positions)"
    ] = False
    TRAIN_INPUT_RANDOM_SEED: Annotated[int, "of the order of training rows"] = 0
    CACHE_DIR: Annotated[str, "where tokenised data is kept"] = "~/.cache/paxlike"
    TOKENIZE_WORKERS: Annotated[int, "processes that tokenise, 0: this one", AtLeast(0)] = 0

    def tokenizer(self) -> fdl.Config[Any] | None:
        """The tokenizer, not read before it is used."""
        return fdl.Config(
            open_tokenizer, path=self.VOCAB_PATH or "", bos_id=self.BOS_ID, eos_id=self.EOS_ID
        )

    def train_data(self) -> fdl.Config[Loader] | None:
        """Training rows; None for configs that only evaluate."""
        kind, files, weights = self.TRAIN_SET, self.TRAIN_FILES, self.TRAIN_WEIGHTS
        packing = "packed" if self.PACKED_INPUT else "concatenated"
        if kind != "text":
            packing = "packed" if kind == "instruct" and self.PACKED_INPUT else "documents"
        if not weights:
            return self.loader(self.source(kind, "train", files), packing=packing)
        parts = (files or "").split(",")
        if len(parts) != len(weights):
            raise ValueError(
                f"TRAIN_WEIGHTS={list(weights)} has {len(weights)} shares but TRAIN_FILES={files!r} has "
                f"{len(parts)} parts between commas"
            )
        sources = [self.source(kind, "train", part.strip()) for part in parts]
        return self.loader(fdl.Config(Mixture, sources=sources, weights=weights), packing=packing)

    def eval_data(self, name: str) -> fdl.Config[Loader]:
        """One held-out set by name."""
        if name == "LambadaValidation":
            passages = self.records(self.LAMBADA_FILE, "my_lambada", "test", knob="LAMBADA_FILE")
            return self.loader(fdl.Config(Lambada, passages=passages), packing="documents")
        if name == "BoolQ":
            questions = self.source("boolq", "validation", self.BOOLQ_FILE)
            return self.loader(questions, packing="documents")
        if name == "Instruct":
            return self.loader(
                self.source("instruct", "validation", self.EVAL_FILES), packing="documents"
            )
        if name in ("PileValidation", "HeldOut"):
            return self.loader(self.text("validation", self.EVAL_FILES), packed=self.PACKED_INPUT)
        raise ValueError(
            f"EVAL_SETS: '{name}' is none of HeldOut, PileValidation, LambadaValidation, BoolQ, Instruct"
        )

    def source(self, kind: str, split: str, files: str | None) -> fdl.Config[Any]:
        """Documents, or a source of rows, from files or TFDS."""
        if kind == "boolq":
            yes, no = self.BOOLQ_ANSWERS
            knob = "TRAIN_FILES" if split == "train" else "BOOLQ_FILE"
            source = self.records(files, "super_glue/boolq", split, knob=knob)
            return fdl.Config(BoolQ, source=source, yes=yes, no=no)
        if kind == "instruct":
            return fdl.Config(
                Instruct,
                source=fdl.Config(JsonLines, paths=files or ""),
                template=self.CHAT_TEMPLATE,
                answers=self.SCORED_ANSWERS,
                overlong=self.OVERLONG,
                seed=self.TRAIN_INPUT_RANDOM_SEED,
            )
        return self.text(split, files)

    def records(self, files: str | None, name: str, split: str, *, knob: str) -> fdl.Config[Any]:
        """JSON lines where files are given, else a TFDS data set; `knob` is that of the files."""
        if files:
            return fdl.Config(JsonLines, paths=files, text_key=self.TEXT_KEY)
        return fdl.Config(
            TfdsSource, name=name, split=split, data_dir=self.TFDS_DATA_DIR, files_knob=knob
        )

    def text(self, split: str, files: str | None) -> fdl.Config[Any]:
        """A source of documents: files where they are given, else the Pile in TFDS."""
        if files is None:
            return fdl.Config(
                TfdsSource,
                name="the_pile",
                split=split,
                data_dir=self.TFDS_DATA_DIR,
                text_key=self.TEXT_KEY,
                files_knob="TRAIN_FILES" if split == "train" else "EVAL_FILES",
            )
        return fdl.Config(Files, paths=files, text_key=self.TEXT_KEY)

    def loader(
        self, source: fdl.Config[Any], *, packed: bool = False, packing: str | None = None
    ) -> fdl.Config[Loader]:
        """Batches from a source with the tokenizer, length and seed of the knobs."""
        return fdl.Config(
            Loader,
            source=source,
            seq_len=self.MAX_SEQ_LEN,
            tokenizer=self.tokenizer(),
            packing=packing or ("packed" if packed else "concatenated"),
            seed=self.TRAIN_INPUT_RANDOM_SEED,
            cache_dir=self.CACHE_DIR,
            num_workers=self.TOKENIZE_WORKERS,
        )


class EvaluatesOnly(Knobs, abstract=True):
    """A config that does not train."""

    def train_data(self) -> None:
        """Nothing."""
        return None


class SyntheticData(Knobs, abstract=True):
    """Synthetic data."""

    SYNTHETIC_RANDOM: Annotated[
        bool, "random tokens; False: the constant token of Pax, whose loss falls to 0"
    ] = False

    def tokenizer(self) -> fdl.Config[Any] | None:
        """None is needed, but one may be given for decoding."""
        return super().tokenizer() if self.VOCAB_PATH else None

    def train_data(self) -> fdl.Config[Loader]:
        """Rows of the constant id 1, as in Pax, or of random ids."""
        ids = (
            {"vocab_size": self.VOCAB_SIZE, "seed": self.TRAIN_INPUT_RANDOM_SEED}
            if self.SYNTHETIC_RANDOM
            else {}
        )
        return self.loader(fdl.Config(SyntheticTokens, **ids), packed=self.PACKED_INPUT)
