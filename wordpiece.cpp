// wordpiece.cpp -- from text to ids and back: Unicode, words, longest match first, pairs and windows, vocabulary files, the trainer.
//
//   Needs bert.h (section 1), the JSON reader that stands inline in tensor.h, and the standard library.
//
//   A text becomes ids in four steps, each a section of this file. "Héllo\u200B, [MASK]!" in the uncased vocabulary:
//
//     added tokens   "Héllo\u200B, " | [MASK] | "!"          cut out of the raw text first, before anything is normalised
//     code points    h e l l o   ,                           controls removed, Chinese spaced, accents stripped, lower case
//     words          hello | ,                               split at white space, punctuation alone
//     pieces         hel ##lo | ,                            the longest piece of the vocabulary first, then the longest continuation
//
//   and then sequences: [CLS] and [SEP] around them, pairs, truncation, windows. Every code point carries the place in the source that
//   it came from, so that each piece knows its bytes. What the rules are is not ours to choose: Hugging Face's `tokenizers` is what
//   published models were trained with, so its answers are copied, odd ones included (Devlin et al. 2018; Wu et al. 2016 for the pieces).
//
//   Contents:   1 bytes and UTF-8  2 code points  3 words  4 pieces  5 added tokens  6 sequences  7 decoding  8 files
//               9 the trainer
#include <filesystem>
#include <queue>
#include <unordered_map>

#include "bert.h"

namespace bert {

// ==== 1 bytes and UTF-8 ==========================================================================================
// Bytes of the invalid part at s[i]: as many as could have begun a sequence, at least one (the "maximal subpart" of the Unicode
// standard, section 3.9). A prefix could have begun one exactly when continuation bytes complete it.
static size_t invalid_length(std::string_view s, size_t i) {
  for (size_t n = std::min<size_t>(3, s.size() - i); n > 1; n--) {
    char completed[4] = {'\x80', '\x80', '\x80', '\x80'};
    std::memcpy(completed, s.data() + i, n);
    if (utf8_length({completed, 4}, 0) > n) return n;
  }
  return 1;
}

// The code point at s[i], and its bytes as the result. Invalid bytes are read as U+FFFD.
static inline size_t decode_utf8(std::string_view s, size_t i, char32_t& c) {
  const unsigned char lead = (unsigned char)s[i];
  if (lead < 0x80) return c = lead, 1;
  const size_t n = utf8_length(s, i);
  if (!n) return c = 0xFFFD, invalid_length(s, i);
  c = lead & (0x7F >> n);
  for (size_t k = 1; k < n; k++) c = c << 6 | ((unsigned char)s[i + k] & 0x3F);
  return n;
}

// Writes c's bytes, 1 to 4, and returns how many.
static inline int encode_utf8(char32_t c, char* out) {
  if (c < 0x80) return out[0] = (char)c, 1;
  const int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
  for (int k = n - 1; k > 0; k--, c >>= 6) out[k] = (char)(0x80 | (c & 0x3F));
  out[0] = (char)(0xF00 >> n | c);   // 110xxxxx, 1110xxxx, 11110xxx
  return n;
}
static void append_utf8(std::string& s, char32_t c) {
  char bytes[4];
  s.append(bytes, (size_t)encode_utf8(c, bytes));
}

int64_t repair_utf8(std::string& text) {
  size_t i = 0;
  while (i < text.size() && utf8_length(text, i)) i += utf8_length(text, i);
  if (i == text.size()) return 0;   // nearly always: nothing is copied
  std::string out = text.substr(0, i);
  int64_t repaired = 0;
  while (i < text.size()) {
    const size_t n = utf8_length(text, i);
    if (n) out.append(text, i, n), i += n;
    else out += "\xEF\xBF\xBD", i += invalid_length(text, i), repaired++;
  }
  text = std::move(out);
  return repaired;
}

// ==== 2 code points ==============================================================================================
struct Range {
  char32_t first, last;
};
// ---- generated 
// ---- generated (end)

const char* unicode_tables() { return kTablesFrom; }

// What the tables say of a code point, as bits.
enum : uint8_t { kRemoved = 1, kSpace = 2, kPunctuation = 4, kChinese = 8, kMark = 16, kUpper = 32, kDecomposes = 64, kOrdered = 128 };

static std::vector<uint8_t> make_properties() {
  std::vector<uint8_t> bits(0x110000);
  auto set = [&](char32_t first, char32_t last, uint8_t bit, char32_t step = 1) {
    for (char32_t c = first; c <= last; c += step) bits[c] |= bit;
  };
  for (const Range& r : kRemovedRanges) set(r.first, r.last, kRemoved);
  for (const Range& r : kSpaceRanges) set(r.first, r.last, kSpace);
  for (const Range& r : kPunctuationRanges) set(r.first, r.last, kPunctuation);
  for (const Range& r : kChineseRanges) set(r.first, r.last, kChinese);
  for (const Range& r : kMarkRanges) set(r.first, r.last, kMark);
  for (const auto& r : kOrders) set(r.first, r.last, kOrdered);
  for (const auto& r : kLower) set(r.first, r.last, kUpper, (char32_t)r.step);
  set(0x130, 0x130, kUpper);
  for (size_t i = 0; i + 1 < std::size(kStripped); i += 2) set(kStripped[i], kStripped[i], kDecomposes);
  for (const auto& r : kStrippedLong) set(r.from, r.from, kDecomposes);
  set(0xAC00, 0xD7A3, kDecomposes);
  set(0xF900, 0xFAD9, kDecomposes);
  set(0x2F800, 0x2FA1D, kDecomposes);
  return bits;
}
// One byte a code point: the question is asked for every character of every text, and a range search would be most of the work.
static const uint8_t* properties() {
  static const std::vector<uint8_t> bits = make_properties();
  return bits.data();
}

// The last row of a table sorted by `key` whose key is at most c.
template <class Row, size_t N, class Key>
static const Row& row_of(const Row (&table)[N], char32_t c, const Key& key) {
  const Row* r = std::upper_bound(table, table + N, c, [&](char32_t x, const Row& row) { return x < key(row); });
  return r[-1];
}

// Lower case by single code point, not by context: the final sigma of a word stays σ.
static char32_t lower(char32_t c) {
  const auto& r = row_of(kLower, c, [](const auto& row) { return row.first; });
  return (char32_t)((int64_t)c + r.delta);
}

// What is left of c's canonical decomposition (NFD) without its marks: 1 to 3 code points. Only for c with kDecomposes.
static int strip(char32_t c, char32_t* out) {
  if (c >= 0xAC00 && c <= 0xD7A3) {   // Hangul, by arithmetic: Unicode section 3.12
    const char32_t syllable = c - 0xAC00, tail = syllable % 28;
    out[0] = 0x1100 + syllable / (21 * 28), out[1] = 0x1161 + syllable / 28 % 21, out[2] = 0x11A7 + tail;
    return tail ? 3 : 2;
  }
  if (c >= 0xF900 && c <= 0xFAD9) return out[0] = kIdeographsF900[c - 0xF900], 1;
  if (c >= 0x2F800 && c <= 0x2FA1D) return out[0] = kIdeographs2F800[c - 0x2F800], 1;
  size_t low = 0, high = std::size(kStripped) / 2;   // pairs, without the literal's final zero
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (kStripped[2 * middle] < c) low = middle + 1;
    else high = middle;
  }
  if (2 * low + 1 < std::size(kStripped) && kStripped[2 * low] == c) return out[0] = kStripped[2 * low + 1], 1;
  const auto& r = row_of(kStrippedLong, c, [](const auto& row) { return row.from; });
  int n = 0;
  for (; n < 3 && r.to[n]; n++) out[n] = r.to[n];
  return n;
}

