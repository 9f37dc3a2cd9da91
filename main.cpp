// main.cpp -- the command line: options, readers, progress, writers, reports, and one short function a command.
//
//   What a command promises to scripts stands in `bert help COMMAND`. Results go to standard output, everything else to standard
//   error. Here is no mathematics and no knowledge of the model: files become plain structs, bert.h does the rest.
//
//   Contents:   1 errors and what is said   2 options   3 files into lines, lines into rows   4 results   5 text into ids
//               6 model folders   7 a training run: folder, log, progress, signals   8 report.html   9 vocab, tokenize   10 pretrain
//               11 finetune   12 evaluate, predict, fill-mask, embed   13 info   14 bench   15 the table of commands, main
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <set>

#include "bert.h"

namespace bert {
namespace {

namespace fs = std::filesystem;
using std::to_string;
using Strings = std::vector<std::string>;
using Named = std::vector<std::pair<std::string, std::string>>;  // name and value, in order
using Numbers = std::vector<std::pair<std::string, double>>;

constexpr const char* kVersion = "0.1";

// ==== 1 errors and what is said ===================================================================================
// Wrong usage: exit status 2. Any other Error: 1.
struct Usage : Error {
  using Error::Error;
};
// Whoever read our results has gone: nothing is left to do, and nothing to complain about.
struct ClosedPipe {};

bool progress_line = false;  // a progress line stands on the terminal, without an end

void say(const std::string& text) {
  std::fprintf(stderr, "%s%s\n", progress_line ? "\r\033[K" : "", text.c_str());
  progress_line = false;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool among(const std::string& name, const Strings& names) { return std::find(names.begin(), names.end(), name) != names.end(); }

std::string join(const Strings& parts, const std::string& between) {
  std::string out;
  for (size_t i = 0; i < parts.size(); i++) out += (i ? between : "") + parts[i];
  return out;
}

Strings split(std::string_view text, char at) {
  Strings out;
  for (size_t begin = 0;;) {
    const size_t end = text.find(at, begin);
    out.emplace_back(text.substr(begin, end == text.npos ? end : end - begin));
    if (end == text.npos) return out;
    begin = end + 1;
  }
}

template <class T>
std::optional<T> parse_number(std::string_view text) {
  T value{};
  const auto r = std::from_chars(text.data(), text.data() + text.size(), value);
  if (r.ec != std::errc() || r.ptr != text.data() + text.size()) return {};
  return value;
}

// The shortest text that reads back as the same double.
std::string exact(double v) {
  char text[40];
  return std::string(text, std::to_chars(text, text + sizeof text, v).ptr);
}

// A number for people: 1,234,567.
std::string grouped(int64_t n) {
  std::string s = to_string(n);
  for (int64_t i = (int64_t)s.size() - 3; i > (n < 0); i -= 3) s.insert((size_t)i, ",");
  return s;
}

std::string counted(int64_t n, const std::string& what) { return grouped(n) + " " + what + (n == 1 ? "" : "s"); }

std::string fixed(double v, int digits) {
  char text[64];
  const auto r = std::to_chars(text, text + sizeof text, v, std::chars_format::fixed, digits);
  return r.ec == std::errc() ? std::string(text, r.ptr) : format_number(v);
}

std::string duration(double seconds) {
  const int64_t s = (int64_t)(seconds + 0.5);
  if (s < 100) return to_string(s) + " s";
  if (s < 3600) return to_string(s / 60) + " min " + to_string(s % 60) + " s";
  return to_string(s / 3600) + " h " + to_string(s / 60 % 60) + " min";
}

// Letters to insert, remove, exchange or swap on the way from one word to the other.
int edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); i++)
    for (size_t j = 0; j <= b.size(); j++) {
      if (!i || !j) {
        d[i][j] = (int)(i + j);
        continue;
      }
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  return d[a.size()][b.size()];
}

std::string nearest(const std::string& word, const Strings& names) {
  std::string best;
  int least = 1 << 20;
  for (const std::string& name : names)
    if (const int d = edit_distance(word, name); d < least) least = d, best = name;
  return best;
}

// ==== 2 options ===================================================================================================
// The words after the command. Options are taken; what is left when all are taken is an error. What was taken, given or by default, is
// kept for the report and for --resume, which compares it.
class Args {
 public:
  Args(std::string command, Strings words) : command_(std::move(command)), words_(std::move(words)) {}

  std::optional<std::string> take(const std::string& name) {
    std::optional<std::string> value = find(name);
    keep(name, value.value_or(""));
    return value;
  }
  std::string take(const std::string& name, const std::string& otherwise) {
    const std::string value = find(name).value_or(otherwise);
    keep(name, value);
    return value;
  }
  std::string need(const std::string& name, const std::string& what) {
    const std::optional<std::string> value = take(name);
    for (const std::string& word : words_)  // said here already: the command stops before it sees what is left
      if (!value && word.starts_with("--") && edit_distance(word.substr(2), name) < 3)
        fail("no option " + word + "; did you mean --" + name + "?");
    if (!value) fail("--" + name + " is missing: " + what);
    return *value;
  }
  // Repeatable, and with several values at once: --input a b --input c.
  Strings take_all(const std::string& name) {
    Strings values;
    asked_.push_back(name);
    while (std::optional<std::string> value = find_one(name)) {
      if (!value->empty() || !empty_is_absent) values.push_back(*value);
      while (at_ < words_.size() && !words_[at_].starts_with("--")) values.push_back(words_[at_]), erase(at_, 1);
    }
    keep(name, join(values, " "));
    return values;
  }
  bool take_switch(const std::string& name) {
    asked_.push_back(name);
    const auto i = std::find(words_.begin(), words_.end(), "--" + name);
    const bool given = i != words_.end();
    if (given) words_.erase(i);
    keep(name, given ? "yes" : "");
    return given;
  }
  int64_t take_int(const std::string& name, int64_t otherwise, int64_t low, int64_t high) {
    const std::optional<std::string> text = find(name);
    const std::optional<int64_t> value = text ? parse_number<int64_t>(*text) : otherwise;
    if (!value || (text && (*value < low || *value > high)))
      fail("--" + name + " " + *text + ": a whole number from " + to_string(low) + " to " + to_string(high) + " is wanted");
    keep(name, *value || text ? to_string(*value) : "");  // a default of 0 means: not given
    return *value;
  }
  double take_number(const std::string& name, double otherwise, double low, double high) {
    const std::optional<std::string> text = find(name);
    const std::optional<double> value = text ? parse_number<double>(*text) : otherwise;
    if (!value || (text && !(*value >= low && *value <= high)))
      fail("--" + name + " " + *text + ": a number from " + format_number(low) + " to " + format_number(high) + " is wanted");
    keep(name, *value != 0 || text ? exact(*value) : "");
    return *value;
  }
  // 500M, 2G, or a plain number of bytes.
  int64_t take_size(const std::string& name, int64_t otherwise) {
    const std::optional<std::string> text = find(name);
    if (!text) return keep(name, to_string(otherwise)), otherwise;
    const size_t unit = std::string_view("KMG").find(text->empty() ? ' ' : text->back());
    const std::optional<double> value = parse_number<double>(unit < 3 ? std::string_view(*text).substr(0, text->size() - 1) : *text);
    const double bytes = value.value_or(0) * std::pow(1024.0, unit < 3 ? (double)unit + 1 : 0);
    if (!(bytes >= 1) || bytes > 1e18) fail("--" + name + " " + *text + ": a size such as 500M or 2G is wanted");
    keep(name, to_string((int64_t)bytes));
    return (int64_t)bytes;
  }
  // The number of the choice; the first is the default.
  int take_choice(const std::string& name, const Strings& choices) {
    const std::string value = take(name, choices[0]);
    const auto at = std::find(choices.begin(), choices.end(), value);
    if (at == choices.end())
      fail("--" + name + " " + value + ": one of " + join(choices, ", ") + " is wanted; did you mean " + nearest(value, choices) + "?");
    return (int)(at - choices.begin());
  }
  std::optional<bool> take_yes_no(const std::string& name) {
    const std::optional<std::string> value = take(name);
    if (value && *value != "yes" && *value != "no") fail("--" + name + " " + *value + ": yes or no is wanted");
    return value ? std::optional<bool>(*value == "yes") : std::nullopt;
  }
  // The next word in front of the options.
  std::optional<std::string> take_word() {
    if (words_.empty() || words_[0].starts_with("-")) return {};
    const std::string word = words_[0];
    erase(0, 1);
    return word;
  }

  void done() const {
    if (words_.empty()) return;
    const std::string word = words_[0].substr(0, words_[0].find('='));
    if (!word.starts_with("-")) fail("'" + words_[0] + "' belongs to no option");
    const std::string name = word.substr(word.find_first_not_of('-') == word.npos ? word.size() : word.find_first_not_of('-'));
    if (std::find(asked_.begin(), asked_.end(), name) != asked_.end() && word == "--" + name)
      fail(word != words_[0] ? word + " takes no value" : word + " is given twice");
    fail("no option " + word + "; did you mean --" + nearest(name, asked_) + "?");
  }
  [[noreturn]] void fail(const std::string& what) const { throw Usage(command_ + ": " + what + "; see bert help " + command_); }

  const Named& taken() const { return taken_; }
  bool given(const std::string& name) const { return given_.count(name) > 0; }
  bool empty_is_absent = false;  // bench: --model= counts as not given

 private:
  std::string command_;
  Strings words_, asked_;
  std::set<std::string> given_;
  Named taken_;
  size_t at_ = 0;  // where the last option taken stood

  void erase(size_t i, size_t n) { words_.erase(words_.begin() + (int64_t)i, words_.begin() + (int64_t)(i + n)); }
  void keep(const std::string& name, const std::string& value) { taken_.emplace_back(name, value); }

  std::optional<std::string> find(const std::string& name) {
    asked_.push_back(name);
    std::optional<std::string> value = find_one(name);
    if (value && value->empty() && empty_is_absent) return {};
    if (value) given_.insert(name);
    return value;
  }
  std::optional<std::string> find_one(const std::string& name) {
    const std::string plain = "--" + name, with_value = plain + "=";
    for (at_ = 0; at_ < words_.size(); at_++) {
      if (words_[at_].starts_with(with_value)) {
        const std::string value = words_[at_].substr(with_value.size());
        erase(at_, 1);
        return value;
      }
      if (words_[at_] != plain) continue;
      const bool bare = at_ + 1 >= words_.size() || words_[at_ + 1].starts_with("--");
      if (bare && !empty_is_absent) fail(plain + " needs a value (one that begins with -- is written " + plain + "=VALUE)");
      const std::string value = bare ? "" : words_[at_ + 1];
      erase(at_, bare ? 1 : 2);
      return value;
    }
    return {};
  }
};

// What every command takes.
struct Common {
  int threads;
  uint64_t seed;
  bool quiet;
  UseThreads use;

  explicit Common(Args& a)
      : threads((int)a.take_int("threads", 0, 0, 4096)),
        seed((uint64_t)a.take_int("seed", 1, 0, INT64_MAX)),
        quiet(a.take_switch("quiet")),
        use(threads) {
    const std::string device = a.take("device", "cpu"), dtype = a.take("dtype", "f32");
    if (device.starts_with("opencl")) throw Error("--device " + device + ": not built yet; this version computes on the cpu");
    if (device != "cpu") a.fail("--device " + device + ": cpu or opencl is wanted");
    if (dtype == "bf16" || dtype == "int8" || dtype == "f16")
      throw Error("--dtype " + dtype + ": not built yet; this version computes in f32");
    if (dtype != "f32") a.fail("--dtype " + dtype + ": f32, bf16 or int8 is wanted");
  }
  void note(const std::string& text) const {
    if (!quiet) say(text);
  }
};

// ==== 3 files into lines, lines into rows =========================================================================
// A line that cannot be used; Rows puts the file and the line in front.
struct BadLine : Error {
  using Error::Error;
};

// The lines of a file or of standard input. A byte-order mark at the start and a carriage return at the end of a line go away.
class Lines {
 public:
  explicit Lines(const std::string& path)
      : name_(path == "-" ? "standard input" : path), file_(path == "-" ? stdin : std::fopen(path.c_str(), "rb")) {
    if (!file_) throw Error(path + ": cannot open: " + std::strerror(errno) + "; give a file that exists and may be read");
  }
  ~Lines() {
    if (file_ != stdin) std::fclose(file_);
    std::free(buffer_);
  }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;

  bool next(std::string& line) {
    errno = 0;
    ssize_t n = getline(&buffer_, &room_, file_);
    if (n < 0) {
      if (std::ferror(file_)) throw Error(name_ + ": cannot read: " + std::strerror(errno ? errno : EIO));
      return false;
    }
    const char* begin = buffer_;
    if (!number_++ && n >= 3 && !std::memcmp(begin, "\xEF\xBB\xBF", 3)) begin += 3, n -= 3;
    if (n && begin[n - 1] == '\n') n--;
    if (n && begin[n - 1] == '\r') n--;
    line.assign(begin, (size_t)n);
    return true;
  }
  const std::string& name() const { return name_; }
  int64_t number() const { return number_; }  // of the line read last, from 1
  std::string where() const { return name_ + ":" + to_string(number_); }

 private:
  std::string name_;
  std::FILE* file_;
  char* buffer_ = nullptr;
  size_t room_ = 0;
  int64_t number_ = 0;
};

const Strings kFormats = {"lines", "tsv", "csv", "jsonl", "fasttext", "ids", "conll", "squad"};
enum Format { kLines, kTsv, kCsv, kJsonl, kFasttext, kIds, kConll, kSquad };
// The well-known names of texts and pairs, and of answers.
const Strings kTextNames = {"text",      "sentence", "sentence1", "premise",    "question", "question1", "text_a", "#1 String",
                            "text_pair", "pair",     "sentence2", "hypothesis", "context",  "question2", "text_b", "#2 String"};
const Strings kLabelNames = {"label", "labels", "score", "gold_label", "class", "Quality"};

// What a reader was told.
struct Source {
  Strings files;
  std::optional<Format> format;  // unset: by the file's ending
  std::string columns;           // empty: by name
  bool header = true, skip_bad = false, quiet = false;
  bool labels = false;      // every row must have one
  bool word_lists = false;  // tokenize --split-words
  bool keep_bytes = false;  // invalid UTF-8 is counted but left: offsets are then into the input's own bytes
  bool raw = false;         // running text: a TAB is white space, an empty line the end of a document
};

Source take_source(Args& a, const Common& common, const std::string& name) {
  Source s;
  s.files = a.take_all(name);
  if (s.files.empty() && name == "input") s.files = {"-"};
  if (const int format = a.take_choice("format", {"by ending", "lines", "tsv", "csv", "jsonl", "fasttext", "ids", "conll", "squad"}))
    s.format = Format(format - 1);
  s.columns = a.take("columns", "");
  s.header = !a.take_switch("no-header");
  s.skip_bad = a.take_switch("skip-bad");
  if (!s.header && s.columns.empty()) a.fail("--no-header needs --columns text=0 or the like");
  s.quiet = common.quiet;
  return s;
}

Format format_of(const std::string& path) {
  for (const Format f : {kTsv, kCsv, kJsonl, kConll})
    if (path.ends_with("." + kFormats[f])) return f;
  return path.ends_with(".json") ? kSquad : kLines;
}

// One text or pair of any format.
struct Row {
  std::string text;
  std::optional<std::string> pair;
  Strings words, pair_words;              // word lists, where these were asked for
  bool labelled = false, listed = false;  // listed: the answer was a list, else it is one text in answers[0]
  Strings answers;
  std::vector<int32_t> ids, segments;  // format ids
  bool document = false;               // a document of its own (tsv, csv, jsonl)
  int64_t number = 0;                  // of the text, from 1 over all files
  std::string where;                   // file:line
};

// All rows of all files, in order, one at a time.
class Rows {
 public:
  explicit Rows(Source source) : s_(std::move(source)) {}

  bool next(Row& row) {
    while (lines_ || open()) try {
        row = Row();
        row.number = number_ + 1;
        if (read(row)) {
          count_++, number_++;
          row.document = format_ == kTsv || format_ == kCsv || format_ == kJsonl;
          if (s_.word_lists && row.words.empty()) row.words = whole_words(row.text), row.pair_words = whole_words(row.pair.value_or(""));
          if (row.ids.empty()) row.text.insert(0, prompt_);
          return true;
        }
        if (lines_->name() != "standard input" && !lines_->number()) throw Error(lines_->name() + ": empty; there is nothing to read");
        lines_.reset();
      } catch (const BadLine& e) {
        number_++;
        bad(row.where, e.what());
      }
    return false;
  }
  // A row turned out to be of no use: an Error, or with --skip-bad counted.
  void bad(const std::string& where, const std::string& what) {
    if (!s_.skip_bad) throw Error(where + ": " + what + "; or pass over such lines with --skip-bad");
    if (skipped_++ < 5) say("bert: " + where + ": " + what + "; skipped");
  }
  // What was repaired or skipped, said once at the end.
  void report() const {
    if (skipped_) say("bert: " + counted(skipped_, "line") + " could not be used and skipped");
    if (repaired_)
      say("bert: invalid UTF-8 in " + counted(repaired_, "line") + ", the first is " + first_repaired_ +
          "; each invalid part became U+FFFD");
  }
  int64_t count() const { return count_; }
  void set_prompt(const std::string& text) { prompt_ = text; }  // goes in front of every text
  bool from_terminal() const { return lines_ && lines_->name() == "standard input" && isatty(0); }

 private:
  Source s_;
  std::optional<Lines> lines_;
  Format format_ = kLines;
  size_t file_ = 0;
  Strings names_;                           // of the columns or keys that were picked from last
  int text_ = -1, pair_ = -1, label_ = -1;  // their numbers
  bool said_ = false;
  int64_t number_ = 0, count_ = 0, skipped_ = 0, repaired_ = 0;
  std::string first_repaired_, prompt_;

