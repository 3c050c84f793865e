"""The typer application: every command of the ``fastdiff`` program, and the options that belong to no command."""

from __future__ import annotations

from typing import Annotated

import typer

from fastdiff.cli.analyze import analyze
from fastdiff.cli.bench import bench
from fastdiff.cli.certify import certify
from fastdiff.cli.demo import demo
from fastdiff.cli.info import info
from fastdiff.cli.verify import verify

app = typer.Typer(
    name="fastdiff",
    help="Fast, tested kernels for diffusion models: what this build can do, whether it is right, how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from fastdiff import __version__

        typer.echo(f"fastdiff {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _command in (info, verify, certify, bench, demo, analyze):
    app.command()(_command)
