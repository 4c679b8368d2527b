"""BoolQ in the form of TFDS's super_glue/boolq 1.0.2 (Clark et al., 2019, https://arxiv.org/abs/1905.10044).

TFDS's own builder needs TensorFlow to be installed; this one writes the same records without it,
from the JSON lines that SuperGLUE distributes: `train.jsonl`, `val.jsonl`, `test.jsonl`.
"""

import glob
import json
import os
import zipfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from paxlike.data.builders.local_builder import LocalBuilder, counted, integer, texts

_URL = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/BoolQ.zip"
_FILES = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}


class BoolQ(LocalBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A passage, a question on it and whether the answer is yes (-1: the test set does not say)."""

    name = "super_glue"
    VERSION = tfds.core.Version("1.0.2")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="boolq", description="yes or no questions")]
    needs = "train.jsonl, val.jsonl and test.jsonl"
    urls = {"all": [_URL]}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="BoolQ: naturally occurring yes or no questions.",
            features=texts(
                "question",
                "passage",
                idx=integer(),
                label=tfds.features.ClassLabel(names=["False", "True"]),
            ),
            homepage="https://super.gluebenchmark.com/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        if self._source is not None:
            return super()._split_generators(dl_manager)
        with zipfile.ZipFile(dl_manager.download(_URL)) as archive:
            lines = {split: archive.read(f"BoolQ/{name}") for split, name in _FILES.items()}
        return {
            split: counted(f"boolq {split}", _records(text.splitlines()))
            for split, text in lines.items()
        }

    def _local_files(self, source: str) -> dict[str, list[str]]:
        return {split: glob.glob(os.path.join(source, name)) for split, name in _FILES.items()}

    def _generate_examples(self, paths: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        with open(paths[0], "rb") as file:
            yield from _records(file)


def _records(lines) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines):
        record = json.loads(line)
        label = record.get("label")
        yield (
            number,
            {
                "question": record["question"],
                "passage": record["passage"],
                "idx": record.get("idx", number),
                "label": -1 if label is None else int(label),
            },
        )