  bool open() {
    if (file_ >= s_.files.size()) return false;
    const std::string path = s_.files[file_++];
    format_ = s_.format.value_or(format_of(path));
    if (format_ == kConll || format_ == kSquad)
      throw Error(path + ": format " + kFormats[format_] + " is not built yet; say --format if it is another");
    const bool named = format_ == kTsv || format_ == kCsv || format_ == kJsonl;
    if (!named && !s_.columns.empty()) throw Usage("--columns: " + path + " has no columns; they are for tsv, csv and jsonl");
    if (s_.labels && (format_ == kLines || format_ == kIds))
      throw Error(path + ": no labels in this format; give a tsv, csv or jsonl file, or --format fasttext");
    lines_.emplace(path);
    said_ = false, names_.clear();
    if (format_ == kTsv || format_ == kCsv) try {
        Row row;
        Strings header;
        if (s_.header && !cells(header, row)) throw Error(path + ": empty; a header line is wanted");
        pick(header);
      } catch (const BadLine& e) {
        throw Error(lines_->where() + ": " + e.what());  // no header, no rows: nothing that could be skipped
      }
    return true;
  }

  // The next line, checked and repaired; row.where is set.
  bool line(std::string& text, Row& row) {
    if (!lines_->next(text)) return false;
    row.where = lines_->where();
    if (text.find('\0') != text.npos) throw BadLine("a NUL byte, so this is no text; give a text file in UTF-8");
    std::string copy;
    if (s_.keep_bytes) copy = text;
    if (repair_utf8(s_.keep_bytes ? copy : text) && !repaired_++) first_repaired_ = row.where;
    return true;
  }
  bool read(Row& row) {
    if (format_ == kTsv || format_ == kCsv) {
      Strings parts;
      if (!cells(parts, row)) return false;
      const int last = std::max({text_, pair_, label_});
      if ((int)parts.size() <= last)
        throw BadLine(counted((int64_t)parts.size(), "field") + ", but column " + to_string(last) +
                      " (from 0) is wanted; is a separator missing?");
      row.text = parts[text_];
      if (pair_ >= 0) row.pair = parts[pair_];
      if (label_ >= 0) row.labelled = true, row.answers = {parts[label_]};
      return true;
    }
    std::string text;
    if (!line(text, row)) return false;
    if (format_ == kJsonl)
      json(text, row);
    else if (format_ == kFasttext)
      fasttext(text, row);
    else if (format_ == kIds)
      ids(text, row);
    else
      plain(std::move(text), row);
    return true;
  }

  void plain(std::string text, Row& row) const {
    const size_t tab = text.find('\t');
    if (tab != text.npos && !s_.raw) {
      if (text.find('\t', tab + 1) != text.npos) throw BadLine("more than two texts; a line is a text, or text TAB text");
      row.pair = text.substr(tab + 1), text.resize(tab);
    }
    row.text = std::move(text);
  }
  static void fasttext(const std::string& text, Row& row) {
    static const std::string mark = "__label__";
    size_t at = 0;
    do {  // the first word is a label, and every following one that is marked
      const size_t end = std::min(text.find(' ', at), text.size());
      const std::string word = text.substr(at, end - at);
      row.answers.push_back(word.starts_with(mark) ? word.substr(mark.size()) : word);
      at = std::min(end + 1, text.size());
    } while (text.compare(at, mark.size(), mark) == 0);
    if (row.answers[0].empty()) throw BadLine("no label; a line is a label, a space, the text");
    row.labelled = true, row.listed = row.answers.size() > 1;
    row.text = text.substr(at);
  }
  static Strings whole_words(const std::string& text) {
    Strings words;
    for (std::string& w : split(text, ' '))
      if (!w.empty()) words.push_back(std::move(w));
    return words;
  }
  static std::vector<int32_t> numbers(const std::string& list) {
    std::vector<int32_t> out;
    for (const std::string& word : whole_words(list)) {
      const auto v = parse_number<int32_t>(word);
      if (!v || *v < 0) throw BadLine("'" + word + "' is no token id; a line is numbers joined by spaces");
      out.push_back(*v);
    }
    return out;
  }
  static void ids(const std::string& text, Row& row) {
    const Strings parts = split(text, '\t');
    row.ids = numbers(parts[0]);
    row.segments = parts.size() > 1 ? numbers(parts[1]) : std::vector<int32_t>(row.ids.size(), 0);
    if (row.ids.empty()) throw BadLine("no token ids");
    if (row.segments.size() != row.ids.size() || parts.size() > 2)
      throw BadLine(to_string(row.ids.size()) + " ids but " + to_string(row.segments.size()) + " segment ids; one for each is wanted");
  }

  // The cells of a line of tsv or csv. In csv (RFC 4180) quoted ones may hold commas, doubled quotes and ends of lines.
  bool cells(Strings& parts, Row& row) {
    std::string text;
    if (!line(text, row)) return false;
    if (format_ == kTsv) return parts = split(text, '\t'), true;
    const std::string first = row.where;
    parts.assign(1, "");
    enum { bare, quoted, closed } state = bare;
    for (size_t i = 0; i < text.size() || state == quoted; i++) {
      if (i >= text.size()) {  // the end of the line, inside quotes
        const bool more = line(text, row);
        row.where = first;
        if (!more) throw BadLine("a quote that is never closed; quotes inside a field are doubled");
        parts.back() += '\n', i = (size_t)-1;
      } else if (text[i] == '"' && state == quoted && text.substr(i + 1, 1) == "\"") {
        parts.back() += text[i++];
      } else if (text[i] == '"' && (state == quoted || (state == bare && parts.back().empty()))) {
        state = state == quoted ? closed : quoted;
      } else if (text[i] == ',' && state != quoted) {
        parts.emplace_back(), state = bare;
      } else {
        if (state == closed) throw BadLine("something follows a closing quote; quotes inside a field are doubled");
        parts.back() += text[i];
      }
    }
    return true;
  }

  // Settles which columns or keys are meant: those of --columns, else by well-known names in the order they stand.
  void pick(const Strings& names) {
    if (said_ && names == names_) return;
    names_ = names, text_ = pair_ = label_ = -1;
    auto index = [&](const std::string& name) { return (int)(std::find(names.begin(), names.end(), name) - names.begin()); };
    for (const std::string& wish : s_.columns.empty() ? Strings{} : split(s_.columns, ',')) {
      const size_t equal = std::min(wish.find('='), wish.size());
      const std::string key = wish.substr(0, equal), value = wish.substr(std::min(equal + 1, wish.size()));
      int* to = key == "text" ? &text_ : key == "pair" ? &pair_ : key == "label" || key == "labels" ? &label_ : nullptr;
      if (!to || value.empty())
        throw Usage("--columns " + s_.columns + ": text=…,pair=…,label=… is wanted, each a name or a number from 0");
      const auto number = format_ == kJsonl ? std::nullopt : parse_number<int>(value);
      *to = number ? *number : index(value);
      if (*to < 0 || (!number && *to == (int)names.size()))
        throw BadLine("no '" + value + "' among " + join(names, ", ") + "; correct --columns");
    }
    const bool by_name = text_ < 0;
    for (int i = 0; i < (int)names.size() && by_name; i++) {
      const bool context = format_ == kJsonl && names[i] == "context";
      if (!among(names[i], kTextNames)) continue;
      if (text_ < 0 && !context)
        text_ = i;
      else if (pair_ < 0 || context)
        pair_ = i;
    }
    if (text_ < 0) std::swap(text_, pair_);  // a context alone is the text
    for (const std::string& name : kLabelNames)
      if (label_ < 0 && among(name, names)) label_ = index(name);
    if (!s_.labels) label_ = -1;
    auto missing = [&](const std::string& what, const Strings& known) {
      throw BadLine("no " + what + " (" + join(known, ", ") + ") among " + join(names, ", ") + "; name it with --columns");
    };
    if (text_ < 0) missing("text", kTextNames);
    if (label_ < 0 && s_.labels) missing("label", kLabelNames);
    auto name = [&](int i) { return "'" + (i < (int)names.size() ? names[i] : "column " + to_string(i)) + "'"; };
    if (!s_.quiet && !said_)
      say(lines_->name() + ": text is " + name(text_) + (pair_ < 0 ? "" : ", pair is " + name(pair_)) +
          (label_ < 0 ? "" : ", label is " + name(label_)));
    said_ = true;
  }

  void json(const std::string& text, Row& row) {
    Json v;
    try {
      v = Json::parse(text, "column");
    } catch (const Error& e) {  // "column:1:17: not JSON: ...": the line is known already
      throw BadLine("column " + std::string(e.what()).substr(std::strlen("column:1:")));
    }
    if (v.is(Json::string) && !s_.labels) return void(row.text = v.as_string("text"));
    if (!v.is(Json::object)) throw BadLine("no JSON object");
    Strings names;
    for (const auto& member : v.members()) names.push_back(member.first);
    pick(names);
    const auto& values = v.members();
    row.text = string_or_words(values[text_].second, names[text_], row.words);
    if (pair_ >= 0) row.pair = string_or_words(values[pair_].second, names[pair_], row.pair_words);
    if (label_ < 0) return;
    const Json& label = values[label_].second;
    row.labelled = true, row.listed = label.is(Json::array);
    if (!row.listed)
      row.answers = {answer(label)};
    else
      for (const Json& item : label.items("label")) row.answers.push_back(answer(item));
  }
  std::string string_or_words(const Json& v, const std::string& key, Strings& words) const {
    if (v.is(Json::string)) return v.as_string(key);
    if (!s_.word_lists || !v.is(Json::array)) throw BadLine("'" + key + "' is not a string");
    for (const Json& word : v.items(key)) words.push_back(answer(word));
    return "";
  }
  static std::string answer(const Json& v) {
    if (v.is(Json::string)) return v.as_string("label");
    if (v.is(Json::boolean)) return v.as_bool("label") ? "true" : "false";
    if (v.is(Json::number)) return exact(v.as_double("label"));
    throw BadLine("a value that is neither a string nor a number");
  }
};

// At most `most` rows or 4 MB of text: what is worked on at once. One row where somebody types them.
bool read_chunk(Rows& rows, std::vector<Row>& chunk, size_t most) {
  chunk.clear();
  size_t bytes = 0;
  for (Row row; chunk.size() < most && bytes < (4u << 20) && rows.next(row);) {
    bytes += row.text.size() + (row.pair ? row.pair->size() : 0) + row.ids.size() * 4;
    chunk.push_back(std::move(row));
    if (rows.from_terminal()) break;
  }
  return !chunk.empty();
}

// ==== 4 results ===================================================================================================
// Standard output, or --output FILE, which appears whole or not at all.
class Results {
 public:
  explicit Results(Args& a) {
    if (const auto path = a.take("output")) path_ = *path;
    struct stat there;
    const bool device =
        path_.starts_with("/dev/") || (!::stat(path_.c_str(), &there) && !S_ISREG(there.st_mode) && !S_ISDIR(there.st_mode));
    if (path_.empty() || !device) return;
    name_ = path_;  // a device or a pipe: nothing to put in place of
    file_out_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
    if (file_out_ < 0) throw Error(path_ + ": cannot write: " + std::strerror(errno));
    path_.clear();
  }
  void line(std::string_view text) { write(text), write("\n"); }
  void write(std::string_view text) {
    buffer_ += text;
    if (buffer_.size() > (1u << 16)) flush();
  }
  void flush() {
    if (!path_.empty()) {
      if (!file_) file_.emplace(path_);
      file_->write(buffer_);
      return buffer_.clear();
    }
    for (size_t at = 0; at < buffer_.size();) {
      const ssize_t n = ::write(file_out_, buffer_.data() + at, buffer_.size() - at);
      if (n < 0 && errno == EPIPE) throw ClosedPipe();
      if (n < 0 && errno != EINTR) throw Error(name_ + ": cannot write: " + std::strerror(errno));
      if (n > 0) at += (size_t)n;
    }
    buffer_.clear();
  }
  void finish() {
    flush();
    if (file_) file_->commit();
  }

 private:
  std::string path_, buffer_, name_ = "standard output";
  int file_out_ = 1;
  std::optional<AtomicFile> file_;
};

// Single figures, as `name TAB value`.
void print_numbers(const Numbers& list) {
  for (const auto& [name, value] : list) std::printf("%s\t%s\n", name.c_str(), format_number(value).c_str());
}

template <class T, class F>
std::string json_list(const std::vector<T>& list, F&& element) {
  std::string out = "[";
  for (size_t i = 0; i < list.size(); i++) out += (i ? "," : "") + element(i);
  return out + "]";
}

// JSON numbers cannot be nan or inf.
std::string json_object(const Numbers& numbers) {
  std::string out;
  for (const auto& [name, value] : numbers)
    out += (out.empty() ? "{" : ",") + json_quote(name) + ":" + (std::isfinite(value) ? format_number(value) : "null");
  return out.empty() ? "{}" : out + "}";
}

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + (int64_t)v.size() / 2, v.end());
  return v[v.size() / 2];
}

// ==== 5 text into ids =============================================================================================
// Calls each(sentence) for the sentences of a line: cut after . ! ? and what closes quotes and brackets, where white space follows, and
// after their full-width forms. Nothing is lost: the rest of the line is a sentence too.
template <class F>
void each_sentence(std::string_view line, F&& each) {
  auto one_of = [&](size_t i, std::initializer_list<std::string_view> list) -> size_t {
    for (std::string_view s : list)
      if (line.substr(i, s.size()) == s) return s.size();
    return 0;
  };
  auto stop = [&](size_t i) { return one_of(i, {".", "!", "?"}); };
  auto wide_stop = [&](size_t i) { return one_of(i, {"。", "！", "？"}); };
  auto closer = [&](size_t i) { return one_of(i, {"\"", "'", ")", "]", "}", "”", "’", "»", "」", "』", "）"}); };
  size_t begin = 0;
  for (size_t i = 0; i < line.size();) {
    const bool wide = wide_stop(i) > 0;
    if (!wide && !stop(i)) {
      i++;
      continue;
    }
    for (size_t n; i < line.size() && ((n = stop(i)) || (n = wide_stop(i)) || (n = closer(i)));) i += n;
    if (!wide && i < line.size() && line[i] != ' ' && line[i] != '\t') continue;  // 3.14, example.org
    each(line.substr(begin, i - begin));
    begin = i;
  }
  if (begin < line.size()) each(line.substr(begin));
}

// Raw text as ids: a line is a paragraph, a blank line ends a document; in the other formats a row is a document.
Corpus read_corpus(Source source, const WordPiece& tokenizer) {
  source.raw = true;
  struct Piece {
    std::vector<int32_t> ids;
    std::vector<size_t> ends;  // of its sentences
    bool document = false;     // a document ends here
  };
  Corpus corpus;
  Rows rows(source);
  std::vector<Row> chunk;
  while (read_chunk(rows, chunk, 1 << 16)) {
    std::vector<Piece> pieces(chunk.size());
    parallel_ranges((int64_t)chunk.size(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        Piece& piece = pieces[i];
        const Row& row = chunk[i];
        for (const std::string& line : split(row.text, '\n'))
          each_sentence(line, [&](std::string_view sentence) {
            tokenizer.append_ids(sentence, piece.ids);
            piece.ends.push_back(piece.ids.size());
          });
        piece.document = row.document || row.text.find_first_not_of(" \t") == row.text.npos;
      }
    });
    for (const Piece& piece : pieces) {
      size_t at = 0;
      for (const size_t end : piece.ends) {
        corpus.ids.insert(corpus.ids.end(), piece.ids.begin() + (int64_t)at, piece.ids.begin() + (int64_t)end);
        corpus.end_sentence();
        at = end;
      }
      if (piece.document) corpus.end_document();
    }
  }
  corpus.end_document();
  rows.report();
  if (corpus.ids.empty()) throw Error(join(source.files, ", ") + ": no text; give a file with a paragraph a line");
  return corpus;
}

// Rows as examples of at most `limit` tokens; cut[i]: row i was longer. Rows of format ids are taken as they are.
std::vector<Example> encode_rows(const WordPiece& tokenizer, const std::vector<Row>& rows, int64_t limit, bool parse_special,
                                 std::vector<uint8_t>& cut) {
  std::vector<Example> examples(rows.size());
  cut.assign(rows.size(), 0);
  parallel_ranges((int64_t)rows.size(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Row& row = rows[i];
      Example& example = examples[i];
      if (!row.ids.empty()) {
        example.ids = row.ids, example.segments = row.segments;
        cut[i] = (int64_t)row.ids.size() > limit;
        continue;
      }
      EncodeOptions options;
      options.parse_special = parse_special;
      auto encode = [&] { return row.pair ? tokenizer.encode(row.text, *row.pair, options) : tokenizer.encode(row.text, options); };
      Encoding e = encode();
      if ((int64_t)e.ids.size() > limit) {
        cut[i] = 1;
        options.max_length = limit;
        e = encode();
      }
      example.ids = std::move(e.ids), example.segments = std::move(e.type_ids);
    }
  });
  return examples;
}

// Token and segment ids of format ids must be ones that the model has, and fit its positions.
void check_ids(const Row& row, const Config& config) {
  for (const int32_t id : row.ids)
    if (id >= config.vocab_size)
      throw Error(row.where + ": token id " + to_string(id) + ", but the model has ids 0 to " + to_string(config.vocab_size - 1));
  for (const int32_t s : row.segments)
    if (s >= config.type_vocab_size)
      throw Error(row.where + ": segment id " + to_string(s) + ", but the model has 0 to " + to_string(config.type_vocab_size - 1));
  if ((int64_t)row.ids.size() > config.max_position_embeddings)
    throw Error(row.where + ": " + to_string(row.ids.size()) + " ids, but the model has " + to_string(config.max_position_embeddings) +
                " positions");
}

// FNV-1a over 32-bit words: tells whether data is what it was.
class Fingerprint {
 public:
  template <class T>
  void add(const std::vector<T>& list) {
    for (const T& v : list) word((uint64_t)v);
    word(list.size());
  }
  void add(std::string_view text) {
    for (const char c : text) word((unsigned char)c);
    word(text.size());
  }
  std::string text() const {
    char hex[17];
    std::snprintf(hex, sizeof hex, "%016llx", (unsigned long long)state_);
    return hex;
  }

 private:
  uint64_t state_ = 14695981039346656037ull;
  void word(uint64_t v) { state_ = (state_ ^ v) * 1099511628211ull; }
};

