#!/usr/bin/env python3
"""Makes the files of this folder:  pip install tokenizers==0.22.2 numpy && python3 make.py GOLDEN

GOLDEN is the folder of all golden tokenizer cases (README.md here says which of them were taken). Texts come from there, answers from
the installed `tokenizers`, with the two small vocabularies of this folder. The same input gives the same bytes.
"""
import base64
import json
import os
import random
import shutil
import sys

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

FROM, HERE = sys.argv[1], os.path.dirname(os.path.abspath(__file__))
MAY_PASS_ON = ("gutenberg", "xquad", "squad", "cmrc2018", "spam", "tang-poems", "hand", "long", "special", "random")
SPECIALS = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
rng = random.Random(1)


def read(name):
    with open(os.path.join(FROM, name), encoding="ascii") as f:
        return [json.loads(line) for line in f]


def write(name, cases):
    with open(os.path.join(HERE, name), "w", encoding="ascii", newline="\n") as f:
        for c in cases:
            f.write(json.dumps(c, separators=(",", ":")) + "\n")


def may_pass_on(case):
    return case["source"].startswith(MAY_PASS_ON)


def tokenizer(vocab, clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=None):
    v = WordPiece.read_file(os.path.join(HERE, f"vocab-{vocab}.txt"))
    t = Tokenizer(WordPiece(v, unk_token="[UNK]"))
    t.normalizer = BertNormalizer(clean_text, handle_chinese_chars, strip_accents, vocab == "uncased" if lowercase is None else lowercase)
    t.pre_tokenizer = BertPreTokenizer()
    t.decoder = decoders.WordPiece(prefix="##")
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in SPECIALS])
    t.post_processor = TemplateProcessing(single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
                                          special_tokens=[(x, v[x]) for x in ("[CLS]", "[SEP]")])
    return t


def byte_offsets(e, texts, words=None):
    out = []
    for (a, b), s, w in zip(e.offsets, e.sequence_ids, e.word_ids):
        text = "" if s is None else texts[s] if words is None else words[s][w]
        out.append([len(text[:a].encode()), len(text[:b].encode())])
    return out


def answer(e, texts, chars=True):
    out = dict(ids=e.ids, offsets_byte=byte_offsets(e, texts), word_ids=e.word_ids, type_ids=e.type_ids, special_tokens_mask=e.special_tokens_mask)
    if chars:
        out["offsets_char"] = [list(o) for o in e.offsets]
    return out


def encode_file():
    cases = []
    settings = ["clean_text", "handle_chinese_chars", "strip_accents", "lowercase"]
    for file, vocab, count in (("encode-uncased", "uncased", 100), ("encode-cased", "cased", 50), ("encode-nostrip", None, 60)):
        able = [c for c in read(file + ".jsonl") if may_pass_on(c) and len(c["text"]) < 300]
        for c in rng.sample(able, count):
            own = {k: c[k] for k in settings} if vocab is None else dict(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=vocab == "uncased")
            which = vocab or ("cased" if c["vocab"] == "cased" else "uncased")
            t = tokenizer(which, **own)
            t.encode_special_tokens = not c["special_in_text"]
            e = t.encode(c["text"], add_special_tokens=c["add_special_tokens"])
            cases.append(dict(vocab=which, **own, text=c["text"], source=c["source"], add_special_tokens=c["add_special_tokens"],
                              special_in_text=c["special_in_text"], **answer(e, [c["text"]], len(cases) % 4 == 0)))
    write("encode.jsonl", cases)


def pairs_file():
    cases = []
    t = tokenizer("uncased")
    able = [c for c in read("pairs.jsonl") if c["source"] in ("hand", "lengths")]
    for c in rng.sample(able, 50):
        texts = [c["text"]] + ([] if c["pair"] is None else [c["pair"]])
        case = {k: c[k] for k in ("text", "pair", "max_length", "strategy", "direction", "stride", "add_special_tokens")}
        case.update(tokenizer="uncased", error=None)
        t.no_truncation()
        try:
            if c["max_length"] is not None:
                t.enable_truncation(c["max_length"], stride=c["stride"], strategy=c["strategy"], direction=c["direction"])
            e = t.encode(*texts, add_special_tokens=c["add_special_tokens"])
            windows = [e] + list(e.overflowing)
            case["windows"] = [dict(answer(w, texts, False), sequence_ids=w.sequence_ids) for w in windows]
        except BaseException as x:
            m = str(x)
            case["error"] = ("too_short" if "too short" in m else "no_second_text" if "Second sequence not provided" in m else "stride_too_large")
            assert case["error"] != "stride_too_large" or "stride" in m, m
        cases.append(case)
    write("pairs.jsonl", cases)


