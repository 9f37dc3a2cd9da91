// Throws arbitrary bytes at the tokenizer and checks what must hold of any answer. One source, two programs:
//
//   make fuzz             with clang's libFuzzer, which looks for inputs that reach new code: FUZZ=encode, decode, vocab or json says
//                         what the bytes are; tests/fuzz/encode and its like hold inputs to begin with
//   make random-texts     -DRANDOM_TEXTS: texts that mix scripts, controls, marks, special tokens and broken UTF-8
//
// A broken rule ends the program with a line that says which, and the text.
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <random>
#include <thread>

#include "bert.h"

using bert::EncodeOptions;
using bert::Encoding;
using bert::TokenizerSettings;
using bert::WordPiece;

namespace {

void must(bool holds, const char* rule, std::string_view text) {
  if (holds) return;
  std::fprintf(stderr, "wordpiece: %s: %s\n", rule, bert::json_quote(text).c_str());
  std::abort();
}

std::string utf8(char32_t c) {
  if (c < 0x80) return {(char)c};
  if (c < 0x800) return {(char)(0xC0 | c >> 6), (char)(0x80 | (c & 63))};
  if (c < 0x10000) return {(char)(0xE0 | c >> 12), (char)(0x80 | (c >> 6 & 63)), (char)(0x80 | (c & 63))};
  return {(char)(0xF0 | c >> 18), (char)(0x80 | (c >> 12 & 63)), (char)(0x80 | (c >> 6 & 63)), (char)(0x80 | (c & 63))};
}

// Code points are pieces, alone and inside a word, so that tokens show what the normaliser made: the ids of the k-th are 5 + 2k and 6 + 2k.
// Not all there are, which would take longer to look up than to think about, but all kinds.
constexpr int32_t kFirst = 5;
const std::vector<char32_t>& pieces() {
  static const std::vector<char32_t> all = [] {
    std::vector<char32_t> out;
    for (const auto& [first, last] : {std::pair<char32_t, char32_t>{1, 9},
                                      {11, 0x3100},
                                      {0x4E00, 0x4E80},
                                      {0xAC00, 0xAC80},
                                      {0xF900, 0x10000},
                                      {0x10A00, 0x11200},
                                      {0x1D100, 0x1D250},
                                      {0x1E000, 0x1E100},
                                      {0x1E8D0, 0x1E950},
                                      {0x1F600, 0x1F680}})
      for (char32_t c = first; c < last; c++) out.push_back(c);
    return out;
  }();
  return all;
}
const WordPiece& letters(bool lowercase) {
  static const WordPiece cased = [] {
    std::string vocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n";
    for (const char32_t c : pieces()) vocab += utf8(c) + "\n##" + utf8(c) + "\n";
    return WordPiece::from_vocab(vocab, {false, {}, true, true}, "letters");
  }();
  static const WordPiece uncased = cased.with_settings({true, {}, true, true});
  return lowercase ? uncased : cased;
}
const WordPiece& words() {
  static const WordPiece t = WordPiece::load("tests/golden/wordpiece/vocab-uncased.txt");
  return t;
}

std::vector<int32_t> bare(const WordPiece& t, std::string_view text) {
  std::vector<int32_t> ids;
  t.append_ids(text, ids);
  return ids;
}
std::string spelled(const WordPiece& t, std::span<const int32_t> ids) {
  std::string out;
  for (size_t i = 0; i < ids.size(); i++) {
    const std::string_view piece = t.piece(ids[i]);
    out += i && t.continuation(ids[i]) ? piece.substr(2) : piece;
  }
  return out;
}

// Marks that stay and that canonical order moves: their letters and their places part, so a place says nothing of the letter. By number.
const std::vector<bool>& moving() {
  static const std::vector<bool> marks = [] {
    const WordPiece& t = letters(true);
    std::vector<bool> out;
    auto swaps = [&](char32_t a, char32_t b) {  // U+1D16E has class 216, U+1D16D 226: every class is above the one or below the other
      const auto ids = bare(t, "a" + utf8(a) + utf8(b));
      return ids.size() == 3 && ids[1] == bare(t, "a" + utf8(b))[1] && ids[1] != ids[2];
    };
    for (const char32_t c : pieces()) out.push_back(swaps(c, 0x1D16E) || swaps(0x1D16D, c) || (c >= 0x1D165 && c <= 0x1D172));
    return out;
  }();
  return marks;
}

// What holds of any text and tokenizer.
Encoding check_encoding(const WordPiece& t, std::string_view text, bool valid) {
  const Encoding e = t.encode(text);
  const size_t n = e.ids.size();
  must(n >= 2 && e.type_ids.size() == n && e.words.size() == n && e.sequence.size() == n && e.special.size() == n && e.offsets.size() == n,
       "lengths", text);
  must(e.ids[0] == t.cls && e.ids[n - 1] == t.sep, "[CLS] and [SEP]", text);
  int64_t begin = 0, word = 0;
  for (size_t i = 1; i + 1 < n; i++) {
    const auto [from, to] = e.offsets[i];
    must(e.ids[i] >= 0 && e.ids[i] < t.size(), "ids in range", text);
    must(from >= begin && from < to && to <= (int64_t)text.size(), "offsets ascend", text);
    for (const int64_t at : e.offsets[i])
      must(!valid || at == (int64_t)text.size() || ((unsigned char)text[(size_t)at] & 0xC0) != 0x80, "offsets on borders", text);
    must(e.words[i] == word || (e.words[i] == word + 1 && i > 1), "words count on", text);
    must(t.continuation(e.ids[i]) == (i > 1 && e.words[i] == e.words[i - 1]), "continuations inside words", text);
    begin = from, word = e.words[i];
  }
  EncodeOptions plain;
  plain.add_special = plain.parse_special = false;
  must(t.encode(text, plain).ids == bare(t, text), "append_ids is encode", text);
  std::vector<int32_t> ids;
  t.append_ids(text, ids, {});
  must(ids == e.ids, "append_ids with options is encode", text);
  t.decode(e.ids), t.decode(e.ids, true, false);
  return e;
}

void check_text(std::string_view text) {
  std::string repaired(text);
  const bool valid = bert::valid_utf8(text);
  must(valid == !bert::repair_utf8(repaired), "what is not valid is repaired", text);
  must(bert::repair_utf8(repaired) == 0, "repaired once is enough", text);
  {
    const WordPiece& t = letters(text.size() & 1);  // the one setting or the other
    const Encoding e = check_encoding(t, text, valid);
    must(valid || t.encode(repaired).ids == e.ids, "what cannot be read is what is repaired", text);
    for (size_t i = 1; valid && i + 1 < e.ids.size(); i++) {
      if (e.ids[i] < kFirst) continue;  // [UNK]: more than 100 letters; [MASK]
      const auto [from, to] = e.offsets[i];
      const std::string letter = spelled(t, {&e.ids[i], 1}), source = spelled(t, bare(t, text.substr((size_t)from, (size_t)(to - from))));
      const bool found = source.find(t.continuation(e.ids[i]) ? letter.substr(2) : letter) != source.npos;
      must(found || moving()[(size_t)(e.ids[i] - kFirst) / 2], "a token's bytes are normalised to it", text);
    }
  }
  const WordPiece& t = words();
  const Encoding e = check_encoding(t, text, valid), all = letters(true).encode(text);
  // A word's pieces are its letters: the same words as letter by letter, but for those that are unknown.
  for (size_t i = 1, k = 1; i + 1 < e.ids.size();) {
    size_t i_end = i, k_end = k;
    while (e.words[i_end] == e.words[i]) i_end++;
    while (k_end < all.ids.size() && all.words[k_end] == e.words[i]) k_end++;
    const std::string as_pieces = spelled(t, {&e.ids[i], i_end - i}), as_letters = spelled(letters(true), {&all.ids[k], k_end - k});
    must(e.ids[i] == t.unk || all.ids[k] == t.unk || as_pieces == as_letters, "a word's pieces are the word", text);
    must(e.offsets[i][0] == all.offsets[k][0] && e.offsets[i_end - 1][1] == all.offsets[k_end - 1][1], "a word's bytes", text);
    i = i_end, k = k_end;
  }
}

// Windows and their limits, cut by the text's own bytes.
void check_windows(std::string_view text) {
  if (text.size() < 4) return;
  EncodeOptions o;
  o.max_length = text[0] & 31, o.stride = text[1] & 7, o.from_left = text[2] & 1, o.truncation = (bert::Truncation)(text[2] >> 1 & 1);
  o.add_special = text[2] & 4, o.parse_special = text[2] & 8;
  const std::string_view a = text.substr(3, text.size() / 2), b = text.substr(3 + a.size() < text.size() ? 3 + a.size() : text.size());
  for (const auto& pair : {std::optional<std::string_view>(), std::optional<std::string_view>(b)}) try {
      const auto windows = words().encode_windows(a, pair, o);
      for (const Encoding& w : windows) bert::code_point_offsets(w, a, b);
      EncodeOptions no_stride = o;
      no_stride.stride = 0;
      const Encoding alone = pair ? words().encode(a, *pair, no_stride) : words().encode(a, no_stride);
      must(alone.ids == windows[0].ids, "the first window is the encoding", text);
    } catch (const bert::Error&) {}  // a stride or a limit that does not fit
}

}  // namespace

