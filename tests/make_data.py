#!/usr/bin/env python3
"""Makes the files of data/ from their sources:  python3 tests/make_data.py SOURCES data

SOURCES holds   gutenberg/corpus.txt                     books of Project Gutenberg, a paragraph a line, a blank line between books
                spam/{train,dev,test}.tsv                SpamAssassin's public corpus, `label TAB text`
                squad-v1.1-dev-rebuilt/dev-v1.1.rebuilt.json
                cmrc2018/cmrc2018_{dev,trial}.json
data/README.md says what comes out and under which licence. The same sources give the same bytes. Standard library only.
"""
import json
import os
import random
import re
import sys

# One piece of each of these, from START of the book on, makes english.txt.
ENGLISH = ["MANSFIELD PARK", "A TALE OF TWO CITIES", "CRIME AND PUNISHMENT", "MOBY-DICK", "JANE EYRE", "NO NAME", "THE MYSTERIOUS ISLAND",
           "TONO-BUNGAY", "A CONNECTICUT YANKEE", "The Return of Sherlock Holmes", "THE VOYAGE OF THE BEA"]
START = .3
ENGLISH_PIECE = 143_000     # bytes of each
HELDOUT = ["THE WHITE COMPANY", "Transcriber’s Note ##", "The Last Man", "THE COUNTRY OF THE BLIND"]   # the second: Dracula
HELDOUT_PIECE = 24_000
# Author: books to train on, the book of dev (first half) and test (second half). Another book, so that no character's name gives the
# author away.
AUTHORS = {
    "austen": (["EMMA", "SENSE AND SENSIBILITY"], "PRIDE AND PREJUDICE"),
    "collins": (["The Woman in White", "ARMADALE"], "THE MOONSTONE"),
    "dickens": (["DAVID COPPERFIELD", "GREAT EXPECTATIONS"], "OLIVER TWIST"),
    "hardy": (["THE RETURN OF THE NATIVE"], "THE MAYOR OF CASTERBRIDGE"),
    "twain": (["INNOCENTS ABROAD", "LIFE ON THE MISSISSIPPI"], "ROUGHING IT"),
}
QUESTION_WORDS = ["who", "when", "where", "why", "how many", "how", "which", "what"]


def write(path, lines):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    text = "".join(line + "\n" for line in lines)
    assert "\r" not in text and "\ufffd" not in text
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)


def write_rows(path, header, rows):
    for row in rows:
        assert all(field and field == clean(field) for field in row), row
    write(path, ["\t".join(row) for row in [header] + rows])


def clean(text):
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())


def cut(text, limit):
    """The first `limit` characters, back to the end of a sentence, else of a word."""
    if len(text) <= limit:
        return text
    ends = [m.end() for m in re.finditer(r"[.!?]['\"”’]?(?= )", text[:limit + 1])]
    return text[:ends[-1]] if ends and ends[-1] > limit // 2 else text[:limit + 1].rsplit(" ", 1)[0]


# ---- books ----------------------------------------------------------------------------------------------------------
def read_books(path):
    with open(path, encoding="utf-8") as f:
        return [book.split("\n") for book in f.read().strip("\n").split("\n\n")]


def book_of(books, title):
    found = [b for b in books if any(title in line for line in b[:3])]
    assert len(found) == 1, (title, len(found))
    return found[0]


HEADING = re.compile(r"(CHAPTER|BOOK|PART|VOLUME|SCENE|EPOCH|PHASE|THE (FIRST|SECOND|THIRD) )\b|[IVXLC]+\.?$", re.I)
EDITION = re.compile(r"gutenberg|e-?text|produced by|transcri|proofread|\[illustration|\[footnote|\[picture|copyright", re.I)


def paragraphs(book):
    """Its paragraphs, None where a chapter begins. Headings, notes of the edition and rules of asterisks go."""
    out = []
    for line in book:
        text = clean(line.replace("_", ""))
        if HEADING.match(text) and len(text) < 80:
            out.append(None)
        elif text and not EDITION.search(text) and not text.isupper() and re.search("[a-z]{2}", text):
            out.append(text)
    return out


def piece(book, size):
    """About `size` bytes of whole chapters as documents; a chapter of over 200 paragraphs is cut."""
    lines = paragraphs(book)
    at = int(len(lines) * START)
    while at + 1 < len(lines) and lines[at] is not None and None in lines[at:]:
        at += 1
    documents, now, used = [], [], 0
    for text in lines[at:] + [None]:
        if text is None or len(now) == 200 or used >= size:
            if len(now) >= 5:
                documents.append(now)
            now = []
        if used >= size:
            break
        if text is not None:
            now.append(text)
            used += len(text.encode()) + 1
    return documents


def join_documents(documents):
    return [line for i, d in enumerate(documents) for line in ([""] if i else []) + d]


def make_english(books, out):
    for name, titles, size in (("english.txt", ENGLISH, ENGLISH_PIECE), ("english-heldout.txt", HELDOUT, HELDOUT_PIECE)):
        documents = [d for title in titles for d in piece(book_of(books, title), size)]
        write(f"{out}/{name}", join_documents(documents))


