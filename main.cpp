// main.cpp -- the command line: options, readers, progress, writers, reports, and one short function a command.
//
//   What a command promises to scripts stands in `bert help COMMAND`. Results go to standard output, everything else to standard
//   error. Here is no mathematics and no knowledge of the model: files become plain structs, bert.h does the rest.
//
//   Contents:   1 errors and what is said   2 options   3 files into lines, lines into rows   4 results   5 text into ids
//               6 model folders   7 a training run: folder, log, progress, signals   8 report.html   9 vocab, tokenize   10 pretrain
//               11 finetune   12 evaluate, predict, fill-mask, embed, search   13 info, convert   14 quantize
//               15 bench   16 the table of commands, main
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <future>
#include <iostream>
#include <numeric>
#include <set>

#include "bert.h"

namespace bert {
namespace {

namespace fs = std::filesystem;
using std::to_string;
using Strings = std::vector<std::string>;
using Named = std::vector<std::pair<std::string, std::string>>;  // name and value, in order
using Numbers = std::vector<std::pair<std::string, double>>;
using About = TrainingStates::About;

constexpr const char* kVersion = "0.1";

// ==== 1 errors and what is said ===================================================================================
// Wrong usage: exit status 2. Any other Error: 1.
struct Usage : Error {
  using Error::Error;
};
// A line that cannot be used; Rows puts the file and the line in front.
struct BadLine : Error {
  using Error::Error;
};
struct ClosedPipe {};  // whoever read our results has gone: nothing is left to do, and nothing to complain about
struct Stopped {       // a signal ended the run, which was saved
  int signal;
};

bool quiet = false;          // no progress, no remarks
bool progress_line = false;  // a progress line stands on the terminal, without an end
int output_error = 0;        // of standard output, where it failed between results: main says so in the end

void flush_output() {
  if (std::fflush(stdout) && !output_error) output_error = errno;
}
void say(const std::string& text) {
  flush_output();  // a remark stands between two results, not inside one
  std::fprintf(stderr, "%s%s\n", progress_line ? "\r\033[K" : "", text.c_str());
  progress_line = false;
}
void note(const std::string& text) {
  if (!quiet) say(text);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// -1: not among them.
int index_of(const std::string& name, const Strings& names) {
  const auto found = std::find(names.begin(), names.end(), name);
  return found == names.end() ? -1 : (int)(found - names.begin());
}
bool among(const std::string& name, const Strings& names) { return index_of(name, names) >= 0; }

bool blank(std::string_view text) { return text.find_first_not_of(" \t") == text.npos; }
Strings split_words(std::string_view text) {
  Strings words = split(text, ' ');
  std::erase(words, "");
  return words;
}

// A figure of the results: counts whole, anything else so that it reads back as the same float.
std::string figure(double v) { return v == std::floor(v) && std::fabs(v) < 1e15 ? to_string((int64_t)v) : format_number(v); }

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

// A message with what would break its line, or act on the terminal, written out.
std::string one_line(std::string_view text) {
  std::string out;
  for (const char c : text)
    if ((uint8_t)c >= ' ' && c != 0x7F)
      out += c;
    else
      out += c == '\n'   ? "\\n"
             : c == '\r' ? "\\r"
             : c == '\t' ? "\\t"
                         : "\\x" + std::string{"0123456789ABCDEF"[c >> 4], "0123456789ABCDEF"[c & 15]};
  return out;
}

// How long the rest takes, if all goes on as it went since `began`.
std::string time_left(double began, int64_t done, int64_t all) {
  return duration((now() - began) / (double)done * (double)(all - done)) + " left";
}

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + (int64_t)v.size() / 2, v.end());
  return v[v.size() / 2];
}

// Letters to insert, remove, exchange or swap on the way from one word to the other.
int edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); i++)
    for (size_t j = 0; j <= b.size(); j++) {
      d[i][j] = (int)(i + j);
      if (!i || !j) continue;
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  return d[a.size()][b.size()];
}

std::string nearest(const std::string& word, const Strings& names) {
  return *std::min_element(names.begin(), names.end(),
                           [&](const std::string& x, const std::string& y) { return edit_distance(word, x) < edit_distance(word, y); });
}

// ==== 2 options ===================================================================================================
// The words after the command. Options are taken, each with what `bert help` says of it; what is left when all are taken is an error. What
// was taken, given or by default, is kept for the report and for --resume, which compares it.
class Args {
 public:
  std::string group;                        // of the options taken next, in the help
  std::map<std::string, std::string> help;  // what was taken, by groups
  std::function<void()> when_done = [] {};  // what waits until no option is misspelt
  bool empty_is_absent = false;             // bench: --model= counts as not given
  struct Described {};                      // thrown by done() where nothing but the help was asked for

  Args(std::string command, Strings words, bool describes = false)
      : command_(std::move(command)), words_(std::move(words)), describes_(describes) {}

  // kind: of its value, for the help: DIR, FILE.
  std::string take(const std::string& name, const std::string& kind, const std::string& what, const std::string& otherwise = "") {
    describe(name, kind, what, otherwise);
    return keep(name, find(name).value_or(otherwise));
  }
  std::string need(const std::string& name, const std::string& kind, const std::string& what, const std::string& otherwise = "") {
    const std::string value = take(name, kind, what, otherwise);
    if (value.empty() && missing_.empty()) missing_ = "--" + name + " is missing: " + what;
    return value.empty() ? kind : value;  // a stand-in: done() ends the command
  }
  // Repeatable, and with several values at once: --input a b --input c.
  Strings take_all(const std::string& name, const std::string& what) {
    describe(name, "FILE...", what, "");
    Strings values;
    while (const auto value = find(name)) {
      values.push_back(*value);
      for (; at_ < words_.size() && !words_[at_].starts_with("--"); erase(at_, 1)) {
        values.push_back(words_[at_]);
        values_.emplace_back(name, words_[at_]);
      }
    }
    keep(name, join(values, " "));
    return values;
  }
  bool take_switch(const std::string& name, const std::string& what) {
    describe(name, "", what, "");
    if (const int i = index_of("--" + name, words_); i >= 0) erase((size_t)i, 1), given_.insert(name);
    keep(name, given(name) ? "yes" : "");
    return given(name);
  }
  // A default of 0 or less means: not given.
  template <class T>
  T take_number(const std::string& name, T otherwise, T low, T high, const std::string& what) {
    describe(name, std::is_integral_v<T> ? "N" : "X", what, otherwise > 0 ? exact(otherwise) : "");
    const std::optional<std::string> text = find(name);
    const std::optional<T> value = text ? parse_number<T>(*text) : otherwise;
    if (!value || (text && !(*value >= low && *value <= high)))
      fail("--" + name + " " + *text + ": a " + (std::is_integral_v<T> ? "whole " : "") + "number from " + exact(low) + " to " +
           exact(high) + " is wanted");
    keep(name, *value > 0 || text ? exact(*value) : "");
    return *value;
  }
  int64_t take_int(const std::string& name, int64_t otherwise, int64_t low, int64_t high, const std::string& what) {
    return take_number<int64_t>(name, otherwise, low, high, what);
  }
  std::optional<double> take_optional(const std::string& name, double low, double high, const std::string& what) {
    const double value = take_number(name, low - 1, low, high, what);
    return given(name) ? std::optional(value) : std::nullopt;
  }
  // 500M, 2G, or a plain number of bytes.
  int64_t take_size(const std::string& name, const std::string& otherwise, const std::string& what) {
    const std::string text = take(name, "N", what, otherwise);
    const size_t unit = std::string_view("KMG").find(text.empty() ? ' ' : text.back()) + 1;
    const double bytes =
        parse_number<double>(std::string_view(text).substr(0, text.size() - (unit > 0))).value_or(0) * std::pow(1024.0, (double)unit);
    if (!(bytes >= 1) || bytes > 1e18) fail("--" + name + " " + text + ": a size such as 500M or 2G is wanted");
    return (int64_t)bytes;
  }
  // The number of the choice, of which the first is the default. One with a space in it is not for typing.
  int take_choice(const std::string& name, const Strings& choices, const std::string& what = "") {
    return choice(name, take(name, join(typed(choices), "|"), what, choices[0]), choices);
  }
  int choice(const std::string& name, const std::string& value, const Strings& choices) const {
    const int at = index_of(value, choices);
    if (at >= 0 || !missing_.empty()) return std::max(at, 0);
    const Strings names = typed(choices);
    fail("--" + name + " " + value + ": " + join(Strings(names.begin(), names.end() - 1), ", ") + " or " + names.back() +
         " is wanted; did you mean " + nearest(value, names) + "?");
  }
  // Unset: as the model's folder has it.
  std::optional<bool> take_yes_no(const std::string& name, const std::string& what) {
    const int value = take_choice(name, {"the folder's", "yes", "no"}, what);
    return value ? std::optional<bool>(value == 1) : std::nullopt;
  }
  // The next word in front of the options.
  std::string take_word() {
    const std::string word = words_.empty() || words_[0].starts_with("-") ? "" : words_[0];
    if (!word.empty()) erase(0, 1);
    return word;
  }
  void exclude(const std::string& one, const std::string& other) const {
    if (given(one) && given(other)) fail("--" + one + " and --" + other + " exclude each other");
  }
  void needs(const std::string& one, const std::string& other, const std::string& why = "") const {
    if (given(one) && !given(other)) fail("--" + one + " needs --" + other + why);
  }

  void done() const {
    if (describes_) throw Described();
    if (words_.empty() && !missing_.empty()) fail(missing_);
    if (words_.empty()) keep_files();
    if (words_.empty()) return when_done();
    const std::string word = words_[0].substr(0, words_[0].find('='));
    if (!word.starts_with("-")) fail("'" + words_[0] + "' belongs to no option");
    const std::string name = word.substr(std::min(word.find_first_not_of('-'), word.size()));
    if (among(name, asked_) && word == "--" + name) fail(word + (word != words_[0] ? " takes no value" : " is given twice"));
    const std::string near = nearest(name, asked_);
    const bool alike = edit_distance(name, near) <= 1 + (int)name.size() / 3;
    fail("no option " + word + (alike ? "; did you mean --" + near + "?" : ""));
  }
  [[noreturn]] void fail(const std::string& what) const { throw Usage(command_ + ": " + what + "; see bert help " + command_); }

  const Named& taken() const { return taken_; }
  bool given(const std::string& name) const { return given_.count(name) > 0; }

 private:
  std::string command_, missing_;  // missing_: what is said of the first one
  Strings words_, asked_;
  bool describes_;
  std::set<std::string> given_;
  Named taken_;
  Named values_;   // given, with the option of each
  size_t at_ = 0;  // where the last option taken stood

  // A file that is read is not what is written.
  void keep_files() const {
    for (const auto& [to, path] : values_)
      for (const auto& [from, file] : values_)
        if (std::error_code code;
            (to == "output" || to == "dump-batches") && from != to && fs::is_regular_file(path, code) && fs::equivalent(path, file, code))
          fail("--" + to + " " + path + " is the file of --" + from + ", which it would replace; give another");
  }

  void erase(size_t i, size_t n) { words_.erase(words_.begin() + (int64_t)i, words_.begin() + (int64_t)(i + n)); }
  std::string keep(const std::string& name, const std::string& value) { return taken_.emplace_back(name, value).second; }
  static Strings typed(Strings choices) {
    std::erase_if(choices, [](const std::string& c) { return c.find(' ') != c.npos; });
    return choices;
  }
  void describe(const std::string& name, const std::string& kind, const std::string& what, const std::string& otherwise) {
    if (among(name, asked_)) return;  // by the command itself, with a meaning of its own
    asked_.push_back(name);
    std::string line = "  --" + name + (kind.empty() ? "" : " " + kind) + "  ";
    line.resize(std::max<size_t>(line.size(), 22), ' ');
    help[group] += line + what + (otherwise.empty() ? "" : std::string(what.empty() ? "" : " ") + "(default: " + otherwise + ")") + "\n";
  }

  std::optional<std::string> find(const std::string& name) {
    const std::string plain = "--" + name;
    for (at_ = 0; at_ < words_.size(); at_++) {
      const bool with_value = words_[at_].starts_with(plain + "=");
      if (!with_value && words_[at_] != plain) continue;
      const bool bare = !with_value && (at_ + 1 >= words_.size() || words_[at_ + 1].starts_with("--"));
      if (bare && !empty_is_absent) fail(plain + " needs a value (one that begins with -- is written " + plain + "=VALUE)");
      const std::string value = with_value ? words_[at_].substr(plain.size() + 1) : bare ? "" : words_[at_ + 1];
      erase(at_, with_value || bare ? 1 : 2);
      if (value.empty() && empty_is_absent) return {};
      given_.insert(name), values_.emplace_back(name, value);
      return value;
    }
    return {};
  }
};

// Which kernel is the fastest on a device is remembered in the user's folder of such things.
DeviceOptions device_options(bool half) {
  const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
  return {.half = half, .cache = cache && *cache ? cache + std::string("/bert") : home && *home ? home + std::string("/.cache/bert") : ""};
}

// What every command takes.
struct Common {
  std::optional<UseThreads> use;
  uint64_t seed;
  std::optional<Precision> precision;  // of --dtype; unset: the folder's
  bool half;                           // --dtype f16: a device's weights

  // narrowest: what the command can compute in.
  explicit Common(Args& a, Precision narrowest = Precision::f32) {
    a.group = "of every command";
    use.emplace((int)a.take_int("threads", 0, 0, 4096, "default: the cores this process may use; results do not depend on it"));
    seed = (uint64_t)a.take_int("seed", 1, 0, INT64_MAX, "of everything random");
    quiet = a.take_switch("quiet", "no progress, no remarks; warnings stay");
    const std::string device =
        a.take("device", "cpu|opencl|opencl:N|opencl:NAME", "what computes large products; bert info lists the devices", "cpu");
    const Strings dtypes = {"the folder's", "f32", "bf16", "int8", "f16"};
    const bool asks_folder = narrowest == Precision::int8, opencl = device == "opencl" || device.starts_with("opencl:");
    const int dtype =
        !asks_folder + a.take_choice("dtype", {dtypes.begin() + !asks_folder, dtypes.end()},
                                     "of products; sums are f32 (int8: only where a model answers; f16: there, with --device opencl)");
    half = dtype == 4;
    if (!opencl) a.choice("device", device, {"cpu", "opencl"});
    if (half && asks_folder && !opencl) throw Error("--dtype f16: goes with --device opencl; on the cpu f32, bf16 and int8 do");
    if (dtype - 1 > (int)narrowest && !(half && asks_folder))
      throw Error("--dtype " + dtypes[(size_t)dtype] + ": this command computes in " +
                  (narrowest == Precision::bf16 ? "f32 or bf16" : "f32"));
    if (opencl && (dtype == 2 || dtype == 3))
      throw Error("--dtype " + dtypes[(size_t)dtype] + ": goes with --device cpu; opencl computes in f32 and f16");
    if (dtype) precision = half ? Precision::f32 : (Precision)(dtype - 1);
    if (opencl) a.when_done = [device, half = half] { use_device(device, device_options(half)); };
    a.group.clear();
  }
};

// ==== 3 files into lines, lines into rows =========================================================================
// The lines of a file or of standard input. A byte-order mark at the start and a carriage return at the end of a line go away.
class Lines {
 public:
  explicit Lines(const std::string& path) : name_(path == "-" ? "standard input" : path), in_(path == "-" ? std::cin : file_) {
    std::error_code code;
    if (path != "-" && fs::is_directory(path, code)) throw Error(path + ": this is a folder; give a file of text");
    errno = 0;
    if (path != "-") file_.open(path, std::ios::binary);
    if (path != "-" && !file_) throw Error(path + ": cannot open: " + std::strerror(errno) + "; give a file that exists and may be read");
  }
  bool next(std::string& line) {
    errno = 0;
    if (!std::getline(in_, line)) {
      if (in_.bad()) throw Error(name_ + ": cannot read: " + std::strerror(errno ? errno : EIO));
      return false;
    }
    begin_ = next_, next_ += (int64_t)line.size() + 1;
    if (!number_++ && line.starts_with("\xEF\xBB\xBF")) line.erase(0, 3), begin_ += 3;
    if (line.ends_with('\r')) line.pop_back();
    return true;
  }
  int64_t begin() const { return begin_; }  // where the line read last begins, in bytes
  void go_to(int64_t begin) { in_.clear(), in_.seekg(begin); }
  // Whoever writes to our input has no more for now: what came is to be answered, not to be waited on.
  bool waits() const {
    pollfd input{0, POLLIN, 0};
    return &in_ == &std::cin && std::cin.rdbuf()->in_avail() <= 0 && ::poll(&input, 1, 0) == 0;
  }
  const std::string& name() const { return name_; }
  int64_t number() const { return number_; }  // of the line read last, from 1
  std::string where() const { return name_ + ":" + to_string(number_); }

 private:
  std::string name_;
  std::ifstream file_;
  std::istream& in_;
  int64_t number_ = 0, begin_ = 0, next_ = 0;
};

// A text file whose lines are fetched by their numbers: only where they begin is held.
class LineFile {
 public:
  Fingerprint fingerprint;
  explicit LineFile(const std::string& path) : lines_(path) {
    if (!fs::is_regular_file(path)) throw Error(path + ": lines are fetched from it again, so it cannot be a pipe; give a plain file");
    for (std::string line; lines_.next(line); begins_.push_back(lines_.begin())) fingerprint.bytes(line);
    if (begins_.empty()) throw Error(path + ": empty; there is nothing to read");
  }
  int64_t size() const { return (int64_t)begins_.size(); }
  std::string line(int64_t i) {  // from 0
    std::string text;
    lines_.go_to(begins_[(size_t)i]), lines_.next(text), repair_utf8(text);
    return text;
  }

 private:
  Lines lines_;
  std::vector<int64_t> begins_;
};

enum Format { kByEnding, kLines, kTsv, kCsv, kJsonl, kFasttext, kIds, kConll, kSquad };
const Strings kFormats = {"by ending", "lines", "tsv", "csv", "jsonl", "fasttext", "ids", "conll", "squad"};
// The well-known names of texts and pairs, and of answers.
const Strings kTextNames = {"text",      "sentence", "sentence1", "premise",    "question", "question1", "text_a", "#1 String",
                            "text_pair", "pair",     "sentence2", "hypothesis", "context",  "question2", "text_b", "#2 String"};
const Strings kLabelNames = {"label", "labels", "score", "gold_label", "class", "Quality"};
const Strings kWordNames = {"words", "tokens"}, kTagNames = {"tags", "ner_tags", "labels"}, kAnswerNames = {"answers", "answer"};

// What a reader was told.
struct Source {
  Strings files;
  Format format = kByEnding;
  std::string columns;  // empty: by name
  bool header = true, skip_bad = false;
  std::optional<Task> task;  // what the rows are for, where it needs more than texts and a label
  bool labels = false;       // every row must have one
  bool training = false;     // an answer must stand where the file says; to score one its text is enough
  bool word_lists = false;   // tokenize --split-words
  bool keep_bytes = false;   // invalid UTF-8 is counted but left: offsets are then into the input's own bytes
  bool raw = false;          // running text: a TAB is white space, an empty line the end of a document
  std::string prompt;        // goes in front of every text
};

Source take_source(Args& a, const std::string& name = "input", const std::string& what = "- or none: standard input") {
  Source s;
  s.files = a.take_all(name, what);
  if (s.files.empty() && name == "input") s.files = {"-"};
  a.group = "how they are read";
  s.format = (Format)a.take_choice("format", kFormats);
  s.columns = a.take("columns", "text=A,pair=B,label=C", "names, or numbers from 0; default: by well-known names");
  s.header = !a.take_switch("no-header", "tsv and csv without a header line");
  s.skip_bad = a.take_switch("skip-bad", "pass over lines that cannot be used, and count them");
  a.group.clear();
  if (!s.header && s.columns.empty()) a.fail("--no-header needs --columns text=0 or the like");
  return s;
}
// A file that is read as `source` is: --dev, --test.
std::optional<Source> take_like(Args& a, const std::string& name, Source source, const std::string& what) {
  source.files = {a.take(name, "FILE", what)};
  return a.given(name) ? std::optional<Source>(source) : std::nullopt;
}

bool table(Format f) { return f == kTsv || f == kCsv; }
bool named(Format f) { return table(f) || f == kJsonl; }  // its rows are made of columns or keys
Format format_of(const std::string& path) {
  for (const Format f : {kTsv, kCsv, kJsonl, kConll})
    if (path.ends_with("." + kFormats[f])) return f;
  return path.ends_with(".json") ? kSquad : kLines;
}

// One row of any format.
struct Row : Item {
  Format format = kLines;              // of its file
  std::string where;                   // file:line
  int64_t number = 0;                  // of the text, from 1 over all files
  Strings pair_words;                  // beside words, where word lists were asked for
  Told told;                           // what is right
  std::string id;                      // of a question
  std::vector<int32_t> ids, segments;  // format ids
};

// All rows of all files, in order, one at a time.
class Rows {
 public:
  explicit Rows(Source source) : s_(std::move(source)) {}

