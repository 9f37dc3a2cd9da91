// tensor.h -- tensors, reverse-mode autograd, AdamW and safetensors in three files: tensor.h, tensor.cpp, autograd.cpp.
//
//   To use:     copy the three, compile as C++20 with -ffp-contract=off -pthread, link -ldl -lopenblas (or define BERT_NO_BLAS).
//   Threads:    a Tensor may be read from many threads and written from one; a Tape belongs to its thread.
//   Errors:     every function may throw bert::Error; nothing prints, exits or aborts. Three variables of the environment are
//               read: BERT_KERNELS (a kernel table's name), BERT_GEMM (own, openblas), BERT_TRACE (Tape::trace lists each op).
//   Not here:   double or half arithmetic, strided views, broadcasting beyond what BERT uses, second derivatives.
//
//   A complete program, one step of gradient descent on y = w x:
//
//     #include "tensor.h"
//     int main() {
//       bert::Tensor x({4, 3}, 1.f), w({2, 3}, 0.5f), target({4, 2}, 1.f);
//       w.set_needs_grad();
//       bert::Tape tape;
//       tape.backward(bert::mse_loss(bert::linear(x, w), target));
//       for (int64_t i = 0; i < w.size(); i++) w.data()[i] -= 0.1f * w.grad()[i];
//     }
//
//   Contents:   1 errors  2 JSON  3 shapes and tensors  4 threads and random numbers  5 tape  6 differentiable ops
//               7 optimiser  8 files  9 kernels, products, devices, this machine
//
//   Letters in shape comments, here and in every file:
//     N tokens in a packed batch, R rows (texts or pairs), T tokens of one row, H hidden, A heads, D = H/A, F feed-forward,
//     V vocabulary, M masked tokens, L layers, C classes. Outermost first, last dimension contiguous. Weights are [out, in].
#pragma once
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace bert {

// ==== 1 errors ====================================================================================================
// One line: what was read or called, what is wrong, the cure.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ==== 2 JSON ======================================================================================================
// The number that the whole text is, without a locale.
template <class T>
std::optional<T> parse_number(std::string_view text) {
  T value{};
  const auto r = std::from_chars(text.data(), text.data() + text.size(), value);
  if (r.ec != std::errc() || r.ptr != text.data() + text.size()) return {};
  return value;
}
// The shortest text that reads back as the same number.
template <class T>
std::string exact(T v) {
  char text[40];
  return std::string(text, std::to_chars(text, text + sizeof text, v).ptr);
}

// A JSON value. Numbers keep their text (a config may hold an integer of 31 digits), objects their order.
// Everything here is inline and needs the standard library alone, so that the tokenizer can stand without tensor.cpp.
class Json {
 public:
  enum Kind { null, boolean, number, string, array, object };

  Json() = default;
  explicit Json(std::string value) : kind_(string), text_(std::move(value)) {}
  // Strict RFC 8259; throws Error "where:line:column: ...". A value takes some 90 bytes, and may take 2 in the text: max_values
  // bounds the memory that a hostile file can claim.
  static Json parse(std::string_view text, const std::string& where, size_t max_values = SIZE_MAX);

  bool is(Kind k) const { return kind_ == k; }
  bool as_bool(const std::string& where) const;             // these five throw Error("where: not a ...") for another kind
  double as_double(const std::string& where) const;         // and these two Error("where: 1e999 is not ...") for what the type cannot hold
  int64_t as_int(const std::string& where) const;           // only a number written as an integer
  const std::string& as_string(const std::string& where) const;
  const std::vector<Json>& items(const std::string& where) const;   // of an array
  const std::vector<std::pair<std::string, Json>>& members() const { return members_; }   // of an object; else empty
  const Json* find(std::string_view key) const;             // null when absent, or when this is no object

 private:
  friend class JsonReader;
  template <class T>   // `what` ends the message: a number is not ...
  T number_as(const std::string& where, const char* what) const {
    if (kind_ != number) throw Error(where + ": not a number");
    if (const auto v = parse_number<T>(text_)) return *v;
    throw Error(where + ": " + text_.substr(0, 64) + " is not " + what);
  }
  Kind kind_ = null;
  bool truth_ = false;
  std::string text_;   // a string's value, or a number as it was written
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};

std::string json_quote(std::string_view utf8);   // "..." with all controls escaped; bytes that are not UTF-8 become U+FFFD
// Of values that are JSON already, or whole numbers.
template <class T>
std::string json_list(const std::vector<T>& values) {
  std::string out;
  for (const T& v : values) {
    if (!out.empty()) out += ',';
    if constexpr (std::is_same_v<T, std::string>) out += v;
    else out += std::to_string(v);
  }
  return "[" + out + "]";
}
std::string json_object(const std::vector<std::pair<std::string, std::string>>& members);   // [tensor.cpp]

// Bytes of the UTF-8 sequence that starts at s[i], 1 to 4; 0 where none does. As Unicode's table 3-7 allows them: no overlong
// form, no surrogate, at most U+10FFFF.
inline size_t utf8_length(std::string_view s, size_t i) {
  const unsigned char c = (unsigned char)s[i];
  if (c < 0x80) return 1;
  const size_t n = c >= 0xC2 && c < 0xE0 ? 2 : c >= 0xE0 && c < 0xF0 ? 3 : c >= 0xF0 && c < 0xF5 ? 4 : 0;
  if (!n || n > s.size() - i) return 0;
  const unsigned char low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80, high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
  for (size_t k = 1; k < n; k++) {
    const unsigned char d = (unsigned char)s[i + k];
    if (d < (k == 1 ? low : 0x80) || d > (k == 1 ? high : 0xBF)) return 0;
  }
  return n;
}

// Reads one JSON text by recursive descent. Depth is limited, so that a hostile file cannot overflow the stack.
class JsonReader {
 public:
  JsonReader(std::string_view text, const std::string& where, size_t max_values) : s_(text), where_(where), left_(max_values) {}

  Json document() {
    Json v = value(0);
    space();
    if (at_ < s_.size()) fail("something follows the value");
    return v;
  }

 private:
  static constexpr int kMaxDepth = 128;
  std::string_view s_;
  const std::string& where_;
  size_t at_ = 0, left_;

  [[noreturn]] void fail(const std::string& what) const {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < at_ && i < s_.size(); i++) s_[i] == '\n' ? (line++, column = 1) : column++;
    throw Error(where_ + ":" + std::to_string(line) + ":" + std::to_string(column) + ": not JSON: " + what);
  }
  void space() {
    while (at_ < s_.size() && (s_[at_] == ' ' || s_[at_] == '\t' || s_[at_] == '\n' || s_[at_] == '\r')) at_++;
  }
  char peek() const { return at_ < s_.size() ? s_[at_] : '\0'; }
  void expect(std::string_view word) {
    if (s_.substr(at_, word.size()) != word) fail(at_ < s_.size() ? "'" + std::string(word) + "' expected" : "the text ends early");
    at_ += word.size();
  }

  Json value(int depth) {
    if (depth > kMaxDepth) fail("nested deeper than " + std::to_string(kMaxDepth));
    if (left_-- == 0) fail("too many values");
    space();
    Json v;
    switch (peek()) {
      case '{': v.kind_ = Json::object, list('}', [&] { member(v, depth); }); break;
      case '[': v.kind_ = Json::array, list(']', [&] { v.items_.push_back(value(depth + 1)); }); break;
      case '"': v.kind_ = Json::string, v.text_ = string(); break;
      case 't': expect("true"), v.kind_ = Json::boolean, v.truth_ = true; break;
      case 'f': expect("false"), v.kind_ = Json::boolean; break;
      case 'n': expect("null"); break;
      default: v.kind_ = Json::number, v.text_ = number();
    }
    return v;
  }
  // Items with commas between, from the opening bracket to `close`; item() reads one.
  template <class Item>
  void list(char close, Item item) {
    at_++, space();
    if (peek() == close) return void(at_++);
    for (;;) {
      item(), space();
      if (peek() == close) return void(at_++);
      expect(",");
    }
  }
  void member(Json& v, int depth) {
    space();
    if (peek() != '"') fail("a key in quotes expected");
    std::string key = string();
    space(), expect(":");
    v.members_.emplace_back(std::move(key), value(depth + 1));
  }
  std::string number() {
    const size_t start = at_;
    auto digits = [&] {
      if (peek() < '0' || peek() > '9') fail(at_ < s_.size() ? "a value expected" : "the text ends early");
      while (peek() >= '0' && peek() <= '9') at_++;
    };
    if (peek() == '-') at_++;
    if (peek() == '0') at_++;
    else digits();
    if (peek() == '.') at_++, digits();
    if (peek() == 'e' || peek() == 'E') {
      at_++;
      if (peek() == '+' || peek() == '-') at_++;
      digits();
    }
    return std::string(s_.substr(start, at_ - start));
  }
  unsigned hex4() {
    unsigned v = 0;
    const std::string_view digits = s_.substr(at_, 4);
    if (std::from_chars(digits.data(), digits.data() + digits.size(), v, 16).ptr - digits.data() != 4)
      fail("four hexadecimal digits expected after \\u");
    at_ += 4;
    return v;
  }
  void escape(std::string& out) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char c = peek();
    for (int i = 0; from[i]; i++)
      if (c == from[i]) return at_++, void(out += to[i]);
    if (c != 'u') fail("unknown escape");
    at_++;
    unsigned u = hex4();
    if (u >= 0xDC00 && u < 0xE000) fail("a low surrogate without its high one");
    if (u >= 0xD800 && u < 0xDC00) {
      if (s_.substr(at_, 2) != "\\u") fail("a high surrogate without its low one");
      at_ += 2;
      const unsigned low = hex4();
      if (low < 0xDC00 || low >= 0xE000) fail("a high surrogate without its low one");
      u = 0x10000 + ((u - 0xD800) << 10) + (low - 0xDC00);
    }
    if (u < 0x80) out += (char)u;
    else if (u < 0x800) out += {(char)(0xC0 | u >> 6), (char)(0x80 | (u & 63))};
    else if (u < 0x10000) out += {(char)(0xE0 | u >> 12), (char)(0x80 | (u >> 6 & 63)), (char)(0x80 | (u & 63))};
    else out += {(char)(0xF0 | u >> 18), (char)(0x80 | (u >> 12 & 63)), (char)(0x80 | (u >> 6 & 63)), (char)(0x80 | (u & 63))};
  }
  std::string string() {
    std::string out;
    for (at_++;;) {
      if (at_ >= s_.size()) fail("a string that does not end");
      const unsigned char c = (unsigned char)s_[at_];
      if (c == '"') return at_++, out;
      if (c < 0x20) fail("a control character inside a string");
      if (c == '\\') at_++, escape(out);
      else if (const size_t n = utf8_length(s_, at_)) out += s_.substr(at_, n), at_ += n;
      else fail("bytes that are not UTF-8");
    }
  }
};