def make_authors(books, out):
    rng = random.Random(1)
    parts = {"train": [], "dev": [], "test": []}

    def take(texts, author, part, n):
        rows = [(cut(t, 205), author) for t in texts if t and 120 <= len(t) <= 900]
        parts[part] += rng.sample(rows, n)
    for author, (train, other) in AUTHORS.items():
        for title in train:
            lines = paragraphs(book_of(books, title))
            take(lines[len(lines) // 20:], author, "train", 400 // len(train))
        lines = paragraphs(book_of(books, other))[50:]
        half = len(lines) // 2
        take(lines[:half - 20], author, "dev", 80)
        take(lines[half + 20:], author, "test", 80)
    for part, rows in parts.items():
        rng.shuffle(rows)
        write_rows(f"{out}/authors/{part}.tsv", ("text", "label"), rows)


# ---- spam -----------------------------------------------------------------------------------------------------------
MAIL = re.compile(r"\S+@\S+|\S+ at \S+ dot \S+")
LINK = re.compile(r"(https?:|ftp:|www\.)\S*|\S+\.(com|net|org|edu|gov|de|uk|ie|info|biz|co)\b\S*", re.I)
NUMBER = re.compile(r"\+?\(?\d[\d ().-]{6,}\d")          # telephone numbers, and whatever looks like one
FEED = re.compile(r"URL: \(link\) Date: (\(number\)\S*|Not supplied|\S+) ?|(?<=\. )URL: \(link\) ?")   # a news feed's form, always ham
RUDE = re.compile(r"\b("
                  r"sex\w*|porn\w*|xxx\w*|nud\w+|naked|viagra|penis|erect\w+|orgasm\w*|virgin\w*|teen\w*|slut\w*|fuck\w*|shit\w*|"
                  r"cum|dick|horny|lolita\w*|rape\w*|escort\w*|breast\w*|lust\w*|erotic\w*|adult\w*|nigg\w*|whor\w*|lovers?|"
                  r"condom\w*|enlarg\w*|intimate|bitch\w*|ass\b|kill\w*"
                  r")\b", re.I)


def make_spam(folder, out):
    rng = random.Random(2)
    seen = set()
    for part, n in (("train", 1500), ("dev", 300), ("test", 300)):
        by_label = {"ham": [], "spam": []}
        with open(f"{folder}/{part}.tsv", encoding="utf-8", errors="replace") as f:
            for line in f.read().split("\n")[1:]:
                label, _, text = line.partition("\t")
                text = text.replace("\\ufffd", " ").replace("&nbsp;", " ")   # what its making left behind
                text = clean(LINK.sub("(link)", MAIL.sub("(address)", text)))
                text = cut(FEED.sub("", NUMBER.sub("(number)", text)), 190)
                ascii_ = all(" " <= c <= "~" for c in text)
                if label in by_label and ascii_ and len(text) >= 60 and not RUDE.search(text) and text[:60] not in seen and "@" not in text:
                    seen.add(text[:60])
                    by_label[label].append((text, label))
        rows = [row for rows in by_label.values() for row in rng.sample(rows, min(n // 2, len(rows)))]
        rng.shuffle(rows)
        write_rows(f"{out}/spam/{part}.tsv", ("text", "label"), rows)


# ---- questions ------------------------------------------------------------------------------------------------------
def read_squad(path):
    """Articles, each a list of paragraphs (context, [(question, answer, its start)]). A start that does not hold the answer is searched."""
    articles = []
    with open(path, encoding="utf-8") as f:
        data = json.load(f)["data"]
    for article in data:
        articles.append([])
        for p in article["paragraphs"]:
            asked = []
            for qa in p["qas"]:
                answer, start = qa["answers"][0]["text"], qa["answers"][0]["answer_start"]
                if p["context"][start:start + len(answer)] != answer:
                    start = p["context"].find(answer)
                if start >= 0 and answer:
                    asked.append((clean(qa["question"]), answer, start))
            articles[-1].append((p["context"], asked))
    return articles


def sentences(context, ends):
    """(start, end) of its sentences."""
    places = [0] + [m.end() for m in re.finditer(ends, context)] + [len(context)]
    return [(a, b) for a, b in zip(places, places[1:]) if context[a:b].strip()]


ENGLISH_ENDS = r"(?<!\b[A-Z])(?<!\b(?:Mr|St|Dr|vs|ca|Lt|No))(?<!\b(?:Mrs|etc|Gen|Rev))[.!?]['\"”)]*(?:\[[^]]*\])?\s+(?=[\"“(]?[A-Z0-9])"
CHINESE_ENDS = r"[。！？][」』”’）]*"


def tidy(sentence):
    """Without what Wikipedia's pages left behind: notes, and brackets that lost what stood in them."""
    return clean(re.sub(r"\[(citation needed|note \d+|[a-z]|\d+)\]|（[，、；：\s]*）", "", sentence))


def sentence_of(context, ends, start, length):
    for a, b in sentences(context, ends):
        if a <= start and start + length <= b:
            return tidy(context[a:b])
    return None


def make_pairs(groups, ends, limits, sizes, out, rng):
    """Question and sentence: does it hold the answer? The other sentence is of the same article; articles do not cross parts."""
    low, high = limits
    at = 0
    for part, n in sizes:
        rows = []
        while len(rows) < n:
            article = groups[at]
            at += 1
            pool = [tidy(c[a:b]) for c, _ in article for a, b in sentences(c, ends)]
            pool = sorted({s for s in pool if low <= len(s) <= high})
            asked = [(q, answer, sentence_of(c, ends, start, len(answer))) for c, qas in article for q, answer, start in qas]
            asked = [a for a in asked if a[2] and low <= len(a[2]) <= high and 5 <= len(a[0]) <= 120]
            for q, answer, yes in rng.sample(asked, min(len(asked), 30)):
                no = [s for s in pool if s != yes and answer not in s]
                if no and len(rows) < n:
                    rows += [(q, yes, "yes"), (q, rng.choice(no), "no")]
        rng.shuffle(rows)
        write_rows(f"{out}/{part}.tsv", ("sentence1", "sentence2", "label"), rows[:n])
    return at


def question_word(question):
    found = re.search(r"\b(" + "|".join(QUESTION_WORDS) + r")\b", question.lower())
    return found and found[0]


def make_asked(groups, out, rng):
    """A sentence and what people asked about it: the question words of all questions whose answer it holds."""
    n_dev = len(groups) // 6
    for part, articles, n in (("test", groups[:n_dev], 150), ("dev", groups[n_dev:2 * n_dev], 150), ("train", groups[2 * n_dev:], 600)):
        rows = []
        for article in articles:
            for context, qas in article:
                asked = {}
                for q, answer, start in qas:
                    s, word = sentence_of(context, ENGLISH_ENDS, start, len(answer)), question_word(q)
                    if s and word and 50 <= len(s) <= 200:
                        asked.setdefault(s, set()).add(word)
                rows += [(s, "|".join(sorted(words))) for s, words in asked.items()]
        rows = rng.sample(sorted(rows), n)
        write_rows(f"{out}/{part}.tsv", ("text", "labels"), rows)


# ---- Chinese --------------------------------------------------------------------------------------------------------
def make_chinese(articles, out, size):
    documents, used = [], 0
    for context in (c for a in articles for c, _ in a):
        lines = [t for t in (tidy(context[a:b]) for a, b in sentences(context, CHINESE_ENDS)) if t]
        if used < size and len(lines) >= 3:
            documents.append(lines)
            used += sum(len(line.encode()) + 1 for line in lines)
    write(f"{out}/chinese.txt", join_documents(documents))


def answer_kind(answer):
    if re.search(r"(\d|[一二三四五六七八九十〇零])(年|月|日|世纪)", answer) and len(answer) <= 16:
        return "时间"
    if re.match(r"[约近超过至少]{0,2}[\d,.%％一二三四五六七八九十百千万亿两零多]+[^\d]{0,4}$", answer):
        return "数量"
    return "名称" if len(answer) <= 10 and not re.search("[，。；、]", answer) else "说明" if len(answer) >= 16 else None


def make_answers(articles, out, rng):
    """A question, and the kind of answer that a reader found: time, quantity, name, explanation."""
    for part, some, n in (("test", articles[:130], 40), ("dev", articles[130:260], 40), ("train", articles[260:], 150)):
        by_kind = {}
        for q, answer, _ in (qa for a in some for _, qas in a for qa in qas):
            kind = answer_kind(answer.strip())
            if kind and len(q) <= 60:
                by_kind.setdefault(kind, []).append((q, kind))
        rows = [row for kind in sorted(by_kind) for row in rng.sample(sorted(set(by_kind[kind])), min(n, len(set(by_kind[kind]))))]
        rng.shuffle(rows)
        write_rows(f"{out}/{part}.tsv", ("text", "label"), rows)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    src, out = sys.argv[1:]
    books = read_books(f"{src}/gutenberg/corpus.txt")
    make_english(books, out)
    make_authors(books, out)
    make_spam(f"{src}/spam", out)
    rng = random.Random(3)
    squad = read_squad(f"{src}/squad-v1.1-dev-rebuilt/dev-v1.1.rebuilt.json")
    rng.shuffle(squad)
    make_pairs(squad, ENGLISH_ENDS, (40, 165), (("train", 1000), ("dev", 200), ("test", 200)), f"{out}/questions-en", rng)
    make_asked(squad, f"{out}/asked-en", rng)
    dev = read_squad(f"{src}/cmrc2018/cmrc2018_dev.json")
    rng.shuffle(dev)
    make_pairs(dev, CHINESE_ENDS, (10, 80), (("train", 1000), ("dev", 200), ("test", 200)), f"{out}/questions-zh", rng)
    make_answers(dev, f"{out}/answers-zh", rng)
    make_chinese(read_squad(f"{src}/cmrc2018/cmrc2018_trial.json"), out, 325_000)


if __name__ == "__main__":
    main()
