"""One of several processes that watch each other; steps are rounds of the coordination service, without a model.

python worker.py PROGRAM ADDRESS COUNT INDEX FOLDER
"""

import json
import sys
import time
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")


def join(address: str, count: str, index: str, folder: str):
    from paxlike.cluster import peers, rank_log

    jax.distributed.initialize(
        address,
        int(count),
        int(index),
        initialization_timeout=60,
        heartbeat_timeout_seconds=peers.HEARTBEAT_SECONDS,
    )
    rank_log.keep(Path(folder), int(index))
    print(f"process {index} says hello", flush=True)
    return peers.Peers(Path(folder))


def loop(watch, folder: Path, *, fails_at=0, sleeps_at=0) -> None:
    """Steps until something happens; the last process does what was asked."""
    from paxlike.cluster import HangOptions, Watchdog, processes

    last = processes.index() == processes.count() - 1
    with Watchdog(HangOptions(factor=3, min_seconds=2), folder, watch) as dog:
        for step in range(1, 100_000):
            processes.share("step", None)
            dog.step(step)
            if step == 5:
                (folder / f"running_{processes.index()}").write_text("")
            if last and step == fails_at:
                raise RuntimeError("the disk of the moon is full")
            if last and step == sleeps_at:
                time.sleep(1000)
            time.sleep(0.01)


def run(watch, folder: Path) -> None:
    loop(watch, folder)


def run_far_apart(watch, folder: Path) -> None:
    """As on a machine each, without a watchdog: only silence tells."""
    from paxlike.cluster import processes

    for step in range(100_000):
        processes.share("step", None)
        watch.where(step=step, busy=False)
        if step == 5:
            (folder / f"running_{processes.index()}").write_text("")
        time.sleep(0.01)


def run_busy(watch, folder: Path) -> None:
    """As in a compilation: neither the watchdog nor silence tells."""
    from paxlike.cluster import processes

    (folder / f"running_{processes.index()}").write_text("")
    time.sleep(100)


def late(watch, folder: Path) -> None:
    """The last process fails when the others have ended well."""
    from paxlike.cluster import processes

    if processes.index() == processes.count() - 1:
        time.sleep(2)
        raise RuntimeError("the last one fails")


def fail(watch, folder: Path) -> None:
    loop(watch, folder, fails_at=20)


def sleep(watch, folder: Path) -> None:
    loop(watch, folder, sleeps_at=20)


def compare(watch, folder: Path) -> None:
    """The start-up check, first with all alike, then with one that has another jaxlib, then another folder."""
    from paxlike.cluster import processes, startup

    me, seen = processes.index(), {}
    seen["alike"] = startup.compare_processes(folder, "config").line
    seen["config"] = _message(lambda: startup.compare_processes(folder, f"config {me}"))
    facts = startup._facts
    startup._facts = lambda: facts() | ({"jaxlib": "0.0.1"} if me else {})
    seen["jaxlib"] = _message(lambda: startup.compare_processes(folder, "config"))
    startup._facts = facts
    startup._SEE_SECONDS = 0.5
    elsewhere = folder if me == 0 else folder / "elsewhere"
    seen["folder"] = _message(lambda: startup.compare_processes(elsewhere, "config"))
    file = folder / "file"
    seen["unwritable"] = _message(lambda: startup.compare_processes(file if me else folder, "c"))
    processes.share("all_have_cleaned_up", None)
    seen["left"] = [path.name for path in folder.rglob("check_*")]
    (folder / f"seen_{me}.json").write_text(json.dumps(seen))


def _message(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    program, *cluster, directory = sys.argv[1:]
    if program == "run_busy":
        from paxlike.cluster import peers

        peers.HEARTBEAT_SECONDS, peers.SILENCE_SECONDS = 6, 3.0
    if program == "run_far_apart":
        from paxlike.cluster import identity, peers

        peers.SILENCE_SECONDS, peers.ANSWER_SECONDS = 3.0, 2.0
        identity.Identity.is_beside = property(lambda self: False)
    watch = join(*cluster, directory)
    try:
        globals()[program](watch, Path(directory))
    except BaseException as error:
        watch.report(error)
        watch.wait_for_the_end(1)
    watch.close()