inline Json Json::parse(std::string_view text, const std::string& where, size_t max_values) {
  return JsonReader(text, where, max_values).document();
}
inline bool Json::as_bool(const std::string& where) const {
  if (kind_ != boolean) throw Error(where + ": not true or false");
  return truth_;
}
inline double Json::as_double(const std::string& where) const { return number_as<double>(where, "within the range of double"); }
inline int64_t Json::as_int(const std::string& where) const { return number_as<int64_t>(where, "an integer of 64 bits"); }
inline const std::string& Json::as_string(const std::string& where) const {
  if (kind_ != string) throw Error(where + ": not a string");
  return text_;
}
inline const std::vector<Json>& Json::items(const std::string& where) const {
  if (kind_ != array) throw Error(where + ": not a list");
  return items_;
}
inline const Json* Json::find(std::string_view key) const {
  for (const auto& [name, v] : members_)
    if (name == key) return &v;
  return nullptr;
}

inline std::string json_quote(std::string_view s) {
  std::string out = "\"";
  for (size_t i = 0; i < s.size();) {
    const unsigned char c = (unsigned char)s[i];
    char hex[8];
    if (c == '"' || c == '\\') out += '\\', out += (char)c, i++;
    else if (c == '\n') out += "\\n", i++;
    else if (c == '\t') out += "\\t", i++;
    else if (c < 0x20 || c == 0x7F) std::snprintf(hex, sizeof hex, "\\u%04x", c), out += hex, i++;
    else if (const size_t n = utf8_length(s, i); !n) out += "\xEF\xBF\xBD", i++;
    else if (n == 2 && c == 0xC2 && (unsigned char)s[i + 1] < 0xA0)   // U+0080 to U+009F: controls too, to a terminal
      std::snprintf(hex, sizeof hex, "\\u%04x", (unsigned char)s[i + 1]), out += hex, i += 2;
    else out += s.substr(i, n), i += n;
  }
  return out + '"';
}

