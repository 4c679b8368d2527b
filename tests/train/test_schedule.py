"""Schedules against those of optax and numbers by hand; knobs that a schedule or an optimizer does not read."""

import math
import re

import fiddle as fdl
import numpy as np
import optax
import pytest

from configs.gpt import Quickstart
from paxlike.train.optimizer import Adafactor, Lion, Muon, Sgd
from paxlike.train.schedule import KINDS, Schedule

STEPS = np.array([0, 1, 5, 10, 11, 40, 50, 60, 79, 80, 81, 500])


def test_linear_decay_is_that_of_optax():
    ours = Schedule("linear_rampup_linear_decay", 0.02, 10, 40, 80, min_ratio=0.25)
    reference = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 0.02, 10),
            optax.constant_schedule(0.02),
            optax.linear_schedule(0.02, 0.005, 40),
        ],
        [10, 40],
    )
    for step in STEPS:
        assert float(ours(step)) == pytest.approx(float(reference(step)), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "middle", "quarter"),
    [
        ("linear", 0.6, 0.8),
        ("cosine", 0.6, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("exponential", math.sqrt(0.2), 0.2**0.25),
        ("sqrt", 0.2 + 0.8 * (1 - math.sqrt(0.5)), 0.2 + 0.8 * 0.5),
    ],
)
def test_warmup_stable_decay(shape, middle, quarter):
    ours = Schedule("warmup_stable_decay", 2.0, 10, 40, 80, min_ratio=0.2, shape=shape)
    factors = {
        0: 0.0,
        5: 0.5,
        10: 1.0,
        25: 1.0,
        40: 1.0,
        50: quarter,
        60: middle,
        80: 0.2,
        500: 0.2,
    }
    for step, factor in factors.items():
        assert float(ours(step)) == pytest.approx(2.0 * factor, rel=1e-5), step


def test_a_run_can_be_prolonged_in_the_flat_part():
    """Of WSD: before the decay a longer schedule is the same."""
    short, long = (Schedule("warmup_stable_decay", 1.0, 10, end - 8, end) for end in (80, 800))
    assert [float(short(s)) for s in range(72)] == [float(long(s)) for s in range(72)]


def test_constant_has_no_warmup_and_linear_rampup_constant_has():
    constant = Schedule("constant", 0.5)
    warm = Schedule("linear_rampup_constant", 0.5, warmup=10)
    assert [float(constant(s)) for s in (0, 5, 1000)] == [0.5, 0.5, 0.5]
    assert [float(warm(s)) for s in (0, 5, 10, 1000)] == [0.0, 0.25, 0.5, 0.5]
    assert float(Schedule("linear_rampup_constant", 0.5)(0)) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule("wsd", 1.0), "LR_SCHEDULE='wsd' is none of linear_rampup_cosine_decay, "),
        (
            lambda: Schedule("constant", 1.0, warmup=5),
            "LR_SCHEDULE='constant' has no warm-up, but warmup=5; use linear_rampup_constant",
        ),
        (lambda: Schedule("linear_rampup_constant", 1.0, warmup=-1), "LR_CONST_WARMUP=-1 is neg"),
        (
            lambda: Schedule("warmup_stable_decay", 1.0, 0, 5, 9, shape="flat"),
            "LR_WSD_SHAPE='flat' is none of linear, cosine, exponential, sqrt",
        ),
        (
            lambda: Schedule("linear_rampup_exponential_decay", 1.0, 0, 5, 9, min_ratio=0.0),
            "an exponential decay from 1.0 x the peak never reaches 0.0 x the peak",
        ),
        (
            lambda: Schedule("linear_rampup_linear_decay", 1.0, 9, 5, 9),
            "warmup <= decay start < decay end, got 9, 5, 9",
        ),
        (
            lambda: Quickstart(LR_SCHEDULE="constant", LR_COS_WARMUP=5).experiment(),
            "LR_COS_WARMUP=5 has no effect with LR_SCHEDULE='constant'; it is read with "
            "'linear_rampup_cosine_decay'",
        ),
        (
            lambda: Quickstart(LR_WSD_SHAPE="sqrt").experiment(),
            "LR_WSD_SHAPE=sqrt has no effect with LR_SCHEDULE='linear_rampup_cosine_decay'",
        ),
        (
            lambda: Quickstart(OPTIMIZER="sgd", ADAM_BETA1=0.8).experiment(),
            "ADAM_BETA1=0.8 has no effect with OPTIMIZER='sgd'; it is read with 'adam' or 'muon'",
        ),
        (
            lambda: Quickstart(OPTIMIZER="adafactor", FIRST_MOMENT_DTYPE="bfloat16").experiment(),
            "FIRST_MOMENT_DTYPE=bfloat16 has no effect with OPTIMIZER='adafactor'; it is read with "
            "'adam' or 'lion' or 'muon' or 'sgd'",
        ),
    ],
)
def test_what_cannot_work_or_has_no_effect_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def optimizer(**knobs):
    return fdl.build(Quickstart(**knobs).experiment()).optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_knobs_reach_each_schedule(kind):
    prefix = {"warmup_stable_decay": "LR_WSD", "linear_rampup_constant": "LR_CONST"}.get(kind)
    knobs = {f"{prefix}_WARMUP": 7} if prefix else {}
    schedule = optimizer(LR_SCHEDULE=kind, LEARNING_RATE=0.5, **knobs).schedule
    assert (schedule.kind, schedule.peak) == (kind, 0.5)
    assert schedule.warmup == (0 if kind == "constant" else 7 if prefix else schedule.warmup)
    if kind == "linear_rampup_cosine_decay":
        assert schedule == Schedule(kind, 0.5, 60, 61, 1200)  # as the config has it


def test_knobs_reach_each_optimizer():
    assert optimizer().direction is None
    assert optimizer(OPTIMIZER="lion", LION_BETA2=0.98).direction == Lion(b2=0.98)
    assert optimizer(OPTIMIZER="sgd", SGD_NESTEROV=True).direction == Sgd(nesterov=True)
    assert optimizer(OPTIMIZER="adafactor", ADAFACTOR_MIN_SIZE=8).direction == Adafactor(min_size=8)
    muon = optimizer(
        OPTIMIZER="muon", MUON_EXCLUDE="ffn", ADAM_BETA1=0.8, FIRST_MOMENT_DTYPE="bfloat16"
    )
    assert muon.direction == Muon(by_adam="ffn", first_dtype="bfloat16")
    assert (muon.adam.b1, muon.adam.first_dtype) == (0.8, "bfloat16")
    rates = optimizer(LEARNING_RATE_FACTORS={"embedding": 0.1, "norm": 0.0}).rate_factors
    assert rates == (("embedding", 0.1), ("norm", 0.0))
