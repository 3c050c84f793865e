"""``fastdiff verify``: is every kernel right on this machine? The work is in `_verify_engine`."""

from __future__ import annotations

from typing import Annotated

import typer


def verify(
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; may be repeated.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda or cuda:N; may be repeated (default: all there are).")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, float16 or bfloat16; may be repeated.")] = None,
    isa: Annotated[
        list[str] | None, typer.Option(help="Only this CPU instruction set, see `fastdiff info`; may be repeated.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Calls per operator, device, type and instruction set.")] = 48,
    seed: Annotated[int, typer.Option(help="The same seed draws the same calls.")] = 0,
    only_draw: Annotated[
        int | None, typer.Option(min=0, help="Only the draw of this number, to repeat a failure.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's choice).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only, on standard output.")] = False,
) -> None:
    """Check every kernel against its float64 reference: each operator, device, type and CPU instruction set.

    Outputs and gradients on random shapes, layouts and options must agree within a tolerance derived from the number
    formats, repeat bit for bit, and come from the native kernels. Exits with 1 on any failure.
    """
    import torch
    from rich.console import Console

    from fastdiff.cli import _verify_engine as engine
    from fastdiff.cli._show import progress_bar, show
    from fastdiff.cli._table import to_json

    if threads:
        torch.set_num_threads(threads)
    try:
        with progress_bar("verify") as report:
            record = engine.verify(
                ops=op or (),
                devices=device or (),
                dtypes=dtype or (),
                isas=isa or (),
                draws=draws,
                seed=seed,
                only_draw=only_draw,
                progress=report,
            )
    except engine.VerifyError as error:
        if as_json:
            typer.echo(to_json({"ok": False, "error": str(error)}))
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(to_json(record))
    else:
        show(engine.table(record), Console())
        for line in engine.failure_lines(record):
            typer.echo(line)
        for line in record["skipped"]:
            typer.echo(f"skipped {line}")
        typer.echo(record["summary"])
    if not record["ok"]:
        raise typer.Exit(1)
