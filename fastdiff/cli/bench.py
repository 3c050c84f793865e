"""``fastdiff bench``: how fast is every kernel here, beside PyTorch and its peers? The work is in `_bench_engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; may be repeated.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Only shapes whose name contains this; may be repeated. `overhead` is a tiny call."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, float16 or bfloat16; may be repeated (default: float32, bfloat16)."),
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward together.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.0, help="Of timing per row, all contestants together.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's choice).")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Race against torch.compile too.")] = True,
    buffers: Annotated[
        int | None,
        typer.Option(min=1, help="Copies of the inputs to rotate over (default: up to 64 MiB).", show_default=False),
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0.0, help="Leave out rows that would start after so many seconds.", show_default=False)
    ] = float("inf"),
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH|-", help="Write the whole record; - prints it, and only it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Write a PNG bar chart of the ratios.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the table as a Markdown page.")] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Time against size instead (float32 unless --dtype), no baselines.")
    ] = False,
    list_only: Annotated[bool, typer.Option("--list", help="List operators, shapes and baselines, and exit.")] = False,
) -> None:
    """Measure every kernel against PyTorch eager, torch.compile and peer libraries, interleaved in one run.

    Each row is checked against the float64 reference first. Exits with 1 if one is wrong; being slower is no failure,
    and is printed like the rest.
    """
    import torch
    from rich.console import Console

    from fastdiff.cli import _bench_engine as engine
    from fastdiff.cli import _bench_report as report
    from fastdiff.cli import _scaling
    from fastdiff.cli._show import progress_bar, show
    from fastdiff.cli._table import to_json, write_text

    quiet = json_path == "-"
    if list_only:
        if quiet:
            typer.echo(to_json(engine.list_shapes()))
        else:
            show(engine.listing(), Console())
        return
    if threads:
        torch.set_num_threads(threads)
    try:
        with progress_bar("bench") as progress:
            if scaling:
                _scaling.refuse_what_it_ignores(device=device, shapes=shape or (), backward=backward, budget=budget)
                record = _scaling.scaling(ops=op or (), dtypes=dtype or (), seconds=seconds, progress=progress)
            else:
                record = engine.bench(
                    ops=op or (),
                    shapes=shape or (),
                    dtypes=dtype or (),
                    backward=backward,
                    device=device,
                    seconds=seconds,
                    compiled=compiled,
                    buffers=buffers,
                    budget=budget,
                    progress=progress,
                )
        if plot:
            (_scaling if scaling else report).plot(record, plot)
        if markdown:
            write_text(markdown, (_scaling if scaling else report).markdown(record))
        if json_path and not quiet:
            write_text(json_path, to_json(record) + "\n")
    except (engine.BenchError, ImportError, OSError, ValueError) as error:
        if quiet:
            typer.echo(to_json({"ok": False, "error": str(error)}))
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if quiet:
        typer.echo(to_json(record))
    elif scaling:
        show(_scaling.table(record), Console())
        typer.echo(record["summary"])
    else:
        show(report.table(record), Console())
        for line in [*report.notes(record), record["summary"]]:
            typer.echo(line)
    if not record["ok"]:
        raise typer.Exit(1)
