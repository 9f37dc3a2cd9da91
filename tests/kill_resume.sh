#!/usr/bin/env bash
# kill -9 at random moments of training: the folder loads, or says that nothing was saved yet; the resumed run ends with the same
# model and state bytes as one that was never stopped.      usage: kill_resume.sh BERT [TIMES]
set -euo pipefail
bert=$1 times=${2:-50}
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
head -c 200000 "$here/../data/english.txt" > text
case "$bert" in /*) ;; *) bert="$here/../$bert" ;; esac
"$bert" vocab --input text --size 1000 --output vocab --quiet
run() { exec "$bert" pretrain --input text --vocab vocab --config tiny --output "$1" --steps 60 --batch-tokens 512 --phases 32:0.6,64:0.4 --save-every 7 --quiet "${@:2}"; }
train() { (run "$@") > /dev/null; }
began=$(date +%s.%N)
train whole
took=$(awk -v a="$began" -v b="$(date +%s.%N)" 'BEGIN { print b - a }')
saved=0 nothing=0
for i in $(seq "$times"); do
  rm -rf cut cut.shards
  run cut > /dev/null 2>&1 &   # in the background `run` is bert itself: the pid to kill
  pid=$!
  sleep "$(awk -v seed="$RANDOM" -v took="$took" 'BEGIN { srand(seed); print rand() * took }')"
  kill -9 $pid 2>/dev/null || true
  wait $pid 2>/dev/null || true
  if [ -e cut/training_state.safetensors ]; then
    saved=$((saved + 1))
    # it loads, or was killed between its first state and its first model, and says so
    "$bert" info --model cut > /dev/null 2> message || grep -q "no model yet; go on" message || { echo "kill_resume: $(cat message)"; exit 1; }
    train cut --resume
  else
    nothing=$((nothing + 1))
    if train cut --resume 2> message; then :; else grep -qE "nothing was saved|no such folder" message || { echo "kill_resume: $(cat message)"; exit 1; }; rm -rf cut; train cut; fi
  fi
  for f in model.safetensors training_state.safetensors; do
    cmp -s whole/$f cut/$f || { echo "kill_resume: $f differs after kill $i"; exit 1; }
  done
done
echo "kill_resume: $times kills, $saved with a saved state, $nothing before the first; all ended with the same bytes"
