"""``python -m fastdiff.cli``, the same as the ``fastdiff`` program."""

from fastdiff.cli import main

main()
