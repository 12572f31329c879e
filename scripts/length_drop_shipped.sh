#!/usr/bin/env bash
# How the shipped weights learnt to lose tokens: LengthDrop from an earlier model of dtbert's, plainly fine-tuned.
#
#     scripts/length_drop_shipped.sh PLAIN_MODEL DATA_DIR OUT_DIR
#
# Two runs of two processes with one thread each, 275 and 156 steps of 6,144 tokens, some 70 minutes on 2 busy cores.
# The first was planned for 360 steps (--epochs 0.4) and stopped by hand at step 275, so here it stops there with a
# learning rate lower than it had; otherwise the commands are those that made the weights.
# The plain model had seen every SquadShifts question: `scripts/train_shipped.sh` makes a model that has not.
set -euo pipefail

if [ $# -ne 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
plain=$1 data=$2 out=$3
python=${PYTHON:-python}
splits=$out/splits

export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
# Memory that is kept instead of handed back to the system makes a step a fifth shorter.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=500000000

length_drop() {
    "$python" -m torch.distributed.run --nproc-per-node 2 --master-addr 127.0.0.1 \
        --master-port "${MASTER_PORT:-29500}" -m dtbert.cli train --train "$splits"/train-*.json \
        --length-drop --num-sandwich 1 --attention-dropout 0 --learning-rate 3e-5 --threads 1 --save-every 25 "$@"
}

mkdir -p "$out"
"$python" "$(dirname "$0")/split_squad.py" "$data" "$splits"
length_drop --model "$plain" --out "$out/first" --epochs 0.305 \
    --ratio-bound 0.4 --scorers received,cls,answer+question
length_drop --model "$out/first/last" --out "$out/second" --epochs 0.172 --seed 1 \
    --ratio-bound 0.25 --scorers answer+question,answer+question,received
"$python" -m dtbert.cli convert "$out/second/last" "$out/model" --int8
"$python" -m dtbert.cli search "$splits/choose-new-wiki.json" --model "$out/model" --trials 300 --limit 600 \
    --scorers received,cls,from_question,answer --budget-range 0.2,0.9 \
    --storage "sqlite:///$out/study.db" --out "$out/model/schedules.json" --plot "$out/front.png"
