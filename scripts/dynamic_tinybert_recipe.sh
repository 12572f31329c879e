#!/usr/bin/env bash
# Dynamic-TinyBERT as published, by dtbert's commands, for whoever has SQuAD 1.1 and a GPU:
#
#     scripts/dynamic_tinybert_recipe.sh SQUAD_TRAIN HELD_OUT OUT_DIR [BERT_BASE] [GENERAL_TINYBERT]
#
# SQUAD_TRAIN is SQuAD's train-v1.1.json; HELD_OUT has questions that are not in it, on which the best models and the
# schedules are chosen (the published code chooses on the development set: then do not report on it). BERT_BASE is where
# the teacher starts, or a BERT-base that is fine-tuned on SQuAD already, with TEACHER_IS_READY=1 in the environment.
# Started again, it goes on where it stopped. PROCESSES (default 1) is the number of GPUs.
#
# THIS HAS NOT BEEN RUN AS IT STANDS: it needs a GPU and weights that dtbert's makers did not have. All five steps have
# been run one after the other with tiny random models, on a CPU and without bfloat16.
#
# The numbers are those of the authors' README, github.com/IntelLabs/Model-Compression-Research-Package,
# research/dynamic-tinybert (Guskin et al. 2021, arXiv 2111.09645): epochs, learning rates, windows of 384 tokens that
# share 128, attention matched before the softmax, KL of sub-model and full model, 2 random sub-models, bound 0.2, layer
# dropout 0.2. Its batches of 8 and 16 windows are tokens here: SQuAD's windows have 177 in the mean. What it does not
# name (warm-up, weight decay, dropout) is dtbert's default. Its search is SigOpt's Bayesian one; here it is Optuna's TPE.
set -euo pipefail

if [ $# -lt 3 ] || [ $# -gt 5 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
train=$1 held_out=$2 out=$3
bert=${4:-google-bert/bert-base-uncased} tinybert=${5:-huawei-noah/TinyBERT_General_6L_768D}
python=${PYTHON:-python}

train() {
    "$python" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-1}" -m dtbert.cli train \
        --train "$train" --window 384 --stride 128 --device cuda --bf16 "$@"
}

mkdir -p "$out"

# 1. The teacher: batches of 8, 3e-5, 2 epochs.
teacher=$bert
if [ -z "${TEACHER_IS_READY:-}" ]; then
    train --model "$bert" --dev "$held_out" --out "$out/teacher" --batch-tokens 1416 --learning-rate 3e-5 --epochs 2
    teacher=$out/teacher/best
fi

# 2. Intermediate distillation into the general TinyBERT: batches of 16, 5e-5, 20 epochs. The span head waits.
train --model "$tinybert" --teacher "$teacher" --distill intermediate --match-attention scores \
    --out "$out/intermediate" --batch-tokens 2832 --learning-rate 5e-5 --epochs 20

# 3. Prediction distillation: batches of 16, 3e-5, 10 epochs. This is the published Dynamic-TinyBERT.
train --model "$out/intermediate/last" --teacher "$teacher" --distill prediction --dev "$held_out" \
    --out "$out/prediction" --batch-tokens 2832 --learning-rate 3e-5 --epochs 10

# 4. LengthDrop: batches of 16, 2e-5, 10 epochs. The authors call it optional: it added little to their model.
train --model "$out/prediction/best" --teacher "$teacher" --distill prediction --dev "$held_out" \
    --length-drop --num-sandwich 2 --ratio-bound 0.2 --layer-dropout 0.2 --sub-model-loss kl \
    --out "$out/length-drop" --batch-tokens 2832 --learning-rate 2e-5 --epochs 10

# 5. Bayesian search for the schedules, with the published scorer.
"$python" -m dtbert.cli search "$held_out" --model "$out/length-drop/best" --device cuda --sampler tpe \
    --scorers received --keep-question no --out "$out/length-drop/best/schedules.json" \
    --storage "sqlite:///$out/study.db" --plot "$out/front.png"
