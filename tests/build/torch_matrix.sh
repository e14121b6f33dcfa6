#!/usr/bin/env bash
# Installs one wheel beside several releases of torch, one after the other, and runs attention under each.
#     bash tests/build/torch_matrix.sh PYTHON WHEEL [TORCH_VERSION ...]
# A version with +cpu comes from the CPU-only index of download.pytorch.org unless pip finds it elsewhere; each
# environment is removed after its turn, since a CUDA build of torch takes several GB.
set -euo pipefail

python=$1
wheel=$2
shift 2
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(2.10.0 2.11.0 2.13.0 2.14.0)
check=$(cd "$(dirname "$0")" && pwd)/torch_check.py
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

for version in "${versions[@]}"; do
  echo "== torch $version"
  rm -rf "$folder/venv"
  "$python" -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --no-cache-dir "torch==$version" numpy
  "$folder/venv/bin/pip" install --quiet --no-cache-dir --no-deps "$wheel"
  # from an empty folder, so that the wheel is imported and not the clone
  (cd "$folder" && venv/bin/python "$check") || failed=$((failed + 1))
done
echo "== ${#versions[@]} releases of torch, $failed failed"
[ "$failed" -eq 0 ]
