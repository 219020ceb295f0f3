#!/usr/bin/env bash
# Install megatron-itt into an NGC PyTorch image: the versions of requirements/constraints.txt, but the image's own torch,
# which its TransformerEngine and apex are built for. Called by Dockerfile and apptainer.def.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PIP_CONSTRAINT # the image's own list has older versions than this package needs

installed() { python3 -c 'import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))' "$1"; }

torch=$(installed torch) || {
    echo "install: this image has no torch; start from nvcr.io/nvidia/pytorch, or build the target cpu" >&2
    exit 1
}
constraints=$(mktemp)
grep -vE '^(torch|triton)==' requirements/constraints.txt >"$constraints"
echo "torch==$torch" >>"$constraints"
python3 -m pip install --no-cache-dir --no-input -c "$constraints" ".[data,eval,analysis]"
rm -f "$constraints"
[ "$(installed torch)" = "$torch" ] || {
    echo "install: pip replaced torch $torch by $(installed torch), which the image's TransformerEngine does not fit" >&2
    exit 1
}
itt --version
