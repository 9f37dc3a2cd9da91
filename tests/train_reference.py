"""Does training learn what PyTorch learns? One long pretraining run of ours (dropout on) against a PyTorch loop around
../shared/bench/ref_bert.py, from the same first weights, over the very same masked batches (--dump-batches), with the same recipe.
Only dropout's draws differ, so PyTorch with several seeds says how far apart two right runs may end.

  python tests/train_reference.py --bert ./bert --text data/english.txt --work DIR [--seeds 4]         needs torch; on 2 cores some minutes a seed

Prints, a line as soon as it is known:  the mean loss of the last --last steps of ours and of each seed, then ours in standard deviations of
the seeds from their mean. Within about 2 is chance. DIR keeps what was made: a second call goes on with the seeds that lack."""
import argparse, json, math, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ours(args):
    """The run itself; its folder has log.jsonl, and beside it lie the first weights and the batches."""
    start, run, batches = args.work / "start", args.work / "run", args.work / "batches.jsonl"
    bert = lambda *words: subprocess.run([args.bert, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    if not (run / "model.safetensors").exists():
        text = ("--input", args.text, "--batch-tokens", args.batch_tokens, "--dev-split", 0, "--quiet", "--overwrite")
        bert("vocab", "--input", args.text, "--size", args.vocab, "--output", args.work / "vocab", "--quiet", "--overwrite")
        bert("pretrain", *text, "--vocab", args.work / "vocab", "--config", args.config, "--steps", 1, "--lr", 0, "--output", start)
        bert("pretrain", *text, "--init", start, "--steps", args.steps, "--lr", args.lr, "--dump-batches", batches, "--output", run)
    records = [json.loads(line) for line in open(run / "log.jsonl")]
    return [r["loss"] for r in records if "loss" in r and r["step"] > args.steps - args.last], start, batches


def weights(folder, config):
    """The names of ref_bert's Pretrain for those of the folder's file."""
    from ref_bert import load_safetensors
    names = {"cls.predictions.transform.dense": "transform", "cls.predictions.transform.LayerNorm": "ln", "cls.seq_relationship": "nsp"}
    state = {}
    for name, value in load_safetensors(folder / "model.safetensors").items():
        if name == "cls.predictions.bias":
            state["bias"] = value
        elif not name.startswith("cls.predictions.decoder"):
            module, kind = name.rsplit(".", 1)
            state[names.get(module, module) + "." + kind] = value
    return state


def padded(b):
    """A packed batch as rows of one length: ids, mask, segments, and where the masked tokens are among the padded."""
    import torch
    ends = b["offsets"]
    rows = [torch.arange(s, e) for s, e in zip(ends, ends[1:])]
    pad = lambda parts: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    ids, segments = torch.tensor(b["ids"]), torch.tensor(b["segments"])
    mask = pad([torch.ones(len(r)) for r in rows])
    place = mask.reshape(-1).nonzero()[:, 0]                           # of each packed token
    return pad([ids[r] for r in rows]), mask, pad([segments[r] for r in rows]), place[torch.tensor(b["masked"])]


def reference(args, start, batches, seed):
    """The losses of the last steps of the same run in PyTorch."""
    import torch
    from ref_bert import Cfg, Pretrain
    torch.set_num_threads(args.threads)
    config = json.load(open(start / "config.json"))
    model = Pretrain(Cfg(**{k: v for k, v in config.items() if hasattr(Cfg, k)})).train()
    model.load_state_dict(weights(start, config))
    torch.manual_seed(seed)
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n or n.startswith("ln.")]
    decayed = [p for p in model.parameters() if all(p is not q for q in plain)]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], eps=1e-8)
    warmup, losses = round(0.1 * args.steps), []
    for step, line in enumerate(open(batches)):
        b = json.loads(line)
        ids, mask, segments, at = padded(b)
        loss = model(ids, mask, segments, at, torch.tensor(b["masked_labels"]), torch.tensor(b["labels"]))
        rate = (step + 1) / warmup if step < warmup else (args.steps - step) / (args.steps - warmup)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * rate
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return losses[-args.last:]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bert", default=ROOT / "bert")
    p.add_argument("--text", default=ROOT / "data/english.txt")
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--bench", default=ROOT / "../shared/bench", help="where ref_bert.py is")
    p.add_argument("--config", default="tiny")
    for name, value in dict(steps=2000, last=200, seeds=4, batch_tokens=1024, vocab=8000, threads=2).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    p.add_argument("--lr", type=float, default=1e-3)
    args = p.parse_args()
    sys.path.insert(0, str(args.bench))
    args.work.mkdir(parents=True, exist_ok=True)
    mean = lambda x: sum(x) / len(x)
    losses, start, batches = ours(args)
    own = mean(losses)
    print(f"ours\t{own:.5f}", flush=True)
    ends = []
    for seed in range(1, args.seeds + 1):
        known, began = args.work / f"torch-{seed}.json", time.time()
        if not known.exists():
            known.write_text(json.dumps(reference(args, start, batches, seed)))
        ends.append(mean(json.loads(known.read_text())))
        print(f"torch, seed {seed}\t{ends[-1]:.5f}\t{time.time() - began:.0f} s", flush=True)
    if len(ends) > 1:
        deviation = math.sqrt(sum((x - mean(ends)) ** 2 for x in ends) / (len(ends) - 1))
        print(f"ours - torch\t{own - mean(ends):+.5f}\tin standard deviations of the seeds\t{(own - mean(ends)) / deviation:+.2f}")


if __name__ == "__main__":
    main()
