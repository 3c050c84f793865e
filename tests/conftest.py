"""Test-wide settings. Everything here must happen before torch starts its threads."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve a busy machine

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
settings.register_profile("dev", max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers whichever tests ran before."""
    torch.manual_seed(0)
