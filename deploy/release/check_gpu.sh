#!/usr/bin/env bash
# What CI cannot check for want of a GPU: kernels against float64 and under the memory checker, eager mode against graphs, alone and
# mixed, and a soak of ten minutes. Needs a GPU of compute capability 9.0 to check all of it, and compute-sanitizer. Half an hour.
#
#   deploy/release/check_gpu.sh PARENT TEXT OUT
#
# PARENT: a parent of a model that has learned to speak, such as the example's; TEXT: UTF-8 text to take prompts from. Logs and
# reports stay in OUT.
set -uo pipefail

if [ $# -ne 3 ]; then
    echo "usage: check_gpu.sh PARENT TEXT OUT" >&2
    exit 2
fi
for given in "$1" "$2"; do
    [ -e "$given" ] || { echo "check_gpu.sh: there is no $given; give a parent and a text that exist" >&2; exit 2; }
done
python=${PYTHON:-python}
parent=$(realpath "$1") text=$(realpath "$2")
mkdir -p "$3"
out=$(realpath "$3")
cd "$(dirname "$0")/../.." || exit
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "check_gpu.sh: torch finds no GPU; run it on a machine that has one" >&2
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

failed=()
check() {
    local name=$1 begin=$SECONDS
    shift
    if "$@" >"$out/$name.log" 2>&1; then
        echo "$name: passed in $((SECONDS - begin)) s"
    else
        echo "$name: FAILED after $((SECONDS - begin)) s, see $out/$name.log"
        failed+=("$name")
    fi
}

check kernels "$python" -m pytest -p no:cacheprovider tests/kernels
# Shapes that fit no tile; the first run compiles, which the checker would slow down.
for widths in 3 2,4,8; do
    products=("$python" tests/kernels/products_on_gpu.py curved 128 bfloat16 "$widths" "1,3,8,16,33,100,257,300" 130x648)
    check "products-$widths" "${products[@]}"
    check "sanitizer-$widths" compute-sanitizer --tool memcheck --error-exitcode 1 "${products[@]}"
done
check modes "$python" -m loadtests.modes "$parent" --text "$text" --out "$out/modes" -- --max-model-len 512 --dtype float16
check soak "$python" -m loadtests.soak "$parent" --text "$text" --minutes 10 --out "$out/soak.json" \
    --engine max_model_len=512 --engine 'dtype="float16"' --engine kv_cache_memory_bytes=2147483648 --engine max_num_seqs=128
[ "${#failed[@]}" = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