  bool next(Row& row) {
    while (lines_ || open()) try {
        row = Row();
        row.format = format_, row.number = number_ + 1;
        if (read(row)) {
          check_pair(row);
          count_++, number_++;
          if (s_.word_lists && row.words.empty()) row.words = split_words(row.text), row.pair_words = split_words(row.pair.value_or(""));
          row.text.insert(0, s_.prompt);
          return true;
        }
        if (lines_->name() != "standard input" && !lines_->number() && format_ != kSquad)
          throw Error(lines_->name() + ": empty; there is nothing to read");
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
    if (skipped_++ < 5) note("bert: " + one_line(where + ": " + what) + "; skipped");
  }
  // What was repaired or skipped, said once at the end.
  void report() const {
    if (skipped_) say("bert: " + counted(skipped_, format_ == kConll ? "sentence" : "line") + " could not be used and skipped");
    if (repaired_)
      say("bert: invalid UTF-8 in " + counted(repaired_, "line") + ", the first is " + first_repaired_ + "; each invalid part " +
          (s_.keep_bytes ? "is read as U+FFFD" : "became U+FFFD, three bytes where offsets are counted"));
    if (misplaced_)
      say("bert: " + counted(misplaced_, "answer") + " not where the file says in the context, the first in " + first_misplaced_ +
          "; for the score the text counts");
  }
  int64_t count() const { return count_; }
  bool waits() const { return lines_ && lines_->waits(); }

 private:
  Source s_;
  std::optional<Lines> lines_;
  Format format_ = kLines;
  size_t file_ = 0;
  Strings names_;                           // of the columns or keys that were picked from last
  bool picked_ = false, said_ = false;      // all that is needed, and that this was said of the file
  bool paired_ = false;                     // the first row was a pair
  int text_ = -1, pair_ = -1, label_ = -1;  // their numbers
  std::vector<int> others_;                 // of choices, or of what is and what is not alike
  size_t columns_ = 0;                      // conll: of the file's first line
  Json squad_;                              // the file, and its questions with their paragraphs, the last one first
  std::vector<std::array<const Json*, 2>> questions_;
  std::string text_line_;  // read last; its room is used again
  int64_t number_ = 0, count_ = 0, skipped_ = 0, repaired_ = 0, misplaced_ = 0;
  std::string first_repaired_, first_misplaced_;

  bool open() {
    if (file_ >= s_.files.size()) return false;
    const std::string path = s_.files[file_++];
    format_ = s_.format ? s_.format : format_of(path);
    const Task task = s_.task.value_or(Task::embed);
    if ((format_ == kConll) > (task == Task::tag) || (format_ == kSquad) > (task == Task::qa))
      throw Error(path + ": format " + kFormats[format_] + " is for " + (format_ == kConll ? "tags" : "questions") +
                  "; say --format if it is another");
    if (!named(format_) && !s_.columns.empty()) throw Usage("--columns: " + path + " has no columns; they are for tsv, csv and jsonl");
    lines_.emplace(path);
    const char* own_format = task == Task::tag ? " or conll" : task == Task::qa ? " or squad" : "";
    if (s_.labels && (format_ == kLines || format_ == kIds))
      throw Error(path + ": no labels in this format; give a tsv, csv or jsonl file, or --format fasttext" + own_format);
    picked_ = said_ = false, columns_ = 0;
    if (format_ == kSquad) read_squad(path);
    if (table(format_)) try {
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
    if (valid_utf8(text)) return true;
    if (!repaired_++) first_repaired_ = row.where;
    if (!s_.keep_bytes) repair_utf8(text);
    return true;
  }
  bool read(Row& row) {
    Strings parts;
    if (format_ == kConll) return sentence(row);
    if (format_ == kSquad) return question(row);
    if (table(format_) ? !cells(parts, row) : !line(text_line_, row)) return false;
    if (table(format_)) {
      std::vector<std::pair<std::string, Json>> cells;
      for (std::string& part : parts) cells.emplace_back("", Json(std::move(part)));
      fields(cells, row);
    } else if (format_ == kJsonl)
      json(text_line_, row);
    else if (format_ == kFasttext)
      fasttext(text_line_, row);
    else if (format_ == kIds)
      ids(split(text_line_, '\t'), row);
    else
      plain(text_line_, row);
    return true;
  }

  // Labelled texts come alone or all in pairs: one that lacks its second text would be learned as something else.
  void check_pair(const Row& row) {
    const Task task = s_.task.value_or(Task::embed);
    if (!s_.labels || (task != Task::classify && task != Task::multilabel && task != Task::regress)) return;
    if (!count_) paired_ = row.pair.has_value();
    if (paired_ != row.pair.has_value())
      throw BadLine(paired_ ? "one text, where the rows before have two" : "two texts, where the rows before have one");
  }

  // A sentence of a CoNLL file: a word a line, first the token, last the tag.
  bool sentence(Row& row) {
    std::string text, first, wrong;
    while (line(text, row)) {
      for (char& c : text) c = c == '\t' ? ' ' : c;
      const Strings parts = split_words(text);
      if (parts.empty() && first.empty()) continue;
      if (parts.empty()) break;
      if (parts[0] == "-DOCSTART-") continue;
      if (first.empty()) first = row.where;
      if (!columns_) columns_ = parts.size();
      if (wrong.empty() && (parts.size() != columns_ || (s_.labels && parts.size() < 2))) {
        first = row.where;
        wrong = s_.labels && parts.size() < 2
                    ? "no tag; a line is a token, perhaps other columns, and its tag"
                    : counted((int64_t)parts.size(), "column") + ", but the file's first line has " + to_string(columns_);
      }
      row.words.push_back(parts[0]);
      if (s_.labels) row.told.answers.push_back(parts.back());
    }
    if (!first.empty()) row.where = first;
    if (!wrong.empty()) throw BadLine(wrong);
    row.told.listed = true, row.text = join(row.words, " ");
    return !row.words.empty();
  }

  // Where the answer stands in the context: at `start` code points, or at its first place where none is given.
  void add_answer(Row& row, const Json& text, const Json* start) {
    const std::string& answer = text.as_string("text");
    const int64_t told = start ? start->as_int("answer_start") : 0;
    size_t at = !start ? row.pair->find(answer) : told < 0 ? row.pair->size() : 0;
    for (int64_t i = told; i > 0 && at < row.pair->size(); i--) at += std::max<size_t>(utf8_length(*row.pair, at), 1);
    const bool stands = !answer.empty() && at < row.pair->size() && row.pair->compare(at, answer.size(), answer) == 0;
    if (!stands && (s_.training || answer.empty()))
      throw BadLine("the answer '" + answer + "' does not stand in the context" + (start ? " at its answer_start" : ""));
    row.told.answers.push_back(answer);
    if (s_.training) row.told.starts.push_back((int64_t)at);
    if (!stands && !misplaced_++) first_misplaced_ = row.where;
  }
  // A string; {"text": [...], "answer_start": [...]}; or a list of {"text", "answer_start"}.
  void add_answers(Row& row, const Json& v) try {
    row.told.listed = true;
    if (v.is(Json::string)) {
      if (!v.as_string("answer").empty()) add_answer(row, v, nullptr);
    } else if (v.is(Json::array)) {
      for (const Json& one : v.items("answers")) {
        const Json* text = one.find("text");
        if (!text) throw BadLine("an answer without 'text'");
        add_answer(row, *text, one.find("answer_start"));
      }
    } else if (const Json* texts = v.find("text")) {
      const Json* starts = v.find("answer_start");
      for (size_t i = 0; i < texts->items("text").size(); i++) {
        if (starts && i >= starts->items("answer_start").size()) throw BadLine("fewer answer_start than texts of answers");
        add_answer(row, texts->items("text")[i], starts ? &starts->items("answer_start")[i] : nullptr);
      }
    } else {
      throw BadLine("answers are neither a string nor a list of texts");
    }
  } catch (const Error& e) {  // also of another type than is wanted
    throw BadLine(e.what());
  }
  // What SQuAD's format has under a key.
  const Json& need(const Json& v, const char* key) const {
    if (const Json* found = v.find(key)) return *found;
    throw Error(lines_->name() + ": no '" + key + "' where SQuAD's format has it");
  }
  const std::vector<Json>& need_list(const Json& v, const char* key) const { return need(v, key).items(lines_->name() + ": " + key); }
  const std::string& need_text(const Json& v, const char* key) const { return need(v, key).as_string(lines_->name() + ": " + key); }
  void read_squad(const std::string& path) {
    squad_ = Json::parse(read_file(path), path), questions_.clear();
    for (const Json& article : need_list(squad_, "data"))
      for (const Json& paragraph : need_list(article, "paragraphs"))
        for (const Json& question : need_list(paragraph, "qas")) questions_.push_back({&paragraph, &question});
    if (questions_.empty()) throw Error(path + ": no question in this file");
    std::reverse(questions_.begin(), questions_.end());
  }
  bool question(Row& row) {
    if (questions_.empty()) return false;
    const auto [paragraph, question] = questions_.back();
    questions_.pop_back();
    row.pair = need_text(*paragraph, "context"), row.text = need_text(*question, "question"), row.id = need_text(*question, "id");
    row.where = lines_->name() + ": question " + row.id, row.told.listed = true;
    const Json *answers = question->find("answers"), *impossible = question->find("is_impossible");
    if (s_.labels && !answers) throw BadLine("no 'answers'");
    if (s_.labels && !(impossible && impossible->as_bool(row.where))) add_answers(row, *answers);
    return true;
  }

  void plain(const std::string& text, Row& row) const {
    const size_t tab = s_.raw ? text.npos : text.find('\t');
    if (tab != text.npos) {
      if (text.find('\t', tab + 1) != text.npos) throw BadLine("more than two texts; a line is a text, or text TAB text");
      row.pair = text.substr(tab + 1);
    }
    row.text.assign(text, 0, tab);
  }
  static void fasttext(const std::string& text, Row& row) {
    static const std::string mark = "__label__";
    size_t at = 0;
    do {  // the first word is a label, and every following one that is marked
      const size_t end = std::min(text.find(' ', at), text.size());
      const std::string word = text.substr(at, end - at);
      row.told.answers.push_back(word.starts_with(mark) ? word.substr(mark.size()) : word);
      at = std::min(end + 1, text.size());
    } while (text.compare(at, mark.size(), mark) == 0);
    const std::string& label = row.told.answers[0];
    if (label.empty() || label.find('\t') != label.npos)
      throw BadLine(std::string(label.empty() ? "no label" : "a label that holds a TAB") + "; a line is a label, a space, the text");
    row.told.listed = row.told.answers.size() > 1;
    row.text = text.substr(at);
  }
  static std::vector<int32_t> numbers(const std::string& list) {
    std::vector<int32_t> out;
    for (const std::string& word : split_words(list)) {
      const auto v = parse_number<int32_t>(word);
      if (!v || *v < 0) throw BadLine("'" + word + "' is no token id; a line is numbers joined by spaces");
      out.push_back(*v);
    }
    return out;
  }
  static void ids(const Strings& parts, Row& row) {
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
    for (size_t at = 0; at <= text.size(); at++) {  // behind a comma
      const bool quoted = text[at] == '"';
      size_t end = text.find(quoted ? '"' : ',', at + quoted);
      std::string& field = parts.emplace_back(text, at + quoted, end - at - quoted);
      while (quoted && (end == text.npos || text[end + 1] == '"')) {  // it goes on in the next line, or behind a doubled quote
        const bool doubled = end != text.npos;
        const bool more = doubled || line(text, row);
        row.where = first;
        if (!more)
          throw BadLine("a quote opens here and is never closed, so that the rest of the file stands inside it; quotes are doubled");
        at = doubled ? end + 2 : 0, end = text.find('"', at);
        field += (doubled ? '"' : '\n') + text.substr(at, end - at);
      }
      at = std::min(end, text.size()) + quoted;
      if (quoted && at < text.size() && text[at] != ',')
        throw BadLine("something follows a closing quote; quotes inside a field are doubled");
    }
    return true;
  }

  // Settles which columns or keys are meant: those of --columns, else by well-known names in the order they stand.
  void pick(const Strings& names) {
    if (picked_ && names == names_) return;
    picked_ = false, names_ = names, text_ = pair_ = label_ = -1, others_.clear();
    if (s_.task == Task::choice)
      for (int i = 0, at; (at = index_of("choice" + to_string(i), names)) >= 0; i++) others_.push_back(at);
    const auto numbered = std::count_if(names.begin(), names.end(), [](const std::string& name) {
      return name.starts_with("choice") && parse_number<int>(std::string_view(name).substr(6));
    });
    if (s_.task == Task::choice && (size_t)numbered > others_.size())
      throw BadLine("no choice" + to_string(others_.size()) + " among " + join(names, ", ") + "; number the choices from 0 without a gap");
    if (s_.task == Task::choice && others_.empty() && among("choices", names)) others_ = {index_of("choices", names)};
    for (const char* name : {"positive", "negative"})
      if (s_.task == Task::embed && among(name, names)) others_.push_back(index_of(name, names));
    if (!s_.columns.empty()) pick_by_option(names);
    const bool by_name = text_ < 0;
    for (int i = 0; i < (int)names.size() && by_name; i++) {
      const bool context = format_ == kJsonl && names[i] == "context";
      if (!among(names[i], kTextNames) && !(s_.task == Task::tag && among(names[i], kWordNames))) continue;
      if (text_ < 0 && !context)
        text_ = i;
      else if (pair_ < 0 || context)
        pair_ = i;
    }
    if (text_ < 0 && s_.task != Task::qa) std::swap(text_, pair_);  // a context alone is the text
    const Strings& known_labels = s_.task == Task::tag ? kTagNames : s_.task == Task::qa ? kAnswerNames : kLabelNames;
    const bool wants_label = s_.task != Task::embed || s_.columns.empty();  // texts that are alike need none
    for (const std::string& name : known_labels)
      if (label_ < 0 && wants_label) label_ = index_of(name, names);
    if (!s_.labels) label_ = -1;
    auto missing = [&](const std::string& what, const Strings& known) {
      throw BadLine("no " + what + " (" + join(known, ", ") + ") among " + join(names, ", ") + "; name it with --columns");
    };
    if (text_ < 0) missing("text", kTextNames);
    if (label_ < 0 && s_.labels && (s_.task != Task::embed || (others_.empty() && pair_ < 0))) missing("label", known_labels);
    if (s_.task == Task::choice && others_.empty()) missing("choices", {"choices", "choice0"});
    if (s_.task == Task::qa && pair_ < 0) missing("context", {"context"});
    for (const int number : {text_, pair_, label_})
      if (s_.columns.empty() && number >= 0 && std::count(names.begin(), names.end(), names[(size_t)number]) > 1)
        throw BadLine("'" + names[(size_t)number] + "' stands there twice; rename one, or give --columns their numbers");
    std::string found;
    for (const auto& [number, what] : {std::pair(text_, "text is "), {pair_, ", pair is "}, {label_, ", label is "}})
      if (number >= 0) found += what + ("'" + (number < (int)names.size() ? names[number] : "column " + to_string(number))) + "'";
    if (!said_) note(lines_->name() + ": " + found);
    picked_ = said_ = true;
  }
  void pick_by_option(const Strings& names) {
    for (const std::string& wish : split(s_.columns, ',')) {
      const size_t equal = std::min(wish.find('='), wish.size());
      const std::string key = wish.substr(0, equal), value = wish.substr(std::min(equal + 1, wish.size()));
      int* to = key == "text" ? &text_ : key == "pair" ? &pair_ : key == "label" || key == "labels" ? &label_ : nullptr;
      if (!to || value.empty())
        throw Usage("--columns " + s_.columns + ": text=…,pair=…,label=… is wanted, each a name or a number from 0");
      if (*to >= 0) throw Usage("--columns " + s_.columns + ": " + key + " is given twice");
      const auto number = format_ == kJsonl ? std::nullopt : parse_number<int>(value);
      *to = number ? *number : index_of(value, names);
      if (*to < 0 && names.empty()) throw Usage("--columns " + s_.columns + ": '" + value + "' is no number from 0");
      if (*to < 0) throw BadLine("no '" + value + "' among " + join(names, ", ") + "; correct --columns");
    }
  }

  void json(const std::string& text, Row& row) {
    Json v;
    if (blank(text)) throw BadLine("an empty line, where a JSON object is wanted");
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
    if (const Json* id = s_.task == Task::qa ? v.find("id") : nullptr) row.id = answer(*id);
    fields(v.members(), row);
  }
  // What was picked of a row's columns or keys.
  void fields(const std::vector<std::pair<std::string, Json>>& values, Row& row) {
    size_t filled = values.size();
    while (filled > names_.size() && values[filled - 1].second.as_string("").empty()) filled--;
    if (table(format_) && s_.header && filled > names_.size())
      throw BadLine(counted((int64_t)values.size(), "field") + ", but the header has " + to_string(names_.size()) +
                    "; a separator inside of a text? check them");
    int last = std::max({text_, pair_, label_});
    for (const int i : others_) last = std::max(last, i);
    if ((int)values.size() <= last)
      throw BadLine(counted((int64_t)values.size(), "field") + ", but column " + to_string(last) +
                    " (from 0) is wanted; check the separators");
    row.text = string_or_words(values[text_], row.words);
    if (s_.task == Task::tag && !row.words.empty()) row.text = join(row.words, " ");
    if (pair_ >= 0) row.pair = string_or_words(values[pair_], row.pair_words);
    for (const int i : others_)
      if (const Json& other = values[i].second; other.is(Json::string) || other.is(Json::array)) append_answers(other, row.others);
    if (label_ < 0) return;
    const Json& label = values[label_].second;
    if (s_.task == Task::qa) return add_answers(row, label);
    row.told.listed = label.is(Json::array);
    append_answers(label, row.told.answers);
  }
  std::string string_or_words(const std::pair<std::string, Json>& field, Strings& words) const {
    const auto& [key, v] = field;
    if (v.is(Json::string)) return v.as_string(key);
    if ((!s_.word_lists && s_.task != Task::tag) || !v.is(Json::array)) throw BadLine("'" + key + "' is not a string");
    append_answers(v, words);
    return "";
  }
  // A list's values, or one.
  static void append_answers(const Json& v, Strings& to) {
    if (!v.is(Json::array)) return to.push_back(answer(v));
    for (const Json& one : v.items("label")) to.push_back(answer(one));
  }
  static std::string answer(const Json& v) {
    if (v.is(Json::string)) return v.as_string("label");
    if (v.is(Json::boolean)) return v.as_bool("label") ? "true" : "false";
    if (v.is(Json::number)) return exact(v.as_double("label"));
    throw BadLine("a value that is neither a string nor a number");
  }
};

// At most `most` rows or 4 MB of text: what is worked on at once. Where somebody types them, or a program sends them: those that came.
bool read_chunk(Rows& rows, std::vector<Row>& chunk, size_t most) {
  chunk.clear();
  size_t bytes = 0;
  while (chunk.size() < most && bytes < (4u << 20)) {
    Row& row = chunk.emplace_back();
    if (!rows.next(row)) {
      chunk.pop_back();
      break;
    }
    bytes += row.text.size() + (row.pair ? row.pair->size() : 0) + row.ids.size() * 4;
    if (rows.waits()) break;
  }
  return !chunk.empty();
}

// ==== 4 results ===================================================================================================
// Standard output, or --output FILE, which appears whole or not at all.
class Results {
 public:
  explicit Results(Args& a) {
    const std::string path = a.take("output", "FILE", "whole or not at all; default: standard output");
    struct stat there;
    const bool device = path.starts_with("/dev/") || (!::stat(path.c_str(), &there) && !S_ISREG(there.st_mode) && !S_ISDIR(there.st_mode));
    if (device) {  // or a pipe: nothing to put in place of
      to_ = std::fopen(path.c_str(), "wb");
      if (!to_) throw Error(path + ": cannot write: " + std::strerror(errno));
      name_ = path;
    } else if (path != "-") {
      path_ = path;
    }
  }
  void line(const std::string& text) { write(text + "\n"); }
  void write(std::string_view text) {
    if (!path_.empty() && !file_) file_.emplace(path_);
    if (file_) return file_->write(text);
    if (std::fwrite(text.data(), 1, text.size(), to_) < text.size()) fail();
  }
  void flush() {
    if (!file_ && std::fflush(to_)) fail();
  }
  void finish() {
    write("");
    flush();
    if (file_) file_->commit();
  }

 private:
  std::string path_, name_ = "standard output";
  std::FILE* to_ = stdout;
  std::optional<AtomicFile> file_;

  [[noreturn]] void fail() const {
    if (errno == EPIPE) throw ClosedPipe();
    throw Error(name_ + ": cannot write: " + std::strerror(errno));
  }
};

// Single figures, as lines of `name TAB value`.
std::string figures(const Numbers& list) {
  std::string out;
  for (const auto& [name, value] : list) out += name + "\t" + figure(value) + "\n";
  return out;
}

void print(const Numbers& list) { std::fputs(figures(list).c_str(), stdout); }

std::string json_numbers(const Numbers& numbers) {
  Named members;
  for (const auto& [name, v] : numbers) members.emplace_back(name, std::isfinite(v) ? figure(v) : "null");  // JSON has no nan, no inf
  return json_object(members);
}

// ==== 5 text into ids =============================================================================================
// Raw text as ids, put behind those of `corpus`: a line is a paragraph, a blank line ends a document; in the other formats a row is a
// document. The first `skip` rows are passed over; before_row(its number) is called for each row of text that follows. Returns their
// number.
template <class F>
int64_t read_text(Source source, const WordPiece& tokenizer, int64_t skip, Corpus& corpus, F&& before_row) {
  source.raw = true;
  Rows rows(source);
  std::vector<Row> chunk;
  int64_t number = 0;
  for (; read_chunk(rows, chunk, 1 << 14); number += (int64_t)chunk.size()) {
    const auto first = std::clamp<int64_t>(skip - number, 0, (int64_t)chunk.size());
    std::vector<Corpus> parts(chunk.size());
    parallel_each((int64_t)chunk.size() - first, 16, [&](int64_t i) {
      const Row& row = chunk[first + i];
      Corpus& part = parts[first + i];
      for (const std::string& line : split(row.pair ? row.text + "\n" + *row.pair : row.text, '\n'))
        for (const std::string_view sentence : split_sentences(line)) tokenizer.append_ids(sentence, part.ids), part.end_sentence();
    });
    for (size_t i = (size_t)first; i < chunk.size(); i++) {
      if (!parts[i].ids.empty()) before_row(number + (int64_t)i), corpus.add_sentences(parts[i].sentences, parts[i].ids.data());
      if (named(chunk[i].format) || blank(chunk[i].text)) corpus.end_document();
    }
  }
  corpus.end_document();
  rows.report();
  return number;
}

[[noreturn]] void nothing(Source source, const std::string& wanted) {
  std::replace(source.files.begin(), source.files.end(), std::string("-"), std::string("standard input"));
  throw Error(join(source.files, ", ") + ": no " + wanted);
}
constexpr const char* kNoText = "text; give a file with a paragraph a line";

Corpus read_corpus(const Source& source, const WordPiece& tokenizer) {
  Corpus corpus;
  read_text(source, tokenizer, 0, corpus, [](int64_t) {});
  if (corpus.ids.empty()) nothing(source, kNoText);
  return corpus;
}

// A row as an example of at most `limit` tokens; cut: it was longer. A row of format ids is taken as it is.
Example encode_row(const WordPiece& tokenizer, const Row& row, int64_t limit, bool parse_special, bool& cut) {
  if (!row.ids.empty()) return {row.ids, row.segments};
  EncodeOptions options;
  options.parse_special = parse_special;
  auto encode = [&] { return row.pair ? tokenizer.encode(row.text, *row.pair, options) : tokenizer.encode(row.text, options); };
  Encoding e = encode();
  cut = (int64_t)e.ids.size() > limit;
  options.max_length = limit;
  if (cut) e = encode();
  return {std::move(e.ids), std::move(e.type_ids)};
}

// Token and segment ids of format ids must be ones that the model has, and fit its positions.
void check_ids(const Row& row, const Config& config) {
  auto check = [&](const char* what, const std::vector<int32_t>& list, int64_t size) {
    for (const int32_t id : list)
      if (id >= size) throw BadLine(std::string(what) + " id " + to_string(id) + ", but the model has 0 to " + to_string(size - 1));
  };
  check("token", row.ids, config.vocab_size);
  check("segment", row.segments, config.type_vocab_size);
  if ((int64_t)row.ids.size() > config.max_position_embeddings)
    throw BadLine(to_string(row.ids.size()) + " ids, but the model has " + to_string(config.max_position_embeddings) + " positions");
}

// ==== 6 model folders =============================================================================================
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

WordPiece open_tokenizer(const std::string& path) {
  WordPiece tokenizer = WordPiece::load(path);
  for (const std::string& warning : tokenizer.warnings) note("bert: " + warning);
  return tokenizer;
}
ModelFolder open_model(const std::string& path, bool pack = true, std::optional<Precision> precision = {}) {
  ModelFolder folder = load_folder(path, pack, precision);
  for (const std::string& warning : folder.tokenizer.warnings) note("bert: " + warning);
  // Rows are often padded to a multiple of up to 1024; more is missing where a vocab.txt was cut short or belongs to another model.
  if (folder.tokenizer.size() + 1024 <= folder.config.vocab_size)
    note("bert: " + path + ": the vocabulary has only " + grouped(folder.tokenizer.size()) + " pieces for the model's " +
         grouped(folder.config.vocab_size) + " rows; see that it is the model's own");
  return folder;
}
Config open_config(const std::string& path) { return Config::parse(read_file(path), path); }

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

int64_t stored_number(const About& about, const char* key) { return parse_number<int64_t>(about.at(key)).value_or(0); }

// The folder that a command writes: made, and locked against a second run.
FolderLock lock_output(const std::string& path, std::optional<bool> resume, bool overwrite) {
  check_output(path, resume, overwrite);
  return FolderLock(path);
}

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

// y [m,n] = x [m,k] w [n,k]^T by each engine, or each of one precision: name and GFLOP/s.
Numbers product_speeds(int64_t m, int64_t n, int64_t k, std::optional<Precision> only = {}) {
  const Tensor x({m, k}, 0.5f), w({n, k}, 0.25f), y({m, n}, 0.f);
  Numbers speeds;
  auto measure = [&](const char* engine, auto&& call) {
    speeds.emplace_back(engine, 2e-9 * (double)m * (double)n * (double)k / median_seconds(0.04, call));
  };
  auto plain = [&](Backend backend) {
    Gemm how;
    how.b_transposed = true, how.backend = backend;
    gemm(how, m, n, k, x.data(), k, w.data(), k, y.data(), n);
  };
  for (const Precision p : {Precision::f32, Precision::bf16, Precision::int8}) {
    if (only.value_or(p) != p) continue;
    const PackedWeights packed(w.data(), n, k, p);
    measure((std::string("ours-") + name_of(p)).c_str(), [&] { gemm(m, x.data(), k, packed, y.data(), n, Epilogue{}); });
  }
  if (only.value_or(Precision::f32) != Precision::f32) return speeds;
  measure("ours-unpacked-f32", [&] { plain(Backend::own); });
  if (has_openblas()) measure("openblas-f32", [&] { plain(Backend::openblas); });
  return speeds;
}
double best_speed(int64_t m, int64_t n, int64_t k, Precision precision) {
  double best = 0;
  for (const auto& [engine, speed] : product_speeds(m, n, k, precision)) best = std::max(best, speed);
  return best;
}
// What this machine's multiply, or the device's, does in a moment of 0.2 s: what a running figure is held against.
double gemm_now(Precision precision) { return device_in_use() ? device_peak() : best_speed(1024, 768, 768, precision); }

// One line with step, loss, tokens/s and time left: rewritten on a terminal, otherwise a plain line now and then.
class Progress {
 public:
  void show(const std::string& line, bool last = false) {
    const double t = now();
    if (quiet || (last ? line == shown_ && !progress_line : t < next_)) return;
    shown_ = line;
    next_ = t + (terminal_ ? 0.2 : wait_);
    wait_ = std::min(60.0, wait_ * 1.5);
    if (!terminal_) return say(line);
    std::fprintf(stderr, "\r\033[K%s%s", line.c_str(), last ? "\n" : "");
    std::fflush(stderr);
    progress_line = !last;
  }

 private:
  bool terminal_ = isatty(2);
  double next_ = 0, wait_ = 4;
  std::string shown_;
};

// Settings that a resumed run may change, or that are checked by the data they name.
const Strings kFreeSettings = {"threads", "quiet",   "device",    "resume",   "overwrite", "output",  "save-every", "keep",         "input",
                               "train",   "dev",     "test",      "model",    "vocab",     "config",  "init",       "dump-batches", "cache",
                               "format",  "columns", "no-header", "skip-bad", "tsv",       "dry-run", "recompute",  "skip-spikes"};

// A model that is written over itself while it is read from would be lost with the first failure.
void refuse_same_folder(const std::string& model, const std::string& output) {
  std::error_code code;
  if (!model.empty() && fs::equivalent(model, output, code))
    throw Error(output + ": the model that is started from; give another --output");
}

struct RunSettings {
  std::string output;
  bool resume = false, overwrite = false;
  int64_t save_every = 0, keep = 2;  // save_every 0: every five minutes
};
bool take_overwrite(Args& a) { return a.take_switch("overwrite", "write into a folder that holds files"); }
RunSettings take_run(Args& a, bool by_steps) {
  return {.output = a.need("output", "DIR", "the folder to write the model to"),
          .resume = a.take_switch("resume", "go on with the run in --output"),
          .overwrite = take_overwrite(a),
          .save_every = by_steps ? a.take_int("save-every", 0, 1, INT32_MAX, "steps; default: every five minutes") : 0,
          .keep = by_steps ? a.take_int("keep", 2, 1, 100, "training states kept") : 2};
}

// What a training command has beside its trainer: its folder, log.jsonl, report.html, the progress line, signals.
class Run {
 public:
  Named data;        // for the report
  std::string part;  // of the page, as HTML
  Numbers results;
  std::function<void()> save_model = [] {};
  std::function<About()> place = [] { return About(); };  // where the caller stands, stored with every state
  TrainingStates states;

  Run(std::string title, const RunSettings& s)
      : states(s.output, s.keep), title_(std::move(title)), s_(s), lock_(lock_output(s.output, s.resume, s.overwrite)) {
    catch_signals();
  }
  // Takes up the run that the folder holds, or begins anew: then empty.
  About take_up(Trainer& trainer, const Named& taken, const Fingerprint& data_fingerprint);
  void after_step(const StepReport& r);
  void evaluated(int64_t step, const Numbers& metrics) { add(json_object({{"step", to_string(step)}, {"dev", json_numbers(metrics)}})); }
  bool save_due(int64_t done) const { return s_.save_every ? done % s_.save_every == 0 : now() - saved_at_ > 300; }
  void save(const Trainer& trainer);
  void write_report();
  // Trains by `steps`, which returns false when a signal came first, and saves; an Error says what stands in the folder.
  template <class F>
  void guarded(const Trainer& trainer, F&& steps) {
    bool complete = false;
    try {
      complete = steps();
      if (!line_.empty()) progress_.show(line_, true);
      if (last_loss_ > 2 * first_loss_ && first_loss_ > 0)  // more than batches differ by
        say("bert: the loss rose from " + fixed(first_loss_, 4) + " to " + fixed(last_loss_, 4) +
            ": nothing was learned; lower --lr, or lengthen --warmup");
      state_ = complete ? "finished: " : "stopped by a signal: ";
      save(trainer);
    } catch (const Error& e) {
      state_ = std::string("stopped: ") + e.what() + "; before it ";
      try {
        write_report();
      } catch (const Error&) {  // the one before it is said
      }
      throw Error(e.what() + std::string(states.any() ? "; the state of the last save stands in " : "; nothing was saved yet in ") +
                  s_.output);
    }
    if (complete) return;
    say("bert: stopped by a signal after step " + to_string(trainer.done()) + " of " + to_string(trainer.settings().steps) +
        " and saved; go on with\n  " + command_line);
    throw Stopped{stop_signal};
  }

 private:
  std::string title_, line_, log_;  // log_: log.jsonl
  RunSettings s_;
  FolderLock lock_;
  Progress progress_;
  Named settings_;
  About fixed_;  // settings, data and machine: what a resumed run must share
  std::FILE* log_file_ = nullptr;
  double earlier_seconds_ = 0, begun_ = 0, saved_at_ = 0, window_began_ = 0;
  int64_t earlier_tokens_ = 0, tokens_ = 0, first_ = 0, window_steps_ = 0, saved_ = -1;
  Precision products_ = Precision::f32;
  double flops_ = 0, gemm_ = 0;      // of this process; GFLOP/s of this machine's gemm, once measured
  StepReport sum_;                   // since the last logged step
  std::string state_ = "running: ";  // and line_ stand at the top of the report
  double reported_at_ = 0;
  bool spike_said_ = false;
  double first_loss_ = 0, last_loss_ = 0;  // of this process's first and last logged step

  void open_log(int64_t step);
  void fault(const StepReport& r);
  void add(const std::string& object);
};

About Run::take_up(Trainer& trainer, const Named& taken, const Fingerprint& data_fingerprint) {
  settings_ = taken, products_ = trainer.settings().products;
  Fingerprint weights;
  for (const Parameter& p : trainer.model().parameters()) weights.add(std::span<const float>(p.data(), (size_t)p.shape().size()));
  fixed_ = {{"data", to_string(data_fingerprint.state)}, {"weights", to_string(weights.state)}, {"backend", backend_description()}};
  for (const auto& [name, value] : taken)
    if (!value.empty() && !among(name, kFreeSettings)) fixed_["--" + name] = value;
  About stored;
  if (s_.resume)
    stored = states.load(trainer, fixed_, [](const std::string& remark) { say("bert: " + remark); });
  else
    states.remove_all();
  if (!stored.empty()) {
    fixed_["backend"] = stored["backend"];
    trainer.set_steps(stored_number(stored, "steps"));
    saved_ = trainer.done();
  }
  if (s_.resume)
    note(stored.empty() ? "bert: nothing was saved yet in " + s_.output + "; beginning with the first step"
                        : "going on after step " + to_string(trainer.done()) + " of " + to_string(trainer.settings().steps));
  open_log(trainer.done());
  begun_ = saved_at_ = window_began_ = reported_at_ = now(), first_ = trainer.done();
  return stored;
}

// Keeps what was logged up to `step` and goes on behind it; 0: begins anew.
void Run::open_log(int64_t step) {
  const std::string path = s_.output + "/log.jsonl", old = step && fs::exists(path) ? read_file(path) : "";
  int64_t number = 1;
  for (size_t end; (end = old.find('\n', log_.size())) != old.npos; number++) {  // a last line cut short is dropped
    const std::string line = old.substr(log_.size(), end + 1 - log_.size());
    const Json v = Json::parse(line, path + " (line " + to_string(number) + ")");
    if (const Json* s = v.find("step"); !s || s->as_int(path) > step) break;
    if (const Json* s = v.find("seconds")) earlier_seconds_ = s->as_double(path);
    if (const Json* t = v.find("tokens")) earlier_tokens_ = t->as_int(path);
    log_ += line;
  }
  write_file(path, log_);
  log_file_ = std::fopen(path.c_str(), "ab");  // closed by the end of the process
  if (!log_file_) throw Error(path + ": cannot open: " + std::strerror(errno));
}

void Run::add(const std::string& object) {
  log_ += object + "\n";
  if (std::fputs((object + "\n").c_str(), log_file_) < 0 || std::fflush(log_file_))
    throw Error(s_.output + "/log.jsonl: cannot write: " + std::strerror(errno));
}

// A step that was left out, or the first spike that was not: said, and the former logged as an object of its own.
void Run::fault(const StepReport& r) {
  const std::string step = "step " + to_string(r.step) + (r.skipped ? " skipped: " : ": ") + r.fault;
  if (r.skipped)
    say(step), add(json_object({{"step", to_string(r.step)}, {"skipped", json_quote(r.fault)}}));
  else if (!spike_said_)
    spike_said_ = true, say(step + "; --skip-spikes leaves such steps out, and later ones are not said");
}

void Run::after_step(const StepReport& r) {
  const double t = now(), spent = t - begun_;
  if (!r.fault.empty()) fault(r);
  if (!r.skipped) {
    window_steps_++;
    sum_.tokens += r.tokens, sum_.rows += r.rows, sum_.masked += r.masked;
    sum_.loss.total += r.loss.total, sum_.loss.masked += r.loss.masked, sum_.loss.next_sentence += r.loss.next_sentence;
    sum_.loss.masked_right += r.loss.masked_right, sum_.loss.next_right += r.loss.next_right;
  }
  tokens_ += r.tokens, flops_ += r.flops;
  if (!gemm_ && spent > 2 && !quiet) gemm_ = gemm_now(products_);  // a run of a moment does not wait for it
  auto percent = [](double part, double whole) { return fixed(100 * part / whole, 1) + " % of "; };
  line_ = "step " + to_string(r.step) + "/" + to_string(r.steps) + (r.skipped ? "  skipped  " : "  loss " + fixed(r.loss.total, 4) + "  ") +
          (r.masked && !r.skipped ? percent((double)r.loss.masked_right, (double)r.masked) + "masked words  " : "") +
          grouped((int64_t)((double)tokens_ / spent)) + " tokens/s  " +
          (gemm_ ? percent(1e-9 * flops_ / spent, gemm_) + "gemm's peak  " : "") +
          (r.step < r.steps ? time_left(begun_, r.step - first_, r.steps - first_) : "in " + duration(spent));
  progress_.show(line_);
  if (t - reported_at_ > 20) write_report();

  // About a thousand logged steps whatever the run's length; each stands for the mean since the one before.
  if ((r.step % std::max<int64_t>(1, r.steps / 1000) && r.step != r.steps) || !window_steps_) return;
  const double n = (double)window_steps_;
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
  add(json_numbers(record));
  last_loss_ = sum_.loss.total / n;
  if (!first_loss_) first_loss_ = last_loss_;
  sum_ = StepReport(), window_steps_ = 0, window_began_ = t;
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

// ==== 8 report.html ===============================================================================================
// Self-contained: nothing from the network; one small script draws the curves from the log that stands in the page, and colours follow
// the reader's light or dark setting.
std::string html(std::string_view text) {
  std::string out;
  for (const char c : text) c == '<' ? out += "&lt;" : c == '&' ? out += "&amp;" : c == '"' ? out += "&quot;" : out += c;
  return out;
}

std::string html_section(const std::string& title, const std::string& rows) {
  return "<section><h2>" + html(title) + "</h2><table>" + rows + "</table></section>\n";
}
std::string html_table(const std::string& title, const Named& rows) {
  std::string out;
  for (const auto& [name, value] : rows)
    if (!value.empty()) out += "<tr><th>" + html(name) + "</th><td>" + html(value) + "</td></tr>";
  return html_section(title, out);
}

const char* const kReportHead =
    R"(<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><style>
:root{--ground:#fff;--card:#f6f7f9;--ink:#1c2330;--soft:#5d6675;--line:#dfe3e9;--train:#2f6fd6;--dev:#d9622b;--third:#2d8f5c}
@media(prefers-color-scheme:dark){
:root{--ground:#14171c;--card:#1d2129;--ink:#e6e9ee;--soft:#9aa4b2;--line:#333a45;--train:#6ea8ff;--dev:#ff9d66;--third:#63c995}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}h1{font-size:24px;margin:0}h2{font-size:15px;margin:0 0 8px}
.sub{color:var(--soft);margin:2px 0 20px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:16px;margin:0 0 16px}
figure,section,.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0;min-width:0}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 16px}
.tile b{display:block;font-size:21px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
figcaption{display:flex;flex-wrap:wrap;gap:4px 16px;align-items:center;margin:0 0 6px}figcaption span{color:var(--soft);font-size:13px}
i{display:inline-block;width:18px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;background:var(--c)}
svg{width:100%;height:auto;display:block;overflow:visible}text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
path{fill:none;stroke:var(--line)}path.curve{stroke:var(--c);stroke-width:2;stroke-linejoin:round}
path.raw{opacity:.28;stroke-width:1.2}circle{fill:var(--c)}
.tables{align-items:start}.tables>div{display:grid;gap:16px}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:3px 12px 3px 0;border-top:1px solid var(--line);text-align:left;vertical-align:top;font-weight:400}
tr:first-child>*{border-top:0}.part{display:grid;gap:16px}.part td:not(:last-child){overflow-wrap:normal}
th{color:var(--soft);white-space:nowrap}td{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
</style>)";

const char* const kReportScript = R"js(<script>
const log = document.getElementById('log').textContent.trim().split('\n').filter(Boolean).map(JSON.parse)
const steps = log.filter(r => r.loss != null), evaluations = log.filter(r => r.dev).map(r => ({step: r.step, ...r.dev}))
const number = v => +v.toPrecision(5) + '', round = v => Math.abs(v) < 1e4 ? number(v) : v.toLocaleString('en')
const skipped = log.filter(r => r.skipped).length, values = (rows, key) => rows.filter(r => r[key] != null).map(r => [r.step, r[key]])

function thin(p, most = 600) {  // the means of equal stretches
  if (p.length <= most) return p
  return Array.from({length: most}, (_, i) => {
    const part = p.slice(i * p.length / most, (i + 1) * p.length / most), mean = k => part.reduce((s, v) => s + v[k], 0) / part.length
    return [mean(0), mean(1)]
  })
}
function smooth(p) {  // a running mean whose memory is a thirtieth of the run
  const keep = Math.exp(-30 / Math.max(60, p.length))
  let sum = 0, weight = 0
  return p.map(([x, y]) => (sum = keep * sum + y, weight = keep * weight + 1, [x, sum / weight]))
}
function ticks(low, high, n) {  // multiples of 1, 2 or 5 times a power of ten
  const raw = (high - low) / n, unit = 10 ** Math.floor(Math.log10(raw))
  const step = unit * [1, 2, 5, 10].find(m => raw / unit < m * 1.45 || m == 10), first = Math.ceil(low / step)
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, i) => (first + i) * step)
}
function chart(title, series) {  // series: [name, colour, points, class]
  const all = series.flatMap(s => s[2])
  if (!all.length) return
  const range = k => all.reduce(([a, b], p) => [Math.min(a, p[k]), Math.max(b, p[k])], [Infinity, -Infinity])
  let [x0, x1] = range(0), [y0, y1] = range(1)
  const margin = (y1 - y0) * .06 || Math.abs(y0) * .1 || 1e-9
  if (x0 == x1) x0--, x1++
  y0 = y0 >= 0 ? Math.max(0, y0 - margin) : y0 - margin, y1 += margin
  const px = x => (58 + (x - x0) / (x1 - x0) * 570).toFixed(1), py = y => (226 - (y - y0) / (y1 - y0) * 214).toFixed(1)
  const legend = ([name, colour]) => name && `<span style="--c:var(--${colour})"><i></i>${name}</span>`
  const dot = (name, [x, y]) => `<circle r="3.5" cx="${px(x)}" cy="${py(y)}"><title>${name}, step ${x}: ${number(y)}</title></circle>`
  const curve = ([name, colour, points, kind]) => `<g style="--c:var(--${colour})"><path class="curve ${kind}" d="M` +
    points.map(p => px(p[0]) + ' ' + py(p[1])).join('L') + '"/>' + (kind == 'dots' ? points.map(p => dot(name, p)).join('') : '') + '</g>'
  const across = y => `<path d="M58 ${py(y)}H628"/><text x="50" y="${py(y)}" dy=".32em" text-anchor="end">${round(y)}</text>`
  const along = x => `<text x="${px(x)}" y="244" text-anchor="middle">${round(x)}</text>`
  document.getElementById('curves').innerHTML += `<figure><figcaption><b>${title}</b>` + series.map(legend).join('') +
    `</figcaption><svg viewBox="0 0 640 260" role="img" aria-label="${title}"><path d="M58 226H628" style="stroke:var(--soft)"/>` +
    ticks(y0, y1, 5).map(across).join('') + ticks(x0, x1, 6).map(along).join('') +
    '<text x="628" y="258" text-anchor="end">step</text>' + series.map(curve).join('') + '</svg></figure>'
}
function curves(title, key, dev) {
  const train = thin(values(steps, key)), many = train.length > 30
  const name = k => k == key ? 'held out' : k.replace('_loss', '') + ', held out'
  const held = dev.map((k, i) => [name(k), ['dev', 'third'][i], values(evaluations, k), 'dots'])
  const own = many ? [['', 'train', train, 'raw'], ['training, smoothed', 'train', smooth(train), '']] : [['training', 'train', train, '']]
  chart(title, [...own, ...held].filter(s => s[2].length))
}
const state = document.getElementById('state'), last = steps.at(-1), age = (Date.now() - Date.parse(document.lastModified)) / 60000
if (state.textContent.startsWith('running')) {
  if (age > 5) state.textContent += ` (as of ${Math.round(age)} minutes ago: killed since?)`
  setTimeout(() => location.reload(), 20000)
}
if (last) {
  const whole = v => Math.round(v).toLocaleString('en')
  document.getElementById('sub').textContent = `step ${whole(last.step)}, ${whole(last.tokens)} tokens, ` +
    `${(last.seconds / 60).toFixed(1)} minutes, ${whole(last.tokens_per_second)} tokens/s at the end` +
    (skipped ? `, ${skipped} steps skipped` : '')
  if ('mlm_loss' in last) {
    curves('Masked-word loss (nats)', 'mlm_loss', ['mlm_loss', 'unigram_loss'])
    curves('Masked-word accuracy', 'mlm_accuracy', ['mlm_accuracy'])
    if (last.nsp_loss) curves('Next-sentence loss (nats)', 'nsp_loss', ['nsp_loss'])
    if (last.nsp_loss) curves('Next-sentence accuracy', 'nsp_accuracy', ['nsp_accuracy'])
  } else {
    const names = Object.keys(evaluations[0] || {}).filter(k => k != 'step' && k != 'loss').slice(0, 2)
    curves('Loss', 'loss', ['loss']), curves('Held-out ' + names.join(' and '), '', names)
  }
  for (const [title, key] of [['Learning rate', 'lr'], ['Gradient norm', 'grad_norm']])
    chart(title, [['', 'train', thin(values(steps, key)), '']])
}
</script>)js";

void Run::write_report() {
  std::string page = kReportHead + std::string("<title>") + html(title_) + "</title></head><body><main><h1>" + html(title_) +
                     "</h1><p id=\"state\" class=\"sub\">" + html(state_ + line_) +
                     "</p><p id=\"sub\" class=\"sub\"></p><div class=\"tiles\">";
  for (const auto& [name, value] : results)
    page += "<div class=\"tile\"><b>" + fixed(value, 4) + "</b><span>" + html(name) + "</span></div>";
  page +=
      "</div><noscript>The curves need a script; their numbers stand in log.jsonl.</noscript><div id=\"curves\" class=\"grid\"></div>\n" +
      std::string("<div class=\"grid tables\"><div>") + html_table("Data", data) +
      html_table("Machine",
                 {{"processor", cpu_name()}, {"threads", to_string(threads())}, {"kernels", backend_description()}, {"bert", kVersion}}) +
      "</div>" + html_table("Settings", settings_) + "</div><div class=\"part\">" + part +
      "</div></main>\n<script type=\"application/x-ndjson\" id=\"log\">\n" + log_ + "</script>\n" + kReportScript + "</body></html>\n";
  write_file(s_.output + "/report.html", page);
  reported_at_ = now();
}

// ==== 9 vocab, tokenize ===========================================================================================
// Counts the words of all inputs; shows how far it is, by bytes where the inputs are files.
void count_words(VocabTrainer& trainer, const Source& source, Progress& progress) {
  int64_t total = 0, bytes = 0;
  for (const std::string& file : source.files) {
    std::error_code unknown;
    const auto size = fs::is_regular_file(file, unknown) ? fs::file_size(file, unknown) : 0;
    total = size && total >= 0 ? total + (int64_t)size : -1;
  }
  Rows rows(source);
  const double began = now();
  for (Row row; rows.next(row);) {
    trainer.add_text(row.text);
    if (row.pair) trainer.add_text(*row.pair);
    bytes += (int64_t)(row.text.size() + (row.pair ? row.pair->size() : 0)) + 1;
    if (rows.count() % 4096) continue;
    progress.show(grouped(rows.count()) + " lines, " + grouped(trainer.words()) + " words" +
                  (total > bytes ? ", " + time_left(began, bytes, total) : ""));
  }
  rows.report();
  if (!trainer.words()) nothing(source, "words; give files of text");
  if (trainer.dropped_count())
    note("bert: more different words than --max-memory holds: those seen up to " + counted(trainer.dropped_count(), "time") +
         " when it was full were dropped, so the order of the text matters; give more memory to keep them");
}

// Writes what `vocab` made: a folder with a vocabulary, or with a model that has rows for the new pieces.
void write_vocabulary(const std::string& output, const Strings& pieces, const TokenizerSettings& settings, const std::string& extend,
                      const WordPiece& old, ModelFolder* model) {
  std::map<std::string, std::string> files;
  if (model) files = model->carried, extend_rows(model->bert, old, pieces);
  if (!extend.empty()) files.merge(tokenizer_files(extend, old, 512));
  if (files.erase("tokenizer.json"))
    note("bert: " + extend + "/tokenizer.json is left behind: vocab.txt and tokenizer_config.json say it all");
  files.try_emplace("tokenizer_config.json", tokenizer_config_json(settings, 512));
  files["vocab.txt"] = join(pieces, "\n") + "\n";
  if (model) return save_folder(output, model->bert, files);
  for (const char* name : {"tokenizer.json", "special_tokens_map.json"})  // of a vocabulary that was here before
    if (!files.count(name)) fs::remove(output + "/" + name);
  for (const auto& [name, bytes] : files) write_file(output + "/" + name, bytes);
}

void cmd_vocab(Args& a) {
  Common common(a);
  Source source = take_source(a);
  source.raw = true;
  const std::string output = a.need("output", "DIR", "the folder to write vocab.txt to");
  VocabTrainer::Options options;
  options.size = a.take_int("size", 0, 10, 10000000, "the number of pieces, for example 8000");
  options.min_count = a.take_int("min-count", 2, 1, INT32_MAX, "a piece must occur so often");
  options.alphabet = a.take_int("alphabet", 0, 0, INT32_MAX, "characters at most; default: all seen min-count times, up to half of --size");
  TokenizerSettings settings;
  settings.lowercase = !a.take_switch("cased", "keep upper case");
  const int64_t max_memory = a.take_size("max-memory", "2G", "for the words; beyond, the rarest are dropped");
  const std::string extend = a.take("extend", "DIR", "add pieces to DIR's vocabulary, up to --size");
  const bool with_model = a.take_switch("model", "and rows to its model"), overwrite = take_overwrite(a);
  a.done();
  if (!options.size) a.fail("--size is missing: the number of pieces, for example 8000");
  a.exclude("extend", "cased"), a.needs("model", "extend");

  std::optional<ModelFolder> model;
  if (with_model) model = open_model(extend, false);
  const WordPiece old = extend.empty() ? WordPiece() : model ? model->tokenizer : open_tokenizer(extend);
  if (!extend.empty()) settings = old.settings(), options.extend = &old;
  if (!with_model && fs::exists(output + "/model.safetensors"))
    throw Error(output + ": holds a model, whose rows belong to its own vocabulary; give another --output");
  const FolderLock lock = lock_output(output, {}, overwrite);
  VocabTrainer trainer(settings, max_memory);
  Progress progress;
  count_words(trainer, source, progress);
  const double began = now();
  const int64_t first = extend.empty() ? 0 : old.size();
  options.on_progress = [&](int64_t pieces) {
    progress.show(grouped(pieces) + " of " + grouped(options.size) + " pieces, " + time_left(began, pieces - first, options.size - first));
  };
  options.on_left_out = [&](int64_t left_out, int64_t all) {
    note("bert: the alphabet has room for " + grouped(all - left_out) + " of " + grouped(all) + " characters; the rarer " +
         grouped(left_out) + " become [UNK]; " +
         (options.alphabet ? "say a larger --alphabet to keep them"
                           : "ask for a --size of " + to_string(options.size + 2 * left_out + 1) + " or more to keep them"));
  };
  const Strings pieces = trainer.train(options);
  write_vocabulary(output, pieces, settings, extend, old, model ? &*model : nullptr);
  note(output + "/vocab.txt: " + grouped((int64_t)pieces.size()) + " pieces from " + grouped(trainer.words()) + " words, " +
       grouped(trainer.distinct_words()) + " of them different");
  if ((int64_t)pieces.size() < options.size)
    note("bert: fewer pieces than --size " + to_string(options.size) + ": nothing else occurs --min-count " + to_string(options.min_count) +
         " times");
}

// What `tokenize` does to a text.
struct Tokenization {
  Args& a;
  enum To { pieces, ids, jsonl };
  const std::string vocab = a.need("vocab", "DIR-or-FILE", "a model folder or a vocab.txt");
  const To to = (To)a.take_choice("to", {"pieces", "ids", "jsonl"});
  const bool words = a.take_switch("split-words", "the text is a list of words"), chars = a.take_choice("offsets", {"bytes", "chars"});
  const bool cased = a.take_switch("cased", "keep upper case, whatever the folder says");
  const int accents = a.take_choice("strip-accents", {"the folder's", "yes", "no", "auto"});
  const std::optional<bool> chinese = a.take_yes_no("chinese", "spaces around Chinese characters");
  const std::optional<bool> clean = a.take_yes_no("clean", "control characters go, white space becomes a space");
  const EncodeOptions encode = {.add_special = !a.take_switch("no-special", "without [CLS] and [SEP]"),
                                .parse_special = !a.take_switch("plain-special", "[MASK] in the text is plain text"),
                                .max_length = a.take_int("max-length", 0, 1, INT32_MAX, "tokens of a text"),
                                .truncation = (Truncation)a.take_choice("truncation", {"longest_first", "only_first", "only_second"}),
                                .from_left = a.take_choice("side", {"right", "left"}, "which is cut") == 1,
                                .stride = a.take_int("stride", 0, 0, INT32_MAX, "all of a text, in windows that share N tokens")};
  const bool windows = a.given("stride");
  const bool stats = a.take_switch("stats", "only counts: by script, and the characters that the vocabulary lacks");
  const bool decode = a.take_switch("decode", "ids in, text out"),
             skip_special = a.take_switch("skip-special", "then without [CLS] and its like");
  const bool cleanup = a.take_choice("cleanup", {"yes", "no"}, "then no space before punctuation") == 0;