#ifndef RANDOM_TEXTS
namespace {
void check_decode(std::string_view bytes) {
  std::vector<int32_t> ids(bytes.size() / 4);
  if (!ids.empty()) std::memcpy(ids.data(), bytes.data(), ids.size() * 4);
  for (int32_t& id : ids)
    if (id & 1) id = (int32_t)((uint32_t)id % 5000);  // half of them in range
  for (const bool skip : {false, true})
    for (const bool cleanup : {false, true}) {
      const std::string text = words().decode(ids, skip, cleanup);
      std::string copy = text;
      must(bert::repair_utf8(copy) == 0, "decoded text is UTF-8", text);
    }
}

// A tokenizer from arbitrary files either loads, and then works, or is refused by an Error.
void use(const WordPiece& t) {
  for (const char* text : {"hello, world", "a[MASK]b H\u00E9llo \u4F60\u597D 1", "\u0130\u1100\uAC01 ##x"}) try {
      const Encoding e = t.encode(text);
      must(t.encode(text).ids == e.ids, "twice the same", text);
      for (const int32_t id : e.ids) must(id >= 0 && id < t.size(), "ids in range", text);
      t.decode(e.ids);
    } catch (const bert::Error&) {}  // no [UNK]
  for (int32_t id = -1; id <= std::min<int64_t>(t.size(), 50); id++) t.id(t.piece(id)), t.continuation(id);
}
void check_vocab(std::string_view bytes) {
  try {
    use(WordPiece::from_vocab(bytes, {}, "vocab.txt"));
  } catch (const bert::Error&) {}
}
void check_json(std::string_view bytes) {
  static const std::string folder = [] {
    std::string made = (std::filesystem::temp_directory_path() / "bert-fuzz-XXXXXX").string();
    if (!mkdtemp(made.data())) std::abort();
    return made;
  }();
  const size_t cut = bytes.find('\0');  // before it tokenizer.json, after it tokenizer_config.json
  for (const auto& [name, part] : {std::pair("/tokenizer.json", bytes.substr(0, cut)),
                                   std::pair("/tokenizer_config.json", cut == bytes.npos ? "{}" : bytes.substr(cut + 1))}) {
    std::FILE* f = std::fopen((folder + name).c_str(), "wb");
    if (!f) std::abort();
    std::fwrite(part.data(), 1, part.size(), f);
    std::fclose(f);
  }
  try {
    use(WordPiece::load(folder));
  } catch (const bert::Error&) {}
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string what = std::getenv("FUZZ") ? std::getenv("FUZZ") : "encode";
  const std::string_view bytes((const char*)data, size);
  if (what == "encode") check_text(bytes), check_windows(bytes);
  if (what == "decode") check_decode(bytes);
  if (what == "vocab") check_vocab(bytes);
  if (what == "json") check_json(bytes);
  return 0;
}
#else
namespace {
std::string random_text(std::mt19937_64& random) {
  static const char* const known[] = {"the ",  "of ",   "running",      "##ing",      "[MASK]",    "[SEP]", "[CLS]",
                                      "[UNK]", "[PAD]", "[mask]",       "[MASK ",     "[unused0]", "don't", "U.S.A.",
                                      "3.14",  "a-b",   "\u4F60\u597D", "na\u00EFve", "\u0130",    "\u1E9E"};
  static const char32_t starts[] = {0x0,     0x20,    0x80,    0xC0,    0x300,   0x370,   0x400,   0x590,   0x600,   0x900,
                                    0xE00,   0x1100,  0x1DC0,  0x1E00,  0x2000,  0x20D0,  0x3000,  0x4E00,  0xAC00,  0xD780,
                                    0xF900,  0xFB00,  0xFE00,  0xFFF0,  0x10A00, 0x11000, 0x1D100, 0x1D150, 0x1D1B0, 0x1E000,
                                    0x1E8D0, 0x1F600, 0x20000, 0x2B810, 0x2F800, 0xE0000, 0xF0000, 0x10FF80};
  std::string text;
  auto below = [&](uint64_t n) { return random() % n; };
  for (uint64_t n = below(12); n > 0; n--) {
    const uint64_t kind = below(100);
    if (kind < 25)
      text += known[below(std::size(known))];
    else if (kind < 50)
      for (uint64_t k = 1 + below(10); k > 0; k--) text += (char)(below(4) ? 'a' + below(26) : 0x20 + below(95));
    else if (kind < 85)
      text += utf8(starts[below(std::size(starts))] + (char32_t)below(128));
    else if (kind < 92)
      text += ' ';
    else if (kind < 96)
      text += utf8((char32_t)(0x300 + below(0x70)));
    else if (kind < 98)
      text += (char)below(256);
    else if (kind < 99)
      text.append(95 + below(10), (char)('a' + below(26)));
    else if (const char32_t c = (char32_t)below(0x110000); c < 0xD800 || c >= 0xE000)
      text += utf8(c);
  }
  return text;
}

// Texts checked alone, and then a thousand together, on one thread and on two.
void run(uint64_t seed, int64_t count) {
  std::mt19937_64 random(seed);
  std::vector<std::string> texts(1000);
  for (int64_t done = 0; done < count; done += (int64_t)texts.size()) {
    std::vector<int32_t> want, ids;
    std::vector<int64_t> ends;
    for (std::string& text : texts) {
      text = random_text(random);
      check_text(text), check_windows(text);
      words().append_ids(text, want);
    }
    for (const int threads : {1, 2}) {
      ids.clear(), ends.clear();
      words().append_ids(std::vector<std::string_view>(texts.begin(), texts.end()), ids, ends, threads);
      must(ids == want, "many texts are each text", texts[0]);
    }
  }
}
}  // namespace

int main(int argc, char** argv) {
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 100000;
  letters(true), words(), moving();
  std::vector<std::thread> threads;  // all share the tokenizers
  for (uint64_t seed = 1; seed <= 2; seed++) threads.emplace_back(run, seed, count / 2);
  for (std::thread& thread : threads) thread.join();
  std::printf("%lld random texts: every rule holds\n", (long long)count);
}
#endif
