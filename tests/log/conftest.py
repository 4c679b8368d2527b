"""Readers and limits that several tests of the log share."""

import contextlib
import resource
import struct

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2


@pytest.fixture
def largest_file():
    """A block in which files cannot grow beyond a size: writes stop midway, as on a full disk."""

    @contextlib.contextmanager
    def limit(num_bytes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def read_events():
    """Reads every event of a TensorBoard file, checking the length and checksums of each record."""
    return _read_events


@pytest.fixture
def read_scalars():
    """Reads (step, tag) -> value over the files of a folder, hiding what TensorBoard hides."""

    def read(folder):
        scalars = {}
        for path in sorted(folder.iterdir()):
            for event in _read_events(path):
                if event.HasField("session_log"):
                    scalars = {k: v for k, v in scalars.items() if k[0] < event.step}
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        scalars[event.step, value.tag] = value.simple_value
        return scalars

    return read


def _read_events(path):
    def unmasked(masked):
        rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
        return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF

    data, offset, events = path.read_bytes(), 0, []
    while offset < len(data):
        header = data[offset : offset + 8]
        (length,) = struct.unpack("<Q", header)
        (header_crc,) = struct.unpack("<I", data[offset + 8 : offset + 12])
        message = data[offset + 12 : offset + 12 + length]
        (message_crc,) = struct.unpack("<I", data[offset + 12 + length : offset + 16 + length])
        assert unmasked(header_crc) == crc32c(header)
        assert unmasked(message_crc) == crc32c(message)
        events.append(event_pb2.Event.FromString(message))
        offset += 16 + length
    assert offset == len(data)
    return events
