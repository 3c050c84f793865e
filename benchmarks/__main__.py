"""``python -m benchmarks [bench | verify | info]``: as the ``fastdiff`` program, with torch and numpy alone.

For machines where nothing can be installed. The engines and the tables are the same; only the looks are plainer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("bench", "verify", "info")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _prefer_built_package()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch brings libgomp, which reads it once
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in (*COMMANDS, "-h", "--help"):
        given.insert(0, "bench")
    options = _parser().parse_args(given)
    return {"bench": _bench, "verify": _verify, "info": _info}[options.command](options)


def _prefer_built_package() -> None:
    """Look into this checkout last where its own `fastdiff` has no extension: it would hide the one installed."""
    root = Path(__file__).resolve().parents[1]
    if not any((root / "fastdiff").glob("_C*")):
        sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != root), str(root)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="speed beside PyTorch and peers (the default)")
    verify = commands.add_parser("verify", help="every kernel against its float64 reference")
    info = commands.add_parser("info", help="what this build and machine are")
    for command in (bench, verify):
        command.add_argument("--op", action="append", default=[])
        command.add_argument("--dtype", action="append", default=[])
        command.add_argument("--threads", type=_positive)
    bench.add_argument("--shape", action="append", default=[])
    bench.add_argument("--device", default="cpu")
    bench.add_argument("--backward", action="store_true")
    bench.add_argument("--seconds", type=float, default=1.0)
    bench.add_argument("--buffers", type=int)
    bench.add_argument("--budget", type=float, default=float("inf"))
    bench.add_argument("--no-compile", dest="compiled", action="store_false")
    bench.add_argument("--scaling", action="store_true")
    bench.add_argument("--list", action="store_true")
    bench.add_argument("--json", metavar="PATH|-")
    bench.add_argument("--markdown", metavar="PATH")
    bench.add_argument("--plot", metavar="PATH")
    verify.add_argument("--device", action="append", default=[])
    verify.add_argument("--isa", action="append", default=[])
    verify.add_argument("--draws", type=int, default=48)
    verify.add_argument("--seed", type=int, default=0)
    verify.add_argument("--only-draw", type=int)
    for command in (verify, info):
        command.add_argument("--json", action="store_true")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected a number of at least 1")
    return number


def _bench(options: argparse.Namespace) -> int:
    from fastdiff.cli import _bench_engine as engine
    from fastdiff.cli import _bench_report as report
    from fastdiff.cli import _scaling
    from fastdiff.cli._table import to_json, write_text

    if options.list:
        print(to_json(engine.list_shapes()) if options.json == "-" else engine.listing().text())
        return 0
    shown = _scaling if options.scaling else report
    _set_threads(options.threads)
    try:
        if options.scaling:
            _scaling.refuse_what_it_ignores(
                device=options.device, shapes=options.shape, backward=options.backward, budget=options.budget
            )
            record = _scaling.scaling(ops=options.op, dtypes=options.dtype, seconds=options.seconds, progress=_progress)
        else:
            record = engine.bench(
                ops=options.op,
                shapes=options.shape,
                dtypes=options.dtype,
                backward=options.backward,
                device=options.device,
                seconds=options.seconds,
                compiled=options.compiled,
                buffers=options.buffers,
                budget=options.budget,
                progress=_progress,
            )
        if options.plot:
            shown.plot(record, options.plot)
        if options.markdown:
            write_text(options.markdown, shown.markdown(record))
        if options.json and options.json != "-":
            write_text(options.json, to_json(record) + "\n")
    except (engine.BenchError, ImportError, OSError, ValueError) as error:
        return _refuse(error, as_json=options.json == "-")
    if options.json == "-":
        print(to_json(record))
    else:
        notes = [] if options.scaling else report.notes(record)
        print("\n".join([shown.table(record).text(), *notes, record["summary"]]))
    return 0 if record["ok"] else 1


def _verify(options: argparse.Namespace) -> int:
    from fastdiff.cli import _verify_engine as engine
    from fastdiff.cli._table import to_json

    _set_threads(options.threads)
    try:
        record = engine.verify(
            ops=options.op,
            devices=options.device,
            dtypes=options.dtype,
            isas=options.isa,
            draws=options.draws,
            seed=options.seed,
            only_draw=options.only_draw,
            progress=_progress,
        )
    except engine.VerifyError as error:
        return _refuse(error, as_json=options.json)
    if options.json:
        print(to_json(record))
    else:
        skipped = [f"skipped {line}" for line in record["skipped"]]
        print("\n".join([engine.table(record).text(), *engine.failure_lines(record), *skipped, record["summary"]]))
    return 0 if record["ok"] else 1


def _info(options: argparse.Namespace) -> int:
    from fastdiff.cli._machine import info, info_table
    from fastdiff.cli._table import to_json

    found = info()
    print(to_json(found) if options.json else info_table(found).text())
    return 1 if found["problems"] else 0


def _refuse(error: Exception, *, as_json: bool) -> int:
    from fastdiff.cli._table import to_json

    if as_json:
        print(to_json({"ok": False, "error": str(error)}))
    else:
        print(f"error: {error}", file=sys.stderr)
    return 1


def _set_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _progress(done: int, total: int, label: str) -> None:
    """One line that is written over, on a terminal; silence elsewhere."""
    if sys.stderr.isatty():
        line = f"{done}/{total} {label}"[:100] if done < total else ""
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
