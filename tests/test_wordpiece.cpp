// The tokenizer and the vocabulary trainer: Hugging Face's answers case by case, then what must hold of any text.
#include <chrono>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "testing.h"

using bert::EncodeOptions;
using bert::Encoding;
using bert::Json;
using bert::WordPiece;

namespace {

// ---- golden files: one JSON object a line ----------------------------------------------------------------------
const std::string small = "tests/golden/wordpiece/", large = testing::shared + "golden/wordpiece/";

std::string utf8(char32_t c) {
  if (c < 0x80) return {(char)c};
  if (c < 0x800) return {(char)(0xC0 | c >> 6), (char)(0x80 | (c & 63))};
  if (c < 0x10000) return {(char)(0xE0 | c >> 12), (char)(0x80 | (c >> 6 & 63)), (char)(0x80 | (c & 63))};
  return {(char)(0xF0 | c >> 18), (char)(0x80 | (c >> 12 & 63)), (char)(0x80 | (c >> 6 & 63)), (char)(0x80 | (c & 63))};
}
std::vector<Json> json_lines(const std::string& path) {
  std::vector<Json> out;
  const std::string bytes = bert::read_file(path);
  for (size_t at = 0; at < bytes.size();) {
    const size_t end = std::min(bytes.find('\n', at), bytes.size());
    if (end > at) out.push_back(Json::parse(std::string_view(bytes).substr(at, end - at), path));
    at = end + 1;
  }
  return out;
}
const Json& field(const Json& j, const std::string& key) {
  const Json* v = j.find(key);
  if (!v) throw bert::Error("golden: no " + key);
  return *v;
}
bool has(const Json& j, const std::string& key) { return j.find(key) && !j.find(key)->is(Json::null); }
std::string text_of(const Json& j, const std::string& key) { return field(j, key).as_string(key); }
bool yes(const Json& j, const std::string& key) { return field(j, key).as_bool(key); }

// A list of integers as they stand in the file; null is -1; a pair is two.
std::vector<int64_t> numbers(const Json& list) {
  std::vector<int64_t> out;
  for (const Json& v : list.items("list"))
    if (v.is(Json::array))
      for (const Json& w : v.items("pair")) out.push_back(w.as_int("number"));
    else
      out.push_back(v.is(Json::null) ? -1 : v.as_int("number"));
  return out;
}
template <class T>
std::vector<int64_t> numbers(const std::vector<T>& list) {
  return {list.begin(), list.end()};
}
std::vector<int64_t> numbers(const std::vector<std::array<int64_t, 2>>& list) {
  std::vector<int64_t> out;
  for (const auto& [a, b] : list) out.push_back(a), out.push_back(b);
  return out;
}
std::vector<std::string> strings(const Json& list) {
  std::vector<std::string> out;
  for (const Json& v : list.items("list")) out.push_back(v.as_string("string"));
  return out;
}

// One golden case: which of its fields the encoding answers otherwise; "" when none.
std::string differences(const Json& want, const Encoding& got, const WordPiece& tokenizer, const std::string& text,
                        const std::string& pair) {
  std::string out;
  auto check = [&](const char* key, const std::vector<int64_t>& values) {
    if (want.find(key) && numbers(field(want, key)) != values) out += std::string(" ") + key;
  };
  check("ids", numbers(got.ids));
  check("type_ids", numbers(got.type_ids));
  check("word_ids", numbers(got.words));
  check("sequence_ids", numbers(got.sequence));
  check("special_tokens_mask", numbers(got.special));
  check("offsets_byte", numbers(got.offsets));
  if (want.find("offsets_char")) check("offsets_char", numbers(bert::code_point_offsets(got, text, pair)));
  if (const Json* tokens = want.find("tokens"))  // an added token's name may be shown as it stood in the text: by ids only
    for (size_t i = 0; i < got.ids.size() && i < tokens->items("tokens").size(); i++)
      if (tokenizer.piece(got.ids[i]) != tokens->items("tokens")[i].as_string("token") && tokenizer.piece(got.ids[i]).size() < 5)
        out += " tokens";
  return out;
}

// The three vocabularies of the golden files, as published. A tokenizer is made once for each setting.
const WordPiece& golden_tokenizer(const std::string& name, const bert::TokenizerSettings& settings) {
  static std::map<std::string, WordPiece> made;
  const std::string key = name + std::to_string(settings.lowercase) + std::to_string(settings.chinese) +
                          std::to_string(settings.clean_text) + (settings.strip_accents ? std::to_string(*settings.strip_accents) : "-");
  const auto it = made.find(key);
  if (it != made.end()) return it->second;
  const std::string path = name == "uncased"   ? testing::shared + "models/all-MiniLM-L6-v2/vocab.txt"
                           : name == "chinese" ? testing::shared + "models/bert-base-chinese/vocab.txt"
                                               : (name == "small" ? small : large) + "vocab-cased.txt";
  return made.emplace(key, WordPiece::from_vocab(bert::read_file(path), settings, path)).first->second;
}
const WordPiece& golden_tokenizer(const std::string& name) {
  return golden_tokenizer(name, {.lowercase = name == "uncased", .strip_accents = {}, .chinese = true, .clean_text = true});
}

// Runs every case of a file; `run` returns what differs. Prints the count, and the first few failures whole.
void run_cases(const std::string& path, const std::function<std::string(const Json&)>& run) {
  int64_t cases = 0, failed = 0;
  for (const Json& c : json_lines(path)) {
    cases++;
    const std::string wrong = run(c);
    if (wrong.empty()) continue;
    if (++failed <= 5) {
      CAPTURE(path);
      CAPTURE(cases);  // the line
      CHECK_MESSAGE(wrong.empty(), wrong);
    }
  }
  CHECK(cases > 0);
  CHECK_MESSAGE(failed == 0, failed << " of " << cases << " cases of " << path << " differ");
  MESSAGE(path << ": " << cases - failed << " of " << cases);
}

std::string encode_case(const Json& c, const WordPiece& tokenizer) {
  EncodeOptions options;
  options.add_special = yes(c, "add_special_tokens"), options.parse_special = yes(c, "special_in_text");
  const std::string text = text_of(c, "text");
  const Encoding got = tokenizer.encode(text, options);
  std::string wrong = differences(c, got, tokenizer, text, "");
  if (!options.parse_special && !options.add_special) {
    std::vector<int32_t> ids;
    tokenizer.append_ids(text, ids);
    if (ids != got.ids) wrong += " append_ids";
  }
  return wrong;
}
bert::TokenizerSettings settings_of(const Json& c) {
  bert::TokenizerSettings s;
  s.lowercase = yes(c, "lowercase"), s.chinese = yes(c, "handle_chinese_chars"), s.clean_text = yes(c, "clean_text");
  if (has(c, "strip_accents")) s.strip_accents = yes(c, "strip_accents");
  return s;
}

std::string error_kind(const std::string& message) {
  if (message.find("stride") != message.npos) return "stride_too_large";
  if (message.find("too short") != message.npos) return "too_short";
  if (message.find("no second text") != message.npos) return "no_second_text";
  return message;
}
std::string pair_case(const Json& c, const WordPiece& tokenizer) {
  EncodeOptions o;
  o.add_special = yes(c, "add_special_tokens");
  if (has(c, "max_length")) o.max_length = field(c, "max_length").as_int("max_length");
  o.stride = has(c, "stride") ? field(c, "stride").as_int("stride") : 0;
  const std::string strategy = text_of(c, "strategy"), text = text_of(c, "text"), pair = has(c, "pair") ? text_of(c, "pair") : "";
  o.truncation = strategy == "only_first"    ? bert::Truncation::only_first
                 : strategy == "only_second" ? bert::Truncation::only_second
                                             : bert::Truncation::longest_first;
  o.from_left = text_of(c, "direction") == "left";
  std::string error;
  std::vector<Encoding> got;
  try {
    got = tokenizer.encode_windows(text, has(c, "pair") ? std::optional<std::string_view>(pair) : std::nullopt, o);
  } catch (const bert::Error& e) { error = error_kind(e.what()); }
  if (error != (has(c, "error") ? text_of(c, "error") : "")) return " error '" + error + "'";
  if (!error.empty()) return "";
  const auto& want = field(c, "windows").items("windows");
  if (want.size() != got.size()) return " " + std::to_string(got.size()) + " windows, not " + std::to_string(want.size());
  std::string wrong;
  for (size_t i = 0; i < got.size(); i++) wrong += differences(want[i], got[i], tokenizer, text, pair);
  const Encoding alone = has(c, "pair") ? tokenizer.encode(text, pair, o) : tokenizer.encode(text, o);
  if (alone.ids != got[0].ids || alone.offsets != got[0].offsets) wrong += " encode differs from the first window";
  return wrong;
}
std::string decode_case(const Json& c, const WordPiece& tokenizer) {
  std::vector<int32_t> ids;
  for (const int64_t id : numbers(field(c, "ids"))) ids.push_back((int32_t)id);
  const std::string got = tokenizer.decode(ids, yes(c, "skip_special_tokens"), yes(c, "cleanup"));
  return got == text_of(c, "text") ? "" : " got '" + got + "'";
}
std::string words_case(const Json& c, const WordPiece& tokenizer) {
  EncodeOptions o;
  o.add_special = yes(c, "add_special_tokens");
  const auto words = strings(field(c, "words")), pair = has(c, "pair_words") ? strings(field(c, "pair_words")) : std::vector<std::string>();
  const Encoding got = tokenizer.encode_words_windows(words, pair, has(c, "pair_words"), o)[0];
  std::string wrong;
  for (const auto& [key, values] : {std::pair<const char*, std::vector<int64_t>>{"ids", numbers(got.ids)},
                                    {"type_ids", numbers(got.type_ids)},
                                    {"word_ids", numbers(got.words)},
                                    {"sequence_ids", numbers(got.sequence)},
                                    {"special_tokens_mask", numbers(got.special)},
                                    {"offsets_byte", numbers(got.offsets)}})
    if (numbers(field(c, key)) != values) wrong += std::string(" ") + key;
  return wrong;
}
std::string from_base64(const std::string& s) {
  static const std::string letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  uint32_t bits = 0;
  int have = 0;
  for (const char c : s) {
    if (c == '=') break;
    bits = bits << 6 | (uint32_t)letters.find(c), have += 6;
    if (have >= 8) have -= 8, out += (char)(bits >> have & 255);
  }
  return out;
}
std::string bad_utf8_case(const Json& c, const WordPiece& tokenizer) {
  const std::string bytes = from_base64(text_of(c, "bytes_base64"));
  const Encoding got = tokenizer.encode(bytes);
  std::string wrong = differences(c, got, tokenizer, bytes, ""), repaired = bytes;
  bert::repair_utf8(repaired);
  if (repaired != text_of(c, "repaired")) wrong += " repaired";
  if (tokenizer.encode(repaired).ids != got.ids) wrong += " ids after repair";
  return wrong;
}
std::string vocab_file_case(const Json& c, const std::string& folder) {
  const std::string path = folder + text_of(c, "file");
  WordPiece tokenizer;
  try {
    tokenizer = WordPiece::load(path);
  } catch (const bert::Error& e) { return has(c, "error") ? "" : std::string(" ") + e.what(); }
  if (has(c, "error")) return " loads";
  std::string wrong;
  std::map<int64_t, std::string> want;
  for (const Json& entry : field(c, "vocab").items("vocab"))
    want[entry.items("entry")[1].as_int("id")] = entry.items("entry")[0].as_string("piece");
  for (int64_t id = 0; id < tokenizer.size() + 2; id++) {
    if (tokenizer.piece((int32_t)id) != want[id]) wrong += " piece " + std::to_string(id);
    if (!want[id].empty() && tokenizer.id(want[id]) != id) wrong += " id of " + want[id];
  }
  const auto& encodings = field(c, "encodings").items("encodings");
  const auto texts = strings(field(c, "texts"));
  for (size_t i = 0; i < texts.size(); i++) {
    const Json& e = encodings[i];
    try {
      const Encoding got = tokenizer.encode(texts[i]);
      if (has(e, "error") || numbers(field(e, "ids")) != numbers(got.ids)) wrong += " ids of '" + texts[i] + "'";
    } catch (const bert::Error& error) {
      if (!has(e, "error")) wrong += std::string(" ") + error.what();
    }
  }
  return wrong;
}

// The reference's padding, for the tokenizer.json cases, whose answers are padded.
void pad(std::vector<Encoding*> batch, const bert::Padding& p) {
  size_t length = (size_t)p.length;
  if (!length)
    for (const Encoding* e : batch) length = std::max(length, e->ids.size());
  if (p.multiple_of && length % (size_t)p.multiple_of) length += (size_t)p.multiple_of - length % (size_t)p.multiple_of;
  for (Encoding* e : batch)
    while (e->ids.size() < length) {
      auto put = [&](auto& v, auto x) { v.insert(p.left ? v.begin() : v.end(), x); };
      put(e->ids, p.id), put(e->type_ids, p.type_id), put(e->words, -1), put(e->sequence, -1), put(e->special, (uint8_t)1);
      put(e->offsets, std::array<int64_t, 2>{0, 0});
    }
}
std::string json_case(const Json& c, const WordPiece& tokenizer) {
  struct Row {
    std::string text, pair;
    bool has_pair;
  };
  std::vector<Row> rows;
  if (has(c, "batch")) {
    for (const Json& v : field(c, "batch").items("batch"))
      if (v.is(Json::string))
        rows.push_back({v.as_string("text"), "", false});
      else
        rows.push_back({v.items("pair")[0].as_string("text"), v.items("pair")[1].as_string("pair"), true});
  } else {
    rows.push_back({text_of(c, "text"), has(c, "pair") ? text_of(c, "pair") : "", has(c, "pair")});
  }
  const EncodeOptions options = tokenizer.file_truncation.value_or(EncodeOptions());
  std::vector<std::vector<Encoding>> got;
  try {
    for (const Row& r : rows)
      got.push_back(tokenizer.encode_windows(r.text, r.has_pair ? std::optional<std::string_view>(r.pair) : std::nullopt, options));
  } catch (const bert::Error& e) { return has(c, "error") ? "" : std::string(" ") + e.what(); }
  if (has(c, "error")) return " no error";
  if (tokenizer.file_padding) {
    std::vector<Encoding*> all;
    for (auto& windows : got) all.push_back(&windows[0]);
    if (!tokenizer.file_padding->length) {  // the longest is looked for among the encodings; each one's windows follow
      pad(all, *tokenizer.file_padding);
      bert::Padding same = *tokenizer.file_padding;
      same.length = (int64_t)all[0]->ids.size();
      for (auto& windows : got)
        for (Encoding& w : windows) pad({&w}, same);
    } else {
      for (auto& windows : got)
        for (Encoding& w : windows) pad({&w}, *tokenizer.file_padding);
    }
  }
  std::string wrong;
  const auto& want = field(c, "encodings").items("encodings");
  for (size_t i = 0; i < rows.size(); i++) {
    wrong += differences(want[i], got[i][0], tokenizer, rows[i].text, rows[i].pair);
    const auto& more = field(want[i], "overflowing").items("overflowing");
    if (more.size() + 1 != got[i].size()) return wrong + " number of windows";
    for (size_t k = 0; k < more.size(); k++)
      if (numbers(more[k].is(Json::array) ? more[k] : field(more[k], "ids")) != numbers(got[i][k + 1].ids)) wrong += " window";
  }
  return wrong;
}

}  // namespace