  void check(Format format) const {
    const std::string length = "--max-length " + to_string(encode.max_length), stride = "--stride " + to_string(encode.stride);
    if (encode.add_special && encode.max_length && encode.max_length < 3)
      a.fail(length + ": no room beside [CLS] and [SEP]; at least 3, or --no-special");
    if (encode.stride && !encode.max_length) a.fail("--stride needs --max-length");
    // As the reference, which leaves room for [CLS] and [SEP] even where they are not added.
    if (const int64_t most = encode.max_length - (encode.add_special ? 3 : 2); encode.stride > std::max<int64_t>(most, 0))
      a.fail(stride + ": not smaller than the windows of " + length + (most > 0 ? "; at most " + to_string(most) : "; give a larger one"));
    for (const char* name : {"to", "stats", "offsets", "split-words", "max-length", "stride"}) a.exclude("decode", name);
    a.needs("skip-special", "decode"), a.needs("cleanup", "decode"), a.needs("truncation", "max-length"), a.needs("side", "max-length");
    if (chars && to != jsonl) a.fail("--offsets is for --to jsonl, which prints them");
    a.exclude("stats", "to");
    if (decode ? format && format != kIds : format == kIds) a.fail("--decode takes --format ids, and nothing else does");
  }
};

WordPiece tokenizer_of(const Tokenization& o) {
  const WordPiece t = open_tokenizer(o.vocab);
  TokenizerSettings s = t.settings();
  if (o.cased) s.lowercase = false;
  if (o.accents) s.strip_accents = o.accents == 3 ? std::nullopt : std::optional<bool>(o.accents == 1);
  s.chinese = o.chinese.value_or(s.chinese), s.clean_text = o.clean.value_or(s.clean_text);
  return t.with_settings(s);
}

// Code points in front of a byte of the text.
int64_t code_points(std::string_view text, int64_t bytes) {
  return std::count_if(text.begin(), text.begin() + bytes, [](char c) { return (c & 0xC0) != 0x80; });
}

// Offsets counted in code points of the text, or of each given word.
void offsets_in_chars(Encoding& e, const Row& row, bool split_words) {
  if (!split_words) return void(e.offsets = code_point_offsets(e, row.text, row.pair.value_or("")));
  for (size_t i = 0; i < e.ids.size(); i++)
    for (int64_t& at : e.offsets[i]) {
      if (e.special[i]) continue;
      const std::string& word = (e.sequence[i] ? row.pair_words : row.words)[e.words[i]];
      at = code_points(word, at);
    }
}

std::string encoding_json(const WordPiece& t, const Encoding& e) {
  Strings tokens, offsets, words;
  for (size_t i = 0; i < e.ids.size(); i++) {
    tokens.push_back(json_quote(t.piece(e.ids[i])));
    offsets.push_back("[" + to_string(e.offsets[i][0]) + "," + to_string(e.offsets[i][1]) + "]");
    words.push_back(e.words[i] < 0 ? "null" : to_string(e.words[i]));
  }
  return json_object({{"tokens", json_list(tokens)},
                      {"ids", json_list(e.ids)},
                      {"type_ids", json_list(e.type_ids)},
                      {"special", json_list(e.special)},
                      {"offsets", json_list(offsets)},
                      {"words", json_list(words)}});
}

struct TokenCounts {
  struct Script {
    double words = 0, pieces = 0, unknown = 0;
    void add(const Script& s) { words += s.words, pieces += s.pieces, unknown += s.unknown; }
  };
  int64_t texts = 0, tokens = 0, longest = 0;
  std::map<std::string, Script> scripts;    // by a word's first letter
  std::map<std::string, int64_t> suspects;  // letters of unknown words

