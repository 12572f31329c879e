#!/usr/bin/env bash
# How the shipped weights learnt to lose tokens: LengthDrop from an earlier model of dtbert's, plainly fine-tuned.
#
#     scripts/length_drop_shipped.sh PLAIN_MODEL DATA_DIR OUT_DIR
#
# Five runs of two processes with one thread each, 275, 156, 375, 477 and 746 steps: some 4 hours on 2 cores. The first and
# the third were planned for 360 and 886 steps (--epochs 0.4 and 0.65) and stopped by hand, so here they stop there with a
# lower learning rate than they had; the fifth had been planned for 818 steps in its first 175. Otherwise the commands are
# those that made the weights.
# The search of the shipped schedules was also given 50 schedules by hand (--start).
# The plain model had seen every SquadShifts question: `scripts/train_shipped.sh` makes a model that has not.
set -euo pipefail

if [ $# -ne 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
plain=$1 data=$2 out=$3 processes=2
splits=$out/splits
. "$(dirname "$0")/train_cpu.bash"

length_drop() {
    train --train "$splits"/train-*.json --length-drop --num-sandwich 1 --attention-dropout 0 "$@"
}

mkdir -p "$out"
split
length_drop --model "$plain" --out "$out/1" --epochs 0.305 --learning-rate 3e-5 \
    --ratio-bound 0.4 --scorers received,cls,answer+question
length_drop --model "$out/1/last" --out "$out/2" --epochs 0.172 --learning-rate 3e-5 --seed 1 \
    --ratio-bound 0.25 --scorers answer+question,answer+question,received
mostly_answer=answer+question,answer+question,answer+question,answer+question,received
length_drop --model "$out/2/last" --out "$out/3" --epochs 0.275 --learning-rate 5e-5 --warmup 0.04 --seed 2 \
    --batch-tokens 4096 --ratio-bound 0.15,0.35,0.5,0.4,0.3,0.2 --scorers $mostly_answer --answer-loss 0.3
length_drop --model "$out/3/last" --out "$out/4" --epochs 0.35 --learning-rate 5e-5 --warmup 0.04 --seed 3 \
    --batch-tokens 4096 --ratio-bound 0.05,0.2,0.6,0.5,0.3,0.2 --scorers $mostly_answer --answer-loss 1.5
length_drop --model "$out/4/last" --out "$out/5" --epochs 0.547 --learning-rate 5e-5 --warmup 0.04 --seed 4 \
    --batch-tokens 4096 --ratio-bound 0.5,0.2,0.25,0.4,0.35,0.25 --scorers answer_overlap+question --answer-loss 1
finish "$out/5/last" --trials 98 --scorers received,answer_overlap --keep-question yes
