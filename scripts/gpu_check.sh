#!/usr/bin/env bash
# Test and measure the GPU kernels on this machine, from the source tree, without installing or fetching anything.
#
#   scripts/gpu_check.sh                 at most 10 minutes
#   scripts/gpu_check.sh --quick         at most 2 minutes: fewer tests and rounds, without torch.compile
#   scripts/gpu_check.sh --commit HASH   what the figures belong to, where there is no repository to ask
#
# Runs the tests marked `gpu`, then scripts/bench_gpu.py, which writes bench_gpu.json into $OUT, or into docs/. The table
# of aims comes last. Needs python3 ($PYTHON names another) with torch, triton, transformers, pytest and hypothesis, a
# GPU, and uses pytest-xdist where it is there. Each part has its own limit of time, and none stops the other.
#
# Exit status: 0 when all tests passed and every figure was taken, whatever the figures; 1 when not; 2 when nothing could
# run. A missed aim is in the table alone.
set -uo pipefail
folder=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
folder=${folder:-docs}
quick=() commit=() chosen=() test_limit=200 bench_limit=350 bench_seconds=290
while (($#)); do
    case $1 in
        --quick)
            quick=(--quick) test_limit=45 bench_limit=55 bench_seconds=35
            chosen=(-k "exact or twice or kept_queries_agrees or select_tokens")
            ;;
        --commit)
            (($# > 1)) || { echo "gpu_check: --commit needs a hash" >&2; exit 2; }
            commit=(--commit "$2")
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        *)
            echo "gpu_check: unknown argument $1: try --help" >&2
            exit 2
            ;;
    esac
    shift
done

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
missing=$("$python" - <<'CHECK' 2>&1
import importlib.util

needed = ("torch", "triton", "transformers", "safetensors", "tokenizers", "huggingface_hub", "pytest", "hypothesis", "tqdm")
absent = [name for name in needed if importlib.util.find_spec(name) is None]
if absent:
    print(f"this Python lacks {', '.join(absent)}")
else:
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA GPU")
CHECK
) || missing=${missing:-"$python does not run"}
if [[ -n $missing ]]; then
    echo "gpu_check: ${missing##*$'\n'}: nothing was tested or measured" >&2
    exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/tests.log results=$work/bench_gpu.json
status=0

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
timeout -k 5 "$test_limit" \
    "$python" -m pytest -m gpu tests/gpu -p no:cacheprovider "${workers[@]}" "${chosen[@]}" 2>&1 | tee "$log"
tests=${PIPESTATUS[0]}
case $tests in
    0) verdict=ok ;;
    124 | 137) verdict="NOT FINISHED in $test_limit s" ;;
    *) verdict=FAILED ;;
esac
summary=$(grep -E '(passed|failed|error)' "$log" | tail -n 1)

timeout -k 5 "$bench_limit" \
    "$python" scripts/bench_gpu.py --no-table --output "$results" --seconds "$bench_seconds" "${quick[@]}" "${commit[@]}"
bench=$?
((tests == 0 && bench == 0)) || status=1

echo
if [[ -f $results ]]; then
    mkdir -p "$folder" && cp "$results" "$folder/" || status=1
    "$python" scripts/gpu_bench/report.py "$results" || status=1
else
    echo "no figures were written"
fi
case $bench in
    0) ;;
    124 | 137) echo "the benchmark was not finished in $bench_limit s: $folder/bench_gpu.json holds what it had" ;;
    *) echo "the benchmark did not take every figure: status $bench" ;;
esac
echo "tests: $verdict ${summary:+($summary)}"
exit "$status"
