#!/usr/bin/env bash
# What a GPU is needed for, in order of worth, within 30 minutes:  bash results/gpu.sh
# Each step leaves its folder in results/gpu as it ends; one that fails does not stop the others.
# TINY=1 takes the same way on a CPU in half an hour, so that GPU time is not spent on a slip.
# Inputs: python -m plumbing.assets smollm2 news, or MODEL=folder TEXT=file.
set -u
cd "$(dirname "$0")/.."
model=${MODEL:-assets/smollm2-135m} text=${TEXT:-assets/news.txt}
out=results/gpu work=out/gpu
steps=1500 context=256 batch=32 prompts=60 rounds=3 bench=20 minutes=4
shape="--n-layer 12 --n-head 12 --n-embd 768 --context 1024 --batch-size 16"  # GPT-2 124M's, on bytes
if [ -n "${TINY:-}" ]; then
    out=out/gpu-tiny work=out/gpu-tiny/work steps=2 context=32 batch=2 prompts=2 rounds=1 bench=2 minutes=20
    shape="--n-layer 2 --n-head 2 --n-embd 32 --context 64 --batch-size 2"
fi
mkdir -p "$out" "$work"

step() { # name, minutes, command: its output is shown and kept
    echo "== $1"
    timeout "$2m" "${@:3}" 2>&1 | tee "$out/$1.txt"
    [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "== $1 failed"; return 1; }
}
keep() { mkdir -p "$out/$1" && cp "$work/$1"/*.json "$work/$1"/*.png "$work/$1"/adapter* "$out/$1/" 2>/dev/null; }
sparse="--init $model --data $text --lora 32 --lr 1e-3 --context $context --batch-size $batch --steps $steps"

step parity 2 python sparse.py
step cost $minutes python -m plumbing.attention_cost --rounds $rounds --out "$out/attention"
step throughput 3 python train.py --benchmark $bench $shape --out "$work/throughput" && keep throughput
step control 5 python train.py $sparse --no-sparse --overwrite --out "$work/control" && keep control
step sparse 8 python train.py $sparse --bound kl --slack 0.1 --control "$work/control" --overwrite --out "$work/sparse" && keep sparse
for task in ioi greater-than; do
    step $task $minutes python patching.py --dense "$model" --sparse "$model" --adapter "$work/sparse/adapter.safetensors" \
        --task $task --n $prompts --per-decade 4 --force --out "$out/circuits-$task"
done