// The bytes of a file. Throws Error naming it and the system's reason.
inline std::string read_file(const std::string& path) {
  std::FILE* f = std::fopen(path.c_str(), "rb");
  if (!f) throw Error(path + ": cannot open: " + std::strerror(errno));
  std::string bytes;
  std::error_code unknown;  // of a pipe, say
  if (const auto size = std::filesystem::file_size(path, unknown); !unknown) bytes.reserve((size_t)size + 64);
  char part[1 << 16];
  errno = 0;
  for (size_t n; (n = std::fread(part, 1, sizeof part, f)) > 0;) bytes.append(part, n);
  const int failed = std::ferror(f) ? (errno ? errno : EIO) : 0;
  std::fclose(f);
  if (failed) throw Error(path + ": cannot read: " + std::strerror(failed));
  return bytes;
}

// ==== 3 shapes and tensors ========================================================================================
// Up to four dimensions, outermost first.
class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : Shape(std::span(dims.begin(), dims.size())) {}
  explicit Shape(std::span<const int64_t> dims);   // throws Error for a fifth or a negative dimension, or a size over 2^60
  int rank() const { return rank_; }
  int64_t size() const;   // the product; 1 for rank 0
  int64_t operator[](int i) const { return dims_[(size_t)i]; }
  int64_t back() const { return rank_ ? dims_[(size_t)rank_ - 1] : 1; }
  friend bool operator==(const Shape&, const Shape&) = default;

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};
std::string to_string(const Shape&);   // [8,128,768]

class PackedWeights;   // section 9
// What products are computed in; sums are f32 always, of int8 products int32.
enum class Precision { f32, bf16, int8 };
const char* name_of(Precision precision);   // f32, bf16, int8

// Rows of numbers in fewer bits, in memory or in a mapped file: n x k bf16, or int8 with a scale for each row.
struct NarrowMatrix {
  Precision precision = Precision::bf16;
  int64_t n = 0, k = 0;
  const char* data = nullptr;
  std::shared_ptr<const void> owner;      // of data
  std::vector<float> scales;              // int8: [n]
  int64_t row_bytes() const { return precision == Precision::bf16 ? 2 * k : k; }
  const char* row(int64_t i) const { return data + i * row_bytes(); }
  void widen(int64_t i, float* to) const;   // row i as k floats
};
class Tensor;
NarrowMatrix narrowed(const Tensor& w, Precision precision);   // w [n,k] rounded, in memory of its own
void round_row(Precision precision, float* x, int64_t n, void* room);   // x as such a row would give it back; room: n times 2 bytes

// A shared handle to f32 numbers: copying a Tensor copies the handle. The memory comes from a reuse pool, aligned to 64 bytes, and
// goes back to it with the last handle. A gradient, of the same shape, is made when first asked for.
class Tensor {
 public:
  Tensor() = default;                                         // empty: tests false, has no data
  explicit Tensor(Shape shape);                               // not initialised
  Tensor(Shape shape, float value);                           // filled
  Tensor(Shape shape, std::span<const float> values);         // copied; throws Error when the sizes differ
  // A read-only view of memory that `owner` keeps alive (a mapped file).
  static Tensor borrowed(Shape shape, const float* data, std::shared_ptr<const void> owner);
  void give_back() const;   // of such a view of a file, or a narrow one: its pages leave this process's memory, until they are read

  explicit operator bool() const { return impl_ != nullptr; }
  bool same(const Tensor& other) const { return impl_ == other.impl_; }   // the same storage and gradient
  const Shape& shape() const;
  int64_t size() const { return shape().size(); }
  int64_t cols() const { return shape().back(); }                          // the last dimension
  int64_t rows() const { return cols() ? size() / cols() : 0; }            // all the others
  static Tensor narrow(NarrowMatrix matrix);                               // [n,k]: has no data(); pack() and embedding_norm take it
  // Throws Error for an empty or narrow Tensor, and for weights that pack() has taken. Where a device is in use, who writes asks for
  // it after the last product, not before: what the device holds stands for the numbers until someone asks.
  float* data() const;
  float item() const;       // the one element; throws Error when there are more

  bool needs_grad() const;
  void set_needs_grad(bool needs = true);
  bool has_grad() const;
  float* grad() const;                     // made, and filled with zeros, on first use
  const Tensor& grad_to_add(bool& add) const;   // as a Tensor, and not filled on first use: then add is false, and the caller stores
  void add_grad(const Tensor& d, float factor) const;   // gradient += factor d; where there is none and factor is 1, it becomes d itself
  Tensor take_grad() const;                // the gradient as a Tensor of its own; this one has none any more
  void drop_grad();
  // This tensor's shape and gradient (which is shared) without its numbers: what a derivative that does not use them keeps.
  Tensor grad_only() const;
  // Weights [N,K] that will not change are laid out for gemm once and their plain form is let go; linear takes either. A narrow matrix
  // keeps the precision that it has.
  void pack(Precision precision = Precision::f32);
  const PackedWeights* packed() const;     // null when not packed
  const NarrowMatrix* narrow() const;      // null when it is no narrow matrix

 private:
  struct Impl;
  struct Gradient;
  friend class Device;
  Impl& impl() const;   // throws Error for an empty Tensor
  Gradient& own_gradient() const;
  void bring_home() const;      // section 9, devices
  void keep_on_device() const;
  std::shared_ptr<Impl> impl_;
};

struct PoolUse {
  size_t held, in_use, peak;   // bytes: taken from the system, lent to tensors, and the most that was lent
};
PoolUse pool_use();

// ==== 4 threads and random numbers ================================================================================
int available_threads();       // the cores this process may use: affinity and the container's quota

// While it lives, work of the calling thread is cut over n threads (0: all available). Results do not depend on n.
class UseThreads {
 public:
  explicit UseThreads(int n);
  ~UseThreads();
  UseThreads(const UseThreads&) = delete;
  UseThreads& operator=(const UseThreads&) = delete;

 private:
  int before_;
};
int threads();                 // of the calling thread, now

