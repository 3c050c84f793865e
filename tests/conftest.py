"""Test-wide settings. Everything here must happen before torch starts its threads."""

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve a busy machine

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
settings.register_profile("dev", max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def built() -> Any:
    """The CUDA emulator (tests/emu/harness.py), built once for all files."""
    from emu import harness

    reason = harness.why_not()
    if reason:
        pytest.skip(f"the CUDA emulator cannot be built: {reason}")
    return harness.build()


@pytest.fixture
def emu(built: Any) -> Iterator[Any]:
    """The emulator as it is when nothing has been set."""
    built.reset()
    yield built
    built.reset()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers whichever tests ran before."""
    torch.manual_seed(0)
