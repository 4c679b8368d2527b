"""The Pile in TFDS form (Gao et al., 2020, https://arxiv.org/abs/2101.00027): the_pile/lm 1.0.0.

The original host closed in 2023, so the files usually come from a folder: 30 train shards
`00.jsonl.zst` ... `29.jsonl.zst` (in it or in its `train/`), `val.jsonl.zst` and `test.jsonl.zst`,
each line `{"text": ..., "meta": {"pile_set_name": ...}}`.
"""

import glob
import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from paxlike.data.builders.local_builder import LocalBuilder, texts
from paxlike.data.files import open_zst

_URL = "https://the-eye.eu/public/AI/pile"
_NUM_SHARDS = 30


class ThePile(LocalBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Documents of the Pile: `text` and the collection they are from, `pile_set_name`."""

    name = "the_pile"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="lm", description="one document a record")]
    needs = "NN.jsonl.zst (train shards), val.jsonl.zst and test.jsonl.zst"
    urls = {
        "train": [f"{_URL}/train/{i:02}.jsonl.zst" for i in range(_NUM_SHARDS)],
        "validation": [f"{_URL}/val.jsonl.zst"],
        "test": [f"{_URL}/test.jsonl.zst"],
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Pile: 825 GiB of text from 22 collections.",
            features=texts("text", "pile_set_name"),
            homepage="https://pile.eleuther.ai/",
        )

    def _local_files(self, source: str) -> dict[str, list[str]]:
        shard = "[0-9][0-9].jsonl.zst"
        folders = (source, os.path.join(source, "train"))
        return {
            "train": [p for f in folders for p in sorted(glob.glob(os.path.join(f, shard)))],
            "validation": glob.glob(os.path.join(source, "val.jsonl.zst")),
            "test": glob.glob(os.path.join(source, "test.jsonl.zst")),
        }

    def _generate_examples(self, paths: list[Any]) -> Iterator[tuple[str, dict[str, str]]]:
        for shard, path in enumerate(paths):
            # Not by the ending of the name, which a download may have lost.
            with open_zst(os.fspath(path)) as lines:
                for number, line in enumerate(lines):
                    record = json.loads(line)
                    name = record.get("meta", {}).get("pile_set_name", "")
                    yield f"{shard}/{number}", {"text": record["text"], "pile_set_name": name}
