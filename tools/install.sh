#!/usr/bin/env bash
# Set up a virtual environment with everything that training, evaluation and the tests need. Called by the Makefile; safe
# to run again at any time, also after an interruption: what is installed already is kept.
#
#   bash tools/install.sh                 PYTHON=python3.12 VENV=.venv EXTRAS=data,eval,analysis,docs,dev bash tools/install.sh
#
# The constraints choose megatron-core by Python's version: 0.19 on 3.12 and newer, 0.16 on 3.10 and 3.11.
# torch goes first and exactly pinned, because what depends on it would otherwise take the newest one. Without an NVIDIA
# GPU the CPU build is preferred, if its index answers; otherwise pip's configured indexes decide. transformer-engine
# and apex are never installed here (see `itt doctor` for what their absence costs).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
extras=${EXTRAS:-data,eval,analysis,docs,dev}
log=$venv/install.log
constraints=requirements/constraints.txt
cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "install: $*" >&2
    exit 1
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 to 3.13 found (tried ${PYTHON:-python3} and python3.10 to 3.13); set PYTHON=/path/to/python"
}

run_pip() { # run_pip WHAT ARGUMENT...: install quietly into the log; on failure show its end
    local what=$1
    shift
    echo "install: $what"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        fail "pip could not install $what (full log: $log); run the same command again to continue"
    fi
}

answers_within_5_s() {
    "$venv/bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1/" >/dev/null 2>&1
}

make_venv() {
    if is_supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python)
    echo "install: $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        fail "$python cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"
}

install_torch() {
    local pin index=()
    pin=$(grep -E '^torch==' "$constraints")
    if "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${pin#torch==}')" \
        2>/dev/null; then
        return
    fi
    if ! command -v nvidia-smi >/dev/null 2>&1 && answers_within_5_s "$cpu_index"; then
        index=(--extra-index-url "$cpu_index")
    fi
    run_pip "$pin (0.2 to 3 GB; minutes)" -c "$constraints" "$pin" ${index[@]+"${index[@]}"}
}

make_venv
rm -f "$venv/.installed"
: >"$log"
install_torch
run_pip "megatron-itt with extras ${extras//,/, } (about 1.5 GB; minutes)" -c "$constraints" -e ".[$extras]"
touch "$venv/.installed"
echo "install: done"
