#!/usr/bin/env bash
# Everything that a GPU can tell about fastdiff, in one command and under nine minutes: build, info, verify, tests and
# compute-sanitizer side by side, then with the card to itself benchmarks, images per second of DiT-XL/2, and how the
# targets of targets.py stand. A step that fails or runs out of time is reported, and the others still run; the exit code
# is 1 if any step failed.
#
#   benchmarks/run_gpu.sh                         writes benchmarks/results/DATE-gpu.{md,json,log}, DATE-gpu-*.json
#   OUT=/tmp/results benchmarks/run_gpu.sh        writes there
#   FASTDIFF_GPU_SECONDS=1500 benchmarks/run_gpu.sh   with time for every row, or on a slow machine
#   FASTDIFF_GPU_DRYRUN=1 benchmarks/run_gpu.sh   every step on the CPU and without the sanitizer, to test this script
#
# Needs torch, numpy, pip, setuptools, cmake, ninja, pybind11, a C++ compiler and nvcc; pytest, hypothesis and
# expecttest for the tests. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
dry=${FASTDIFF_GPU_DRYRUN:-}
out=${OUT:-benchmarks/results}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} PYTHONUNBUFFERED=1
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
if [ -n "$dry" ]; then device=cpu kind=dryrun cuda=OFF; else device=cuda kind=gpu cuda=ON; fi
base=$out/$(date -u +%Y-%m-%d-%H%M%S)-$kind
log=$base.log
started=$SECONDS
limit=${FASTDIFF_GPU_SECONDS:-505} # for everything
steps=()
failed=0

say() { printf '%s\n' "$*" | tee -a "$log"; }

# room N: the seconds that are left, at most N; in proportion where more than the usual time is given.
room() {
  local left=$((limit - (SECONDS - started))) most=$((limit > 540 ? $1 * limit / 505 : $1))
  echo $((left < most ? left : most))
}

skip() { # NAME WHY
  say "== $1: skipped: $2"
  steps+=("- $1: skipped, $2")
}

# step NAME SECONDS COMMAND...: run it within that time, log what it prints, remember how it went.
step() {
  local name=$1 seconds code began=$SECONDS
  seconds=$(room "$2")
  shift 2
  if [ "$seconds" -lt 5 ]; then
    skip "$name" "**no time left**"
    failed=1
    return 1
  fi
  say "== $name (at most $seconds s): $*"
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 0 ]; then
    steps+=("- $name: ok, $((SECONDS - began)) s")
  elif [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    steps+=("- $name: **stopped after $seconds s**") failed=1
  else
    steps+=("- $name: **failed**, exit code $code") failed=1
  fi
  return "$code"
}

