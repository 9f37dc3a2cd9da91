#!/usr/bin/env python3
"""Writes the Unicode tables of wordpiece.cpp, between its two lines "// ---- generated".

    pip install tokenizers==0.22.2 && tests/make_unicode.py             writes the tables
    tests/make_unicode.py --hashes                                      prints what test_wordpiece.cpp expects of all code points

Every code point is asked of Hugging Face's `tokenizers` itself, because its tables are of several ages (categories of about
Unicode 8, decompositions and combining classes of Unicode 9, lower case of Unicode 17): no single UnicodeData.txt gives its answers.
Python's unicodedata adds only the values of combining classes that never change.
"""
import os
import sys
import unicodedata

import tokenizers
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

COLUMNS = 138
ALL = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def bert(**on):
    off = dict(clean_text=False, handle_chinese_chars=False, strip_accents=False, lowercase=False)
    return normalizers.BertNormalizer(**{**off, **on}).normalize_str


def ranges(points):
    out = []
    for c in points:
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def classes():
    """removed, space, punctuation, chinese: lists of code points."""
    clean, chinese, split = bert(clean_text=True), bert(handle_chinese_chars=True), pre_tokenizers.BertPreTokenizer()
    removed, space, punct, cjk = [], [], [], []
    for c in ALL:
        ch = chr(c)
        if clean(f"a{ch}b") == "ab":
            removed.append(c)
        words = [w for w, _ in split.pre_tokenize_str(f"a{ch}b")]
        if words == ["a", "b"]:
            space.append(c)
        elif words == ["a", ch, "b"]:
            punct.append(c)
        if chinese(ch) == f" {ch} ":
            cjk.append(c)
    return removed, space, punct, cjk


