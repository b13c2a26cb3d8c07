#!/usr/bin/env bash
# Orders × methods × seeds over this box's GPUs (or CPU slots), one run each. Safe to start again: finished runs are
# skipped, unfinished ones go on. Failed runs are listed at the end (exit code 1).
#
#   scripts/sweep.sh --orders "order1 order2" --methods "seqlora olora" --seeds "1 2 3" [--slots N]
#                    [--vary "KEY=VALUE VALUE …"]… [--results FILE] [-- TRAIN FLAGS]
#
# --vary adds a dimension: a setting and its values, which hold no spaces, or several that go together
# ("adapter.r,adapter.alpha=8,8 8,16"); it may be given again. --results appends a line to FILE as each run ends (JSON:
# the cell, and what `cl-runner report --json` says but for where), and skips cells that have one: their folders may be
# gone by then. Everything behind -- goes to every `cl-runner train`, for example:
#   scripts/sweep.sh --orders order1 --methods "inclora olora" --seeds "1 2 3" -- --preset tiny --output-dir runs
set -uo pipefail

orders="order1" methods="olora" seeds="42" slots="" results=""
varied=("")  # a cell's `--set KEY=VALUE …`, of every combination
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }

# A report, without a path of this machine.
in_a_line() { tr -s ' \n' ' ' <"$1" | sed 's|"run": "[^"]*", *||'; }

vary() {
  local keys parts before=("${varied[@]}") cell value i set
  case "$1" in [a-z]*.*=?*) ;; *) echo "sweep.sh: --vary wants \"section.key=VALUE VALUE …\", not \"$1\"" >&2; exit 2 ;; esac
  IFS=, read -ra keys <<<"${1%%=*}"
  varied=()
  for cell in "${before[@]}"; do
    for value in ${1#*=}; do
      parts=("$value")
      [ ${#keys[@]} -eq 1 ] || IFS=, read -ra parts <<<"$value"
      [ ${#keys[@]} -eq ${#parts[@]} ] || { echo "sweep.sh: --vary ${1%%=*} wants ${#keys[@]} values, not \"$value\"" >&2; exit 2; }
      set=$cell
      for i in "${!keys[@]}"; do set+="${set:+ }${keys[$i]}=${parts[$i]}"; done
      varied+=("$set")
    done
  done
}
while [ $# -gt 0 ]; do
  case "$1" in
    --orders) orders=${2:?--orders needs names} && shift 2 ;;
    --methods) methods=${2:?--methods needs names} && shift 2 ;;
    --seeds) seeds=${2:?--seeds needs numbers} && shift 2 ;;
    --vary) vary "${2:?--vary needs a setting and its values}" && shift 2 ;;
    --results) results=${2:?--results needs a file} && shift 2 ;;
    --slots) slots=${2:?--slots needs a number} && shift 2 ;;
    --) shift && break ;;
    -h | --help) usage && exit 0 ;;
    *) echo "sweep.sh: unknown flag $1 (flags of cl-runner train go behind --)" >&2 && exit 2 ;;
  esac
done

runner=${CL_RUNNER:-cl-runner}
command -v "$runner" >/dev/null || { echo "sweep.sh: there is no $runner on the PATH (set CL_RUNNER)" >&2; exit 2; }

# One slot per visible GPU; on a box without any, one per core (or as many as asked for).
gpus=()
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
fi
slots=${slots:-$([ ${#gpus[@]} -gt 0 ] && echo ${#gpus[@]} || nproc)}
case "$slots" in '' | *[!0-9]* | 0) echo "sweep.sh: --slots must be a number from 1" >&2; exit 2 ;; esac
if [ ${#gpus[@]} -eq 0 ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / slots > 0 ? $(nproc) / slots : 1 ))}
fi

work=$(mktemp -d)
trap 'trap - EXIT; jobs -p | xargs -r kill 2>/dev/null; wait; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

# Slots are lines in a pipe: a run takes one and puts it back.
mkfifo "$work/slots" && exec 9<>"$work/slots"
for ((slot = 0; slot < slots; slot++)); do echo "$slot" >&9; done

total=0 there=0
for order in $orders; do
  named=${order##*/} named=${named%.yaml}
  for method in $methods; do
    for cell in "${varied[@]}"; do
      for seed in $seeds; do
        total=$((total + 1))
        label="$named $method${cell:+ $cell} seed $seed"
        if [ -n "$results" ] && grep -qF "{\"cell\": \"$label\"," "$results" 2>/dev/null; then
          there=$((there + 1))
          continue
        fi
        sets=()
        for setting in $cell; do sets+=(--set "$setting"); done
        read -r -u 9 slot
        (
          log="$work/$total.log" out="$work/$total.json"
          [ ${#gpus[@]} -gt 0 ] && export CUDA_VISIBLE_DEVICES=${gpus[$((slot % ${#gpus[@]}))]}
          [ -n "$results" ] && sets+=(--json)
          echo "start  $label"
          # Standard output only ends the run's report; the screen lines stand in its run.log too.
          "$runner" train --order "$order" --method "$method" --seed "$seed" "${sets[@]}" "$@" \
            >"$out" 2>"$log" </dev/null 9<&- &
          run=$!
          trap 'kill "$run" 2>/dev/null; wait "$run"; exit 130' TERM # bash would leave it running
          if wait "$run"; then
            [ -z "$results" ] || echo "{\"cell\": \"$label\", \"report\": $(in_a_line "$out")}" >>"$results"
            echo "done   $label"
          else
            code=$?
            echo "FAILED $label (exit code $code): $(tail -n 1 "$log")" | tee -a "$work/failed"
          fi
          echo "$slot" >&9
        ) &
      done
    done
  done
done
wait

failed=0
[ -f "$work/failed" ] && failed=$(wc -l <"$work/failed")
skipped=""
[ "$there" -eq 0 ] || skipped=", $there of them before"
echo "sweep: $total runs, $((total - failed)) done$skipped, $failed failed"
[ "$failed" -eq 0 ] || { cat "$work/failed" >&2; exit 1; }
