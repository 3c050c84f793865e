#!/bin/sh
# The emulator tests with kernels, bindings and emulator built under AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs g++ (or CXX), its sanitizer runtimes, and what tests/test_emulator.py needs. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/../.."
runtime() { ${CXX:-g++} -print-file-name="$1"; }
export FASTDIFF_EMU_SANITIZE=address,undefined
# Python itself is not instrumented: the runtimes come first by hand, and what Python leaves behind is not a leak of ours.
export LD_PRELOAD="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
exec "${PYTHON:-python3}" -m pytest tests/test_emulator.py tests/test_emulated_*.py "$@"