  void add(const WordPiece& t, const Encoding& e, const Row& row) {
    Script* script = nullptr;
    tokens += (int64_t)e.ids.size(), longest = std::max(longest, (int64_t)e.ids.size());
    for (size_t i = 0; i < e.ids.size(); i++) {
      if (e.special[i]) continue;
      const Strings& given = e.sequence[i] ? row.pair_words : row.words;
      const std::string& text = !given.empty() ? given[e.words[i]] : e.sequence[i] ? *row.pair : row.text;
      const std::string_view source = std::string_view(text).substr(e.offsets[i][0], e.offsets[i][1] - e.offsets[i][0]);
      const bool begins = !i || e.words[i] != e.words[i - 1] || e.sequence[i] != e.sequence[i - 1], unknown = e.ids[i] == t.unk;
      size_t n;
      if (begins) script = &scripts[script_of(code_point(source, 0, n))];
      script->add({(double)begins, 1, (double)unknown});
      for (size_t at = 0; unknown && at < source.size(); at += n) code_point(source, at, n), suspects[std::string(source.substr(at, n))]++;
    }
  }
  void add(const TokenCounts& c) {
    texts += c.texts, tokens += c.tokens, longest = std::max(longest, c.longest);
    for (const auto& [name, script] : c.scripts) scripts[name].add(script);
    for (const auto& [letter, n] : c.suspects) suspects[letter] += n;
  }
  std::string report(const WordPiece& t) const;
};

// All words, then each script's, commonest first, then the characters that the vocabulary lacks, by the words that they make unknown.
std::string TokenCounts::report(const WordPiece& t) const {
  Script all;
  std::multimap<double, Numbers> by_script, lacking;  // by their counts, negative, so that the commonest come first
  for (const auto& [name, s] : scripts) {
    all.add(s);
    by_script.emplace(-s.words, Numbers{{name + "_words", s.words},
                                        {name + "_pieces_per_word", s.pieces / s.words},
                                        {name + "_unknown_rate", s.unknown / s.words}});
  }
  for (const auto& [letter, count] : suspects) {
    std::vector<int32_t> ids;
    size_t n;
    t.append_ids(letter, ids), t.append_ids("a" + letter, ids);
    char code[16];
    std::snprintf(code, sizeof code, "U+%04X ", (unsigned)code_point(letter, 0, n));
    if (std::find(ids.begin(), ids.end(), t.unk) != ids.end())
      lacking.emplace(-count, Numbers{{"unknown_character " + (code + letter), (double)count}});
  }
  std::string out = figures({{"texts", (double)texts},
                             {"words", all.words},
                             {"tokens", (double)tokens},
                             {"tokens_per_text", (double)tokens / (double)std::max<int64_t>(1, texts)},
                             {"unknown", all.unknown},
                             {"longest", (double)longest}});
  for (const auto& [count, numbers] : by_script) out += figures(numbers);
  for (int left = 20; const auto& [count, numbers] : lacking)
    if (left-- > 0) out += figures(numbers);
  return out;
}

// Ids, or their pieces, joined by spaces.
void append_tokens(const WordPiece& t, std::span<const int32_t> ids, Tokenization::To to, std::string& out) {
  if (to == Tokenization::pieces) return t.append_pieces(ids, out);
  const size_t before = out.size();
  out.resize(before + ids.size() * 12);
  char *const begin = out.data() + before, *at = begin;
  for (const int32_t id : ids) at = std::to_chars(at, at + 11, id).ptr, *at++ = ' ';
  out.resize(before + (size_t)(at - begin) - !ids.empty());
}

// Writes the lines of a text's encodings to `out`, or only counts.
void tokenize_row(const WordPiece& t, const Row& row, const Tokenization& o, std::string& out, TokenCounts& counts) {
  if (!o.stats && o.to != Tokenization::jsonl && !o.windows && !o.words && !row.pair) {  // ids or pieces, and nothing else
    thread_local std::vector<int32_t> ids;
    ids.clear(), t.append_ids(row.text, ids, o.encode);
    return append_tokens(t, ids, o.to, out), void(out += '\n');
  }
  const std::optional<std::string_view> pair = row.pair ? std::optional<std::string_view>(*row.pair) : std::nullopt;
  std::vector<Encoding> windows = o.words ? t.encode_words_windows(row.words, row.pair_words, row.pair.has_value(), o.encode)
                                          : t.encode_windows(row.text, pair, o.encode);
  if (!o.windows) windows.resize(1);
  counts.texts++;
  for (Encoding& e : windows) {
    if (o.stats) {
      counts.add(t, e, row);
      continue;
    }
    if (o.chars) offsets_in_chars(e, row, o.words);
    if (o.to == Tokenization::jsonl)
      out += encoding_json(t, e);
    else
      append_tokens(t, e.ids, o.to, out);
    out += '\n';
  }
}

// Texts to pieces, or to the counts of all.
void tokenize_rows(const WordPiece& t, const Source& source, const Tokenization& o, Results& out) {
  TokenCounts total;
  Rows rows(source);
  std::vector<Row> chunk, next;
  Strings lines;
  for (bool more = read_chunk(rows, chunk, 4096); more; chunk.swap(next)) {
    // Threads that have worked off a chunk would wait for the next, so it is read meanwhile; not where that is still to come.
    const bool meanwhile = threads() > 1 && !rows.waits();
    auto reading = std::async(meanwhile ? std::launch::async : std::launch::deferred, [&] { return read_chunk(rows, next, 4096); });
    constexpr int64_t kPiece = 32;  // rows that one task works off
    lines.resize(chunk.size() / kPiece + 1);
    for (std::string& text : lines) text.clear();
    std::vector<TokenCounts> counts(lines.size());
    parallel_each((int64_t)chunk.size(), kPiece, [&](int64_t i) {
      try {
        tokenize_row(t, chunk[i], o, lines[i / kPiece], counts[i / kPiece]);
      } catch (const Error& e) { throw Error(chunk[i].where + ": " + e.what()); }
    });
    for (const TokenCounts& c : counts) total.add(c);
    for (const std::string& text : lines) out.write(text);
    if (!meanwhile) out.flush();
    more = reading.get();
  }
  rows.report();
  if (o.stats) out.write(total.report(t));
}

// Ids to text.
void decode_rows(const WordPiece& t, const Source& source, const Tokenization& o, Results& out) {
  Rows rows(source);
  for (Row row; rows.next(row);) {
    const int32_t largest = *std::max_element(row.ids.begin(), row.ids.end());
    if (largest < t.size())
      out.line(t.decode(row.ids, o.skip_special, o.cleanup));
    else
      rows.bad(row.where, "token id " + to_string(largest) + ", but the vocabulary has ids 0 to " + to_string(t.size() - 1));
  }
  rows.report();
}

void cmd_tokenize(Args& a) {
  Common common(a);
  Source source = take_source(a);
  Results out(a);
  const Tokenization o{a};
  a.done();
  o.check(source.format);
  source.word_lists = o.words, source.keep_bytes = true;
  if (o.decode) source.format = kIds;
  const WordPiece t = tokenizer_of(o);
  if (o.decode)
    decode_rows(t, source, o, out);
  else
    tokenize_rows(t, source, o, out);
  out.finish();
}

// ==== 10 pretrain =================================================================================================
// The options that both kinds of training share.
TrainSettings take_training(Args& a, const Common& common, double lr, int64_t steps = 0) {
  TrainSettings t;
  t.steps = steps;
  t.accumulate = a.take_int("accumulate", 1, 1, 1 << 20, "batches a step, a power of two");
  if (t.accumulate & (t.accumulate - 1)) a.fail("--accumulate " + to_string(t.accumulate) + ": a power of two is wanted");
  t.lr = a.take_number("lr", lr, 0., 10., "peak rate");
  t.warmup = a.take_number("warmup", 0.1, 0., 1., "share of the steps");
  t.schedule = (Schedule)a.take_choice("schedule", {"linear", "cosine", "constant"});
  t.optimizer.google = a.take_choice("optimizer", {"adamw", "google"});
  if (t.optimizer.google) t.optimizer.eps = 1e-6f;
  t.optimizer.weight_decay = (float)a.take_number("weight-decay", 0.01, 0., 10., "");
  t.clip = a.take_number("clip", 1.0, 0., 1e9, "global norm; 0: none");
  t.dropout = (float)a.take_number("dropout", -1., 0., 0.99, "default: the config's");
  t.recompute = a.take_switch("recompute", "a third more time, much less memory");
  t.products = common.precision.value_or(Precision::f32);
  t.seed = common.seed;
  return t;
}

std::string shards_beside(std::string output) {
  while (output.size() > 1 && output.ends_with('/')) output.pop_back();
  return output + ".shards";
}

// --phases 128:0.9,512:0.1: lengths that rise, and shares of the steps. Empty when it is not given.
std::vector<Phase> take_phases(Args& a) {
  const std::string text = a.take("phases", "128:0.9,512:0.1", "instead: of each length so large a share of the steps");
  std::vector<Phase> phases;
  double all = 0;
  for (const std::string& part : a.given("phases") ? split(text, ',') : Strings()) {
    const size_t colon = std::min(part.find(':'), part.size());
    const auto length = parse_number<int64_t>(part.substr(0, colon));
    const auto share = parse_number<double>(part.substr(std::min(colon + 1, part.size())));
    if (!length || !share || *length < 8 || *length > 1 << 20 || !(*share > 0))
      a.fail("--phases " + text + ": '" + part + "' is no phase; a length from 8 on, a colon and a share of the steps are wanted");
    if (!phases.empty() && *length <= phases.back().max_length)
      a.fail("--phases " + text + ": the short rows come first, the long ones last");
    phases.push_back({*length, *share}), all += *share;
  }
  if (!phases.empty() && std::fabs(all - 1) > 1e-6) a.fail("--phases " + text + ": the shares make " + exact(all) + ", not 1");
  return phases;
}

// A pretraining run: its options, taken in this order, and what is made from them.
struct Pretraining {
  Args& a;
  const Common& common;
  const Source input = take_source(a);
  const std::string init = a.take("init", "DIR", "go on from a model, instead of --config");
  const std::string vocab = a.need("vocab", "DIR", "a folder that bert vocab wrote, or a model's", init);
  const std::string config_name = a.take("config", "NAME", "tiny, mini, small, medium, base or a config.json");
  const std::optional<Source> dev_input = take_like(a, "dev", input, "held-out text");
  const double dev_split = a.take_number("dev-split", 0.01, 0., 0.5, "or so much of the input: up to 100,000 tokens, of whole documents");
  const RunSettings run = take_run(a, true);
  const double minutes = a.take_number("minutes", 0., 0.01, 1e6, "instead of --steps: as many as fit");
  const TrainSettings train = take_training(a, common, 1e-4, a.take_int("steps", 0, 1, INT32_MAX, "of the whole run"));
  PretrainSettings data = {.batch_tokens = a.take_int("batch-tokens", 8192, 16, 1 << 30, "tokens of a batch"),
                           .max_length = a.take_int("max-length", 0, 8, 1 << 20, "tokens of a row; default: 128"),
                           .mask = a.take_number("mask", 0.15, 0.001, 0.9, "share of tokens"),
                           .whole_word = a.take_switch("whole-word", "mask whole words"),
                           .next_sentence = !a.take_switch("no-nsp", "no next-sentence task: rows of whole sentences")};
  std::vector<Phase> phases = take_phases(a);
  const std::string cache = a.take("cache", "DIR", "of the text's ids, made once for all runs", shards_beside(run.output));
  const std::string dump = a.take("dump-batches", "FILE", "every batch as jsonl");
  const bool dry_run = a.take_switch("dry-run", "say sizes and memory, train nothing");
  const bool skip_spikes = a.take_switch("skip-spikes", "leave out steps whose loss jumps or is no number; 20 in a row stop");

  WordPiece tokenizer = {};
  Config config = {};
  std::optional<Shards> text = {};
  Corpus dev = {};

