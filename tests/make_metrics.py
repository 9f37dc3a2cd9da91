#!/usr/bin/env python3
"""Writes tests/golden/metrics: made-up predictions and what the reference scores make of them.

    pip install scikit-learn scipy seqeval && python3 tests/make_metrics.py

classes.json    scikit-learn's figures of classes and of several labels           numbers.json   scipy's Pearson and Spearman
tags.jsonl      tag sequences, legal and not, with seqeval's entities             tags.json      seqeval's figures of each group of them
answers.jsonl   answers with their SQuAD scores                                   answers.json   of all together, and the best threshold
ranks.json      cosine ranks, counted by numpy

The SQuAD scores are those of the rules in the official evaluate-v2.0.py, written out below: normalize_answer, get_tokens, compute_exact,
compute_f1, get_raw_scores, find_best_thresh and apply_no_ans_threshold do what the script's functions of these names do. seqeval knows no
BILOU outside of its strict mode: U- and L- are given to it as S- and E-.
"""
import collections
import json
import os
import random
import re
import string
import warnings

import numpy
import scipy.stats
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.metrics import sequence_labeling as default
from seqeval.metrics import v1 as strict
from seqeval import scheme as schemes
from sklearn import metrics

warnings.filterwarnings("ignore")
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "metrics")
rng = random.Random(6)


def write(name, text):
    with open(os.path.join(FOLDER, name), "w", encoding="utf-8", newline="\n") as f:
        f.write(text)


def dump(x):
    return json.dumps(x, ensure_ascii=False, separators=(",", ":")) + "\n"


# ---- classes, labels, numbers
def averages(is_, said, labels, ways):
    """Figures of all labels by `ways`, then of each."""
    out = {}
    for way in ways:
        p, r, f, _ = metrics.precision_recall_fscore_support(is_, said, average=way, zero_division=0)
        out |= {f"precision_{way}": p, f"recall_{way}": r, f"f1_{way}": f}
    each = metrics.precision_recall_fscore_support(is_, said, labels=labels, average=None, zero_division=0)
    for k, name in enumerate(["precision", "recall", "f1"]):
        out |= {f"{name}_L{c}": float(each[k][c]) for c in labels}
    return {k: float(v) for k, v in out.items()}


def classes():
    cases = []
    for C, n, right in [(2, 60, .8), (2, 7, 0), (3, 80, .6), (5, 200, .4), (6, 12, .3), (25, 100, .5)]:
        used = range(C - 1) if C == 6 else range(C)   # one class never occurs
        is_ = [rng.choice(used) for _ in range(n)]
        said = [t if rng.random() < right else rng.choice(used) for t in is_]
        want = {"accuracy": metrics.accuracy_score(is_, said), "mcc": metrics.matthews_corrcoef(is_, said)}
        if C == 2:
            for name, f in [("f1", metrics.f1_score), ("precision", metrics.precision_score), ("recall", metrics.recall_score)]:
                want[name] = f(is_, said, zero_division=0)
        every = averages(is_, said, list(range(C)), ["micro", "macro", "weighted"])
        want |= {k: v for k, v in every.items() if C <= 20 or "_L" not in k}
        matrix = metrics.confusion_matrix(is_, said, labels=list(range(C))).ravel()
        cases.append({"task": "classify", "classes": C, "is": is_, "said": said, "confusion": [int(x) for x in matrix],
                      "metrics": {k: float(v) for k, v in want.items()}})
    for C, n, p in [(3, 40, .4), (6, 90, .2), (4, 5, 0)]:
        is_ = [[int(rng.random() < p) for _ in range(C)] for _ in range(n)]
        said = [[t if rng.random() < .8 else 1 - t for t in row] for row in is_]
        want = averages(numpy.array(is_), numpy.array(said), list(range(C)), ["micro", "macro", "weighted"])
        want["exact"] = float(metrics.accuracy_score(numpy.array(is_), numpy.array(said)))
        cases.append({"task": "multilabel", "classes": C, "is": is_, "said": said, "metrics": want})
    write("classes.json", "[" + ",\n".join(dump(c).strip() for c in cases) + "]\n")


