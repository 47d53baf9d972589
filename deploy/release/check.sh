#!/usr/bin/env bash
# Build the wheel and the source distribution into dist/, check them, install the wheel into a clean environment, and run the demo
# from it, with nothing of this checkout on the path.
#
#   deploy/release/check.sh            everything; minutes
#   deploy/release/check.sh build      build and check only
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
cd "$root"

rm -rf dist build
"$python" -m build --outdir dist .
"$python" -m twine check --strict dist/*

version=$("$python" -c 'import matgptq_vllm; print(matgptq_vllm.__version__)')
wheel=dist/matgptq_vllm-$version-py3-none-any.whl
sdist=dist/matgptq_vllm-$version.tar.gz
grep -q "^## $version" CHANGELOG.md || { echo "check.sh: CHANGELOG.md has no section $version" >&2; exit 1; }
if [ -n "${GITHUB_REF_NAME:-}" ] && [ "${GITHUB_REF_TYPE:-}" = tag ] && [ "$GITHUB_REF_NAME" != "v$version" ]; then
    echo "check.sh: the tag is $GITHUB_REF_NAME, the version $version" >&2
    exit 1
fi

# What the checkout has, the distributions must have: a module or table that packaging forgets is missed only by users.
"$python" - "$wheel" "$sdist" <<'PYTHON'
import subprocess
import sys
import tarfile
import zipfile

wheel, sdist = sys.argv[1:]
folders = ("matgptq_vllm/", "calibrate/", "serve/", "loadtests/")
tracked = subprocess.run(["git", "ls-files", *folders], check=True, capture_output=True, text=True).stdout.split()
in_wheel = set(zipfile.ZipFile(wheel).namelist())
in_sdist = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
for name, held in ((wheel, in_wheel), (sdist, in_sdist)):
    missing = [file for file in tracked if file not in held]
    if missing:
        sys.exit(f"check.sh: {name} lacks {missing[:5]}")
foreign = {name.split("/")[0] for name in in_wheel} - {folder[:-1] for folder in folders}
if any(not name.endswith(".dist-info") for name in foreign):
    sys.exit(f"check.sh: {wheel} has {sorted(foreign)}")
PYTHON
[ "${1:-}" = build ] && exit

clean=$(mktemp -d)
trap 'rm -rf "$clean"' EXIT
# The installation's own way, from a folder that has the wheel in place of the sources.
mkdir -p "$clean/deploy"
cp -r deploy/install "$clean/deploy/"
cp -r examples "$clean/"
WHEEL=$root/$wheel "$clean/deploy/install/install.sh"
cd "$clean"
env -u PYTHONPATH "$clean/.venv/bin/matgptq" --version
env -u PYTHONPATH "$clean/.venv/bin/python" examples/demo.py
echo "The release $version is in order: $wheel, $sdist"
