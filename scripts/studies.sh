#!/usr/bin/env bash
# Studies, and the real rows of docs/results.md, each a sweep. What is finished stands in docs/studies/NAME.jsonl, a line a
# cell, and is not run again: started anew, a study does what is missing, and prints its table.
#
#   scripts/studies.sh NAME [--slots N]
#
# On the embedded tiny-t5 and synthetic rows:
#   rank      rank × alpha × epochs
#   kinds     adapter kinds at about equal stored size
#   targets   which layers are adapted
#   methods, methods-fifteen   all methods on order 1, the twelve best of them on order 4, each with the setting that
#             scripts/tune.sh has found: for `python scripts/leaderboard.py`
#   beyond    what is ours and in no paper, on both orders, as the table has its parts
# On SmolLM2-135M (scripts/get_smollm2.sh smollm2) and real rows, DATA=FOLDER, the benchmark's:
#   coefficients   of penalties, on train rows that no other study reads: amazon → dbpedia
#   real           fourteen methods on dbpedia → amazon → agnews
#   real-eight     four methods on eight tasks
#   real-rank      rank × epochs on dbpedia → amazon → agnews
# FOLDER=… is where results stand, RUNS=… where runs go (default runs/studies).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
results=${FOLDER:-$here/../docs/studies}
runs=${RUNS:-runs/studies} python=${PYTHON:-python3}
name=${1:-} slots=()
[ $# -eq 0 ] || shift
while [ $# -gt 0 ]; do
  case "$1" in
    --slots) slots=(--slots "${2:?--slots needs a number}") && shift 2 ;;
    *) echo "studies.sh: unknown flag $1" >&2 && exit 2 ;;
  esac
done
mkdir -p "$results"

# Cells, as sweep.sh has them, then what all runs are given.
cells() { "$here/sweep.sh" "${slots[@]}" --results "$results/$name.jsonl" "$@" --output-dir "$runs/$name"; }
tiny() { cells --orders order1 "$@" -- --preset tiny --data synthetic --set data.max_train=400 --set data.max_test=100; }
# fp32 everywhere, so that no cell depends on whose processor it ran on.
real() {
  [ -f "${DATA:-}/TC/dbpedia/train.json" ] || { echo "studies.sh: DATA=FOLDER has to be the benchmark's (docs/data.md)" >&2; exit 2; }
  cells "$@" --preset smollm2-q4 --set training.precision=fp32
}

# Rows 1000 to 1059 of a task's train file to be tested on, those before to train on.
validation() {
  "$python" - "$DATA" "$runs/validation" SC/amazon TC/dbpedia <<'PYTHON'
import json, sys
from pathlib import Path

source, made = map(Path, sys.argv[1:3])
for task in sys.argv[3:]:
    (made / task).mkdir(parents=True, exist_ok=True)
    rows = json.loads((source / task / "train.json").read_text())
    (made / task / "train.json").write_text(json.dumps(rows[:1000]))
    (made / task / "test.json").write_text(json.dumps(rows[1000:1060]))
    (made / task / "labels.json").write_text((source / task / "labels.json").read_text())
PYTHON
  printf 'name: amazon-dbpedia\ntasks: [amazon, dbpedia]\n' >"$runs/amazon-dbpedia.yaml"
}

