"""A TFDS builder that reads a local folder where one is given, and downloads otherwise."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from paxlike.data.progress import Progress


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the builders of this package share; they are made by class, never looked up by name.

    A subclass names its `files` and the `urls` of each split, finds local files in `_local_files`
    and turns them into records in `_generate_examples`.
    """

    # TFDS would look beside the code for checksums of downloads. There are none: the hosts are gone
    # or do not publish any.
    code_path = None
    needs: str
    """The files that a local folder must hold, in words."""
    urls: dict[str, Any]
    """Addresses of the files of each split."""

    def __init__(self, *, source: str | None = None, **kwargs):
        self._source = source
        super().__init__(**kwargs)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        if self._source is None:
            files = dl_manager.download(self.urls)
        else:
            files = self._local_files(self._source)
            missing = [split for split, paths in files.items() if not paths]
            if missing:
                raise ValueError(
                    f"{self._source} has no files for {', '.join(missing)}: wanted {self.needs}"
                )
        return {
            split: counted(f"{self.name} {split}", self._generate_examples(paths))
            for split, paths in files.items()
        }

    def _local_files(self, source: str) -> dict[str, list[str]]:
        """Files of each split, in order; an empty list where they are missing."""
        raise NotImplementedError

    def _generate_examples(self, paths: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        raise NotImplementedError


def counted(name: str, records: Iterator[Any]) -> Iterator[Any]:
    """The records, with plain lines of progress where TFDS has no terminal for its bars."""
    if sys.stderr.isatty():
        yield from records
        return
    with Progress(name, unit="records") as progress:
        for number, record in enumerate(records, 1):
            yield record
            progress.set(number)


def texts(*names: str, **others: Any) -> tfds.features.FeaturesDict:
    """Features of records: text under `names`, and `others`."""
    return tfds.features.FeaturesDict({**{name: tfds.features.Text() for name in names}, **others})


def integer() -> tfds.features.Scalar:
    return tfds.features.Scalar(dtype=np.int32)
