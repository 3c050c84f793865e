"""The scripts in examples/ run as they are, and print figures that hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"diffusers_dit": "diffusers", "pixart_block": "diffusers", "transformers_mamba": "transformers"}
NAMES = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
SMALL = {
    "cpu_only": ["--tokens", "16"],
    "diffusers_dit": ["--steps", "2"],
    "pixart_block": ["--tokens", "16", "--width", "144"],
    "plain_torch": ["--tokens", "16", "--width", "64"],
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    import fastdiff

    # The package under test, wherever it was imported from; not the tests' own warnings-as-errors.
    path = os.pathsep.join([str(Path(fastdiff.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    done = run(name, *SMALL.get(name, []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    apart = re.findall(r"difference(?: of [a-z ]+:)? (\S+) of (?:the|their) range", done.stdout)
    differences = [float(found) for found in apart]
    assert differences and max(differences) < 1e-3
    ratios = [float(found) for found in re.findall(r"(\S+) times (?:as fast|faster)", done.stdout)]
    assert ratios and min(ratios) > 0
    if name != "cpu_only":
        assert re.search(r"[1-9]\d* replaced, 0 refused", done.stdout), done.stdout


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the examples rely on to notice one."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _measure

    ones = torch.ones(3)
    assert _measure.difference(ones, ones) == 0 and _measure.difference(1.5 * ones, ones) == 0.5
    _measure.report("x", 1e-6, 1e-5, 2.0)
    assert capsys.readouterr().out == "x: difference 1.0e-06 of the range, 2.00 times as fast\n"
    for wrong in (1e-3, float("nan")):
        with pytest.raises(SystemExit, match="x: expected a difference of at most 1e-05"):
            _measure.report("x", wrong, 1e-5)


def test_examples_are_short_and_documented() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for name in NAMES:
        assert f"`{name}.py`" in readme
        text = (EXAMPLES / f"{name}.py").read_text()
        assert text.startswith('"""') and f"python examples/{name}.py" in text
