"""The command line: ``fastdiff info | verify | certify | bench | demo | analyze``.

Importing this package needs neither typer nor rich, so the engines behind the commands also serve ``python -m
benchmarks`` where those are not installed.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``fastdiff`` program."""
    _passive_threads()
    try:
        from fastdiff.cli._app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"fastdiff: the command line needs {error.name}: pip install typer rich")
    app()


def _passive_threads() -> None:
    """Let waiting OpenMP threads sleep: beside a busy neighbour, spinning ones make the same work ten times slower.

    libgomp reads the variable when it is loaded, and it comes with torch. If torch is here already, only a fresh
    process can have it; `orig_argv` is the command line as it was typed, interpreter options included.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    if "torch" in sys.modules:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