// Runs task(i) for every i in [0, n), in any order, each on one thread; an exception of a task reaches the caller. Inside a task a
// second call runs on that thread alone. Every thread computes in the default floating-point mode.
void parallel_for_each(int64_t n, void (*task)(void* context, int64_t i), void* context);
template <class F>
void parallel_for(int64_t n, F&& f) {
  using Task = std::remove_reference_t<F>;
  parallel_for_each(n, [](void* context, int64_t i) { (*static_cast<Task*>(context))(i); },
                    const_cast<void*>(static_cast<const void*>(&f)));
}
// f(begin, end) over [0, n) in pieces of `piece`: for loops whose single step is too small to be a task.
template <class F>
void parallel_ranges(int64_t n, int64_t piece, F&& f) {
  parallel_for((n + piece - 1) / piece, [&](int64_t i) { f(i * piece, std::min(n, (i + 1) * piece)); });
}
// f(i) for every i, in such pieces.
template <class F>
void parallel_each(int64_t n, int64_t piece, F&& f) {
  parallel_ranges(n, piece, [&](int64_t i, int64_t end) { for (; i < end; i++) f(i); });
}

// Default rounding, no traps, denormals kept (or taken and given as zero), while it lives; then as it was.
class DefaultFloatMode {
 public:
  explicit DefaultFloatMode(bool flush_denormals = false);
  ~DefaultFloatMode();
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  unsigned before_;
};

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits as a pure function of a key and
// a counter, so a mask can be drawn again in backward and any part of a run on any thread.
struct PhiloxKey {
  uint64_t seed;
  uint32_t step, micro, op;   // with a block number these are the counter
};
std::array<uint32_t, 4> philox(const PhiloxKey& key, uint32_t block);

// Op numbers of draws that are no op of a forward pass. Ops count from 0.
enum RandomStream : uint32_t { kInitStream = 0x80000000u, kMaskStream = 0xA0000000u, kOrderStream = 0xC0000000u,
    kSplitStream = 0xE0000000u };

// A sequence of draws from one key, for shuffles and choices.
class Random {
 public:
  explicit Random(const PhiloxKey& key) : key_(key) {}
  uint32_t next();                         // 32 random bits
  int64_t below(int64_t n);                // uniform in [0, n), unbiased; n at least 1
  double uniform();                        // [0, 1), 53 bits
  float truncated_normal();                // standard normal cut at 2 standard deviations (std 0.88), Google BERT's initialiser
  template <class T>
  void shuffle(std::vector<T>& v) {        // Fisher-Yates
    for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[(size_t)below((int64_t)i)]);
  }

 private:
  PhiloxKey key_;
  uint32_t block_ = 0;
  std::array<uint32_t, 4> bits_{};
  int left_ = 0;
};

// Where dropout draws from: none (probability 0) unless a training step fills it in. Each op that drops takes the next op number.
struct Dropout {
  float hidden = 0, attention = 0, classifier = 0;   // probabilities
  PhiloxKey key{};
  uint32_t next_op() { return key.op++; }
};

// ==== 5 tape ======================================================================================================
// While a Tape lives on a thread, ops append what their backward needs to it; without one nothing is kept: that is inference.
class Tape {
 public:
  // Throws Error when this thread has one already. products: what `linear` multiplies in, f32 or bf16.
  explicit Tape(Precision products = Precision::f32);
  ~Tape();                                 // frees everything still on it
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;
  // d loss / d x is added to x.grad() for every x that needs it. `loss` has one element. Steps run in reverse and are freed one by
  // one, so memory falls while it walks; a step whose output the loss does not use is passed over. A second call throws Error.
  void backward(const Tensor& loss);
  void backward(const Tensor& y, const Tensor& dy);   // the same from d loss / d y, of y's shape; dy's numbers may be overwritten
  size_t size() const { return steps_.size(); }
  Precision products() const { return products_; }
  // With BERT_TRACE=1 in the environment: one line an op recorded so far, name and shape of its output.
  const std::vector<std::string>& trace() const { return trace_; }

 private:
  friend void record(const char* op, Tensor& out, std::initializer_list<Tensor> in, std::function<void()> backward);
  struct Step {
    const char* op;                        // of static storage, as its record's
    Tensor out;
    std::function<void()> backward;
  };
  std::vector<Step> steps_;
  std::vector<std::string> trace_;
  Precision products_;
  bool done_ = false;
};

// What an op calls last: when a Tape lives here and some input needs a gradient, `out` will too, and `backward` goes on the tape. It
// reads out.grad() and adds to its inputs' grad(). The closure owns what it captured; `out` never owns the closure (no cycle).
void record(const char* op, Tensor& out, std::initializer_list<Tensor> in, std::function<void()> backward);

// f(x, drop), of which nothing but x is kept: backward computes it again. Memory for time (Chen et al. 2016, section 4), the same bytes.
// parameter: one that f trains. f must own what it uses.
using Recomputable = std::function<Tensor(const Tensor& x, Dropout& drop)>;
Tensor recomputed(const Tensor& x, const Tensor& parameter, const Recomputable& f, Dropout& drop);

// While one lives, where the time of the whole process goes, by op: `linear`, and behind it in training `linear backward`. To an op goes
// what has passed on the thread that called it since that thread's op before, or since the Bert::forward around it began. Many threads
// may run ops meanwhile; it is made, read and ended while none does. Without one an op pays for the look at one pointer.
class Profile {
 public:
  struct Op { double seconds = 0; int64_t calls = 0; };
  Profile();                               // throws Error when the process has one already
  ~Profile();
  const std::map<std::string, Op>& ops() const { return ops_; }
  static void lap(const char* op = nullptr, const char* pass = "");   // what record calls; without a name it only sets the mark

 private:
  double began_;
  std::map<std::string, Op> ops_;
  std::mutex lock_;                        // of ops_
};

// ==== 6 differentiable ops ========================================================== [autograd.cpp, one section each]
// All return a new Tensor that shares no storage with the inputs, and throw Error naming the op and the shapes that do not fit.
// gelu: x Phi(x) by erf; gelu_tanh: Hendrycks and Gimpel 2016, eq. 2's approximation
enum class Activation { none, gelu, gelu_tanh, tanh, relu };
using Offsets = std::vector<int64_t>;                          // [R+1]: row r is tokens offsets[r] .. offsets[r+1] of a packed batch

// y = act(x w^T + b):   x [...,I]   w [O,I], plain or packed   b [O] or empty   ->   [...,O].   One gemm, bias and activation in it.
Tensor linear(const Tensor& x, const Tensor& w, const Tensor& b = {}, Activation act = Activation::none);
// Multi-head self-attention, each row by itself: softmax(q k^T / sqrt(D)) v for each head.   Vaswani et al. 2017, eq. 1.
//   qkv [N,3H], the three side by side; P = maximum positions (numbers the dropout draws)   ->   [N,H]
// queries: M tokens, ascending, that ask; all are asked (keys and values)   ->   [M,H].   Empty: every token asks.
Tensor attention(const Tensor& qkv, const Offsets& offsets, int64_t heads, int64_t max_positions, Dropout& drop,
                 const std::vector<int64_t>& queries = {});
