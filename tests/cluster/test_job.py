"""Time limits: from the knob and from the scheduler."""

import pytest

from configs import flags
from paxlike.cluster import ClusterOptions, Deadline, Job


def test_the_earlier_limit_counts():
    options = ClusterOptions(time_limit_minutes=10)
    assert Deadline.of(options, Job(ends=5000.0), began=1000.0).ends == 1600.0
    assert Deadline.of(options, Job(ends=1500.0), began=1000.0).ends == 1500.0
    assert Deadline.of(ClusterOptions(), Job(), began=0.0).ends is None
    assert not Deadline(ends=None, began=0.0).is_near(step_seconds=1e9)


def test_the_margin_is_what_was_measured():
    deadline = Deadline(ends=10_000.0, began=0.0)
    assert deadline.margin_seconds(step_seconds=0) == 1.5 * 60 + 10  # nothing is known yet
    deadline.took("checkpoint", 20)
    deadline.took("checkpoint", 5)  # the longest counts
    deadline.took("evaluation", 100)
    assert deadline.margin_seconds(step_seconds=4) == 1.5 * 24 + 10
    assert deadline.margin_seconds(step_seconds=4, before="evaluation") == 1.5 * 124 + 10
    assert not deadline.is_near(step_seconds=4, now=9_900.0)
    assert deadline.is_near(step_seconds=4, now=9_900.0, before="evaluation")
    assert deadline.is_near(step_seconds=4, now=9_960.0)


def test_a_short_limit_is_not_all_margin():
    assert Deadline(ends=30.0, began=0.0).margin_seconds(step_seconds=0) < 10


def test_time_limit_must_be_positive():
    with pytest.raises(ValueError, match="TIME_LIMIT=0 minutes must be above 0"):
        ClusterOptions(time_limit_minutes=0).check()


def test_the_end_of_a_slurm_job_is_read_and_shown():
    assert flags.job_end_time({}) == (None, "")
    seconds, line = flags.job_end_time({"SLURM_JOB_END_TIME": "1763713732"})
    assert seconds == 1763713732.0
    assert "2025-11-21 08:28:52+00:00" in line and "SLURM_JOB_END_TIME" in line
    with pytest.raises(flags.UsageError, match="SLURM_JOB_END_TIME=soon: the end of the job"):
        flags.job_end_time({"SLURM_JOB_END_TIME": "soon"})