// The normaliser under its settings. A removed character leaves nothing behind, so that its neighbours become one word.
struct Normalizer {
  TokenizerSettings settings;
  bool strip_accents;
  const uint8_t* bits = properties();

  explicit Normalizer(const TokenizerSettings& s) : settings(s), strip_accents(s.strip_accents.value_or(s.lowercase)) {}

  // What one code point becomes, 0 to 3 of them: NFD and no marks, then lower case.
  int fold(char32_t c, char32_t out[3]) const {
    int n = 1;
    out[0] = c;
    if (strip_accents && (bits[c] & kMark)) return 0;
    if (strip_accents && (bits[c] & kDecomposes)) n = strip(c, out);
    if (!settings.lowercase) return n;
    if (out[0] == 0x130) return out[0] = 'i', out[1] = 0x307, 2;   // İ, the only one whose lower case is two
    for (int k = 0; k < n; k++)
      if (bits[out[k]] & kUpper) out[k] = lower(out[k]);
    return n;
  }

  // Marks that stripping keeps are sorted by their combining class, as canonical order wants, up to the next letter. Returns where
  // the text goes on.
  template <class Out>
  size_t marks_in_order(std::string_view s, size_t i, size_t end, const Out& out) const {
    struct Mark {
      char32_t code;
      int order;
      size_t from, to;
    };
    std::vector<Mark> run;
    while (i < end) {
      char32_t c;
      const size_t n = decode_utf8(s.substr(0, end), i, c);
      const bool dropped = (bits[c] & kMark) || (settings.clean_text && (bits[c] & kRemoved));
      if (!dropped && !(bits[c] & kOrdered)) break;
      if (!dropped) run.push_back({c, row_of(kOrders, c, [](const auto& row) { return row.first; }).order, i, i + n});
      i += n;
    }
    std::stable_sort(run.begin(), run.end(), [](const Mark& a, const Mark& b) { return a.order < b.order; });
    for (const Mark& m : run) out(m.code, m.from, m.to);
    return i;
  }

  // Calls out(code point, from, to) for every normalised code point of s[i .. end), from .. to the source bytes of the one that it
  // comes from. White space comes as U+0020.
  template <class Out>
  void operator()(std::string_view s, size_t i, size_t end, const Out& out) const {
    while (i < end) {
      char32_t c, folded[3];
      const size_t from = i;
      i += decode_utf8(s.substr(0, end), i, c);
      const uint8_t p = bits[c];
      if (!p) {
        out(c, from, i);
      } else if (settings.clean_text && (p & kRemoved)) {
        continue;
      } else if (p & kSpace) {
        out(U' ', from, i);
      } else if (settings.chinese && (p & kChinese)) {
        fold(c, folded);   // a compatibility ideograph becomes its ordinary one
        out(U' ', from, i), out(folded[0], from, i), out(U' ', from, i);
      } else if (strip_accents && (p & kOrdered)) {
        i = marks_in_order(s, from, end, out);
      } else {
        const int n = fold(c, folded);
        for (int k = 0; k < n; k++) out(folded[k], from, i);
      }
    }
  }
};

// ==== 3 words ====================================================================================================
// A word: its normalised letters as UTF-8, and the source bytes of each. Of a word longer than any vocabulary takes, the rest is only
// counted, so that ten million letters without a space cost no memory and linear time.
struct Word {
  static constexpr int kMost = 200;   // Google's tokenizer takes words of 200 code points, Hugging Face's of 100
  int letters = 0, bytes = 0;
  size_t end = 0;                     // in the source
  char text[4 * kMost];
  size_t from[4 * kMost];             // from[i]: where the letter whose bytes begin at i begins in the source
  size_t to[4 * kMost + 1];           // to[i]: where the letter whose bytes end at i ends

  void add(char32_t c, size_t begin, size_t finish) {
    if (letters++ < kMost) {
      from[bytes] = begin;
      if (c < 0x80) text[bytes++] = (char)c;   // the common case, in line
      else bytes += encode_utf8(c, text + bytes);
      to[bytes] = finish;
    }
    end = finish;
  }
};

// Collects normalised code points into words: white space ends one, punctuation is one by itself. Calls emit(word) for each.
template <class Emit>
struct Splitter {
  const uint8_t* bits;
  Word& word;
  const Emit& emit;

  void flush() const {
    if (word.letters) emit(word);
    word.letters = word.bytes = 0;
  }
  void operator()(char32_t c, size_t from, size_t to) const {
    if (bits[c] & kSpace) return flush();
    if (!(bits[c] & kPunctuation)) return word.add(c, from, to);
    flush();
    word.add(c, from, to);
    flush();
  }
};

// emit(word) for every word of s[begin .. end).
template <class Emit>
static void each_word(const Normalizer& normal, std::string_view s, size_t begin, size_t end, Word& word, const Emit& emit) {
  const Splitter<Emit> split{normal.bits, word, emit};
  normal(s, begin, end, split);
  split.flush();
}

// ==== 4 pieces ===================================================================================================
// A set of strings with ids, walked byte by byte: a double array (Aoe 1989). The child of node n under byte b is cell base[n] + b, if
// that cell's parent is n; so a step costs one look into memory.
class Trie {
 public:
  static constexpr int32_t kRoot = 0, kNone = -1;

