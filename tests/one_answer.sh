#!/usr/bin/env bash
# One answer per text: the embeddings and logits of 200 real sentences are the same bytes for each binary given, each kernel table,
# 1 and 2 threads, alone and in batches of several sizes.      usage: one_answer.sh BERT [BERT ...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# Sentences of the repository's own data; a real model where there is one beside the repository, else the golden one.
awk 'NF && ++n <= 200 { print substr($0, 1, 400) }' "$here/../data/english.txt" > "$folder/texts"
models="$here/golden/models/heads/sequence-classification"
real="$here/../../shared/models/all-MiniLM-L6-v2"
[ ! -d "$real" ] || models="$models $real"

want=
for model in $models; do
  command=predict options=--logits
  [ "$model" != "$real" ] || { command=embed options=; }
  want=
  check() {   # what, bytes
    [ -n "$want" ] || want=$2
    [ "$2" = "$want" ] || { echo "one_answer: $command: $1 differs from the first answer"; exit 1; }
  }
  for bert in "$@"; do
    for kernels in $("$bert" info --json | tr ',' '\n' | grep -o '"kernels_usable":"[^"]*"' | cut -d'"' -f4); do
      for threads in 1 2; do
        for tokens in 1 300 4096; do
          # the scalar reference is slow: one setting of it is enough
          [ "$kernels" != scalar ] || [ "$threads $tokens" = "2 300" ] || continue
          sum=$(BERT_KERNELS=$kernels "$bert" $command --model "$model" $options --input "$folder/texts" --long truncate --threads $threads --batch-tokens $tokens --quiet | sha256sum)
          check "$bert $kernels threads=$threads batch-tokens=$tokens" "$sum"
        done
      done
    done
  done
  echo "one_answer: $command with $(basename "$model"): one answer, $(echo "$want" | cut -c1-16)"
done