// ==== golden files beside the repository ========================================================================
TEST_CASE("wordpiece: every golden text") {
  SKIP_WITHOUT(large + "encode-uncased.jsonl");
  run_cases(large + "encode-uncased.jsonl", [](const Json& c) { return encode_case(c, golden_tokenizer("uncased")); });
  run_cases(large + "encode-chinese.jsonl", [](const Json& c) { return encode_case(c, golden_tokenizer("chinese")); });
  run_cases(large + "encode-cased.jsonl", [](const Json& c) { return encode_case(c, golden_tokenizer("cased")); });
  run_cases(large + "encode-nostrip.jsonl",
            [](const Json& c) { return encode_case(c, golden_tokenizer(text_of(c, "vocab"), settings_of(c))); });
}
TEST_CASE("wordpiece: every golden pair, decoding, word list, invalid text") {
  SKIP_WITHOUT(large + "pairs.jsonl");
  run_cases(large + "pairs.jsonl", [](const Json& c) { return pair_case(c, golden_tokenizer(text_of(c, "tokenizer"))); });
  run_cases(large + "decode.jsonl", [](const Json& c) { return decode_case(c, golden_tokenizer(text_of(c, "tokenizer"))); });
  run_cases(large + "pretokenized.jsonl", [](const Json& c) { return words_case(c, golden_tokenizer(text_of(c, "tokenizer"))); });
  run_cases(large + "bad-utf8.jsonl", [](const Json& c) { return bad_utf8_case(c, golden_tokenizer(text_of(c, "tokenizer"))); });
}
TEST_CASE("wordpiece: every golden vocabulary file and tokenizer.json") {
  SKIP_WITHOUT(large + "vocab-files/expected.jsonl");
  run_cases(large + "vocab-files/expected.jsonl", [](const Json& c) { return vocab_file_case(c, large + "vocab-files/"); });
  for (const auto& entry : std::filesystem::directory_iterator(large + "tokenizer_json")) {
    const WordPiece tokenizer = WordPiece::load(entry.path().string());
    CHECK(tokenizer.warnings.empty());
    run_cases(entry.path().string() + "/cases.jsonl", [&](const Json& c) { return json_case(c, tokenizer); });
  }
}

