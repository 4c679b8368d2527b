import dataclasses
import gc
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from data.data_helpers import TEXTS, naive_rows, write_json_lines
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from paxlike.data.batch_iterator import BatchIterator
from paxlike.data.loader import Loader
from paxlike.data.mixtures import Mixture
from paxlike.data.placement import Placement
from paxlike.data.sources import Files, JsonLines
from paxlike.data.statistics import unigram_entropy, unigram_entropy_of
from paxlike.data.synthetic import SyntheticTokens
from paxlike.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    source = JsonLines(write_json_lines(folder / "a.jsonl", TEXTS * 9), part_bytes=300)
    return Loader(source, 16, TOKENIZER, cache_dir=str(folder / "cache"), seed=5)


@pytest.fixture(scope="module")
def mixed(loader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    other = JsonLines(write_json_lines(folder / "b.jsonl", ["other text " * 9] * 20))
    mixture = Mixture((loader.source, other, SyntheticTokens(258, 1, 50)), (2.0, 1.0, 1.0))
    return dataclasses.replace(loader, source=mixture)


def mesh(*shape, names=("data", "fsdp")):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(shape))


def take(batches, count):
    with batches:
        return [{k: np.asarray(v) for k, v in next(batches).items()} for _ in range(count)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


SHARDINGS = [
    lambda: SingleDeviceSharding(jax.devices()[0]),
    lambda: NamedSharding(mesh(4, 1), P("data")),
    lambda: NamedSharding(mesh(2, 2), P(("data", "fsdp"))),
    lambda: NamedSharding(mesh(2, 2), P("fsdp")),  # every row on two devices
    lambda: NamedSharding(mesh(2, 2), P("data", "fsdp")),  # the sequence is divided too
    lambda: NamedSharding(mesh(2, 2), P()),
]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", ["loader", "mixed"])
def test_the_sharding_changes_nothing(request, name, sharding):
    loader, sharding = request.getfixturevalue(name), sharding()
    batches = loader.batches(global_batch=8, sharding=sharding)
    first = next(batches)
    assert first["tokens"].sharding.is_equivalent_to(sharding, 2)
    batches.close()
    assert_equal(
        take(loader.batches(global_batch=8, sharding=sharding), 3),
        take(loader.batches(global_batch=8), 3),
    )
    whole = [{k: np.asarray(v) for k, v in b.items()} for b in loader.epoch(global_batch=8)]
    split = [
        {k: np.asarray(v) for k, v in b.items()}
        for b in loader.epoch(global_batch=8, sharding=sharding)
    ]
    assert_equal(whole, split)


@pytest.mark.parametrize("name", ["loader", "mixed"])
def test_rows_of_processes_join_to_the_batch(request, name, monkeypatch):
    """Each process reads the rows of its devices; here a process is two of the four devices."""
    loader = request.getfixturevalue(name)
    sharding = NamedSharding(mesh(2, 2), P(("data", "fsdp")))
    whole = take(loader.batches(global_batch=8, start_step=3), 1)[0]
    index = type(sharding).addressable_devices_indices_map
    seen = []
    for process in range(2):
        mine = sharding.mesh.devices[process]

        def of_process(self, shape, mine=mine):
            return {d: i for d, i in index(self, shape).items() if d in set(mine)}

        monkeypatch.setattr(type(sharding), "addressable_devices_indices_map", of_process)
        place = Placement(loader.spec(8), sharding)
        seen += place.rows.tolist()
        assert len(place.rows) == 4
        rows = loader._rows.gather(loader._order(3 * 8 + place.rows))
        for key in whole:
            np.testing.assert_array_equal(rows[key], whole[key][place.rows])
        monkeypatch.undo()
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("name", ["loader", "mixed"])
def test_going_on_at_a_step_is_a_straight_run(request, name):
    loader = request.getfixturevalue(name)
    straight = take(loader.batches(global_batch=4), 40)
    assert_equal(take(loader.batches(global_batch=4, start_step=17), 23), straight[17:])
    reopened = dataclasses.replace(loader)
    assert_equal(take(reopened.batches(global_batch=4, start_step=39), 1), straight[39:])
    # Another batch size cuts the same list of rows.
    halves = take(loader.batches(global_batch=2, start_step=2), 2)
    joined = {key: np.concatenate([half[key] for half in halves]) for key in halves[0]}
    assert_equal([joined], straight[1:2])


def test_a_far_step_reads_only_its_own_rows(mixed):
    """At step 10**6 no row before it is made."""
    calls = []
    counted = dataclasses.replace(mixed)
    gather = counted._rows.gather
    object.__setattr__(counted._rows, "gather", lambda w: calls.append(len(w)) or gather(w))
    batches = counted.batches(global_batch=4, start_step=10**6, prefetch=1)
    with batches:
        next(batches)
    assert batches.step == 10**6 + 1
    assert 1 <= len(calls) <= 3
    assert set(calls) == {4}


def test_every_epoch_holds_every_row_once(loader):
    n = loader.num_examples()
    rows = [tuple(b["targets"][0]) for b in take(loader.batches(global_batch=1), 2 * n)]
    stored = [tuple(row) for row in naive_rows(TEXTS * 9, TOKENIZER, 16, "packed")["targets"]]
    assert sorted(rows[:n]) == sorted(rows[n:]) == sorted(stored)
    assert rows[:n] != rows[n:]
    assert rows[:n] != stored
    kept = dataclasses.replace(loader, shuffle=False)
    assert [tuple(b["targets"][0]) for b in take(kept.batches(global_batch=1), n)] == stored


def test_spec_is_what_comes(loader):
    for packing in ("packed", "concatenated", "documents"):
        changed = dataclasses.replace(loader, packing=packing)
        for evaluation, batches in [
            (False, changed.batches(global_batch=4)),
            (True, changed.epoch(global_batch=4)),
        ]:
            batch = take(batches, 1)[0]
            spec = changed.spec(4, evaluation=evaluation)
            assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
                k: (v.shape, v.dtype) for k, v in spec.items()
            }
            assert ("segments" in spec) == ("positions" in spec) == (packing == "packed")