// ==== 6 model folders =============================================================================================
// For a newcomer: says what a folder lacks and where models come from, before the library looks for it.
void check_model_folder(const std::string& folder, bool weights = true) {
  const std::string where_from =
      "; a model folder holds config.json, vocab.txt (or tokenizer.json) and model.safetensors. Make one with bert pretrain, or take one "
      "from "
      "the hub: git clone https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2";
  if (!fs::exists(folder)) throw Error(folder + ": no such folder" + where_from);
  if (!fs::is_directory(folder)) throw Error(folder + ": a file, where a model's folder is wanted" + where_from);
  auto has = [&](const char* file) { return fs::exists(folder + "/" + file); };
  const bool model = has("model.safetensors") || has("model.safetensors.index.json");
  if (weights && !model && has("log.jsonl"))
    throw Error(folder + ": a training run began here, but nothing was saved yet; let it go on, or start it again");
  Strings missing;
  if (!has("config.json")) missing.push_back("config.json");
  if (!has("vocab.txt") && !has("tokenizer.json")) missing.push_back("vocab.txt");
  if (weights && !model) missing.push_back("model.safetensors");
  if (missing.empty()) return;
  if (weights && has("pytorch_model.bin") && missing == Strings{"model.safetensors"})
    throw Error(folder +
                ": model.safetensors is missing, and pytorch_model.bin cannot be read here; save it with transformers: "
                "AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)");
  throw Error(folder + ": " + join(missing, " and ") + " missing" + where_from);
}

// The rows' limit: as given, else 128 or what the model has.
int64_t length_limit(int64_t max_length, const Config& config) {
  if (max_length > config.max_position_embeddings)
    throw Error("--max-length " + to_string(max_length) + ": the model has only " + to_string(config.max_position_embeddings) +
                " positions; give less");
  return max_length ? max_length : std::min<int64_t>(128, config.max_position_embeddings);
}

std::string model_size(const Bert& bert) {
  return to_string(bert.config.num_hidden_layers) + " layers of " + to_string(bert.config.hidden_size) + ", " +
         grouped(bert.parameter_count()) + " parameters";
}

void show_warnings(const WordPiece& tokenizer, const Common& common) {
  for (const std::string& warning : tokenizer.warnings) common.note("bert: " + warning);
}

ModelFolder open_model(const std::string& path, const Common& common) {
  check_model_folder(path);
  ModelFolder folder = load_folder(path);
  show_warnings(folder.tokenizer, common);
  return folder;
}

// The task model's name for messages.
std::string task_name(Task task) { return head_kind(task).name; }

[[noreturn]] void wrong_model(const std::string& path, Task is, const std::string& wanted) {
  throw Error(path + ": a model for " + task_name(is) + ", but this command wants one for " + wanted);
}

// The files of a tokenizer, as they are, for a model folder that is made from it.
std::map<std::string, std::string> tokenizer_files(const std::string& path, const WordPiece& tokenizer, int64_t max_length) {
  std::map<std::string, std::string> files;
  if (!fs::is_directory(path))
    files["vocab.txt"] = read_file(path);
  else
    for (const char* name : {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"})
      if (fs::exists(path + "/" + name)) files[name] = read_file(path + "/" + name);
  if (!files.count("tokenizer_config.json")) files["tokenizer_config.json"] = tokenizer_config_json(tokenizer.settings(), max_length);
  return files;
}

// ==== 7 a training run: folder, log, progress, signals ============================================================
volatile std::sig_atomic_t stop_signal = 0;
std::string command_line;  // as it was given, with --resume: so that it can be given again

// The first signal asks the run to save and stop, the second one ends the process.
void catch_signals() {
  struct sigaction action = {};
  action.sa_handler = [](int s) { stop_signal = s; };
  action.sa_flags = SA_RESETHAND | SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

using About = std::map<std::string, std::string>;  // what a training state holds beside numbers
int64_t stored_number(const About& about, const char* key) { return parse_number<int64_t>(about.at(key)).value_or(0); }

struct RunSettings {
  int64_t keep = 2, save_every = 0;  // 0: every five minutes
  bool quiet = false, resume = false, overwrite = false;
};
RunSettings take_run(Args& a, const Common& common) {
  RunSettings s;
  s.quiet = common.quiet;
  s.resume = a.take_switch("resume"), s.overwrite = a.take_switch("overwrite");
  return s;
}

// The folder that a command writes: made, locked against a second run, refused when it holds something else.
class OutputFolder {
 public:
  OutputFolder(const std::string& path, const RunSettings& s) {
    std::error_code code;
    if (fs::exists(path) && !fs::is_directory(path)) throw Error(path + ": a file, where a folder is wanted; give another --output");
    if (s.resume && !fs::exists(path)) throw Error(path + ": no such folder; --resume goes on in the folder of the run that was stopped");
    static const Strings of_unfinished_run = {".lock", "log.jsonl", "report.html"};  // ended before its first save
    if (!s.overwrite && !s.resume && fs::exists(path))
      for (const auto& entry : fs::directory_iterator(path))
        if (const std::string name = entry.path().filename().string(); !among(name, of_unfinished_run))
          throw Error(path + ": holds files already (" + name + "); give another --output, or --overwrite");
    fs::create_directories(path, code);
    if (code) throw Error(path + ": cannot make the folder: " + code.message() + "; give another --output");
    lock_.emplace(path);
  }

 private:
  std::optional<FolderLock> lock_;
};

// training_state.safetensors and, before it, training_state-1.safetensors ...: at every moment one whole file bears a name that --resume
// looks for.
class States {
 public:
  States(const std::string& folder, int64_t keep) : base_(folder + "/training_state"), keep_(keep) {}
  bool any() const { return fs::exists(name(0)) || fs::exists(name(1)); }
  void save(const Trainer& trainer, const About& about) const {
    const std::string fresh = base_ + "-new.safetensors";
    trainer.save(fresh, about);
    std::error_code code;  // an older state that is not there, or cannot be linked, is no failure
    for (int64_t i = keep_ - 1; i > 1; i--) fs::rename(name(i - 1), name(i), code);
    if (keep_ > 1) fs::remove(name(1), code), fs::create_hard_link(name(0), name(1), code);
    fs::rename(fresh, name(0));
  }
  // The newest state that can be read; empty where there is none.
  About load(Trainer& trainer) const {
    for (int64_t i = 0; i < 2; i++) try {
        if (fs::exists(name(i))) return trainer.load(name(i));
      } catch (const Error& e) {
        if (i || !fs::exists(name(1))) throw;
        say(std::string("bert: ") + e.what() + "; going on from " + name(1));
      }
    return {};
  }
  void remove_all() const {
    std::error_code code;
    for (int64_t i = 0; i < 100; i++) fs::remove(name(i), code);
  }

 private:
  std::string base_;
  int64_t keep_;
  std::string name(int64_t i) const { return base_ + (i ? "-" + to_string(i) : "") + ".safetensors"; }
};

// One line with step, loss, tokens/s and time left: rewritten on a terminal, otherwise a plain line now and then.
class Progress {
 public:
  explicit Progress(bool quiet) : quiet_(quiet), terminal_(isatty(2)) {}
  void show(const std::string& line, bool last = false) {
    const double t = now();
    if (quiet_ || (!last && t < next_)) return;
    next_ = t + (terminal_ ? 0.2 : wait_);
    wait_ = std::min(60.0, wait_ * 1.5);
    if (!terminal_) return say(line);
    std::fprintf(stderr, "\r\033[K%s%s", line.c_str(), last ? "\n" : "");
    std::fflush(stderr);
    progress_line = !last;
  }

 private:
  bool quiet_, terminal_;
  double next_ = 0, wait_ = 4;
};

// Settings that a resumed run may change, or that are checked by the data they name.
const Strings kFreeSettings = {"threads",      "quiet",  "device",  "resume",    "overwrite", "output", "save-every", "keep",
                               "input",        "train",  "dev",     "test",      "model",     "vocab",  "config",     "init",
                               "dump-batches", "format", "columns", "no-header", "skip-bad",  "tsv",    "dry-run"};

// What a training command has beside its trainer: the folder's state, log.jsonl, report.html, the progress line.
class Run {
 public:
  Named settings, data;  // for the report
  Numbers results;
  std::function<void()> save_model = [] {};
  std::function<About()> place = [] { return About(); };  // where the caller stands, stored with every state
  States states;

  Run(const std::string& folder, std::string title, const RunSettings& s)
      : states(folder, s.keep), folder_(folder), title_(std::move(title)), s_(s), progress_(s.quiet) {}
  // Takes up the run that the folder holds, or begins anew: then empty.
  About take_up(Trainer& trainer, const Named& taken, const std::string& data_fingerprint);
  void after_step(const StepReport& r);
  void evaluated(int64_t step, const Numbers& metrics) { add("{\"step\":" + to_string(step) + ",\"dev\":" + json_object(metrics) + "}"); }
  bool save_due(int64_t done) const { return s_.save_every ? done % s_.save_every == 0 : now() - saved_at_ > 300; }
  void save(const Trainer& trainer);
  int stopped(const Trainer& trainer);  // after a signal: saves, says how to go on, returns the exit status
  void write_report() const;
  const std::string& folder() const { return folder_; }
  // Trains by `steps`, which returns an exit status, and saves at the end; an Error says what stands in the folder.
  template <class F>
  int guarded(const Trainer& trainer, F&& steps) try {
    const int status = steps();
    if (!line_.empty()) progress_.show(line_, true);
    if (!status) save(trainer);
    return status;
  } catch (const Error& e) {
    const bool any = states.any();
    throw Error(e.what() + (any ? "; the state of the last save stands in " + folder_ : "; nothing was saved yet in " + folder_));
  }

 private:
  std::string folder_, title_, line_;
  RunSettings s_;
  Progress progress_;
  About fixed_;            // settings, data and machine: what a resumed run must share
  std::vector<Json> log_;  // the objects of log.jsonl
  std::FILE* log_file_ = nullptr;
  double earlier_seconds_ = 0, begun_ = 0, saved_at_ = 0, window_began_ = 0;
  int64_t earlier_tokens_ = 0, tokens_ = 0, first_ = 0, window_first_ = 0, saved_ = -1;
  StepReport sum_;  // since the last logged step

  void check(const About& stored) const;
  void open_log(int64_t step);
  void add(const std::string& object);
};

About Run::take_up(Trainer& trainer, const Named& taken, const std::string& data_fingerprint) {
  settings = taken;
  fixed_ = {{"data", data_fingerprint}, {"backend", backend_description()}};
  for (const auto& [name, value] : taken)
    if (!value.empty() && !among(name, kFreeSettings)) fixed_["--" + name] = value;
  About stored;
  if (s_.resume)
    stored = states.load(trainer);
  else
    states.remove_all();
  if (!stored.empty()) {
    check(stored);
    fixed_["backend"] = stored["backend"];
    trainer.set_steps(stored_number(stored, "steps"));
    saved_ = trainer.done();
  }
  if (s_.resume && !s_.quiet)
    say(stored.empty() ? "bert: nothing was saved yet in " + folder_ + "; beginning with the first step"
                       : "going on after step " + to_string(trainer.done()) + " of " + to_string(trainer.settings().steps));
  open_log(trainer.done());
  begun_ = saved_at_ = window_began_ = now(), first_ = window_first_ = trainer.done();
  return stored;
}

// A resumed run must be the run that was begun.
void Run::check(const About& stored) const {
  auto get = [](const About& m, const std::string& key) { return m.count(key) ? m.at(key) : "none"; };
  std::set<std::string> keys;
  for (const About* m : {&fixed_, &stored})
    for (const auto& [key, value] : *m)
      if (key.starts_with("--")) keys.insert(key);
  Strings differ;
  for (const std::string& key : keys)
    if (get(fixed_, key) != get(stored, key))
      differ.push_back(key + " (begun with " + get(stored, key) + ", now " + get(fixed_, key) + ")");
  if (differ.empty() && get(fixed_, "data") != get(stored, "data")) differ = {"other data"};
  if (!differ.empty())
    throw Error(folder_ + ": --resume with what the run did not begin with: " + join(differ, ", ") +
                "; give the same, or begin anew in another folder");
  if (get(fixed_, "backend") != get(stored, "backend"))
    say("bert: the run began on " + get(stored, "backend") + ", here are " + get(fixed_, "backend") +
        ": its last bits may come out otherwise");
}

// Keeps what was logged up to `step` and goes on behind it; 0: begins anew.
void Run::open_log(int64_t step) {
  const std::string path = folder_ + "/log.jsonl", old = step && fs::exists(path) ? read_file(path) : "";
  std::string kept;
  for (size_t begin = 0, end; (end = old.find('\n', begin)) != old.npos; begin = end + 1) {  // a last line cut short is dropped
    const Json v = Json::parse(std::string_view(old).substr(begin, end - begin), path);
    if (const Json* s = v.find("step"); !s || s->as_int(path) > step) break;
    if (const Json* s = v.find("seconds")) earlier_seconds_ = s->as_double(path);
    if (const Json* t = v.find("tokens")) earlier_tokens_ = t->as_int(path);
    kept += old.substr(begin, end + 1 - begin);
    log_.push_back(v);
  }
  write_file(path, kept);
  log_file_ = std::fopen(path.c_str(), "ab");  // closed by the end of the process
  if (!log_file_) throw Error(path + ": cannot open: " + std::strerror(errno));
}

void Run::add(const std::string& object) {
  if (std::fputs((object + "\n").c_str(), log_file_) < 0 || std::fflush(log_file_))
    throw Error(folder_ + "/log.jsonl: cannot write: " + std::strerror(errno));
  log_.push_back(Json::parse(object, "log.jsonl"));
}

void Run::after_step(const StepReport& r) {
  const double t = now(), spent = t - begun_;
  tokens_ += r.tokens;
  sum_.tokens += r.tokens, sum_.rows += r.rows, sum_.masked += r.masked;
  sum_.loss.total += r.loss.total, sum_.loss.masked += r.loss.masked, sum_.loss.next_sentence += r.loss.next_sentence;
  sum_.loss.masked_right += r.loss.masked_right, sum_.loss.next_right += r.loss.next_right;
  line_ = "step " + to_string(r.step) + "/" + to_string(r.steps) + "  loss " + fixed(r.loss.total, 4) + "  " +
          grouped((int64_t)((double)tokens_ / spent)) + " tokens/s  " +
          (r.step < r.steps ? duration(spent / (double)(r.step - first_) * (double)(r.steps - r.step)) + " left" : "in " + duration(spent));
  progress_.show(line_);

  // About a thousand logged steps whatever the run's length; each stands for the mean since the one before.
  if (r.step % std::max<int64_t>(1, r.steps / 1000) && r.step != r.steps) return;
  const double n = (double)(r.step - window_first_);
  Numbers record = {{"step", (double)r.step},
                    {"loss", sum_.loss.total / n},
                    {"lr", r.lr},
                    {"grad_norm", r.grad_norm},
                    {"tokens", (double)(earlier_tokens_ + tokens_)},
                    {"tokens_per_second", (double)sum_.tokens / (t - window_began_)},
                    {"seconds", earlier_seconds_ + spent}};
  if (sum_.masked)
    record.insert(record.end(), {{"mlm_loss", sum_.loss.masked / n},
                                 {"nsp_loss", sum_.loss.next_sentence / n},
                                 {"mlm_accuracy", (double)sum_.loss.masked_right / (double)sum_.masked},
                                 {"nsp_accuracy", (double)sum_.loss.next_right / (double)sum_.rows}});
  add(json_object(record));
  sum_ = StepReport(), window_first_ = r.step, window_began_ = t;
}

void Run::save(const Trainer& trainer) {
  About about = fixed_;
  about["steps"] = to_string(trainer.settings().steps);
  about.merge(place());
  if (saved_ != trainer.done()) states.save(trainer, about);
  save_model();
  write_report();
  saved_at_ = now(), saved_ = trainer.done();
}

int Run::stopped(const Trainer& trainer) {
  save(trainer);
  say("bert: stopped by a signal after step " + to_string(trainer.done()) + " of " + to_string(trainer.settings().steps) +
      " and saved; go on with\n  " + command_line);
  return 128 + (int)stop_signal;
}

// ==== 8 report.html ===============================================================================================
// Self-contained: text, tables and SVG, no script and nothing from the network; colours follow the reader's light or dark setting.
struct Series {
  std::string name, style;  // style: a class of the sheet below
  std::vector<std::pair<double, double>> points;
  bool dots = false;
};

std::string html(std::string_view text) {
  std::string out;
  for (const char c : text) c == '<' ? out += "&lt;" : c == '&' ? out += "&amp;" : c == '"' ? out += "&quot;" : out += c;
  return out;
}

// At most `most` points: the means of equal stretches.
std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& p, size_t most) {
  if (p.size() <= most) return p;
  std::vector<std::pair<double, double>> out;
  for (size_t i = 0; i < most; i++) {
    const size_t begin = i * p.size() / most, end = (i + 1) * p.size() / most;
    double x = 0, y = 0;
    for (size_t k = begin; k < end; k++) x += p[k].first, y += p[k].second;
    out.emplace_back(x / (double)(end - begin), y / (double)(end - begin));
  }
  return out;
}

// A running mean whose memory is a thirtieth of the run.
std::vector<std::pair<double, double>> smoothed(const std::vector<std::pair<double, double>>& p) {
  std::vector<std::pair<double, double>> out;
  const double keep = std::exp(-30.0 / std::max<double>(60, (double)p.size()));
  double sum = 0, weight = 0;
  for (const auto& [x, y] : p) {
    sum = keep * sum + y, weight = keep * weight + 1;
    out.emplace_back(x, sum / weight);
  }
  return out;
}

// Round numbers that cut [low, high] into about n parts.
std::vector<double> ticks(double low, double high, int n) {
  const double raw = (high - low) / n, unit = std::pow(10, std::floor(std::log10(raw)));
  const double step = unit * (raw / unit < 1.5 ? 1 : raw / unit < 3.5 ? 2 : raw / unit < 7.5 ? 5 : 10);
  std::vector<double> out;
  for (double i = std::ceil(low / step); i * step <= high + step * 1e-9; i++) out.push_back(i * step);
  return out;
}

std::string tick_text(double v) {
  char text[40];
  if (std::fabs(v) >= 10000 && v == std::floor(v)) return grouped((int64_t)v);
  const auto r = std::to_chars(text, text + sizeof text, std::fabs(v) < 1e-12 ? 0.0 : v, std::chars_format::general, 5);
  return std::string(text, r.ptr);
}

std::string chart(const std::string& title, const std::vector<Series>& all) {
  constexpr double W = 640, H = 260, left = 58, right = 12, top = 12, bottom = 34;
  double x0 = 1e300, x1 = -1e300, y0 = 1e300, y1 = -1e300;
  for (const Series& s : all)
    for (const auto& [x, y] : s.points) x0 = std::min(x0, x), x1 = std::max(x1, x), y0 = std::min(y0, y), y1 = std::max(y1, y);
  if (x1 < x0) return "";
  if (x1 == x0) x0 -= 1, x1 += 1;
  const double margin = y1 > y0 ? (y1 - y0) * 0.06 : std::max(1e-9, std::fabs(y0) * 0.1);
  y0 = y0 >= 0 ? std::max(0.0, y0 - margin) : y0 - margin, y1 += margin;
  auto px = [&](double x) { return fixed(left + (x - x0) / (x1 - x0) * (W - left - right), 1); };
  auto py = [&](double y) { return fixed(H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom), 1); };

  std::string out = "<figure><figcaption><b>" + html(title) + "</b>";
  for (const Series& s : all)
    if (!s.name.empty()) out += "<span class=\"key " + s.style + "\">" + html(s.name) + "</span>";
  out += "</figcaption><svg viewBox=\"0 0 " + fixed(W, 0) + " " + fixed(H, 0) + "\" role=\"img\" aria-label=\"" + html(title) + "\">";
  for (const double y : ticks(y0, y1, 5))
    out += "<line class=\"grid\" x1=\"" + fixed(left, 0) + "\" x2=\"" + fixed(W - right, 0) + "\" y1=\"" + py(y) + "\" y2=\"" + py(y) +
           "\"/><text x=\"" + fixed(left - 8, 0) + "\" y=\"" + py(y) + "\" dy=\".32em\" text-anchor=\"end\">" + tick_text(y) + "</text>";
  for (const double x : ticks(x0, x1, 6))
    out += "<text x=\"" + px(x) + "\" y=\"" + fixed(H - bottom + 18, 0) + "\" text-anchor=\"middle\">" + tick_text(x) + "</text>";
  out += "<text x=\"" + fixed(W - right, 0) + "\" y=\"" + fixed(H - 2, 0) + "\" text-anchor=\"end\">step</text>";
  out += "<line class=\"axis\" x1=\"" + fixed(left, 0) + "\" x2=\"" + fixed(W - right, 0) + "\" y1=\"" + fixed(H - bottom, 0) + "\" y2=\"" +
         fixed(H - bottom, 0) + "\"/>";
  for (const Series& s : all) {
    out += "<polyline class=\"" + s.style + "\" points=\"";
    for (const auto& [x, y] : s.points) out += px(x) + "," + py(y) + " ";
    out += "\"/>";
    if (s.dots)
      for (const auto& [x, y] : s.points)
        out += "<circle class=\"" + s.style + "\" r=\"3.5\" cx=\"" + px(x) + "\" cy=\"" + py(y) + "\"><title>" + html(s.name) + ", step " +
               tick_text(x) + ": " + format_number(std::round(y * 1e5) / 1e5) + "</title></circle>";
  }
  return out + "</svg></figure>\n";
}

std::string html_table(const std::string& title, const Named& rows) {
  std::string out;
  for (const auto& [name, value] : rows)
    if (!value.empty()) out += "<tr><th>" + html(name) + "</th><td>" + html(value) + "</td></tr>";
  return out.empty() ? "" : "<section><h2>" + html(title) + "</h2><table>" + out + "</table></section>\n";
}

const char* const kReportHead =
    R"(<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><style>
:root{--ground:#fff;--card:#f6f7f9;--ink:#1c2330;--soft:#5d6675;--line:#dfe3e9;--train:#2f6fd6;--dev:#d9622b;--third:#2d8f5c}
@media(prefers-color-scheme:dark){:root{--ground:#14171c;--card:#1d2129;--ink:#e6e9ee;--soft:#9aa4b2;--line:#333a45;--train:#6ea8ff;--dev:#ff9d66;--third:#63c995}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}h1{font-size:24px;margin:0}h2{font-size:15px;margin:0 0 8px}
p.sub{color:var(--soft);margin:2px 0 20px}.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:16px;margin:0 0 16px}
figure,section,.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0;min-width:0}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 16px}.tile b{display:block;font-size:21px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
figcaption{display:flex;flex-wrap:wrap;gap:4px 16px;align-items:center;margin:0 0 6px}.key{color:var(--soft);font-size:13px}
.key::before{content:"";display:inline-block;width:18px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;background:currentColor}
svg{width:100%;height:auto;display:block;overflow:visible}svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}polyline{fill:none;stroke-width:2;stroke-linejoin:round}
polyline.raw{stroke:var(--train);opacity:.28;stroke-width:1.2}polyline.train{stroke:var(--train)}polyline.dev{stroke:var(--dev)}polyline.third{stroke:var(--third)}
circle.dev{fill:var(--dev)}circle.third{fill:var(--third)}.key.raw::before{background:var(--train);opacity:.35}.key.train::before{background:var(--train)}.key.dev::before{background:var(--dev)}
main>.tables{align-items:start}.tables>div{display:grid;gap:16px}.key.third::before{background:var(--third)}table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;font-weight:400;color:var(--soft);white-space:nowrap;vertical-align:top}
th,td{padding:3px 12px 3px 0;border-top:1px solid var(--line)}td{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}tr:first-child>*{border-top:0}
</style>)";