# started NAME SECONDS COMMAND...: the same beside others where there are cores for it; `finish` waits for them all.
jobs=()
started() {
  if [ -n "$dry" ] || [ "$(nproc)" -lt 8 ]; then
    step "$@"
    return
  fi
  local name=$1 seconds job=$work/job-${#jobs[@]}
  seconds=$(room "$2")
  shift 2
  if [ "$seconds" -lt 5 ]; then
    skip "$name" "**no time left**"
    failed=1
    return
  fi
  say "== $name (at most $seconds s, beside others): $*"
  (
    timeout --kill-after=5 "$seconds" "$@" >"$job.out" 2>&1
    echo "$? $SECONDS" >"$job.code"
  ) &
  jobs+=("$!|$job|$name|$seconds|$SECONDS")
}
finish() {
  local entry pid job name seconds began code ended
  for entry in "${jobs[@]}"; do
    IFS='|' read -r pid job name seconds began <<<"$entry"
    wait "$pid"
    code=1 ended=$SECONDS
    [ -f "$job.code" ] && read -r code ended <"$job.code"
    say "== $name: what it printed"
    tail -n 400 "$job.out" | tee -a "$log"
    if [ "$code" -eq 0 ]; then
      steps+=("- $name: ok, $((ended - began)) s, beside others")
    elif [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
      steps+=("- $name: **stopped after $seconds s**") failed=1
    else
      steps+=("- $name: **failed**, exit code $code") failed=1
    fi
  done
  jobs=()
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }

# Installed into a folder of its own, with the benchmarks and tests beside it: nothing of the user's changes, and
# Python finds the package that was built, not the checkout.
work=$(mktemp -d)
trap 'jobs -p | xargs -r kill 2>/dev/null; rm -rf "$work"' EXIT
cp -r benchmarks tests pyproject.toml "$work"
if ! step build 200 env FASTDIFF_CUDA=$cuda "$python" -m pip install --no-build-isolation --no-deps --quiet \
  --target "$work" .; then
  say "falling back on the fastdiff package of the checkout"
  cp -r fastdiff "$work"
fi
cd "$work" || exit 1

if [ -n "$dry" ]; then
  skip nvidia-smi "dry run"
elif command -v nvidia-smi >/dev/null; then
  step nvidia-smi 10 nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem --format=csv
else
  skip nvidia-smi "not found"
fi
step info 40 "$python" -m benchmarks info
step verify 70 "$python" -m benchmarks verify --device $device --draws 24
attention=(--op attention --op attention_qkvpacked)
spectrum=(--op spectral_features --op radial_spectrum)
if [ -n "$dry" ]; then
  skip verify-sm90 "dry run"
  skip verify-sm90-spectrum "dry run"
else # attention on wgmma and images by clusters only where asked for; on another GPU: the usual kernels once more
  step verify-sm90 30 env FASTDIFF_SM90=1 "$python" -m benchmarks verify --device $device "${attention[@]}" \
    --dtype float16 --dtype bfloat16
  step verify-sm90-spectrum 20 env FASTDIFF_SM90=1 "$python" -m benchmarks verify --device $device "${spectrum[@]}"
fi

if [ ! -f tests/test_ops.py ]; then
  skip tests "tests/test_ops.py is not here"
elif ! has pytest hypothesis expecttest; then
  skip tests "pytest, hypothesis or expecttest is not installed"
else
  pytest=(env FASTDIFF_TEST_DEVICE=$device "$python" -m pytest -q -p no:cacheprovider --maxfail 10)
  started tests 120 "${pytest[@]}" tests/test_cuda_graph.py tests/test_ops.py \
    tests/test_linear.py::test_the_epilogue_of_this_gpu
  # torch.compile does not trace everything where a default device is set; test_ops compiles every operator. One test
  # reads csrc, which is not here.
  started tests-families 100 "${pytest[@]}" -k "not compiled and not script_writes" tests/test_attention.py tests/test_causal_conv1d.py \
    tests/test_gaussian.py tests/test_philox.py tests/test_selective_scan.py tests/test_spectrum.py
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
if [ -n "$dry" ]; then
  skip compute-sanitizer "dry run"
elif [ -z "$sanitizer" ]; then
  skip compute-sanitizer "not found"
else
  for tool in memcheck racecheck initcheck; do
    # Only our kernels are watched; initcheck must see everybody's writes.
    ours=(--kernel-name kernel_substring=fastdiff)
    [ $tool = initcheck ] && ours=()
    # Without torch's caching allocator every tensor is an allocation of its own: an access past its end shows.
    started "compute-sanitizer $tool" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool "${ours[@]}" \
      --error-exitcode 9 "$python" -m benchmarks verify --device cuda --dtype bfloat16 --draws 3
  done
fi
finish

# --budget: rows that would start later are left out and named, so that what was measured is kept.
speed() { # NAME SECONDS FILE OPTIONS...
  local name=$1 most=$2 seconds file=$3
  seconds=$(room "$most")
  shift 3
  records+=("$file.json")
  step "$name" "$most" "$python" -m benchmarks bench --device $device --seconds 0.2 \
    --budget $((seconds > 60 ? seconds - 40 : seconds / 3)) --json "$file.json" --markdown "$work/$name.md" "$@"
}
records=()
adaln=(--op adaln_modulate --op gate_residual --op gate_residual_adaln)
if [ -n "$dry" ]; then
  quick=(--shape overhead --shape 16,1152 --shape 1,4,64) tiny=(--width 32 --depth 2 --heads 2 --input-size 8 --steps 2 --batch 1)
  targets=("${quick[@]}")
else
  quick=() tiny=()
  mapfile -t targets < <("$python" -m benchmarks.targets --shapes | sed 's/^/--shape=/')
fi
# What the targets are about comes first: the time may not last for everything.
step graph 40 "$python" -m benchmarks.graph_time --device $device --json "$base-graph.json" --markdown "$work/graph.md"
records+=("$base-graph.json")
speed bench-targets 75 "$base-targets" --dtype bfloat16 --no-compile --shape overhead "${targets[@]}"
speed bench-adaln 75 "$base-adaln" --dtype bfloat16 "${adaln[@]}" --op adaln_attention "${quick[@]}"
step dit 55 "$python" -m benchmarks.dit_throughput --device $device --budget 40 --no-compile \
  --json "$base-dit.json" --markdown "$work/dit.md" "${tiny[@]}"
# With torch.compile apart: compiling 28 blocks takes a while, and what is stopped here must not cost the above.
step dit-compile 75 "$python" -m benchmarks.dit_throughput --device $device --budget 40 --batch 1 --batch 8 \
  --json "$base-dit-compile.json" --markdown "$work/dit-compile.md" "${tiny[@]}"
records+=("$base-dit.json" "$base-dit-compile.json")
if [ -n "$dry" ]; then
  skip bench-sm90 "dry run"
  skip bench-sm90-spectrum "dry run"
else
  FASTDIFF_SM90=1 speed bench-sm90 40 "$base-sm90" --dtype bfloat16 "${attention[@]}" --no-compile
  FASTDIFF_SM90=1 speed bench-sm90-spectrum 40 "$base-sm90-spectrum" --dtype float32 "${spectrum[@]}" --no-compile \
    --shape 256,256 --shape 512,512
  unset "records[-1]" "records[-1]" # the targets are about what is used unasked
  speed bench-tables 40 "$base-tables" --dtype bfloat16 --backward "${adaln[@]}" --shape "per token"
fi
speed bench-backward 60 "$base-backward" --dtype bfloat16 --dtype float32 --backward --no-compile "${quick[@]}"
speed bench 150 "$base" --dtype bfloat16 --dtype float32 "${quick[@]}"
limit=$((limit + 15))
step targets 15 "$python" -m benchmarks.targets "${records[@]}" --markdown "$work/targets.md"

{
  echo "# fastdiff on $device, $(date -u +%Y-%m-%d)"
  echo
  printf '%s\n' "${steps[@]}"
  for page in targets dit dit-compile graph bench-targets bench-adaln bench-sm90 bench-sm90-spectrum bench-tables bench bench-backward; do
    [ -f "$work/$page.md" ] && echo && sed 's/^# /## /' "$work/$page.md"
  done
} >"$base.md"
say "== $((SECONDS - started)) s; written: $base.md"
printf '%s\n' "${steps[@]}"
exit $failed