def other_files():
    t, texts = tokenizer("uncased"), [c["text"] for c in read("encode-uncased.jsonl") if c["source"] == "hand"]
    cases = []
    for i in range(60):
        ids = t.encode(rng.choice(texts) + rng.choice([".", " ,", "?", "!", " 's"])).ids[-30:] if i % 2 else [rng.randrange(1500) for _ in range(rng.randrange(12))]
        skip, cleanup = rng.random() < .5, rng.random() < .7
        t.decoder = decoders.WordPiece(prefix="##", cleanup=cleanup)
        cases.append(dict(tokenizer="uncased", ids=ids, skip_special_tokens=skip, cleanup=cleanup, text=t.decode(ids, skip_special_tokens=skip)))
    write("decode.jsonl", cases)
    cases = []
    for c in read("pretokenized.jsonl")[::2]:
        if not may_pass_on(c):
            continue
        which = "cased" if c["tokenizer"] == "cased" else "uncased"
        sides = [c["words"]] + ([] if c["pair_words"] is None else [c["pair_words"]])
        e = tokenizer(which).encode(*sides, is_pretokenized=True, add_special_tokens=c["add_special_tokens"])
        cases.append(dict(tokenizer=which, words=c["words"], pair_words=c["pair_words"], add_special_tokens=c["add_special_tokens"], source=c["source"],
                          ids=e.ids, type_ids=e.type_ids, word_ids=e.word_ids, sequence_ids=e.sequence_ids, special_tokens_mask=e.special_tokens_mask,
                          offsets_byte=byte_offsets(e, None, sides)))
    write("pretokenized.jsonl", cases)
    cases = []
    for c in read("bad-utf8.jsonl"):
        raw, text = base64.b64decode(c["bytes_base64"]), c["repaired"]
        assert raw.decode("utf-8", errors="replace") == text
        cases.append(dict(bytes_base64=c["bytes_base64"], tokenizer="uncased", repaired=text, ids=tokenizer("uncased").encode(text).ids))
    write("bad-utf8.jsonl", cases)


def copies():
    shutil.copy(os.path.join(FROM, "vocab-cased.txt"), HERE)
    small = json.load(open(os.path.join(FROM, "tokenizer_json", "uncased", "tokenizer.json"), encoding="utf-8"))["model"]["vocab"]
    with open(os.path.join(HERE, "vocab-uncased.txt"), "w", encoding="utf-8", newline="\n") as f:
        f.write("".join(piece + "\n" for piece in sorted(small, key=small.get)))
    for name in ("uncased-only-second-left",):
        os.makedirs(os.path.join(HERE, name), exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "cases.jsonl"):
            shutil.copyfile(os.path.join(FROM, "tokenizer_json", name, file), os.path.join(HERE, name, file))
    os.makedirs(os.path.join(HERE, "vocab-files"), exist_ok=True)
    for file in sorted(os.listdir(os.path.join(FROM, "vocab-files"))):
        if file != "expected.jsonl":
            shutil.copyfile(os.path.join(FROM, "vocab-files", file), os.path.join(HERE, "vocab-files", file))
    keep = ("file", "vocab", "error")
    write("vocab-files/expected.jsonl", [{**{k: c[k] for k in keep}, "texts": c["texts"],
                                          "encodings": c["encodings"] and [{k: e[k] for k in ("ids", "error")} for e in c["encodings"]]}
                                         for c in read("vocab-files/expected.jsonl")])


ADDED = [("[E1]", dict(special=True, normalized=False)), ("<r>", dict(rstrip=True, normalized=False)), ("<L>", dict(lstrip=True, normalized=True)),
         ("New York", dict(single_word=True, normalized=True)), ("ab", dict(single_word=True, normalized=False)), ("xx", dict(normalized=False)),
         ("xxx", dict(normalized=False)), ("xxxyz", dict(special=True, normalized=False)), ("\u00c9t\u00e9", dict(normalized=True)),
         ("\u6771\u4eac", dict(normalized=True)), ("say", dict(single_word=True, lstrip=True, rstrip=True, normalized=True))]
ADDED_TEXTS = ["in New York now", "new  york", "NEW YORK", "New Yorker", "anew york", "x-New York-y", "new york\u20ac", "\u20acnew york", "new york\U0001f600", "New York_",
               "new york\u0301", "ab", "cab abc ab.", "ab\u2460 \u2460ab", "ab\u4e2d", "\u00e9ab ab\u00e9", "ab\u200d", "\u200bab", "ab\u203f", "x xx xxx xxxx xxxxx xxxxxx", "xxxyz xxxy xxyz",
               "a <r>  \t b<r>", "<r> <r>  <r>", "a  <L> b", "a<l>b", " \u00a0<L>", "[MASK]  [MASK]", "a \n[MASK]", "  [MASK]  <r>  [MASK]", "\u00c9T\u00c9 ete e\u0301te\u0301 \u00e9t\u00e9s",
               "\u6771\u4eac \u6771 \u4eac", "\u5927\u6771\u4eac\u90fd", "[E1]New York[E1]", "[e1] [E1", "[PAD][E1]ab[SEP]", "\u0000new york\u0000", "nEw\u200b yOrk", "[MASK]\u0301x",
               "I say  , say", "essay say", "  say  say  ", "say[MASK] say<r> say", "xx\ud7ff\ue000xx", "", " ", "<r", "<L><L>", "new york new york", "xx[MASK]xxx"]


def added_file():
    t = tokenizer("uncased")
    t.add_tokens([AddedToken("[MASK]", lstrip=True, special=True, normalized=False)])
    for content, how in ADDED:
        (t.add_special_tokens if how.get("special") else t.add_tokens)([AddedToken(content, **how)])
    os.makedirs(os.path.join(HERE, "added-tokens"), exist_ok=True)
    t.save(os.path.join(HERE, "added-tokens", "tokenizer.json"), pretty=False)
    t = Tokenizer.from_file(os.path.join(HERE, "added-tokens", "tokenizer.json"))
    cases = []
    for text in ADDED_TEXTS:
        for special in (True, False):
            t.encode_special_tokens = not special
            e = t.encode(text, add_special_tokens=special)
            cases.append(dict(text=text, special_in_text=special, add_special_tokens=special, **answer(e, [text])))
    write("added-tokens/cases.jsonl", cases)


copies()
added_file()
encode_file()
pairs_file()
other_files()
