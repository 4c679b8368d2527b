"""Where the time of a run went: steps that count, and everything else.

    python -m paxlike.log.goodput DIR

Every moment of a start is of exactly one kind, so the kinds add up to the wall time. `Ledger` keeps the sums while a
run goes on, and `metrics.jsonl` gets them as events `goodput`; from these, `read_goodput` puts together the starts of a
run, killed ones too. What a start computed after the checkpoint from which a later one went on was computed again:
it is *lost*. The time between two starts is *down*; what a killed start did after its last event counts there, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paxlike.arguments import ArgumentParser
from paxlike.log.history import read_lines
from paxlike.log.plot import COLORS, STYLE, import_pyplot
from paxlike.log.progress import duration

EVENT = "goodput"
JSON_FILE, PNG_FILE = "goodput.json", "goodput.png"
KINDS = {
    "step": "steps",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "compilation": "compilation",
    "restore": "restore",
    "start_up": "start-up",
    "lost": "lost to restarts",
    "down": "down",
}
"""Every kind of time, with its name for people; the last two are known only to who reads."""
_MOST_COLUMNS = 6
_REPEATED = ("step", "data", "evaluation", "checkpoint")  # what is computed again after a restart


class Ledger:
    """Sums of one start: each moment goes to the kind in force.

    Example:
        >>> ledger = Ledger()
        >>> with ledger.on("compilation"):
        ...     pass
        >>> sorted(ledger.seconds()) == sorted(["start_up", "compilation"])
        True
    """

    def __init__(self, began: float | None = None):
        """`began`: Unix seconds at which the start began, now if None; it begins with `start_up`."""
        now = time.time()
        self.began = now if began is None else min(began, now)
        self._sums: dict[str, float] = {"start_up": now - self.began}
        self._kind, self._since = "start_up", time.monotonic()

    def switch(self, kind: str) -> None:
        """From now on the time is of another kind."""
        now = time.monotonic()
        self._sums[self._kind] = self._sums.get(self._kind, 0.0) + now - self._since
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """The time of the block is of `kind`; of an inner block, of its own."""
        before = self._kind
        self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Books so many seconds, which were counted as `source`, as `target`."""
        self._sums[source] = self._sums.get(source, 0.0) - seconds
        self._sums[target] = self._sums.get(target, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """The sums up to now."""
        self.switch(self._kind)
        return dict(self._sums)

    def record(self, step: int | None, from_step: int | None) -> dict[str, Any]:
        """The fields of an event: what this start has done until `step`."""
        seconds = self.seconds()
        return {
            "start": round(self.began, 3),
            "from_step": from_step,
            "step": step,
            "seconds": {kind: round(value, 3) for kind, value in seconds.items()},
        }


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run: when, which steps, and seconds by kind; they add up to `until - began`."""

    began: float
    until: float
    from_step: int | None
    step: int | None
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The time of a whole run.

    Attributes:
      starts: in the order of time.
      seconds: by kind, `lost` and `down` included; they add up to `wall_seconds`.
      wall_seconds: from the beginning of the first start to the last event of the last.
    """

    starts: list[Start]
    seconds: dict[str, float]
    wall_seconds: float

    @property
    def share(self) -> float:
        """Of steps that count in the wall time."""
        return self.seconds.get("step", 0.0) / self.wall_seconds if self.wall_seconds else 0.0

    def json(self) -> str:
        """To read by programs."""
        whole = dataclasses.asdict(self) | {"share": round(self.share, 4)}
        return json.dumps(_rounded(whole), indent=1) + "\n"

    def table(self) -> str:
        """To read by people: a line, or where there are several starts a table with the latest of them."""
        steps = f"{self.share:.0%} of {duration(self.wall_seconds)} were steps that count"
        shown = [kind for kind in KINDS if self.seconds.get(kind, 0.0) >= 0.05]
        if len(self.starts) == 1:
            parts = [f"{KINDS[kind]} {duration(self.seconds[kind])}" for kind in shown]
            return f"time: {steps} ({', '.join(parts)})"
        latest = self.starts[-_MOST_COLUMNS:]
        first = len(self.starts) - len(latest) + 1
        rows = [["", *(f"start {n}" for n, _ in enumerate(latest, first)), "all", ""]]
        for kind in shown:
            cells = [start.seconds.get(kind, 0.0) for start in latest] + [self.seconds[kind]]
            texts = [duration(cell) if cell >= 0.05 else "-" for cell in cells]
            rows.append([KINDS[kind], *texts, f"{cells[-1] / self.wall_seconds:.1%}"])
        reached = ["-" if start.step is None else f"{start.step:,}" for start in latest]
        rows.append(["last step", *reached, "", ""])
        wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  " + row[0].ljust(wide[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], wide[1:]))
            for row in rows
        ]
        return "\n".join([f"time: {steps}", *(line.rstrip() for line in lines)])


