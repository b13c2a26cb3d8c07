#!/usr/bin/env bash
# A small search, the same budget for every method: four settings of what it stands or falls with, a run each, on order 2
# and on rows that nothing else reads (the synthetic grammars with data.seed=7). What is reported is another order, with
# other rows. A finished run is a line in docs/studies/tuning.jsonl and is not done again; at the end stands the best
# setting of each method, as scripts/studies.sh methods takes it.
#
#   scripts/tune.sh [--methods "ella olora"] [--slots N]
#
# FOLDER=… is where the record stands, RUNS=… where runs go (default runs/studies).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
results=${FOLDER:-$here/../docs/studies}/tuning.jsonl
runs=${RUNS:-runs/studies} python=${PYTHON:-python3} methods="" slots=()
while [ $# -gt 0 ]; do
  case "$1" in
    --methods) methods=${2:?--methods needs names} && shift 2 ;;
    --slots) slots=(--slots "${2:?--slots needs a number}") && shift 2 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) echo "tune.sh: unknown flag $1" >&2 && exit 2 ;;
  esac
done
mkdir -p "$(dirname "$results")"

# A line a method: its name, then a setting (or several that go together) and four values. Where a method has no
# coefficient it is the learning rate.
grid() {
  cat <<'GRID'
seqlora training.lr=5e-4 1e-3 1.5e-3 3e-3
seqft training.lr=1e-4 3e-4 1e-3 1.5e-3
inclora training.lr=5e-4 1e-3 1.5e-3 3e-3
inclora training.optimizer,training.lr=muon,1.5e-3 muon,3e-3 muon,6e-3 muon,1.2e-2
pertask training.lr=5e-4 1e-3 1.5e-3 3e-3
mtl training.lr=5e-4 1e-3 1.5e-3 3e-3
replay training.lr=5e-4 1e-3 1.5e-3 3e-3
ewc method.lambda1=200 2000 20000 200000
lwf method.lambda1=0.5 2 5 20
agem training.lr=5e-4 1e-3 1.5e-3 3e-3
gem training.lr=5e-4 1e-3 1.5e-3 3e-3
ogd training.lr=5e-4 1e-3 1.5e-3 3e-3
migu method.quantile=0.3 0.5 0.7 0.9
l2p method.lr=0.01 0.03 0.1 0.3
progprompt method.lr=0.03 0.1 0.3 1.0
lfpt5 method.lr=0.03 0.1 0.3 1.0
olora method.lambda1=0.02 0.1 0.5 2.5
nlora method.lambda1=30 100 300 1000
sparse-orth method.lambda2=2000 20000 60000 200000
grassmann method.lambda1=30 100 300 1000
clora method.lambda1=0.1 1 10 100
inflora method.threshold=0.9 0.95 0.98 0.99
shared-basis training.lr=5e-4 1e-3 1.5e-3 3e-3
colora training.lr=5e-4 1e-3 1.5e-3 3e-3
coso method.lr=2.5e-4 5e-4 1e-3 2e-3
osft method.lr=1.25e-4 2.5e-4 5e-4 1e-3
sdlora training.lr=5e-4 1e-3 1.5e-3 3e-3
pego method.lambda1=1e-5 1e-4 1e-3 1e-2
hard-orth training.lr=5e-4 1e-3 1.5e-3 3e-3
soft-orth training.lr=5e-4 1e-3 1.5e-3 3e-3
ella method.lambda1=3e3 1e4 3e4 3e5
pslora method.lambda1=1e3 1e4 1e5 1e6
ewc-lora method.lambda1=1e2 1e3 1e4 1e5
jumplora method.lambda1=0 3e3 3e4 3e5
oliera method.lambda1=0 1 10 100
oa method.lambda1=1e2 1e3 1e4 1e5
slao training.lr=5e-4 1e-3 1.5e-3 3e-3
merge method.how,method.weight=average,1 ties,1 dare,1 magmax,0.5
slora training.lr=5e-4 1e-3 1.5e-3 3e-3
treelora method.lambda1=0.5 2 8 32
doc method.spare,training.lr=true,1.5e-3 false,5e-4 false,1.5e-3 false,3e-3
gorp method.lr=5e-4 2e-3 5e-3 1e-2
gainlora training.lr=3e-4 1e-3 1.5e-3 3e-3
sapt method.kappa=0.01 0.1 1 10
sure training.lr=5e-4 1e-3 1.5e-3 3e-3
rkif training.lr=3e-4 1e-3 1.5e-3 3e-3
GRID
}

while read -r method varied; do
  [ -z "$methods" ] || [[ " $methods " == *" $method "* ]] || continue
  "$here/sweep.sh" "${slots[@]}" --results "$results" --orders order2 --methods "$method" --seeds 1 --vary "$varied" -- \
    --preset tiny --data synthetic --set data.seed=7 --set data.max_train=200 --set data.max_test=60 \
    --output-dir "$runs/tuning" </dev/null
done < <(grid)
"$python" "$here/leaderboard.py" "$results" --chosen