  // `keys` sorted, each once, none empty.
  void build(const std::vector<std::pair<std::string_view, int32_t>>& keys) {
    cells_.assign(512, Cell());
    cells_[kRoot].parent = kTaken;
    struct Task {
      size_t low, high, depth;   // keys that share their first `depth` bytes, which lead to `node`
      int32_t node;
    };
    std::vector<Task> tasks;
    if (!keys.empty()) tasks.push_back({0, keys.size(), 0, kRoot});
    std::vector<std::pair<unsigned char, size_t>> children;   // byte, first key
    size_t first_free = 1, several = 1;
    while (!tasks.empty()) {
      Task t = tasks.back();
      tasks.pop_back();
      if (keys[t.low].first.size() == t.depth) cells_[(size_t)t.node].id = keys[t.low++].second;
      children.clear();
      for (size_t k = t.low; k < t.high; k++) {
        const unsigned char b = (unsigned char)keys[k].first[t.depth];
        if (children.empty() || children.back().first != b) children.emplace_back(b, k);
      }
      if (children.empty()) continue;
      while (cells_[first_free].parent != kFree) first_free++, grow(first_free);
      // Nodes with one child fill the holes; the others look on from the last such place, or each would search the full part again.
      size_t& start = children.size() == 1 ? first_free : several;
      const size_t base = place(children, std::max(start, first_free));
      if (children.size() > 1) start = base + children[0].first;
      cells_[(size_t)t.node].base = (int32_t)base;
      for (size_t k = 0; k < children.size(); k++) {
        const int32_t child = (int32_t)(base + children[k].first);
        cells_[(size_t)child].parent = t.node;
        tasks.push_back({children[k].second, k + 1 < children.size() ? children[k + 1].second : t.high, t.depth + 1, child});
      }
    }
  }

  int32_t child(int32_t node, char byte) const {
    const int32_t c = cells_[(size_t)node].base + (unsigned char)byte;
    return cells_[(size_t)c].parent == node ? c : kNone;
  }
  int32_t id(int32_t node) const { return cells_[(size_t)node].id; }
  int32_t walk(int32_t node, std::string_view s) const {
    for (size_t i = 0; i < s.size() && node != kNone; i++) node = child(node, s[i]);
    return node;
  }
  // The longest key that s begins with, from `node` on: its id, and its length; -1 where there is none.
  int32_t longest(int32_t node, const char* s, size_t size, size_t& length) const {
    int32_t found = kNone;
    for (size_t i = 0; i < size; i++) {
      if ((node = child(node, s[i])) == kNone) break;
      if (id(node) >= 0) found = id(node), length = i + 1;
    }
    return found;
  }

 private:
  static constexpr int32_t kFree = -1, kTaken = -2;
  struct Cell {
    int32_t base = 0, parent = kFree, id = kNone;
  };
  std::vector<Cell> cells_ = std::vector<Cell>(512);   // always 256 more than the largest base: child() needs no bounds check

  void grow(size_t base) {
    if (base + 256 >= cells_.size()) cells_.resize(std::max(base + 257, cells_.size() * 2));
  }
  // The first base from `at` on under which every child's cell is free.
  size_t place(const std::vector<std::pair<unsigned char, size_t>>& children, size_t at) {
    for (at = std::max<size_t>(at, (size_t)children[0].first + 1);; at++) {
      const size_t base = at - children[0].first;
      grow(base);
      bool fits = true;
      for (size_t k = 0; fits && k < children.size(); k++) fits = cells_[base + children[k].first].parent == kFree;
      if (fits) return base;
    }
  }
};

// A token that is looked for in the text itself. The names are tokenizer.json's.
struct AddedToken {
  std::string content;
  int32_t id = -1;
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};

// Everything that loading makes, and nothing changes after.
struct WordPiece::Tables {
  Normalizer normal;
  std::vector<std::string> pieces;       // by id; "" where an id has none
  Trie trie;                             // whole pieces as they stand in the file, ## included
  std::string prefix = "##";
  int32_t inner = Trie::kNone;           // the node after ##: where continuations begin. Words cannot begin with ##, # is punctuation
  int limit = 100;                       // code points of a word; longer ones are unknown
  int32_t unk = -1, cls = -1, sep = -1;  // cls, sep: what is put around a sequence; -1: nothing is
  std::vector<AddedToken> added;
  Trie raw_tokens, normal_tokens;        // found in the raw and in the normalised text; a key's id is its index in `added`
  bool raw_first[256] = {}, any_normal = false, any_plain = false;   // first bytes of raw tokens; any_plain: one that is not special

  explicit Tables(const TokenizerSettings& settings) : normal(settings) {}

  // The pieces of a word, longest first: ids, and where each ends in word.text; their number, or -1 for an unknown word, which is
  // unknown as a whole. Linear: at most `limit` letters a word, and no step looks further than the longest piece.
  int match(const Word& word, int32_t* ids, int* ends) const {
    if (word.letters > limit) return -1;
    int n = 0;
    for (int at = 0; at < word.bytes;) {
      size_t length = 0;
      const int32_t node = at ? inner : Trie::kRoot;
      const int32_t id = node < 0 ? -1 : trie.longest(node, word.text + at, (size_t)(word.bytes - at), length);
      if (id < 0) return -1;
      at += (int)length;
      ids[n] = id, ends[n++] = at;
    }
    return n;
  }
  int32_t unknown(const Word& word) const {
    if (unk >= 0) return unk;
    throw Error("tokenize: the word '" + std::string(word.text, (size_t)std::min(word.bytes, 80)) + "' at byte " +
                std::to_string(word.from[0]) + " is not in the vocabulary, which has no [UNK]; add [UNK] to it");
  }

  struct Found {
    size_t begin, end;   // in the text, spaces that the token swallows included
    size_t matched;      // where its own letters end: the search goes on there
    int32_t index;       // in `added`; -1: there is none any more
  };
  Found find_token(const Trie& tokens, const bool* first, std::string_view s, size_t search, size_t last_end, bool parse_special) const;
  template <class OnWord, class OnToken>
  void walk(std::string_view text, bool parse_special, const OnWord& on_word, const OnToken& on_token) const;
  template <class OnWord, class OnToken>
  void walk_normalized(std::string_view s, size_t begin, size_t end, bool parse_special, const OnWord& on_word, const OnToken& on_token) const;

  void encode_text(std::string_view text, bool parse_special, int32_t one_word, Encoding& out) const;
  std::vector<Encoding> finish(const Encoding& a, const Encoding* b, const EncodeOptions& options, bool windows) const;
  Encoding assemble(const Encoding& a, std::array<size_t, 2> part_a, const Encoding* b, std::array<size_t, 2> part_b, bool specials) const;
  void build();
};

// ==== 5 added tokens =============================================================================================
// [MASK] and its like, and what users added to a vocabulary, are found before anything else happens to the text.

