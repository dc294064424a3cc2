#!/bin/sh
# The long GPU check: all kernels in all dtypes, under sanitizers, and their times.
#
#     tools/gpu_check.sh [folder for results]      default: out/
#
# `make test-gpu` is the short one.  Every part runs even if an earlier one failed; the last lines
# say which did.
set -u
out=${1:-out}
mkdir -p "$out"
kernels=build/c/tests/test_kernels
failed=

part() { # name, seconds, command...
    name=$1 limit=$2
    shift 2
    start=$(date +%s)
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || failed="$failed $name"
    echo "== $name: $(($(date +%s) - start)) s: $(tail -n 1 "$out/$name.log")"
}

part build 240 make -j"$(nproc)" cuda $kernels build/c/tests/test_seam build/c/tests/test_cuda \
    build/c/tests/test_cuda_models
part seam 30 build/c/tests/test_seam
part cuda 30 build/c/tests/test_cuda
part models 90 build/c/tests/test_cuda_models
for dtype in f16 f32 bf16; do
    part kernels_$dtype 120 $kernels --backend cuda --dtype $dtype --keep-going
done
part bench_f16 120 $kernels --backend cuda --dtype f16 --bench --keep-going
part time_sd15 60 build/c/tests/test_cuda_models --time
part arch75_f16 120 env ACCEL_FORCE_ARCH=75 $kernels --backend cuda --dtype f16 --keep-going
part sync_f16 60 env ACCEL_SYNC=1 $kernels --backend cuda --dtype f16 --op attention --quick
for tool in memcheck racecheck; do
    part ${tool}_f16 120 compute-sanitizer --tool $tool --error-exitcode 9 \
        $kernels --backend cuda --dtype f16 --quick
    part ${tool}_f32 120 compute-sanitizer --tool $tool --error-exitcode 9 \
        $kernels --backend cuda --dtype f32 --quick
done
echo "failed:${failed:- none}"
[ -z "$failed" ]