def test_spec_needs_no_data():
    loader = Loader(Files("/nowhere/*.jsonl"), 8, TOKENIZER)
    assert loader.spec(2)["tokens"].shape == (2, 8)
    with pytest.raises(ValueError, match="no file matches '/nowhere"):
        loader.num_examples()


@pytest.mark.parametrize("global_batch", [1, 7, 64])
def test_epoch_pads_with_rows_of_weight_zero(loader, global_batch):
    batches = [dict(b) for b in loader.epoch(global_batch=global_batch)]
    n = loader.num_examples()
    joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    assert len(joined["tokens"]) == -(-n // global_batch) * global_batch
    assert joined["example_weight"].tolist() == [1.0] * n + [0.0] * (len(joined["tokens"]) - n)
    for key in ("tokens", "targets", "weights", "segments", "positions", "num_bytes"):
        assert not joined[key][n:].any()
    naive = naive_rows(TEXTS * 9, TOKENIZER, 16, "packed")
    for key, value in naive.items():
        np.testing.assert_array_equal(joined[key][:n], value)
    assert joined["num_bytes"].sum() == sum(len(t.encode()) for t in TEXTS * 9)


def test_epoch_of_a_mixture_is_source_after_source(mixed, loader):
    own = [b["targets"] for b in loader.epoch(global_batch=1)]
    both = [b["targets"] for b in mixed.epoch(global_batch=1)]
    assert len(both) == mixed.num_examples() > len(own)
    np.testing.assert_array_equal(np.stack(both[: len(own)]), np.stack(own))


def test_mixture_shares(mixed):
    rows = take(mixed.batches(global_batch=100), 1)[0]["targets"]
    other = {tuple(r) for r in take(mixed.epoch(global_batch=500), 1)[0]["targets"]}
    assert {tuple(row) for row in rows} <= other
    where = mixed._order(np.arange(100))[:, 0]
    assert np.bincount(where).tolist() == [50, 25, 25]


def test_synthetic_as_pax():
    loader = Loader(SyntheticTokens(), 8)
    batch = take(loader.batches(global_batch=2, start_step=10**6), 1)[0]
    assert (batch["tokens"] == 1).all()
    assert (batch["targets"] == 1).all()
    assert (batch["weights"] == 1).all()
    assert batch["positions"][0].tolist() == list(range(8))
    assert next(iter(loader.epoch(global_batch=2)))["num_bytes"].tolist() == [0, 0]
    random = Loader(SyntheticTokens(100, 3), 500, packing="concatenated")
    batch = take(random.batches(global_batch=4), 1)[0]
    assert set(batch) == {"tokens", "targets", "weights"}
    assert 90 < batch["targets"].max() < 100
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert len(np.unique(batch["tokens"], axis=0)) == 4


def test_fingerprint_is_of_the_order(loader, mixed, tmp_path):
    same = dataclasses.replace(loader, cache_dir=str(tmp_path))  # built anew elsewhere
    assert same.fingerprint() == loader.fingerprint()
    others = [
        dataclasses.replace(loader, **change)
        for change in (
            {"seed": 6}, {"seq_len": 8}, {"packing": "concatenated"}, {"shuffle": False},
            {"documents": (0.0, 0.5)},
        )
    ] + [mixed]  # fmt: skip
    prints = [str(other.fingerprint()) for other in [loader, *others]]
    assert len(set(prints)) == len(prints)


def test_unigram_entropy(loader):
    assert unigram_entropy(np.array([3, 3, 7, 7])) == pytest.approx(np.log(2))
    assert unigram_entropy(np.array([[3, 7, 9]]), np.array([[1.0, 1.0, 0.0]])) == pytest.approx(
        np.log(2)
    )
    ids = np.array([i for t in TEXTS if t for i in [*TOKENIZER.encode(t), 1]])
    assert unigram_entropy_of(loader) == pytest.approx(unigram_entropy(ids))


# The thread that makes batches ahead.


def batch_threads():
    return [t for t in threading.enumerate() if t.name == "batches"]


def test_an_error_in_the_thread_is_raised_by_next():
    def make(step):
        if step == 2:
            raise ValueError("row 7 is broken")
        return {"step": step}

    batches = BatchIterator(make)
    assert [next(batches)["step"], next(batches)["step"]] == [0, 1]
    with pytest.raises(ValueError, match="row 7 is broken"):
        next(batches)
    assert not batch_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_it_stays_ahead_and_no_further():
    made = []
    batches = BatchIterator(lambda step: made.append(step) or {}, prefetch=3)
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4]  # one given, three waiting, one in hand
    batches.close()


