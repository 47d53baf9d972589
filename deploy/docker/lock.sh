#!/usr/bin/env bash
# Write what the CPU image installs: every distribution that vLLM's CPU build and this project need, pinned and hashed.
# For Linux on x86_64 and Debian's Python 3.11. Run it when pyproject.toml or deploy/install/cpu-requirements.txt changes.
#
#   deploy/docker/lock.sh           write the locks with the newest versions that fit
#   deploy/docker/lock.sh --check   fail if the locks do not have what those files ask for
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/deploy/install
locks=$root/deploy/docker
uv=${UV:-$root/.venv/bin/uv}
# shellcheck source=deploy/install/cpu.sh
. "$here/cpu.sh"

# Without --upgrade, versions that are in the output file are kept as long as they fit.
compile() {
    "$uv" pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 "$@"
}

if [ "${1:-}" = --check ]; then
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    cp "$locks/cpu.lock" "$temporary/"
    compile "${cpu_arguments[@]}" "$here/cpu-requirements.txt" "$root/pyproject.toml" --output-file "$temporary/cpu.lock"
    diff "$locks/cpu.lock" "$temporary/cpu.lock"
    exit
fi
compile --upgrade "${cpu_arguments[@]}" "$here/cpu-requirements.txt" "$root/pyproject.toml" --output-file "$locks/cpu.lock"
echo uv | compile --upgrade - --output-file "$locks/uv.lock"