def read_goodput(path: str | os.PathLike) -> Goodput:
    """The time of the run in a log folder, whether it runs, has ended or was killed.

    Raises:
      ValueError: no metrics there, or none of this kind (a run of an older version).
    """
    records: dict[float, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        if line.get("event") == EVENT:
            records.setdefault(line["start"], []).append(line)
    if not records:
        raise ValueError(f"no line of {str(path)!r} has the event {EVENT!r}: nothing to add up")
    groups = [records[began] for began in sorted(records)]
    starts: list[Start] = []
    for number, group in enumerate(groups):
        later = [line["from_step"] for each in groups[number + 1 :] for line in each[-1:]]
        resumed = min((step for step in later if step is not None), default=None)
        starts.append(_start(group, resumed))
    totals = dict.fromkeys(KINDS, 0.0)
    for start in starts:
        for kind, value in start.seconds.items():
            totals[kind] = totals.get(kind, 0.0) + value
    # Two starts may overlap where clocks differ: no time is counted twice.
    wall = starts[-1].until - starts[0].began
    totals["down"] = wall - sum(start.until - start.began for start in starts)
    return Goodput(starts, totals, wall)


def write_report(path: str | os.PathLike, *, picture: bool = True) -> Goodput:
    """Writes `goodput.json` and, if asked and matplotlib is there, `goodput.png` into the log folder."""
    folder = pathlib.Path(path)
    found = read_goodput(folder)
    (folder / JSON_FILE).write_text(found.json())
    if picture:
        with contextlib.suppress(ModuleNotFoundError):
            plot_goodput(found, folder / PNG_FILE)
    return found


def plot_goodput(goodput: Goodput, output_png: str | os.PathLike) -> pathlib.Path:
    """Draws a bar for each start, stacked by kind, in the order of time; the gaps are `down`."""
    pyplot = import_pyplot()
    unit, name = _unit(goodput.wall_seconds)
    origin = goodput.starts[0].began
    with pyplot.rc_context(STYLE):
        height = min(1.9 + 0.45 * len(goodput.starts), 12.0)
        figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
        for row, start in enumerate(goodput.starts):
            left = (start.began - origin) / unit
            for kind in ("start_up", "restore", "compilation", *_REPEATED, "lost"):
                width = start.seconds.get(kind, 0.0) / unit
                axes.barh(row, width, left=left, height=0.7, color=_COLOR_OF[kind])
                left += width
        kinds = [k for k in _COLOR_OF if any(s.seconds.get(k, 0.0) > 0 for s in goodput.starts)]
        patches = [pyplot.Rectangle((0, 0), 1, 1, color=_COLOR_OF[kind]) for kind in kinds]
        axes.set_yticks(range(len(goodput.starts)))
        axes.set_yticklabels([f"start {n}" for n in range(1, len(goodput.starts) + 1)])
        axes.invert_yaxis()
        axes.set(xlabel=f"wall time ({name})", title=f"goodput {goodput.share:.0%}")
        labels = [f"{KINDS[kind]} {goodput.seconds[kind] / unit:.3g}" for kind in kinds]
        figure.legend(patches, labels, loc="outside lower center", ncols=4)
        output = pathlib.Path(output_png)
        figure.savefig(output, dpi=150)
        pyplot.close(figure)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: reports on one run."""
    parser = ArgumentParser(
        prog="python -m paxlike.log.goodput", description="Where the time of a run went."
    )
    parser.add_argument("run", metavar="DIR", help="job_log_dir of a run, running or dead")
    options = parser.parse_args(arguments)
    try:
        folder = pathlib.Path(options.run)
        found = write_report(folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found.table())
    print(
        "\n".join(str(folder / name) for name in (JSON_FILE, PNG_FILE) if (folder / name).exists())
    )
    return 0


_COLOR_OF = {
    "step": COLORS[2],
    "data": COLORS[5],
    "evaluation": COLORS[0],
    "checkpoint": COLORS[4],
    "compilation": COLORS[3],
    "restore": "#8C6BB1",
    "start_up": "0.6",
    "lost": COLORS[1],
}


def _start(lines: Sequence[Mapping[str, Any]], resumed: int | None) -> Start:
    """One start from its events; `resumed`: the step from which a later one went on."""
    last, seconds = lines[-1], dict(lines[-1]["seconds"])
    from_step, step = last["from_step"], last["step"]
    lost = 0.0
    if resumed is not None and from_step is not None and step is not None and step > resumed:
        kept = _sums_at(lines, resumed)
        for kind in _REPEATED:
            again = max(seconds.get(kind, 0.0) - kept.get(kind, 0.0), 0.0)
            seconds[kind] = seconds.get(kind, 0.0) - again
            lost += again
    seconds["lost"] = lost
    until = last["start"] + sum(last["seconds"].values())
    return Start(last["start"], until, from_step, step, seconds)


def _sums_at(lines: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The sums when `step` was complete, in between by the share of the steps."""
    known = [line for line in lines if line["step"] is not None and line["from_step"] is not None]
    before = [line for line in known if line["step"] <= step]
    after = [line for line in known if line["step"] > step]
    if not before:
        return {}
    low, high = before[-1], (after or before)[0 if after else -1]
    span = high["step"] - low["step"]
    share = (step - low["step"]) / span if span else 0.0
    first, second = low["seconds"], high["seconds"]
    kinds = first.keys() | second.keys()
    sums = {kind: (first.get(kind, 0.0), second.get(kind, 0.0)) for kind in kinds}
    return {kind: one + share * (two - one) for kind, (one, two) in sums.items()}


def _unit(seconds: float) -> tuple[float, str]:
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit:
            return unit, name
    return 1.0, "seconds"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