// Rust's \w, for tokens that want to stand as single words.
static bool is_word_letter(char32_t c) {
  if (c < 0x80) return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_';
  if (c == 0x200C || c == 0x200D) return true;   // the joiners; other removed characters are no letters
  if (properties()[c] & (kRemoved | kSpace)) return false;
  if (properties()[c] & kPunctuation) return c == 0x203F || c == 0x2040 || c == 0x2054 || c == 0xFE33 || c == 0xFE34 || (c >= 0xFE4D && c <= 0xFE4F) || c == 0xFF3F;
  return c < kSymbolRanges[0].first || c > row_of(kSymbolRanges, c, [](const Range& r) { return r.first; }).last;
}
// The code point that ends before s[i], and its bytes.
static size_t decode_before(std::string_view s, size_t i, char32_t& c) {
  size_t begin = i - 1;
  while (begin > 0 && i - begin < 4 && ((unsigned char)s[begin] & 0xC0) == 0x80) begin--;
  if (decode_utf8(s, begin, c) == i - begin) return i - begin;
  return c = 0xFFFD, 1;
}

// The next added token of s at or after `search`: the leftmost, there the longest.
WordPiece::Tables::Found WordPiece::Tables::find_token(const Trie& tokens, const bool* first, std::string_view s, size_t search,
                                                       size_t last_end, bool parse_special) const {
  for (size_t i = search; i < s.size(); i++) {
    if (first && !first[(unsigned char)s[i]]) continue;
    size_t length = 0;
    const int32_t index = tokens.longest(Trie::kRoot, s.data() + i, s.size() - i, length);
    if (index < 0) continue;
    const AddedToken& token = added[(size_t)index];
    const size_t matched = i + length;
    char32_t before = ' ', after = ' ';
    if (i > 0) decode_before(s, i, before);
    if (matched < s.size()) decode_utf8(s, matched, after);
    if ((token.special && !parse_special) || (token.single_word && (is_word_letter(before) || is_word_letter(after)))) {
      i = matched - 1;   // as the reference: the letters of a token turned down are not looked at again
      continue;
    }
    Found f{i, matched, matched, index};
    while (token.lstrip && f.begin > last_end && (properties()[before] & kSpace)) {
      f.begin -= decode_before(s, f.begin, before);
      if (f.begin > 0) decode_before(s, f.begin, before);
    }
    while (token.rstrip && f.end < s.size()) {
      const size_t n = decode_utf8(s, f.end, after);
      if (!(properties()[after] & kSpace)) break;
      f.end += n;
    }
    f.begin = std::max(f.begin, last_end);
    return f;
  }
  return {s.size(), s.size(), s.size(), -1};
}

// Calls on_token(id, begin, end) for each added token of the text and on_word(word) for each word between them, in order.
template <class OnWord, class OnToken>
void WordPiece::Tables::walk(std::string_view text, bool parse_special, const OnWord& on_word, const OnToken& on_token) const {
  Word word;
  size_t at = 0, search = 0;
  const bool look = !added.empty() && (parse_special || any_plain);
  for (;;) {
    const Found f = look ? find_token(raw_tokens, raw_first, text, search, at, parse_special) : Found{text.size(), text.size(), 0, -1};
    if (any_normal) walk_normalized(text, at, f.begin, parse_special, on_word, on_token);
    else each_word(normal, text, at, f.begin, word, on_word);
    if (f.index < 0) return;
    on_token(added[(size_t)f.index].id, f.begin, f.end);
    at = f.end, search = f.matched;
  }
}

// The same for tokens that are looked for in the normalised text ("normalized": true), between those of the raw text.
template <class OnWord, class OnToken>
void WordPiece::Tables::walk_normalized(std::string_view s, size_t begin, size_t end, bool parse_special, const OnWord& on_word,
                                        const OnToken& on_token) const {
  struct Letter {
    char32_t code;
    size_t from, to, byte;   // byte: where it begins in `text`
  };
  std::string text;
  std::vector<Letter> letters;
  normal(s, begin, end, [&](char32_t c, size_t from, size_t to) {
    letters.push_back({c, from, to, text.size()});
    append_utf8(text, c);
  });
  Word word;
  const Splitter<OnWord> split{normal.bits, word, on_word};
  size_t next = 0;   // letter
  for (size_t at = 0, search = 0;;) {
    const Found f = find_token(normal_tokens, nullptr, text, search, at, parse_special);
    for (; next < letters.size() && letters[next].byte < f.begin; next++) split(letters[next].code, letters[next].from, letters[next].to);
    split.flush();
    if (f.index < 0) return;
    const size_t from = letters[next].from;
    while (next < letters.size() && letters[next].byte < f.end) next++;
    on_token(added[(size_t)f.index].id, from, letters[next - 1].to);
    at = f.end, search = f.matched;
  }
}

// ==== 6 sequences ================================================================================================
// Appends a text's tokens: ids, words and offsets. `one_word`: the number all of them get where the text is a word of a list; -1: the
// words are counted.
void WordPiece::Tables::encode_text(std::string_view text, bool parse_special, int32_t one_word, Encoding& out) const {
  int32_t number = 0, ids[Word::kMost];
  int ends[Word::kMost];
  auto add = [&](int32_t id, size_t from, size_t to) {
    out.ids.push_back(id);
    out.words.push_back(one_word >= 0 ? one_word : number);
    out.offsets.push_back({(int64_t)from, (int64_t)to});
  };
  walk(
      text, parse_special,
      [&](const Word& word) {
        const int n = match(word, ids, ends);
        if (n < 0) add(unknown(word), word.from[0], word.end);
        for (int k = 0, at = 0; k < n; at = ends[k++]) add(ids[k], word.from[at], word.to[ends[k]]);
        number++;
      },
      [&](int32_t id, size_t from, size_t to) { add(id, from, to), number++; });
}

void WordPiece::append_ids(std::string_view text, std::vector<int32_t>& ids) const {
  const Tables& t = *tables_;
  int32_t pieces[Word::kMost];
  int ends[Word::kMost];
  t.walk(
      text, false,
      [&](const Word& word) {
        const int n = t.match(word, pieces, ends);
        if (n < 0) ids.push_back(t.unknown(word));
        else ids.insert(ids.end(), pieces, pieces + n);
      },
      [&](int32_t id, size_t, size_t) { ids.push_back(id); });
}

