#!/usr/bin/env bash
# Runs the tests of the ops on libraries built with AddressSanitizer and UndefinedBehaviorSanitizer: a read or write
# beside a buffer ends the run. Works on a copy under build/, so that what is installed stays what it is.
#   csrc/sanitize.sh [pytest arguments]        (make sanitize)
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
copy=build/sanitized
asan=$(gcc -print-file-name=libasan.so)
ubsan=$(gcc -print-file-name=libubsan.so)
# Without the library gcc prints the bare name.
if [ ! -e "$asan" ] || [ ! -e "$ubsan" ]; then
  echo "sanitize: this compiler has no sanitizers; nothing was tested"
  exit 0
fi
mkdir -p "$copy"
# Objects of an earlier run are used again where their sources have not changed.
tar cf - --exclude='*.so' --exclude='__pycache__' elle_mp tests csrc setup.py pyproject.toml README.md | tar xf - -C "$copy"
cd "$copy"
echo "sanitize: building"
ELLE_MP_SANITIZE=1 ELLE_MP_BUILD_CUDA=0 "$python" setup.py --quiet build_ext --inplace
for library in elle_mp/_ops.so elle_mp/_helpers*.so; do
  if ! grep -q __asan_report "$library"; then
    echo "sanitize: $library is not built with AddressSanitizer" >&2
    exit 1
  fi
done
export LD_PRELOAD="$asan $ubsan"
# Python and torch keep what they have allocated. pytest would swallow the report.
export ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:log_path=$PWD/report"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$PWD/report"
export PYTHONMALLOC=malloc
rm -f report.*
if ! "$python" -m pytest -q -n0 -p no:cacheprovider -m "not distributed" tests/ops "$@"; then
  unset LD_PRELOAD
  cat report.* >&2 2>/dev/null || true
  exit 1
fi
