#!/bin/sh
# The emulator tests with kernels, bindings and emulator built under AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs g++ (or CXX), its sanitizer runtimes, and what tests/test_emulator.py needs. Without arguments the files go to two
# processes, one file after the other, since the emulator uses one core; arguments go to one pytest for all files.
set -eu
cd "$(dirname "$0")/../.."
runtime() { ${CXX:-g++} -print-file-name="$1"; }
export FASTDIFF_EMU_SANITIZE=address,undefined
# Python itself is not instrumented: the runtimes come first by hand, and what Python leaves behind is not a leak of ours.
preload="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
python=${PYTHON:-python3}
if [ $# -gt 0 ]; then
  export LD_PRELOAD="$preload"
  exec "$python" -m pytest tests/test_emulator.py tests/test_emulated_*.py "$@"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 preload python work
# The longest first, so that the two end at about the same time. Whoever comes first builds, on all cores.
printf '%s\n' tests/test_emulated_ops.py tests/test_emulator.py tests/test_emulated_*.py | awk '!seen[$0]++' |
  xargs -P 2 -n 1 sh -c '
    name=$(basename "$0" .py)
    if LD_PRELOAD="$preload" "$python" -m pytest -p no:cacheprovider "$0" >"$work/$name" 2>&1; then code=0; else code=$?; fi
    { echo "-- $name"; cat "$work/$name"; } # in one piece
    [ $code -eq 0 ]'
