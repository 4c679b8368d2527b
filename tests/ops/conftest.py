"""Transformer Engine itself and its stand-in, as fixtures."""

import importlib
import os
import sys

import jax
import pytest

from tests.ops import te_stand_in

try:
    importlib.import_module("transformer_engine.jax")
    MISSING = ""
except (ImportError, OSError) as error:
    MISSING = f"Transformer Engine cannot be imported here ({error}); see scripts/build_te_cpu.sh"


@pytest.fixture
def standing_in(monkeypatch):
    """The stand-in, whatever is installed."""
    for name, module in te_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["Transformer Engine", "stand-in"])
def engine(request, monkeypatch):
    """Transformer Engine itself, and what has its interface."""
    if request.param == "stand-in":
        request.getfixturevalue("standing_in")
        return request.param
    if MISSING:
        pytest.skip(MISSING)
    if jax.default_backend() == "cpu":
        assert os.environ.get("NVTE_JAX_CUSTOM_CALLS") == "false", "run it as build_te_cpu.sh says"
        # It asks the driver, which is not there.
        driver = importlib.import_module("transformer_engine_jax")
        monkeypatch.setattr(driver, "get_device_compute_capability", lambda number=0: 90)
    return request.param


@pytest.fixture
def real_engine():
    """Transformer Engine itself, which a test asks for what only it has."""
    if MISSING:
        pytest.skip(MISSING)
