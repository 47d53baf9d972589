#!/usr/bin/env bash
# Install the locked distributions, and no other, into a new virtual environment: for the CPU image.
#
#   install_locked.sh DIR
set -euo pipefail

venv=$1
locks=$(cd "$(dirname "$0")" && pwd)
here=$(cd "$locks/../install" && pwd)
# shellcheck source=deploy/install/cpu.sh
. "$here/cpu.sh"

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
python3 -m venv "$temporary/tools"
"$temporary/tools/bin/pip" install --quiet --no-cache-dir --require-hashes --requirement "$locks/uv.lock"
uv=$temporary/tools/bin/uv
"$uv" venv --quiet --python python3 "$venv"
uv_install() { "$uv" pip install --quiet --no-cache --no-deps --compile-bytecode --python "$venv/bin/python" "$@"; }

uv_install "${cpu_arguments[@]}" --require-hashes --requirement "$locks/cpu.lock"
write_vllm_name "$venv/bin/python" "$temporary/vllm"
uv_install --no-build-isolation "$temporary/vllm"