def numbers():
    cases = []
    for n, grid in [(50, 1024), (200, 4), (30, 2), (3, 8)]:   # a coarse grid: many ties. Every number is a float32
        x = [rng.randrange(-4 * grid, 4 * grid) / grid for _ in range(n)]
        y = [round((a + rng.gauss(0, 2)) * grid) / grid for a in x]
        cases.append({"said": x, "is": y, "pearson": float(scipy.stats.pearsonr(x, y)[0]), "spearman": float(scipy.stats.spearmanr(x, y)[0])})
    write("numbers.json", "[" + ",\n".join(dump(c).strip() for c in cases) + "]\n")


def ranks():
    g = numpy.random.default_rng(6)
    n, D = 600, 4
    draw = lambda rows: g.integers(-999, 1000, (rows, D)) / 256
    unit = lambda v: v / numpy.sqrt((v * v).sum(1, keepdims=True))
    c = draw(n)
    c[500:560] = c[:60]                      # candidates that are the same tie
    q = numpy.where(g.random((n, 1)) < .5, c + draw(n) / 8, draw(n))
    same = (c[:, None] == c[None]).all(2)
    while True:                              # what float32 would round to a tie is drawn anew
        cosines = unit(q) @ unit(c).T
        gap = numpy.where(same, 1, abs(cosines - numpy.diag(cosines)[:, None])).min(1)
        if gap.min() > 2e-6:
            break
        q[gap <= 2e-6] = draw((gap <= 2e-6).sum())
    nearer = (same | (cosines > numpy.diag(cosines)[:, None])).sum(1) - 1
    write("ranks.json", dump({"queries": q.tolist(), "candidates": c.tolist(), "mrr": float((1 / (nearer + 1)).mean()),
                              "recall_1": float((nearer < 1).mean()), "recall_10": float((nearer < 10).mean())}))


# ---- tags
def legal(scheme, types, n):
    tags, before = [], None
    while len(tags) < n:
        if rng.random() < .5:
            tags, before = tags + ["O"], None
            continue
        t, k = rng.choice(types), min(rng.randint(1, 3), n - len(tags))
        if scheme == "IOB1":
            tags += ["B-" + t if before == t else "I-" + t] + ["I-" + t] * (k - 1)
        elif scheme == "IOB2":
            tags += ["B-" + t] + ["I-" + t] * (k - 1)
        else:
            tags += ["S-" + t] if k == 1 else ["B-" + t] + ["I-" + t] * (k - 2) + ["E-" + t]
        before = t
    return tags


def spoil(tags, all_tags, share):
    return [rng.choice(all_tags) if rng.random() < share else t for t in tags]


def tags():
    lines, groups = [], []
    kinds = [("IOB2", 300, 0, "IOB2"), ("IOB2", 200, .3, "IOB2"), ("IOB1", 200, 0, "IOB1"), ("IOBES", 100, 0, "IOBES"),
             ("IOBES", 100, .3, "IOBES"), ("BILOU", 100, .2, "IOBES")]
    bilou = lambda t: {"S": "U", "E": "L"}.get(t[0], t[0]) + t[1:]
    for g, (name, count, wrong, scored_as) in enumerate(kinds):
        types = ["PER", "LOC", "ORG", "B-MISC"][:2 + g % 3]
        prefixes = "BIES" if scored_as == "IOBES" else "BI"
        every = ["O"] + [f"{p}-{t}" for p in prefixes for t in types]
        is_, said = [], []
        for _ in range(count):
            t = spoil(legal("IOBES" if name == "BILOU" else name, types, rng.randint(1, 10)), every, wrong)
            is_.append(t), said.append(spoil(t, every, rng.choice([0, .2, 1])))
        want = {"entity_f1": default.f1_score(is_, said), "precision": default.precision_score(is_, said),
                "recall": default.recall_score(is_, said), "accuracy": default.accuracy_score(is_, said)}
        for t, v in zip(sorted({e[0] for s in is_ + said for e in get_entities(s)}), default.f1_score(is_, said, average=None)):
            want["f1_" + t] = v
        if scored_as != "IOB1":
            assert schemes.auto_detect(is_) is getattr(schemes, scored_as)
        want["entity_f1_strict"] = strict.precision_recall_fscore_support(is_, said, average="micro", scheme=getattr(schemes, scored_as))[2]
        out = bilou if name == "BILOU" else str
        groups.append({"scheme": name, "labels": [out(t) for t in every], "metrics": {k: float(v) for k, v in want.items()}})
        for a, b in zip(is_, said):
            found = [[t, begin, end + 1] for t, begin, end in get_entities(b)]
            lines.append(dump({"group": g, "is": " ".join(map(out, a)), "said": " ".join(map(out, b)), "found": found}))
    write("tags.jsonl", "".join(lines))
    write("tags.json", "[" + ",\n".join(dump(x).strip() for x in groups) + "]\n")


