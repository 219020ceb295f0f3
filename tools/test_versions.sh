#!/usr/bin/env bash
# Test under the other tested megatron-core: a second environment, the tests that depend on versions, and checkpoints of
# each version read in the other. megatron-core 0.17 and newer need Python 3.12, so the two go together.
#
#   bash tools/test_versions.sh                      OTHER_PYTHON=python3.13 bash tools/test_versions.sh
#   bash tools/test_versions.sh --install            set up the environment only
#
# OTHER_PYTHON     default: Python 3.12 or 3.13 if .venv has an older one, else 3.11 or 3.10, on the PATH or in pyenv
# OTHER_VENV_ROOT  where the second environment, .venv-X.Y, is kept and brought up to date by each call (default: here)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Layer, layouts, checkpoints, resume, export, a short training.
TESTS=(
    tests/unit/config/test_versions.py
    tests/unit/parallel
    tests/unit/model/test_backends.py
    tests/unit/model/test_builder.py
    tests/unit/model/test_plain_layer.py
    tests/unit/model/test_recompute.py
    tests/unit/model/test_thinking_layer.py
    tests/unit/checkpoint/test_layout.py
    tests/unit/checkpoint/test_safe_read.py
    tests/unit/training/test_checkpointing.py
    tests/unit/training/test_optimizer.py
    tests/unit/training/test_optimizer_state.py
    tests/unit/hf/test_export.py
    tests/distributed/test_layouts.py
    tests/distributed/test_save_load.py
    tests/distributed/test_transformer_engine.py
    tests/integration/test_other_version.py
    tests/integration/test_training_run.py::test_every_kind_trains_with_the_same_command
    tests/integration/test_training_run.py::test_an_interrupted_run_continues_bit_for_bit
)

minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_other() { # VERSION...: print the first interpreter of these versions
    local version candidate
    for version in "$@"; do
        for candidate in "$(command -v "python$version")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
            if [ "$(minor_of "$candidate")" = "$version" ]; then
                echo "$candidate"
                return
            fi
        done
    done
    return 1
}

case $(minor_of .venv/bin/python) in
3.10 | 3.11) others=(3.12 3.13) ;;
*) others=(3.11 3.10) ;;
esac
python=${OTHER_PYTHON:-$(find_other "${others[@]}")} || {
    echo "test-versions: not run, because there is no Python ${others[0]} or ${others[1]} here; set OTHER_PYTHON to one"
    exit 0
}
version=$(minor_of "$python") || {
    echo "test-versions: OTHER_PYTHON is $python, which does not run; name a Python interpreter" >&2
    exit 2
}
venv=${OTHER_VENV_ROOT:-.}/.venv-$version
mkdir -p "${OTHER_VENV_ROOT:-.}"
PYTHON=$python VENV=$venv EXTRAS=data,dev bash tools/install.sh
[ "${1:-}" != --install ] || exit 0
"$venv/bin/python" -c "from importlib.metadata import version as v; import platform
print('test-versions: Python', platform.python_version(), 'with megatron-core', v('megatron-core'))"
exec "$venv/bin/python" -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile \
    --other-python "$PWD/.venv/bin/python" -o cache_dir=.pytest_cache/other "${TESTS[@]}" "$@"