// ==== the same cases, a selection that lives here ================================================================
TEST_CASE("wordpiece: golden texts, pairs, decoding, word lists, invalid text") {
  auto tokenizer = [](const Json& c, const bert::TokenizerSettings* settings) -> const WordPiece& {
    const std::string name = text_of(c, settings ? "vocab" : "tokenizer");
    static std::map<std::string, WordPiece> vocabularies;
    if (!vocabularies.count(name)) {
      const std::string path = small + "vocab-" + name + ".txt";
      vocabularies[name] = WordPiece::from_vocab(bert::read_file(path), {name == "uncased", {}, true, true}, path);
    }
    static WordPiece with;
    return settings ? with = vocabularies[name].with_settings(*settings) : vocabularies[name];
  };
  run_cases(small + "encode.jsonl", [&](const Json& c) {
    const bert::TokenizerSettings settings = settings_of(c);
    return encode_case(c, tokenizer(c, &settings));
  });
  run_cases(small + "pairs.jsonl", [&](const Json& c) { return pair_case(c, tokenizer(c, nullptr)); });
  run_cases(small + "decode.jsonl", [&](const Json& c) { return decode_case(c, tokenizer(c, nullptr)); });
  run_cases(small + "pretokenized.jsonl", [&](const Json& c) { return words_case(c, tokenizer(c, nullptr)); });
  run_cases(small + "bad-utf8.jsonl", [&](const Json& c) { return bad_utf8_case(c, tokenizer(c, nullptr)); });
}
TEST_CASE("wordpiece: golden vocabulary files and tokenizer.json") {
  run_cases(small + "vocab-files/expected.jsonl", [](const Json& c) { return vocab_file_case(c, small + "vocab-files/"); });
  const WordPiece blocks = WordPiece::load(small + "uncased-only-second-left"), added = WordPiece::load(small + "added-tokens");
  CHECK((blocks.warnings.empty() && added.warnings.empty()));
  run_cases(small + "uncased-only-second-left/cases.jsonl", [&](const Json& c) { return json_case(c, blocks); });
  run_cases(small + "added-tokens/cases.jsonl", [&](const Json& c) { return encode_case(c, added); });
}

// ==== every code point ==========================================================================================
namespace {
// A vocabulary in which every code point is a piece, alone and inside a word: its tokens show what the normaliser made.
const WordPiece& every_code_point() {
  static const WordPiece tokenizer = [] {
    std::string vocab = "[UNK]\n";
    for (char32_t c = 0; c < 0x110000; c++) {
      if (c >= 0xD800 && c < 0xE000) continue;
      const std::string s = utf8(c);
      vocab += s + "\n##" + s + "\n";
    }
    return WordPiece::from_vocab(vocab, {}, "every code point");
  }();
  return tokenizer;
}
// The words of a text under that vocabulary.
std::vector<std::string> words_of(const WordPiece& tokenizer, const std::string& text) {
  std::vector<int32_t> ids;
  tokenizer.append_ids(text, ids);
  std::vector<std::string> words;
  for (const int32_t id : ids)
    if (tokenizer.continuation(id) && tokenizer.piece(id).size() > 2)
      words.back() += tokenizer.piece(id).substr(2);
    else
      words.emplace_back(tokenizer.piece(id));
  return words;
}
// FNV-1a over all code points c: the words of a<c>b, each closed by a byte 1, and a byte 2 after each code point.
uint64_t hash_of_all(const WordPiece& tokenizer) {
  uint64_t hash = 0xCBF29CE484222325u;
  auto add = [&](unsigned char byte) { hash = (hash ^ byte) * 0x100000001B3u; };
  std::vector<int32_t> ids;
  for (char32_t c = 0; c < 0x110000; c++) {
    if (c >= 0xD800 && c < 0xE000) continue;
    ids.clear();
    tokenizer.append_ids("a" + utf8(c) + "b", ids);
    for (size_t k = 0; k < ids.size(); k++) {
      const std::string_view piece = tokenizer.piece(ids[k]);
      const bool inside = tokenizer.continuation(ids[k]) && piece.size() > 2;
      if (k && !inside) add(1);
      for (const char b : inside ? piece.substr(2) : piece) add((unsigned char)b);
    }
    add(1), add(2);
  }
  return hash;
}
}  // namespace

TEST_CASE("wordpiece: every code point between two letters, under six settings") {
  const struct {
    bert::TokenizerSettings settings;
    uint64_t hash;  // tests/make_unicode.py --hashes
  } expected[] = {
      {{true, {}, true, true}, 0x9801A86F529D708Fu},    {{false, {}, true, true}, 0xFCB0CFA56B6E0618u},
      {{true, false, true, true}, 0x69B51849DC4F7F35u}, {{false, true, true, true}, 0xD1D499DAEEAFFDF6u},
      {{true, {}, false, false}, 0xA8F60BEEFE07F31Eu},  {{false, false, false, false}, 0xDBF74C06FAC21BDFu},
  };
  for (const auto& e : expected) {
    CAPTURE(e.settings.lowercase);
    CAPTURE(e.settings.chinese);
    CHECK(hash_of_all(every_code_point().with_settings(e.settings)) == e.hash);
  }
}

