"""``fastdiff certify``: does every sampler keep its promises? The work is in `_certify_engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def certify(
    solver: Annotated[list[str] | None, typer.Option(help="Only this solver; may be repeated.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three schedules, two prediction types, few step counts.")
    ] = False,
    diffusers: Annotated[
        bool, typer.Option("--diffusers/--no-diffusers", help="Measure diffusers' schedulers too, if installed.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for certificate.json, certificate.md and certificate.png.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes (default: one for each core).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only, on standard output.")] = False,
) -> None:
    """Hold every sampler to its promises, against distributions whose exact paths are known.

    Every solver, on every schedule, with every prediction type and dtype: its order there and back, NaN at any number
    of steps, float timesteps, and agreement of kernels and reference. Exits with 1 if a promise is broken.
    """
    from rich.console import Console

    from fastdiff.cli import _certify_engine as engine
    from fastdiff.cli import _certify_report as report
    from fastdiff.cli._show import progress_bar, show
    from fastdiff.cli._table import check_folder, to_json, write_text

    try:
        if out:
            check_folder(out)
        with progress_bar("certify") as bar:
            record = engine.certify(solvers=solver or (), quick=quick, diffusers=diffusers, jobs=jobs, progress=bar)
        if out:
            report.plot(record, out / "certificate.png")
            write_text(out / "certificate.md", report.markdown(record))
            write_text(out / "certificate.json", to_json(record) + "\n")
    except (engine.CertifyError, ImportError, OSError) as error:
        if as_json:
            typer.echo(to_json({"ok": False, "error": str(error)}))
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(to_json(record))
    else:
        if record["promises"]:
            show(report.table(record), Console())
        if record["adaptive"]:
            typer.echo()
            show(report.adaptive_table(record), Console())
        if record["diffusers"]:
            typer.echo()
            show(report.peer_table(record), Console())
        for line in record["broken"]:
            typer.echo(f"BROKEN {line}")
        for line in [*report.notes(record), record["summary"]]:
            typer.echo(line)
    if not record["ok"]:
        raise typer.Exit(1)
