"""Every second of a run is of one kind, whatever killed it."""

import json
import subprocess
import sys

import pytest

from paxlike.log import goodput
from paxlike.log.goodput import Ledger, read_goodput, write_report


def write(folder, *records):
    """Events of starts: (start, from_step, step, seconds by kind)."""
    lines = [
        {"event": "goodput", "time": 0.0, "start": s, "from_step": f, "step": n, "seconds": k}
        for s, f, n, k in records
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def killed_twice(tmp_path):
    return write(
        tmp_path,
        (1000.0, None, None, {"start_up": 10.0}),
        (1000.0, 0, 0, {"start_up": 12.0}),
        (1000.0, 0, 10, {"start_up": 12.0, "compilation": 8.0, "step": 20.0, "checkpoint": 1.0}),
        (1000.0, 0, 30, {"start_up": 12.0, "compilation": 8.0, "step": 60.0, "checkpoint": 1.0}),
        # killed; 19 s later it goes on from step 10, and dies before the next checkpoint
        (1100.0, None, None, {"start_up": 5.0}),
        (1100.0, 10, 20, {"start_up": 5.0, "restore": 2.0, "step": 20.0, "data": 3.0}),
        # and again from step 10; SIGTERM at 40
        (1200.0, 10, 40, {"start_up": 5.0, "step": 60.0, "evaluation": 4.0}),
    )


def test_lost_down_and_useful_time_add_up(killed_twice):
    found = read_goodput(killed_twice)
    assert found.wall_seconds == pytest.approx(269.0)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds)
    for start in found.starts:
        assert sum(start.seconds.values()) == pytest.approx(start.until - start.began)
    first, second, third = found.starts
    assert first.seconds["lost"] == pytest.approx(40.0)  # steps 11 to 30
    assert first.seconds["step"] == pytest.approx(20.0)
    assert second.seconds["lost"] == pytest.approx(23.0)  # all of them, with the wait for data
    assert third.seconds["lost"] == 0 and third.seconds["step"] == 60
    assert found.seconds["down"] == pytest.approx(19.0 + 70.0)
    assert found.share == pytest.approx(80 / 269)


def test_a_step_between_two_events_takes_its_share(tmp_path):
    folder = write(
        tmp_path, (0.0, 0, 10, {"step": 10.0}), (0.0, 0, 20, {"step": 30.0}), (50.0, 15, 16, {})
    )
    assert read_goodput(folder).starts[0].seconds["lost"] == pytest.approx(10.0)


def test_older_checkpoint_than_the_start_loses_all_of_it(tmp_path):
    folder = write(
        tmp_path,
        (0.0, 0, 0, {}),
        (0.0, 0, 10, {"step": 10.0}),
        (20.0, 10, 15, {"step": 5.0}),
        (40.0, 4, 20, {}),
    )
    first, second, _ = read_goodput(folder).starts
    assert first.seconds["lost"] == pytest.approx(6.0)
    assert second.seconds["lost"] == pytest.approx(5.0) and second.seconds["step"] == 0


def test_a_ledger_has_every_moment_once():
    clock = Ledger(began=0.0)
    with clock.on("compilation"), clock.on("restore"):
        pass
    clock.switch("step")
    clock.move(0.25, "step", "data")
    record = clock.record(3, 0)
    assert set(record["seconds"]) == {"start_up", "compilation", "restore", "step", "data"}
    assert record["seconds"]["data"] == 0.25
    ends = goodput.time.time()
    assert sum(clock.seconds().values()) == pytest.approx(ends, abs=1.0)


def test_report_of_a_dead_run(killed_twice):
    command = [sys.executable, "-m", "paxlike.log.goodput", str(killed_twice)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "time: 30% of 4m29s were steps that count" in done.stdout
    assert "lost to restarts" in done.stdout and "start 3" in done.stdout
    written = json.loads((killed_twice / "goodput.json").read_text())
    assert sum(written["seconds"].values()) == pytest.approx(written["wall_seconds"])
    assert (killed_twice / "goodput.png").stat().st_size > 5000
    assert "goodput.png" in done.stdout


def test_one_start_is_one_line(tmp_path):
    folder = write(tmp_path, (0.0, 0, 10, {"start_up": 2.0, "step": 8.0}))
    table = write_report(folder, picture=False).table()
    assert table == "time: 80% of 10s were steps that count (steps 8.0s, start-up 2.0s)"
    assert not (folder / "goodput.png").exists()


def test_a_run_without_such_events_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "environment", "time": 1}\n')
    with pytest.raises(ValueError, match="has the event 'goodput'"):
        read_goodput(tmp_path)
    assert goodput.main([str(tmp_path)]) == 1