// LayerNorm(x + dropout(f)):   x, f [N,H]   gamma, beta [H]   ->   [N,H].   Ba et al. 2016, biased variance. `f` may be empty.
Tensor residual_norm(const Tensor& x, const Tensor& f, const Tensor& gamma, const Tensor& beta, float eps, Dropout& drop);
// dropout(LayerNorm(word[ids] + segment[segments] + position[positions])):   tables [V,H] [S,H] [P,H]   ->   [N,H]
// word may be narrow; `rounded`: each of its rows is taken as if it were stored so.
Tensor embedding_norm(const Tensor& word, const Tensor& segment, const Tensor& position, const std::vector<int32_t>& ids,
                      const std::vector<int32_t>& segments, const std::vector<int32_t>& positions, const Tensor& gamma, const Tensor& beta,
                      float eps, Dropout& drop, Precision rounded = Precision::f32);
Tensor dropout(const Tensor& x, Dropout& drop);                                       // x / (1 - p) where kept, else 0
Tensor gather_rows(const Tensor& x, const std::vector<int64_t>& rows);                // x [N,H] -> [rows.size(), H]
Tensor place_rows(const Tensor& x, const std::vector<int64_t>& rows, int64_t n);      // x [M,H] -> [n,H]: row rows[i] is x's i-th, others 0
Tensor mean_rows(const Tensor& x, const Offsets& offsets);                            // x [N,H] -> [R,H]: the mean of each row's tokens
Tensor normalize_rows(const Tensor& x);                                               // x / max(|x|_2, 1e-12) by row
Tensor softmax(const Tensor& x);                                                      // over the last dimension
Tensor add(const Tensor& a, const Tensor& b);                                         // same shape
Tensor scale(const Tensor& x, float factor);                                          // x factor
Tensor row_dots(const Tensor& a, const Tensor& b);                                    // a, b [R,H] -> [R,1]: <a_r, b_r>
// Losses, each a Tensor [1], summed in double. `divisor` is what the sum is divided by (the whole step's count); 0: the count here.
constexpr int32_t kIgnored = -100;                                                    // a label that takes no part
// What a class counts ([C]; empty: each 1), and the share of a label that goes to all classes alike (Szegedy et al. 2016, section 7).
struct ClassRule {
  std::vector<float> weights;
  float smoothing = 0;
  float weight(int32_t label) const { return weights.empty() ? 1 : weights[(size_t)label]; }
};
// logits [M,C]. The number of rows whose largest logit is their label's is added to `right`. The count is the sum of the labels' weights.
Tensor cross_entropy(const Tensor& logits, const std::vector<int32_t>& labels, double divisor = 0, int64_t* right = nullptr,
                     const ClassRule& rule = {});
// cross_entropy of linear(x, w, b) without holding its logits: x [M,E], w [V,E], b [V], labels [M], each a class. It computes the gradients
// on its way and keeps them for backward.
Tensor linear_cross_entropy(const Tensor& x, const Tensor& w, const Tensor& b, const std::vector<int32_t>& labels, double divisor = 0,
                            int64_t* right = nullptr);
// Which of its own tokens a row means, asked C times: x [N,C]; labels [R,C], each a position in the row (kIgnored: none); softmax over the
// row's tokens. The mean over rows and columns; the count is of rows. `right`: rows all of whose labels have their column's largest logit.
Tensor position_cross_entropy(const Tensor& x, const Offsets& offsets, const std::vector<int32_t>& labels, double divisor = 0,
                              int64_t* right = nullptr);
// Of cosines x [R,1], with target 1 (alike) or 0: half the square of the distance 1 - x, or of what it lacks to `margin`.
// Hadsell et al. 2006, eq. 4
Tensor contrastive_loss(const Tensor& x, const Tensor& target, float margin, double divisor = 0);
// max(0, |a - p| - |a - n| + margin) of rows [R,H]: anchor, positive, negative.   Schroff et al. 2015, eq. 3, without the squares
Tensor triplet_loss(const Tensor& a, const Tensor& p, const Tensor& n, float margin, double divisor = 0);
Tensor bce_with_logits(const Tensor& logits, const Tensor& targets, double divisor = 0);                  // both [R,C], targets in [0,1]
Tensor mse_loss(const Tensor& x, const Tensor& target, double divisor = 0);                               // same shape
Tensor weighted_sum(const Tensor& x, const Tensor& weights);                                              // sum x * weights: for tests

// ==== 7 optimiser =================================================================================================
enum class Schedule { linear, cosine, constant };
// The factor on the peak learning rate at step s of `steps`: (s+1)/warmup while s < warmup, then down to 0 at `steps` (or constant).
double schedule_factor(Schedule schedule, int64_t step, int64_t warmup, int64_t steps);

struct AdamWSettings {
  bool google = false;        // Google BERT's Adam: no bias correction, eps 1e-6, decay added to the update (optimization.py)
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.01;
};
// Loshchilov and Hutter 2019, algorithm 2 (as torch.optim.AdamW), or Google BERT's variant. Holds both moments.
class AdamW {
 public:
  struct Slot {
    Tensor parameter, m, v;
    bool decay;               // false for biases and LayerNorm
    float lr_scale = 1;
  };
  AdamW(AdamWSettings settings, std::vector<Slot> slots);   // m and v are made, zero, where a slot has none
  // One update from each parameter's grad() times `clip_factor`, at learning rate lr. Slots without a gradient are left alone.
  void step(double lr, double clip_factor);
  std::vector<Slot>& slots() { return slots_; }
  int64_t updates = 0;        // made so far: t of the bias correction

 private:
  AdamWSettings settings_;
  std::vector<Slot> slots_;
};
// Global L2 norm of the gradients, in double; not finite when a gradient is not.
double gradient_norm(std::span<const Tensor> parameters);
// The factor that brings a norm down to `limit`: torch's limit / (norm + 1e-6), or Google's limit / norm; 1 where it is below.
double clip_factor(double norm, double limit, bool google);

// ==== 8 files =====================================================================================================
std::string format_number(double v);       // "%.9g" without a locale; nan, inf, -inf

