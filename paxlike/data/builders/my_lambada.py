"""The LAMBADA test set in TFDS form: my_lambada 1.0.0, the passages under `text`."""

import glob
import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from paxlike.data.builders.local_builder import LocalBuilder, texts


class MyLambada(LocalBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Passages of the LAMBADA test set, as OpenAI distributed them for GPT-2."""

    name = "my_lambada"
    VERSION = tfds.core.Version("1.0.0")
    needs = "lambada_test.jsonl"
    urls = {
        "test": ["https://raw.githubusercontent.com/cybertronai/bflm/master/lambada_test.jsonl"]
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="LAMBADA: passages whose last word needs the whole passage.",
            features=texts("text"),
            homepage="https://zenodo.org/record/2630551",
        )

    def _local_files(self, source: str) -> dict[str, list[str]]:
        return {"test": glob.glob(os.path.join(source, self.needs))}

    def _generate_examples(self, paths: list[Any]) -> Iterator[tuple[int, dict[str, str]]]:
        with open(paths[0], encoding="utf-8") as file:
            for number, line in enumerate(file):
                yield number, {"text": json.loads(line)["text"]}