  void check() const {
    if (config_name.empty() && init.empty()) a.fail("--config is missing: tiny, mini, small, medium, base or a config.json");
    a.exclude("config", "init"), a.exclude("dev", "dev-split"), a.exclude("resume", "overwrite"), a.exclude("max-length", "phases");
    if (cache.empty()) a.fail("--cache is empty: a folder is wanted");
    if ((train.steps > 0) == (minutes > 0)) a.fail("--steps or --minutes is wanted, one of them");
  }
  void read();
  Bert model() const {
    const Task task = data.next_sentence ? Task::pretrain : Task::mlm;
    return init.empty() ? Bert::random(config, task, train.seed) : load_folder_for(init, task, {}, train.seed).bert;
  }
  PretrainSampler sampler() const { return PretrainSampler(*text, data, mask_vocabulary(tokenizer), train.seed); }
  Numbers scores(const Bert& bert, int64_t max_length) const {
    PretrainSettings now = data;
    now.max_length = max_length;
    const PretrainScores s = evaluate_pretraining(bert, dev, now, mask_vocabulary(tokenizer), train.seed, text->counts());
    Numbers list = {{"mlm_loss", s.masked_loss}, {"unigram_loss", s.unigram_loss}, {"mlm_accuracy", s.masked_accuracy}};
    if (data.next_sentence) list.insert(list.end(), {{"nsp_loss", s.next_loss}, {"nsp_accuracy", s.next_accuracy}});
    return list;
  }
};

std::string corpus_size(const TextSize& s) {
  return counted(s.tokens, "token") + ", " + counted(s.sentences, "sentence") + ", " + counted(s.documents, "document");
}

// What the ids of a text depend on. Nothing for a pipe: it cannot be read twice, so the shards of one are made anew each time.
std::optional<uint64_t> text_key(const Source& source, const std::map<std::string, std::string>& tokenizer) {
  Fingerprint key;
  for (const auto& [name, bytes] : tokenizer) key.bytes(name), key.bytes(bytes);
  key.bytes(source.columns), key.number(source.header), key.number(source.skip_bad);
  for (const std::string& file : source.files) {
    key.number(source.format ? source.format : format_of(file));
    if (!fs::is_regular_file(file) || !key.file(file)) return {};
  }
  return key.state;
}

// The text in shards: those that stand there, and what is missing behind them. Closed ones outlive whatever stops us.
Shards make_shards(const Source& source, const WordPiece& tokenizer, const std::string& folder, std::optional<uint64_t> key,
                   int64_t pieces) {
  Shards shards(folder, key, pieces);
  if (shards.whole()) return shards;
  if (shards.stale()) note("bert: " + folder + ": shards of another text, vocabulary, settings or version; they are made again");
  if (shards.rows()) note(folder + ": going on after " + counted(shards.size().tokens, "token"));
  Corpus part;
  Progress progress;
  const int64_t rows = read_text(source, tokenizer, shards.rows(), part, [&](int64_t row) {
    if (part.size().tokens < Shards::kTokens) return;
    shards.add(part, row, false), part = Corpus();
    progress.show(folder + ": " + counted(shards.size().tokens, "token"));
  });
  if (part.ids.empty() && !shards.rows()) nothing(source, kNoText);
  shards.add(part, rows, true);
  return shards;
}

// Another vocabulary's ids would mean other words than the rows of the model that --init names.
void check_vocabulary(const std::string& init, const std::string& vocab, const WordPiece& t) {
  const WordPiece own = WordPiece::load(init);
  for (int32_t id = 0; id < (int32_t)std::max(t.size(), own.size()); id++)
    if (id >= t.size() || id >= own.size() || t.piece(id) != own.piece(id))
      throw Error(vocab + ": not the vocabulary of " + init + " (they part at id " + to_string(id) + "); leave --vocab out");
}

// Reads vocabulary, shape and text, and sees that they fit together.
void Pretraining::read() {
  check_output(run.output, run.resume, run.overwrite);  // before the long part
  refuse_same_folder(init, run.output);
  tokenizer = open_tokenizer(vocab);
  const WordPiece& t = tokenizer;
  if (t.cls < 0 || t.sep < 0 || t.mask < 0)
    throw Error(vocab + ": [CLS], [SEP] or [MASK] is missing in the vocabulary; pretraining needs them");
  if (!init.empty()) check_folder(init), check_vocabulary(init, vocab, t);
  const std::string file = init.empty() ? config_name : init + "/config.json";
  config = (fs::exists(file) && !fs::is_directory(file)) || file.ends_with(".json") ? open_config(file) : Config::named(file, t.size());
  if (config.vocab_size < t.size())
    throw Error(vocab + ": " + to_string(t.size()) + " pieces, but the model has room for " + to_string(config.vocab_size) +
                "; give the model's own vocabulary, or a config.json with vocab_size " + to_string(t.size()));
  if (phases.empty()) phases = {{length_limit(data.max_length, config), 1}};
  if (const int64_t longest = phases.back().max_length; longest > config.max_position_embeddings)
    throw Error("--phases: rows of " + to_string(longest) + ", but the model has only " + to_string(config.max_position_embeddings) +
                " positions; give less");
  data.max_length = phases[0].max_length;
  const double began = now();
  text.emplace(make_shards(input, t, cache, text_key(input, tokenizer_files(vocab, t, 0)), config.vocab_size));
  if (dev_input)
    dev = read_corpus(*dev_input, t);
  else if (dev_split > 0)
    dev = text->hold_out(dev_split, train.seed);
  if (data.next_sentence && dev.size().documents == 1)
    throw Error((dev_input ? dev_input->files[0] : "--dev-split") +
                ": next-sentence pairs need at least two held-out documents (a blank line between them), there is one; or pass --no-nsp");
  if (text->in_stretches()) note("held out are stretches of sentences: the documents are too few or too long to take whole ones");
  note("text: " + corpus_size(text->size()) + "; held out: " + corpus_size(dev.size()) + "; read in " + duration(now() - began));
}

// Evaluations of so many steps: as many as cost some 5 % of the training (forward alone is a third of a step), between 1 and 20.
int64_t evaluations(const Pretraining& p, double steps) {
  const double trained = steps * (double)(p.data.batch_tokens * p.train.accumulate);
  return std::clamp<int64_t>((int64_t)(0.15 * trained / std::max<double>(1, (double)p.dev.ids.size())), 1, 20);
}

// The number of steps that fit into the minutes, from the time of the first ones, made on a model of their own.
int64_t steps_in_minutes(const Pretraining& p) {
  const double began = now(), seconds = p.minutes * 60;
  TrainSettings settings = p.train;
  settings.steps = 100 * (int64_t)p.phases.size();
  Trainer trainer(p.model(), settings);
  double step_seconds = 0;
  for (const Phase& phase : p.phases) {
    StepBatches batches(p.sampler(), {phase}, p.train.accumulate, 0, 100);
    std::vector<double> took;
    const double enough = now() + std::min(20.0, seconds * 0.03) / (double)p.phases.size();
    while (took.size() < 4 || (now() < enough && took.size() < 100)) {
      const double t = now();
      trainer.step(batches.next().micro);
      took.push_back(now() - t);
    }
    took.erase(took.begin());  // the first one also takes its memory from the system
    step_seconds += phase.share * median(took);
  }
  const double steps = (seconds - (now() - began)) / step_seconds, tokens = (double)(p.data.batch_tokens * p.train.accumulate);
  const double evaluated = (double)evaluations(p, steps) * (double)p.dev.ids.size() / 3 / tokens;  // in steps
  return std::max<int64_t>(1, (int64_t)(0.98 * steps * steps / (steps + evaluated)));              // 2 %: saves
}

std::string batch_json(const Batch& b, int64_t step, size_t micro) {
  return json_object({{"step", to_string(step)},
                      {"micro", to_string(micro)},
                      {"ids", json_list(b.ids)},
                      {"segments", json_list(b.segments)},
                      {"offsets", json_list(b.offsets)},
                      {"masked", json_list(b.masked)},
                      {"masked_labels", json_list(b.masked_labels)},
                      {"labels", json_list(b.labels)}});
}

// A folder that goes when all is said, also by an error; "": none.
struct RemovedAtEnd {
  const std::string folder;
  ~RemovedAtEnd() {
    std::error_code code;
    if (!folder.empty()) fs::remove_all(folder, code);
  }
};

void dry_run(const Pretraining& p) {
  const int64_t parameters = p.model().parameter_count(), gradients = (int64_t)std::bit_width((uint64_t)p.train.accumulate);
  print({{"parameters", (double)parameters},
         {"tokens", (double)p.text->size().tokens},
         {"tokens_dev", (double)p.dev.ids.size()},
         {"pieces", (double)p.tokenizer.size()},
         {"steps", (double)p.train.steps},
         {"gradients", (double)gradients}});
  const auto masked = (int64_t)std::ceil(p.data.mask * (double)p.data.batch_tokens);
  const MemoryUse use = training_memory(p.model(), p.train, p.data.batch_tokens, masked);
  Numbers kinds = {{"weights", use.weights},         {"gradients", use.gradients}, {"moments", use.moments},
                   {"activations", use.activations}, {"buffers", use.buffers},     {"all", use.total()}};
  for (auto& [name, bytes] : kinds) name += "_MiB", bytes /= 1 << 20;
  print(kinds);
}

// The steps from where the trainer stands to the end; false when a signal came first.
bool pretrain_steps(const Pretraining& p, Trainer& trainer, PretrainSampler::Place& place, Run& run) {
  const int64_t steps = trainer.settings().steps;
  const int64_t evaluate_every = std::max<int64_t>(1, steps / evaluations(p, (double)steps));
  std::ofstream dump;
  if (!p.dump.empty()) dump.open(p.dump, trainer.done() ? std::ios::app : std::ios::trunc);
  Numbers last;  // evaluation
  auto scores = [&] { return p.scores(trainer.model(), max_length_at(p.phases, std::max<int64_t>(0, trainer.done() - 1), steps)); };
  PretrainSampler sampler = p.sampler();
  sampler.go_to(place);
  StepBatches batches(std::move(sampler), p.phases, p.train.accumulate, trainer.done(), steps);
  while (trainer.done() < steps && !stop_signal) {
    const auto [micro, after] = batches.next();
    for (size_t i = 0; i < micro.size() && !p.dump.empty(); i++)
      if (!(dump << batch_json(micro[i], trainer.done() + 1, i) << std::endl)) throw Error(p.dump + ": cannot write");
    run.after_step(trainer.step(micro));
    place = after;
    const int64_t done = trainer.done();
    if (!p.dev.ids.empty() && (done % evaluate_every == 0 || done == steps)) last = scores(), run.evaluated(done, last);
    if (done < steps && run.save_due(done)) run.save(trainer);
  }
  if (trainer.done() < steps) return false;
  if (last.empty() && !p.dev.ids.empty()) last = scores();  // the run was complete already
  for (const auto& [name, value] : last)
    run.results.emplace_back((name.starts_with("mlm_") ? name.substr(4) : name) + "_dev", value);  // as evaluate names them
  return true;
}

void cmd_pretrain(Args& a) {
  Common common(a, Precision::bf16);
  Pretraining p{a, common};
  a.done();
  p.check();
  const RemovedAtEnd shards{p.dry_run && !a.given("cache") && !fs::exists(p.cache) ? p.cache : ""};
  p.read();
  p.sampler();  // so that text that does not do is refused before anything is written
  if (p.dry_run) return dry_run(p);
  Run run("Pretraining " + (p.init.empty() ? p.config_name : p.init), p.run);
  TrainSettings settings = p.train;
  settings.skip_spikes = p.skip_spikes;
  if (!settings.steps && !(p.run.resume && run.states.any())) settings.steps = steps_in_minutes(p);
  Trainer trainer(p.model(), settings);

  Fingerprint fingerprint;
  fingerprint.number(p.text->fingerprint()), fingerprint.add(p.dev.ids), fingerprint.add(p.dev.sentences), fingerprint.add(p.dev.documents);
  const About stored = run.take_up(trainer, a.taken(), fingerprint);
  PretrainSampler::Place place;  // behind the last step made
  const std::pair<const char*, int64_t&> places[] = {
      {"epoch", place.epoch}, {"window", place.window}, {"batch", place.batch}, {"max_length", place.max_length}};
  for (const auto& [name, number] : places) number = stored.empty() ? 0 : stored_number(stored, name);
  run.place = [&] {
    About about;
    for (const auto& [name, number] : places) about[name] = to_string(number);
    return about;
  };
  const auto carried = tokenizer_files(p.vocab, p.tokenizer, p.config.max_position_embeddings);
  run.save_model = [&] { save_folder(p.run.output, trainer.model(), carried); };
  run.data = {{"training text", corpus_size(p.text->size())},
              {"held-out text", corpus_size(p.dev.size())},
              {"vocabulary", grouped(p.tokenizer.size()) + " pieces"},
              {"model", model_size(trainer.model())}};

  run.guarded(trainer, [&] { return pretrain_steps(p, trainer, place, run); });
  print(run.results);
  note(p.run.output + ": the model; curves in " + p.run.output + "/report.html; peak memory " + fixed(peak_mib(), 0) + " MiB");
}

// ==== 11 finetune =================================================================================================
// The next rows, at most `most`; false: there are none. Of training data the names of their labels, else these as numbers.
// pairs: what those of similarity must hold.
bool next_labelled(Rows& rows, const Labels& labels, size_t most, LabelledSet& set, std::vector<Strings>* of_training = nullptr,
                   std::optional<PairLoss> pairs = {}) {
  set = {};
  for (Row row; set.items.size() < most && rows.next(row);) try {
      Strings names;
      Gold gold = make_gold(row, row.told, labels, !of_training, names);
      if (pairs) check_partner(row, gold, *pairs);
      set.golds.push_back(std::move(gold));
      if (of_training)
        of_training->push_back(std::move(names));
      else
        labels.put_in(set.golds.back(), names);
      if (labels.task == Task::tag) row.text.clear();
      set.items.push_back(std::move(static_cast<Item&>(row)));
    } catch (const Error& e) { rows.bad(row.where, e.what()); }
  return !set.items.empty();
}

constexpr const char* kNoLabelled = "labelled text; give a file with some";

// All of them. Training data is told the labels of the model that it starts from.
LabelledSet read_labelled(Source source, Labels& labels, const Strings* of_model = nullptr, std::optional<PairLoss> pairs = {}) {
  source.labels = true, source.training = of_model != nullptr, source.task = labels.task;
  LabelledSet set;
  Rows rows(source);
  std::vector<Strings> names;
  const bool any = next_labelled(rows, labels, SIZE_MAX, set, of_model ? &names : nullptr, pairs);
  rows.report();
  if (!any) nothing(source, kNoLabelled);
  if (of_model && labels.named()) labels.learn(names, *of_model);
  for (size_t i = 0; i < names.size(); i++) labels.put_in(set.golds[i], names[i]);
  return set;
}

const Strings kTasks = {"classify", "multilabel", "regress", "tag", "qa", "choice", "similarity"};
Task take_task(Args& a) {
  const std::string& name = kTasks[(size_t)a.choice("task", a.need("task", "TASK", join(kTasks, ", ")), kTasks)];
  return name == "similarity" ? Task::embed : find_head(name)->task;
}
std::string task_name(Task task) { return task == Task::embed ? "similarity" : head_kind(task).name; }

constexpr size_t kItems = 2048;  // answered at once

void check_stride(const Args& a, int64_t stride, int64_t max_length) {
  if (a.given("stride") && stride > (max_length - 2) / 2)
    a.fail("--stride " + to_string(stride) + ": of windows of " + to_string(max_length) + " tokens at most " +
           to_string((max_length - 2) / 2));
}

// Each with its interval, where it has one.
Numbers with_intervals(std::span<const Metric> metrics, const std::string& ending = "") {
  Numbers list;
  for (const Metric& m : metrics) {
    list.emplace_back(m.name + ending, m.value);
    if (!std::isnan(m.low)) list.insert(list.end(), {{m.name + "_low", m.low}, {m.name + "_high", m.high}});
  }
  return list;
}

// A fine-tuning run: its options, taken in this order, and its data, the same for every seed but for the split.
struct Finetuning {
  Args& a;
  const Common& common;
  const Task task = take_task(a);
  const std::string model = a.need("model", "DIR", "the folder of the model to start from");
  const bool from_scratch = a.take_switch("from-scratch", "random weights: --model gives config.json and the vocabulary");
  const Source train_input = take_source(a, "train", "labelled texts");
  const std::optional<Source> dev_input = take_like(a, "dev", train_input, "held-out texts");
  const double dev_split = a.take_number("dev-split", 0.1, 0., 0.9, "or so much of the training data");
  const std::optional<Source> test_input = take_like(a, "test", train_input, "texts to score in the end");
  RunSettings run = take_run(a, false);
  const double epochs = a.take_number("epochs", 3., 0.01, 10000., "");
  const int64_t patience = a.take_int("patience", 0, 1, 10000, "stop after N epochs without a better one");
  const int64_t batch = a.take_int("batch", 32, 1, 1 << 20, "texts of a batch");
  int64_t max_length = a.take_int("max-length", 0, 8, 1 << 20, "tokens of a text; default: 128, for qa 384");
  const int64_t stride = a.take_int("stride", 128, 0, 1 << 20, "tokens that the windows of long texts share");
  TrainSettings settings = take_training(a, common, 2e-5);
  const int64_t reinit = a.take_int("reinit", 0, 1, 1000, "top layers (and the pooler) that begin anew");
  const bool balanced = a.take_choice("class-weights", {"none", "balanced"}, "for classify and tag");
  const std::optional<double> null_threshold =
      a.take_optional("null-threshold", -1e6, 1e6, "for qa: above it \"no answer\" answers; default: tuned on the held-out questions");
  const int64_t seeds = a.take_int("seeds", 1, 1, 1000, "so many runs, mean and deviation");
  const std::string tsv = a.take("tsv", "TASK", "the metrics as rows of the bench scripts");

  WordPiece tokenizer = {};
  Labels labels = {task, {}, {}};
  LabelledSet train = {}, dev = {}, test = {};
  std::vector<Example> examples = {};  // of train, in windows
  std::string prompt = {};             // similarity: the model's default, in front of every text
  int64_t cut = 0;                     // training texts that are longer than what is trained with