// The values of `key` over the steps: of the logged steps, or of the evaluations.
std::vector<std::pair<double, double>> curve(const std::vector<Json>& records, const std::string& key, bool dev) {
  std::vector<std::pair<double, double>> points;
  for (const Json& r : records) {
    const Json* evaluation = r.find("dev");
    if ((evaluation != nullptr) != dev) continue;
    const Json *v = (dev ? evaluation : &r)->find(key), *step = r.find("step");
    if (v && v->is(Json::number) && step) points.emplace_back(step->as_double("step"), v->as_double(key));
  }
  return points;
}

std::string curves(const std::vector<Json>& log, const std::string& title, const std::string& key, const Strings& dev_keys) {
  const auto train = thinned(curve(log, key, false), 600);
  std::vector<Series> all;
  if (train.size() > 30) all.push_back({"", "raw", train, false});
  if (!train.empty())
    all.push_back({train.size() > 30 ? "training, smoothed" : "training", "train", train.size() > 30 ? smoothed(train) : train, false});
  for (size_t i = 0; i < dev_keys.size() && i < 2; i++)
    if (const auto dev = curve(log, dev_keys[i], true); !dev.empty())
      all.push_back({key.empty() ? dev_keys[i] : i ? dev_keys[i] + ", held out" : "held out", i ? "third" : "dev", dev, true});
  return chart(title, all);
}

std::string cpu_name() {
  std::string text;
  try {
    text = read_file("/proc/cpuinfo");
  } catch (const Error&) { return ""; }
  const size_t at = text.find("model name"), colon = text.find(':', at);
  if (at == text.npos || colon == text.npos) return "";
  return text.substr(colon + 2, text.find('\n', colon) - colon - 2);
}

void Run::write_report() const {
  const std::vector<Json>& records = log_;
  auto last = [&](const char* key) {
    const auto c = curve(records, key, false);
    return c.empty() ? 0.0 : c.back().second;
  };
  std::string page = kReportHead + std::string("<title>") + html(title_) + "</title></head><body><main><h1>" + html(title_) +
                     "</h1>\n<p class=\"sub\">step " + grouped((int64_t)last("step")) + ", " + grouped((int64_t)last("tokens")) +
                     " tokens, " + duration(last("seconds")) + "</p>\n";
  if (!results.empty()) {
    page += "<div class=\"tiles\">";
    for (const auto& [name, value] : results)
      page += "<div class=\"tile\"><b>" + fixed(value, 4) + "</b><span>" + html(name) + "</span></div>";
    page += "</div>\n";
  }
  page += "<div class=\"grid2\">";
  const bool masked = !curve(records, "mlm_loss", false).empty();
  if (masked) {
    page += curves(records, "Masked-word loss (nats)", "mlm_loss", {"mlm_loss", "unigram_loss"}) +
            curves(records, "Masked-word accuracy", "mlm_accuracy", {"mlm_accuracy"});
    if (last("nsp_loss") > 0)
      page += curves(records, "Next-sentence loss (nats)", "nsp_loss", {"nsp_loss"}) +
              curves(records, "Next-sentence accuracy", "nsp_accuracy", {"nsp_accuracy"});
  } else {
    page += curves(records, "Loss", "loss", {"loss"});
    Strings names;
    for (const Json& r : records)
      if (const Json* dev = r.find("dev"); dev && names.empty())
        for (const auto& member : dev->members())
          if (member.first != "loss") names.push_back(member.first);
    if (!names.empty()) page += curves(records, "Held-out " + names[0] + (names.size() > 1 ? " and " + names[1] : ""), "", names);
  }
  page += chart("Learning rate", {{"", "train", thinned(curve(records, "lr", false), 600), false}}) +
          chart("Gradient norm", {{"", "train", thinned(curve(records, "grad_norm", false), 600), false}}) +
          "</div>\n<div class=\"grid2 tables\"><div>" + html_table("Data", data) +
          html_table("Machine", {{"processor", cpu_name()},
                                 {"threads", to_string(threads())},
                                 {"kernels", backend_description()},
                                 {"bert", kVersion},
                                 {"speed", grouped((int64_t)last("tokens_per_second")) + " tokens/s at the end"}}) +
          "</div>" + html_table("Settings", settings) + "</div></main></body></html>\n";
  write_file(folder_ + "/report.html", page);
}

// ==== 9 vocab, tokenize ===========================================================================================
int cmd_vocab(Args& a) {
  Common common(a);
  Source source = take_source(a, common, "input");
  source.raw = true;
  const std::string output = a.need("output", "the folder to write vocab.txt to");
  RunSettings settings_of_run;
  settings_of_run.overwrite = a.take_switch("overwrite");
  VocabTrainer::Options options;
  options.size = parse_number<int64_t>(a.need("size", "the number of pieces, for example 8000")).value_or(0);
  if (options.size < 10 || options.size > 10000000) a.fail("--size: a whole number from 10 to 10000000 is wanted");
  options.min_count = a.take_int("min-count", 2, 1, INT32_MAX);
  options.alphabet = a.take_int("alphabet", 0, 0, INT32_MAX);
  TokenizerSettings settings;
  settings.lowercase = !a.take_switch("cased");
  const int64_t max_memory = a.take_size("max-memory", int64_t(2) << 30);
  a.done();

  OutputFolder folder(output, settings_of_run);
  VocabTrainer trainer(settings, max_memory);
  Rows rows(source);
  Progress progress(common.quiet);
  for (Row row; rows.next(row);) {
    trainer.add_text(row.text);
    if (rows.count() % 4096 == 0) progress.show(grouped(rows.count()) + " lines, " + grouped(trainer.words()) + " words");
  }
  rows.report();
  if (!trainer.words()) throw Error(join(source.files, ", ") + ": no words; give files of text");
  options.on_progress = [&](int64_t pieces) { progress.show(grouped(pieces) + " of " + grouped(options.size) + " pieces"); };
  const Strings pieces = trainer.train(options);
  write_file(output + "/tokenizer_config.json", tokenizer_config_json(settings, 512));
  write_file(output + "/vocab.txt", join(pieces, "\n") + "\n");
  common.note(output + "/vocab.txt: " + grouped((int64_t)pieces.size()) + " pieces from " + grouped(trainer.words()) + " words, " +
              grouped(trainer.distinct_words()) + " of them different");
  if ((int64_t)pieces.size() < options.size)
    common.note("bert: fewer pieces than --size " + to_string(options.size) + ": nothing else occurs --min-count " +
                to_string(options.min_count) + " times");
  return 0;
}

// What `tokenize` was asked for.
struct TokenizeOptions {
  EncodeOptions encode;
  enum { pieces, ids, jsonl };
  int to = pieces;
  bool chars = false, words = false, windows = false, skip_special = false, cleanup = true;
};
struct TokenizeCounts {
  int64_t texts = 0, tokens = 0, words = 0, unknown = 0, longest = 0;
};

// Offsets counted in code points; they mostly ascend, so each is counted on from the one before.
void offsets_in_chars(Encoding& e, const Row& row, bool split_words) {
  const std::string* text = nullptr;
  int64_t byte = 0, chars = 0;
  auto begins = [](char c) { return (c & 0xC0) != 0x80; };
  for (size_t i = 0; i < e.ids.size(); i++) {
    if (e.special[i]) continue;
    const std::string* its = split_words     ? &(e.sequence[i] ? row.pair_words : row.words)[e.words[i]]
                             : e.sequence[i] ? &*row.pair
                                             : &row.text;
    if (its != text) text = its, byte = chars = 0;
    for (int64_t& at : e.offsets[i]) {
      while (byte < at) chars += begins((*text)[byte++]);
      while (byte > at) chars -= begins((*text)[--byte]);
      at = chars;
    }
  }
}

std::string encoding_json(const WordPiece& t, const Encoding& e) {
  return "{\"tokens\":" + json_list(e.ids, [&](size_t i) { return json_quote(t.piece(e.ids[i])); }) +
         ",\"ids\":" + json_list(e.ids, [&](size_t i) { return to_string(e.ids[i]); }) +
         ",\"type_ids\":" + json_list(e.ids, [&](size_t i) { return to_string(e.type_ids[i]); }) +
         ",\"special\":" + json_list(e.ids, [&](size_t i) { return to_string(e.special[i]); }) + ",\"offsets\":" +
         json_list(e.ids, [&](size_t i) { return "[" + to_string(e.offsets[i][0]) + "," + to_string(e.offsets[i][1]) + "]"; }) +
         ",\"words\":" + json_list(e.ids, [&](size_t i) { return e.words[i] < 0 ? std::string("null") : to_string(e.words[i]); }) + "}";
}

void count(const WordPiece& t, const Encoding& e, TokenizeCounts& counts) {
  int32_t word = -1, sequence = 0;
  counts.tokens += (int64_t)e.ids.size(), counts.longest = std::max(counts.longest, (int64_t)e.ids.size());
  for (size_t i = 0; i < e.ids.size(); i++) {
    counts.unknown += e.ids[i] == t.unk && !e.special[i];
    if (e.special[i] || (e.words[i] == word && e.sequence[i] == sequence)) continue;
    counts.words++, word = e.words[i], sequence = e.sequence[i];
  }
}

// The lines of one text's encodings.
std::string tokenized(const WordPiece& t, const Row& row, const TokenizeOptions& o, TokenizeCounts& counts) {
  std::vector<Encoding> windows;
  std::optional<std::string_view> pair;
  if (row.pair) pair = *row.pair;
  try {
    if (o.words)
      windows = t.encode_words_windows(row.words, row.pair_words, row.pair.has_value(), o.encode);
    else
      windows = t.encode_windows(row.text, pair, o.encode);
    if (!o.windows) windows.resize(1);
  } catch (const Error& e) { throw Error(row.where + ": " + e.what()); }
  std::string out;
  counts.texts++;
  for (Encoding& e : windows) {
    count(t, e, counts);
    if (o.chars) offsets_in_chars(e, row, o.words);
    if (o.to == TokenizeOptions::jsonl)
      out += encoding_json(t, e);
    else
      for (size_t i = 0; i < e.ids.size(); i++) {
        if (i) out += ' ';
        o.to == TokenizeOptions::ids ? out += to_string(e.ids[i]) : out += t.piece(e.ids[i]);
      }
    out += '\n';
  }
  return out;
}

WordPiece take_tokenizer(Args& a, const Common& common) {
  const std::string vocab = a.need("vocab", "a model folder or a vocab.txt");
  const bool cased = a.take_switch("cased");
  const std::string strip = a.take("strip-accents", "");
  if (!strip.empty() && strip != "auto" && strip != "yes" && strip != "no")
    a.fail("--strip-accents " + strip + ": auto, yes or no is wanted");
  const auto chinese = a.take_yes_no("chinese"), clean = a.take_yes_no("clean");
  WordPiece t = WordPiece::load(vocab);
  show_warnings(t, common);
  if (!cased && strip.empty() && !chinese && !clean) return t;
  TokenizerSettings s = t.settings();
  if (cased) s.lowercase = false;
  if (!strip.empty()) s.strip_accents = strip == "auto" ? std::nullopt : std::optional<bool>(strip == "yes");
  s.chinese = chinese.value_or(s.chinese), s.clean_text = clean.value_or(s.clean_text);
  return t.with_settings(s);
}

TokenizeOptions take_tokenize(Args& a) {
  TokenizeOptions o;
  o.to = a.take_choice("to", {"pieces", "ids", "jsonl"});
  o.encode.max_length = a.take_int("max-length", 0, 1, INT32_MAX);
  o.encode.truncation = (Truncation)a.take_choice("truncation", {"longest_first", "only_first", "only_second"});
  o.encode.from_left = a.take_choice("side", {"right", "left"});
  o.encode.stride = a.take_int("stride", 0, 0, INT32_MAX);
  o.windows = a.given("stride");
  o.encode.add_special = !a.take_switch("no-special");
  o.encode.parse_special = !a.take_switch("plain-special");
  o.words = a.take_switch("split-words");
  o.chars = a.take_choice("offsets", {"bytes", "chars"});
  if (o.encode.stride && !o.encode.max_length) a.fail("--stride needs --max-length");
  if (o.encode.add_special && o.encode.max_length && o.encode.max_length < 3)
    a.fail("--max-length " + to_string(o.encode.max_length) + ": no room beside [CLS] and [SEP]; at least 3, or --no-special");
  return o;
}

// Ids to text.
void decode_rows(const WordPiece& t, Source source, const TokenizeOptions& o, Results& out) {
  source.format = kIds;
  Rows rows(source);
  for (Row row; rows.next(row);) {
    for (const int32_t id : row.ids)
      if (id >= t.size())
        throw Error(row.where + ": token id " + to_string(id) + ", but the vocabulary has ids 0 to " + to_string(t.size() - 1));
    out.line(t.decode(row.ids, o.skip_special, o.cleanup));
  }
  rows.report();
}

