#!/usr/bin/env bash
# Every method on orders 1 to 3 with three seeds, on the embedded tiny model and synthetic data, then the table of all
# finished runs on stdout: AA, intervals, tests, forgetting, training time, state size. Safe to start again: finished runs are skipped,
# unfinished ones go on.
#
#   scripts/compare_baselines.sh [--orders "order1"] [--methods "seqlora ewc replay-full"] [--seeds "1 2"] [--slots N]
#                                [--dir DIR] [--config FILE] [-- TRAIN FLAGS]
#
# NAME-full is a method with method.train=full. The settings of all runs stand in scripts/compare_baselines.yaml;
# another model and its data: --config FILE, with --dir, where the run folders go (default runs/baselines). Time is
# comparable only among runs that had the machine alike: on a box without GPUs, --slots as for all others.
set -uo pipefail

here=$(dirname "$0")
runner=${CL_RUNNER:-cl-runner}
orders="order1 order2 order3" methods="" seeds="1 2 3" dir="runs/baselines" config="$here/compare_baselines.yaml"
slots=() failed=0
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
  case "$1" in
    --orders) orders=${2:?--orders needs names} && shift 2 ;;
    --methods) methods=${2:?--methods needs names} && shift 2 ;;
    --seeds) seeds=${2:?--seeds needs numbers} && shift 2 ;;
    --slots) slots=(--slots "${2:?--slots needs a number}") && shift 2 ;;
    --dir) dir=${2:?--dir needs a folder} && shift 2 ;;
    --config) config=${2:?--config needs a file} && shift 2 ;;
    --) shift && break ;;
    -h | --help) usage && exit 0 ;;
    *) echo "compare_baselines.sh: unknown flag $1 (flags of cl-runner train go behind --)" >&2 && exit 2 ;;
  esac
done
command -v "$runner" >/dev/null || { echo "compare_baselines.sh: there is no $runner on the PATH (set CL_RUNNER)" >&2; exit 2; }

# All methods there are, as the runner lists them: a line each, the name first.
[ -n "$methods" ] || methods=$("$runner" list methods | tail -n +2 | awk '{print $1}' | tr '\n' ' ')
pair="" full=""
for method in $methods; do
  case "$method" in *-full) full+=" ${method%-full}" ;; *) pair+=" $method" ;; esac
done

child=""
trap '[ -z "$child" ] || kill "$child" 2>/dev/null; wait; exit 130' INT TERM HUP
# The sweep speaks on stderr: what goes to stdout is the table alone.
sweep() {
  "$here/sweep.sh" --orders "$orders" --seeds "$seeds" "${slots[@]}" --methods "$1" -- \
    --config "$config" --output-dir "$dir" "${@:2}" >&2 &
  child=$!
  wait "$child" || failed=$?
}
[ -z "$pair" ] || sweep "$pair" "$@"
[ -z "$full" ] || sweep "$full" "$@" --set method.train=full

if [ -n "$(ls "$dir" 2>/dev/null)" ]; then
  "$runner" compare --markdown "$dir" || exit
fi
exit "$failed"