TEST_CASE("wordpiece: every code point as the golden tables list it") {
  SKIP_WITHOUT(large + "codepoints-uncased.tsv");
  for (const bool lowercase : {true, false}) {
    std::vector<std::vector<std::string>> want(0x110000);
    std::istringstream lines(bert::read_file(large + (lowercase ? "codepoints-uncased.tsv" : "codepoints-cased.tsv")));
    for (std::string line; std::getline(lines, line);) {
      if (line[0] == '#') continue;
      std::istringstream fields(line);
      std::string kind, first, last;
      std::getline(fields, kind, '\t'), std::getline(fields, first, '\t'), std::getline(fields, last, '\t');
      for (char32_t c = (char32_t)std::stoul(first, nullptr, 16); c <= std::stoul(last, nullptr, 16); c++) {
        want[c] = kind == "removed" ? std::vector<std::string>{"ab"} : std::vector<std::string>{"a", utf8(c), "b"};
        if (kind == "space") want[c] = {"a", "b"};
        if (!kind.starts_with("map:")) continue;
        const size_t bar = kind.find('|');  // after it: the words, with 1 between them; before it: what c becomes
        std::istringstream letters(bar == kind.npos ? "61 " + kind.substr(4) + " 62" : kind.substr(bar + 1));
        want[c] = {""};
        for (std::string letter; letters >> letter;)
          if (letter == "1")
            want[c].push_back("");
          else
            want[c].back() += utf8((char32_t)std::stoul(letter, nullptr, 16));
      }
    }
    const WordPiece tokenizer = every_code_point().with_settings({lowercase, {}, true, true});
    int64_t wrong = 0;
    for (char32_t c = 0; c < 0x110000; c++) {
      if (c >= 0xD800 && c < 0xE000) continue;
      if (want[c].empty()) want[c] = {"a" + utf8(c) + "b"};
      if (words_of(tokenizer, "a" + utf8(c) + "b") != want[c] && wrong++ < 5) FAIL_CHECK("U+" << std::hex << (uint32_t)c);
    }
    CHECK(wrong == 0);
    MESSAGE("every code point, " << std::string(lowercase ? "uncased" : "cased") << ": " << 0x110000 - 0x800 - wrong << " of "
                                 << 0x110000 - 0x800);
  }
}

TEST_CASE("wordpiece: kept marks stand in canonical order, at the places of the text") {
  const WordPiece& t = every_code_point();  // U+1D16D has combining class 226, U+1D165 216, U+0316 220 but is stripped
  const std::string text = "a\U0001D16D\u0316\U0001D165";
  CHECK(words_of(t, text) == std::vector<std::string>{"a\U0001D165\U0001D16D"});
  CHECK(words_of(t.with_settings({true, false, true, true}), text) == std::vector<std::string>{text});
  CHECK(t.encode(text).offsets == std::vector<std::array<int64_t, 2>>{{0, 1}, {1, 5}, {7, 11}});
  // A musical note is a head, a stem (U+1D165, class 216) and a flag (U+1D16E, 216): the stem that goes behind U+0334 (class 1) has that
  // one's place, and the first mark behind the note is the first to take one.
  CHECK(words_of(t, "\U0001D160\u0334") == std::vector<std::string>{"\U0001D158\U0001D165\U0001D16E"});
  CHECK(t.encode("\U0001D160\u0334").offsets == std::vector<std::array<int64_t, 2>>{{0, 4}, {4, 6}, {4, 6}});
  CHECK(t.encode("\U0001D160\u0316\U0001D16D").offsets == std::vector<std::array<int64_t, 2>>{{0, 4}, {0, 4}, {0, 4}, {6, 10}});
}

// ==== what holds of any text ====================================================================================
namespace {
struct Draws {  // uniform in [0, 1)
  std::mt19937_64 engine;
  double uniform() { return (double)(engine() >> 11) * 0x1p-53; }
};
std::string random_text(Draws& random, bool valid) {
  static const char32_t starts[] = {0x20,   0x41,   0x61,   0xC0,   0x300,  0x370,  0x400,  0x5D0,   0x900,   0x1100, 0x1E00,
                                    0x2000, 0x3040, 0x4E00, 0xAC00, 0xE000, 0xF900, 0xFE00, 0x1D150, 0x1F600, 0x20000};
  std::string text;
  const int64_t n = (int64_t)(random.uniform() * 40);
  for (int64_t i = 0; i < n; i++) {
    const double kind = random.uniform();
    if (kind < 0.5)
      text += (char)(0x20 + (int)(random.uniform() * 95));
    else if (kind < 0.85)
      text += utf8(starts[(size_t)(random.uniform() * std::size(starts))] + (char32_t)(random.uniform() * 90));
    else if (kind < 0.9)
      text += "[MASK]";
    else if (kind < 0.95 && !valid)
      text += (char)(int)(random.uniform() * 256);
    else
      text += "the ";
  }
  return text;
}
const WordPiece& small_tokenizer() {
  static const WordPiece tokenizer = WordPiece::load(small + "vocab-uncased.txt");
  return tokenizer;
}
}  // namespace

TEST_CASE("wordpiece: ids in range, offsets ascend on code-point borders, pieces join to the word") {
  const WordPiece& t = small_tokenizer();
  Draws random{std::mt19937_64(5)};
  for (int round = 0; round < 3000; round++) {
    const bool valid = round % 2;
    const std::string text = random_text(random, valid);
    CAPTURE(text);
    const Encoding e = t.encode(text);
    const size_t n = e.ids.size();
    REQUIRE(n >= 2);
    CHECK((e.type_ids.size() == n && e.words.size() == n && e.sequence.size() == n && e.special.size() == n && e.offsets.size() == n));
    CHECK((e.ids[0] == t.cls && e.ids[n - 1] == t.sep && e.special[0] == 1 && e.special[n - 1] == 1));
    int64_t begin = 0, word = 0;
    for (size_t i = 1; i + 1 < n; i++) {
      CHECK((e.ids[i] >= 0 && e.ids[i] < t.size()));
      CHECK((e.offsets[i][0] >= begin && e.offsets[i][0] < e.offsets[i][1] && e.offsets[i][1] <= (int64_t)text.size()));
      CHECK((e.words[i] == word || e.words[i] == word + 1));
      if (valid)
        for (const int64_t at : e.offsets[i]) CHECK((at == (int64_t)text.size() || ((unsigned char)text[(size_t)at] & 0xC0) != 0x80));
      CHECK((t.continuation(e.ids[i]) == (i > 1 && e.words[i] == e.words[i - 1])));
      begin = e.offsets[i][0], word = e.words[i];
    }
    // plain letters: a word's pieces, without their ##, are the word
    for (size_t i = 1; i + 1 < n; i++) {
      const std::string source = text.substr((size_t)e.offsets[i][0], (size_t)(e.offsets[i][1] - e.offsets[i][0]));
      const bool plain = std::all_of(source.begin(), source.end(), [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); });
      if (plain && e.ids[i] != t.unk) CHECK((t.continuation(e.ids[i]) ? "##" + source : source) == t.piece(e.ids[i]));
    }
    std::vector<int32_t> ids;
    t.append_ids(text, ids);
    EncodeOptions bare;
    bare.add_special = bare.parse_special = false;
    CHECK(t.encode(text, bare).ids == ids);
  }
}

TEST_CASE("wordpiece: windows hold every token, overlap by the stride, and the first is the encoding") {
  const WordPiece& t = small_tokenizer();
  Draws random{std::mt19937_64(6)};
  for (int round = 0; round < 300; round++) {
    const std::string text = random_text(random, true) + " one two three four five six seven";
    EncodeOptions o;
    o.max_length = 3 + round % 9, o.from_left = round % 2;
    o.stride = (round / 2) % (o.max_length - 2);
    const Encoding whole = t.encode(text);
    const auto windows = t.encode_windows(text, {}, o);
    CHECK(windows[0].ids == t.encode(text, o).ids);
    std::vector<int32_t> joined;
    for (size_t k = 0; k < windows.size(); k++) {
      const auto& w = windows[o.from_left ? windows.size() - 1 - k : k].ids;
      CHECK((int64_t)w.size() <= o.max_length);
      // each repeats `stride` tokens; from the left the short one comes first, and what it repeats is the next one's beginning
      joined.insert(joined.end(), w.begin() + 1 + (k ? o.stride : 0), w.end() - 1);
    }
    CHECK(joined == std::vector<int32_t>(whole.ids.begin() + 1, whole.ids.end() - 1));
  }
}

