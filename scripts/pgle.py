"""Turns the profiler trace of a GPU run into latencies of operations, by which XLA schedules a second run.

    python scripts/pgle.py JOB_LOG_DIR OUTPUT

JOB_LOG_DIR is that of a run with PROFILER_CAPTURE_STEP. Give OUTPUT to the second run as
XLA_FLAGS=--xla_gpu_pgle_profile_file_or_directory_path=OUTPUT.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jax.experimental import profiler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paxlike.arguments import ArgumentParser  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job_log_dir", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args(argv)
    traces = sorted((options.job_log_dir / "profile").rglob("*.xplane.pb"))
    if not traces:
        print(
            f"there is no trace in {options.job_log_dir / 'profile'}: run with PROFILER_CAPTURE_STEP",
            file=sys.stderr,
        )
        return 2
    folder = traces[-1].parent  # named by time: the newest
    costs = profiler.get_profiled_instructions_proto(str(folder))
    if not costs:
        print(
            f"{folder} has no costs of GPU operations: the trace of an NVIDIA GPU is needed",
            file=sys.stderr,
        )
        return 2
    options.output.write_bytes(costs)
    print(f"{options.output}: {len(costs):,} bytes from {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
