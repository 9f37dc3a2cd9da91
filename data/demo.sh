#!/usr/bin/env bash
# From raw text to answers on this folder alone: vocabulary, pretraining, masked words, a fine-tuned classifier and, for comparison, the
# same from random weights; both scored on held-out data; three typed sentences.      usage: demo.sh BERT OUTPUT
set -euo pipefail
bert=$1 out=$2
data=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"

began=$(date +%s)
stage() {   # what happens, then the command that does it, shown as one could type it
  local title=$1; shift
  printf '\n== %s\n   %s\n' "$title" "bert ${*//"$data"/data}"
  local start; start=$(date +%s.%N)
  "$bert" "$@"
  awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "   %.1f s\n", b - a }'
}

main_figures() { grep -vE '^(precision|recall|f1_(micro|weighted|[^m]))'; }   # those of single authors are left out

stage "1. A vocabulary of 4,000 word pieces from 1.5 MB of novels" \
  vocab --input "$data/english.txt" --size 4000 --output "$out/vocab" --overwrite
stage "2. Pretraining: masked words and next sentences. loss_dev is on other books; unigram_loss_dev is what guessing by frequency gets" \
  pretrain --input "$data/english.txt" --dev "$data/english-heldout.txt" --vocab "$out/vocab" --config tiny --output "$out/pretrained" \
  --steps 7000 --batch-tokens 512 --max-length 64 --lr 1e-3 --dropout 0 --overwrite
printf 'She [MASK] not know what to say.\nHe took her [MASK] and they went out of the house.\n' > "$out/masked.txt"
stage "3. What may stand at [MASK]? (line, mask, rank, word, probability)" \
  fill-mask --model "$out/pretrained" --top 3 --input "$out/masked.txt"
stage "4. Fine-tuning: who wrote this? Five authors, 2,000 sentences; dev and test are from other books" \
  finetune --task classify --model "$out/pretrained" --train "$data/authors/train.tsv" --dev "$data/authors/dev.tsv" \
  --output "$out/classifier" --epochs 3 --lr 2e-4 --overwrite
stage "5. The same from random weights, for comparison" \
  finetune --task classify --model "$out/pretrained" --from-scratch --train "$data/authors/train.tsv" --dev "$data/authors/dev.tsv" \
  --output "$out/from-scratch" --epochs 3 --lr 2e-4 --overwrite
stage "6. Both on the held-out test set (guessing the commonest author gets 0.2)" \
  evaluate --model "$out/classifier" --input "$data/authors/test.tsv" | main_figures
stage "   from random weights:" \
  evaluate --model "$out/from-scratch" --input "$data/authors/test.tsv" | main_figures
cat > "$out/typed.txt" <<'TEXT'
The steamboat was aground again, and the pilot swore by the great Mississippi that the river had moved in the night.
Miss Bennet was obliged to own that his manners were agreeable, though his conversation was not remarkable for good sense.
The old clerk, who had not smiled since Michaelmas, rubbed his hands before the fire and looked at the boy with a kind of ferocious benevolence.
TEXT
stage "7. Three sentences that nobody has labelled (author, probability)" \
  predict --model "$out/classifier" --input "$out/typed.txt"

printf '\nAll of it took %s s. The curves: %s/pretrained/report.html and %s/classifier/report.html\n' $(($(date +%s) - began)) "$out" "$out"