// The parts that n tokens are cut into, each of `length` tokens and sharing `stride` with the next; the last, or from the left the
// first in the text, is shorter. Part 0 is the encoding itself. A length of 0 leaves nothing, and one window with everything.
static std::vector<std::array<size_t, 2>> cut(size_t n, size_t length, size_t stride, bool from_left, bool windows) {
  if (length >= n) return {{0, n}};
  if (length == 0) return {{0, 0}, {0, n}};
  if (!windows) return {from_left ? std::array<size_t, 2>{n - length, n} : std::array<size_t, 2>{0, length}};
  if (stride >= length)
    throw Error("truncate: windows of " + std::to_string(length) + " tokens cannot overlap by a stride of " + std::to_string(stride) +
                "; the stride must be smaller than what truncation leaves of the text");
  std::vector<std::array<size_t, 2>> parts;
  for (size_t at = 0;; at += length - stride) {
    const size_t end = std::min(at + length, n);
    if (from_left) parts.push_back({n - end, n - at});
    else parts.push_back({at, end});
    if (end == n) return parts;
  }
}

// The tokens that two sides of na and nb may keep together, by the strategy.
static std::array<size_t, 2> budgets(size_t na, size_t nb, bool pair, size_t room, Truncation strategy) {
  if (na + nb <= room) return {na, nb};
  const size_t remove = na + nb - room;
  if (strategy == Truncation::longest_first) {
    if (!pair) return {room, 0};
    // The shorter side stays whole if it leaves the other at least as much; else both get half, an odd one goes to the longer side,
    // on a tie to the second. Google's tokenizer differs in odd rooms: it takes from the second side on a tie.
    const size_t shorter = std::min(na, nb);
    size_t small = shorter, large = shorter > room ? shorter : std::max(shorter, room - shorter);
    if (small + large > room) small = room / 2, large = small + room % 2;
    if (na > nb) return {large, small};
    return {small, large};
  }
  const bool first = strategy == Truncation::only_first;
  if (!first && !pair) throw Error("truncate: only_second, but there is no second text; truncate the first or longest_first");
  const size_t n = first ? na : nb;
  if (n <= remove)
    throw Error("truncate: the " + std::string(first ? "first" : "second") + " text is too short: " + std::to_string(n) + " tokens, of which " +
                std::to_string(remove) + " must go; use longest_first or a larger maximum length");
  if (first) return {na - remove, nb};
  return {na, nb - remove};
}

// [CLS] a [SEP], or [CLS] a [SEP] b [SEP], of one part of each side.
Encoding WordPiece::Tables::assemble(const Encoding& a, std::array<size_t, 2> part_a, const Encoding* b, std::array<size_t, 2> part_b,
                                     bool specials) const {
  Encoding out;
  const size_t n = part_a[1] - part_a[0] + part_b[1] - part_b[0] + 3;
  out.ids.reserve(n), out.type_ids.reserve(n), out.words.reserve(n), out.sequence.reserve(n), out.special.reserve(n), out.offsets.reserve(n);
  auto special = [&](int32_t id, int32_t type) {
    if (!specials) return;
    out.ids.push_back(id), out.type_ids.push_back(type), out.words.push_back(-1), out.sequence.push_back(-1);
    out.special.push_back(1), out.offsets.push_back({0, 0});
  };
  auto side = [&](const Encoding& from, std::array<size_t, 2> part, int32_t number) {
    const size_t count = part[1] - part[0];
    auto copy = [&](auto& to, const auto& values) { to.insert(to.end(), values.begin() + (int64_t)part[0], values.begin() + (int64_t)part[1]); };
    copy(out.ids, from.ids), copy(out.words, from.words), copy(out.offsets, from.offsets);
    out.type_ids.insert(out.type_ids.end(), count, number), out.sequence.insert(out.sequence.end(), count, number);
    out.special.insert(out.special.end(), count, 0);
  };
  special(cls, 0);
  side(a, part_a, 0);
  special(sep, 0);
  if (b) side(*b, part_b, 1), special(sep, 1);
  return out;
}

// Truncates and puts the special tokens around. Without `windows` only the encoding itself.
std::vector<Encoding> WordPiece::Tables::finish(const Encoding& a, const Encoding* b, const EncodeOptions& options, bool windows) const {
  const bool has_specials = cls >= 0 && sep >= 0, specials = options.add_special && has_specials;
  const size_t na = a.ids.size(), nb = b ? b->ids.size() : 0, around = specials ? (b ? 3 : 2) : 0, limit = (size_t)options.max_length;
  if (options.max_length < 0 || options.stride < 0) throw Error("truncate: a negative maximum length or stride");
  // The reference refuses such a stride when it is set, whatever the text; it counts the special tokens of a single text there.
  const size_t single = has_specials ? 2 : 0;
  if (windows && limit && limit >= single && limit - single < (size_t)options.stride)
    throw Error("truncate: a stride of " + std::to_string(options.stride) + " does not fit a maximum length of " + std::to_string(limit) +
                "; the stride must be smaller than the maximum less the special tokens");
  std::array<size_t, 2> keep = {na, nb};
  if (limit && limit > around) keep = budgets(na, nb, b != nullptr, limit - around, options.truncation);
  else if (limit && limit == around) keep = {0, 0};   // a maximum below the special tokens truncates nothing, as in the reference
  const auto parts_a = cut(na, keep[0], (size_t)options.stride, options.from_left, windows);
  const auto parts_b = cut(nb, keep[1], (size_t)options.stride, options.from_left, windows);
  std::vector<Encoding> out = {assemble(a, parts_a[0], b, parts_b[0], specials)};
  if (!windows) return out;
  for (size_t i = 1; i < parts_a.size(); i++)
    for (size_t j = 0; j < parts_b.size(); j++) out.push_back(assemble(a, parts_a[i], b, parts_b[j], specials));
  for (size_t j = 1; j < parts_b.size(); j++) out.push_back(assemble(a, parts_a[0], b, parts_b[j], specials));
  return out;
}

Encoding WordPiece::encode(std::string_view text, const EncodeOptions& options) const {
  Encoding a;
  tables_->encode_text(text, options.parse_special, -1, a);
  return std::move(tables_->finish(a, nullptr, options, false)[0]);
}
Encoding WordPiece::encode(std::string_view text, std::string_view pair, const EncodeOptions& options) const {
  Encoding a, b;
  tables_->encode_text(text, options.parse_special, -1, a);
  tables_->encode_text(pair, options.parse_special, -1, b);
  return std::move(tables_->finish(a, &b, options, false)[0]);
}
std::vector<Encoding> WordPiece::encode_windows(std::string_view text, const std::optional<std::string_view>& pair,
                                                const EncodeOptions& options) const {
  Encoding a, b;
  tables_->encode_text(text, options.parse_special, -1, a);
  if (pair) tables_->encode_text(*pair, options.parse_special, -1, b);
  return tables_->finish(a, pair ? &b : nullptr, options, true);
}

