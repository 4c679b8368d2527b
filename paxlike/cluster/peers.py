"""The processes of a run watch each other: one that dies, fails or freezes ends them all, soon and with a name.

A thread of each process writes a beat to the coordination service (process 0) about once a second. An *alarm* is raised
by whoever sees trouble: an error of its own, a neighbour on the same machine whose process is gone, silence of another
machine, a step that does not end (`Watchdog`). Then there is a *roll call*: every process writes its stacks into its
log and answers where it is; process 0 waits for the answers, decides who is at fault, writes `processes/failure.txt`,
and all end. Whoever does not answer is dead or frozen.

Where process 0 itself is lost there is no service: the library below aborts, or calls stay without an answer. Both end
in the same line, that process 0 is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from paxlike.cluster import failure, processes
from paxlike.cluster.failure import EXIT_HUNG, EXIT_LOST
from paxlike.cluster.identity import Identity

HEARTBEAT_SECONDS = 50
"""For `jax.distributed.initialize`: after `SILENCE_SECONDS`, so that the clear line comes first."""
SILENCE_SECONDS = 35.0
"""After so long without a beat there is a roll call."""
ANSWER_SECONDS = 10.0
"""How long a roll call waits for the answers."""
_PROCESSES_PER_SECOND = 500  # beats that process 0 takes each second
_FRESH_PERIODS = 5
_CLOSE_SECONDS = 300.0  # as long as jax waits at its end
_PREFIX = "paxlike/peers"


class Peers:
    """The watch of one process over the others; start it once, after `jax.distributed.initialize`.

    Attributes:
      rank, count: the number of this process and how many there are.
      describe: text of an error for the person who reads.
    """

    def __init__(self, directory: Path, *, describe: Callable[[BaseException], str] | None = None):
        self.rank, self.count = processes.index(), processes.count()
        self.describe = describe or (lambda error: "".join(traceback.format_exception(error)))
        self._directory = Path(directory)
        self._client = processes.client()
        self._me = Identity.here()
        self._period = max(1.0, self.count / _PROCESSES_PER_SECOND)
        self._busy, self._step = True, 0
        self._heard: dict[int, tuple[int, float]] = {}  # beats of the others, and since when
        self._seen: dict[int, tuple[int, float]] = {}  # of process 0: all beats, and since when
        self._own: dict[str, Any] | None = None  # the failure of this process
        self._pending: dict[str, Any] | None = None  # an alarm of this process
        self._wake, self._closing = threading.Event(), threading.Event()
        self._ticked = time.monotonic()
        self._ending = threading.Lock()
        if processes.is_first():
            failure.clear_failure(self._directory)
        everyone = processes.share("peers", self._me.json(), timeout_seconds=120)
        self.identities = [Identity.of_json(text) for text in everyone]
        self._neighbours = [
            rank
            for rank, each in enumerate(self.identities)
            if rank != self.rank and each.is_beside
        ]
        self._on_abort()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._listen, "peers"), (self._guard, "peers_guard"))
        ]
        for thread in self._threads:
            thread.start()

    def where(self, *, step: int, busy: bool) -> None:
        """Says how far this process is; `busy` with what has a limit of its own (see `Watchdog`)."""
        changed, self._step, self._busy = busy != self._busy, step, busy
        if changed:  # the others should know before anything happens to this one
            self._wake.set()

    def someone_is_busy(self) -> bool:
        """Whether another process is at something that may take long, so that to wait for it is no hang."""
        now, busy = time.monotonic(), False
        for rank, beat in self._beats().items():
            number, since = self._heard.get(rank, (-1, now))
            if number != beat["number"]:
                self._heard[rank] = (beat["number"], now)
                since = now
            fresh = now - since < _FRESH_PERIODS * self._period  # one that froze was busy, once
            busy = busy or (rank != self.rank and beat["busy"] and fresh)
        return busy

    def report(self, error: BaseException) -> None:
        """Tells the others that this process fails with `error`; returns at once.

        What is a mere consequence of another's death goes to this process's log only.
        """
        if self._own is not None or isinstance(error, SystemExit):
            return
        text = self.describe(error)
        consequence = failure.is_consequence(error)
        if consequence:
            with contextlib.suppress(OSError), self._log().open("a") as file:
                file.write(text + "\n")
        else:
            print(text.rstrip(), file=sys.stderr, flush=True)
        code = failure.code_of(error)
        short = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        self._own = {"text": short, "code": code, "consequence": consequence, "at": time.time()}
        self.alarm("error", short)

    def alarm(self, kind: str, text: str) -> None:
        """Asks all processes to answer and then ends them; `kind` is error, gone, silent or hang."""
        self._pending = self._pending or {"kind": kind, "text": text, "rank": self.rank}
        self._wake.set()

    def wait_for_the_end(self, code: int) -> None:
        """Does not return: the verdict of the roll call ends this process, or it ends itself."""
        deadline = time.monotonic() + 2 * ANSWER_SECONDS
        while time.monotonic() < deadline and self._threads[0].is_alive():
            time.sleep(0.05)
        failure.leave(code)

    def close(self) -> None:
        """This process has ended well; it watches on until all have, for one may still fail."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._put(f"done/{self.rank}", "1")
            while len(self._all("done")) < self.count and time.monotonic() < deadline:
                time.sleep(min(0.05 * self._period, 1.0))
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=5)

    # What goes to the service, and comes from it.

    def _put(self, key: str, value: str, *, replace: bool = True) -> None:
        self._client.key_value_set(f"{_PREFIX}/{key}", value, allow_overwrite=replace)

    def _all(self, folder: str) -> dict[int, str]:
        """rank -> value of what each process put below `folder`."""
        found = self._client.key_value_dir_get(f"{_PREFIX}/{folder}")
        return {int(key.rsplit("/", 1)[1]): value for key, value in found}

    def _beats(self) -> dict[int, dict[str, Any]]:
        return {rank: json.loads(text) for rank, text in self._all("beat").items()}

    # The two threads.

    def _listen(self) -> None:
        number = 0
        try:
            while not self._closing.is_set():
                number += 1
                beat = {"number": number, "busy": self._busy, "step": self._step}
                self._put(f"beat/{self.rank}", json.dumps(beat))
                if self._pending is None:
                    self._look_at_neighbours()
                if self._pending is None and processes.is_first():
                    self._look_for_silence()
                if self._pending is not None:
                    # The first alarm counts.
                    with contextlib.suppress(jax.errors.JaxRuntimeError):
                        self._put("alarm/0", json.dumps(self._pending), replace=False)
                alarm = self._all("alarm")
                self._ticked = time.monotonic()
                if alarm:
                    self._roll_call(json.loads(alarm[0]))
                    return
                self._wake.wait(self._period)
                self._wake.clear()
        except jax.errors.JaxRuntimeError as error:
            if not self._closing.is_set():
                self._first_is_lost(str(error).splitlines()[0])

    def _guard(self) -> None:
        """Ends this process when the service does not answer: process 0 is frozen or out of reach."""
        while not self._closing.wait(1.0):
            if time.monotonic() - self._ticked > SILENCE_SECONDS + 2 * ANSWER_SECONDS:
                return  # this process itself was frozen; whoever is there decides
            if time.monotonic() - self._ticked > SILENCE_SECONDS and self._threads[0].is_alive():
                self._first_is_lost(f"no answer for {SILENCE_SECONDS:.0f} s")

    def _look_at_neighbours(self) -> None:
        gone = [rank for rank in self._neighbours if self.identities[rank].state() == "gone"]
        if gone:
            gone = [rank for rank in gone if rank not in self._all("done")]
        if gone:
            self.alarm("gone", f"{self._name(gone[0])} is gone")

    def _look_for_silence(self) -> None:
        """Of those that take steps: what is done before may keep a thread of Python waiting for long.

        A process that dies there is found by the library below, after `HEARTBEAT_SECONDS` (see `_on_abort`).
        """
        now, beats = time.monotonic(), self._beats()
        for rank, beat in beats.items():
            if beat["number"] != self._seen.get(rank, (-1, now))[0]:
                self._seen[rank] = (beat["number"], now)
        quiet = [
            rank
            for rank, (_, at) in self._seen.items()
            if now - at > SILENCE_SECONDS and not beats[rank]["busy"]
        ]
        if quiet:
            quiet = [rank for rank in quiet if rank not in self._all("done")]
        if quiet:
            self.alarm("silent", f"{self._name(quiet[0])} is silent for {SILENCE_SECONDS:.0f} s")

    # The roll call.

    def _roll_call(self, alarm: Mapping[str, Any]) -> None:
        if self._own is None:
            failure.dump_stacks(self._log(), f"roll call: {alarm['text']}")
        states = {rank: self.identities[rank].state() for rank in self._neighbours}
        answer = {
            "at": failure.main_thread_at(),
            "step": self._step,
            "failure": self._own,
            "seen": {rank: state for rank, state in states.items() if state != "running"},
        }
        self._put(f"answer/{self.rank}", json.dumps(answer))
        if processes.is_first():
            verdict = self._judge(alarm)
            self._put("verdict/0", json.dumps(verdict))
        else:
            verdict = self._await_verdict()
        self._end(verdict)

    def _judge(self, alarm: Mapping[str, Any]) -> dict[str, Any]:
        """Waits for the answers and says who is at fault."""
        answers, states = self._answers()
        missing = [rank for rank in range(self.count) if rank not in answers]
        errors = {rank: a["failure"] for rank, a in answers.items() if a["failure"]}
        causes = {rank: each for rank, each in errors.items() if not each["consequence"]}
        code, hung = EXIT_LOST, alarm["kind"] == "hang" or "stopped" in states.values()
        if missing:
            hung = hung and any(states.get(rank) != "gone" for rank in missing)
            code, guilty = EXIT_HUNG if hung else EXIT_LOST, missing[0]
            line = f"{self._name(guilty)} {_how(states.get(guilty, ''))}"
            if len(missing) > 1:
                line += f"; so do {processes.name_processes(missing[1:])}"
        elif causes:
            guilty = min(causes, key=lambda rank: causes[rank]["at"])
            line = f"{self._name(guilty)} failed: {causes[guilty]['text']}"
        else:
            guilty, code = alarm["rank"], EXIT_HUNG if alarm["kind"] == "hang" else EXIT_LOST
            line = f"{alarm['text']}; all {self.count} processes answer"
        answered = [rank for rank in range(self.count) if rank in answers]
        if alarm["kind"] == "hang":
            line = f"{alarm['text']}: {line}" if missing or causes else line
        self._write_failure(line, guilty, answers, states)
        for rank in missing:  # one that is frozen would stay for ever
            if states.get(rank) == "stopped":
                self.identities[rank].kill()
        return {"line": line, "code": code, "guilty": guilty, "answered": answered}

    def _answers(self) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """The answers by rank, and how those that do not answer look to their neighbours."""
        deadline = time.monotonic() + ANSWER_SECONDS + 2 * self._period
        while True:
            answers = {rank: json.loads(text) for rank, text in self._all("answer").items()}
            states: dict[int, str] = {}
            for each in answers.values():
                states |= {int(rank): state for rank, state in each["seen"].items()}
            states = {rank: state for rank, state in states.items() if rank not in answers}
            self._ticked = time.monotonic()
            if len(answers | states) == self.count or time.monotonic() > deadline:
                return answers, states
            time.sleep(0.05)

    def _await_verdict(self) -> dict[str, Any]:
        deadline = time.monotonic() + 2 * ANSWER_SECONDS + 2 * self._period
        while time.monotonic() < deadline:
            found = self._all("verdict")
            self._ticked = time.monotonic()
            if found:
                return json.loads(found[0])
            time.sleep(0.05)
        line = f"{self._name(0)} does not come to a verdict"
        return {"line": line, "code": EXIT_LOST, "guilty": 0, "answered": []}

    def _write_failure(
        self,
        line: str,
        guilty: int,
        answers: Mapping[int, dict[str, Any]],
        states: Mapping[int, str],
        *,
        only_first: bool = False,
        others: str = "no answer",
    ) -> None:
        """`failure.txt` and, on standard error, the last words of who is at fault."""
        last = failure.last_lines(failure.log_path(self._directory, guilty))
        text = [line, "", "processes:"]
        for rank, identity in enumerate(self.identities):
            its = answers.get(rank)
            how = states.get(rank, others) if its is None else f"step {its['step']}: {its['at']}"
            text.append(f"  {rank} ({identity}): {how}")
        text += ["", f"last lines of process {guilty}:", *(f"  {each}" for each in last)]
        text += ["", "The stacks of every process that answered are at the end of its rank_*.log."]
        written = failure.write_failure(self._directory, text, only_first=only_first)
        said = self._own is not None and not self._own["consequence"]  # this one's words are there
        if written and last and not said:
            shown = "\n".join(f"  | {each}" for each in last[-8:])
            print(f"last lines of process {guilty}:\n{shown}", file=sys.stderr, flush=True)

    def _end(self, verdict: Mapping[str, Any]) -> None:
        self._ending.acquire()  # one thread ends the process, once
        own = self._own
        if own is None or own["consequence"]:
            path = failure.processes_folder(self._directory) / failure.FAILURE_FILE
            where = f"; see {path}" if path.exists() else ""
            print(f"error: {verdict['line']}{where}", file=sys.stderr, flush=True)
        code = own["code"] if own and not own["consequence"] else verdict["code"]
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._put(f"left/{self.rank}", "1")
            if processes.is_first():  # last: without the service the others would abort
                deadline = time.monotonic() + 5
                others = set(verdict["answered"])
                while not others <= set(self._all("left")) and time.monotonic() < deadline:
                    time.sleep(0.02)
                time.sleep(0.2)
        failure.leave(code)

    # Process 0 is lost, and the service with it.

    def _first_is_lost(self, why: str) -> None:
        self._ending.acquire()
        self._leave_as_written(0.0)  # it may have ended after a verdict
        first = self.identities[0]
        state = first.state() if first.is_beside else ""
        how = {
            "gone": "died",
            "stopped": "is frozen (stopped by a signal)",
        }.get(state, f"is dead or out of reach ({why})")
        line = f"{self._name(0)} {how}"
        mine = {"step": self._step, "at": failure.main_thread_at()}
        failure.dump_stacks(self._log(), line)
        self._write_failure(
            line,
            0,
            {self.rank: mine},
            {0: state or "no answer"},
            only_first=True,
            others="not asked",
        )
        if state == "stopped":
            first.kill()
        print(f"error: {line}", file=sys.stderr, flush=True)
        failure.leave(EXIT_HUNG if state == "stopped" else EXIT_LOST)

    def _on_abort(self) -> None:
        """Makes the abort of the library below, when a process is lost, one of our ends.

        It is `abort()` in a thread of C++: no handler of Python would ever run. This one is called by the system, takes
        the interpreter's lock, and leaves an abort that no other process explains as it is.
        """

        def aborted(number: int) -> None:
            libc.alarm(15)  # whatever hangs from here on
            libc.signal(signal.SIGABRT, kind())  # a null pointer: back to the default
            if self.rank and not self._service_answers():
                self._first_is_lost("its connection is closed")
            self._ending.acquire()
            now = time.monotonic()
            silent = [rank for rank, (_, at) in self._seen.items() if now - at > SILENCE_SECONDS]
            states = {rank: self.identities[rank].state() for rank in self._neighbours}
            lost = [rank for rank, state in states.items() if state != "running"] or silent
            if lost:
                line = f"{self._name(lost[0])} {_how(states.get(lost[0], ''))}"
                mine = {self.rank: {"step": self._step, "at": failure.main_thread_at()}}
                self._write_failure(line, lost[0], mine, states, only_first=True)
                if states.get(lost[0]) == "stopped":
                    self.identities[lost[0]].kill()
                print(f"error: {line}", file=sys.stderr, flush=True)
                failure.leave(EXIT_LOST)
            self._leave_as_written(3.0)

        libc = ctypes.CDLL(None)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, kind], ctypes.c_void_p
        self._handler = kind(aborted)  # kept: C holds no reference
        libc.signal(signal.SIGABRT, self._handler)

    def _leave_as_written(self, seconds: float) -> None:
        """Ends this process with what another one has written into `failure.txt`, if one does so in time."""
        path = failure.processes_folder(self._directory) / failure.FAILURE_FILE
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, IndexError):
                line = path.read_text().splitlines()[1]
                print(f"error: {line}; see {path}", file=sys.stderr, flush=True)
                failure.leave(EXIT_LOST)
            if time.monotonic() >= deadline:
                return
            time.sleep(0.1)

    def _service_answers(self) -> bool:
        host, _, port = (processes.coordinator() or "").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
            return True
        except (OSError, ValueError):
            return False

    def _log(self) -> Path:
        return failure.log_path(self._directory, self.rank)

    def _name(self, rank: int) -> str:
        return f"process {rank} ({self.identities[rank]})"


def _how(state: str) -> str:
    """What is said of a process that does not answer, by how it looks to its neighbours."""
    return {
        "gone": "died",
        "stopped": "is frozen (stopped by a signal) and does not answer",
    }.get(state, "is dead or frozen: it does not answer")