// A file that appears under its name whole or not at all: written to a temporary name beside it, synced, renamed by commit().
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);   // throws Error when the folder cannot be written
  ~AtomicFile();                           // without commit(): removes the temporary file
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(std::string_view bytes);      // throws Error (disk full, ...)
  void commit();

 private:
  void write_out(std::string_view bytes);
  void discard();
  [[noreturn]] void fail(int error);   // errno's number; the temporary file goes

  std::string path_, temporary_;
  std::string buffer_;
  int file_ = -1;
};
void write_file(const std::string& path, std::string_view bytes);   // the same in one call

// The bytes of a file, and what keeps them mapped, read-only.
struct Mapped {
  std::string_view bytes;
  std::shared_ptr<const void> owner;
};
Mapped map_file(const std::string& path);   // throws Error naming it: a folder, a pipe, a Git LFS pointer ...

// A file of named tensors: names, types and places, checked against the file's size before anything is touched. A safetensors file,
// or a pytorch_model.bin under the same interface, zipped or from before torch 1.6: by a reader that knows tensors and runs nothing.
class SafeTensors {
 public:
  struct Entry {
    std::string name, dtype;        // dtype as written: F32, BF16, ...
    std::vector<int64_t> shape, strides;   // strides in elements; empty: row after row
    uint64_t begin, end;            // in the data: of safetensors what follows the header, of torch's the whole file
  };
  static SafeTensors open(const std::string& path);   // mapped; a loaded view keeps the mapping. Throws Error naming the file
  static SafeTensors open_torch(const std::string& path);
  // `bytes` must outlive what is loaded from it; `owner` may keep it alive. Throws Error "where: tensor: what".
  static SafeTensors parse(std::string_view bytes, const std::string& where, std::shared_ptr<const void> owner = {});
  static SafeTensors parse_torch(std::string_view bytes, const std::string& where, std::shared_ptr<const void> owner = {});
  const std::vector<Entry>& entries() const { return entries_; }             // in file order
  const Entry* find(std::string_view name) const;
  const std::vector<std::pair<std::string, std::string>>& metadata() const { return metadata_; }
  const std::string& where() const { return where_; }
  // F32 is a view of the file where it lies aligned, F16, BF16 and F64 are converted; other types throw. All must be finite: throws
  // Error naming the tensor and the first place that is not.
  Tensor load(const Entry& entry) const;
  // A tensor [n,k] of BF16, or of I8 with its scales, F32 [n], under the same name and "_scale": a view of the file. All must be finite.
  NarrowMatrix narrow(const Entry& entry, const Entry* scales) const;
  // Of a mapped file: the tensor's pages leave this process's memory. Views stay good, a page comes back when it is read.
  void give_back(const Entry& entry) const;

 private:
  std::string where_;
  std::string_view data_;
  std::shared_ptr<const void> owner_;
  std::vector<Entry> entries_;
  std::vector<std::pair<std::string, std::string>> metadata_;
};
// The weights of a model's folder: model.safetensors, or its shards by model.safetensors.index.json, or pytorch_model.bin, or its
// shards. Throws Error where there are none, or where index and shards do not agree.
std::vector<SafeTensors> open_checkpoint(const std::string& folder);
bool has_checkpoint(const std::string& folder);
std::string shape_text(const std::vector<int64_t>& shape);   // [8,128,768]; at most 16 dimensions of it

struct NamedTensor {
  std::string name;
  Shape shape;
  const float* data;
  std::optional<NarrowMatrix> narrow = {};   // written as it is, in place of data
};
// Larger types first, then in name order, atomically, as F32, F16 or BF16 (rounded to nearest even; throws Error naming a number too
// large for the type); the same tensors and metadata give the same bytes.
void save_safetensors(const std::string& path, std::vector<NamedTensor> tensors,
                      const std::vector<std::pair<std::string, std::string>>& metadata, const std::string& dtype = "F32");

// NumPy's file format 1.0 of float32 [rows, columns]: what stands in front of the numbers.
std::string npy_header(int64_t rows, int64_t columns);

// One process writes a folder: flock on FOLDER/.lock, let go by the kernel when the process ends. A folder that is not there is made,
// and goes again with the lock where nothing was written to it.
class FolderLock {
 public:
  explicit FolderLock(const std::string& folder);  // throws Error naming host and pid of the holder
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  std::string folder_, path_;
  bool made_ = false;
  int file_ = -1;
};

// The vectors of a corpus in a file: a header of 64 bytes, then float32 [lines, dimension], line after line. While it is made it is
// FILE.part; its header counts the vectors that are safely on the disk, so that a run that was killed goes on there.
class VectorIndex {
 public:
  struct Key {                             // of what the vectors were made
    uint64_t model, corpus;
    int64_t dimension, lines;
    friend bool operator==(const Key&, const Key&) = default;
  };
  // Maps the whole index that `path` names; where there is none, or one for another key, opens or begins its part. Throws Error when
  // the file is something else, cannot be written, or when another process is making it.
  VectorIndex(const std::string& path, const Key& key);
  bool stale() const { return stale_; }            // there was one for another model or corpus, which will be replaced
  int64_t count() const { return count_; }         // vectors there are
  void append(std::span<const float> vectors);     // whole ones; on the disk when it returns. The last line's makes the index whole
  const Tensor& vectors() const { return vectors_; }   // [lines, dimension] of a whole index, mapped; else empty

 private:
  struct Header;
  bool read_header(int file, const std::string& path, Header& header) const;
  void write(const void* bytes, size_t size, int64_t at);
  void map(int file);
  std::string path_;
  Key key_;
  int64_t count_ = 0;
  bool stale_ = false;
  std::shared_ptr<const int> part_;                // its descriptor, locked; closed with the last copy
  Tensor vectors_;
};