  void take_rule();
  void check() const;
  void read();
  void split(uint64_t seed);
  bool some_unanswerable(const LabelledSet& set) const {
    return task == Task::qa && std::any_of(set.golds.begin(), set.golds.end(), [](const Gold& g) { return g.answers.empty(); });
  }
  bool tunes_null() const { return !null_threshold && some_unanswerable(dev); }  // nobody said when there is no answer
  ModelFolder start() const;
  // Of the i-th seed.
  std::string folder(int64_t i) const { return run.output + (seeds > 1 ? "/seed-" + to_string(settings.seed + (uint64_t)i) : ""); }
  Asked asked(const Bert& bert) const { return {bert, tokenizer, settings.loss.pooling, prompt, max_length, stride, 8192}; }
};

// What is trained of the model, and for which loss.
void Finetuning::take_rule() {
  LossRule& loss = settings.loss;
  settings.freeze = a.take_int("freeze", 0, 0, 1000, "layers (and the embeddings) that keep their weights");
  settings.layer_decay = a.take_number("layer-decay", 1., 0.01, 1., "each layer's rate is X times that of the one above");
  loss.classes.smoothing = (float)a.take_number("label-smoothing", 0., 0., 0.99, "for classify and tag");
  loss.pairs = (PairLoss)a.take_choice("loss", {"cosine", "inbatch", "contrastive", "triplet"}, "for similarity");
  loss.temperature = a.take_number("temperature", 0.05, 1e-4, 1e3, "for similarity");
}

// What can be seen before anything is read: options that only some tasks have.
void Finetuning::check() const {
  const bool similar = task == Task::embed;
  auto only = [&](const char* option, bool fits, const char* tasks) {
    if (!fits && a.given(option)) a.fail("--" + std::string(option) + " is for --task " + tasks + ", not for " + task_name(task));
  };
  only("class-weights", task == Task::classify || task == Task::tag, "classify and tag");
  only("label-smoothing", task == Task::classify || task == Task::tag, "classify and tag");
  only("stride", !similar, "every other task");
  if (a.given("temperature") && similar && settings.loss.pairs != PairLoss::inbatch) a.fail("--temperature is for --loss inbatch");
  if (similar && settings.loss.pairs == PairLoss::inbatch && batch < 2)
    a.fail("--batch 1: --loss inbatch compares the texts of a batch; give 2 at least");
  if (patience && !dev_input && dev_split == 0) a.fail("--patience needs held-out texts, and --dev-split 0 leaves none");
  a.exclude("freeze", "from-scratch");
  only("loss", similar, "similarity"), only("temperature", similar, "similarity"), only("null-threshold", task == Task::qa, "qa");
}

void Finetuning::read() {
  check_folder(model, !from_scratch);
  refuse_same_folder(model, run.output);
  for (int64_t i = 0; i < seeds; i++) refuse_same_folder(model, folder(i));
  if (seeds == 1) check_output(run.output, run.resume, run.overwrite);
  const Config config = open_config(model + "/config.json");
  for (const auto& [option, n] : {std::pair("freeze", settings.freeze), {"reinit", reinit}})
    if (n > config.num_hidden_layers)
      throw Error(std::string("--") + option + " " + to_string(n) + ": the model has " + to_string(config.num_hidden_layers) + " layers");
  if (settings.freeze + reinit > config.num_hidden_layers)
    throw Error("--freeze " + to_string(settings.freeze) + " --reinit " + to_string(reinit) +
                ": layers that begin anew would stay as drawn; the model has " + to_string(config.num_hidden_layers));
  if (seeds > 1 && fs::exists(run.output + "/log.jsonl"))
    throw Error(run.output + ": holds a run of its own, not one a seed; give another --output");
  max_length = task == Task::qa && !max_length ? std::min<int64_t>(384, config.max_position_embeddings) : length_limit(max_length, config);
  check_stride(a, stride, max_length);
  tokenizer = open_tokenizer(model);
  if (task == Task::embed) settings.loss.pooling = folder_pooling(model, config), prompt = folder_prompt(model, "");
  if (task == Task::regress) labels.set({"LABEL_0"});
  train = read_labelled(train_input, labels, &config.labels, task == Task::embed ? std::optional(settings.loss.pairs) : std::nullopt);
  if (labels.named() && labels.names.size() < (task == Task::multilabel ? 1u : 2u))
    throw Error(join(train_input.files, ", ") + ": only one label (" + labels.some() + "); there is nothing to tell apart");
  if (dev_input) dev = read_labelled(*dev_input, labels);
  if (test_input) test = read_labelled(*test_input, labels);
  for (const auto& [set, input] : {std::pair(&dev, &dev_input), {&test, &test_input}})
    if (!set->items.empty() && task != Task::embed && set->items[0].pair.has_value() != train.items[0].pair.has_value())
      throw Error(join((*input)->files, ", ") + ": " + (set->items[0].pair ? "pairs of texts" : "single texts") +
                  ", but the training data is not; give data of one kind");
}

// Holds out a share of the training data, unless there is --dev, and makes what is trained with.
void Finetuning::split(uint64_t seed) {
  if (!dev_input && dev_split > 0) dev = hold_out(train, task, dev_split, seed);
  examples = training_examples(tokenizer, task, train, max_length, stride, prompt, cut);
  if (balanced) settings.loss.classes.weights = balanced_weights(label_counts(train.golds, labels.names.size()));
}

// The model to start from, and what travels with it.
ModelFolder Finetuning::start() const {
  ModelFolder folder;
  if (!from_scratch) {
    folder = load_folder_for(model, task, labels.names, settings.seed);
  } else {
    folder.config = open_config(model + "/config.json");
    folder.config.labels = labels.names;
    folder.bert = Bert::random(folder.config, task, settings.seed);
    folder.carried = tokenizer_files(model, tokenizer, folder.config.max_position_embeddings);
  }
  if (reinit) folder.bert.draw_again(reinit, settings.seed);
  if (task == Task::embed) folder.carried.merge(sentence_files(settings.loss.pooling, folder.config.hidden_size, max_length));
  if (task == Task::qa) folder.bert.config.null_threshold = null_threshold;
  if (!tunes_null() && !null_threshold && some_unanswerable(train)) folder.bert.config.null_threshold = 0;  // nothing to tune it on
  const bool windows = task != Task::embed;  // the length of those is among the sentence files
  folder.bert.config.window_length = windows ? std::optional(max_length) : std::nullopt;
  folder.bert.config.window_stride = windows ? std::optional(std::min(stride, max_length)) : std::nullopt;
  return folder;
}

std::string label_shares(const LabelledSet& set, const Labels& labels) {
  const std::vector<double> counts = label_counts(set.golds, labels.names.size());
  const auto texts = (double)set.golds.size();
  const double all = labels.task == Task::multilabel ? texts : std::accumulate(counts.begin(), counts.end(), 0.0);
  Strings out;
  for (size_t i = 0; i < counts.size() && i < 12; i++) out.push_back(labels.names[i] + " " + fixed(100 * counts[i] / all, 1) + " %");
  return join(out, ", ") + (counts.size() > 12 ? ", …" : "");
}

constexpr size_t kMistakes = 20;  // shown in the report

std::string confusion_table(const std::vector<int64_t>& confusion, const Strings& labels) {
  const size_t C = labels.size();
  if (confusion.empty() || C > 30) return "";
  std::string out = "<tr><th>is \\ said</th>";
  for (const std::string& name : labels) out += "<th>" + html(name) + "</th>";
  for (size_t i = 0; i < C; i++) {
    int64_t most = 1;
    for (size_t k = 0; k < C; k++) most = std::max(most, confusion[i * C + k]);
    out += "</tr><tr><th>" + html(labels[i]) + "</th>";
    for (size_t k = 0; k < C; k++)
      out += "<td style=\"background:color-mix(in srgb,var(" + std::string(i == k ? "--third" : "--dev") + ") " +
             to_string(60 * confusion[i * C + k] / most) + "%,transparent)\">" + grouped(confusion[i * C + k]) + "</td>";
  }
  return html_section("Held-out texts: what they are, and what was said", out + "</tr>");
}

std::string mistakes_table(const std::multimap<double, Mistake, std::greater<>>& worst) {
  if (worst.empty()) return "";
  auto shortened = [](const std::string& s) {
    size_t n = std::min<size_t>(s.size(), 400);
    while (n < s.size() && n && (s[n] & 0xC0) == 0x80) n--;
    return html(s.substr(0, n)) + (n < s.size() ? " …" : "");
  };
  std::string out = "<tr><th>right</th><th>said</th><th>text</th></tr>";
  for (const auto& [size, m] : worst)
    out += "<tr><td>" + shortened(m.right) + "</td><td>" + shortened(m.said) + "</td><td>" + shortened(m.text) + "</td></tr>";
  return html_section("The worst mistakes", out);
}

Named data_facts(const Finetuning& f) {
  auto some = [](int64_t n) { return n ? grouped(n) : ""; };
  const auto windows = (int64_t)f.examples.size();
  return {{"training texts", grouped((int64_t)f.train.items.size())},
          {"in windows", windows > (int64_t)f.train.items.size() ? grouped(windows) : ""},
          {"held-out texts", grouped((int64_t)f.dev.items.size())},
          {"test texts", some((int64_t)f.test.items.size())},
          {"labels", f.labels.named() ? label_shares(f.train, f.labels) : ""},
          {"training texts cut to --max-length", some(f.cut)}};
}

// What the figures do not say by themselves.
void remark(const Scorer& scorer, const Labels& labels) {
  if (labels.task == Task::classify && labels.names.size() == 2)
    note("bert: f1, precision and recall are those of label " + labels.names[1]);
  if (const auto only = scorer.only_answer())
    say("bert: " + *only + ": nothing was learned yet; train with more --epochs, a lower --lr" +
        (labels.task == Task::classify || labels.task == Task::tag ? ", or --class-weights balanced" : ""));
  if (scorer.flat()) say("bert: all answers, or all right ones, are one number: no correlation is defined, and 0 stands for it");
}

// A set's metrics, their names with `ending`, and what was learned beside: the null threshold that they are at, and a part of the page.
struct Evaluation {
  Numbers metrics;
  std::optional<double> null_threshold;
  std::string report;  // confusion matrix and worst mistakes
};
Evaluation evaluate(const Finetuning& f, const Bert& bert, const LabelledSet& set, const std::string& ending = "") {
  if (set.items.empty()) return {};
  if (only_partners(f.task, set.golds)) return {with_intervals(rank_partners(f.asked(bert), set.items), ending), {}, ""};
  Evaluation e;
  Scorer scorer(f.task, f.labels.names);
  const bool last = ending == "_dev";  // of the model that is kept: the page shows it
  std::vector<Outcome> said;
  score_items(f.asked(bert), set.items, set.golds, scorer, [&](size_t, const Outcome& o) {
    if (last) said.push_back(o);
  });
  e.null_threshold = bert.config.null_threshold;
  if (!e.null_threshold && f.tunes_null()) e.null_threshold = scorer.best_null_threshold();
  e.metrics = with_intervals(scorer.metrics({}, e.null_threshold), ending);
  if (!last) return e;
  remark(scorer, f.labels);
  std::multimap<double, Mistake, std::greater<>> worst;
  for (size_t i = 0; i < said.size(); i++) {
    if (const auto m = find_mistake(f.labels, set.items[i], set.golds[i], said[i], e.null_threshold)) worst.emplace(m->size, *m);
    if (worst.size() > kMistakes) worst.erase(std::prev(worst.end()));
  }
  e.report =
      confusion_table(f.task == Task::classify ? scorer.confusion() : std::vector<int64_t>(), f.labels.names) + mistakes_table(worst);
  return e;
}

// Where fine-tuning stands beside the trainer: the best evaluation, whose model is the one in the folder.
struct BestOnDev {
  double value = -1e300;
  int64_t since = 0;   // evaluations since it
  bool ended = false;  // by patience
  About about() const { return {{"best", exact(value)}, {"since_best", to_string(since)}, {"ended", to_string(ended)}}; }
  void set(const About& a) {
    value = parse_number<double>(a.at("best")).value_or(0), since = stored_number(a, "since_best"), ended = stored_number(a, "ended");
  }
};

// The steps from where the trainer stands; false when a signal came first.
bool finetune_steps(const Finetuning& f, FinetuneSampler& sampler, Trainer& trainer, Run& run, BestOnDev& best, const ModelFolder& start) {
  const int64_t per_epoch = sampler.epoch_steps(), steps = trainer.settings().steps;
  while (trainer.done() < steps && !best.ended && !stop_signal) {
    run.after_step(trainer.step(sampler.next(trainer.done())));
    const int64_t done = trainer.done();
    if (done % per_epoch && done < steps) {
      if (run.save_due(done)) run.save(trainer);
      continue;
    }
    if (const Numbers metrics = evaluate(f, trainer.model(), f.dev).metrics; !metrics.empty()) {
      run.evaluated(done, metrics);
      const auto& [name, value] = metrics[0];
      best.since = value > best.value ? 0 : best.since + 1;
      best.value = std::max(best.value, value), best.ended = best.since && best.since == f.patience;
      note("epoch " + to_string((done - 1) / per_epoch + 1) + ": " + name + " " + fixed(value, 4) + " on dev" +
           (best.since ? "" : ", the best so far"));
    }
    run.save(trainer);  // the state first: where it says "best", its weights are the best model's, and a resumed run writes them again
    if (!best.since) save_folder(f.run.output, trainer.model(), start.carried);
  }
  return trainer.done() >= steps || best.ended;
}

// One run with one seed into one folder: its metrics.
Numbers finetune_once(const Finetuning& f, const Named& taken) {
  Run run("Fine-tuning " + f.model + " to " + task_name(f.task), f.run);
  ModelFolder start = f.start();
  FinetuneSampler sampler(f.examples, f.batch, f.settings.accumulate, f.settings.seed);
  TrainSettings settings = f.settings;
  settings.steps = std::max<int64_t>(1, (int64_t)std::ceil(f.epochs * (double)sampler.epoch_steps()));
  Trainer trainer(std::move(start.bert), settings);
  Fingerprint fingerprint;
  auto add = [&](const Strings& texts) {
    for (const std::string& text : texts) fingerprint.bytes(text);
    fingerprint.number(texts.size());
  };
  for (const Example& e : f.examples) fingerprint.add(e);
  for (size_t i = 0; i < f.dev.items.size(); i++) {
    const Item& item = f.dev.items[i];
    const Gold& gold = f.dev.golds[i];
    for (const Strings& texts : {Strings{item.text, item.pair.value_or("")}, item.words, item.others, gold.answers}) add(texts);
    fingerprint.number((uint64_t)gold.label), fingerprint.add(gold.targets), fingerprint.add(gold.tags);
  }
  add(f.labels.names);
  BestOnDev best;
  if (const About stored = run.take_up(trainer, taken, fingerprint); !stored.empty()) {
    best.set(stored);
    const int64_t done = trainer.done();
    const bool just_evaluated = done == trainer.settings().steps || (done && done % sampler.epoch_steps() == 0);
    if (just_evaluated && !best.since) save_folder(f.run.output, trainer.model(), start.carried);
  }
  run.place = [&] { return best.about(); };
  run.data = data_facts(f);
  run.data.emplace_back("model", model_size(trainer.model()));
  run.guarded(trainer, [&] {
    if (!finetune_steps(f, sampler, trainer, run, best, start)) return false;
    ModelFolder saved = load_folder(f.run.output, false);  // the best one, as everybody else will read it
    const Evaluation dev = evaluate(f, saved.bert, f.dev, "_dev");
    run.results = dev.metrics, run.part = dev.report;
    if (f.tunes_null()) {  // how sure of "no answer" the model must be goes into its config.json
      saved.bert.config.null_threshold = dev.null_threshold;
      save_folder(f.run.output, saved.bert, start.carried);
    }
    for (const auto& m : evaluate(f, saved.bert, f.test, "_test").metrics) run.results.push_back(m);
    return true;
  });
  return run.results;
}

void cmd_finetune(Args& a) {
  Common common(a, Precision::bf16);
  const double began = now();
  Finetuning f{a, common};
  f.take_rule();
  a.done();
  if (f.train_input.files.empty()) a.fail("--train is missing: a file of labelled texts");
  a.exclude("dev", "dev-split"), a.exclude("resume", "overwrite");
  f.check();
  f.read();
  std::vector<Numbers> results;  // of each seed
  for (int64_t i = 0; i < f.seeds; i++) {
    Finetuning one = f;
    one.settings.seed += (uint64_t)i;
    one.run.output = f.folder(i);
    if (f.seeds > 1) one.run.resume &= fs::exists(one.run.output);
    one.split(one.settings.seed);
    for (const auto& [name, value] : data_facts(one))
      if (!i && !value.empty()) note(name + ": " + value);
    results.push_back(finetune_once(one, a.taken()));
  }
  Numbers lines;
  for (size_t k = 0; k < results[0].size(); k++) {
    const double n = (double)results.size();
    double mean = 0, square = 0;
    for (const Numbers& r : results) mean += r[k].second / n;
    for (const Numbers& r : results) square += (r[k].second - mean) * (r[k].second - mean);
    lines.emplace_back(results[0][k].first, mean);
    if (n > 1) lines.emplace_back(results[0][k].first + "_std", std::sqrt(square / (n - 1)));
  }
  if (!f.tsv.empty()) lines.insert(lines.end(), {{"s", now() - began}, {"MiB", peak_mib()}});
  for (auto& line : lines)
    if (!f.tsv.empty()) line.first = std::string("finetune\tours-") + name_of(f.settings.products) + "\t" + f.tsv + "\t" + line.first;
  print(lines);
  note(f.run.output + ": the model" + (f.seeds > 1 ? "s, one a seed" : "; curves in " + f.run.output + "/report.html"));
}

// ==== 12 evaluate, predict, fill-mask, embed, search ==============================================================
// What these five share: a model's folder, rows in, results out.
struct Answering {
  Args& a;
  const char* which = "a model's folder";
  const int64_t usual_tokens = 8192;
  const Common common{a, Precision::int8};
  const std::string model = a.need("model", "DIR", which);
  Source source = take_source(a);
  Results out{a};
  int64_t batch_tokens = a.take_int("batch-tokens", usual_tokens, 1, 1 << 30, "tokens of a batch"), stride = 0;
  ModelFolder folder = {};                        // by open()
  std::atomic<int64_t> were_cut = 0, cut_to = 0;  // texts
  std::atomic<bool> cut_others = false;           // what was cut is a pair's text that stands in every window

  void open() {  // when every option is taken
    a.done();
    folder = open_model(model, true, common.precision);
    if (!a.given("stride")) stride = folder.config.stride();
  }
  const HeadKind& head() const { return head_kind(folder.bert.task); }
  [[noreturn]] void wrong_model(const std::string& wanted) const {
    throw Error(model + ": a model for " + head().name + ", but this command wants one for " + wanted);
  }
  // A row's ids. A text over the limit is cut, and counted; with a cure, what to do about it, it is an error.
  Example encode(const Row& row, int64_t limit, const std::string& long_cure = "") {
    bool cut = false;
    check_ids(row, folder.config);
    Example e = encode_row(folder.tokenizer, row, limit, true, cut);
    if (cut && !long_cure.empty()) throw BadLine("longer than the model's " + to_string(limit) + " tokens; " + long_cure);
    if (cut) count_cut(limit);
    return e;
  }
  void count_cut(int64_t tokens, bool other = false) {  // what a text was cut to; 0: it was not
    if (tokens) were_cut++, cut_to = tokens, cut_others = other;
  }
  // Says in the end what the input was like.
  void report(const Rows& rows) {
    rows.report();
    if (were_cut)
      note("bert: " + grouped(were_cut) + " of " + grouped(rows.count()) + " texts were longer than " + to_string(cut_to) +
           " tokens and were cut" + (cut_others ? ": of a pair the one that stands beside every window of the other" : ""));
    were_cut = 0;
  }
  // Runs answer(rows, made) over the input, a chunk at a time; returns the number of rows. made[i] = make(rows[i]), which throws BadLine
  // for what the model cannot answer; it runs in parallel. pass_over: so many rows at the start were answered before.
  template <class Make, class Answer>
  int64_t each_chunk(Make&& make, Answer&& answer, int64_t pass_over = 0) {
    Rows rows(source);
    for (Row row; row.number < pass_over && rows.next(row);) continue;
    int64_t answered = 0;
    for (std::vector<Row> chunk; read_chunk(rows, chunk, kItems);) {
      std::vector<std::invoke_result_t<Make&, const Row&>> made(chunk.size());
      Strings wrong(chunk.size());
      parallel_each((int64_t)chunk.size(), 8, [&](int64_t i) {
        try {
          made[i] = make(chunk[i]);
        } catch (const BadLine& e) { wrong[i] = e.what(); }
      });
      size_t good = 0;
      for (size_t i = 0; i < chunk.size(); i++)
        if (!wrong[i].empty())
          rows.bad(chunk[i].where, wrong[i]);
        else
          std::swap(chunk[good], chunk[i]), std::swap(made[good++], made[i]);
      chunk.resize(good), made.resize(good), answered += (int64_t)good;
      if (good) answer(chunk, made);
      out.flush();
    }
    report(rows);
    return answered;
  }
};

Numbers text_scores(const ModelFolder& folder, const Source& source, uint64_t seed) {
  PretrainSettings settings;
  settings.max_length = std::min(length_limit(0, folder.config), folder.max_length);
  settings.next_sentence = folder.bert.task == Task::pretrain;
  const PretrainScores s =
      evaluate_pretraining(folder.bert, read_corpus(source, folder.tokenizer), settings, mask_vocabulary(folder.tokenizer), seed, {});
  Numbers list = {{"loss", s.masked_loss}, {"perplexity", std::exp(s.masked_loss)}, {"accuracy", s.masked_accuracy}};
  if (s.pairs) list.insert(list.end(), {{"nsp_loss", s.next_loss}, {"nsp_accuracy", s.next_accuracy}});
  if (settings.next_sentence && !s.pairs) note("bert: no next-sentence figures: they need two documents, with a blank line between them");
  list.emplace_back("masked", (double)s.masked);
  return list;
}

Numbers label_scores(Answering& s) {
  Labels labels{s.folder.bert.task, {}, {}};
  labels.set(s.folder.config.labels);
  s.source.labels = true, s.source.task = labels.task;
  const ModelFolder& f = s.folder;
  const Asked how = {f.bert, f.tokenizer, f.pooling, f.prompt, f.max_length, s.stride, s.batch_tokens};
  Scorer scorer(labels.task, labels.names);
  std::vector<Item> partners;  // without a score: they are ranked when all are read
  Rows rows(s.source);
  for (LabelledSet set; next_labelled(rows, labels, kItems, set);)
    if (only_partners(labels.task, set.golds))
      std::move(set.items.begin(), set.items.end(), std::back_inserter(partners));
    else
      score_items(how, set.items, set.golds, scorer, [&](size_t, const Outcome& o) { s.count_cut(o.cut_to, true); });
  s.report(rows);
  if (!partners.empty() && scorer.size())
    throw Error(join(s.source.files, ", ") + ": some pairs have a score and some have none; give files of one kind");
  if (!partners.empty()) return with_intervals(rank_partners(how, partners, s.common.seed));
  if (!scorer.size()) nothing(s.source, kNoLabelled);
  remark(scorer, labels);
  return with_intervals(scorer.metrics(s.common.seed, s.folder.config.null_threshold));
}

void cmd_evaluate(Args& a) {
  Answering s{a};
  s.open();
  s.out.write(figures(s.head().masked_words ? text_scores(s.folder, s.source, s.common.seed) : label_scores(s)));
  s.out.finish();
}

// Vectors and raw outputs, for reading back as the same floats.
std::string numbers(std::span<const float> values, bool json = false) {
  std::string out = json ? "[" : "";
  char text[40];
  for (size_t i = 0; i < values.size(); i++) {
    if (i) out += json ? ',' : '\t';
    out.append(text, std::to_chars(text, text + sizeof text, (double)values[i], std::chars_format::general, 9).ptr);
  }
  return json ? out + "]" : out;
}

// What `predict` prints of one row by its task.
struct Prediction {
  Args& a;
  const int64_t top = a.take_int("top", 1, 1, 1 << 20, "the N best labels");
  const bool json = a.take_switch("jsonl", "the full record"), logits = a.take_switch("logits", "the raw outputs of the head");
  const bool chars = a.take_choice("offsets", {"bytes", "chars"});
  Task task = Task::classify;  // this and the rest are the model's
  Strings labels = {};
  std::optional<double> null_threshold = {};

  std::string lines(const Row& row, const Outcome& o) const {
    if (task == Task::tag) return row.format == kConll && !json ? tag_lines(row, o) : json_object({{"entities", entities(row, o)}}) + "\n";
    if (task == Task::qa) return answer_json(row, o) + "\n";
    const bool plain = logits || task == Task::regress || task == Task::embed;
    if (logits || (plain && !json)) return numbers(o.outputs) + "\n";
    if (plain) return json_object({{o.outputs.size() > 1 ? "scores" : "score", numbers(o.outputs, o.outputs.size() > 1)}}) + "\n";
    return scores(probabilities(task, o.outputs)) + "\n";
  }

 private:
  // A class, several classes, or a choice by its number.
  std::string scores(const std::vector<float>& p) const {
    Numbers all;  // the best first
    for (size_t i = 0; i < p.size(); i++) all.emplace_back(task == Task::choice ? to_string(i) : labels[i], p[i]);
    std::stable_sort(all.begin(), all.end(), [](const auto& x, const auto& y) { return x.second > y.second; });
    const auto& [first, score] = all[0];
    if (json && task != Task::multilabel)
      return json_object(
          {{"label", task == Task::choice ? first : json_quote(first)}, {"score", format_number(score)}, {"scores", json_numbers(all)}});
    Strings best, holds, values;  // label TAB probability; of a text's several labels each and its probability
    for (const auto& [label, value] : all) {
      if ((int64_t)best.size() < top) best.push_back(label + "\t" + format_number(value));
      if (value >= 0.5) holds.push_back(json ? json_quote(label) : label), values.push_back(format_number(value));
    }
    if (json) return json_object({{"labels", json_list(holds)}, {"scores", json_numbers(all)}});
    return task == Task::multilabel ? join(holds, "|") + "\t" + join(values, "|") : join(best, "\t");
  }

