"""``python -m benchmarks``: the engines of ``fastdiff bench | verify | info`` without typer and rich."""