std::vector<Encoding> WordPiece::encode_words_windows(std::span<const std::string> words, std::span<const std::string> pair, bool has_pair,
                                                      const EncodeOptions& options) const {
  Encoding sides[2];
  for (size_t i = 0; i < words.size(); i++) tables_->encode_text(words[i], options.parse_special, (int32_t)i, sides[0]);
  for (size_t i = 0; i < pair.size(); i++) tables_->encode_text(pair[i], options.parse_special, (int32_t)i, sides[1]);
  return tables_->finish(sides[0], has_pair ? &sides[1] : nullptr, options, true);
}
Encoding WordPiece::encode_words(std::span<const std::string> words, std::span<const std::string> pair, bool has_pair,
                                 const EncodeOptions& options) const {
  Encoding sides[2];
  for (size_t i = 0; i < words.size(); i++) tables_->encode_text(words[i], options.parse_special, (int32_t)i, sides[0]);
  for (size_t i = 0; i < pair.size(); i++) tables_->encode_text(pair[i], options.parse_special, (int32_t)i, sides[1]);
  return std::move(tables_->finish(sides[0], has_pair ? &sides[1] : nullptr, options, false)[0]);
}

std::vector<std::array<int64_t, 2>> code_point_offsets(const Encoding& encoding, std::string_view text, std::string_view pair) {
  // A cursor for begins and one for ends, in each text: both only ever move on, so the whole is linear. An offset before the cursor
  // (the windows' overlap, a swallowed space) starts again.
  struct Cursor {
    size_t byte = 0;
    int64_t letters = 0;
    int64_t to(std::string_view s, size_t target) {
      if (target < byte) byte = 0, letters = 0;
      for (char32_t c; byte < target; letters++) byte += decode_utf8(s, byte, c);
      return letters;
    }
  } cursors[2][2];
  std::vector<std::array<int64_t, 2>> out;
  out.reserve(encoding.offsets.size());
  for (size_t i = 0; i < encoding.offsets.size(); i++) {
    const int32_t which = encoding.sequence[i];
    if (which < 0) {
      out.push_back({0, 0});
      continue;
    }
    const std::string_view s = which ? pair : text;
    out.push_back({cursors[which][0].to(s, (size_t)encoding.offsets[i][0]), cursors[which][1].to(s, (size_t)encoding.offsets[i][1])});
  }
  return out;
}

// ==== 7 decoding =================================================================================================
static void replace_all(std::string& s, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = s.find(from, at)) != std::string::npos; at += to.size()) s.replace(at, from.size(), to);
}

std::string WordPiece::decode(std::span<const int32_t> ids, bool skip_special, bool cleanup) const {
  // The reference cleans each piece with the space before it, not the text: so only the first four rules are ever seen at work on
  // BERT's pieces, but a vocabulary may hold "n't".
  static const std::pair<const char*, const char*> rules[] = {{" .", "."},      {" ?", "?"},    {" !", "!"},    {" ,", ","},
                                                              {" ' ", "'"},     {" n't", "n't"}, {" 'm", "'m"}, {" do not", " don't"},
                                                              {" 's", "'s"},    {" 've", "'ve"}, {" 're", "'re"}};
  const Tables& t = *tables_;
  std::string out, token;
  bool first = true;
  for (const int32_t id : ids) {
    if (id < 0 || id >= (int32_t)t.pieces.size()) continue;
    bool special = false, exists = !t.pieces[(size_t)id].empty();
    for (const AddedToken& a : t.added) special |= a.special && a.id == id;
    if (!exists || (skip_special && special)) continue;
    token = t.pieces[(size_t)id];
    if (!first && token.starts_with(t.prefix)) token.erase(0, t.prefix.size());
    else if (!first) token.insert(0, " ");
    if (cleanup)
      for (const auto& [from, to] : rules) replace_all(token, from, to);
    out += token, first = false;
  }
  return out;
}

int64_t WordPiece::size() const { return (int64_t)tables_->pieces.size(); }
const TokenizerSettings& WordPiece::settings() const { return tables_->normal.settings; }
std::string_view WordPiece::piece(int32_t id) const {
  return id < 0 || id >= size() ? std::string_view() : std::string_view(tables_->pieces[(size_t)id]);
}
bool WordPiece::continuation(int32_t id) const { return piece(id).starts_with(tables_->prefix); }
int32_t WordPiece::id(std::string_view piece) const {
  const Tables& t = *tables_;
  if (!piece.empty() && piece.size() <= kLongestKey) {
    const int32_t node = t.trie.walk(Trie::kRoot, piece);
    if (node >= 0 && t.trie.id(node) >= 0) return t.trie.id(node);
  }
  for (const AddedToken& a : t.added)
    if (a.content == piece) return a.id;
  if (piece.size() > kLongestKey)   // not in the trie: no word is so long
    for (size_t i = t.pieces.size(); i-- > 0;)
      if (t.pieces[i] == piece) return (int32_t)i;
  return -1;
}

// ==== 8 files ====================================================================================================
// A folder says what its tokenizer is in up to three files: vocab.txt (the pieces, one a line, the id is the line), tokenizer.json
// (pieces, settings, added tokens, what goes around a sequence) and tokenizer_config.json (settings again, which win, and limits).
static const Json& need(const Json& object, std::string_view key, const std::string& where) {
  const Json* v = object.find(key);
  if (!v) throw Error(where + ": '" + std::string(key) + "' is missing");
  return *v;
}
static bool is_null(const Json* v) { return !v || v->is(Json::null); }
static bool flag(const Json& object, std::string_view key, bool otherwise, const std::string& where) {
  const Json* v = object.find(key);
  return is_null(v) ? otherwise : v->as_bool(where + ": '" + std::string(key) + "'");
}

// Lines as the reference's reader sees them: they end at LF, a CR before it goes, nothing else ends one.
static std::vector<std::string_view> lines_of(std::string_view bytes) {
  std::vector<std::string_view> lines;
  for (size_t at = 0; at < bytes.size();) {
    const size_t end = std::min(bytes.find('\n', at), bytes.size());
    std::string_view line = bytes.substr(at, end - at);
    if (end < bytes.size() && line.ends_with('\r')) line.remove_suffix(1);
    lines.push_back(line);
    at = end + 1;
  }
  return lines;
}
// Without the white space at its end, Unicode's included: what U+2028 stands for in bert-base-chinese becomes the empty piece.
static std::string_view trim_end(std::string_view line) {
  while (!line.empty()) {
    char32_t c;
    const size_t n = decode_before(line, line.size(), c);
    if (!(properties()[c] & kSpace)) break;
    line.remove_suffix(n);
  }
  return line;
}

