#!/bin/sh
# Builds and runs everything that needs a GPU, in pieces of at most nine minutes each.
#
#     tools/gpu_session.sh [PIECE...]      build check parity bench pipelines compile long
#                                          default: all of them, in this order
#
# Logs go to $OUT (default: out/), one file a part; what failed is in the last line.  Installs
# nothing: PyTorch, transformers and diffusers are those that $PYTHON (default: python3) finds.
# Every part runs even if an earlier one failed.
set -u
OUT=${OUT:-out}
PYTHON=${PYTHON:-python3}
: "${ACCEL_CUDA_ARCHS:=90a}"
export ACCEL_CUDA_ARCHS HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
PIECE_SECONDS=530
mkdir -p "$OUT"
failed=
tests=build/c/tests

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

# The engine, the CUDA library, the C tests, the extension.
piece_build() {
    part build_c 420 make -j"$(nproc)" cuda $tests/test_seam $tests/test_cuda $tests/test_kernels \
        $tests/test_cuda_models
    part build_python 240 "$PYTHON" setup.py -q build_ext --inplace
    part info 60 "$PYTHON" -m accel info
}

# Short: what `make test-gpu` runs before the Python tests, and where the time of a call goes.
piece_check() {
    part seam 30 $tests/test_seam
    part cuda 60 $tests/test_cuda
    part cuda_models 90 $tests/test_cuda_models
    for dtype in f16 f32 bf16; do
        part kernels_$dtype 100 $tests/test_kernels --backend cuda --dtype $dtype --keep-going
    done
    part pictures 120 "$PYTHON" -m pytest -q -s -p no:cacheprovider tests/gpu/test_gpu_pictures.py \
        -k shipped
}

# Full-size networks against PyTorch in float32, one file after the other, so that each has a log.
piece_parity() {
    for file in tests/gpu/test_*.py; do
        part parity_$(basename "$file" .py) 200 "$PYTHON" -m pytest -q -s -p no:cacheprovider "$file"
    done
    grep -h "^PARITY\|^PICTURES" "$OUT"/parity_*.log >"$OUT/parity.txt"
}

piece_bench() {
    part bench_models 300 "$PYTHON" benchmarks/gpu.py models --record "$OUT/records"
    part bench_memory 230 "$PYTHON" benchmarks/gpu.py memory --record "$OUT/records"
}

piece_pipelines() {
    part bench_pipelines 300 "$PYTHON" benchmarks/gpu.py pipelines --record "$OUT/records"
    for model in sd15 sdxl vae1024; do
        part profile_$model 60 "$PYTHON" tools/gpu_profile.py $model --out "$OUT"
    done
}

# torch.compile takes one to two minutes a network.
piece_compile() {
    part bench_compile 525 "$PYTHON" benchmarks/gpu.py models --only sd15,sdxl,vae512,vae1024 \
        --torch-compile 150 --record "$OUT/records_compile"
}

# Sanitizers, the kernels of sm_75, times of single kernels.
piece_long() {
    part gpu_check 525 tools/gpu_check.sh "$OUT/gpu_check"
}

for piece in ${*:-build check parity bench pipelines compile long}; do
    piece_start=$(date +%s)
    echo "=== $piece"
    piece_"$piece"
done
echo "failed:${failed:- none}"
