#!/usr/bin/env bash
# Everything that wants a GPU, by one command that takes about ten minutes on one H200: builds the CUDA library for
# this GPU, runs tests/cuda, and measures the kernels and a training step of a 1.3 B gpt against their peers.
#
#   benchmarks/gpu.sh [--out FILE] [--python PYTHON] [--device cpu --quick]
#
# Writes benchmarks/results/gpu-DATE-NAME.md. A part that fails is named there, and in the exit code; the others run.
# `--device cpu --quick` is a rehearsal on tiny shapes that needs no GPU: it builds nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda
quick=()
out=
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
while (($#)); do
    case $1 in
        --device) device=$2; shift 2 ;;
        --quick) quick=(--quick); shift ;;
        --out) out=$2; shift 2 ;;
        --python) python=$2; shift 2 ;;
        *) echo "gpu.sh: unknown argument $1: --device, --quick, --out or --python" >&2; exit 2 ;;
    esac
done

name=rehearsal
if [[ $device == cuda ]]; then
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || {
        echo "gpu.sh: torch sees no GPU here; a rehearsal is --device cpu --quick" >&2
        exit 2
    }
    name=${name// /-}
fi
: "${out:=benchmarks/results/gpu-$(date +%F)-$name.md}"

parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
failed=()

# part NAME SECONDS COMMAND...: its output is shown and kept; the next part runs whatever became of it.
part() {
    local title=$1 seconds=$2
    shift 2
    echo "== $title"
    if ! timeout "$seconds" "$@" 2>&1 | tee "$parts/$title.log"; then
        failed+=("$title")
    fi
}

if [[ $device == cuda ]]; then
    capability=$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')
    [[ $capability == sm_90 ]] && capability=sm_90a
    part build 240 env ELLE_MP_BUILD_CUDA=1 ELLE_MP_CUDA_TARGETS="$capability" \
        "$python" setup.py -q build_ext --inplace
fi
part tests 180 "$python" -m pytest -n0 -q tests/cuda/test_on_gpu.py
part kernels 270 "$python" benchmarks/gpu.py --device "$device" "${quick[@]}" --markdown "$parts/kernels.md"
step=(--family gpt --layers 24 --heads 16 --head-dim 128 --length 2048 --batch 8 --vocab 50304 --steps 5 --dropout 0.1)
((${#quick[@]})) && step=(--family gpt --layers 1 --heads 2 --head-dim 8 --length 16 --batch 2 --vocab 64 --steps 1 --dropout 0)
part step 180 "$python" benchmarks/step.py "${step[@]}" --markdown "$parts/step.md"

{
    echo "# benchmarks/gpu.sh on $name, $(date +%F)"
    echo
    echo "- commit: $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    if [[ $device == cuda ]]; then
        echo "- driver: $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)"
        echo "- nvcc: $(nvcc --version 2>/dev/null | grep -o 'release [0-9.]*' || echo unknown)"
    fi
    echo "- tests: $(tail -n 1 "$parts/tests.log" 2>/dev/null)"
    echo "- failed parts: ${failed[*]:-none}"
    for title in kernels step; do
        [[ -f "$parts/$title.md" ]] && { echo; sed 's/^#/##/' "$parts/$title.md"; }
    done
    true
} >"$parts/result.md"
mkdir -p "$(dirname "$out")"
mv "$parts/result.md" "$out.tmp"
mv "$out.tmp" "$out"
echo "written: $out"
((${#failed[@]} == 0))