def test_waiting_is_counted():
    slow = BatchIterator(lambda step: time.sleep(0.05) or {})
    next(slow)
    assert slow.waited_seconds > 0.02
    slow.close()


def test_no_thread_is_left_behind(loader):
    batches = loader.batches(global_batch=2)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    forgotten = loader.batches(global_batch=2)
    next(forgotten)
    del forgotten
    list(loader.epoch(global_batch=64))
    gc.collect()
    assert not batch_threads()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"num_workers": -1}, r"num_workers=-1 \(TOKENIZE_WORKERS\) must be 0"),
        ({"packing": "tight"}, "packing='tight' is none of packed, concatenated, documents"),
        ({"documents": (0.5, 0.2)}, r"documents=\(0.5, 0.2\) must be"),
        ({"tokenizer": None}, "JsonLines gives text: pass a tokenizer"),
        ({"source": "a.jsonl"}, "source='a.jsonl' is neither documents nor rows"),
        (
            {"source": SyntheticTokens(), "documents": (0.0, 0.5)},
            "has no effect on SyntheticTokens",
        ),
    ],
)
def test_errors_at_construction(change, message):
    with pytest.raises(ValueError, match=message):
        Loader(**{"source": JsonLines("a.jsonl"), "seq_len": 8, "tokenizer": TOKENIZER, **change})


def test_errors_of_a_batch(loader):
    sharding = NamedSharding(mesh(2, 2), P(("data", "fsdp")))
    for make in (loader.batches, loader.epoch):
        with pytest.raises(ValueError, match=r"global_batch=6 does not divide by the 4 ways"):
            make(global_batch=6, sharding=sharding)
        with pytest.raises(ValueError, match="global_batch=0 must be at least 1"):
            make(global_batch=0)
        with pytest.raises(ValueError, match="prefetch=0 must be at least 1"):
            make(global_batch=2, prefetch=0)
    with pytest.raises(ValueError, match="give both for random tokens"):
        SyntheticTokens(vocab_size=5)


def test_two_real_processes(tmp_path, root):
    """Each builds or waits for the same cache and holds its rows of the same batches."""
    write_json_lines(tmp_path / "a.jsonl", TEXTS * 9)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(root / "tests" / "data" / "loader_process.py")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    env.pop("XLA_FLAGS", None)
    started = [
        subprocess.Popen(
            [sys.executable, script, str(port), "2", str(i), str(tmp_path)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    digests = {out.split("digest ")[1].split()[0] for out in outputs}
    assert len(digests) == 1