int cmd_tokenize(Args& a) {
  Common common(a);
  Source source = take_source(a, common, "input");
  Results out(a);
  TokenizeOptions o = take_tokenize(a);
  source.word_lists = o.words, source.keep_bytes = true;
  const bool decode = a.take_switch("decode"), stats = a.take_switch("stats");
  if (decode) o.skip_special = a.take_switch("skip-special"), o.cleanup = a.take_yes_no("cleanup").value_or(true);
  Args later = a;  // the tokenizer is loaded when every option is known to be right
  a.need("vocab", "a model folder or a vocab.txt");
  for (const char* name : {"strip-accents", "chinese", "clean"}) a.take(name);
  a.take_switch("cased");
  a.done();
  const WordPiece t = take_tokenizer(later, common);
  if (decode) {
    decode_rows(t, source, o, out);
    out.finish();
    return 0;
  }
  TokenizeCounts total;
  Rows rows(source);
  std::vector<Row> chunk;
  while (read_chunk(rows, chunk, 4096)) {
    constexpr int64_t kPiece = 32;
    const size_t pieces = (chunk.size() + kPiece - 1) / kPiece;
    Strings lines(pieces);
    std::vector<TokenizeCounts> counts(pieces);
    parallel_ranges((int64_t)chunk.size(), kPiece, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) lines[(size_t)(i / kPiece)] += tokenized(t, chunk[i], o, counts[(size_t)(i / kPiece)]);
    });
    for (size_t i = 0; i < pieces; i++) {
      if (!stats) out.write(lines[i]);
      total.texts += counts[i].texts, total.tokens += counts[i].tokens, total.words += counts[i].words;
      total.unknown += counts[i].unknown, total.longest = std::max(total.longest, counts[i].longest);
    }
    if (rows.from_terminal()) out.flush();
  }
  rows.report();
  if (stats) {
    const Named lines = {{"texts", to_string(total.texts)},
                         {"words", to_string(total.words)},
                         {"tokens", to_string(total.tokens)},
                         {"tokens_per_text", format_number((double)total.tokens / (double)std::max<int64_t>(1, total.texts))},
                         {"unknown", to_string(total.unknown)},
                         {"longest", to_string(total.longest)}};
    for (const auto& [name, value] : lines) out.line(name + "\t" + value);
  }
  out.finish();
  return 0;
}

// ==== 10 pretrain =================================================================================================
// The options that both kinds of training share.
TrainSettings take_training(Args& a, const Common& common, double lr) {
  TrainSettings t;
  t.accumulate = a.take_int("accumulate", 1, 1, 1 << 20);
  if (t.accumulate & (t.accumulate - 1)) a.fail("--accumulate " + to_string(t.accumulate) + ": a power of two is wanted");
  t.lr = a.take_number("lr", lr, 0, 10);
  t.warmup = a.take_number("warmup", 0.1, 0, 1);
  t.schedule = (Schedule)a.take_choice("schedule", {"linear", "cosine", "constant"});
  t.optimizer.google = a.take_choice("optimizer", {"adamw", "google"});
  if (t.optimizer.google) t.optimizer.eps = 1e-6f;
  t.optimizer.weight_decay = (float)a.take_number("weight-decay", 0.01, 0, 10);
  t.clip = a.take_number("clip", 1.0, 0, 1e9);
  t.dropout = (float)a.take_number("dropout", -1, 0, 0.99);
  t.seed = common.seed;
  return t;
}

// Takes a share of the text out as held-out text: stretches of up to 50 sentences of one document, at least some eight in all, chosen by
// the seed, each a document there. At most 100,000 tokens, so that an evaluation stays cheap however large the text is.
Corpus take_dev(Corpus& text, double share, uint64_t seed) {
  const int64_t want = std::min<int64_t>(100000, (int64_t)((double)text.ids.size() * share));
  const int64_t stretch = std::clamp<int64_t>((int64_t)((double)text.sentences.size() * share / 8), 2, 50);
  std::vector<int64_t> cuts;  // first sentences of the stretches, and the end
  for (size_t d = 0; d + 1 < text.documents.size(); d++)
    for (int64_t s = text.documents[d]; s < text.documents[d + 1]; s += stretch) cuts.push_back(s);
  std::vector<int64_t> order(cuts.size());
  for (size_t i = 0; i < cuts.size(); i++) order[i] = (int64_t)i;
  cuts.push_back((int64_t)text.sentences.size() - 1);
  Random({seed, 0, 0, kSplitStream}).shuffle(order);
  std::vector<uint8_t> held(order.size(), 0);
  int64_t got = 0;
  for (size_t i = 0; i + 1 < order.size() && (got < want || i < 2); i++) {
    const size_t k = (size_t)order[i];
    held[k] = 1, got += text.sentences[(size_t)cuts[k + 1]] - text.sentences[(size_t)cuts[k]];
  }
  Corpus dev, rest;
  size_t document = 1;
  for (size_t k = 0; k < held.size(); k++) {
    Corpus& to = held[k] ? dev : rest;
    for (int64_t s = cuts[k]; s < cuts[k + 1]; s++) {
      to.ids.insert(to.ids.end(), text.ids.begin() + text.sentences[s], text.ids.begin() + text.sentences[(size_t)s + 1]);
      to.end_sentence();
    }
    if (held[k]) dev.end_document();
    if (cuts[k + 1] == text.documents[document]) rest.end_document(), document++;
  }
  text = std::move(rest);
  return dev;
}

struct PretrainOptions {
  Source input;
  std::string vocab, config, init, output, dump;
  std::optional<Source> dev;
  double dev_split = 0, minutes = 0;
  PretrainSettings data;
  TrainSettings train;
  RunSettings run;
  bool dry_run = false;
};

PretrainOptions take_pretrain(Args& a, const Common& common) {
  PretrainOptions o;
  o.input = take_source(a, common, "input");
  o.init = a.take("init", "");
  o.vocab = a.take("vocab", o.init);
  o.config = a.take("config", "");
  if (o.vocab.empty()) a.fail("--vocab is missing: a folder that bert vocab wrote, or a model's");
  if (o.config.empty() && o.init.empty()) a.fail("--config is missing: tiny, mini, small, medium, base or a config.json");
  if (!o.config.empty() && !o.init.empty()) a.fail("--config and --init exclude each other");
  o.output = a.need("output", "the folder to write the model to");
  o.train = take_training(a, common, 1e-4);
  o.train.steps = a.take_int("steps", 0, 1, INT32_MAX);
  o.minutes = a.take_number("minutes", 0, 0.01, 1e6);
  if ((o.train.steps > 0) == (o.minutes > 0)) a.fail("--steps or --minutes is wanted, one of them");
  o.data.batch_tokens = a.take_int("batch-tokens", 8192, 16, 1 << 30);
  o.data.max_length = a.take_int("max-length", 0, 8, 1 << 20);
  o.data.mask = a.take_number("mask", 0.15, 0.001, 0.9);
  o.data.whole_word = a.take_switch("whole-word");
  o.data.next_sentence = !a.take_switch("no-nsp");
  if (const auto dev = a.take("dev")) o.dev = o.input, o.dev->files = {*dev};
  o.dev_split = a.take_number("dev-split", 0.01, 0, 0.5);
  if (a.given("dev") && a.given("dev-split")) a.fail("--dev and --dev-split exclude each other");
  o.dump = a.take("dump-batches", "");
  o.run = take_run(a, common);
  o.run.save_every = a.take_int("save-every", 0, 1, INT32_MAX);
  o.run.keep = a.take_int("keep", 2, 1, 100);
  o.dry_run = a.take_switch("dry-run");
  return o;
}

// What masking needs to know of a vocabulary.
struct MaskingIds {
  SpecialIds special;
  std::vector<uint8_t> continues;
  MaskingIds(const WordPiece& t, int64_t vocab_size) : special{t.cls, t.sep, t.mask}, continues((size_t)vocab_size, 0) {
    for (int32_t id = 0; id < (int32_t)t.size(); id++) continues[id] = t.continuation(id);
  }
};

// Everything that a pretraining run needs, made from its options.
struct Pretraining {
  PretrainOptions o;
  WordPiece tokenizer;
  Config config;
  Corpus text, dev;
  std::vector<int64_t> unigrams;

  Bert model() const {
    const Task task = o.data.next_sentence ? Task::pretrain : Task::mlm;
    return o.init.empty() ? Bert::random(config, task, o.train.seed) : load_folder_for(o.init, task, {}, o.train.seed).bert;
  }
  PretrainSampler sampler() const {
    const MaskingIds ids(tokenizer, config.vocab_size);
    return PretrainSampler(text, o.data, ids.special, config.vocab_size, ids.continues, o.train.seed);
  }
  Numbers scores(const Bert& bert) const {
    const MaskingIds ids(tokenizer, config.vocab_size);
    const PretrainScores s = evaluate_pretraining(bert, dev, o.data, ids.special, ids.continues, o.train.seed, unigrams);
    Numbers list = {{"mlm_loss", s.masked_loss}, {"unigram_loss", s.unigram_loss}, {"mlm_accuracy", s.masked_accuracy}};
    if (o.data.next_sentence) list.insert(list.end(), {{"nsp_loss", s.next_loss}, {"nsp_accuracy", s.next_accuracy}});
    return list;
  }
  std::string fingerprint() const {
    Fingerprint f;
    for (const Corpus* c : {&text, &dev}) f.add(c->ids), f.add(c->sentences), f.add(c->documents);
    return f.text();
  }
};

// A vocabulary that can be pretrained with, and a shape that fits it.
void check_fit(const Pretraining& p) {
  const WordPiece& t = p.tokenizer;
  if (t.cls < 0 || t.sep < 0 || t.mask < 0)
    throw Error(p.o.vocab + ": [CLS], [SEP] or [MASK] is missing in the vocabulary; pretraining needs them");
  if (p.config.vocab_size < t.size())
    throw Error(p.o.vocab + ": " + to_string(t.size()) + " pieces, but the model has room for " + to_string(p.config.vocab_size) +
                "; give the model's own vocabulary, or a config.json with vocab_size " + to_string(t.size()));
}

std::string corpus_size(const Corpus& c) {
  return grouped((int64_t)c.ids.size()) + " tokens, " + grouped((int64_t)c.sentences.size() - 1) + " sentences, " +
         grouped((int64_t)c.documents.size() - 1) + " documents";
}

Pretraining prepare_pretraining(PretrainOptions options, const Common& common) {
  Pretraining p{std::move(options), {}, {}, {}, {}, {}};
  const PretrainOptions& o = p.o;
  p.tokenizer = WordPiece::load(o.vocab);
  show_warnings(p.tokenizer, common);
  if (!o.init.empty()) check_model_folder(o.init);
  const std::string file = o.init.empty() ? o.config : o.init + "/config.json";
  p.config = fs::exists(file) || file.ends_with(".json") ? Config::parse(read_file(file), file) : Config::named(file, p.tokenizer.size());
  check_fit(p);
  p.o.data.max_length = length_limit(o.data.max_length, p.config);
  const double began = now();
  p.text = read_corpus(o.input, p.tokenizer);
  if (o.dev)
    p.dev = read_corpus(*o.dev, p.tokenizer);
  else if (o.dev_split > 0)
    p.dev = take_dev(p.text, o.dev_split, o.train.seed);
  if (o.data.next_sentence && p.dev.documents.size() == 2)
    throw Error((o.dev ? o.dev->files[0] : "--dev-split") +
                ": next-sentence pairs need at least two held-out documents (a blank line between them), there is one; or pass --no-nsp");
  p.unigrams = unigram_counts(p.text, p.config.vocab_size);
  common.note("text: " + corpus_size(p.text) + "; held out: " + corpus_size(p.dev) + "; read in " + duration(now() - began));
  return p;
}

std::vector<Batch> step_batches(const Pretraining& p, PretrainSampler& sampler, int64_t step) {
  std::vector<Batch> micro;
  for (int64_t i = 0; i < p.o.train.accumulate; i++) micro.push_back(sampler.next(step, i));
  return micro;
}

// The number of steps that fit into the minutes, from the time of the first ones, made on a model of their own.
int64_t steps_in_minutes(const Pretraining& p) {
  const double began = now(), seconds = p.o.minutes * 60;
  TrainSettings settings = p.o.train;
  settings.steps = 1000;
  Trainer trainer(p.model(), settings);
  PretrainSampler sampler = p.sampler();
  std::vector<double> took;
  while (took.size() < 4 || (now() - began < std::min(20.0, seconds * 0.03) && took.size() < 100)) {
    const double t = now();
    trainer.step(step_batches(p, sampler, trainer.done()));
    took.push_back(now() - t);
  }
  took.erase(took.begin());  // the first one also takes its memory from the system
  return std::max<int64_t>(1, (int64_t)((seconds - (now() - began)) * 0.95 / median(took)));  // 5 %: evaluations and saves
}

std::string batch_json(const Batch& b, int64_t step, size_t micro) {
  auto list = [](const auto& v) { return json_list(v, [&](size_t i) { return to_string(v[i]); }); };
  return "{\"step\":" + to_string(step) + ",\"micro\":" + to_string(micro) + ",\"ids\":" + list(b.ids) +
         ",\"segments\":" + list(b.segments) + ",\"offsets\":" + list(b.offsets) + ",\"masked\":" + list(b.masked) +
         ",\"masked_labels\":" + list(b.masked_labels) + ",\"labels\":" + list(b.labels) + "}\n";
}

void dry_run(const Pretraining& p) {
  const int64_t parameters = p.model().parameter_count(), gradients = 1 + std::bit_width((uint64_t)p.o.train.accumulate) - 1;
  print_numbers({{"parameters", (double)parameters},
                 {"tokens", (double)p.text.ids.size()},
                 {"tokens_dev", (double)p.dev.ids.size()},
                 {"pieces", (double)p.tokenizer.size()},
                 {"steps", (double)p.o.train.steps},
                 {"gradients", (double)gradients},
                 {"state_MiB", (double)(parameters * 4 * (3 + gradients)) / (1 << 20)}});
}

// The steps from where the trainer stands to the end; the exit status.
int pretrain_steps(const Pretraining& p, Trainer& trainer, PretrainSampler& sampler, Run& run) {
  const int64_t steps = trainer.settings().steps;
  // Evaluations: as many as cost some 5 % of the training (forward alone is a third of a step), between 1 and 20.
  const double trained = (double)steps * (double)(p.o.data.batch_tokens * p.o.train.accumulate);
  const int64_t evaluations = std::clamp<int64_t>((int64_t)(0.15 * trained / std::max<double>(1, (double)p.dev.ids.size())), 1, 20);
  const int64_t evaluate_every = std::max<int64_t>(1, steps / evaluations);
  std::ofstream dump;
  if (!p.o.dump.empty()) dump.open(p.o.dump, trainer.done() ? std::ios::app : std::ios::trunc);
  Numbers last;  // evaluation
  while (trainer.done() < steps && !stop_signal) {
    const std::vector<Batch> micro = step_batches(p, sampler, trainer.done());
    for (size_t i = 0; i < micro.size() && !p.o.dump.empty(); i++)
      if (!(dump << batch_json(micro[i], trainer.done(), i) << std::flush)) throw Error(p.o.dump + ": cannot write");
    run.after_step(trainer.step(micro));
    const int64_t done = trainer.done();
    if (!p.dev.ids.empty() && (done % evaluate_every == 0 || done == steps)) last = p.scores(trainer.model()), run.evaluated(done, last);
    if (done < steps && run.save_due(done)) run.save(trainer);
  }
  if (trainer.done() < steps) return run.stopped(trainer);
  if (last.empty() && !p.dev.ids.empty()) last = p.scores(trainer.model());  // the run was complete already
  for (const auto& [name, value] : last)
    run.results.emplace_back((name.starts_with("mlm_") ? name.substr(4) : name) + "_dev", value);  // as evaluate names them
  return 0;
}

int cmd_pretrain(Args& a) {
  Common common(a);
  PretrainOptions options = take_pretrain(a, common);
  a.done();
  const Pretraining p = prepare_pretraining(std::move(options), common);
  const PretrainOptions& o = p.o;
  if (o.dry_run) return dry_run(p), 0;
  PretrainSampler sampler = p.sampler();  // here, so that text that does not do is refused before anything is written
  OutputFolder folder(o.output, o.run);
  Run run(o.output, "Pretraining " + (o.config.empty() ? o.init : o.config), o.run);
  catch_signals();
  TrainSettings settings = o.train;
  if (!settings.steps && !(o.run.resume && run.states.any())) settings.steps = steps_in_minutes(p);
  Trainer trainer(p.model(), settings);
  const auto stored = run.take_up(trainer, a.taken(), p.fingerprint());
  if (!stored.empty()) sampler.go_to({stored_number(stored, "epoch"), stored_number(stored, "batch")});
  run.place = [&]() -> std::map<std::string, std::string> {
    return {{"epoch", to_string(sampler.place().epoch)}, {"batch", to_string(sampler.place().batch)}};
  };
  const auto carried = tokenizer_files(o.vocab, p.tokenizer, p.config.max_position_embeddings);
  run.save_model = [&] { save_folder(o.output, trainer.model(), carried); };
  run.data = {{"training text", corpus_size(p.text)},
              {"held-out text", corpus_size(p.dev)},
              {"vocabulary", grouped(p.tokenizer.size()) + " pieces"},
              {"model", model_size(trainer.model())}};
  const int status = run.guarded(trainer, [&] { return pretrain_steps(p, trainer, sampler, run); });
  print_numbers(run.results);
  if (!status) common.note(o.output + ": the model; curves in " + o.output + "/report.html");
  return status;
}

// ==== 11 finetune =================================================================================================
// The peak of this process's memory, in MiB; 0 where the system does not say.
double peak_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return (double)std::strtoll(line.c_str() + 6, nullptr, 10) / 1024;
  return 0;
}

// The names of the labels: those of a model, or for training data those that occur.
struct Labels {
  Task task = Task::classify;
  Strings names;
  bool open = false;  // a new name is added
  std::map<std::string, int32_t> ids;

  void set(const Strings& list) {
    names = list, ids.clear();
    for (size_t i = 0; i < list.size(); i++) ids.emplace(list[i], (int32_t)i);
  }
  int32_t id(const std::string& name) {
    if (const auto at = ids.find(name); at != ids.end()) return at->second;
    if (!open) throw BadLine("label '" + name + "', which training never saw (it knows " + some() + "); correct it");
    names.push_back(name);
    return ids[name] = (int32_t)names.size() - 1;
  }
  std::string some() const {
    Strings first(names.begin(), names.begin() + (int64_t)std::min<size_t>(names.size(), 8));
    return join(first, ", ") + (names.size() > 8 ? ", …" : "");
  }
};

struct LabelledSet {
  std::vector<Example> examples;
  std::vector<std::vector<int32_t>> chosen;  // label numbers of each example
  int64_t cut = 0;                           // texts longer than the limit
};

