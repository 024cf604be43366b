#!/usr/bin/env bash
# What is checked and measured on one GPU; from the root, with the tests' packages installed:
#   bash experiments/benchmarks/accelerator.sh FOLDER [PART...]
# Each part writes its own file to the folder and ends by itself after the seconds that stand there.
set -u
out=$1; shift
parts=${*:-tests step_cost profile linear_algebra update_cost}
export PYTHONUNBUFFERED=1 COLUMNS=200 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/../programs}
threads=$(($(nproc) > 8 ? 8 : $(nproc)))

run() {  # run SECONDS FILE MODULE ARGUMENT...: a benchmark, its output in a file and shown
  local begin=$SECONDS
  timeout "$1" python3 -m "experiments.benchmarks.$3" "${@:4}" >"$out/$2" 2>&1
  echo "=== $2: exit $?, $((SECONDS - begin)) s"; grep -v -E '^$|WARNING|^[WI][0-9]{4}' "$out/$2" | tail -n 60
}

tests() {
  # Equality with references holds in float32 where products are; autotuning would take the time.
  local begin=$SECONDS
  JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS=--xla_gpu_autotune_level=0 \
    XLA_PYTHON_CLIENT_PREALLOCATE=false timeout "${TEST_SECONDS:-240}" \
    python3 -m pytest -v -n "$(($(nproc) - 1))" -m 'not slow' --tb=short \
    -k 'not mesh and not shard' tests/test_{capture,kfac,fop,curvature,soap,shampoo,second_moments,eigenvalue,damping,projection,capture_apart,capture_batch,capture_complex,capture_examples,capture_fisher,capture_forms,capture_kinds,capture_lookups,capture_sharing,capture_traps,capture_views,oracles}.py \
    >"$out/tests.txt" 2>&1
  echo "=== tests: exit $?, $((SECONDS - begin)) s"
  grep -c PASSED "$out/tests.txt"; grep -E ' (FAILED|ERROR) |^(FAILED|ERROR)|^E  ' "$out/tests.txt" | sort | uniq -c | sort -rn | head -n 60
  tail -n 2 "$out/tests.txt"
}

# Autotuning every fusion and Triton product takes minutes of compilation on networks of this size,
# and so does checking each convolution that is tried (level 2 does not).
quick="--xla_gpu_enable_triton_gemm=false --xla_gpu_experimental_enable_fusion_autotuner=false"
quick+=" --xla_gpu_autotune_level=2"

for part in $parts; do
  case $part in
    tests) tests ;;
    linear_algebra)
      run 45 linear_algebra.txt linear_algebra --sides 768 --rounds 3 \
        --compile-threads "$threads"
      run 40 linear_algebra_wide.txt linear_algebra --sides 769 4608 --rounds 3 \
        --parts products inverses --compile-threads "$threads" ;;
    step_cost)
      XLA_FLAGS=$quick run 240 step_cost.txt step_cost --cases resnet18-2048 \
        --optimizers kfac fop --kinds ordinary refresh --rounds 5 --compile-threads "$threads" --out "$out/step_cost.csv" ;;
    profile) XLA_FLAGS=$quick run 60 profile.txt profile resnet18-2048 fop refresh ;;
    update_cost)
      XLA_FLAGS=$quick run 300 update_cost.txt update_cost --cases gpt2-16-step --rounds 5 \
        --methods SOAP Muon --compile-threads "$threads" --out "$out/update_cost.csv" ;;
  esac
done
