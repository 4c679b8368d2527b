"""TensorBoard event files, written without TensorFlow.

An event file is a sequence of records (length, its checksum, an `Event` message, its checksum). The
messages are tensorboardX's; the records are written here, one unbuffered write each. tensorboardX's
own `SummaryWriter` hands them to a thread behind a queue of ten: when the disk is full the thread
dies, the queue fills, and the training loop waits for ever.

Tags follow Pax, so that its dashboards and early-stopping keys still work:

| name given by the loop                    | tag                                               |
|-------------------------------------------|---------------------------------------------------|
| loss                                      | loss                                              |
| steps_per_second                          | Steps/sec                                         |
| learning_rate, lr                         | learning/lr                                       |
| raw_grad_norm, grad_norm                  | learning/raw_grad_norm                            |
| clipped_grad_norm, grad_scale, ...        | learning/<name>                                   |
| param_norm, var_norm                      | learning/var_norm                                 |
| tokens_per_second, step_time, mfu, ...    | throughput/<name>                                 |
| a name with a "/"                         | as it is                                          |
| any other (log_pplx, acc_strict, ...)     | Metrics/<name>, and Metrics/<name>-weight beside  |
"""

from __future__ import annotations

import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Mapping

from paxlike.log.files import AppendFile

# tensorboardX imports torch where it is installed, to know its tensors, of which it sees none here: two seconds and
# 190 MB of every start.
_TORCH_IS_LOADED = "torch" in sys.modules
if not _TORCH_IS_LOADED:
    sys.modules["torch"] = None  # type: ignore[assignment]  # what Python takes for "not installed"
try:
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import masked_crc32c
    from tensorboardX.summary import text as text_summary
finally:
    if not _TORCH_IS_LOADED:
        del sys.modules["torch"]

TAGS = {
    "loss": "loss",
    "steps_per_second": "Steps/sec",
    "learning_rate": "learning/lr",
    "lr": "learning/lr",
    "grad_norm": "learning/raw_grad_norm",
    "raw_grad_norm": "learning/raw_grad_norm",
    "clipped_grad_norm": "learning/clipped_grad_norm",
    "applied_grad_norm": "learning/applied_grad_norm",
    "grad_scale": "learning/grad_scale",
    "is_valid_step": "learning/is_valid_step",
    "skipped_steps": "learning/skipped_steps",
    "update_norm": "learning/update_norm",
    "param_norm": "learning/var_norm",
    "var_norm": "learning/var_norm",
    "tokens": "throughput/tokens",
    "step_time": "throughput/step_time",
    "tokens_per_second": "throughput/tokens_per_second",
    "tflops_per_second": "throughput/tflops_per_second_per_device",
    "mfu": "throughput/mfu",
    "data_wait_share": "throughput/data_wait_share",
    "device_memory_peak_bytes": "throughput/device_memory_peak_bytes",
    "host_memory_peak_bytes": "throughput/host_memory_peak_bytes",
}


def tag_of(name: str) -> str:
    """The TensorBoard tag of the metric `name`, by the table above."""
    return name if "/" in name else TAGS.get(name, f"Metrics/{name}")


class EventFile:
    """One event file in `directory`; every call is on disk when it returns, or raises OSError."""

    def __init__(self, directory: str | os.PathLike, *, hide_from_step: int | None = None):
        """Opens a new event file, or the same one again within a second.

        Args:
            directory: TensorBoard shows each folder as one run.
            hide_from_step: TensorBoard drops what earlier files of this folder hold from this step
                on; given when a run goes back to a checkpoint.
        """
        # The process is in the name because a restarted one may be there within the same second.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendFile(pathlib.Path(directory) / name)
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        if hide_from_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(step=hide_from_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes tag -> number at `step`; non-finite numbers are written as such."""
        points = [summary_pb2.Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=points)))

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Writes a picture, an RGB PNG, under `tag`."""
        width, height = struct.unpack(">II", png[16:24])
        shown = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png
        )
        value = summary_pb2.Summary.Value(tag=tag, image=shown)
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))

    def text(self, tag: str, text: str, *, step: int = 0) -> None:
        """Writes `text` (Markdown) under `tag`, for TensorBoard's text page."""
        self._write(event_pb2.Event(step=step, summary=text_summary(tag, text)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        message = event.SerializeToString()
        length = struct.pack("<Q", len(message))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, message)]
        self._file.append(length + checksums[0] + message + checksums[1])