// The answer of a row: label numbers, or a number.
std::vector<int32_t> answer_of(const Row& row, Labels& labels, Example& example) {
  if (!row.labelled) throw BadLine("no label");
  if (labels.task == Task::regress) {
    const auto value = row.listed ? std::nullopt : parse_number<float>(row.answers[0]);
    if (!value || !std::isfinite(*value)) throw BadLine("'" + join(row.answers, "|") + "' is no number, which --task regress wants");
    example.targets = {*value};
    return {};
  }
  std::vector<int32_t> chosen;
  const Strings answers = labels.task == Task::multilabel && !row.listed ? split(row.answers[0], '|') : row.answers;
  for (const std::string& answer : answers)
    if (!answer.empty()) chosen.push_back(labels.id(answer));
  if (labels.task == Task::classify && chosen.size() != 1)
    throw BadLine(chosen.empty() ? "an empty label" : "several labels; for these there is --task multilabel");
  return chosen;
}

LabelledSet read_labelled(Source source, const WordPiece& tokenizer, Labels& labels, int64_t max_length) {
  source.labels = true;
  LabelledSet set;
  Rows rows(source);
  std::vector<Row> chunk;
  std::vector<uint8_t> cut;
  while (read_chunk(rows, chunk, 4096)) {
    std::vector<Example> examples = encode_rows(tokenizer, chunk, max_length, false, cut);
    for (size_t i = 0; i < chunk.size(); i++) try {
        set.chosen.push_back(answer_of(chunk[i], labels, examples[i]));
        set.examples.push_back(std::move(examples[i]));
        set.cut += cut[i];
      } catch (const BadLine& e) { rows.bad(chunk[i].where, e.what()); }
  }
  rows.report();
  if (set.examples.empty()) throw Error(join(source.files, ", ") + ": no labelled text; give a file with some");
  return set;
}

// Fills in what the losses and metrics read from the label numbers.
void finish_labels(LabelledSet& set, const Labels& labels, const std::vector<int32_t>& renumbered = {}) {
  for (size_t i = 0; i < set.examples.size(); i++) {
    Example& example = set.examples[i];
    if (labels.task == Task::multilabel) example.targets.assign(labels.names.size(), 0);
    for (int32_t id : set.chosen[i]) {
      if (!renumbered.empty()) id = renumbered[id];
      labels.task == Task::multilabel ? (void)(example.targets[id] = 1) : (void)(example.label = id);
    }
  }
}

// Labels in an order that does not depend on the order of the file: numbers by value, names by their bytes; or as the model has them.
std::vector<int32_t> order_labels(Labels& labels, const Strings& of_model) {
  Strings ordered = labels.names;
  const bool numbers =
      std::all_of(ordered.begin(), ordered.end(), [](const std::string& s) { return parse_number<int64_t>(s).has_value(); });
  std::sort(ordered.begin(), ordered.end(), [&](const std::string& x, const std::string& y) {
    return numbers && *parse_number<int64_t>(x) != *parse_number<int64_t>(y) ? *parse_number<int64_t>(x) < *parse_number<int64_t>(y)
                                                                             : x < y;
  });
  if (std::set<std::string>(of_model.begin(), of_model.end()) == std::set<std::string>(ordered.begin(), ordered.end())) ordered = of_model;
  const Strings seen = labels.names;
  labels.set(ordered);
  std::vector<int32_t> renumbered;
  for (const std::string& name : seen) renumbered.push_back(labels.ids.at(name));
  return renumbered;
}

struct FinetuneOptions {
  Task task = Task::classify;
  std::string model, output, tsv;
  Source train;
  std::optional<Source> dev, test;
  double dev_split = 0, epochs = 3;
  int64_t batch = 32, max_length = 0, patience = 0, seeds = 1;
  TrainSettings settings;
  RunSettings run;
  bool from_scratch = false;
};

Task take_task(Args& a) {
  const std::string name = a.need("task", "classify, multilabel or regress");
  for (const char* later : {"tag", "qa", "choice", "similarity"})
    if (name == later) throw Error("--task " + name + ": not built yet: " + name);
  for (const Task task : {Task::classify, Task::multilabel, Task::regress})
    if (name == head_kind(task).name) return task;
  a.fail("--task " + name + ": classify, multilabel or regress is wanted");
}

FinetuneOptions take_finetune(Args& a, const Common& common) {
  FinetuneOptions o;
  o.task = take_task(a);
  o.model = a.need("model", "the folder of the model to start from");
  o.train = take_source(a, common, "train");
  if (o.train.files.empty()) a.fail("--train is missing: a file of labelled texts");
  if (const auto dev = a.take("dev")) o.dev = o.train, o.dev->files = {*dev};
  if (const auto test = a.take("test")) o.test = o.train, o.test->files = {*test};
  o.dev_split = a.take_number("dev-split", 0.1, 0, 0.9);
  if (a.given("dev") && a.given("dev-split")) a.fail("--dev and --dev-split exclude each other");
  o.output = a.need("output", "the folder to write the model to");
  o.epochs = a.take_number("epochs", 3, 0.01, 10000);
  o.batch = a.take_int("batch", 32, 1, 1 << 20);
  o.settings = take_training(a, common, 2e-5);
  o.max_length = a.take_int("max-length", 0, 4, 1 << 20);
  o.patience = a.take_int("patience", 0, 1, 10000);
  o.seeds = a.take_int("seeds", 1, 1, 1000);
  o.tsv = a.take("tsv", "");
  o.from_scratch = a.take_switch("from-scratch");
  o.run = take_run(a, common);
  if (o.run.resume && o.seeds > 1) a.fail("--resume and --seeds exclude each other");
  return o;
}

// Data of a fine-tuning run as ids, the same for every seed but for the split.
struct FinetuneData {
  WordPiece tokenizer;
  Labels labels;
  LabelledSet train, dev, test;
  std::string fingerprint;
  int64_t max_length = 0;
};

void split_dev(FinetuneData& data, double share, uint64_t seed) {
  const int64_t n = (int64_t)data.train.examples.size(),
                take = std::min(n - 1, std::max<int64_t>(1, (int64_t)std::llround((double)n * share)));
  if (n < 2) throw Error("--dev-split: one labelled text cannot be split; give more, or --dev-split 0");
  std::vector<int64_t> order((size_t)n);
  for (int64_t i = 0; i < n; i++) order[i] = i;
  Random random({seed, 0, 0, kSplitStream});
  random.shuffle(order);
  std::vector<uint8_t> held((size_t)n, 0);
  for (int64_t i = 0; i < take; i++) held[(size_t)order[i]] = 1;
  LabelledSet rest;
  for (int64_t i = 0; i < n; i++) {
    LabelledSet& to = held[i] ? data.dev : rest;
    to.examples.push_back(std::move(data.train.examples[i]));
    to.chosen.push_back(std::move(data.train.chosen[i]));
  }
  rest.cut = data.train.cut;
  data.train = std::move(rest);
}

FinetuneData read_finetune_data(const FinetuneOptions& o, const Common& common) {
  FinetuneData d;
  check_model_folder(o.model, !o.from_scratch);
  const Config config = Config::parse(read_file(o.model + "/config.json"), o.model + "/config.json");
  const int64_t limit = d.max_length = length_limit(o.max_length, config);
  d.tokenizer = WordPiece::load(o.model);
  show_warnings(d.tokenizer, common);
  d.labels.task = o.task, d.labels.open = true;
  d.train = read_labelled(o.train, d.tokenizer, d.labels, limit);
  d.labels.open = false;
  if (o.task == Task::regress)
    d.labels.set({"LABEL_0"});
  else if (d.labels.names.size() < (o.task == Task::classify ? 2u : 1u))
    throw Error(join(o.train.files, ", ") + ": only one label (" + d.labels.some() + "); there is nothing to tell apart");
  const std::vector<int32_t> renumbered = o.task == Task::regress ? std::vector<int32_t>{} : order_labels(d.labels, config.labels);
  finish_labels(d.train, d.labels, renumbered);
  for (auto& list : d.train.chosen)
    for (int32_t& id : list) id = renumbered[id];
  if (o.dev) d.dev = read_labelled(*o.dev, d.tokenizer, d.labels, limit), finish_labels(d.dev, d.labels);
  if (o.test) d.test = read_labelled(*o.test, d.tokenizer, d.labels, limit), finish_labels(d.test, d.labels);
  Fingerprint f;
  for (const LabelledSet* set : {&d.train, &d.dev})
    for (const Example& e : set->examples)
      f.add(e.ids), f.add(e.segments), f.add(std::vector<int64_t>{e.label}),
          f.add(std::string_view((const char*)e.targets.data(), e.targets.size() * sizeof(float)));
  for (const std::string& name : d.labels.names) f.add(name);
  d.fingerprint = f.text();
  return d;
}

std::string label_shares(const LabelledSet& set, const Labels& labels) {
  std::vector<int64_t> counts(labels.names.size(), 0);
  for (const auto& list : set.chosen)
    for (const int32_t id : list) counts[id]++;
  Strings out;
  for (size_t i = 0; i < counts.size() && i < 12; i++)
    out.push_back(labels.names[i] + " " + fixed(100.0 * (double)counts[i] / (double)set.examples.size(), 1) + " %");
  return join(out, ", ") + (counts.size() > 12 ? ", …" : "");
}

Named finetune_data(const FinetuneData& d, const Bert& bert) {
  Named rows = {{"training texts", grouped((int64_t)d.train.examples.size())}, {"held-out texts", grouped((int64_t)d.dev.examples.size())}};
  if (!d.test.examples.empty()) rows.emplace_back("test texts", grouped((int64_t)d.test.examples.size()));
  if (d.labels.task != Task::regress) rows.emplace_back("labels", label_shares(d.train, d.labels));
  if (d.train.cut) rows.emplace_back("texts cut to --max-length", grouped(d.train.cut));
  rows.emplace_back("model", model_size(bert));
  return rows;
}

// The model to start from, and what travels with it.
ModelFolder finetune_start(const FinetuneOptions& o, const FinetuneData& d, uint64_t seed) {
  if (!o.from_scratch) return load_folder_for(o.model, o.task, d.labels.names, seed);
  ModelFolder folder;
  folder.config = Config::parse(read_file(o.model + "/config.json"), o.model + "/config.json");
  folder.config.labels = d.labels.names;
  folder.config.architecture = head_kind(o.task).architecture, folder.config.problem_type = head_kind(o.task).problem_type;
  folder.bert = Bert::random(folder.config, o.task, seed);
  folder.carried = tokenizer_files(o.model, d.tokenizer, folder.config.max_position_embeddings);
  return folder;
}

constexpr int64_t kEvaluationTokens = 8192;  // of a batch of held-out rows

std::vector<Metric> scored(const Bert& bert, const LabelledSet& set, uint64_t seed) {
  const std::vector<float> outputs = head_outputs(bert, set.examples, kEvaluationTokens);
  return score_outputs(bert.task, outputs, set.examples, (int64_t)outputs.size() / (int64_t)set.examples.size(), seed);
}

Numbers metric_list(const std::vector<Metric>& metrics, const std::string& ending = "") {
  Numbers list;
  for (const Metric& m : metrics) list.emplace_back(m.name + ending, m.value);
  return list;
}

// Where fine-tuning stands beside the trainer: the best evaluation, whose model is the one in the folder.
struct BestOnDev {
  double value = -1e300;
  int64_t since = 0;   // evaluations since it
  bool ended = false;  // by patience
  About about() const { return {{"best", exact(value)}, {"since_best", to_string(since)}, {"ended", to_string(ended)}}; }
  static BestOnDev from(const About& a) {
    return a.empty()
               ? BestOnDev()
               : BestOnDev{parse_number<double>(a.at("best")).value_or(0), stored_number(a, "since_best"), stored_number(a, "ended") != 0};
  }
};

// The steps from where the trainer stands; the exit status.
int finetune_steps(const FinetuneOptions& o, const FinetuneData& d, Trainer& trainer, Run& run, BestOnDev& best,
                   const std::map<std::string, std::string>& carried) {
  const int64_t n = (int64_t)d.train.examples.size(), per_step = o.batch * o.settings.accumulate, per_epoch = (n + per_step - 1) / per_step;
  const int64_t steps = trainer.settings().steps;
  const uint64_t seed = trainer.settings().seed;
  int64_t ordered = -1;
  std::vector<int64_t> order;
  while (trainer.done() < steps && !best.ended && !stop_signal) {
    const int64_t epoch = trainer.done() / per_epoch, first = trainer.done() % per_epoch * per_step;
    if (epoch != ordered) order = epoch_order(n, seed, epoch), ordered = epoch;
    std::vector<Batch> micro;
    for (int64_t at = first; at < std::min(n, first + per_step); at += o.batch)
      micro.push_back(make_batch(d.train.examples, std::span(order).subspan((size_t)at, (size_t)std::min(o.batch, n - at))));
    run.after_step(trainer.step(micro));
    const int64_t done = trainer.done();
    if (done % per_epoch && done < steps) continue;
    if (!d.dev.examples.empty()) {
      const std::vector<Metric> metrics = scored(trainer.model(), d.dev, seed);
      run.evaluated(done, metric_list(metrics));
      if (metrics[0].value > best.value)
        best.value = metrics[0].value, best.since = 0;
      else
        best.ended = ++best.since == o.patience;
      if (!o.run.quiet)
        say("epoch " + to_string(epoch + 1) + ": " + metrics[0].name + " " + fixed(metrics[0].value, 4) + " on dev" +
            (best.since ? "" : ", the best so far"));
    }
    // The model first: a state that says "best" has it beside it.
    if (!best.since) save_folder(run.folder(), trainer.model(), carried);
    if (done < steps) run.save(trainer);
  }
  return trainer.done() < steps && !best.ended ? run.stopped(trainer) : 0;
}

// One run with one seed into one folder: its metrics, and the exit status.
std::pair<Numbers, int> finetune_once(const FinetuneOptions& o, const FinetuneData& d, uint64_t seed, const std::string& output,
                                      const Named& taken) {
  OutputFolder folder(output, o.run);
  Run run(output, "Fine-tuning " + o.model + " to " + task_name(o.task), o.run);
  ModelFolder start = finetune_start(o, d, seed);
  const int64_t n = (int64_t)d.train.examples.size(), per_step = o.batch * o.settings.accumulate;
  TrainSettings settings = o.settings;
  settings.seed = seed;
  settings.steps = std::max<int64_t>(1, (int64_t)std::ceil(o.epochs * (double)((n + per_step - 1) / per_step)));
  Trainer trainer(std::move(start.bert), settings);
  BestOnDev best = BestOnDev::from(run.take_up(trainer, taken, d.fingerprint));
  run.place = [&] { return best.about(); };
  run.data = finetune_data(d, trainer.model());
  const int status = run.guarded(trainer, [&] {
    if (const int stopped = finetune_steps(o, d, trainer, run, best, start.carried)) return stopped;
    const ModelFolder saved = load_folder(output);  // the best one, as everybody else will read it
    if (!d.dev.examples.empty()) run.results = metric_list(scored(saved.bert, d.dev, seed), "_dev");
    if (!d.test.examples.empty())
      for (const auto& m : metric_list(scored(saved.bert, d.test, seed), "_test")) run.results.push_back(m);
    return 0;
  });
  return {run.results, status};
}

int cmd_finetune(Args& a) {
  Common common(a);
  const double began = now();
  const FinetuneOptions o = take_finetune(a, common);
  a.done();
  FinetuneData read = read_finetune_data(o, common);
  catch_signals();
  std::vector<std::pair<std::string, std::vector<double>>> results;
  for (int64_t i = 0; i < o.seeds; i++) {
    FinetuneData data = read;
    const uint64_t seed = o.settings.seed + (uint64_t)i;
    if (!o.dev && o.dev_split > 0) split_dev(data, o.dev_split, seed);
    if (!i) {
      common.note(grouped((int64_t)data.train.examples.size()) + " texts to train on, " + grouped((int64_t)data.dev.examples.size()) +
                  " held out" + (o.task == Task::regress ? "" : "; " + label_shares(data.train, data.labels)) +
                  (data.train.cut ? "; " + grouped(data.train.cut) + " cut to " + to_string(data.max_length) + " tokens" : ""));
    }
    const auto [metrics, status] = finetune_once(o, data, seed, o.seeds > 1 ? o.output + "/seed-" + to_string(seed) : o.output, a.taken());
    if (status) return status;
    for (const auto& [name, value] : metrics) {
      size_t at = 0;
      while (at < results.size() && results[at].first != name) at++;
      if (at == results.size()) results.push_back({name, {}});
      results[at].second.push_back(value);
    }
  }
  auto row = [&](const std::string& name, double value) {
    std::printf("%s%s\t%s\n", o.tsv.empty() ? "" : ("finetune\tours-f32\t" + o.tsv + "\t").c_str(), name.c_str(),
                format_number(value).c_str());
  };
  for (const auto& [name, values] : results) {
    double mean = 0, square = 0;
    for (const double v : values) mean += v / (double)values.size();
    for (const double v : values) square += (v - mean) * (v - mean);
    row(name, mean);
    if (values.size() > 1) row(name + "_std", std::sqrt(square / (double)(values.size() - 1)));
  }
  if (!o.tsv.empty()) row("s", now() - began), row("MiB", peak_mib());
  common.note(o.output + ": the model" + (o.seeds > 1 ? "s, one a seed" : "; curves in " + o.output + "/report.html"));
  return 0;
}

// ==== 12 evaluate, predict, fill-mask, embed ======================================================================
int64_t take_batch_tokens(Args& a) { return a.take_int("batch-tokens", 8192, 1, 1 << 30); }

void write_metrics(Results& out, const std::vector<Metric>& metrics) {
  for (const Metric& m : metrics) {
    out.line(m.name + "\t" + format_number(m.value));
    if (m.low == m.high && m.low == 0) continue;
    out.line(m.name + "_low\t" + format_number(m.low));
    out.line(m.name + "_high\t" + format_number(m.high));
  }
}

void evaluate_text(const ModelFolder& folder, const Source& source, uint64_t seed, Results& out) {
  const WordPiece& t = folder.tokenizer;
  const Corpus text = read_corpus(source, t);
  const MaskingIds ids(t, folder.config.vocab_size);
  PretrainSettings settings;
  settings.max_length = std::min(length_limit(0, folder.config), folder.max_length);
  settings.next_sentence = folder.bert.task == Task::pretrain;
  const PretrainScores s = evaluate_pretraining(folder.bert, text, settings, ids.special, ids.continues, seed, {});
  Named lines = {{"loss", format_number(s.masked_loss)},
                 {"perplexity", format_number(std::exp(s.masked_loss))},
                 {"accuracy", format_number(s.masked_accuracy)}};
  if (settings.next_sentence)
    lines.insert(lines.end(), {{"nsp_loss", format_number(s.next_loss)}, {"nsp_accuracy", format_number(s.next_accuracy)}});
  lines.emplace_back("masked", to_string(s.masked));
  for (const auto& [name, value] : lines) out.line(name + "\t" + value);
}