  std::string tag_lines(const Row& row, const Outcome& o) const {
    std::string out;
    for (size_t i = 0; i < row.words.size(); i++) out += row.words[i] + "\t" + (o.tags[i] < 0 ? "O" : labels[(size_t)o.tags[i]]) + "\n";
    return out + "\n";
  }
  std::string entities(const Row& row, const Outcome& o) const {
    Strings list;
    for (const TextEntity& e : entities_in(o, labels, row.text))
      list.push_back(json_object({{"type", json_quote(e.type)},
                                  {"text", json_quote(e.text)},
                                  {"start", place(row.text, e.start)},
                                  {"end", place(row.text, e.end)},
                                  {"score", format_number((float)e.score)}}));
    return json_list(list);
  }
  std::string place(std::string_view text, int64_t byte) const { return to_string(chars ? code_points(text, byte) : byte); }
  Named answer_facts(const Row& row, const Answer& a) const {
    return {{"answer", json_quote(a.text)},
            {"start", place(*row.pair, a.start)},
            {"end", place(*row.pair, a.end)},
            {"score", format_number((float)a.score)}};
  }
  std::string answer_json(const Row& row, const Outcome& o) const {
    Named record = answer_facts(row, o.answer(null_threshold));
    record.insert(record.begin(), {"id", row.id.empty() ? to_string(row.number) : json_quote(row.id)});
    if (!json) return json_object(record);
    Strings list;
    for (const Answer& a : o.answers) list.push_back(json_object(answer_facts(row, a)));
    record.insert(record.end(),
                  {{"answers", json_list(list)}, {"null_margin", std::isfinite(o.null_margin) ? format_number(o.null_margin) : "null"}});
    return json_object(record);
  }
};

// The windows of a row, or its ids as they are. Throws BadLine for what the model cannot answer. how: of texts over the limit
std::vector<Window> usable_windows(Answering& s, const Row& row, const Prediction& p, const std::string& how) {
  const ModelFolder& f = s.folder;
  const Task task = p.task;
  if (row.others.empty() && task == Task::choice) throw BadLine("no choices; give jsonl with text and choices");
  if (!row.ids.empty()) {
    if (task == Task::embed) throw BadLine("one list of ids; two texts are compared, joined by a TAB");
    if (s.head().tokens && !p.logits) throw BadLine("ids have no text for an answer to stand in; give the text, or ask for --logits");
    check_ids(row, f.config);
    Window w = {{row.ids, row.segments}};
    w.words.assign(row.ids.size(), -1), w.places.resize(row.ids.size()), w.starts = w.decides = std::vector<uint8_t>(row.ids.size());
    return {w};
  }
  if (!row.pair && s.head().next_sentence) throw BadLine("one text, but a model for next sentences wants two, joined by a TAB");
  if (!row.pair && task == Task::qa) throw BadLine("one text; a question and its context are wanted, joined by a TAB");
  if (!row.pair && row.others.empty() && task == Task::embed) throw BadLine("one text; two are compared, joined by a TAB");
  Item item = row;
  if (task == Task::tag && !row.words.empty()) item.text.clear();
  std::vector<Window> windows = make_windows(f.tokenizer, task, item, f.max_length, s.stride, f.prompt, how != "truncate");
  const bool too_long = in_windows(windows);
  const int64_t other = cut_to(windows);
  if (how == "error" && (too_long || other))
    throw BadLine("longer than " + to_string(too_long ? f.max_length : other) + " tokens; shorten it, or leave out --long error");
  const bool cuts = how == "truncate" && too_long;
  s.count_cut(cuts ? f.max_length : other, !cuts);
  if (how == "window" || !too_long) return windows;
  std::vector<Window> first;  // of each part
  for (Window& w : windows)
    if (first.empty() || first.back().part != w.part) w.decides.assign(w.words.size(), 1), first.push_back(std::move(w));
  return first;
}

void cmd_predict(Args& a) {
  Answering s{a, "the folder of a task model, as bert finetune writes it"};
  Prediction p{a};
  const Strings ways = {"window", "error", "truncate"};
  const std::string how = ways[(size_t)a.take_choice("long", ways, "of texts over the limit: in windows that share")];
  s.stride = a.take_int("stride", 0, 0, 1 << 20, "so many tokens, at most half of a window; default: as it was trained");
  if (how != "window" && a.given("stride")) a.fail("--stride is for --long window");
  a.exclude("jsonl", "logits"), a.exclude("jsonl", "top"), a.exclude("logits", "top");
  s.open();
  check_stride(a, s.stride, s.folder.max_length);
  p.task = s.folder.bert.task, p.labels = s.folder.config.labels, p.null_threshold = s.folder.config.null_threshold;
  if (s.head().next_sentence) p.labels = {"follows", "random"};
  if (!s.head().output && !s.head().next_sentence && p.task != Task::embed) s.wrong_model("a task; make one with bert finetune");
  if (a.given("offsets") && !s.head().tokens) a.fail("--offsets is for tags and questions; this model is for " + task_name(p.task));
  const bool one_of = p.task == Task::classify || p.task == Task::choice || s.head().next_sentence;
  if (a.given("top") && !one_of) a.fail("--top is for one label of several; this model is for " + task_name(p.task));
  s.source.task = p.task, s.source.raw = p.task == Task::tag;  // one text a line
  auto make = [&](const Row& row) { return usable_windows(s, row, p, how); };
  s.each_chunk(make, [&](const std::vector<Row>& chunk, const std::vector<std::vector<Window>>& windows) {
    if (p.logits && s.head().tokens) {
      for (const std::vector<Window>& list : windows) {
        const Tensor y = head_outputs(s.folder.bert, examples_of({&list, 1}), s.batch_tokens);
        s.out.line(numbers({y.data(), (size_t)y.size()}));
      }
      return;
    }
    const std::vector<Item> items(chunk.begin(), chunk.end());
    const std::vector<Outcome> said = answer_windows(s.folder.bert, s.folder.pooling, items, windows, s.batch_tokens);
    for (size_t i = 0; i < chunk.size(); i++) s.out.write(p.lines(chunk[i], said[i]));
  });
  s.out.finish();
}

void cmd_fill_mask(Args& a) {
  Answering s{a, "the folder of a masked-word model"};
  const int64_t top = a.take_int("top", 5, 1, 1 << 20, "guesses for each");
  const bool score = a.take_switch("score", "log-likelihood of whole texts instead");
  a.exclude("score", "top");
  s.open();
  if (!s.head().masked_words) s.wrong_model("masked words");
  const WordPiece& t = s.folder.tokenizer;
  auto make = [&](const Row& row) {
    Example e = s.encode(row, s.folder.max_length, "shorten it");
    if (!score && std::find(e.ids.begin(), e.ids.end(), t.mask) == e.ids.end())
      throw BadLine("no " + std::string(t.piece(t.mask)) + " in this text; write it where a word is to be guessed");
    return e;
  };
  auto answer = [&](const std::vector<Row>& chunk, const std::vector<Example>& examples) {
    const auto scores = score ? score_texts(s.folder, examples, s.batch_tokens) : std::vector<TextScore>();
    for (size_t i = 0; i < scores.size(); i++)
      s.out.line(to_string(chunk[i].number) + "\t" + format_number(scores[i].log_likelihood) + "\t" + to_string(scores[i].tokens));
    if (score) return;
    const auto guesses = guess_masks(s.folder, examples, top, s.batch_tokens);
    for (size_t i = 0; i < chunk.size(); i++) {
      int64_t rank = 0, mask = -1;
      for (const MaskGuess& g : guesses[i]) {
        rank = g.mask == mask ? rank + 1 : 1, mask = g.mask;
        s.out.line(to_string(chunk[i].number) + "\t" + to_string(mask + 1) + "\t" + to_string(rank) + "\t" + g.token + "\t" +
                   format_number(g.probability));
      }
    }
  };
  s.each_chunk(make, answer);
  s.out.finish();
}

struct EmbedOptions {
  Args& a;
  enum To { tsv, jsonl, npy };
  const To to = (To)a.take_choice("to", {"tsv", "jsonl", "npy"});
  const int kind = a.take_choice("pooling", {"the folder's", "mean", "cls", "max", "pooler"});
  const std::optional<bool> normalize = a.take_yes_no("normalize", "");
  const bool tokens = a.take_switch("tokens", "one line a token");
  const int64_t layer = a.take_int("layer", -1, 0, 1000, "the output of layer N (0: the embeddings)");
  const int64_t max_length = a.take_int("max-length", 0, 3, 1 << 30, "tokens of a text; default: what the folder says");
  enum Long { truncate, error, window };
  const Long how = (Long)a.take_choice("long", {"truncate", "error", "window"},
                                       "of texts over the limit; window: the mean of windows that share 128 tokens");
  const std::string prompt = a.take("prompt", "NAME", "a prompt of the folder in front");
  Pooling pooling = {};
};

// A row as one window, or in as many as it needs.
std::vector<Window> embed_input(Answering& s, const EmbedOptions& o, const Row& row, int64_t limit) {
  if (o.how == EmbedOptions::window && !row.pair && row.ids.empty())
    return make_windows(s.folder.tokenizer, Task::embed, {row.text, {}}, limit, s.stride);
  const char* cures[] = {"", "shorten it, or cut it with --long truncate", "a pair does not go into windows; shorten it"};
  return {{s.encode(row, limit, cures[o.how])}};
}

// A line for each token of the texts: of a text in windows, from the one that decides about it, [CLS] from the first, [SEP] from the last.
Strings token_lines(const Answering& s, bool json, const std::vector<Row>& chunk, const std::vector<std::vector<Window>>& windows) {
  const Tensor vectors = token_vectors(s.folder.bert, examples_of(windows), s.batch_tokens);
  const auto H = (size_t)s.folder.config.hidden_size;
  const float* v = vectors.data();
  Strings out(chunk.size());
  for (size_t i = 0; i < chunk.size(); i++) {
    const std::string line = to_string(chunk[i].number);
    for (const Window& w : windows[i])
      for (size_t t = 0; t < w.example.ids.size(); t++, v += H) {
        const bool added = w.words.empty() || w.words[t] < 0;
        if (windows[i].size() > 1 && (added ? &w != (t ? &windows[i].back() : &windows[i].front()) : !w.decides[t])) continue;
        const std::string piece(s.folder.tokenizer.piece(w.example.ids[t])), vector = numbers({v, H}, json);
        out[i] +=
            json ? json_object({{"line", line}, {"token", json_quote(piece)}, {"vector", vector}}) : line + "\t" + piece + "\t" + vector;
        out[i] += "\n";
      }
  }
  return out;
}

// The output of a chunk's texts, in their order.
Strings embed_chunk(const Answering& s, const EmbedOptions& o, const std::vector<Row>& chunk,
                    const std::vector<std::vector<Window>>& windows) {
  const bool json = o.to == EmbedOptions::jsonl;
  if (o.tokens) return token_lines(s, json, chunk, windows);
  Strings out(chunk.size());
  const Tensor vectors = embed_windows(s.folder.bert, windows, o.pooling, s.batch_tokens);
  const size_t H = (size_t)vectors.cols();
  parallel_each((int64_t)chunk.size(), 8, [&](int64_t i) {
    const float* v = vectors.data() + (size_t)i * H;
    if (o.to == EmbedOptions::npy)
      out[(size_t)i].assign((const char*)v, H * sizeof(float));
    else
      out[(size_t)i] = numbers({v, H}, json) + "\n";
  });
  return out;
}

void cmd_embed(Args& a) {
  Answering s{a};
  EmbedOptions o{a};
  const bool npy = o.to == EmbedOptions::npy;
  if (o.tokens && npy) a.fail("--tokens and --to npy exclude each other");
  if (o.tokens && (o.kind || o.normalize)) a.fail("--tokens gives each token's own vector; --pooling and --normalize do not go with it");
  s.open();
  const Config& config = s.folder.config;
  o.pooling = s.folder.pooling;
  if (o.kind) o.pooling = {.kinds = {(Pooling::Kind)(o.kind - 1)}, .layers = {}, .normalize = o.pooling.normalize};
  o.pooling.normalize = o.normalize.value_or(o.pooling.normalize);
  if (o.pooling.has(Pooling::pooler) && !s.folder.bert.pooler.weight)
    throw Error(s.model + ": no pooler in this model; --pooling mean, cls or max");
  if (o.layer > config.num_hidden_layers)
    throw Error("--layer " + to_string(o.layer) + ": the model has " + to_string(config.num_hidden_layers));
  if (o.layer >= 0) s.folder.bert.layers.resize((size_t)o.layer);
  const int64_t limit = o.max_length ? length_limit(o.max_length, config) : s.folder.max_length;
  auto lost = [] { return Error(std::string("--to npy: the temporary file that the numbers wait in: ") + std::strerror(errno)); };
  std::FILE* const waiting = npy ? std::tmpfile() : nullptr;  // for the header, which holds the number of rows
  if (npy && !waiting) throw lost();
  auto make = [&](const Row& row) { return embed_input(s, o, row, limit); };
  auto answer = [&](const std::vector<Row>& chunk, const std::vector<std::vector<Window>>& windows) {
    for (const std::string& text : embed_chunk(s, o, chunk, windows))
      if (!npy)
        s.out.write(text);
      else if (std::fwrite(text.data(), 1, text.size(), waiting) < text.size())
        throw lost();
  };
  // [MASK] and [SEP] in a text are themselves, as sentence-transformers reads them: the vectors are to be the same.
  s.source.prompt = folder_prompt(s.model, o.prompt);  // without --prompt the folder's default
  const int64_t rows = s.each_chunk(make, answer);
  if (npy) {
    if (std::fflush(waiting)) throw lost();  // rewind alone would pass over it
    std::rewind(waiting), s.out.write(npy_header(rows, o.pooling.width(config.hidden_size)));
    char part[1 << 16];
    for (size_t n; (n = std::fread(part, 1, sizeof part, waiting)) > 0;) s.out.write({part, n});
    if (std::ferror(waiting)) throw lost();
  }
  s.out.finish();
}

// Makes the corpus's vectors that the index lacks. A line without text has none: its numbers are NaN, which no search finds.
void complete_index(Answering& s, const LineFile& corpus, const Pooling& pooling, VectorIndex& index) {
  const int64_t before = index.count(), H = pooling.width(s.folder.config.hidden_size);
  const double start = now();
  Progress progress;
  auto append = [&](const std::vector<Row>& chunk, const Tensor& of_chunk, int64_t end) {  // up to line `end`
    std::vector<float> vectors((size_t)((end - index.count()) * H), NAN);
    for (size_t i = 0; i < chunk.size(); i++)
      if (!blank(chunk[i].text)) std::copy_n(&of_chunk.data()[(int64_t)i * H], H, &vectors[(chunk[i].number - 1 - index.count()) * H]);
    index.append(vectors);
  };
  auto answer = [&](const std::vector<Row>& chunk, const std::vector<Example>& examples) {
    append(chunk, embed_examples(s.folder.bert, examples, pooling, s.batch_tokens), chunk.back().number);
    progress.show("vectors of " + grouped(index.count()) + " of " + counted(corpus.size(), "line") + ", " +
                  time_left(start, index.count() - before, corpus.size() - before));
  };
  s.each_chunk([&](const Row& row) { return s.encode(row, s.folder.max_length); }, answer, before);
  if (!index.vectors()) append({}, {}, corpus.size());  // lines at the end that --skip-bad passed over
}

void cmd_search(Args& a) {
  const std::string path = a.need("corpus", "FILE", "a file with a text a line (a table or JSON is refused)");
  const std::string index_path = a.take("index", "FILE", "the corpus's vectors, made once", path + ".bert-index");
  Answering s{a, "a model's folder", 2048};  // no slower, and beside the vectors the memory of a batch shows
  const int64_t top = a.take_int("top", 5, 1, 1 << 20, "lines for each query");
  const bool pairs = a.take_switch("pairs", "the closest pairs of lines instead of queries");
  a.exclude("pairs", "input");
  s.open();
  Pooling pooling = s.folder.pooling;
  pooling.normalize = true, s.source.prompt = s.folder.prompt;
  if (format_of(path) != kLines)  // its lines, names and quotes included, would be taken for texts
    throw Error(path + ": a corpus is plain text, a text a line, and this ending means columns or keys; write its texts to a .txt file");

  for (const std::string& file : s.source.files)
    if (!pairs && file != "-" && !fs::exists(file)) Lines{file};  // says so before the corpus's vectors are made, which takes long
  LineFile corpus(path);
  const uint64_t computed_in = s.common.half               ? 4
                               : s.common.precision        ? (uint64_t)*s.common.precision
                               : s.folder.config.quantized ? 3  // as stored
                                                           : 0;
  VectorIndex index(index_path, {folder_fingerprint(s.model) + computed_in, corpus.fingerprint.state,
                                 pooling.width(s.folder.config.hidden_size), corpus.size()});
  if (index.stale()) note("bert: " + index_path + ": made with another model or of another text; it is made again");
  if (!index.vectors()) {
    if (index.count()) note("bert: " + index_path + ".part: going on after " + counted(index.count(), "vector"));
    const Source queries = s.source;
    s.source.files = {path}, s.source.format = kLines, s.source.columns = "", s.source.raw = true;
    complete_index(s, corpus, pooling, index);
    s.source = queries;
  }
  auto score_and_line = [](const Match& m, int64_t line) { return format_number(m.score) + "\t" + to_string(line + 1); };
  auto answer = [&](const std::vector<Row>& chunk, const std::vector<Example>& examples) {
    const auto found = nearest_rows(embed_examples(s.folder.bert, examples, pooling, s.batch_tokens), index.vectors(), top);
    for (size_t i = 0; i < chunk.size(); i++)
      for (size_t rank = 0; rank < found[i].size(); rank++)
        s.out.line(to_string(chunk[i].number) + "\t" + to_string(rank + 1) + "\t" + score_and_line(found[i][rank], found[i][rank].b) +
                   "\t" + corpus.line(found[i][rank].b));
  };
  if (!pairs) s.each_chunk([&](const Row& row) { return s.encode(row, s.folder.max_length); }, answer);
  if (pairs)
    for (const Match& m : nearest_pairs(index.vectors(), top)) s.out.line(score_and_line(m, m.a) + "\t" + to_string(m.b + 1));
  s.out.finish();
}

// ==== 13 info, convert ============================================================================================
Named machine_facts() {
  Strings all;
  for (const Kernels* k : usable_kernels()) all.push_back(k->name);
  Named facts = {{"version", kVersion},       {"processor", cpu_name()},          {"threads", to_string(threads())},
                 {"kernels", kernels().name}, {"kernels_usable", join(all, " ")}, {"backend", backend_description()}};
  std::string devices = "cpu";
  std::vector<DeviceInfo> found;
  try {
    found = opencl_devices();
  } catch (const Error& e) { facts.emplace_back("opencl", e.what()); }
  for (size_t i = 0; i < found.size(); i++) {
    const std::string name = "opencl:" + to_string(i);
    const DeviceInfo& d = found[i];
    std::string peak;
    try {
      use_device(name, device_options(false));
      peak = fixed(device_peak(), 0) + " GFLOP/s";
    } catch (const Error& e) { peak = e.what(); }
    devices += " " + name;
    facts.emplace_back(name, join(Strings{d.name, d.platform, "driver " + d.driver, to_string(d.memory >> 20) + " MiB",
                                          to_string(d.compute_units) + " compute units", peak},
                                  "; "));
  }
  facts.emplace_back("devices", devices);
  return facts;
}

Named model_facts(const std::string& path) {
  const ModelFolder f = open_model(path, false);
  const Config& c = f.config;
  Named facts = {{"model", path},
                 {"task", head_kind(f.bert.task).name},
                 {"architecture", c.class_name()},
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
                 {"pooling", f.pooling.name()},
                 {"normalize", f.pooling.normalize ? "yes" : "no"}};
  for (const auto& [name, list] : {std::pair("loaded", &f.report.loaded),
                                   {"tied", &f.report.tied},
                                   {"newly_initialised", &f.report.newly_initialised},
                                   {"ignored", &f.report.ignored},
                                   {"unexpected", &f.report.unexpected}}) {
    facts.emplace_back(std::string("tensors_") + name, to_string(list->size()));
    if (!list->empty()) facts.emplace_back(name, join(*list, " "));
  }
  return facts;
}

// The largest difference of each tensor, and of all: inf where shapes differ. A tensor that only one model has counts for nothing.
Named model_differences(const std::string& one, const std::string& other) {
  const ModelFolder a = open_model(one, false), b = open_model(other, false);
  auto plain = [](const std::string& name) { return name.starts_with("bert.") ? name.substr(5) : name; };  // as without a head
  std::map<std::string, Parameter> rest;
  for (const Parameter& p : b.bert.parameters()) rest.emplace(plain(p.name), p);
  Named facts;
  double largest = 0;
  for (const Parameter& p : a.bert.parameters()) {
    const auto found = rest.extract(plain(p.name));
    if (!found || found.mapped().shape() != p.shape()) {
      if (found) largest = INFINITY;
      facts.emplace_back(p.name,
                         !found ? "only in " + one : bert::to_string(p.shape()) + " against " + bert::to_string(found.mapped().shape()));
      continue;
    }
    const float *x = p.data(), *y = found.mapped().data();
    double worst = 0;
    for (int64_t i = 0; i < p.shape().size(); i++) worst = std::max(worst, std::fabs((double)x[i] - (double)y[i]));
    largest = std::max(largest, worst);
    facts.emplace_back(p.name, format_number(worst));
  }
  for (const auto& [name, p] : rest) facts.emplace_back(p.name, "only in " + other);
  facts.emplace_back("largest_difference", format_number(largest));
  return facts;
}

void cmd_info(Args& a) {
  Common common(a);
  const std::string model = a.take("model", "DIR", "a model's folder; default: this machine");
  const std::string other = a.take("compare", "DIR", "the largest difference of each tensor from that model's");
  const bool json = a.take_switch("json", "one object");
  Results out(a);
  a.done();
  if (model.empty() && !other.empty()) a.fail("--compare compares with --model, which is missing");
  Named facts = model.empty() ? machine_facts() : other.empty() ? model_facts(model) : model_differences(model, other);
  for (auto& [name, value] : facts) {
    if (!json) out.line(name + "\t" + value);
    if (other.empty() ? !parse_number<int64_t>(value) : !parse_number<double>(value)) value = json_quote(value);
  }
  if (json) out.line(json_object(facts));
  out.finish();
}

void cmd_convert(Args& a) {
  // Before Common, whose --dtype is that of computing.
  const size_t dtype = (size_t)a.take_choice("dtype", {"f32", "f16", "bf16"}, "of the weights");
  Common common(a);
  const std::string model = a.need("model", "DIR", "the folder to read"), output = a.need("output", "DIR", "the folder to write");
  const bool overwrite = take_overwrite(a);
  a.done();
  refuse_same_folder(model, output);
  const ModelFolder folder = open_model(model, false);
  const FolderLock lock = lock_output(output, {}, overwrite);
  save_folder(output, folder.bert, folder.carried, std::array{"F32", "F16", "BF16"}[dtype]);
  note("bert: " + output + ": " + model_size(folder.bert));
}

// ==== 14 quantize =================================================================================================
// A model with some parts in fewer bits beside the one in f32, on texts of the user's: how much it costs.
struct Quantizing {
  int64_t batch_tokens;
  ModelFolder plain, ready;            // its weights as numbers, and packed in f32
  std::vector<Example> examples = {};  // the dev texts, of long ones the beginning
  Labels labels = {};
  LabelledSet set = {};  // where they are labelled
  Tensor vectors = {};   // of the model in f32, a row a text

  struct Cost {
    double cosine = 0, least = 1;  // between its vectors and those of f32: mean and smallest
    std::vector<Metric> metrics = {};
    double drop(const Cost& f32) const { return metrics.empty() ? f32.cosine - cosine : f32.metrics[0].value - metrics[0].value; }
  };

  Quantizing(const std::string& model, int64_t tokens)
      : batch_tokens(tokens), plain(open_model(model, false)), ready(load_folder(model, true, Precision::f32)) {}
  void read(Source source);
  Cost measure(const std::string& what, Precision dtype, const std::vector<Precision>& parts) const;
};

void Quantizing::read(Source source) {
  const Task task = plain.bert.task;
  labels.task = task, labels.set(plain.config.labels), source.task = task;
  std::vector<Item> items;
  if (head_kind(task).output || source.columns.find("label=") != std::string::npos) {  // of vectors: a number for each pair
    set = read_labelled(source, labels);
    items = set.items;
  } else {
    Rows rows(source);
    for (Row row; rows.next(row);) items.push_back(std::move(row));
    rows.report();
  }
  if (items.empty()) nothing(source, "texts; give a file with some");
  for (const Item& item : items)
    examples.push_back(make_windows(plain.tokenizer, task, item, plain.max_length, 128, plain.prompt)[0].example);
  vectors = normalize_rows(embed_examples(ready.bert, examples, plain.pooling, batch_tokens));
}

// What it costs to have each part in its precision; prints `what TAB dtype TAB cosine TAB least`, and the metric where there is one.
Quantizing::Cost Quantizing::measure(const std::string& what, Precision dtype, const std::vector<Precision>& parts) const {
  Bert bert = ready.bert;  // its packed weights are shared
  for (size_t i = 0; i < parts.size(); i++)
    if (parts[i] != Precision::f32) narrow_part(bert, (int64_t)i, plain.bert, parts[i]);
  bert.pack();
  Cost cost;
  const Tensor cosines = row_dots(normalize_rows(embed_examples(bert, examples, plain.pooling, batch_tokens)), vectors);
  for (const float c : std::span(cosines.data(), (size_t)cosines.size()))
    cost.cosine += (double)c / (double)cosines.size(), cost.least = std::min(cost.least, (double)c);
  std::string header = "part\tdtype\tcosine\tleast",
              line = what + "\t" + name_of(dtype) + "\t" + format_number(cost.cosine) + "\t" + format_number(cost.least);
  if (!set.items.empty()) {
    Scorer scorer(labels.task, labels.names);
    score_items({bert, plain.tokenizer, plain.pooling, plain.prompt, plain.max_length, 128, batch_tokens}, set.items, set.golds, scorer);
    cost.metrics = scorer.metrics({}, plain.config.null_threshold);
    header += "\t" + cost.metrics[0].name, line += "\t" + format_number(cost.metrics[0].value);
  }
  std::printf("%s%s\n", dtype == Precision::f32 ? (header + "\n").c_str() : "", line.c_str()), flush_output();
  return cost;
}

// The precision of each part. With dev texts each is tried alone, and while all together lose more than max_drop, the part that cost
// most alone goes back to the next higher one.
std::vector<Precision> choose_precisions(const Quantizing& q, Precision dtype, std::optional<double> max_drop) {
  const int64_t n = quantized_parts(q.plain.config);
  std::vector<Precision> parts((size_t)n, dtype);
  if (q.examples.empty()) return parts;
  auto name = [](int64_t part) { return part ? "layer " + to_string(part - 1) : "embeddings"; };
  const std::vector<Precision> none((size_t)n, Precision::f32);
  const Quantizing::Cost f32 = q.measure("all", Precision::f32, none);
  std::vector<std::pair<double, int64_t>> by_cost;
  for (int64_t i = 0; i < n; i++) {
    std::vector<Precision> one = none;
    one[(size_t)i] = dtype;
    by_cost.emplace_back(q.measure(name(i), dtype, one).cosine, i);
  }
  std::sort(by_cost.begin(), by_cost.end());
  Quantizing::Cost all = q.measure("all", dtype, parts);
  const Precision higher = dtype == Precision::int8 ? Precision::bf16 : Precision::f32;
  for (size_t i = 0; max_drop && i < by_cost.size() && all.drop(f32) > *max_drop; i++) {
    const int64_t part = by_cost[i].second;
    parts[(size_t)part] = higher;
    all = q.measure("all, " + name(part) + " in " + name_of(higher), dtype, parts);
  }
  if (max_drop && all.drop(f32) > *max_drop)
    throw Error("--max-drop " + exact(*max_drop) + ": not reached, with every part in bf16 the drop is " + format_number(all.drop(f32)) +
                "; allow more, or take --dtype bf16, of which parts may stay in f32");
  return parts;
}

std::string weights_size(const std::string& folder) {
  double bytes = 0;
  for (const auto& entry : fs::directory_iterator(folder))
    if (const std::string name = entry.path().filename().string(); name.starts_with("model") || name.starts_with("pytorch_model"))
      bytes += (double)entry.file_size();
  return fixed(bytes / (1 << 20), 1) + " MiB";
}

void cmd_quantize(Args& a) {
  const bool wide = a.take_choice("dtype", {"int8", "bf16"}, "of the layers' weights and the word embeddings");  // before Common's own
  const Precision dtype = wide ? Precision::bf16 : Precision::int8;
  Common common(a);
  const std::string model = a.need("model", "DIR", "the folder to read"), output = a.need("output", "DIR", "the folder to write");
  Source source = take_source(a, "dev", "texts, labelled ones for a task model (for vectors: pairs, where --columns names a label)");
  const std::optional<double> max_drop =
      a.take_optional("max-drop", 0, 1, "the parts that cost most keep more bits until metric (else 1 - cosine) falls by no more than X");
  const int64_t batch_tokens = a.take_int("batch-tokens", 8192, 1, 1 << 30, "tokens of a batch");
  const bool overwrite = take_overwrite(a);
  a.done();
  a.needs("max-drop", "dev", ": texts to measure the drop on");
  refuse_same_folder(model, output);
  check_output(output, {}, overwrite);
  Quantizing q(model, batch_tokens);
  const FolderLock lock = lock_output(output, {}, overwrite);
  if (!source.files.empty()) q.read(source);
  const std::vector<Precision> parts = choose_precisions(q, dtype, max_drop);
  Bert& bert = q.plain.bert;
  const Bert from = bert;
  for (size_t i = 0; i < parts.size(); i++) narrow_part(bert, (int64_t)i, from, parts[i]);
  bert.config.quantized = dtype;
  save_folder(output, bert, q.plain.carried);
  note("bert: " + output + ": " + weights_size(model) + " of weights became " + weights_size(output));
}

// ==== 15 bench ====================================================================================================
// Rows `what engine config metric value`: as TSV, or aligned for people.
struct BenchTable {
  std::string what, config;
  bool tsv, profiled;
  Precision precision;
  std::string engine = what == "tokenize" || what == "vocab" ? "ours" : std::string("ours-") + name_of(precision);