TEST_CASE("wordpiece: linear time, whatever ten million bytes hold") {
  const WordPiece& t = small_tokenizer();
  auto repeat = [](const std::string& s) {
    std::string out;
    while (out.size() < 10'000'000) out += s;
    return out;
  };
  for (const std::string unit :
       {"a", "\u00E9", "e\u0301", "\u200B", "\u0301", "\U0001E000\u0301\u0316", "[", "[MASK", "\x80", "\xF0\x90", "#", "\uAC01"}) {
    CAPTURE(unit);
    const std::string text = repeat(unit);
    const auto start = std::chrono::steady_clock::now();
    std::vector<int32_t> ids;
    t.append_ids(text, ids);
    const Encoding e = t.encode(text);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    CHECK(seconds < 60);  // 0.2 here; anything worse than linear would take hours
    if (unit == "a") CHECK((ids == std::vector<int32_t>{t.unk} && e.offsets[1] == std::array<int64_t, 2>{0, (int64_t)text.size()}));
  }
}

TEST_CASE("wordpiece: one tokenizer, several threads") {
  const WordPiece& t = small_tokenizer();
  Draws random{std::mt19937_64(8)};
  std::vector<std::string> texts;
  for (int i = 0; i < 200; i++) texts.push_back(random_text(random, false));
  std::vector<std::vector<int32_t>> want(texts.size()), got[4];
  for (size_t i = 0; i < texts.size(); i++) want[i] = t.encode(texts[i]).ids;
  std::vector<std::thread> threads;
  for (auto& mine : got)
    threads.emplace_back([&] {
      for (const std::string& text : texts) mine.push_back(t.encode(text).ids);
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& mine : got) CHECK(mine == want);
}

TEST_CASE("wordpiece: many texts over threads give what one after another gives") {
  const WordPiece& t = small_tokenizer();
  Draws random{std::mt19937_64(12)};
  std::vector<std::string> texts(3000);
  for (std::string& text : texts)
    for (int k = 0; k < 5; k++) text += random_text(random, false);
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  for (const EncodeOptions& options : {EncodeOptions::bare(), EncodeOptions(), EncodeOptions{.max_length = 9, .from_left = true}}) {
    std::vector<int32_t> want = {7, 7};  // what is there stays
    std::vector<int64_t> want_ends = {2};
    for (const std::string& text : texts) {
      t.append_ids(text, want, options), want_ends.push_back((int64_t)want.size());
      if (options.add_special)
        CHECK(t.encode(text, options).ids == std::vector<int32_t>(want.begin() + want_ends.end()[-2], want.begin() + want_ends.back()));
    }
    for (const int threads : {1, 2, 5}) {
      std::vector<int32_t> ids = {7, 7};
      std::vector<int64_t> ends = {2};
      t.append_ids(views, ids, ends, threads, options);
      CHECK((ids == want && ends == want_ends));
    }
  }
  const WordPiece lacking = WordPiece::from_vocab("a\nb\n", {}, "no [UNK]");
  std::vector<std::string_view> letters(40000, "a b a b a b");
  letters[20000] = "a c", letters[39999] = "d";
  std::vector<int32_t> ids = {7};
  std::vector<int64_t> ends;
  std::string error;
  try {
    lacking.append_ids(letters, ids, ends, 4);
  } catch (const bert::Error& e) { error = e.what(); }
  CHECK(error.find("'c' at byte 2") != error.npos);  // the first in the order of the texts, and nothing is left of the others
  CHECK((ids == std::vector<int32_t>{7} && ends.empty()));
}

TEST_CASE("wordpiece: repair_utf8 and offsets in code points") {
  std::string text =
      "ab\xFF"
      "cd\xF0\x90 \xE0\x80";  // FF; F0 90, which could have gone on; E0; 80
  CHECK(!bert::valid_utf8(text));
  CHECK(bert::repair_utf8(text) == 4);
  CHECK(bert::valid_utf8(text));
  CHECK(text == "ab\uFFFDcd\uFFFD \uFFFD\uFFFD");
  CHECK(bert::repair_utf8(text) == 0);
  const std::string chinese =
      "\u4F60\u597D a\xFF"
      "b";  // the bad byte is one code point
  const Encoding e = small_tokenizer().encode(chinese);
  const auto chars = bert::code_point_offsets(e, chinese);
  CHECK(chars[1] == std::array<int64_t, 2>{0, 1});
  CHECK(chars[2] == std::array<int64_t, 2>{1, 2});
  CHECK((chars[3][0] == 3 && chars[chars.size() - 2][1] == 6));
}

TEST_CASE("wordpiece: append_pieces joins the pieces by spaces, whatever their lengths and ids") {
  const std::string fifteen(15, 'x'), sixteen(16, 'y'), long_one(100, 'z');
  const WordPiece t = WordPiece::from_vocab("[UNK]\na\n" + fifteen + "\n" + sixteen + "\n" + long_one + "\n", {}, "test");
  std::string out = "before ";
  t.append_pieces(std::vector<int32_t>{}, out);
  CHECK(out == "before ");
  t.append_pieces(std::vector<int32_t>{4, 1, 3, 2, -1, 5, 1}, out);  // of the two that it lacks nothing
  CHECK(out == "before " + long_one + " a " + sixteen + " " + fifteen + "   a");
}

// ==== loading ===================================================================================================
namespace {
void put(const std::string& path, const std::string& bytes) {
  std::FILE* f = std::fopen(path.c_str(), "wb");
  REQUIRE(f);
  std::fwrite(bytes.data(), 1, bytes.size(), f);
  std::fclose(f);
}
std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const bert::Error& e) { return e.what(); }
  return "no error";
}
bool says(const std::string& message, const std::string& part) {
  return message.find(part) != message.npos && message.find('\n') == message.npos;
}
}  // namespace

TEST_CASE("wordpiece: which file wins") {
  testing::TemporaryFolder folder;
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "neither vocab.txt nor tokenizer.json"));
  CHECK(says(error_of([&] { WordPiece::load(folder / "nothing"); }), "no such file"));
  put(folder / "vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n");
  CHECK(WordPiece::load(folder.path).settings().lowercase);
  CHECK(WordPiece::load(folder.path).model_max_length == 0);
  CHECK(WordPiece::load(folder.path).warnings.empty());
  put(folder / "tokenizer_config.json", bert::tokenizer_config_json({false, true, false, false}, 77));
  WordPiece t = WordPiece::load(folder.path);
  CHECK((!t.settings().lowercase && t.settings().strip_accents == true && !t.settings().chinese && !t.settings().clean_text));
  CHECK(t.model_max_length == 77);
  CHECK((t.pad == 0 && t.unk == 1 && t.cls == 2 && t.sep == 3 && t.mask == 4));
  const std::string rest =
      R"("pre_tokenizer":{"type":"BertPreTokenizer"},"post_processor":{"type":"BertProcessing","sep":["[SEP]",3],"cls":["[CLS]",2]}})";
  auto json = [&](const std::string& vocab, const std::string& normalizer, const std::string& tail) {
    put(folder / "tokenizer.json",
        R"({"model":{"type":"WordPiece","unk_token":"[UNK]","vocab":{"[PAD]":0,"[UNK]":1,"[CLS]":2,"[SEP]":3,"[MASK]":4,)" + vocab +
            R"(}},"normalizer":)" + normalizer + "," + tail);
  };
  const std::string cased =
      R"({"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":false,"lowercase":false})";
  json(R"("a":5,"c":6)", cased, rest);
  put(folder / "tokenizer_config.json",
      R"({"do_lower_case":true,"model_max_length":1000000000000000019884624838656,"cls_token":{"content":"[CLS]"}})");
  t = WordPiece::load(folder.path);
  CHECK((t.settings().lowercase && t.settings().strip_accents == false));  // the one from the config, the other from tokenizer.json
  CHECK(t.model_max_length == 0);
  REQUIRE(t.warnings.size() == 1);
  CHECK(says(t.warnings[0], "vocab.txt:7: 'b', but tokenizer.json has 'c'"));
  CHECK((t.id("c") == 6 && t.id("b") == -1));
  CHECK(t.encode("A c").ids == std::vector<int32_t>{2, 5, 6, 3});
  put(folder / "tokenizer_config.json", R"({"strip_accents":null})");
  CHECK(!WordPiece::load(folder.path).settings().strip_accents);  // null is a setting: as lower case
  json(R"("a":5)", cased, rest);
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "7 pieces, but tokenizer.json has 6"));
  std::filesystem::remove(folder / "vocab.txt");
  CHECK(WordPiece::load(folder.path).size() == 6);
  json(R"("a":5)", R"({"type":"NFKC"})", rest);
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "BertNormalizer"));
  json(R"("a":5)", cased, R"("pre_tokenizer":{"type":"Whitespace"}})");
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "BertPreTokenizer"));
  json(R"("a":5)", cased, R"("pre_tokenizer":{"type":"BertPreTokenizer"},"post_processor":{"type":"RobertaProcessing"}})");
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "RobertaProcessing is not BERT's"));
  json(R"("a":2000000000)", cased, rest);
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "out of range"));
  json(R"("a":-1)", cased, rest);
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "out of range"));
  json(R"("a":5)", cased,
       R"("pre_tokenizer":{"type":"BertPreTokenizer"},"post_processor":{"type":"BertProcessing","sep":["[SEP]",3],"cls":["[CLS]",9]}})");
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "beyond the vocabulary"));
  put(folder / "tokenizer.json", R"({"model":{"type":"BPE","vocab":{}}})");
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "only WordPiece"));
  put(folder / "tokenizer.json", "{");
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "tokenizer.json:1:2: not JSON"));
}