int cmd_evaluate(Args& a) {
  Common common(a);
  const std::string model = a.need("model", "a model's folder");
  const Source source = take_source(a, common, "input");
  const int64_t batch_tokens = take_batch_tokens(a);
  Results out(a);
  a.done();
  const ModelFolder folder = open_model(model, common);
  const HeadKind& head = head_kind(folder.bert.task);
  if (head.masked_words) {
    evaluate_text(folder, source, common.seed, out);
  } else if (head.classifier) {
    Labels labels;
    labels.task = folder.bert.task;
    labels.set(folder.config.labels);
    LabelledSet set = read_labelled(source, folder.tokenizer, labels, folder.max_length);
    finish_labels(set, labels);
    if (set.cut)
      common.note("bert: " + grouped(set.cut) + " texts were longer than " + to_string(folder.max_length) + " tokens and were cut");
    const std::vector<float> outputs = head_outputs(folder.bert, set.examples, batch_tokens);
    write_metrics(
        out, score_outputs(folder.bert.task, outputs, set.examples, (int64_t)outputs.size() / (int64_t)set.examples.size(), common.seed));
  } else {
    wrong_model(model, folder.bert.task, "classify, multilabel, regress or masked words");
  }
  out.finish();
  return 0;
}

// Runs `answer(rows, examples)` over the input, a chunk at a time, and says how many texts were cut.
template <class F>
void each_chunk(Rows& rows, const ModelFolder& folder, int64_t limit, bool parse_special, bool refuse_long, const Common& common,
                F&& answer) {
  std::vector<Row> chunk;
  std::vector<uint8_t> cut;
  int64_t were_cut = 0;
  while (read_chunk(rows, chunk, 2048)) {
    for (const Row& row : chunk) check_ids(row, folder.config);
    const std::vector<Example> examples = encode_rows(folder.tokenizer, chunk, limit, parse_special, cut);
    for (size_t i = 0; i < chunk.size(); i++) {
      were_cut += cut[i] && chunk[i].ids.empty();
      if (cut[i] && refuse_long)
        throw Error(chunk[i].where + ": longer than the model's " + to_string(limit) +
                    " tokens; shorten it, or cut it with --long truncate");
    }
    answer(chunk, examples);
  }
  rows.report();
  if (were_cut)
    common.note("bert: " + grouped(were_cut) + " of " + grouped(rows.count()) + " texts were longer than " + to_string(limit) +
                " tokens and were cut");
}

// Whether a text that is too long is an error.
bool take_refuse_long(Args& a, const Strings& ways) {
  const std::string how = ways[(size_t)a.take_choice("long", ways)];
  if (how == "window") throw Error("--long window: not built yet; truncate and error are");
  return how == "error";
}

// What `predict` prints of one row: raw outputs, or what the task's answer is.
struct Prediction {
  Task task;
  const Strings& labels;
  bool json, logits;
  int64_t top;

  std::string number(float v) const { return format_number(v); }
  std::string line(std::span<const float> raw, std::span<const float> p) const {
    if (logits) {
      std::string out;
      for (size_t i = 0; i < raw.size(); i++) out += (i ? "\t" : "") + number(raw[i]);
      return out;
    }
    if (task == Task::regress) return json ? "{\"score\":" + number(p[0]) + "}" : number(p[0]);
    std::vector<size_t> order(p.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return p[x] > p[y]; });
    return task == Task::multilabel ? several(p, order) : one(p, order);
  }
  std::string one(std::span<const float> p, const std::vector<size_t>& order) const {
    if (json)
      return "{\"label\":" + json_quote(labels[order[0]]) + ",\"score\":" + number(p[order[0]]) + ",\"scores\":" + scores(p, order) + "}";
    std::string out;
    for (size_t k = 0; k < std::min(order.size(), (size_t)top); k++) out += (k ? "\t" : "") + labels[order[k]] + "\t" + number(p[order[k]]);
    return out;
  }
  std::string several(std::span<const float> p, const std::vector<size_t>& order) const {
    Strings names, values, quoted;
    for (const size_t i : order)
      if (p[i] >= 0.5f) names.push_back(labels[i]), values.push_back(number(p[i])), quoted.push_back(json_quote(labels[i]));
    return json ? "{\"labels\":[" + join(quoted, ",") + "],\"scores\":" + scores(p, order) + "}"
                : join(names, "|") + "\t" + join(values, "|");
  }
  std::string scores(std::span<const float> p, const std::vector<size_t>& order) const {
    Numbers list;
    for (const size_t i : order) list.emplace_back(labels[i], p[i]);
    return json_object(list);
  }
};

int cmd_predict(Args& a) {
  Common common(a);
  const std::string model = a.need("model", "the folder of a task model, as bert finetune writes it");
  Rows rows(take_source(a, common, "input"));
  const int64_t batch_tokens = take_batch_tokens(a), top = a.take_int("top", 1, 1, 1 << 20);
  const bool json = a.take_switch("jsonl"), logits = a.take_switch("logits");
  if (json && logits) a.fail("--jsonl and --logits exclude each other");
  const bool refuse_long = take_refuse_long(a, {"error", "truncate", "window"});
  Results out(a);
  a.done();
  const ModelFolder folder = open_model(model, common);
  const HeadKind& head = head_kind(folder.bert.task);
  if (!head.classifier && !head.next_sentence)
    wrong_model(model, folder.bert.task, "classify, multilabel, regress or next sentences; make one with bert finetune");
  const Strings labels = head.classifier ? folder.config.labels : Strings{"follows", "random"};
  const Prediction prediction{folder.bert.task, labels, json, logits, top};
  each_chunk(rows, folder, folder.max_length, false, refuse_long, common,
             [&](const std::vector<Row>& chunk, const std::vector<Example>& examples) {
               for (const Row& row : chunk)
                 if (!head.classifier && !row.pair && row.ids.empty())
                   throw Error(row.where + ": one text, but a model for next sentences wants two, joined by a TAB");
               const std::vector<float> raw = head_outputs(folder.bert, examples, batch_tokens);
               const size_t classes = raw.size() / chunk.size();
               const std::vector<float> p = probabilities(folder.bert.task, raw, (int64_t)classes);
               for (size_t i = 0; i < chunk.size(); i++)
                 out.line(prediction.line(std::span(raw).subspan(i * classes, classes), std::span(p).subspan(i * classes, classes)));
               if (rows.from_terminal()) out.flush();
             });
  out.finish();
  return 0;
}

int cmd_fill_mask(Args& a) {
  Common common(a);
  const std::string model = a.need("model", "the folder of a masked-word model");
  Rows rows(take_source(a, common, "input"));
  const int64_t batch_tokens = take_batch_tokens(a), top = a.take_int("top", 5, 1, 1 << 20);
  const bool score = a.take_switch("score");
  Results out(a);
  a.done();
  const ModelFolder folder = open_model(model, common);
  if (!head_kind(folder.bert.task).masked_words) wrong_model(model, folder.bert.task, "masked words");
  each_chunk(rows, folder, folder.max_length, true, true, common, [&](const std::vector<Row>& chunk, const std::vector<Example>& examples) {
    if (score) {
      const std::vector<TextScore> scores = score_texts(folder, examples, batch_tokens);
      for (size_t i = 0; i < chunk.size(); i++)
        out.line(to_string(chunk[i].number) + "\t" + format_number(scores[i].log_likelihood) + "\t" + to_string(scores[i].tokens));
      return;
    }
    for (size_t i = 0; i < chunk.size(); i++)
      if (std::find(examples[i].ids.begin(), examples[i].ids.end(), folder.tokenizer.mask) == examples[i].ids.end())
        throw Error(chunk[i].where + ": no " + std::string(folder.tokenizer.piece(folder.tokenizer.mask)) +
                    " in this text; write it where a word is to be guessed");
    const auto guesses = guess_masks(folder, examples, top, batch_tokens);
    for (size_t i = 0; i < chunk.size(); i++) {
      int64_t rank = 0, mask = -1;
      for (const MaskGuess& g : guesses[i]) {
        rank = g.mask == mask ? rank + 1 : 1, mask = g.mask;
        out.line(to_string(chunk[i].number) + "\t" + to_string(mask + 1) + "\t" + to_string(rank) + "\t" + g.token + "\t" +
                 format_number(g.probability));
      }
    }
    if (rows.from_terminal()) out.flush();
  });
  out.finish();
  return 0;
}

struct EmbedOptions {
  Pooling pooling;
  int64_t batch_tokens = 8192, layer = -1;
  bool tokens = false, json = false;
};

// The output of one layer, 0 being the embeddings; negative: the last.
Tensor layer_output(const Bert& bert, const Batch& batch, int64_t layer) {
  if (layer < 0) return bert.forward(batch);
  Tensor wanted;
  Dropout none;
  bert.forward(batch, none, [&](int64_t i, const Tensor& x) {
    if (i == layer) wanted = x;
  });
  return wanted;
}

std::string numbers(const float* v, int64_t n, bool json) {
  std::string out = json ? "[" : "";
  char text[40];
  for (int64_t i = 0; i < n; i++) {
    if (i) out += json ? ',' : '\t';
    out.append(text, std::to_chars(text, text + sizeof text, (double)v[i], std::chars_format::general, 9).ptr);
  }
  return json ? out + "]" : out;
}

// The lines of a chunk's texts, in their order.
Strings embed_chunk(const ModelFolder& folder, const EmbedOptions& o, const std::vector<Row>& chunk, const std::vector<Example>& examples,
                    std::string* raw) {
  std::vector<int64_t> lengths;
  for (const Example& e : examples) lengths.push_back((int64_t)e.ids.size());
  Strings lines(chunk.size());
  std::vector<float> vectors(raw ? chunk.size() * (size_t)folder.config.hidden_size : 0);
  for (const std::vector<int64_t>& which : batches_by_tokens(lengths, o.batch_tokens)) {
    const Batch batch = make_batch(examples, which);
    const Tensor hidden = layer_output(folder.bert, batch, o.layer);
    const int64_t H = hidden.cols();
    const Tensor pooled = o.tokens ? Tensor() : pool_rows(folder.bert, hidden, batch, o.pooling);
    parallel_for((int64_t)which.size(), [&](int64_t k) {
      const size_t row = (size_t)which[k];
      if (raw) return void(std::copy_n(pooled.data() + k * H, H, vectors.begin() + (int64_t)row * H));
      if (!o.tokens) return void(lines[row] = numbers(pooled.data() + k * H, H, o.json) + "\n");
      for (int64_t t = batch.offsets[k]; t < batch.offsets[(size_t)k + 1]; t++) {
        const std::string piece(folder.tokenizer.piece(batch.ids[t])), line = to_string(chunk[row].number),
                                                                       v = numbers(hidden.data() + t * H, H, o.json);
        lines[row] += o.json ? "{\"line\":" + line + ",\"token\":" + json_quote(piece) + ",\"vector\":" + v + "}\n"
                             : line + "\t" + piece + "\t" + v + "\n";
      }
    });
  }
  if (raw) raw->append((const char*)vectors.data(), vectors.size() * sizeof(float));
  return lines;
}

// NumPy's file format 1.0: a header of a multiple of 64 bytes, then the numbers.
std::string npy_header(int64_t rows, int64_t columns) {
  std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + to_string(rows) + ", " + to_string(columns) + "), }";
  text.resize((text.size() + 1 + 10 + 63) / 64 * 64 - 11, ' ');
  text += '\n';
  return std::string("\x93NUMPY\x01\x00", 8) + (char)(text.size() & 255) + (char)(text.size() >> 8) + text;
}

// The text that a sentence-transformers folder names so, to go in front of every text.
std::string prompt(const std::string& model, const std::string& name) {
  const std::string path = model + "/config_sentence_transformers.json";
  if (!fs::exists(path)) throw Error(path + ": missing, so the model has no prompts; leave --prompt out");
  const Json json = Json::parse(read_file(path), path);
  const Json* prompts = json.find("prompts");
  const Json* found = prompts ? prompts->find(name) : nullptr;
  if (found) return found->as_string(path + ": prompts");
  Strings names;
  if (prompts)
    for (const auto& member : prompts->members()) names.push_back(member.first);
  throw Error(path + ": no prompt '" + name + "'; there " + (names.empty() ? "is none" : "are " + join(names, ", ")));
}

int cmd_embed(Args& a) {
  Common common(a);
  const std::string model = a.need("model", "a model's folder");
  Rows rows(take_source(a, common, "input"));
  EmbedOptions o;
  o.batch_tokens = take_batch_tokens(a);
  const int to = a.take_choice("to", {"tsv", "jsonl", "npy"});
  const bool npy = to == 2;
  o.json = to == 1;
  const auto normalize = a.take_yes_no("normalize");
  o.tokens = a.take_switch("tokens");
  o.layer = a.take_int("layer", -1, 0, 1000);
  const int64_t max_length = a.take_int("max-length", 0, 3, 1 << 30);
  const std::string prompt_name = a.take("prompt", "");
  const bool refuse_long = take_refuse_long(a, {"truncate", "error", "window"});
  Results out(a);
  if (o.tokens && npy) a.fail("--tokens and --to npy exclude each other");
  const int pooling = a.take_choice("pooling", {"the folder's", "mean", "cls", "max", "pooler"});
  if (o.tokens && (pooling || normalize)) a.fail("--tokens gives each token's own vector; --pooling and --normalize do not go with it");
  a.done();

  const ModelFolder folder = open_model(model, common);
  o.pooling = folder.pooling;
  if (pooling) o.pooling.kind = (Pooling::Kind)(pooling - 1);
  o.pooling.normalize = normalize.value_or(o.pooling.normalize);
  if (o.pooling.kind == Pooling::pooler && !folder.bert.pooler.weight)
    throw Error(model + ": no pooler in this model; --pooling mean, cls or max");
  if (o.layer > folder.config.num_hidden_layers)
    throw Error("--layer " + to_string(o.layer) + ": the model has " + to_string(folder.config.num_hidden_layers));
  length_limit(max_length, folder.config);
  const std::string in_front = prompt_name.empty() ? "" : prompt(model, prompt_name);
  rows.set_prompt(in_front);
  std::string raw;  // npy's header holds the number of rows: the vectors wait for it
  each_chunk(rows, folder, max_length ? max_length : folder.max_length, false, refuse_long, common,
             [&](const std::vector<Row>& chunk, const std::vector<Example>& examples) {
               for (const std::string& line : embed_chunk(folder, o, chunk, examples, npy ? &raw : nullptr)) out.write(line);
               if (rows.from_terminal()) out.flush();
             });
  if (npy) out.write(npy_header(rows.count(), folder.config.hidden_size)), out.write(raw);
  out.finish();
  return 0;
}

// ==== 13 info =====================================================================================================
void info_machine(Named& lines) {
  Strings all;
  for (const Kernels* k : usable_kernels()) all.push_back(k->name);
  lines.insert(lines.end(), {{"version", kVersion},
                             {"processor", cpu_name()},
                             {"threads", to_string(threads())},
                             {"kernels", kernels().name},
                             {"kernels_usable", join(all, " ")},
                             {"backend", backend_description()},
                             {"devices", "cpu"}});
}

void info_model(const std::string& path, const ModelFolder& f, Named& lines) {
  const Config& c = f.config;
  const char* const pooling[] = {"mean", "cls", "max", "pooler"};
  lines.insert(lines.end(), {{"model", path},
                             {"task", task_name(f.bert.task)},
                             {"architecture", c.architecture},
                             {"parameters", to_string(f.bert.parameter_count())},
                             {"layers", to_string(c.num_hidden_layers)},
                             {"hidden_size", to_string(c.hidden_size)},
                             {"heads", to_string(c.num_attention_heads)},
                             {"intermediate_size", to_string(c.intermediate_size)},
                             {"vocab_size", to_string(c.vocab_size)},
                             {"pieces", to_string(f.tokenizer.size())},
                             {"lowercase", f.tokenizer.settings().lowercase ? "yes" : "no"},
                             {"max_length", to_string(f.max_length)},
                             {"max_position_embeddings", to_string(c.max_position_embeddings)},
                             {"labels", join(c.labels, "|")},
                             {"pooling", pooling[f.pooling.kind]},
                             {"normalize", f.pooling.normalize ? "yes" : "no"}});
  const std::pair<const char*, const Strings*> lists[] = {{"loaded", &f.report.loaded},
                                                          {"tied", &f.report.tied},
                                                          {"newly_initialised", &f.report.newly_initialised},
                                                          {"ignored", &f.report.ignored},
                                                          {"unexpected", &f.report.unexpected}};
  for (const auto& [name, list] : lists) {
    lines.emplace_back(std::string("tensors_") + name, to_string(list->size()));
    if (name != lists[0].first && !list->empty()) lines.emplace_back(name, join(*list, " "));
  }
}

int cmd_info(Args& a) {
  Common common(a);
  const std::string model = a.take("model", "");
  const bool json = a.take_switch("json");
  Results out(a);
  a.done();
  Named lines;
  if (model.empty()) info_machine(lines);
  if (!model.empty()) {
    check_model_folder(model);
    const ModelFolder folder = load_folder(model, false);
    show_warnings(folder.tokenizer, common);
    info_model(model, folder, lines);
  }
  std::string object;
  for (const auto& [name, value] : lines) {
    if (!json)
      out.line(name + "\t" + value);
    else
      object += (object.empty() ? "{" : ",") + json_quote(name) + ":" + (parse_number<int64_t>(value) ? value : json_quote(value));
  }
  if (json) out.line(object + "}");
  out.finish();
  return 0;
}

// ==== 14 bench ====================================================================================================
// Median seconds of a call, after one that warms up, over at least `seconds` and three calls.
template <class F>
double median_seconds(double seconds, F&& call) {
  call();
  std::vector<double> took;
  const double began = now();
  while (took.size() < 3 || now() - began < seconds) {
    const double t = now();
    call();
    took.push_back(now() - t);
  }
  return median(took);
}