struct TokenizerFiles {
  WordPiece::Tables tables{TokenizerSettings()};
  TokenizerSettings settings;
  std::string pad = "[PAD]", unk = "[UNK]", cls = "[CLS]", sep = "[SEP]", mask = "[MASK]";
  bool has_added = false;                // tokenizer.json listed the added tokens
  bool surround = true;                  // [CLS] and [SEP] go around a sequence
  std::vector<uint8_t> exists;           // by id, where ids may have gaps
  std::string odd;                       // what was odd in vocab.txt
  WordPiece out;

  void note(const std::string& what) { odd += (odd.empty() ? "" : ", ") + what; }

  // Checks and takes the pieces; an id has one line.
  void read_vocab(std::string_view bytes, const std::string& where) {
    int64_t blank = 0, spaces = 0, number = 0;
    for (std::string_view line : lines_of(bytes)) {
      number++;
      for (size_t i = 0, n; i < line.size(); i += n)
        if (!(n = utf8_length(line, i)))
          throw Error(where + ":" + std::to_string(number) + ": invalid UTF-8 at byte " + std::to_string(i + 1) + " of the line; is this a vocab.txt?");
      const std::string_view piece = trim_end(line);
      blank += piece.empty(), spaces += !piece.empty() && piece.size() < line.size();
      tables.pieces.emplace_back(piece);
    }
    if (number > INT32_MAX) throw Error(where + ": more lines than ids");
    exists.assign(tables.pieces.size(), 1);
    if (bytes.starts_with("\xEF\xBB\xBF")) note("a byte-order mark that belongs to its first piece");
    if (bytes.find("\r\n") != bytes.npos) note("CR LF line ends");
    if (blank) note(std::to_string(blank) + (blank == 1 ? " blank line" : " blank lines"));
    if (spaces) note(std::to_string(spaces) + " with white space at the end");
  }

  // tokenizer.json, the parts that a BERT tokenizer has; what is no BERT tokenizer is refused by name.
  void read_json(const Json& j, const std::string& where) {
    const Json& model = need(j, "model", where);
    auto type_is = [&](const Json& v, std::string_view wanted) {
      const Json* type = v.find("type");
      return type && type->as_string(where + ": 'type'") == wanted;
    };
    if (model.find("type") && !type_is(model, "WordPiece"))
      throw Error(where + ": its model is " + model.find("type")->as_string(where + ": 'type'") + "; only WordPiece is read");
    if (const Json* v = model.find("unk_token"); !is_null(v)) unk = v->as_string(where + ": 'unk_token'");
    if (const Json* v = model.find("continuing_subword_prefix"); !is_null(v)) tables.prefix = v->as_string(where + ": 'continuing_subword_prefix'");
    if (const Json* v = model.find("max_input_chars_per_word"); !is_null(v)) {
      const int64_t limit = v->as_int(where + ": 'max_input_chars_per_word'");
      if (limit < 1 || limit > Word::kMost) throw Error(where + ": words of " + std::to_string(limit) + " characters; up to " + std::to_string(Word::kMost) + " are read");
      tables.limit = (int)limit;
    }
    const Json& vocab = need(model, "vocab", where);
    const size_t most = vocab.members().size() * 2 + 1000000;   // ids may have gaps, but not so that a small file asks for all memory
    for (const auto& [piece, id] : vocab.members()) place(piece, id.as_int(where + ": '" + piece + "'"), most, where);
    if (const Json* v = j.find("normalizer"); is_null(v)) {
      settings = {false, false, false, false};
    } else {
      if (!type_is(*v, "BertNormalizer")) throw Error(where + ": its normalizer is not BertNormalizer, the only one that is read");
      settings.lowercase = flag(*v, "lowercase", true, where);
      settings.chinese = flag(*v, "handle_chinese_chars", true, where);
      settings.clean_text = flag(*v, "clean_text", true, where);
      if (const Json* s = v->find("strip_accents"); !is_null(s)) settings.strip_accents = s->as_bool(where + ": 'strip_accents'");
    }
    if (const Json* v = j.find("pre_tokenizer"); is_null(v) || !type_is(*v, "BertPreTokenizer"))
      throw Error(where + ": its pre_tokenizer is not BertPreTokenizer, the only one that is read");
    read_added(j, most, where);
    read_around(j.find("post_processor"), where);
    read_blocks(j, where);
  }
  void place(const std::string& piece, int64_t id, size_t most, const std::string& where) {
    if (id < 0 || (size_t)id >= most) throw Error(where + ": '" + piece + "': id " + std::to_string(id) + " is out of range");
    if ((size_t)id >= tables.pieces.size()) tables.pieces.resize((size_t)id + 1), exists.resize((size_t)id + 1);
    tables.pieces[(size_t)id] = piece, exists[(size_t)id] = 1;
  }
  void read_added(const Json& j, size_t most, const std::string& where) {
    const Json* list = j.find("added_tokens");
    if (is_null(list)) return;
    has_added = true;
    for (const Json& v : list->items(where + ": 'added_tokens'")) {
      AddedToken a;
      a.content = need(v, "content", where + ": added_tokens").as_string(where + ": 'content'");
      const int64_t id = need(v, "id", where + ": added_tokens").as_int(where + ": '" + a.content + "'");
      if (id < 0 || (size_t)id >= most) throw Error(where + ": '" + a.content + "': id " + std::to_string(id) + " is out of range");
      a.id = (int32_t)id;
      a.single_word = flag(v, "single_word", false, where), a.lstrip = flag(v, "lstrip", false, where), a.rstrip = flag(v, "rstrip", false, where);
      a.special = flag(v, "special", false, where), a.normalized = flag(v, "normalized", !a.special, where);
      if (!a.content.empty()) tables.added.push_back(a);
    }
  }
  // What goes around a sequence: nothing, the older BertProcessing, or the template [CLS] $A [SEP] $B:1 [SEP]:1.
  void read_around(const Json* v, const std::string& where) {
    surround = !is_null(v);
    if (!surround) return;
    const std::string type = need(*v, "type", where + ": post_processor").as_string(where + ": 'type'"), at = where + ": post_processor";
    if (type == "BertProcessing") {
      auto id = [&](const char* key) {
        const auto& both = need(*v, key, at).items(at + ": '" + key + "'");
        if (both.size() != 2) throw Error(at + ": '" + key + "' is not a token and its id");
        return (int32_t)both[1].as_int(at + ": '" + key + "'");
      };
      tables.cls = id("cls"), tables.sep = id("sep");
      return;
    }
    std::string shape;   // A, B or S for a special token, and the type id
    std::vector<int32_t> ids;
    for (const char* part : {"single", "pair"})
      for (const Json& step : type == "TemplateProcessing" ? need(*v, part, at).items(at) : std::vector<Json>()) {
        const Json *special = step.find("SpecialToken"), *sequence = step.find("Sequence");
        const Json& what = special ? *special : sequence ? *sequence : step;
        const std::string name = need(what, "id", at).as_string(at + ": 'id'");
        shape += (special ? "S" : name) + std::to_string(need(what, "type_id", at).as_int(at + ": 'type_id'"));
        if (!special) continue;
        const auto& list = need(need(need(*v, "special_tokens", at), name, at), "ids", at).items(at + ": 'ids'");
        ids.push_back(list.size() == 1 ? (int32_t)list[0].as_int(at + ": 'ids'") : -1);
      }
    const bool bert = shape == "S0A0S0S0A0S0B1S1" && ids[0] >= 0 && ids[1] >= 0 && ids == std::vector<int32_t>{ids[0], ids[1], ids[0], ids[1], ids[1]};
    if (!bert) throw Error(at + ": " + type + " is not BERT's [CLS] A [SEP] B [SEP], the only one that is read");
    tables.cls = ids[0], tables.sep = ids[1];
  }
  // Blocks that the reference's `Tokenizer.from_file` obeys; here they are for whoever asks.
  void read_blocks(const Json& j, const std::string& where) {
    if (const Json* v = j.find("truncation"); !is_null(v)) {
      const std::string at = where + ": truncation", strategy = need(*v, "strategy", at).as_string(at);
      EncodeOptions o;
      o.max_length = need(*v, "max_length", at).as_int(at + ": 'max_length'");
      o.stride = need(*v, "stride", at).as_int(at + ": 'stride'");
      o.truncation = strategy == "OnlyFirst" ? Truncation::only_first : strategy == "OnlySecond" ? Truncation::only_second : Truncation::longest_first;
      if (const Json* d = v->find("direction")) o.from_left = d->as_string(at) == "Left";
      out.file_truncation = o;
    }
    if (const Json* v = j.find("padding"); !is_null(v)) {
      const std::string at = where + ": padding";
      Padding p;
      if (const Json* fixed = need(*v, "strategy", at).find("Fixed")) p.length = fixed->as_int(at + ": 'Fixed'");
      if (const Json* d = v->find("direction")) p.left = d->as_string(at) == "Left";
      if (const Json* m = v->find("pad_to_multiple_of"); !is_null(m)) p.multiple_of = m->as_int(at + ": 'pad_to_multiple_of'");
      if (const Json* m = v->find("pad_id")) p.id = (int32_t)m->as_int(at + ": 'pad_id'");
      if (const Json* m = v->find("pad_type_id")) p.type_id = (int32_t)m->as_int(at + ": 'pad_type_id'");
      out.file_padding = p;
    }
  }