// ==== 9 kernels, products, devices, this machine ==================================================================
// One table of kernels for each instruction set; all give the same bytes (design: sums along a row in 16 lanes, element i in lane
// i mod 16, the lanes added in the tree 8-4-2-1; every multiply-add that is fused is written as one). A kernel never threads,
// allocates or throws. n may be 0 unless said; pointers need no alignment; y may be x.
struct Kernels {
  const char* name;        // scalar, avx2, avx512_amx, neon ...
  int mr, nr;              // rows and columns of one tile
  // c[i][j] for i < rows <= mr, j < cols <= nr:  the chain acc = fma(a[i,k], b[k][j], acc) from 0 over ascending k < depth, then
  // stored, or added to what is there. a[i,k] = a[i * a_row + k * a_step]; b is a panel [depth][nr].
  using Tile = void(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, float* c, int64_t c_row, int rows,
                    int cols, bool add);
  Tile* tile;
  // The same in words of 32 bits that hold several k: a_step is 1, depth a positive multiple of 16; of a as many rows as a tile has may be
  // read, whatever `rows`. Two bf16: of each 16 words (32 k, as halves says) two chains from 0, of the even and of the
  // odd k; their sum is added to c, which starts from 0 or, with `add`, from what is there: the order of AMX's TDPBF16PS. Under
  // DefaultFloatMode(true). Four int8: c holds int32.
  // (Of a sum that rounds up to the smallest normal number, 2^-126, ARM makes 0: it flushes before it rounds. All else is alike.)
  Tile *tile_bf16, *tile_int8;
  int mr_bf16, mr_int8;    // rows of their tiles
  // How tile_bf16 wants k 0 to 3. words: 0 1, 2 3, the lower half of a word first. pairs: 2 0, 3 1, for VDPBF16PS, which adds a word's
  // upper product and then its lower one to one chain. floats: b in words, of a each k a float of its own, so that a_row counts floats.
  enum class Halves { words, pairs, floats } halves;
  int int8_zero;           // what tile_int8 takes for 0 in a: 128 where the instruction wants it without a sign, else 0
  bool int8_wide;          // tile_int8 wants each word of a as two of int16: k 0 and 2, then 1 and 3; a_row counts these
  void (*tiles_on)(), (*tiles_off)();   // around a thread's calls of tile_bf16 and tile_int8
  // One column: c[i * c_row] = the tile's chain of row i of a and b [depth], or added to what is there, for i < rows
  void (*column)(int64_t depth, const float* a, int64_t a_row, const float* b, float* c, int64_t c_row, int rows, bool add);
  // panel [depth][nr] <- b, whose element (k, j) is b[k * b_step + j * b_col]; columns from cols on are 0
  void (*pack)(int64_t depth, const float* b, int64_t b_step, int64_t b_col, float* panel, int cols);
  void (*transpose)(const float* x, int64_t x_row, int64_t rows, int64_t cols, float* y, int64_t y_row);   // y[j][i] = x[i][j]
  float (*sum)(const float* x, int64_t n);
  float (*add_sum)(const float* a, const float* b, float* y, int64_t n); // y = a + b; returns y's sum
  float (*dot)(const float* x, const float* y, int64_t n);               // lane = fma(x, y, lane)
  double (*squares)(const float* x, int64_t n);                          // their sum, in double
  // -inf for n = 0; NaN is passed over (see exp_sum: it comes out there)
  float (*max)(const float* x, int64_t n);
  float (*squares_about)(const float* x, float mean, int64_t n);         // sum of (x - mean)^2, fused
  // y = exp(x * scale - shift), two roundings; returns the sum
  float (*exp_sum)(const float* x, float scale, float shift, float* y, int64_t n);
  void (*add)(const float* x, float* y, int64_t n);                      // y += x
  void (*axpy)(float a, const float* x, float* y, int64_t n);            // y = fma(a, x, y)
  void (*scale)(float a, const float* x, float* y, int64_t n);           // y = a * x
  // On rows `stride` apart of n numbers: z = y + bias (bias may be null); pre = z (pre may be null); y = act(z). With `sums` y holds int32,
  // and z = fma(float(y - zeros[j]), rows[i] * columns[j], bias[j]).
  struct Int8Sums {
    const float *rows, *columns;   // scales
    const int32_t* zeros;
  };
  void (*finish)(Activation act, const Int8Sums* sums, const float* bias, float* y, float* pre, int64_t stride, int64_t rows, int64_t n);
  void (*to_bf16)(const float* x, void* y, int64_t n);                   // n times 16 bits, rounded to nearest even; denormals give 0
  void (*from_bf16)(const void* x, float* y, int64_t n);
  void (*interleave)(const void* even, const void* odd, void* y, int64_t n);   // of 16 bits: even[0] odd[0] even[1] ...; null: zeros
  void (*round_pairs)(const float* even, const float* odd, void* y, int64_t n);   // the same of what to_bf16 makes of them
  // y = rint(x * (127 / m)) + zero, n times 8 bits, m = max |x|; returns m / 127, the scale. For m below 1e-30: y = zero, scale 0
  float (*to_int8)(const float* x, int zero, void* y, int64_t n);
  void (*activate_grad)(Activation act, const float* z, const float* dy, float* dz, int64_t n);   // dz = dy * act'(z)
  // y = fma((x - mean) * rstd, gamma, beta)
  void (*norm)(const float* x, float mean, float rstd, const float* gamma, const float* beta, float* y, int64_t n);
  // xhat = (x - mean) * rstd, g = dy * gamma, dx = rstd * (g - <g> - xhat * <g xhat>), <.> the mean; and, where dgamma is not null,
  // dgamma = fma(dy, xhat, dgamma), dbeta += dy
  void (*norm_grad)(const float* x, float mean, float rstd, const float* gamma, const float* dy, float* dx, float* dgamma, float* dbeta,
        int64_t n);
  void (*softmax_grad)(const float* p, const float* dp, float delta, float scale, float* ds, int64_t n);   // ds = p * (dp - delta) * scale
  // out[8 b + 2 w], out[8 b + 2 w + 1] = low, high half of word w of Philox block first + b, for b < blocks
  void (*draws)(const PhiloxKey& key, uint32_t first, int64_t blocks, uint16_t* out);
  // y = draw >= threshold ? x * scale : 0
  void (*drop)(const float* x, const uint16_t* draws, uint32_t threshold, float scale, float* y, int64_t n);
  // One AdamW update of n parameters: g = grad * factor; see AdamW::step for the order of operations.
  void (*adamw)(const AdamWSettings& s, float lr, float decay, float factor, float correct1, float correct2, const float* grad, float* p,
        float* m, float* v, int64_t n);
};
std::vector<const Kernels*> usable_kernels();   // [0] is scalar, the reference; the last is the best this CPU has
const Kernels& kernels();                       // chosen once: BERT_KERNELS=name, else the best
// The engine's own functions, in scalar form; every kernel computes exactly these. Largest errors, measured against double
// (tests/test_tensor.cpp): exp 0.9 ulp (0 below -87), log 0.8, tanh 1.4; Phi 6e-8, 1.3 ulp from x = -1 up, relative 3e-4 down to -6
// (0 below -6.08); gelu 1.7 ulp from x = -1 up, 2e-8 below; gelu_tanh 4 ulp and 2e-7; their derivatives 2e-7 and 3e-6.
float exp_f32(float x);
float log_f32(float x);                         // x > 0, normal
float tanh_f32(float x);
float normal_cdf_f32(float x);                  // Phi(x) = (1 + erf(x / sqrt 2)) / 2, without the cancellation on the left