def symbols(known):
    """What Rust's \\w is not, beyond ASCII and the classes already known; unassigned code points are bridged."""
    t = Tokenizer(WordPiece({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
    t.add_tokens([AddedToken("xx", single_word=True, normalized=False)])
    out, going = [], False
    for c in ALL:
        if c < 0x80:
            continue
        if t.encode(chr(c) + "xx").ids[-1] != 2:
            going = False
        elif c not in known and unicodedata.category(chr(c)) != "Cn":
            if going:
                out[-1][1] = c
            else:
                out.append([c, c])
            going = True
    return out


def lower_ranges(lower):
    """[first, last, step, delta] from {code point: lower-case string of one}."""
    out = []
    for c, low in sorted(lower.items()):
        delta = ord(low) - c
        if out and out[-1][3] == delta:
            first, last, step, _ = out[-1]
            if c - last == step or (first == last and c - last == 2):
                out[-1][1:3] = [c, c - last]
                continue
        out.append([c, c, 1, delta])
    return out


def rows(items, before="    ", after=","):
    """Items joined into lines of at most COLUMNS."""
    lines, line = [], before
    for item in items:
        if len(line) + len(item) + len(after) > COLUMNS:
            lines.append(line.rstrip())
            line = before
        line += item + after + " " * (after == ",")
    return "\n".join(lines + [line.rstrip()])


def literal(points, per_line=None):
    """A U"..." literal over several lines."""
    def one(c):
        if 0x20 < c < 0x7F and chr(c) not in '"\\':
            return chr(c)
        if "CJK UNIFIED" in unicodedata.name(chr(c), "") and unicodedata.normalize("NFC", chr(c)) == chr(c):
            return chr(c)
        return f"\\u{c:04X}" if c < 0x10000 else f"\\U{c:08X}"
    lines, line, n = [], "", 0
    for c in points:
        s = one(c)
        if len(line) + len(s) > COLUMNS - 8 or n == per_line:
            lines.append(line)
            line, n = "", 0
        line, n = line + s, n + 1
    return "\n".join(f'    U"{x}"' for x in lines + [line])


def range_table(name, comment, pairs):
    return f"// {comment}\nstatic const Range {name}[] = {{\n{rows([f'{{0x{a:X},0x{b:X}}}' for a, b in pairs])}\n}};\n"


def tables():
    removed, space, punct, cjk = classes()
    strip_f, lower_f, nfd = bert(strip_accents=True), bert(lowercase=True), normalizers.NFD().normalize_str
    strip = {c: strip_f(chr(c)) for c in ALL if strip_f(chr(c)) != chr(c)}
    lower = {c: lower_f(chr(c)) for c in ALL if lower_f(chr(c)) != chr(c)}
    assert [c for c in lower if len(lower[c]) != 1] == [0x130] and lower.pop(0x130) == "i\u0307"
    marks = [c for c in strip if not strip[c]]
    hangul = range(0xAC00, 0xD7A4)
    blocks = [(0xF900, 0xFAD9), (0x2F800, 0x2FA1D)]
    in_block = lambda c: any(a <= c <= b for a, b in blocks)
    assert all(len(strip[c]) == 1 for c in strip if in_block(c))
    single = {c: s for c, s in strip.items() if len(s) == 1 and not in_block(c) and c not in hangul}
    several = {c: s for c, s in strip.items() if len(s) > 1 and c not in hangul}
    # the class of what c decomposes to first; a class above 1 lets U+0334, of class 1, pass before it
    first = lambda c: nfd(chr(c))[0]
    order = lambda c: unicodedata.combining(first(c))
    ordered = {c: order(c) for c in ALL if order(c) == 1 or (order(c) and nfd(f"a{first(c)}\u0334") == f"a\u0334{first(c)}")}
    by_class = [[a, b, k] for k in sorted(set(ordered.values())) for a, b in ranges(c for c in ALL if ordered.get(c) == k)]
    out = [" by tests/make_unicode.py, which says why not from UnicodeData.txt\n// clang-format off\n"
           f'static const char kTablesFrom[] = "tokenizers {tokenizers.__version__}";\n']
    out += [range_table("kRemovedRanges", "Cc, Cf, Co and U+FFFD, but for tab and line ends.", ranges(removed)),
            range_table("kSpaceRanges", "White_Space.", ranges(space)),
            range_table("kPunctuationRanges", "ASCII's own, and category P.", ranges(punct)),
            range_table("kChineseRanges", "Ideographs. U+2B820 to U+2B91F are left out there by a slip of the pen, and so here.", ranges(cjk)),
            range_table("kMarkRanges", "Category Mn: what stripping accents drops.", ranges(marks)),
            range_table("kSymbolRanges", "Neither a letter nor any of the above: what may stand beside a `single_word` token.",
                        symbols(set(removed) | set(space) | set(punct)))]
    out.append("// Marks that canonical order moves, with their combining class.\nstatic const struct { char32_t first, last; int order; } kOrders[] = {\n"
               + rows([f"{{0x{a:X},0x{b:X},{k}}}" for a, b, k in sorted(by_class)]) + "\n};\n")
    out.append("// Lower case: each `step`th code point of the range moves by `delta`.\nstatic const struct { char32_t first, last; int step, delta; } kLower[] = {\n"
               + rows([f"{{0x{a:X},0x{b:X},{s},{d}}}" for a, b, s, d in lower_ranges(lower)]) + "\n};\n")
    out.append("// Decomposed and stripped, where one code point is left: pairs, from and to.\nstatic const char32_t kStripped[] =\n"
               + literal([x for c, s in sorted(single.items()) for x in (c, ord(s))]) + ";\n")
    out.append("// Where two or three are left.\nstatic const struct { char32_t from, to[3]; } kStrippedLong[] = {\n"
               + rows(["{0x%X,{%s}}" % (c, ",".join(f"0x{ord(x):X}" for x in s)) for c, s in sorted(several.items())]) + "\n};\n")
    for a, b in blocks:
        out.append(f"// U+{a:X} to U+{b:X}, compatibility ideographs: what each decomposes to.\nstatic const char32_t kIdeographs{a:X}[] =\n"
                   + literal([ord(strip.get(c, chr(c))) for c in range(a, b + 1)], 44) + ";\n")
    return "".join(out) + "// clang-format on\n"


def hashes():
    """FNV-1a of the words of a<c>b for every code point c: each word's UTF-8 and a byte 1, and a byte 2 after each code point."""
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    for lower, strip, chinese, clean in [(1, None, 1, 1), (0, None, 1, 1), (1, False, 1, 1), (0, True, 1, 1), (1, None, 0, 0), (0, False, 0, 0)]:
        normal = bert(clean_text=bool(clean), handle_chinese_chars=bool(chinese), strip_accents=strip, lowercase=bool(lower))
        h = 0xCBF29CE484222325
        for c in ALL:
            for byte in b"".join(w.encode() + b"\1" for w, _ in split(normal(f"a{chr(c)}b"))) + b"\2":
                h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
        print(f"{{{{{lower}, {'{}' if strip is None else int(strip)}, {chinese}, {clean}}}, 0x{h:016X}u}},")


if __name__ == "__main__":
    if sys.argv[1:] == ["--hashes"]:
        sys.exit(hashes())
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "wordpiece.cpp")
    text = open(path, encoding="utf-8").read()
    head, _, tail = text.split("// ---- generated")
    text = head + "// ---- generated" + tables() + "// ---- generated" + tail
    open(path, "w", encoding="utf-8").write(text)
    sys.exit(0)