case "$name" in
  rank)
    tiny --methods seqlora --seeds "1 2 3" --vary "adapter.r,adapter.alpha=2,2 2,4 8,8 8,16 32,32 32,64" \
      --vary "training.epochs=1 2 4 8"
    ;;
  kinds) # 10,752 numbers are a LoRA of rank 2; what has no setting for its size stands beside
    for size in kind,adapter.r,adapter.alpha=lora,2,2 kind,adapter.r,adapter.alpha=dora,1,1 kind,adapter.r=vera,576 \
      kind,adapter.vectors=vblora,160 kind,adapter.r,adapter.alpha=tied-lora,14,14 \
      kind,adapter.r,adapter.alpha=lora-xs,28,28 kind,adapter.r=loha,1 kind,adapter.r,adapter.factor=lokr,4,2 kind=ia3 \
      kind,adapter.block_size=oft,8 kind,adapter.block_size=boft,4 kind,adapter.r=hra,4 kind,adapter.r=randlora,64 \
      kind,adapter.frequencies=fourierft,768; do
      tiny --methods "seqlora inclora" --seeds "1 2 3" --vary "adapter.$size"
    done
    ;;
  targets)
    tiny --methods "seqlora inclora" --seeds "1 2 3" --vary "adapter.target_modules=qv attention mlp all-linear"
    ;;
  methods | methods-fifteen)
    [ -s "$results/tuning.jsonl" ] || { echo "studies.sh: scripts/tune.sh goes first" >&2; exit 2; }
    best=() order=order1
    [ "$name" = methods ] || { best=("$results/methods.jsonl"); order=order4; }
    chosen=$("$python" "$here/leaderboard.py" "$results/tuning.jsonl" --chosen "${best[@]}" | cut -f1)
    for seed in 1 2 3; do # every method once before any of them twice
      while read -r method settings; do
        vary=()
        # Settings that go together: their names, then their values.
        [ -z "$settings" ] || vary=(--vary "$(sed 's/=[^ ]*//g; s/ /,/g' <<<"$settings")=$(sed 's/[^ ]*=//g; s/ /,/g' <<<"$settings")")
        cells --orders "$order" --methods "$method" --seeds "$seed" "${vary[@]}" -- --preset tiny --data synthetic \
          --set data.max_train=$([ "$name" = methods ] && echo 400 || echo 200) \
          --set data.max_test=$([ "$name" = methods ] && echo 100 || echo 40) </dev/null
      done <<<"$chosen"
    done
    ;;
  beyond)
    for centred in training.lr,method.centred=3e-3,true training.lr,method.centred,method.threshold=3e-3,true,0.9999; do
      tiny --methods gainlora --seeds "1 2 3" --vary "$centred"
      cells --orders order4 --methods gainlora --seeds "1 2 3" --vary "$centred" -- --preset tiny --data synthetic \
        --set data.max_train=200 --set data.max_test=40
    done
    ;;
  coefficients)
    mkdir -p "$runs" && validation
    for which in inclora "olora method.lambda1=0.02 0.1" "nlora method.lambda1=30 3000" "ewc method.lambda1=400 4000" \
      "sparse-orth method.lambda1,method.lambda2=30,2000 300,20000" "inflora method.threshold=0.95 0.99" \
      "gainlora training.lr=5e-4 1.5e-3" \
      "gainlora training.lr,method.centred,method.threshold=1.5e-3,true,0.995 1.5e-3,true,0.9999" \
      "sapt method.kappa=0.1 1" "ewc-lora method.lambda1=1e3 1e4" "jumplora method.lambda1=3e3 3e4"; do
      vary=()
      [ "$which" = inclora ] || vary=(--vary "${which#* }")
      real --orders "$runs/amazon-dbpedia.yaml" --methods "${which%% *}" --seeds 1 "${vary[@]}" -- \
        --data-dir "$runs/validation" --set data.max_train=120 --set data.max_test=60
    done
    ;;
  real)
    # SAPT takes twice as many steps, for it learns to write its tasks' inputs, too: beside it the control as often.
    real --orders order1-three --methods inclora --seeds 1 --vary training.epochs=2 -- --data-dir "$DATA"
    for seed in 1 2; do
      methods="seqlora inclora olora inflora ewc sapt"
      [ $seed = 2 ] || methods+=" nlora sparse-orth ewc-lora jumplora replay pertask mtl"
      real --orders order1-three --methods "$methods" --seeds $seed -- --data-dir "$DATA"
      real --orders order1-three --methods gainlora --seeds $seed --vary training.lr=1.5e-3 -- --data-dir "$DATA"
      real --orders order1-three --methods gainlora --seeds $seed \
        --vary "training.lr,method.centred,method.threshold=1.5e-3,true,0.9999" -- --data-dir "$DATA"
    done
    ;;
  real-eight)
    real --orders order4-eight --methods "seqlora inclora olora replay" --seeds 1 -- --data-dir "$DATA"
    ;;
  real-rank)
    real --orders order1-three --methods seqlora --seeds 1 --vary "adapter.r,adapter.alpha=2,4 8,8 8,16 32,64" \
      --vary "training.epochs=1 2 4" -- --data-dir "$DATA" --set data.max_train=120 --set data.max_test=60
    ;;
  *)
    sed -n '2,19s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
"$python" "$here/study.py" "$results/$name.jsonl"
