#!/usr/bin/env bash
# TransformerEngine's real Python layers on a machine without a GPU: construct the model, the data-parallel wrapper and the
# optimizer, save and load their states, and write what was found to docs/results/transformer_engine.md.
#
#   bash tools/te_on_cpu.sh PYTHON [TE_VERSION:MEGATRON_CORE_VERSION]...        default: 2.11.0:0.16.1 2.20.2:0.19.2
#
# PYTHON belongs to an environment of 3.12 or newer whose torch is a build for CUDA 13, such as the one of `make
# test-versions`: TransformerEngine's library needs that build's libraries, and megatron-core 0.19 that Python. Other
# packages go to build/te (0.5 GB a version); the environment stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:?"usage: bash tools/te_on_cpu.sh PYTHON [TE_VERSION:MEGATRON_CORE_VERSION]..."}
shift
[ $# -gt 0 ] || set -- 2.11.0:0.16.1 2.20.2:0.19.2
result=docs/results/transformer_engine.md

install_into() { # FOLDER PACKAGE...: packages alone, without what they depend on
    local folder=$1
    shift
    [ -f "$folder/complete" ] && return
    "$python" -m pip install --quiet --no-deps --target "$folder" "$@"
    touch "$folder/complete"
}

"$python" -c 'import sys, torch; sys.exit(0 if (torch.version.cuda or "").startswith("13") else
    f"te_on_cpu: torch of {sys.executable} is built for CUDA {torch.version.cuda}; name a Python whose torch is built for 13")'
install_into build/te/common einops importlib-metadata ml-dtypes nvdlfw-inspect onnx onnx-ir onnxscript zipp
sections=''
for pair in "$@"; do
    engine=${pair%%:*} core=${pair##*:}
    install_into "build/te/engine-$engine" "transformer-engine==$engine" "transformer-engine-cu13==$engine"
    install_into "build/te/core-$core" "megatron-core==$core"
    sections+=$(PYTHONPATH=.:build/te/engine-$engine:build/te/core-$core:build/te/common \
        "$python" -W ignore tests/te_on_cpu.py)$'\n\n'
done
{
    echo '# TransformerEngine without a GPU'
    echo
    echo "TransformerEngine's Python layers over a binding to CUDA that computes nothing: everything is constructed, saved and"
    echo 'loaded, nothing is computed. A model of the 162m width with two layers, in bf16, on one process.'
    echo
    echo '    bash tools/te_on_cpu.sh PYTHON'
    echo
    printf %s "${sections%$'\n\n'}"
    echo
} >"$result"
echo "te_on_cpu: wrote $result"
