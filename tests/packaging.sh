#!/usr/bin/env bash
# Installs the ways users do: without a C++ compiler, from an sdist, from a wheel. Argument: a scratch folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$1

echo "-- no compiler: pure Python, one notice"
mkdir -p "$work/bin" "$work/pure"
python=$(command -v python)
env -u CXX -u CC PATH="$work/bin" "$python" -m pip install -v --no-deps --target "$work/pure" "$root" >"$work/pure.log" 2>&1 ||
  { cat "$work/pure.log"; exit 1; }
[ "$(grep -c 'Installing WITHOUT native kernels' "$work/pure.log")" -ge 1 ] || { echo "no notice was given"; exit 1; }
[ -z "$(find "$work/pure" -name '*.so')" ] || { echo "a native extension without a compiler?"; exit 1; }
(cd "$work" && PYTHONPATH="$work/pure" python -W ignore - <<'PY'
import torch, fastdiff
assert fastdiff.__file__.split("/")[-3] == "pure", fastdiff.__file__
assert not fastdiff.build_info()["native"]
x = torch.randn(2, 3, 8)
torch.testing.assert_close(fastdiff.ops.gate_residual(x, x, torch.ones(8)), 2 * x)
PY
)

echo "-- sdist, and a wheel built from it"
FASTDIFF_CUDA=OFF python -m build --outdir "$work/dist" "$root" >"$work/dist.log" 2>&1 || { cat "$work/dist.log"; exit 1; }
ls "$work/dist"
unzip -l "$work"/dist/*.whl | grep -E 'emu|tests/|csrc/' && { echo "the wheel carries what only tests need"; exit 1; }

echo "-- the wheel in a clean environment"
python3 -m venv "$work/clean"
"$work/clean/bin/pip" install -q torch==2.13.0
"$work/clean/bin/pip" install -q "$work"/dist/*.whl
(cd "$work" && "$work/clean/bin/fastdiff" info && "$work/clean/bin/python" - <<'PY'
import torch, fastdiff
x = torch.randn(2, 3, 8)
with fastdiff.use_backend("native"):
    torch.testing.assert_close(fastdiff.ops.gate_residual(x, x, torch.ones(8)), 2 * x)
PY
)
echo "packaging: all passed"
