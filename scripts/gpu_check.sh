#!/usr/bin/env bash
# Test, tune and measure the GPU kernels on this machine, from the source tree, without installing or fetching anything.
#
#   scripts/gpu_check.sh                       at most 9.5 minutes
#   scripts/gpu_check.sh --seconds 300         parts get less time, and those that are worth the least are left out
#   scripts/gpu_check.sh --only record model   some of the stages: --help lists them; tune holds what it times first
#   scripts/gpu_check.sh --only check tests    what times nothing, and may share the GPU
#   scripts/gpu_check.sh --commit HASH         what the figures belong to, where there is no repository to ask
#   scripts/gpu_check.sh --device cpu --tiny   a trial of the scripts, without a GPU
#
# Writes into $OUT, or gpu_results/, as it goes: results.jsonl (a record of everything), log.txt (all that the parts print),
# the table of tuned configurations, which it also puts into the tree, and summary.txt, which is printed last: 60 lines,
# failures first. `scripts/gpu_check/publish.py FOLDER` makes docs/ of it, or of several. Each part is a process with its
# own limit.
# Needs python3 ($PYTHON names another) with torch, triton, transformers, pytest and hypothesis, and a GPU; uses
# pytest-xdist, compute-sanitizer and the ptxas of an installed CUDA where they are there.
#
# Exit status: 0 when all checks passed and every figure was taken, whatever the figures; 1 when not; 2 when nothing could
# run. A missed aim is in the summary alone.
set -uo pipefail
out=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "gpu_check: $python does not run, or lacks torch: nothing was tested or measured" >&2
    exit 2
fi
export PYTHONPATH=$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
exec env ${out:+OUT="$out"} "$python" -m gpu_check "$@"