TEST_CASE("wordpiece: pieces of every length, which differ in their last letter alone") {
  std::string vocab = "[UNK]\n", text;
  std::vector<int32_t> expected;
  for (size_t n = 1; n <= 60; n++)
    for (const char last : {'b', 'c', 'd'}) {  // d is no piece
      const std::string word = std::string(n - 1, 'a') + last;
      if (last != 'd') vocab += word + "\n";
      text += word + " ", expected.push_back(last == 'd' ? 0 : (int32_t)(2 * n - (last == 'b')));
    }
  std::vector<int32_t> ids;
  WordPiece::from_vocab(vocab, {}, "test").append_ids(text, ids);
  CHECK(ids == expected);
}

// Answers of the tokenizers library. Where the prefix is no punctuation, a word may begin with it, and a piece is both.
TEST_CASE("wordpiece: other prefixes than ##") {
  testing::TemporaryFolder folder;
  auto ids = [&](const std::string& prefix) {
    std::string vocab;
    int n = 0;
    std::set<std::string> seen;
    for (const std::string& piece : {std::string("[PAD]"), std::string("[UNK]"), std::string("a"), std::string("b"), prefix + "b",
                                     prefix + "ab", std::string("#"), std::string("##"), std::string("##b")})
      if (seen.insert(piece).second) vocab += (n ? ",\"" : "\"") + piece + "\":" + std::to_string(n), n++;
    put(folder / "tokenizer.json", R"({"model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":")" + prefix +
                                       R"(","vocab":{)" + vocab + R"(}},"normalizer":{"type":"BertNormalizer","lowercase":false},)" +
                                       R"("pre_tokenizer":{"type":"BertPreTokenizer"}})");
    const WordPiece t = WordPiece::load(folder.path);
    CHECK(t.id(prefix + "b") == (prefix.empty() ? 3 : 4));
    return t.encode("ab aab xb xab ##b b##b # ab").ids;
  };
  CHECK(ids("##") == std::vector<int32_t>{2, 4, 2, 5, 1, 1, 6, 6, 3, 3, 6, 6, 3, 6, 2, 4});
  CHECK(ids("x") == std::vector<int32_t>{2, 4, 2, 5, 4, 5, 6, 6, 3, 3, 6, 6, 3, 6, 2, 4});
  CHECK(ids("") == std::vector<int32_t>{4, 2, 4, 1, 1, 5, 5, 3, 3, 5, 5, 3, 5, 4});
}

TEST_CASE("wordpiece: added tokens beside a vocab.txt, and names of its special tokens") {
  testing::TemporaryFolder folder;
  put(folder / "vocab.txt", "<pad>\n<unk>\n<s>\n</s>\n[MASK]\na\n");
  put(folder / "tokenizer_config.json", R"({"pad_token":"<pad>","unk_token":{"content":"<unk>"},"cls_token":"<s>","sep_token":"</s>",
    "added_tokens_decoder":{"1":{"content":"<unk>","special":true},"7":{"content":"[E1]","special":false,"normalized":false}}})");
  const WordPiece t = WordPiece::load(folder.path);
  CHECK((t.pad == 0 && t.unk == 1 && t.cls == 2 && t.sep == 3 && t.mask == 4));
  CHECK((t.size() == 8 && t.piece(6).empty() && t.piece(7) == "[E1]" && t.id("[E1]") == 7));
  CHECK(t.encode("a[E1] b").ids == std::vector<int32_t>{2, 5, 7, 1, 3});
  put(folder / "tokenizer_config.json", R"({"added_tokens_decoder":{"x":{"content":"[E1]"}}})");
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "'[E1]': id -1 is out of range"));
}

TEST_CASE("wordpiece: added tokens that swallow spaces, of normalised text, and word limits, as the reference has them") {
  testing::TemporaryFolder folder;
  const std::string head =
      R"({"model":{"type":"WordPiece","unk_token":"[UNK]","max_input_chars_per_word":300,"vocab":{"[UNK]":0,"[MASK]":1,)" +
      ("\"" + std::string(300, 'a') + "\":2,\"n\":3") +
      R"(}},"pre_tokenizer":{"type":"BertPreTokenizer"},"normalizer":{"type":"BertNormalizer","clean_text":)";
  auto load = [&](const std::string& clean, const std::string& tokens) {
    put(folder / "tokenizer.json", head + clean + R"(,"lowercase":true},"added_tokens":[)" + tokens + "]}");
    return WordPiece::load(folder.path);
  };
  auto offsets = [](const WordPiece& t, const std::string& text) { return t.encode(text).offsets; };
  using Offsets = std::vector<std::array<int64_t, 2>>;
  WordPiece t = load("true", "");
  CHECK(t.encode(std::string(300, 'A')).ids == std::vector<int32_t>{2});
  CHECK(t.encode(std::string(301, 'a')).ids == std::vector<int32_t>{0});
  CHECK(t.encode("[MASK]").ids == std::vector<int32_t>{0, 0, 0});  // tokenizer.json adds no token, and no config names one
  put(folder / "tokenizer_config.json", R"({"mask_token":"[MASK]"})");
  CHECK(WordPiece::load(folder.path).encode("[MASK]").ids == std::vector<int32_t>{1});
  std::filesystem::remove(folder / "tokenizer_config.json");
  // Two spaces as a token that swallows the spaces after it: the next begins in what the last one took.
  t = load("true", R"({"id":4,"content":"  ","rstrip":true,"normalized":false})");
  CHECK(offsets(t, "n     n") == Offsets{{0, 1}, {1, 6}, {3, 6}, {6, 7}});
  // ... and one that swallows those before it has nothing left.
  t = load("true", R"({"id":4,"content":"  ","rstrip":true,"lstrip":true,"normalized":false})");
  CHECK(offsets(t, "n     n") == Offsets{{0, 1}, {1, 6}, {6, 7}});
  // In normalised text a line end is a space only where text is cleaned; the token's name is normalised.
  t = load("false", R"({"id":4,"content":"N  n","normalized":true})");
  CHECK(t.encode("N  N").ids == std::vector<int32_t>{4});
  CHECK(t.encode("N\n N").ids == std::vector<int32_t>{3, 3});
  CHECK((t.piece(4) == "n  n" && t.decode(std::vector<int32_t>{4}) == "n  n" && t.id("N  n") == 4));
  CHECK(load("true", R"({"id":4,"content":"N  n","normalized":true})").encode("N\n N").ids == std::vector<int32_t>{4});
  put(folder / "tokenizer.json", R"({"model":{"max_input_chars_per_word":-1,"vocab":{}}})");
  CHECK(says(error_of([&] { WordPiece::load(folder.path); }), "words of -1 characters"));
}

