#!/bin/sh
# A Chinese model from nothing: a vocabulary and a small BERT from modern Chinese text, then two tasks of it, and of the same model with
# random weights:   chinese.sh DATA OUTPUT SEEDS [options of bert finetune]
# DATA holds the folders cmrc2018, xquad, chnsenticorp and msra-ner as they are published; of the last two only the training parts are
# pretrained on. Prints rows of tab-separated values: seed, weights, finetune, ours-f32, TASK, metric, value.
set -e
data=$1 out=$2 seeds=$3
shift 3
bert=${BERT:-./bert}
mkdir -p "$out"
if [ ! -e "$out/model/model.safetensors" ]; then
  python3 - "$data" > "$out/text.txt" <<'END'
import json, sys
data = sys.argv[1]
for name in "cmrc2018/cmrc2018_dev.json", "cmrc2018/cmrc2018_trial.json", "xquad/xquad.zh.json":
    for article in json.load(open(f"{data}/{name}", encoding="utf8"))["data"]:
        for paragraph in article["paragraphs"]:
            print(paragraph["context"].replace("\n", " "), end="\n\n")
for row in open(f"{data}/chnsenticorp/train.tsv", encoding="utf8").read().split("\n")[1:]:
    print(row.partition("\t")[2], end="\n\n")
sentences = open(f"{data}/msra-ner/dh_msra.txt", encoding="utf8").read().strip().split("\n\n")
for sentence in sentences[:len(sentences) - 2 * (len(sentences) // 10)]:
    print("".join(line.split("\t")[0] for line in sentence.split("\n")), end="\n\n")
END
  "$bert" vocab --input "$out/text.txt" --size 6000 --output "$out/vocab"
  "$bert" pretrain --input "$out/text.txt" --vocab "$out/vocab" --config tiny --output "$out/model" --overwrite --no-nsp --seed 1 \
    --batch-tokens 2048 --max-length 128 --lr 1e-3 --steps 16000
fi
for seed in $(seq "$seeds"); do
  for weights in pretrained random; do
    scratch=
    [ $weights = pretrained ] || scratch=--from-scratch
    for task in chn msra; do
      LR=${LR:-2e-4} "$(dirname "$0")/finetune_task.sh" $task "$seed" "$out/model" "$data" $scratch "$@" | sed "s/^/$seed	$weights	/"
    done
  done
done
