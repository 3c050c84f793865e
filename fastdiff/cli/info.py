"""``fastdiff info``: what this build is, what it found on this machine, and why it is not native where it is not."""

from __future__ import annotations

from typing import Annotated

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only, on standard output.")] = False,
) -> None:
    """Show version, CPU instruction sets, CUDA support, compiler, GPUs and OpenMP runtimes.

    Exits with 1 where something is wrong, such as two OpenMP runtimes in one process.
    """
    from fastdiff.cli._machine import info as collect
    from fastdiff.cli._machine import info_table
    from fastdiff.cli._table import to_json

    found = collect()
    if as_json:
        typer.echo(to_json(found))
    else:
        from rich.console import Console

        from fastdiff.cli._show import show

        show(info_table(found), Console())
    if found["problems"]:
        raise typer.Exit(1)
