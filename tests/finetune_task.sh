#!/bin/sh
# One of the standard tasks, fine-tuned with the usual recipe (3 epochs of batches of 32, rate 5e-5; questions: 2 epochs of 16) and scored
# on its dev and test parts:   finetune_task.sh TASK SEED MODEL DATA [options of bert finetune]      LR, EPOCHS: another recipe
# DATA holds the folders sst-tree, trec, glue, conll2003, chnsenticorp, ag-news, msra-ner, squad-v1.1-dev-rebuilt as they are published.
# Prints rows of tab-separated values: finetune, ours-f32, TASK, metric, value.
set -e
task=$1 seed=$2 model=$3 data=$4
shift 4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
epochs=${EPOCHS:-3} batch=32 length=128
case $task in
sst) set -- --task classify --format fasttext --train "$data/sst-tree/stsa.binary.train" --dev "$data/sst-tree/stsa.binary.dev" \
  --test "$data/sst-tree/stsa.binary.test" "$@" ;;
trec) # its files are Latin-1; the first 545 rows of the training file are the dev part
  for part in train test; do iconv -f latin1 -t utf8 "$data/trec/TREC.$part.all" > "$work/$part"; done
  head -n 545 "$work/train" > "$work/dev" && sed -i 1,545d "$work/train"
  set -- --task classify --format fasttext --train "$work/train" --dev "$work/dev" --test "$work/test" "$@" ;;
mrpc) set -- --task classify --format tsv --columns text=3,pair=4,label=0 --train "$data/glue/MRPC/train.tsv" --dev "$data/glue/MRPC/dev.tsv" \
  --test "$data/glue/MRPC/msr_paraphrase_test.labelled.txt" "$@" ;;
cola) set -- --task classify --columns text=3,label=1 --no-header --train "$data/glue/CoLA/train.tsv" --dev "$data/glue/CoLA/dev.tsv" "$@" ;;
stsb) set -- --task regress --columns text=7,pair=8,label=9 --train "$data/glue/STS-B/train.tsv" --dev "$data/glue/STS-B/dev.tsv" "$@" ;;
rte) set -- --task classify --columns text=1,pair=2,label=3 --train "$data/glue/RTE/train.tsv" --dev "$data/glue/RTE/dev.tsv" "$@" ;;
chn) set -- --task classify --columns text=1,label=0 --train "$data/chnsenticorp/train.tsv" --dev "$data/chnsenticorp/dev.tsv" \
  --test "$data/chnsenticorp/test.tsv" "$@" ;;
ag) # 8,000 rows of the development file train, its last 2,001 are the dev part
  head -n 8000 "$data/ag-news/dev.tsv" > "$work/train.tsv" && sed 1,8000d "$data/ag-news/dev.tsv" > "$work/dev.tsv"
  set -- --task classify --columns text=0,label=1 --no-header --train "$work/train.tsv" --dev "$work/dev.tsv" --test "$data/ag-news/test.tsv" "$@" ;;
ner) set -- --task tag --format conll --train "$data/conll2003/train.txt" --dev "$data/conll2003/valid.txt" --test "$data/conll2003/test.txt" "$@" ;;
msra) # in file order 80 % train, 10 % dev, 10 % test
  awk -v RS= -v ORS='\n\n' -v to="$work" '{all[NR] = $0} END {tenth = int(NR / 10)
    for (i = 1; i <= NR; i++) print all[i] > (to "/" (i <= NR - 2 * tenth ? "train" : i <= NR - tenth ? "dev" : "test"))}' "$data/msra-ner/dh_msra.txt"
  set -- --task tag --format conll --train "$work/train" --dev "$work/dev" --test "$work/test" "$@" ;;
qa) # the first 80 % of the articles train, the others are the test
  epochs=${EPOCHS:-2} batch=16 length=384
  python3 - "$data/squad-v1.1-dev-rebuilt/dev-v1.1.rebuilt.json" "$work" <<'END'
import json, sys
all = json.load(open(sys.argv[1], encoding="utf8"))["data"]
first = len(all) * 8 // 10
for part, some in ("train", all[:first]), ("test", all[first:]):
    json.dump({"data": some}, open(f"{sys.argv[2]}/{part}.json", "w"))
END
  set -- --task qa --dev-split 0 --train "$work/train.json" --test "$work/test.json" "$@" ;;
*) echo "no task $task" >&2 && exit 2 ;;
esac
"${BERT:-./bert}" finetune --model "$model" --output "$work/model" --tsv "$task" --seed "$seed" --lr ${LR:-5e-5} --epochs $epochs --batch $batch \
  --max-length $length "$@"
