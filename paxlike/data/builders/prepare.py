"""Downloads a data set, or takes it from a folder, and prepares it with TFDS as array_record."""

import contextlib
import io
import logging
import os
import sys
import urllib.error
import urllib.request

import tensorflow_datasets as tfds

from paxlike.arguments import ArgumentParser
from paxlike.data.builders.local_builder import LocalBuilder


def prepare(builder_class: type[LocalBuilder], *, data_dir: str, source: str | None = None) -> str:
    """Prepares a builder of this package and returns the folder; a result that is there stays.

    Raises ValueError, in one line, where the download fails or `source` lacks a file.
    """
    if source is not None and not os.path.isdir(source):
        raise ValueError(f"no folder {source!r}: it should hold {builder_class.needs}")
    builder = builder_class(source=source, data_dir=data_dir, file_format="array_record")
    try:
        if source is None and not builder.data_path.exists():
            _check_address(next(iter(builder.urls.values()))[0])
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces what it has yet to do
            builder.download_and_prepare()
    except ValueError:
        raise
    except Exception as error:  # every kind of failure of a network, from three libraries
        if source is not None:
            raise ValueError(
                f"cannot prepare {builder.name} from {source}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        raise ValueError(
            f"cannot download {builder.name} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): get {builder_class.needs} by other means "
            "and pass --source FOLDER"
        ) from error
    return os.fspath(builder.data_path)


def _check_address(url: str) -> None:
    """Raises OSError where a host cannot be reached: TFDS itself would try for many minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20).close()
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):  # others may be about this way of asking
            raise


def main(builder_class: type[LocalBuilder], arguments: list[str] | None = None) -> None:
    """The command of scripts/download_*.py."""
    parser = ArgumentParser(
        description=f"Prepares {builder_class.name} for training with TFDS, as array_record."
    )
    parser.add_argument(
        "--data_dir",
        default=os.environ.get("TFDS_DATA_DIR"),
        help="folder of TFDS data sets (default: TFDS_DATA_DIR)",
    )
    parser.add_argument(
        "--source", help=f"a folder with {builder_class.needs}, instead of a download"
    )
    flags = parser.parse_args(arguments)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors end in one line below
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        if not flags.data_dir:
            raise ValueError(
                "set TFDS_DATA_DIR, or pass --data_dir, to the folder for TFDS data sets"
            )
        folder = prepare(builder_class, data_dir=flags.data_dir, source=flags.source)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"prepared {folder}")
    for name, split in tfds.builder_from_directory(folder).info.splits.items():
        print(f"  {name}: {split.num_examples:,} records")
