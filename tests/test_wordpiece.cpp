// The tokenizer and the vocabulary trainer: Hugging Face's answers case by case, then what must hold of any text.
#include <unordered_map>

#include "testing.h"

using bert::EncodeOptions;
using bert::Encoding;
using bert::Json;
using bert::WordPiece;

namespace {

// ---- golden files: one JSON object a line ----------------------------------------------------------------------
const std::string small = "tests/golden/wordpiece/", large = testing::shared + "golden/wordpiece/";

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
    else out.push_back(v.is(Json::null) ? -1 : v.as_int("number"));
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
std::string differences(const Json& want, const Encoding& got, const WordPiece& tokenizer, const std::string& text, const std::string& pair) {
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
  if (const Json* tokens = want.find("tokens"))   // an added token's name may be shown as it stood in the text: by ids only
    for (size_t i = 0; i < got.ids.size() && i < tokens->items("tokens").size(); i++)
      if (tokenizer.piece(got.ids[i]) != tokens->items("tokens")[i].as_string("token") && tokenizer.piece(got.ids[i]).size() < 5) out += " tokens";
  return out;
}

// The three vocabularies of the golden files, as published. A tokenizer is made once for each setting.
const WordPiece& golden_tokenizer(const std::string& name, const bert::TokenizerSettings& settings) {
  static std::map<std::string, WordPiece> made;
  const std::string key = name + std::to_string(settings.lowercase) + std::to_string(settings.chinese) + std::to_string(settings.clean_text) +
                          (settings.strip_accents ? std::to_string(*settings.strip_accents) : "-");
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
      CAPTURE(cases);   // the line
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
  } catch (const bert::Error& e) {
    error = error_kind(e.what());
  }
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
  const Encoding got = tokenizer.encode_words(words, pair, has(c, "pair_words"), o);
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
  } catch (const bert::Error& e) {
    return has(c, "error") ? "" : std::string(" ") + e.what();
  }
  if (has(c, "error")) return " loads";
  std::string wrong;
  std::map<int64_t, std::string> want;
  for (const Json& entry : field(c, "vocab").items("vocab")) want[entry.items("entry")[1].as_int("id")] = entry.items("entry")[0].as_string("piece");
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
      if (v.is(Json::string)) rows.push_back({v.as_string("text"), "", false});
      else rows.push_back({v.items("pair")[0].as_string("text"), v.items("pair")[1].as_string("pair"), true});
  } else {
    rows.push_back({text_of(c, "text"), has(c, "pair") ? text_of(c, "pair") : "", has(c, "pair")});
  }
  const EncodeOptions options = tokenizer.file_truncation.value_or(EncodeOptions());
  std::vector<std::vector<Encoding>> got;
  try {
    for (const Row& r : rows) got.push_back(tokenizer.encode_windows(r.text, r.has_pair ? std::optional<std::string_view>(r.pair) : std::nullopt, options));
  } catch (const bert::Error& e) {
    return has(c, "error") ? "" : std::string(" ") + e.what();
  }
  if (has(c, "error")) return " no error";
  if (tokenizer.file_padding) {
    std::vector<Encoding*> all;
    for (auto& windows : got) all.push_back(&windows[0]);
    if (!tokenizer.file_padding->length) {   // the longest is looked for among the encodings; each one's windows follow
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
  run_cases(large + "encode-nostrip.jsonl", [](const Json& c) { return encode_case(c, golden_tokenizer(text_of(c, "vocab"), settings_of(c))); });
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