  void row(const std::string& by, const std::string& of, const std::string& metric, double value) const {
    if (tsv)
      std::printf("%s\t%s\t%s\t%s\t%s\n", what.c_str(), by.c_str(), of.c_str(), metric.c_str(), format_number(value).c_str());
    else
      std::printf("%-9s %-18s %-24s %12s %s\n", what.c_str(), by.c_str(), of.c_str(), fixed(value, value < 10 ? 3 : 1).c_str(),
                  metric.c_str());
    flush_output();
  }
  void rows(const Numbers& list) const {
    for (const auto& [metric, value] : list) row(engine, config, metric, value);
  }
  template <class F>
  void model(const Bert& bert, std::span<const Batch> batches, double enough, F&& call) const;
  template <class F>
  void profile(double batches, F&& call) const;
};

void bench_gemm(const BenchTable& table) {
  const std::pair<int64_t, int64_t> layers[] = {{128, 128}, {512, 128},  {128, 512},  {256, 256}, {1024, 256}, {256, 1024},
                                                {384, 384}, {1536, 384}, {384, 1536}, {768, 768}, {3072, 768}, {768, 3072}};
  for (const int t : std::set<int>{1, threads()}) {
    const UseThreads use(t);
    double peak = 0;
    for (const auto& [n, k] : layers)
      for (const int64_t m : {32, 512, 4096})
        for (const auto& [engine, speed] : product_speeds(m, n, k)) {
          table.row(engine, "M" + to_string(m) + "-N" + to_string(n) + "-K" + to_string(k) + "-t" + to_string(t), "GFLOP/s", speed);
          peak = std::max(peak, engine.ends_with("-f32") ? speed : 0);
        }
    table.row("peak", "best-of-these-t" + to_string(t), "GFLOP/s", peak);
  }
}

// Seconds of a forward on these batches if each product ran at gemm's peak: the best speed at its n and k and the largest m of 32, 512 and
// 4096 that the batch reaches; attention's two count as more of those of H by H. A backward has two more of the same sizes for each.
double seconds_at_peak(const Bert& bert, std::span<const Batch> batches, Precision precision) {
  const Config& c = bert.config;
  const int64_t H = c.hidden_size, F = c.intermediate_size, V = c.vocab_size;
  std::map<std::array<int64_t, 3>, double> speeds;
  auto took = [&](double rows, int64_t n, int64_t k, double gflop) {
    const int64_t m = rows < 512 ? 32 : rows < 4096 ? 512 : 4096;
    double& speed = speeds[{m, n, k}];
    if (!speed) speed = best_speed(m, n, k, precision);
    return gflop / speed;
  };
  double seconds = 0;
  for (const Batch& b : batches) {
    const Tokens read = bert.read_by_head(b);
    const double N = (double)b.tokens(), last = read.empty() ? N : (double)read.size(), head = (double)b.masked.size();
    const double pair = 2e-9 * (double)H, in_last = pair * last * (double)F;  // up, or down
    const double wide = pair * N * (double)(F * (c.num_hidden_layers - 1));
    seconds += took(N, H, H, 1e-9 * forward_flops(c, b, read) - 2 * (wide + in_last)) + took(N, F, H, wide) + took(N, H, F, wide);
    seconds += took(last, F, H, in_last) + took(last, H, F, in_last);
    if (head > 0) seconds += took(head, H, H, pair * head * (double)H) + took(head, V, H, pair * head * (double)V);
  }
  return seconds;
}

// What a batch takes of a call that computes all of these: a forward, or a step of training; gemm's peak is measured last.
template <class F>
void BenchTable::model(const Bert& bert, std::span<const Batch> batches, double enough, F&& call) const {
  const double passes = what == "train" ? 3 : 1;  // backward is twice the forward's products
  const double n = (double)batches.size(), seconds = median_seconds(enough, call) / n;
  double tokens = 0, gflop = 0;  // of the layers' products, those that are made
  for (const Batch& b : batches)
    tokens += (double)b.tokens() / n, gflop += 1e-9 * passes * forward_flops(bert.config, b, bert.read_by_head(b)) / n;
  rows({{"ms", seconds * 1e3}, {"tok/s", tokens / seconds}, {"GFLOP/s", gflop / seconds}, {"MiB", peak_mib()}});
  const double at_peak = passes * seconds_at_peak(bert, batches, precision) / n;
  rows({{tsv ? "%_of_gemm_peak" : "% of gemm's peak at the shapes of its products", 100 * at_peak / seconds}});
  if (profiled) profile(n, call);
}

// Where the time of a call's `batches` goes: by op, the longest first, its ms a batch over all threads and its share of
// what all ops took; and what passed meanwhile.
template <class F>
void BenchTable::profile(double batches, F&& call) const {
  const Profile profile;
  double n = 0, all = 0;
  const double began = now();
  for (; n < 3 * batches || now() - began < 1; n += batches) call();
  const double passed = now() - began;
  std::multimap<double, std::string, std::greater<>> ops;
  for (const auto& [op, total] : profile.ops()) ops.emplace(total.seconds, op), all += total.seconds;
  for (const auto& [seconds, op] : ops) {
    const double ms = 1e3 * seconds / n, share = 100 * seconds / all;
    rows({{tsv ? op + "_ms" : "ms " + op + ", " + fixed(share, 1) + " %", ms}});
    if (tsv) rows({{op + "_%", share}});
  }
  rows({{tsv ? "profiled" : "ms in all, profiled", 1e3 * passed / n}});
}

// The attention op alone: 4096 tokens in rows of one length, 12 heads of 32 and of 64. Its two products take 4 T H a token.
void bench_attention(BenchTable table) {
  constexpr int64_t N = 4096, A = 12, P = 512;
  const double peak = table.tsv ? 0 : gemm_now(Precision::f32);
  Random random({1, 0, 0, kOrderStream});
  Dropout none;
  for (const int64_t H : {384, 768}) {
    Tensor qkv({N, 3 * H});
    for (int64_t i = 0; i < qkv.size(); i++) qkv.data()[i] = random.truncated_normal();
    for (const int64_t T : {32, 128, 512}) {
      Offsets rows{0};
      while (rows.back() < N) rows.push_back(rows.back() + T);
      const double seconds = median_seconds(0.3, [&] { attention(qkv, rows, A, P, none); });
      const double gflops = 4e-9 * (double)(N * T * H) / seconds;
      table.config = "H" + to_string(H) + "-A" + to_string(A) + "-T" + to_string(T) + "-t" + to_string(threads());
      table.rows({{"ms", seconds * 1e3}, {"GFLOP/s", gflops}});
      if (peak > 0) table.rows({{"% of the " + fixed(peak, 1) + " GFLOP/s of gemm, now", 100 * gflops / peak}});
    }
  }
}

// minilm-B8T128, or with -dense or -real behind it.
struct BenchShape {
  std::string name, kind;
  int64_t rows = 0, tokens = 0;
};
BenchShape parse_shape(Args& a, const std::string& config) {
  char name[16] = "";
  int end = 0, rows = 0, tokens = 0;
  const int found = std::sscanf(config.c_str(), "%15[a-z]-B%6dT%6d%n", name, &rows, &tokens, &end);
  const BenchShape s{name, config.substr((size_t)end), rows, tokens};
  if (found < 3 || rows < 1 || tokens < 8 || tokens > 512 || !among(s.kind, {"", "-dense", "-real"}))
    a.fail("'" + config + "': MODEL-BrowsTtokens is wanted, as in minilm-B8T128, or for train mini-B32T128-dense or -real");
  return s;
}

// The lines that hold something.
Strings text_lines(const Source& source) {
  Strings texts;
  for (const std::string& file : source.files) {
    Lines lines(file);
    for (std::string line; lines.next(line);)
      if (!line.empty()) texts.push_back(line);
  }
  if (texts.empty()) nothing(source, "texts; give a file with some");
  return texts;
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

void bench_infer(const BenchTable& table, const BenchShape& s, uint64_t seed) {
  Bert bert = Bert::random(Config::named(s.name, kBenchVocab), Task::embed, seed);
  bert.pack(table.precision);
  Random random({seed, 0, 0, kOrderStream});
  const Batch batch = random_batch(s, random);
  table.model(bert, {&batch, 1}, 1.0, [&] { bert.forward(batch); });
}

// Real pairs, a TAB b, as rows of one batch a step.
std::vector<Batch> real_batches(const BenchShape& s, const Source& source, const WordPiece& t) {
  std::vector<Batch> batches;
  Rows rows(source);
  std::vector<Row> chunk;
  bool cut = false;
  while (batches.size() < 16 && read_chunk(rows, chunk, (size_t)s.rows)) {  // more would only take longer
    batches.emplace_back();
    for (const Row& row : chunk) {
      const Example e = encode_row(t, row, s.tokens, false, cut);
      batches.back().add_row(e.ids, e.segments);
    }
  }
  if (batches.empty()) throw Error("bench train: no texts in --input");
  return batches;
}

void bench_train(const BenchTable& table, const BenchShape& s, const Source& source, const std::string& vocab, uint64_t seed) {
  const bool real = s.kind == "-real";
  if (real && (vocab.empty() || source.files.empty()))
    throw Usage("bench train " + table.config + ": --input with pairs, and --vocab or --model are wanted");
  const std::optional<WordPiece> t = real ? std::optional(WordPiece::load(vocab)) : std::nullopt;
  Random random({seed, 0, 0, kOrderStream});
  std::vector<Batch> batches = real ? real_batches(s, source, *t) : std::vector{random_batch(s, random)};
  for (Batch& b : batches)
    for (int64_t r = 0; r < b.rows(); r++) b.labels.push_back((int32_t)random.below(2));
  const MaskVocabulary mask = t ? mask_vocabulary(*t) : MaskVocabulary{101, 102, 103, std::vector<uint8_t>(kBenchVocab)};
  TrainSettings settings;
  settings.steps = 1000000, settings.warmup = 0, settings.seed = seed, settings.products = table.precision;
  Trainer trainer(Bert::random(Config::named(s.name, kBenchVocab), Task::pretrain, seed), settings);
  auto masked = [&](Batch b) {
    mask_tokens(b, mask, 0.15, false, {seed, (uint32_t)trainer.done(), 0, kMaskStream});
    return b;
  };
  std::vector<Batch> counted;
  for (const Batch& b : batches) counted.push_back(masked(b));
  table.model(trainer.model(), counted, 2.0, [&] {
    for (const Batch& b : batches) {
      const Batch one = masked(b);
      trainer.step({&one, 1});
    }
  });
}

// A text a line to vectors. `start`: one, for who times this whole process. `query…`: one after another, each timed. Else all at once.
void bench_sentences(const BenchTable& table, const Source& source, const std::string& path) {
  if (path.empty() || source.files.empty()) throw Usage("bench sentences: --model, and --input with a text a line are wanted");
  const Model model = Model::load(path, table.precision);
  const Strings texts = text_lines(source);
  if (table.config == "start") return void(model.embed(texts[0]));
  if (table.config.starts_with("query")) {
    std::vector<double> ms;
    for (const std::string& text : texts) {
      const double began = now();
      model.embed(text);
      ms.push_back(1e3 * (now() - began));
    }
    std::sort(ms.begin(), ms.end());
    return table.rows({{"ms", median(ms)}, {"p95_ms", ms[(size_t)((double)ms.size() * 0.95)]}});
  }
  const double began = now();
  model.embed(texts);
  table.rows({{"texts/s", (double)texts.size() / (now() - began)}, {"MiB", peak_mib()}});
}

// Texts in memory to ids, some 10 MB in a call, as the peers are timed.
void bench_tokenize(const BenchTable& table, const Source& source, const std::string& vocab) {
  if (vocab.empty() || source.files.empty()) throw Usage("bench tokenize: --input, and --vocab or --model are wanted");
  const Strings texts = text_lines(source);
  std::vector<std::vector<std::string_view>> calls;
  double bytes = 0;
  for (size_t i = 0, size = 10000000; i < texts.size(); size += texts[i++].size()) {
    if (size >= 10000000) calls.emplace_back(), size = 0;
    calls.back().push_back(texts[i]), bytes += (double)texts[i].size();
  }
  const double load = median_seconds(0.1, [&] { WordPiece::load(vocab); });
  const WordPiece t = WordPiece::load(vocab);
  std::vector<int32_t> ids;
  std::vector<int64_t> ends;
  const double seconds = median_seconds(0.2, [&] {
    for (const auto& call : calls) ids.clear(), ends.clear(), t.append_ids(call, ids, ends, threads());
  });
  table.rows({{"MB/s", bytes / 1e6 / seconds}, {"texts/s", (double)texts.size() / seconds}, {"load_ms", load * 1e3}, {"MiB", peak_mib()}});
}

// A vocabulary of 30,000 pieces from a file, reading included.
void bench_vocab(const BenchTable& table, const Source& source) {
  if (source.files.empty()) throw Usage("bench vocab: --input is wanted");
  const double began = now();
  VocabTrainer trainer({});
  std::string line;
  for (const std::string& file : source.files)
    for (Lines lines(file); lines.next(line);) trainer.add_text(line);
  const double pieces = (double)trainer.train({}).size();
  table.rows({{"s", now() - began}, {"MiB", peak_mib()}, {"pieces", pieces}});
}

void cmd_bench(Args& a) {
  a.empty_is_absent = true;
  const std::string part = a.take_word(), config = a.take_word();
  Common common(a, part == "infer" || part == "sentences" ? Precision::int8 : part == "train" ? Precision::bf16 : Precision::f32);
  const std::string model = a.take("model", "DIR", "what a part needs; others are taken and not used");
  const std::string vocab = a.take("vocab", "FILE", "likewise", model);
  Source source;
  source.files = a.take_all("input", "likewise"), source.format = kLines;  // whatever its ending: a text a line, or text TAB pair
  const bool tsv = a.take_switch("tsv", "rows: what engine config metric value");
  const bool profile = a.take_switch("profile", "infer, train: then each op's ms a call, over all threads, and its share");
  const BenchTable table{part, config, tsv, profile, common.precision.value_or(Precision::f32)};
  a.done();
  if (among(part, {"gemm", "attention"}) && !config.empty()) a.fail("'" + config + "': " + part + " takes no CONFIG");
  if (part == "gemm") return bench_gemm(table);
  if (part == "attention") return bench_attention(table);
  if (part == "infer") return bench_infer(table, parse_shape(a, config), common.seed);
  if (part == "train") return bench_train(table, parse_shape(a, config), source, vocab, common.seed);
  if (part == "sentences") return bench_sentences(table, source, model);
  if (part == "tokenize") return bench_tokenize(table, source, vocab);
  if (part == "vocab") return bench_vocab(table, source);
  a.fail("'" + part + "': gemm, attention, infer, train, sentences, tokenize or vocab is wanted");
}

// ==== 16 the table of commands, main ==============================================================================
struct Command {
  const char *name, *what;
  void (*run)(Args&);
  const char *usage, *more = "";
};

const Command kCommands[] = {
    // in the order of the help
    {"vocab", "train a WordPiece vocabulary from text", cmd_vocab, "--input FILE… --size N --output DIR"},
    {"tokenize", "text to word pieces or ids, or back", cmd_tokenize, "--vocab DIR-or-FILE [--input FILE…] [--output FILE]"},
    {"pretrain", "train a BERT from raw text", cmd_pretrain, "--input FILE… --vocab DIR --config NAME --output DIR --steps N"},
    {"finetune", "train a model for a task on labelled texts", cmd_finetune, "--task TASK --model DIR --train FILE --output DIR"},
    {"evaluate", "score a model on labelled texts, or on plain text", cmd_evaluate, "--model DIR --input FILE",
     "  a task model wants labelled data; a masked-word model wants plain text, masked from --seed\n"},
    {"predict", "a task model's answers", cmd_predict, "--model DIR [--input FILE…] [--output FILE]",
     "  tags: of text its entities, where an I- that goes on with nothing begins one (conlleval's rule); of conll the tags as they are "
     "said\n"},
    {"fill-mask", "guess the words that [MASK] hides", cmd_fill_mask, "--model DIR [--input FILE…] [--output FILE]"},
    {"embed", "one vector a text", cmd_embed, "--model DIR [--input FILE…] [--output FILE]"},
    {"search", "the lines of a file that are closest in meaning", cmd_search, "--model DIR --corpus FILE [--input FILE…] [--output FILE]",
     "  each input text is a query; results: query, rank, cosine, line, text\n"},
    {"info", "what a model folder holds, or what this machine has", cmd_info, "[--model DIR [--compare DIR]] [--json] [--output FILE]"},
    {"convert", "a model folder as this engine writes it, from any it reads", cmd_convert, "--model DIR --output DIR"},
    {"quantize", "a smaller folder that computes in fewer bits, and what it costs", cmd_quantize, "--model DIR --output DIR [--dev FILE]",
     "  --dev prints for each part, and for all, part TAB dtype TAB mean cosine to f32 TAB smallest TAB the metric\n"},
    {"bench", "how fast, beside this machine's own multiply", cmd_bench,
     "gemm | attention | infer CONFIG | train CONFIG | sentences CONFIG | tokenize CONFIG | vocab",
     "  CONFIG: minilm-B8T128; for train mini-B32T128-dense or -real; for tokenize any name; for sentences query (each line of\n"
     "  --input alone), start (the first alone, for who times the process), or any other name: all lines\n"},
};

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
  for (const char* later : {"export", "explain", "serve"})
    if (name == later) throw Error(name + ": not built yet");
  throw Usage("no command '" + name + "'; did you mean bert " + nearest(name, names) + "? (bert help lists all)");
}

void help_command(const std::string& name) {
  const Command& c = find_command(name);
  Args a(name, {}, true);
  try {
    c.run(a);
  } catch (const Args::Described&) {}
  std::printf("%s: %s\n\nbert %s %s\n%s", c.name, c.what, c.name, c.usage, c.more);
  for (const auto& [group, lines] : a.help) std::printf("%s%s\n%s", group.empty() ? "" : "\n", group.c_str(), lines.c_str());
}

int run(const Strings& words) {
  const std::string first = words.empty() ? "" : words[0];
  if (first.empty()) return help(stderr), 2;
  if (first == "version" || first == "--version") {
    std::printf("bert %s\n%s\nUnicode tables from %s\n", kVersion, backend_description().c_str(), unicode_tables());
  } else if (among(first, {"help", "--help", "-h"})) {
    if (words.size() > 2) throw Usage("bert help COMMAND: one command is wanted");
    words.size() > 1 ? help_command(words[1]) : help(stdout);
  } else if (among("--help", words) || among("-h", words)) {
    help_command(first);
  } else {
    Args args(first, Strings(words.begin() + 1, words.end()));
    find_command(first).run(args);
  }
  return 0;
}

std::string shell_quoted(const std::string& word) {
  if (!word.empty() && word.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=./,:@%+") == word.npos)
    return word;
  return "'" + join(split(word, '\''), "'\\''") + "'";
}

}  // namespace

int run_main(const Strings& words) {
  std::signal(SIGXFSZ, SIG_IGN);     // a file over the limit is an error of its write
  std::signal(SIGPIPE, SIG_IGN);     // a closed pipe is seen where it is written to
  std::ios::sync_with_stdio(false);  // std::cin with a buffer of its own
  std::setvbuf(stdout, nullptr, _IOFBF, 1 << 16);
  for (const std::string& word : words) command_line += shell_quoted(word) + " ";
  command_line += among("--resume", words) ? "" : "--resume";
  try {
    const int status = run(Strings(words.begin() + 1, words.end()));
    flush_output();
    if (output_error && output_error != EPIPE) throw Error(std::string("standard output: cannot write: ") + std::strerror(output_error));
    return status;
  } catch (const ClosedPipe&) { return 0; } catch (const Stopped& s) {
    return 128 + s.signal;
  } catch (const Usage& e) {
    say("bert: " + one_line(e.what()));
    return 2;
  } catch (const std::bad_alloc&) {
    say("bert: out of memory; a smaller --batch-tokens or --batch takes less");
  } catch (const std::exception& e) { say("bert: " + one_line(e.what())); }
  return 1;
}

}  // namespace bert

int main(int argc, char** argv) { return bert::run_main({argv, argv + argc}); }