# ---- answers: SQuAD's rules
def normalize_answer(s):
    s = "".join(c for c in s.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s).split())


def get_tokens(s):
    return normalize_answer(s).split() if s else []


def compute_exact(gold, said):
    return int(normalize_answer(gold) == normalize_answer(said))


def compute_f1(gold, said):
    gold, said = get_tokens(gold), get_tokens(said)
    same = sum((collections.Counter(gold) & collections.Counter(said)).values())
    if not gold or not said:
        return int(gold == said)
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(said), 1.0 * same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def get_raw_scores(said, answers):
    golds = [a for a in answers if normalize_answer(a)] or [""]
    return max(compute_exact(a, said) for a in golds), max(compute_f1(a, said) for a in golds)


def find_best_thresh(rows):
    """The script's, on the margin in place of a probability, which is never below 0: its first threshold, 0, is below all of them."""
    score = best = sum(not r["answers"] for r in rows)
    threshold = min(r["margin"] for r in rows) - 1
    for r in sorted(rows, key=lambda r: r["margin"]):
        score += r["f1"] if r["answers"] else -1 if r["said"] else 0
        if score > best:
            best, threshold = score, r["margin"]
    return threshold, best / len(rows)


def answers():
    words = ["the", "The", "a", "an", "A", "THE", "tower", "Tower,", "of", "London", "1,066", "$5", "U.S.", "don't", "Émile", "ÉMILE", "Straße",
             "ΟΔΟΣ", "οδος", "οδός", "Москва", "МОСКВА", "北京", "北京。", "東京the", "“the", "end”", "a–b", "the—", "(an)", "co-op", "İzmir",
             "x_a", "a's", "theatre", "an.", "naïve", "e\u0301", "a\u0301", "½", "½a", "a°", "€5", "the™", "n²", "\u00a0", "\u3000", "\t",
             "\n", " ", "😀", "the😀", "ǅ", "Ⅷ", "ÅNGSTRÖM", "ångström", "ПЁТР", "пётр", "¿Qué?", "a\u200bb", "\x1ca", "!", "--", ".", "3.5%"]
    phrase = lambda k: " ".join(rng.choice(words) for _ in range(k))
    rows = []
    for i in range(500):
        golds = [phrase(rng.randint(1, 5)) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
        said = phrase(rng.randint(0, 4))
        if golds and rng.random() < .7:   # near a right one: a part, another case, more articles and punctuation
            parts = rng.choice(golds).split(" ")
            a = rng.randrange(len(parts))
            said = rng.choice(["", "the ", "\"", "A "]) + " ".join(parts[a:] if rng.random() < .4 else parts) + rng.choice(["", ".", "  ", " an"])
            said = rng.choice([str, str.lower, str.upper])(said)
        if not golds and not normalize_answer(said):
            said = ""   # find_best_thresh takes "the" for an answer, get_raw_scores does not
        exact, f1 = get_raw_scores(said, golds)
        rows.append({"said": said, "answers": golds, "exact": exact, "f1": f1, "margin": rng.gauss(1 if not golds else -1, 2)})
    total = lambda rows, k: sum(r[k] for r in rows) / len(rows)
    threshold, best = find_best_thresh(rows)
    null = [{**r, **({"exact": float(not r["answers"]), "f1": float(not r["answers"])} if r["margin"] > threshold else {})} for r in rows]
    out = {"threshold": threshold, "f1_at_best": best}
    for name, some in [("as_they_are", rows), ("at_threshold", null)]:
        has, no = [r for r in some if r["answers"]], [r for r in some if not r["answers"]]
        out[name] = {"exact": total(some, "exact"), "f1": total(some, "f1"), "has_answer_exact": total(has, "exact"),
                     "has_answer_f1": total(has, "f1"), "no_answer_exact": total(no, "exact"), "no_answer_f1": total(no, "f1")}
    write("answers.jsonl", "".join(map(dump, rows)))
    write("answers.json", dump(out))


if __name__ == "__main__":
    os.makedirs(FOLDER, exist_ok=True)
    for make in [classes, numbers, ranks, tags, answers]:
        make()