TEST_CASE("wordpiece: odd vocabularies load with one warning, unknown words without [UNK] are an error") {
  const WordPiece odd = WordPiece::from_vocab("\xEF\xBB\xBF[PAD]\r\n\r\na\r\na\r\nb \r\n", {}, "v.txt");
  REQUIRE(odd.warnings.size() == 1);
  for (const char* part :
       {"byte-order mark", "CR LF", "1 blank line", "1 with white space", "'a' twice (ids 2 and 3)", "no [UNK]", "no [CLS]"})
    CHECK(says(odd.warnings[0], part));
  CHECK((odd.id("a") == 3 && odd.piece(2).empty() && odd.size() == 5));
  CHECK(odd.encode("a b").ids == std::vector<int32_t>{3, 4});  // nothing is put around
  CHECK(says(error_of([&] { odd.encode("a c"); }), "'c' at byte 2 is not in the vocabulary"));
  CHECK(says(error_of([&] { WordPiece::from_vocab("a\nb\xFF\n", {}, "v.txt"); }), "v.txt:2: invalid UTF-8 at byte 2"));
  CHECK(WordPiece::from_vocab("", {}, "v.txt").encode(" ").ids.empty());
  EncodeOptions o;
  o.max_length = 8, o.stride = 7;
  CHECK(says(error_of([&] { small_tokenizer().encode_windows("one two", {}, o); }), "stride of 7"));
  o.stride = 0, o.max_length = 5, o.truncation = bert::Truncation::only_first;  // both tokens would have to go
  CHECK(says(error_of([&] { small_tokenizer().encode("one two", "the of", o); }), "too short: 2 tokens, of which 2 must go"));
  CHECK(small_tokenizer().encode("one two and", "the", o).ids.size() == 5);
  o.stride = -1;
  CHECK(says(error_of([&] { small_tokenizer().encode("one", o); }), "negative"));
}

// ==== the trainer ===============================================================================================
namespace {
using Words = std::vector<std::pair<std::string, int64_t>>;
std::vector<std::string> train(const Words& words, const bert::VocabTrainer::Options& options, bool lowercase = true) {
  bert::VocabTrainer trainer({lowercase, {}, true, true});
  for (const auto& [word, times] : words) trainer.add_text(word, times);
  return trainer.train(options);
}
const Words hugs = {{"hug", 10}, {"pug", 5}, {"pun", 12}, {"bun", 4}, {"hugs", 5}};
const std::vector<std::string> hugs_vocabulary = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "b",   "g",   "h",
                                                  "n",     "p",     "s",     "u",     "##g",    "##n", "##s", "##u",
                                                  "##ug",  "##un",  "hug",   "pun",   "hugs",   "pug", "bun"};
}  // namespace

TEST_CASE("vocabulary: by hand") {
  // ##u ##g 20 times; then ##u ##n 16; h ##ug 15; p ##un 12; hug ##s and p ##ug 5 both, "hug" before "p"; b ##un 4
  CHECK(train(hugs, {.size = 100, .min_count = 2, .alphabet = 0, .on_progress = {}}) == hugs_vocabulary);
  for (int64_t size = 19; size <= 23; size++)  // the ceiling is hard, and what fits is a prefix
    CHECK(train(hugs, {.size = size, .min_count = 2, .alphabet = 7, .on_progress = {}}) ==
          std::vector<std::string>(hugs_vocabulary.begin(), hugs_vocabulary.begin() + size));
  auto rarer = hugs_vocabulary;
  rarer.pop_back(), rarer.erase(rarer.begin() + 5);
  CHECK(train(hugs, {.size = 100, .min_count = 5, .alphabet = 0, .on_progress = {}}) == rarer);  // b is seen 4 times
}

