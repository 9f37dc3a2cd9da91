#!/usr/bin/env bash
# One answer per text: the embeddings and logits of 200 real sentences are the same bytes for each binary given, each kernel table,
# 1 and 2 threads, alone and in batches of several sizes; so are those of 60 in bf16 and int8, and of a folder that was quantized.
# usage: one_answer.sh BERT [BERT ...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# Sentences of the repository's own data; a real model where there is one beside the repository, else the golden one.
awk 'NF && ++n <= 200 { print substr($0, 1, 400) }' "$here/../data/english.txt" > "$folder/texts"
for n in 60 12; do head -n $n "$folder/texts" > "$folder/$n-texts"; done
models="$here/golden/models/heads/sequence-classification"
real="$here/../../shared/models/all-MiniLM-L6-v2"
[ ! -d "$real" ] || models="$models $real"

for model in $models; do
  command=predict options=--logits
  [ "$model" != "$real" ] || { command=embed options=; }
  # answer BERT KERNELS THREADS BATCH-TOKENS TEXTS OPTIONS...: as the first answer, of fewer texts its beginning
  answer() {
    local bert=$1 kernels=$2 threads=$3 tokens=$4 texts=$5
    shift 5
    BERT_KERNELS=$kernels "$bert" $command $options --input "$folder/$texts" --long truncate --threads "$threads" \
      --batch-tokens "$tokens" --quiet "$@" > "$folder/answer"
    [ -f "$folder/want" ] || cp "$folder/answer" "$folder/want"
    head -n "$(wc -l < "$folder/$texts")" "$folder/want" | cmp -s - "$folder/answer" || {
      echo "one_answer: $command $*: $bert $kernels threads=$threads batch-tokens=$tokens differs from the first answer"
      exit 1
    }
  }
  said=
  for dtype in f32 bf16 int8; do
    rm -f "$folder/want"
    for bert in "$@"; do
      for kernels in $("$bert" info --json | tr ',' '\n' | grep -o '"kernels_usable":"[^"]*"' | cut -d'"' -f4 | tr ' ' '\n' | tac); do
        texts=texts settings="1,1 1,300 1,4096 2,1 2,300 2,4096"
        # The low precisions differ from f32 in the products alone; the scalar reference is slow: one setting of it is enough.
        [ $dtype = f32 ] || texts=60-texts settings="1,4096 2,1 2,300"
        [ "$kernels" != scalar ] || settings=2,300
        [ "$kernels" != scalar ] || [ $dtype = f32 ] || texts=12-texts
        for setting in $settings; do
          answer "$bert" "$kernels" "${setting%,*}" "${setting#*,}" $texts --model "$model" --dtype $dtype
        done
      done
      [ $dtype != f32 ] || continue
      "$bert" quantize --model "$model" --output "$folder/$dtype" --dtype $dtype --overwrite --quiet
      answer "$bert" "" 2 4096 60-texts --model "$folder/$dtype"
    done
    said="$said $dtype $(sha256sum < "$folder/want" | cut -c1-16)"
  done
  echo "one_answer: $command with $(basename "$model"): one answer:$said"
done