// Rows `what engine config metric value`: as TSV, or aligned for people.
struct BenchTable {
  std::string what;
  bool tsv;
  void row(const std::string& engine, const std::string& config, const std::string& metric, double value) const {
    if (tsv)
      std::printf("%s\t%s\t%s\t%s\t%s\n", what.c_str(), engine.c_str(), config.c_str(), metric.c_str(), format_number(value).c_str());
    else
      std::printf("%-9s %-14s %-24s %12s %s\n", what.c_str(), engine.c_str(), config.c_str(), fixed(value, value < 10 ? 3 : 1).c_str(),
                  metric.c_str());
    std::fflush(stdout);
  }
};

// y [m,n] = x [m,k] w [n,k]^T by one engine: its GFLOP/s.
struct Product {
  int64_t m, n, k;
  Tensor x, w, y;
  PackedWeights packed;

  Product(int64_t m, int64_t n, int64_t k) : m(m), n(n), k(k), x({m, k}, 0.5f), w({n, k}, 0.25f), y({m, n}, 0.f), packed(w.data(), n, k) {}
  double gflops(double seconds) const { return 2e-9 * (double)m * (double)n * (double)k / seconds; }
  double with_packed() const {
    return gflops(median_seconds(0.04, [&] { gemm(m, x.data(), k, packed, y.data(), n, Epilogue{}); }));
  }
  double with(Backend backend) const {
    Gemm how;
    how.b_transposed = true, how.backend = backend;
    return gflops(median_seconds(0.04, [&] { gemm(how, m, n, k, x.data(), k, w.data(), k, y.data(), n); }));
  }
};

void bench_gemm(const BenchTable& table, int most_threads) {
  const std::pair<int64_t, int64_t> layers[] = {{128, 128}, {512, 128},  {128, 512},  {256, 256}, {1024, 256}, {256, 1024},
                                                {384, 384}, {1536, 384}, {384, 1536}, {768, 768}, {3072, 768}, {768, 3072}};
  for (const int t : most_threads > 1 ? std::vector<int>{1, most_threads} : std::vector<int>{1}) {
    const UseThreads use(t);
    double peak = 0;
    for (const auto& [n, k] : layers)
      for (const int64_t m : {32, 512, 4096}) {
        const Product p(m, n, k);
        const std::string config = "M" + to_string(m) + "-N" + to_string(n) + "-K" + to_string(k) + "-t" + to_string(t);
        auto row = [&](const char* engine, double v) { table.row(engine, config, "GFLOP/s", v), peak = std::max(peak, v); };
        row("ours-f32", p.with_packed());
        row("ours-unpacked-f32", p.with(Backend::own));
        if (has_openblas()) row("openblas-f32", p.with(Backend::openblas));
      }
    table.row("peak", "best-of-these-t" + to_string(t), "GFLOP/s", peak);
  }
}

// The best product of this machine, now: what a model's GFLOP/s is held against.
double gemm_peak() {
  double best = 0;
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{768, 768}, {3072, 768}, {1536, 384}}) {
    const Product p(1024, n, k);
    best = std::max({best, p.with_packed(), has_openblas() ? p.with(Backend::openblas) : 0});
  }
  return best;
}

// minilm-B8T128, or with -dense or -real behind it.
struct BenchShape {
  std::string name, kind;
  int64_t rows = 0, tokens = 0;
};
BenchShape parse_shape(Args& a, const std::string& config) {
  BenchShape s;
  const size_t b = config.find("-B"), t = config.find('T', b == config.npos ? b : b + 2), kind = config.find('-', t);
  if (b != config.npos && t != config.npos) {
    s.name = config.substr(0, b);
    s.rows = parse_number<int64_t>(config.substr(b + 2, t - b - 2)).value_or(0);
    s.tokens = parse_number<int64_t>(config.substr(t + 1, kind == config.npos ? kind : kind - t - 1)).value_or(0);
    s.kind = kind == config.npos ? "" : config.substr(kind + 1);
  }
  if (s.rows < 1 || s.tokens < 8 || s.tokens > 512 || (!s.kind.empty() && s.kind != "dense" && s.kind != "real"))
    a.fail("'" + config + "': MODEL-BrowsTtokens is wanted, as in minilm-B8T128, or for train mini-B32T128-dense or -real");
  return s;
}

constexpr int64_t kBenchVocab = 30522;

Batch random_batch(const BenchShape& s, Random& random) {
  Batch batch;
  for (int64_t r = 0; r < s.rows; r++) {
    std::vector<int32_t> ids, segments;
    for (int64_t t = 0; t < s.tokens; t++) ids.push_back((int32_t)(1000 + random.below(29000))), segments.push_back(t >= s.tokens / 2);
    batch.add_row(ids, segments);
  }
  return batch;
}

// Two a multiply-add: the six products of a layer, and attention's two.
double forward_flops(const Config& c, const BenchShape& s) {
  const double h = (double)c.hidden_size, f = (double)c.intermediate_size;
  return (double)(s.rows * s.tokens * c.num_hidden_layers) * (2 * (4 * h * h + 2 * h * f) + 4 * (double)s.tokens * h);
}

void bench_infer(const BenchTable& table, const BenchShape& s, const std::string& config, uint64_t seed) {
  Bert bert = Bert::random(Config::named(s.name, kBenchVocab), Task::embed, seed);
  bert.pack();
  Random random({seed, 0, 0, kOrderStream});
  const Batch batch = random_batch(s, random);
  const double seconds = median_seconds(1.0, [&] { bert.forward(batch); }), gflops = forward_flops(bert.config, s) / seconds / 1e9;
  table.row("ours-f32", config, "ms", seconds * 1e3);
  table.row("ours-f32", config, "tok/s", (double)batch.tokens() / seconds);
  table.row("ours-f32", config, "GFLOP/s", gflops);
  table.row("ours-f32", config, "MiB", peak_mib());
  if (table.tsv) return;
  const double peak = gemm_peak();
  table.row("peak", "gemm, best of three", "GFLOP/s", peak);
  table.row("ours-f32", config, "% of that", 100 * gflops / peak);
}

// Real pairs, a TAB b, as rows of one batch a step.
std::vector<Batch> real_batches(const BenchShape& s, const Source& source, const WordPiece& t) {
  std::vector<Batch> batches;
  Rows rows(source);
  std::vector<Row> chunk;
  std::vector<uint8_t> cut;
  while (read_chunk(rows, chunk, (size_t)s.rows)) {
    const std::vector<Example> examples = encode_rows(t, chunk, s.tokens, false, cut);
    batches.emplace_back();
    for (const Example& e : examples) batches.back().add_row(e.ids, e.segments);
  }
  if (batches.empty()) throw Error("bench train: no texts in --input");
  return batches;
}

void bench_train(const BenchTable& table, const BenchShape& s, const std::string& config, const Source& source, const std::string& vocab,
                 uint64_t seed) {
  const bool real = s.kind == "real";
  if (real && (vocab.empty() || source.files.empty()))
    throw Usage("bench train " + config + ": --input with pairs, and --vocab or --model are wanted");
  SpecialIds special{101, 102, 103};
  Random random({seed, 0, 0, kOrderStream});
  std::vector<Batch> batches;
  if (real) {
    const WordPiece t = WordPiece::load(vocab);
    special = {t.cls, t.sep, t.mask};
    batches = real_batches(s, source, t);
  } else {
    batches = {random_batch(s, random)};
  }
  for (Batch& b : batches) {
    for (int64_t r = 0; r < b.rows(); r++) b.labels.push_back((int32_t)random.below(2));
    mask_tokens(b, special, kBenchVocab, 0.15, nullptr, {seed, 0, 0, kMaskStream});
  }
  TrainSettings settings;
  settings.steps = 1000000, settings.warmup = 0, settings.seed = seed;
  Trainer trainer(Bert::random(Config::named(s.name, kBenchVocab), Task::pretrain, seed), settings);
  int64_t tokens = 0;
  for (const Batch& b : batches) tokens += b.tokens();
  const double seconds = median_seconds(2.0, [&] {
    for (const Batch& b : batches) trainer.step({&b, 1});
  });
  table.row("ours-f32", config, "tok/s", (double)tokens / seconds);
  table.row("ours-f32", config, "ms", seconds / (double)batches.size() * 1e3);
  table.row("ours-f32", config, "MiB", peak_mib());
  if (table.tsv) return;
  // Backward is twice the forward's products.
  BenchShape mean = s;
  mean.rows = 1, mean.tokens = tokens / std::max<int64_t>(1, (int64_t)batches.size());
  const double gflops = 3 * forward_flops(trainer.model().config, real ? mean : s) * (real ? (double)batches.size() : 1) / seconds / 1e9,
               peak = gemm_peak();
  table.row("peak", "gemm, best of three", "GFLOP/s", peak);
  table.row("ours-f32", config, "% of that, the layers alone", 100 * gflops / peak);
}

int cmd_bench(Args& a) {
  a.empty_is_absent = true;
  const std::string part = a.take_word().value_or(""), config = a.take_word().value_or("");
  Common common(a);
  const std::string model = a.take("model", ""), vocab = a.take("vocab", model);
  Source source;
  source.files = a.take_all("input");
  source.quiet = true;
  const BenchTable table{part, a.take_switch("tsv")};
  a.done();
  for (const char* later : {"attention", "sentences", "tokenize", "vocab"})
    if (part == later) throw Error("bench " + part + ": not built yet");
  if (part == "gemm") return bench_gemm(table, threads()), 0;
  if (part == "infer") return bench_infer(table, parse_shape(a, config), config, common.seed), 0;
  if (part == "train") return bench_train(table, parse_shape(a, config), config, source, vocab, common.seed), 0;
  a.fail("'" + part + "': gemm, infer or train is wanted");
}

// ==== 15 the table of commands, main ==============================================================================
struct Command {
  const char *name, *what, *usage;
  int (*run)(Args&);
};

const char* const kCommonHelp = R"(
common options
  --threads N      threads (default: the cores this process may use); results do not depend on it
  --seed N         of everything random (default 1)
  --quiet          no progress, no remarks
  --device cpu, --dtype f32          the only ones yet
)";
const char* const kInputHelp = R"(
reading
  FILE…            several are read one after another; - is standard input
  --format F       lines, tsv, csv, jsonl, fasttext, ids (default: by the file's ending, else lines)
  --columns text=A,pair=B,label=C    names, or numbers from 0; default: by well-known names
  --no-header      tsv and csv without a header line
  --skip-bad       pass over lines that cannot be used, and count them
)";

const Command kCommands[] = {
    // in the order of the help
    {"vocab", "train a WordPiece vocabulary from text", R"(bert vocab --input FILE… --size N --output DIR
  --cased          keep upper case
  --min-count N    a piece must occur so often (default 2)
  --alphabet N     at most so many characters (default: all seen min-count times, at most half of --size)
  --overwrite      write into a folder that holds files
)",
     cmd_vocab},
    {"tokenize", "text to word pieces or ids, or back", R"(bert tokenize --vocab DIR-or-FILE [--input FILE…] [--output FILE]
  --to pieces|ids|jsonl
  --max-length N [--truncation longest_first|only_first|only_second] [--side right|left] [--stride N]
  --no-special     without [CLS] and [SEP]        --plain-special   [MASK] in the text is plain text
  --split-words    the text is a list of words    --offsets bytes|chars
  --cased  --strip-accents auto|yes|no  --chinese yes|no  --clean yes|no    other settings than the folder's
  --decode         ids in, text out: [--skip-special] [--cleanup yes|no]
  --stats          only counts
)",
     cmd_tokenize},
    {"pretrain", "train a BERT from raw text", R"(bert pretrain --input FILE… --vocab DIR --config NAME --output DIR --steps N
  --config         tiny, mini, small, medium, base, or a config.json        --init DIR   go on from a model instead
  --steps N        or --minutes M: as many steps as fit
  --batch-tokens N tokens of a batch (default 8192)      --accumulate N     batches a step, a power of two (default 1)
  --max-length N   tokens of a row (default 128)
  --lr X           peak rate (default 1e-4)              --warmup X         share of the steps (default 0.1)
  --schedule linear|cosine|constant                      --optimizer adamw|google
  --weight-decay X (default 0.01)                        --clip X           global norm (default 1; 0: none)
  --dropout P      default: the config's                 --mask X           share of tokens (default 0.15)
  --whole-word     mask whole words                      --no-nsp           no next-sentence task
  --dev FILE       held-out text, or --dev-split X of the input (default 0.01; at most 100,000 tokens)
  --save-every N   steps (default: every five minutes)   --keep N           training states kept (default 2)
  --resume         go on with the run in --output        --overwrite        write into a folder that holds files
  --dump-batches FILE   every batch as jsonl             --dry-run          say sizes and memory, train nothing
)",
     cmd_pretrain},
    {"finetune", "train a model for a task on labelled texts", R"(bert finetune --task TASK --model DIR --train FILE --output DIR
  --task           classify, multilabel or regress
  --dev FILE       or --dev-split X of the training data (default 0.1)      --test FILE
  --epochs X       (default 3)                           --batch N          texts of a batch (default 32)
  --accumulate N   batches a step, a power of two        --max-length N     (default 128)
  --lr X           (default 2e-5)                        --warmup X         (default 0.1)
  --schedule linear|cosine|constant                      --optimizer adamw|google
  --weight-decay X --clip X --dropout P                  --patience N       stop after N epochs without a better one
  --from-scratch   random weights: --model gives config.json and the vocabulary
  --seeds N        so many runs, mean and deviation      --tsv TASK         the metrics as rows of the bench scripts
  --resume         go on with the run in --output        --overwrite        write into a folder that holds files
)",
     cmd_finetune},
    {"evaluate", "score a model on labelled texts, or on plain text", R"(bert evaluate --model DIR --input FILE
  --batch-tokens N (default 8192)
  a task model wants labelled data; a masked-word model wants plain text, masked from --seed
)",
     cmd_evaluate},
    {"predict", "a task model's answers", R"(bert predict --model DIR [--input FILE…] [--output FILE]
  --jsonl          the full record                       --logits           the raw outputs of the head
  --top K          the K best labels                     --long error|truncate
  --batch-tokens N (default 8192)
)",
     cmd_predict},
    {"fill-mask", "guess the words that [MASK] hides", R"(bert fill-mask --model DIR [--input FILE…] [--output FILE]
  --top K          guesses for each (default 5)          --score            log-likelihood of whole texts instead
  --batch-tokens N (default 8192)
)",
     cmd_fill_mask},
    {"embed", "one vector a text", R"(bert embed --model DIR [--input FILE…] [--output FILE]
  --pooling mean|cls|max|pooler    --normalize yes|no    other than the folder's
  --tokens         one line a token                      --layer N          the output of layer N (0: the embeddings)
  --max-length N   --long truncate|error                 --prompt NAME      a prompt of the folder in front
  --to tsv|jsonl|npy                                     --batch-tokens N   (default 8192)
)",
     cmd_embed},
    {"info", "what a model folder holds, or what this machine has", R"(bert info [--model DIR] [--json] [--output FILE]
)",
     cmd_info},
    {"bench", "how fast, beside this machine's own multiply",
     R"(bert bench gemm | infer CONFIG | train CONFIG
  CONFIG           minilm-B8T128; for train mini-B32T128-dense or -real
  --model DIR --vocab FILE --input FILE       what a part needs; others are taken and not used
  --tsv            rows: what engine config metric value
)",
     cmd_bench},
};

bool reads_input(const std::string& name) { return name != "info" && name != "bench"; }

void help(std::FILE* to) {
  std::fprintf(to, "bert %s: trains and runs BERT models, from raw text to answers\n\n", kVersion);
  for (const Command& c : kCommands) std::fprintf(to, "  bert %-10s %s\n", c.name, c.what);
  std::fprintf(to, "\n  bert help COMMAND    its options\n  bert --version\n");
}

const Command& find_command(const std::string& name) {
  Strings names;
  for (const Command& c : kCommands) {
    if (name == c.name) return c;
    names.push_back(c.name);
  }
  for (const char* later : {"search", "convert", "quantize", "export", "explain", "serve"})
    if (name == later) throw Error(name + ": not built yet");
  throw Usage("no command '" + name + "'; did you mean bert " + nearest(name, names) + "? (bert help lists all)");
}

int help_command(const std::string& name) {
  const Command& c = find_command(name);
  std::printf("%s: %s\n\n%s%s%s", c.name, c.what, c.usage, reads_input(name) ? kInputHelp : "", kCommonHelp);
  return 0;
}

int run(const Strings& words) {
  if (words.empty()) return help(stderr), 2;
  const std::string& first = words[0];
  if (first == "help" || first == "--help" || first == "-h") {
    if (words.size() > 2) throw Usage("bert help COMMAND: one command is wanted");
    return words.size() > 1 ? help_command(words[1]) : (help(stdout), 0);
  }
  if (first == "--version" || first == "version") {
    std::printf("bert %s\n%s\n", kVersion, backend_description().c_str());
    return 0;
  }
  const Command& command = find_command(first);
  if (std::find_if(words.begin(), words.end(), [](const std::string& w) { return w == "--help" || w == "-h"; }) != words.end())
    return help_command(first);
  Args args(first, Strings(words.begin() + 1, words.end()));
  return command.run(args);
}

std::string shell_quoted(const std::string& word) {
  if (!word.empty() && word.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=./,:@%+") == word.npos)
    return word;
  std::string out = "'";
  for (const char c : word) c == '\'' ? out += "'\\''" : out += c;
  return out + "'";
}

}  // namespace

int run_main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is seen where it is written to
  bool resumes = false;
  for (int i = 0; i < argc; i++) command_line += (i ? " " : "") + shell_quoted(argv[i]), resumes |= !std::strcmp(argv[i], "--resume");
  if (!resumes) command_line += " --resume";
  int status = 1;
  try {
    status = run(Strings(argv + 1, argv + argc));
    if (std::fflush(stdout) || std::ferror(stdout)) {
      if (errno != EPIPE) throw Error(std::string("standard output: cannot write: ") + std::strerror(errno));
    }
    return status;
  } catch (const ClosedPipe&) { return 0; } catch (const Usage& e) {
    say(std::string("bert: ") + e.what());
    return 2;
  } catch (const std::bad_alloc&) {
    say("bert: out of memory; a smaller --batch-tokens or --batch takes less");
  } catch (const std::exception& e) { say(std::string("bert: ") + e.what()); }
  return 1;
}

}  // namespace bert

int main(int argc, char** argv) { return bert::run_main(argc, argv); }