  void read_config(const Json& j, const std::string& where) {
    if (const Json* v = j.find("tokenizer_class"); !is_null(v) && v->as_string(where + ": 'tokenizer_class'") == "BertJapaneseTokenizer")
      throw Error(where + ": a BertJapaneseTokenizer finds its words with another program; only BERT's own tokenizer is read");
    settings.lowercase = flag(j, "do_lower_case", settings.lowercase, where);
    settings.chinese = flag(j, "tokenize_chinese_chars", settings.chinese, where);
    settings.clean_text = flag(j, "clean_text", settings.clean_text, where);
    if (const Json* v = j.find("strip_accents")) {   // null is a setting too: as lower case
      settings.strip_accents.reset();
      if (!v->is(Json::null)) settings.strip_accents = v->as_bool(where + ": 'strip_accents'");
    }
    const std::pair<const char*, std::string*> names[] = {
        {"pad_token", &pad}, {"unk_token", &unk}, {"cls_token", &cls}, {"sep_token", &sep}, {"mask_token", &mask}};
    for (const auto& [key, name] : names)
      if (const Json* v = j.find(key); !is_null(v)) *name = (v->is(Json::object) ? need(*v, "content", where) : *v).as_string(where + ": '" + key + "'");
    if (const Json* v = j.find("model_max_length"); v && v->is(Json::number)) {
      const double length = v->as_double(where + ": 'model_max_length'");   // "no limit" is written as an integer of 31 digits
      if (length >= 1 && length <= 1e6) out.model_max_length = (int64_t)length;
    }
  }

  // tokenizer.json wins over vocab.txt; the first difference is worth a word.
  void compare(std::string_view vocab, const std::string& where) {
    const auto lines = lines_of(vocab);
    size_t known = exists.size();
    for (const AddedToken& a : tables.added) known -= (size_t)a.id >= exists.size() ? 0 : 0;
    if (lines.size() != known)
      throw Error(where + ": " + std::to_string(lines.size()) + " pieces, but tokenizer.json has " + std::to_string(known) + "; remove the one that does not belong to the model");
    for (size_t i = 0; i < lines.size(); i++)
      if (lines[i] != tables.pieces[i] && trim_end(lines[i]) != tables.pieces[i]) {
        out.warnings.push_back(where + ":" + std::to_string(i + 1) + ": '" + std::string(lines[i]) + "', but tokenizer.json has '" + tables.pieces[i] + "'; tokenizer.json is used");
        return;
      }
  }

  WordPiece finish(const std::string& where) {
    tables.normal = Normalizer(settings);
    if (const std::string twice = tables.build_pieces(exists); !twice.empty()) note(twice);
    if (tables.pieces.empty()) note("no piece at all");
    auto find = [&](const std::string& piece) {
      const int32_t node = tables.trie.walk(Trie::kRoot, piece);
      return node < 0 || piece.empty() ? -1 : tables.trie.id(node);
    };
    tables.unk = find(unk);
    if (tables.unk < 0) note("no " + unk + ": a word that the pieces cannot spell will be an error");
    if (!has_added) {   // what a BertTokenizer adds to a bare vocab.txt; it puts [CLS] and [SEP] around where there are both
      for (const std::string& name : {unk, sep, pad, cls, mask})
        if (const int32_t id = find(name); id >= 0) tables.added.push_back({name, id, false, false, false, false, true});
      tables.cls = find(cls), tables.sep = find(sep);
      if (tables.cls < 0 || tables.sep < 0) note("no " + (tables.cls < 0 ? cls : sep) + ": nothing is put around a text"), surround = false;
    }
    if (!surround) tables.cls = tables.sep = -1;
    tables.build_tokens();
    out.tables_ = std::make_shared<const WordPiece::Tables>(std::move(tables));
    out.pad = out.id(pad), out.unk = out.tables_->unk, out.cls = out.id(cls), out.sep = out.id(sep), out.mask = out.id(mask);
    if (!odd.empty()) out.warnings.push_back(where + ": odd vocabulary: " + odd + "; read as Hugging Face reads it");
    return out;
  }
};
