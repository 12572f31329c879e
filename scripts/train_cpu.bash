# Sourced by the scripts that train on a CPU: `split`, `train` and `finish`, and the environment that they share.
# Whoever sources it sets data, splits, out and processes.
python=${PYTHON:-python}
scripts=$(dirname "${BASH_SOURCE[0]}")

export OMP_NUM_THREADS=1
# By default glibc hands large tensors back to the system after each use and asks for them anew: a page fault for every
# 4 KiB, each time. Kept instead, a step takes a fifth less time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=500000000
# The processes talk over the loopback, whatever the machine's name resolves to.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}

split() {
    "$python" "$scripts/split_squad.py" "$data" "$splits"
}

train() {
    "$python" -m torch.distributed.run --nproc-per-node "$processes" --master-addr 127.0.0.1 \
        --master-port "${MASTER_PORT:-29500}" -m dtbert.cli train --threads 1 --save-every 25 "$@"
}

# As it will be shipped: in int8, for schedules carry the digest of their weights. On held-out questions.
finish() {
    if [ ! -d "$out/model" ]; then
        "$python" -m dtbert.cli convert "$1" "$out/model" --int8
    fi
    shift
    "$python" -m dtbert.cli search "$splits/choose-new-wiki.json" --model "$out/model" --limit 600 \
        --budget-range 0.2,0.9 --storage "sqlite:///$out/study.db" --out "$out/model/schedules.json" \
        --plot "$out/front.png" "$@"
    echo "the model and its schedules are in $out/model"
}
