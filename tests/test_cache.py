"""The caches of tables: their budget, and what captured CUDA graphs and other streams need of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emu import harness

from fastdiff import _native
from fastdiff.ops import _cache, _philox, boxes, spectral_features, spectrum, update

GPU = torch.device("cuda", 0)


class Table:
    """Stands for a tensor on a GPU."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Gpu:
    """What `_native` says of the device: the stream that is current, whether it is being captured; what it was told."""

    def __init__(self) -> None:
        self.capturing, self.stream, self.recorded = False, 11, []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    state = Gpu()
    monkeypatch.setattr(_native, "capturing", lambda device: state.capturing)
    monkeypatch.setattr(_native, "stream_on", lambda device: state.stream)
    monkeypatch.setattr(_native, "used_here", lambda t: state.recorded.append((t, state.stream)))
    return state


def cached(budget: int = 1 << 20) -> tuple[Callable[..., Table], list[int]]:
    made: list[int] = []

    @_cache.on_device("tables", lambda t: (t,), budget=budget)
    def table(key: int, size: int, device: torch.device) -> Table:
        made.append(key)
        return Table(size)

    return table, made


def test_the_least_recently_used_goes_first_and_the_budget_holds() -> None:
    made: list[int] = []

    @_cache.bounded(lambda value: 100_000, budget=1 << 20)
    def value(key: int) -> int:
        made.append(key)
        return key

    for key in range(10):
        assert value(key) == key
    assert value(0) == 0  # now the most recently used
    assert value(99) == 99
    assert value(0) == 0
    assert made == [*range(10), 99]
    assert value(1) == 1
    assert made[-1] == 1
    assert value.held() <= 1 << 20  # type: ignore[attr-defined]


def test_what_a_captured_graph_reads_is_never_given_back(gpu: Gpu) -> None:
    table, made = cached()
    warm = table(1, 100_000, GPU)
    gpu.capturing = True
    assert table(1, 100_000, GPU) is warm
    assert table(1, 100_000, GPU) is warm  # a second graph
    assert table.held() == 0  # type: ignore[attr-defined]  # outside the budget
    gpu.capturing = False
    for key in range(2, 40):
        table(key, 100_000, GPU)
    assert 0 < table.held() <= 1 << 20  # type: ignore[attr-defined]
    assert table(1, 100_000, GPU) is warm
    assert made == [1, *range(2, 40)]
    again = table(2, 100_000, GPU)  # one that no graph reads was made anew
    assert made[-1] == 2
    assert again is table(2, 100_000, GPU)


def test_nothing_is_made_during_a_capture(gpu: Gpu) -> None:
    table, made = cached()
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"tables: not on cuda:0 yet.*once before the capture"):
        table(1, 100, GPU)
    gpu.capturing = False
    table(1, 300_000, GPU)  # more than a quarter of the budget
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="never kept"):
        table(1, 300_000, GPU)
    assert made == [1]


def test_a_use_on_another_stream_is_recorded(gpu: Gpu) -> None:
    table, _ = cached()
    t = table(1, 100, GPU)
    table(1, 100, GPU)
    assert gpu.recorded == []
    gpu.stream = 22
    table(1, 100, GPU)
    assert gpu.recorded == [(t, 22)]
    gpu.capturing = True  # what a graph holds is never freed, and a capture records no events
    table(1, 100, GPU)
    assert gpu.recorded == [(t, 22)]


def test_the_cpu_is_asked_nothing_about_captures_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_current_stream_capturing", "current_device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("torch.cuda was asked"))
    assert _philox._table(torch.device("cpu")) is _philox._table(torch.device("cpu"))


def test_every_table_on_a_device_is_pinned_by_a_capture(gpu: Gpu) -> None:
    cpu = torch.device("cpu")
    calls = [
        lambda: _philox._table(cpu),
        lambda: boxes._uploaded((0.1, 0.2, 0.3, 0.4), cpu),
    ]
    for call in calls:
        warm = call()
        gpu.capturing = True
        assert call() is warm
        gpu.capturing = False
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="boxes in host memory: not on"):
        boxes._uploaded((0.5, 0.2, 0.3, 0.4), cpu)


@pytest.mark.skipif(harness.why_not() is not None, reason="the CUDA emulator cannot be built")
def test_tables_of_a_spectrum_survive_the_sizes_that_follow(gpu: Gpu) -> None:
    with harness.build().operators():
        gpu.stream = 0
        x = torch.randn(1, 6, 10)
        want = spectral_features(x)
        gpu.capturing = True
        assert torch.equal(spectral_features(x), want)
        with pytest.raises(RuntimeError, match="the tables of a spectrum of this size: not on"):
            spectral_features(torch.randn(1, 6, 15))
        gpu.capturing = False
        tables = spectrum._device_tables(6, 10, False, x.device)
        store = spectrum._device_tables.held  # type: ignore[attr-defined]
        before = store()
        spectral_features(torch.randn(1, 6, 20))
        assert store() > before
        spectrum._device_tables.clear()  # type: ignore[attr-defined]
        assert spectrum._device_tables(6, 10, False, x.device) is tables


def test_a_coefficient_on_the_host_is_a_number_beside_tensors_elsewhere() -> None:
    x = torch.empty(2, 3, device="meta")
    checked = update._check("linear_update", [torch.tensor(0.25), torch.tensor(0.5, dtype=torch.float64)], [x, x], None)
    assert checked == [0.25, 0.5]
