"""Environment variables of Pax, turned into knobs: the only place where they are read."""

import datetime
from collections.abc import Mapping
from typing import Any

from configs.cli import values
from configs.cli.values import UsageError
from configs.knobs import Knobs, knobs

# variable -> (knobs that may stand for it: the first that a config declares; what asks for nothing)
VARIABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "VOCAB_PATH": (("VOCAB_PATH",), ""),
    "TFDS_DATA_DIR": (("TFDS_DATA_DIR",), ""),
    "ENABLE_TE": (("ENABLE_TE", "USE_TE"), "0"),
    "ENABLE_FP8": (("ENABLE_FP8", "USE_FP8"), "0"),
    "NVTE_FUSED_ATTN": (("USE_FUSED_ATTENTION", "USE_CUDNN_FLASH_ATTENTION"), "0"),
}

JOB_END = "SLURM_JOB_END_TIME"


def job_end_time(environ: Mapping[str, str]) -> tuple[float | None, str]:
    """When Slurm ends this job, in Unix seconds (None: nobody says), and a line about it for the resolved config.

    No knob: it is of this job, and a run that goes on in another one must not inherit it. Raises UsageError for what is
    no time.
    """
    text = environ.get(JOB_END, "").strip()
    if text in ("", "0"):
        return None, ""
    try:
        seconds = float(text)
        shown = datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"environment variable {JOB_END}={text}: the end of the job in Unix seconds wanted"
        ) from None
    return seconds, f"# this job ends at {shown}  [environment {JOB_END}={text}]"


def environment_knobs(
    environ: Mapping[str, str], cls: type[Knobs]
) -> tuple[dict[str, Any], list[str]]:
    """The knob values that the environment gives `cls`, and a line per variable without effect.

    An empty variable counts as unset. Raises UsageError for a value of the wrong type.
    """
    by_name = {knob.name: knob for knob in knobs(cls)}
    found, notices = {}, []
    for variable, (names, nothing) in VARIABLES.items():
        text = environ.get(variable, "").strip()
        name = next((name for name in names if name in by_name), None)
        if text and name:
            found[name] = _read(variable, text, by_name[name].type)
        elif text not in ("", nothing):
            notices.append(
                f"environment variable {variable}={text} has no effect: {cls.__name__} has no knob "
                f"{' or '.join(names)}"
            )
    return found, notices


def origin(knob_name: str) -> str:
    """`environment VOCAB_PATH`: where a value of environment_knobs came from."""
    return f"environment {next(var for var, (names, _) in VARIABLES.items() if knob_name in names)}"


def _read(variable: str, text: str, kind: Any) -> Any:
    attempts = [text, {"0": "false", "1": "true"}.get(text, text)]
    for attempt in attempts:
        try:
            return values.parse(attempt, kind)
        except values.WrongType:
            continue
    zero_one = " (0 or 1)" if "bool" in values.describe(kind) else ""
    raise UsageError(
        f"environment variable {variable}={text}: {values.describe(kind)} wanted{zero_one}"
    )
