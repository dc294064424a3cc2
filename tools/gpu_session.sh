#!/bin/sh
# Everything that wants a GPU, in pieces of at most nine minutes each.
#
#     tools/gpu_session.sh [PIECE...]      test models pipelines compile bench
#                                          default: all of them, in this order
#
#     test        builds, then make test-gpu with its record
#     models      benchmarks/gpu.py: networks, and memory of pipelines
#     pipelines   benchmarks/gpu.py: pipelines, and where the time of three networks goes
#     compile     benchmarks/gpu.py with torch.compile, which takes one to two minutes a network
#     bench       times of single kernels
#
# Logs and records go to $OUT (default: out/); what failed is in the last line.  Installs nothing:
# PyTorch, transformers and diffusers are those that $PYTHON (default: python3) finds.
set -u
OUT=${OUT:-out}
PYTHON=${PYTHON:-python3}
: "${ACCEL_CUDA_ARCHS:=90a}"
export ACCEL_CUDA_ARCHS HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHON
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
PIECE_SECONDS=530
mkdir -p "$OUT"
failed=

part() { # name, seconds at most, command...
    name=$1 limit=$2
    shift 2
    start=$(date +%s)
    left=$((PIECE_SECONDS - (start - piece_start)))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        failed="$failed $name(no-time)"
        return
    fi
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || failed="$failed $name"
    echo "== $name: $(($(date +%s) - start)) s: $(grep -v '^ *$' "$OUT/$name.log" | tail -n 1 | cut -c 1-160)"
}

piece_test() {
    part test_gpu 530 make test-gpu LIMIT=450 RECORD="$OUT/records/test.json"
}

piece_models() {
    part bench_models 300 "$PYTHON" benchmarks/gpu.py models --record "$OUT/records"
    part bench_memory 230 "$PYTHON" benchmarks/gpu.py memory --record "$OUT/records"
}

piece_pipelines() {
    part bench_pipelines 300 "$PYTHON" benchmarks/gpu.py pipelines --record "$OUT/records"
    for model in sd15 sdxl vae1024; do
        part profile_$model 60 "$PYTHON" tools/gpu_profile.py $model --out "$OUT"
    done
}

piece_compile() {
    part bench_compile 525 "$PYTHON" benchmarks/gpu.py models --only sd15,sdxl,vae512,vae1024 \
        --torch-compile 150 --record "$OUT/records_compile"
}

piece_bench() {
    part bench_kernels 300 build/c/tests/test_kernels --backend cuda --dtype f16 --bench \
        --keep-going
    part time_sd15 60 build/c/tests/test_cuda_models --time
}

for piece in ${*:-test models pipelines compile bench}; do
    piece_start=$(date +%s)
    echo "=== $piece"
    piece_"$piece"
done
echo "failed:${failed:- none}"
[ -z "$failed" ]