TEST_CASE("vocabulary: the order of the text does not matter, ties go by bytes") {
  Draws random{std::mt19937_64(9)};
  Words words;
  for (int i = 0; i < 400; i++) {
    std::string word;
    for (int k = 0; k < 1 + (int)(random.uniform() * 8); k++) word += (char)('a' + (int)(random.uniform() * 4));
    words.emplace_back(word, 1 + (int64_t)(random.uniform() * 3));  // few letters, few counts: ties everywhere
  }
  const auto want = train(words, {.size = 200, .min_count = 2, .alphabet = 0, .on_progress = {}});
  CHECK(want.size() == 200);
  for (int round = 0; round < 5; round++) {
    for (size_t i = words.size(); i > 1; i--) std::swap(words[i - 1], words[(size_t)(random.uniform() * (double)i)]);
    CHECK(train(words, {.size = 200, .min_count = 2, .alphabet = 0, .on_progress = {}}) == want);
  }
  std::string one_text;  // and once more as a single text, each word as often as it counts
  for (const auto& [word, times] : words)
    for (int64_t k = 0; k < times; k++) one_text += word + (k % 2 ? "\n" : " ");
  CHECK(train({{one_text, 1}}, {.size = 200, .min_count = 2, .alphabet = 0, .on_progress = {}}) == want);
  CHECK(train({{"ab cd", 7}}, {.size = 14, .min_count = 2, .alphabet = 4, .on_progress = {}}) ==
        std::vector<std::string>{"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "##b", "##d", "ab", "cd"});
}

namespace {
// The same by the plainest means: count all pairs anew for each piece.
std::vector<std::string> train_slowly(const Words& words, size_t size, int64_t min_count) {
  std::map<std::vector<std::string>, int64_t> split;
  std::map<std::string, int64_t> letters, inside;
  for (const auto& [word, times] : words) {
    std::vector<std::string> pieces;
    for (const char c : word) {
      letters[std::string(1, c)] += times;
      if (!pieces.empty()) inside["##" + std::string(1, c)]++;
      pieces.push_back((pieces.empty() ? "" : "##") + std::string(1, c));
    }
    split[pieces] += times;
  }
  std::vector<std::string> out = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
  for (const auto& l : letters) out.push_back(l.first);
  for (const auto& l : inside) out.push_back(l.first);
  while (out.size() < size) {
    std::map<std::pair<std::string, std::string>, int64_t> pairs;
    for (const auto& [pieces, times] : split)
      for (size_t i = 0; i + 1 < pieces.size(); i++) pairs[{pieces[i], pieces[i + 1]}] += times;
    auto best = pairs.end();
    for (auto it = pairs.begin(); it != pairs.end(); ++it)
      if (it->second >= min_count && (best == pairs.end() || it->second > best->second)) best = it;
    if (best == pairs.end()) break;
    const auto [a, b] = best->first;
    const std::string ab = a + b.substr(2);
    if (std::find(out.begin(), out.end(), ab) == out.end()) out.push_back(ab);
    std::map<std::vector<std::string>, int64_t> next;
    for (const auto& [pieces, times] : split) {
      std::vector<std::string> merged;
      for (size_t i = 0; i < pieces.size(); i++)
        if (i + 1 < pieces.size() && pieces[i] == a && pieces[i + 1] == b)
          merged.push_back(ab), i++;
        else
          merged.push_back(pieces[i]);
      next[merged] += times;
    }
    split = std::move(next);
  }
  return out;
}
}  // namespace

TEST_CASE("vocabulary: counting as it goes gives what counting anew gives") {
  Draws random{std::mt19937_64(10)};
  for (int round = 0; round < 30; round++) {
    Words words;
    const int letters = 1 + round % 4;  // one letter: aaaa, where pairs overlap
    for (int i = 0; i < 40; i++) {
      std::string word;
      for (int k = 0; k < 1 + (int)(random.uniform() * 12); k++) word += (char)('a' + (int)(random.uniform() * letters));
      words.emplace_back(word, 2 + (int64_t)(random.uniform() * 6));
    }
    CHECK(train(words, {.size = 70, .min_count = 2, .alphabet = 4, .on_progress = {}}) == train_slowly(words, 70, 2));
  }
}

TEST_CASE("vocabulary: the alphabet") {
  const bert::VocabTrainer::Options any = {.size = 1000, .min_count = 1, .alphabet = 0, .on_progress = {}};
  CHECK(train({{"\u6211\u7231\u4F60", 3}, {"\u6211", 1}}, any) ==  // Chinese: every character a word, no ## form
        std::vector<std::string>{"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u4F60", "\u6211", "\u7231"});
  CHECK(train({{"\u00C9\u00E9 E", 1}}, any)[5] == "e");  // normalised as the tokenizer does
  CHECK(train({{"\u00C9", 1}}, any, false)[5] == "\u00C9");
  // the commonest first up to the limit; of a word with a rarer character the rest is used
  const auto two = train({{"aab", 5}, {"ac", 1}}, {.size = 100, .min_count = 1, .alphabet = 2, .on_progress = {}});
  CHECK(std::vector<std::string>(two.begin() + 5, two.begin() + 9) == std::vector<std::string>{"a", "b", "##a", "##b"});
  CHECK(std::find(two.begin(), two.end(), "c") == two.end());
  const auto tiny =
      train({{"abcdefgh", 5}}, {.size = 11, .min_count = 1, .alphabet = 0, .on_progress = {}});  // at most half of what is left
  CHECK(std::vector<std::string>(tiny.begin() + 5, tiny.end()) == std::vector<std::string>{"a", "b", "c", "##b", "##c", "##bc"});
  CHECK(says(error_of([] {
               train({{"abcdefgh", 5}}, {.size = 11, .min_count = 1, .alphabet = 8, .on_progress = {}});
             }),
             "a size of at least 20 or an alphabet of at most 3"));
  CHECK(says(error_of([] { train(hugs, {.size = 4, .min_count = 1, .alphabet = 0, .on_progress = {}}); }), "cannot hold"));
  CHECK(says(error_of([] { train(hugs, {.size = 40, .min_count = 0, .alphabet = 0, .on_progress = {}}); }), "minimum count"));
  CHECK(train({}, any).size() == 5);
  CHECK(train({{std::string(101, 'a') + " " + std::string(100, 'b'), 2}}, any)[5] == "b");  // 101 letters: no word for the tokenizer
}

TEST_CASE("vocabulary: characters that the alphabet has no room for are told") {
  int64_t left_out = 0, characters = 0;
  bert::VocabTrainer::Options options = {.size = 11, .min_count = 1, .alphabet = 0, .on_progress = {}};
  options.on_left_out = [&](int64_t left, int64_t all) { left_out = left, characters = all; };
  train({{"abcdefgh", 5}}, options);
  CHECK((left_out == 5 && characters == 8));
  left_out = 0, options.size = 21;
  train({{"abcdefgh", 5}}, options);
  CHECK(left_out == 0);
}

TEST_CASE("vocabulary: pieces are added to one that is there") {
  std::string lines;
  for (const std::string& piece : hugs_vocabulary) lines += piece + "\n";
  const WordPiece old = WordPiece::from_vocab(lines, {}, "hugs");
  bert::VocabTrainer trainer({});
  for (int i = 0; i < 4; i++) trainer.add_text("hugpun hugpun pugs caf\u00E9 pug");  // hug ##p ... cannot be spelled: there is no ##p
  bert::VocabTrainer::Options options = {.size = 100, .min_count = 2, .alphabet = 0, .on_progress = {}};
  options.extend = &old;
  const auto pieces = trainer.train(options);
  CHECK(std::vector<std::string>(pieces.begin(), pieces.begin() + (int64_t)hugs_vocabulary.size()) == hugs_vocabulary);
  // By hand: the new letters c ##a ##e ##f ##p, sorted by code point, first forms before inner ones ("a", "e", "f" stand inside only, but
  // may begin a word elsewhere); then pairs by count, of words as the old vocabulary reads them: pug ##s.
  auto has = [&](const std::string& piece) { return std::count(pieces.begin(), pieces.end(), piece); };
  for (const char* piece : {"c", "##a", "##e", "##f", "##p", "pugs", "cafe", "hugpun"}) {
    CAPTURE(piece);
    CHECK(has(piece) == 1);
  }
  CHECK(std::set<std::string>(pieces.begin(), pieces.end()).size() == pieces.size());
  std::string extended;
  for (const std::string& piece : pieces) extended += piece + "\n";
  CHECK(WordPiece::from_vocab(extended, {}, "extended").encode("hugpun caf\u00E9s pugs").ids.size() == 2 + 1 + 2 + 1);
  options.size = 25;
  CHECK(trainer.train(options).size() <= 25);  // a hard ceiling
  options.size = (int64_t)hugs_vocabulary.size();
  CHECK(says(error_of([&] { trainer.train(options); }), "23 pieces are there already"));
  const WordPiece lacking = WordPiece::from_vocab("a\nb\n", {}, "no [UNK]");
  options.extend = &lacking;
  CHECK(says(error_of([&] { trainer.train(options); }), "without [UNK] cannot be extended"));
}

TEST_CASE("vocabulary: counts beyond 32 bits, progress, memory") {
  const int64_t many = 5'000'000'000;
  const auto v = train({{"ab", many}, {"cd", many + 1}}, {.size = 100, .min_count = many + 1, .alphabet = 0, .on_progress = {}});
  CHECK(std::vector<std::string>(v.begin() + 5, v.end()) == std::vector<std::string>{"c", "d", "##d", "cd"});
  bert::VocabTrainer trainer({}, 20000);  // bytes
  std::string rare;
  for (int i = 0; i < 2000; i++) trainer.add_text("common w" + std::to_string(i));
  CHECK((trainer.words() == 4000 && trainer.distinct_words() < 400 && trainer.dropped_count() >= 1));
  int64_t told = 0;
  std::string text;
  Draws random{std::mt19937_64(11)};
  for (int i = 0; i < 30000; i++) text += (char)(random.uniform() < 0.2 ? ' ' : 'a' + (int)(random.uniform() * 20));
  train({{text, 1}}, {.size = 2500, .min_count = 1, .alphabet = 0, .on_progress = [&](int64_t pieces) { told = pieces; }});
  CHECK(told == 2000);
}

TEST_CASE("vocabulary: what was trained on is never [UNK], and the ids are those of the lines") {
  const std::string text = bert::read_file(small + "encode.jsonl");
  bert::VocabTrainer trainer({});
  trainer.add_text(text);
  const auto pieces = trainer.train({.size = 3000, .min_count = 1, .alphabet = 0, .on_progress = {}});
  CHECK(pieces.size() <= 3000);
  std::string vocab;
  for (const std::string& p : pieces) vocab += p + "\n";
  const WordPiece t = WordPiece::from_vocab(vocab, {}, "trained");
  CHECK(t.warnings.empty());
  CHECK((t.pad == 0 && t.unk == 1 && t.cls == 2 && t.sep == 3 && t.mask == 4));
  for (size_t i = 0; i < pieces.size(); i++) CHECK(t.id(pieces[i]) == (int32_t)i);
  std::vector<int32_t> ids;
  std::string line;
  std::istringstream words(text);
  int64_t unknown = 0;
  while (words >> line)
    if (line.size() < 100) {
      ids.clear(), t.append_ids(line, ids);
      for (const int32_t id : ids) unknown += id == t.unk;
    }
  CHECK(unknown == 0);
}

TEST_CASE("code points: letters, white space and lower case as Python's") {
  for (const char32_t c : U"aZ09é中あЖ½²⅓①ªſ𝒜") CHECK((c == 0 || bert::is_letter(c)));
  for (const char32_t c : U"_-.'’–。°€™😀\u0301\u200d \u00a0\u3000") CHECK(!bert::is_letter(c));
  for (const char32_t c : U" \t\n\u0085\u00a0\u2003\u3000") CHECK((c == 0 || bert::is_white_space(c)));
  for (const char32_t c : U"a_\u200b\ufeff中") CHECK(!bert::is_white_space(c));
  const std::u32string upper = U"AZaÀÉŁΣЯѢẞİ中Ⅷ", lower = U"azaàéłσяѣßi中ⅷ";
  for (size_t i = 0; i < upper.size(); i++) CHECK(bert::lower_case(upper[i]) == lower[i]);
}
