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


GIVEN = os.environ.get("FASTDIFF_TEST_DEVICE")  # cuda, or cpu to try what follows


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU the instruction set of the CPU makes no difference: one of them is enough."""
    if GIVEN is None:
        return
    first: dict[str, object] = {}
    kept, dropped = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        same = parameters.get("isa") == first.setdefault(item.nodeid.split("[")[0], parameters.get("isa"))
        (kept if same else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same numbers whichever tests ran before. With FASTDIFF_TEST_DEVICE tensors are on that device where a test
    names none, but for files that look at it themselves."""
    torch.manual_seed(0)
    if GIVEN is None or hasattr(request.module, "DEVICE"):
        yield
        return

    class Generator(torch.Generator):
        def __new__(cls, device: Any = GIVEN) -> Any:
            return super().__new__(cls, device=device)

    monkeypatch.setattr(torch, "Generator", Generator)
    with torch.device(GIVEN):
        yield
