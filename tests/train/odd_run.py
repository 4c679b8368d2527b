"""A tiny run on one device, with one odd batch in an otherwise easy sequence."""

import contextlib
import dataclasses

import fiddle as fdl
import jax
import numpy as np
import pytest

from paxlike.data.loader import Loader
from paxlike.data.packing import Batch
from tests.configs.test_gpt import shrink


@dataclasses.dataclass(frozen=True)
class Odd:
    """Rows of a counting sequence; the batch of one step (from 1) is random tokens instead."""

    step: int
    rows_of_step: int = 4

    def check(self, **_):
        pass

    def rows(self, *, seq_len, **_):
        outer = self

        class Rows:
            def __len__(self):
                return 4096

            def gather(self, rows) -> Batch:
                rng = np.random.default_rng(7)
                odd = (np.asarray(rows) // outer.rows_of_step == outer.step - 1)[:, None]
                line = (np.asarray(rows)[:, None] + np.arange(seq_len + 1)) % 16
                ids = np.where(odd, rng.integers(16, 64, line.shape), line).astype(np.int32)
                ones = np.ones((len(rows), seq_len), np.float32)
                return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": ones}

            def in_sequence(self, rows):
                return rows

            def digest(self):
                return f"odd {outer.step}"

        return Rows()

    def fingerprint(self):
        return {"odd": self.step}


@contextlib.contextmanager
def one_device():
    """As on a machine with one: its programs are small, and kept from one test run to the next."""
    device = jax.devices()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: [device])
        patch.setattr(jax, "device_count", lambda *_: 1)
        patch.setattr(jax, "local_device_count", lambda *_: 1)
        yield


def experiment(step, **changes):
    """A tiny run whose batch of `step` is odd."""
    knobs = {
        "MAX_SEQ_LEN": 16,
        "ICI_MESH_SHAPE": (1, 1, 1),
        "PERCORE_BATCH_SIZE": 4,
        "MAX_STEPS": 24,
        "LEARNING_RATE": 1e-2,
        "LR_COS_WARMUP": 1,
        "SPIKE_WINDOW": 8,
        "SPIKE_SIGMAS": 4.0,
        "CHECKPOINT_EVERY_N_STEPS": 4,
        "CHECKPOINT_MAX_TO_KEEP": 1,
    }
    tree = shrink("Synthetic126M", **knobs | changes).experiment()
    tree.train_data = fdl.Config(Loader, source=Odd(step), seq_len=16, shuffle=False)
    tree.train_data.packing = "concatenated"
    return fdl.build(tree)