// What happens to a finished element of a product, in this order: + bias[column], copied to `pre` [m, ldc], activation.
struct Epilogue {
  const float* bias = nullptr;
  Activation activation = Activation::none;
  float* pre = nullptr;
};
// c [m,n] = op(a) op(b), or c += where `add`.  op(a) is a [m,k], or with a_transposed the transpose of a [k,m]; op(b) is b [k,n], or
// with b_transposed the transpose of b [n,k]. lda, ldb, ldc: the distance of two rows as they lie in memory. The single door to the
// engine's kernels and OpenBLAS. An own product's element is, for each block of 256 k, one fma chain from 0 over ascending k, the
// blocks' sums added in order (with `add`: one after the other to what is there). The bytes do not depend on the number of threads,
// for OpenBLAS neither. a, b and c may not overlap. On a CPU without fused multiply-add OpenBLAS does everything, own or not, unless
// BERT_KERNELS names a table.
enum class Backend { automatic, own, openblas };
struct Gemm {
  bool a_transposed = false, b_transposed = false, add = false;
  Backend backend = Backend::automatic;   // automatic: by the table of shapes in tensor.cpp, or what BERT_GEMM says
  Epilogue epilogue{};
};
void gemm(const Gemm& how, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc);
// The same on the calling thread alone, by the own kernels: for ops that hand out rows and heads as tasks.
void gemm_here(const Gemm& how, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
               int64_t ldc);

// Weights [n,k] laid out in the kernel's panels once: c [m,n] = a [m,k] w^T. Always the own kernels. In bf16 a and w are rounded and
// multiplied as tile_bf16 says; in int8 each row of a and of w is rounded to 127 steps of its largest number.
class PackedWeights {
 public:
  PackedWeights(const float* w, int64_t n, int64_t k, Precision precision = Precision::f32);
  // In the precision that it has; transposed: w is [k,n], in bf16.
  explicit PackedWeights(const NarrowMatrix& w, bool transposed = false);
  explicit PackedWeights(const Tensor& w, bool transposed);   // in bf16
  int64_t rows() const { return n_; }
  int64_t cols() const { return k_; }
  Precision precision() const { return precision_; }
  const float* panels() const { return panels_.data(); }
  const float* scales() const { return scales_.data(); }   // int8: [n]
  const int32_t* zeros() const { return zeros_.data(); }   // int8: [n], what int8_zero adds to each column's sums

 private:
  template <class Narrow>
  void pack_rows(Narrow&& narrow);
  void pack_columns(const NarrowMatrix& w);
  void round_panels(const float* w, bool transposed);
  int64_t n_, k_;
  Precision precision_;
  Tensor panels_, scales_;
  std::vector<int32_t> zeros_;
};
void gemm(int64_t m, const float* a, int64_t lda, const PackedWeights& w, float* c, int64_t ldc, const Epilogue& epilogue);
// c [m,n] = op(a) b^T, or c += where `add`, of bf16 matrices: op(a) is a [m,k], or with a_transposed the transpose of a [k,m]. `how` has
// b_transposed, as the panels are of b [n,k]. This is how training multiplies in bf16.
void gemm(const Gemm& how, int64_t m, const NarrowMatrix& a, const PackedWeights& b, float* c, int64_t ldc);
// The same with b in f32, rounded as it is packed: [n,k] with b_transposed, else [k,n].
void gemm(const Gemm& how, int64_t m, const NarrowMatrix& a, const Tensor& b, float* c, int64_t ldc);

// The same of whole tensors: c [m,n] = act(op(a) op(b) + bias [n]), before act copied to `pre` [m,n]; how.epilogue holds the activation
// alone. b may be packed, then it is b_transposed. A device in use computes it where it is large; c and `pre` stay there till asked for.
void gemm(const Gemm& how, const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias = {}, const Tensor& pre = {});

// Devices that OpenCL 1.2 offers: libOpenCL.so.1 is opened when first asked for, no header or flag is needed. Throws Error where there is
// none, where there is no device, or where a driver fails.
struct DeviceInfo {
  std::string name, platform, driver;
  int64_t memory;            // bytes
  uint32_t compute_units;
};
std::vector<DeviceInfo> opencl_devices();        // GPUs first
struct DeviceOptions {
  bool half = false;         // weights lie there in f16
  std::string cache;         // the folder that remembers which kernel is the fastest on which device; empty: found out each time, seconds
  int64_t least = 1 << 22;   // products of fewer multiply-adds stay on the CPU: a trip takes longer
};
// Which device computes the large products of linear and its backward, from now on in the whole process: cpu, opencl (the first),
// opencl:1, or opencl:NAME, a part of its name. Choose before weights are packed: what was packed before stays on the CPU, and so do bf16
// and int8. One product at a time; any thread may ask. A device that fails throws Error from the product, or from data().
void use_device(const std::string& which, const DeviceOptions& options = {});
std::optional<DeviceInfo> device_in_use();       // empty: the CPU
double device_peak();                            // GFLOP/s of the device in use, in a short product of what is there; 0 without one

// Two vectors and their product, a cosine where both are normalised. What scores more is better, then what has the smaller numbers.
struct Match { float score; int64_t a, b; };
// For each row a of queries [Q,D] the `top` rows b of vectors [n,D] with the largest products, best first. Rows that hold NaN are
// never found. Exact: all are scored, in blocks, through gemm. The bytes do not depend on the number of threads or of queries.
std::vector<std::vector<Match>> nearest_rows(const Tensor& queries, const Tensor& vectors, int64_t top);
// The `top` pairs of rows a < b with the largest products, best first.
std::vector<Match> nearest_pairs(const Tensor& vectors, int64_t top);

bool has_openblas();                       // built with it
std::string backend_description();         // "avx512 kernels; OpenBLAS 0.3.21 for ..." for `bert info` and a run's state
std::string cpu_name();                    // "" where the system does not say
double peak_mib();                         // the peak of this process's memory; 0 where the system does not say

}  // namespace bert
