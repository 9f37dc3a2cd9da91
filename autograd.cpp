// autograd.cpp -- the tape, every differentiable op with its derivative beside it, losses, AdamW.   Interface: tensor.h, 5 to 7.
//
// How reverse mode works. A training step is a chain of ops  x -> u = f(x) -> y = g(u) -> loss. While it runs forward, each op
// appends a closure to the tape. Tape::backward sets d loss / d loss = 1 and runs the closures last to first; each reads the
// gradient of its output, which is complete by then (all users of it ran later, so their closures ran earlier), multiplies by its
// own derivative, and ADDS to the gradients of its inputs. Adding makes a tensor that is used twice right without further care.
//
// By hand, with numbers: x = 3, w = 2, u = w * x = 6, loss = (u - 10)^2 = 16.
//   backward of the square:   du += 2 (u - 10) * 1 = -8
//   backward of the product:  dw += du * x = -24      dx += du * w = -16
// Check: w = 2.001 gives u = 6.003, loss = 15.976: it fell by 0.024 = 24 * 0.001.
//
// Every op below is one section: formula, shapes, what is kept for backward, forward, the derivative as a formula, backward.
// A closure keeps what its derivative uses: `x = x.grad_only()` among its captures lets the numbers of x go and keeps where dx is added.
// A gradient's name is its tensor's with a d in front: dx is d loss / d x. Loops are cut over threads by shape alone (rows, heads,
// blocks of 64 rows, ranges of columns), so results do not depend on how many threads there are.
//
// Contents:  tape  linear  attention  norms and dropout  embedding  rows  softmax  pointwise  losses  optimiser
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "tensor.h"

namespace bert {

// ==== tape ========================================================================================================
static thread_local Tape* current_tape = nullptr;

Tape::Tape(Precision products) : products_(products) {
  if (current_tape) throw Error("Tape: this thread has one already; end it first");
  if (products == Precision::int8) throw Error("Tape: training is in f32 or bf16");
  current_tape = this;
}
Tape::~Tape() {
  while (!steps_.empty()) steps_.pop_back();
  if (current_tape == this) current_tape = nullptr;
}

void Tape::backward(const Tensor& loss) {
  if (loss.size() != 1) throw Error("Tape::backward: the loss must have one element, got " + to_string(loss.shape()));
  backward(loss, Tensor(loss.shape(), 1.f));
}

void Tape::backward(const Tensor& y, const Tensor& dy) {
  if (done_) throw Error("Tape::backward: called a second time; the first freed what the ops had kept");
  if (!y.needs_grad()) throw Error("Tape::backward: nothing in the loss needs a gradient; call set_needs_grad() on the parameters");
  done_ = true;
  current_tape = nullptr;  // what backward computes is not recorded
  DefaultFloatMode mode;
  y.add_grad(dy, 1);
  while (!steps_.empty()) {
    const Step step = std::move(steps_.back());
    steps_.pop_back();
    if (step.out.has_grad()) step.backward(), Profile::lap(step.op, " backward");
  }
}

// Whether an op with these inputs will be asked for gradients: then it keeps what backward needs. Not in inference, and not where
// nothing upstream is trained.
static bool recording(std::initializer_list<Tensor> in) {
  return current_tape && std::any_of(in.begin(), in.end(), [](const Tensor& t) { return t.needs_grad(); });
}

void record(const char* op, Tensor& out, std::initializer_list<Tensor> in, std::function<void()> backward) {
  Profile::lap(op);
  if (!recording(in)) return;
  out.set_needs_grad();
  current_tape->steps_.push_back({op, out.grad_only(), std::move(backward)});
  static const bool tracing = std::getenv("BERT_TRACE") != nullptr;
  if (tracing) current_tape->trace_.push_back(op + (" " + to_string(out.shape())));
}

// y = f(x)        kept: x. Backward computes f again, with the dropout of the first time, on a tape of its own, which goes back from dy.
Tensor recomputed(const Tensor& x, const Tensor& parameter, const Recomputable& f, Dropout& drop) {
  if (!recording({x, parameter})) return f(x, drop);
  struct Aside {  // the tape, while another one listens
    Tape* tape = std::exchange(current_tape, nullptr);
    ~Aside() { current_tape = tape; }
  };
  const Dropout before = drop;
  const Precision products = current_tape->products();
  Tensor y;
  {
    const Aside aside;
    const Tape tape(products);  // what it records is let go at once
    y = f(x, drop);
  }
  record("recomputed", y, {x, parameter}, [=, y = y.grad_only()] {
    Dropout again = before;
    Tape tape(products);
    tape.backward(f(x, again), y.take_grad());
  });
  return y;
}

// ---- where the time goes
static std::atomic<Profile*> current_profile{nullptr};
static double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Profile::Profile() : began_(seconds_now()) {
  Profile* none = nullptr;
  if (!current_profile.compare_exchange_strong(none, this)) throw Error("Profile: the process has one already; end it first");
}
Profile::~Profile() { current_profile = nullptr; }

void Profile::lap(const char* op, const char* pass) {
  Profile* const profile = current_profile.load(std::memory_order_relaxed);
  if (!profile) return;
  static thread_local double mark = 0;
  const double end = seconds_now(), begin = std::max(std::exchange(mark, end), profile->began_);  // a mark may be of an earlier profile
  if (!op) return;
  std::lock_guard<std::mutex> hold(profile->lock_);
  Op& total = profile->ops_[std::string(op) + pass];
  total.seconds += end - begin, total.calls++;
}

// ==== what ops share ==============================================================================================
static std::string shape_of(const Tensor& t) { return t ? to_string(t.shape()) : "nothing"; }

static void check_offsets(const char* op, const Offsets& offsets, int64_t tokens) {
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != tokens || !std::is_sorted(offsets.begin(), offsets.end()))
    throw Error(std::string(op) + ": offsets must ascend from 0 to the " + std::to_string(tokens) + " tokens of the batch");
}

static void check_ascending(const char* what, const std::vector<int64_t>& rows, int64_t n) {
  const bool ascend = std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end();
  if (!ascend || (!rows.empty() && (rows.front() < 0 || rows.back() >= n)))
    throw Error(std::string(what) + " must ascend, each one of " + std::to_string(n) + " and there once");
}

// Per-thread memory that grows as needed and stays: what a task needs beside its inputs and outputs.
static float* scratch(int slot, int64_t n) {
  static thread_local std::vector<float> memory[4];
  std::vector<float>& m = memory[slot];
  if ((int64_t)m.size() < n) m.resize((size_t)n);
  return m.data();
}

// to = from, or to += from.
static void put(const Kernels& k, const float* from, float* to, int64_t n, bool add) {
  if (add)
    k.add(from, to, n);
  else
    std::copy_n(from, n, to);
}

// Adds the rows of x [rows, cols] in the tree that design rests on: row i += row i + 1 for even i, then by twos, fours, ...; the sum
// is in row 0.
static void add_pairwise(float* x, int64_t rows, int64_t cols) {
  const Kernels& k = kernels();
  parallel_ranges(cols, 256, [&](int64_t c0, int64_t c1) {
    for (int64_t far = 1; far < rows; far *= 2)
      for (int64_t r = 0; r + far < rows; r += 2 * far) k.add(x + (r + far) * cols + c0, x + r * cols + c0, c1 - c0);
  });
}

constexpr int64_t kRowBlock = 64;  // rows whose sum is taken one after another before blocks are added pairwise
static int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// to [cols] += the sum over rows of x [rows, cols].
static void add_column_sums(const float* x, int64_t rows, int64_t cols, const Tensor& to) {
  if (!rows) return;
  const Kernels& k = kernels();
  Tensor sums(Shape{row_blocks(rows), cols}, 0.f);
  parallel_for(row_blocks(rows), [&](int64_t b) {
    for (int64_t r = b * kRowBlock; r < std::min(rows, (b + 1) * kRowBlock); r++) k.add(x + r * cols, sums.data() + b * cols, cols);
  });
  add_pairwise(sums.data(), row_blocks(rows), cols);
  k.add(sums.data(), to.grad(), cols);
}

// The dropout of one op: which elements stay is a function of the op's key and the element's index, so backward draws it again.
// A draw has 16 bits: p is rounded to a multiple of 1/65536, and what stays is divided by exactly the share that stays.
struct Mask {
  PhiloxKey key{};
  uint32_t threshold = 0;  // 0: everything stays
  float scale = 1;

  Mask(float p, Dropout& drop) {
    if (!(p >= 0 && p < 1)) throw Error("dropout: probability " + format_number(p) + " is not in [0, 1)");
    threshold = (uint32_t)std::lround(p * 65536.0);
    if (!threshold) return;
    scale = (float)(65536.0 / (65536.0 - threshold));
    key = drop.key;
    key.op = drop.next_op();
  }
  explicit operator bool() const { return threshold != 0; }

  // y = x masked, for the n elements of the tensor from `first` on; two tensors may share one drawing.
  void apply(const float* x, float* y, int64_t first, int64_t n) const {
    const Kernels& k = kernels();
    uint16_t draws[1024];
    for (int64_t i = 0; i < n;) {
      const int64_t skip = (first + i) % 8, part = std::min(n - i, (int64_t)1024 - skip);
      k.draws(key, (uint32_t)((first + i) / 8), (skip + part + 7) / 8, draws);
      k.drop(x + i, draws + skip, threshold, scale, y + i, part);
      i += part;
    }
  }
};
static void check_drawable(const char* op, int64_t blocks) {
  if (blocks >= (int64_t)1 << 32) throw Error(std::string(op) + ": dropout numbers at most 2^35 elements; use smaller batches");
}

// ==== linear ======================================================================================================
// z = x W^T + b,  y = act(z)       x [N,I]   W [O,I]   b [O]   ->   y [N,O]            kept: x, and z where there is an activation
// On a tape of bf16 the factors of all three products are rounded to it, x, z and dz once, W as each product packs it; so is what is kept.
Tensor linear(const Tensor& x, const Tensor& w, const Tensor& b, Activation act) {
  const PackedWeights* packed = w ? w.packed() : nullptr;
  const int64_t N = x.rows(), I = x.cols(), O = packed ? packed->rows() : w ? w.shape()[0] : 0;
  const int64_t inner = packed ? packed->cols() : w ? w.cols() : -1;
  if (inner != I || (!packed && w.shape().rank() != 2) || (b && b.size() != O))
    throw Error("linear: x " + shape_of(x) + " needs w [out," + std::to_string(I) + "] and b [out], got " +
                (packed ? "packed [" + std::to_string(O) + "," + std::to_string(inner) + "]" : shape_of(w)) + " and " + shape_of(b));
  const bool training = recording({x, w, b}), narrow = training && current_tape->products() == Precision::bf16;
  if (packed && training) throw Error("linear: packed weights cannot be trained");
  const Shape& s = x.shape();
  Tensor y(s.rank() == 4 ? Shape{s[0], s[1], s[2], O} : s.rank() == 3 ? Shape{s[0], s[1], O} : Shape{N, O});
  Tensor z = training && act != Activation::none ? Tensor(y.shape()) : Tensor();
  // Inference keeps to the own kernels, whose answer for a row does not depend on the batch around it.
  const Gemm how{.b_transposed = true, .backend = training ? Backend::automatic : Backend::own, .epilogue = {.activation = act}};
  NarrowMatrix x16, z16;
  if (narrow) {
    x16 = narrowed(x, Precision::bf16);
    const Epilogue epilogue{b ? b.data() : nullptr, act, z ? z.data() : nullptr};
    gemm({.b_transposed = true, .epilogue = epilogue}, N, x16, w, y.data(), O);
    if (z) z16 = narrowed(z, Precision::bf16);
  } else {
    gemm(how, x, w, y, b, z);
  }

  // dz = dy * act'(z)      dx += dz W      dW += dz^T x      db += sum over rows of dz
  record("linear", y, {x, w, b}, [=, y = y.grad_only(), x = narrow ? x.grad_only() : x, z = narrow ? Tensor() : z] {
    const Tensor dz = y.take_grad();  // dy so far, then overwritten: nobody reads dy after this
    if (act != Activation::none) {
      const Kernels& k = kernels();
      float* const to = dz.data();
      const float* const from = narrow ? nullptr : z.data();
      parallel_ranges(N * O, 1 << 14, [&](int64_t i, int64_t end) {
        float* const room = narrow ? scratch(0, end - i) : nullptr;
        if (narrow) k.from_bf16(z16.data + 2 * i, room, end - i);
        k.activate_grad(act, narrow ? room : from + i, to + i, to + i, end - i);
      });
    }
    const NarrowMatrix dz16 = narrow ? narrowed(dz, Precision::bf16) : NarrowMatrix();
    bool add;
    if (x.needs_grad()) {
      const Tensor& dx = x.grad_to_add(add);
      if (narrow)
        gemm({.add = add}, N, dz16, w, dx.data(), I);
      else
        gemm({.add = add}, dz, w, dx);
    }
    if (w.needs_grad()) {
      const Tensor& dw = w.grad_to_add(add);
      if (narrow)
        gemm({.a_transposed = true, .b_transposed = true, .add = add}, O, dz16, PackedWeights(x16, true), dw.data(), I);
      else
        gemm({.a_transposed = true, .add = add}, dz, x, dw);
    }
    if (b && b.needs_grad()) add_column_sums(dz.data(), N, O, b);
  });
  return y;
}

// ==== attention ===================================================================================================
// For each row r of the batch and head a, with k, v [T,D] cut from qkv [N,3H], and q of the row's tokens that ask (all of them, or those
// of the M in `queries`):
//   S = q k^T / sqrt(D)      P = softmax(S) over the keys      y = dropout(P) v                                  -> y [M,H]
// The T x T matrix is never kept. Keys come in blocks of 128 from the row's start; m and l are the largest score and the sum of
// exp(s - m) so far, and what was summed is scaled down when a later block raises m (online softmax: Milakov and Gimelshein 2018;
// in attention: Rabe and Staats 2021, Dao et al. 2022).
// kept: y, and lse = m + log l for each query and head [A,M]: with it backward makes P again, block by block.
static constexpr int64_t kKeys = 128;     // of a block: part of the arithmetic, the bytes depend on it
static constexpr int64_t kQueries = 128;  // of a tile: any number gives the same bytes

// What one task (one row, one head) works on.
struct HeadView {
  int64_t begin, T, D, stride, head, heads;  // the row's first token, its length; stride: 3H, from token to token
  const float *q, *k, *v;                    // of the row's first token
  int64_t draw_blocks;                       // ceil(P / 8): Philox blocks a query
  const int64_t* queries;                    // the row's, by their packed indices; null: every token
  int64_t first, Q;                          // the first query's row in y, and how many there are
  int64_t query(int64_t i) const { return queries ? queries[i] - begin : i; }  // token of the row
  // Queries i0 and on, n of them, side by side.
  const float* gather(int64_t i0, int64_t n, float* room) const {
    for (int64_t i = 0; i < n; i++) std::copy_n(q + query(i0 + i) * stride, D, room + i * D);
    return room;
  }
  // Masks the probabilities of query i and keys [j, j + n).
  void drop(const Mask& mask, int64_t i, int64_t j, const float* x, float* y, int64_t n) const {
    mask.apply(x, y, (((begin + query(i)) * heads + head) * draw_blocks) * 8 + j, n);
  }
};

static void attend(const HeadView& h, float scale, const Mask& mask, float* y, float* lse) {
  const Kernels& k = kernels();
  const int64_t H = h.heads * h.D;
  float* p = scratch(0, kQueries * kKeys);
  float m[kQueries], l[kQueries];
  for (int64_t i0 = 0; i0 < h.Q; i0 += kQueries) {
    const int64_t nq = std::min(kQueries, h.Q - i0);
    const float* q = h.gather(i0, nq, scratch(3, kQueries * h.D));
    float* out = y + (h.first + i0) * H + h.head * h.D;
    std::fill_n(m, nq, -std::numeric_limits<float>::infinity()), std::fill_n(l, nq, 0.f);
    for (int64_t j0 = 0; j0 < h.T; j0 += kKeys) {
      const int64_t nk = std::min(kKeys, h.T - j0);
      gemm_here({.b_transposed = true}, nq, nk, h.D, q, h.D, h.k + j0 * h.stride, h.stride, p, kKeys);
      for (int64_t i = 0; i < nq; i++) {
        float* s = p + i * kKeys;
        const float higher = std::max(m[i], k.max(s, nk) * scale), shrink = exp_f32(m[i] - higher);
        l[i] = l[i] * shrink + k.exp_sum(s, scale, higher, s, nk);
        m[i] = higher;
        if (j0) k.scale(shrink, out + i * H, out + i * H, h.D);
        if (mask) h.drop(mask, i0 + i, j0, s, s, nk);
      }
      gemm_here({.add = j0 > 0}, nq, h.D, nk, p, kKeys, h.v + j0 * h.stride, h.stride, out, H);
    }
    for (int64_t i = 0; i < nq; i++) {
      k.scale(1 / l[i], out + i * H, out + i * H, h.D);
      if (lse) lse[h.first + i0 + i] = m[i] + log_f32(l[i]);
    }
  }
}

// With P made again from lse, and delta_i = <dy_i, y_i> = sum over j of P_ij dP_ij:
//   dV += dropout(P)^T dy        dP = dropout(dy V^T)        dS = P * (dP - delta) / sqrt(D)        dQ += dS K        dK += dS^T Q
static void attend_backward(const HeadView& h, float scale, const Mask& mask, const float* y, const float* lse, const float* dy,
                            float* dqkv, bool add) {
  const Kernels& k = kernels();
  const int64_t H = h.heads * h.D, S = h.stride;
  float *p = scratch(0, kQueries * kKeys), *dropped = scratch(1, kQueries * kKeys), *ds = scratch(2, kQueries * kKeys);
  float* dq = dqkv + h.begin * S + h.head * h.D;
  float *dk = dq + H, *dv = dk + H;
  y += h.first * H + h.head * h.D, dy += h.first * H + h.head * h.D, lse += h.first;
  if (h.queries && !add)  // who asks nothing has no dQ, and where nobody asks no key and value has
    for (int64_t t = 0; t < h.T; t++)
      for (int64_t part = 0; part < (h.Q ? 1 : 3); part++) std::fill_n(dq + t * S + part * H, h.D, 0.f);
  for (int64_t i0 = 0; i0 < h.Q; i0 += kQueries) {
    const int64_t nq = std::min(kQueries, h.Q - i0);
    float *room = scratch(3, 2 * kQueries * h.D), *dqi = room + kQueries * h.D;
    const float* q = h.gather(i0, nq, room);
    for (int64_t j0 = 0; j0 < h.T; j0 += kKeys) {
      const int64_t nk = std::min(kKeys, h.T - j0);
      gemm_here({.b_transposed = true}, nq, nk, h.D, q, h.D, h.k + j0 * S, S, p, kKeys);
      gemm_here({.b_transposed = true}, nq, nk, h.D, dy + i0 * H, H, h.v + j0 * S, S, ds, kKeys);
      for (int64_t i = 0; i < nq; i++) {
        float *pi = p + i * kKeys, *di = ds + i * kKeys;
        k.exp_sum(pi, scale, lse[i0 + i], pi, nk);
        if (mask) h.drop(mask, i0 + i, j0, pi, dropped + i * kKeys, nk), h.drop(mask, i0 + i, j0, di, di, nk);
        k.softmax_grad(pi, di, k.dot(dy + (i0 + i) * H, y + (i0 + i) * H, h.D), scale, di, nk);
      }
      const float* weights = mask ? dropped : p;
      gemm_here({.a_transposed = true, .add = add || i0}, nk, h.D, nq, weights, kKeys, dy + i0 * H, H, dv + j0 * S, S);
      gemm_here({.add = j0 > 0}, nq, h.D, nk, ds, kKeys, h.k + j0 * S, S, dqi, h.D);
      gemm_here({.a_transposed = true, .add = add || i0}, nk, h.D, nq, ds, kKeys, q, h.D, dk + j0 * S, S);
    }
    for (int64_t i = 0; i < nq; i++) put(k, dqi + i * h.D, dq + h.query(i0 + i) * S, h.D, add);
  }
}

Tensor attention(const Tensor& qkv, const Offsets& offsets, int64_t heads, int64_t max_positions, Dropout& drop,
                 const std::vector<int64_t>& queries) {
  const int64_t N = qkv.rows(), H = qkv.cols() / 3, R = (int64_t)offsets.size() - 1, M = queries.empty() ? N : (int64_t)queries.size();
  if (heads < 1 || qkv.cols() != 3 * H || H % heads)
    throw Error("attention: qkv " + shape_of(qkv) + " does not cut into 3 x " + std::to_string(heads) + " heads");
  check_offsets("attention", offsets, N);
  check_ascending("attention: queries", queries, N);
  const int64_t D = H / heads, draw_blocks = (max_positions + 7) / 8;
  const Mask mask(drop.attention, drop);
  if (mask) check_drawable("attention", N * heads * draw_blocks);
  for (int64_t r = 0; mask && r < R; r++)
    if (offsets[(size_t)r + 1] - offsets[(size_t)r] > max_positions)
      throw Error("attention: row " + std::to_string(r) + " is longer than the " + std::to_string(max_positions) +
                  " positions of the model");
  const float scale = 1 / std::sqrt((float)D);
  auto view = [=](const Tensor& x, const Offsets& at, const std::vector<int64_t>& some, int64_t task) {
    const int64_t r = task / heads, a = task % heads, begin = at[(size_t)r], end = at[(size_t)r + 1];
    const float* q = x.data() + begin * 3 * H + a * D;
    auto until = [&](int64_t t) { return some.empty() ? t : std::lower_bound(some.begin(), some.end(), t) - some.begin(); };
    const int64_t first = until(begin);
    const int64_t* own = some.empty() ? nullptr : some.data() + first;
    return HeadView{begin, end - begin, D, 3 * H, a, heads, q, q + H, q + 2 * H, draw_blocks, own, first, until(end) - first};
  };
  Tensor y(Shape{M, H});
  Tensor lse = recording({qkv}) ? Tensor(Shape{heads, M}) : Tensor();
  parallel_for(R * heads, [&](int64_t task) {
    attend(view(qkv, offsets, queries, task), scale, mask, y.data(), lse ? lse.data() + task % heads * M : nullptr);
  });

  record("attention", y, {qkv}, [=, rows = offsets, some = queries] {
    bool add;
    float* dqkv = qkv.grad_to_add(add).data();
    const float* dy = y.grad();
    parallel_for(R * heads, [&](int64_t task) {
      attend_backward(view(qkv, rows, some, task), scale, mask, y.data(), lse.data() + task % heads * M, dy, dqkv, add);
    });
  });
  return y;
}

// ==== norms and dropout ===========================================================================================
// LayerNorm of one row: mean and variance over its H elements, two passes.
struct RowNorm {
  float mean, rstd;
};
static RowNorm norm_of(const Kernels& k, const float* x, float sum, int64_t H, float eps) {
  const float mean = sum / (float)H;
  return {mean, 1 / std::sqrt(k.squares_about(x, mean, H) / (float)H + eps)};
}

// h = x + dropout(f),  xhat = (h - mean) * rstd,  y = xhat * gamma + beta        x, f [N,H] -> y [N,H]      kept: h, mean and rstd [N,2]
Tensor residual_norm(const Tensor& x, const Tensor& f, const Tensor& gamma, const Tensor& beta, float eps, Dropout& drop) {
  const int64_t N = x.rows(), H = x.cols();
  if (gamma.size() != H || beta.size() != H || !H)
    throw Error("residual_norm: x " + shape_of(x) + " needs gamma and beta [" + std::to_string(H) + "], got " + shape_of(gamma) + " and " +
                shape_of(beta));
  if (f && !(f.shape() == x.shape())) throw Error("residual_norm: x " + shape_of(x) + " and f " + shape_of(f) + " differ");
  const Mask mask(f ? drop.hidden : 0, drop);
  if (mask) check_drawable("residual_norm", N * H / 8);
  const bool training = recording({x, f, gamma, beta});
  Tensor y(x.shape()), h = training && f ? Tensor(x.shape()) : f ? y : x, stats = training ? Tensor(Shape{N, 2}) : Tensor();
  const Kernels& k = kernels();
  parallel_ranges(N, kRowBlock, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++) {
      float* row = h.data() + r * H;
      if (mask) mask.apply(f.data() + r * H, row, r * H, H);
      const float sum = f ? k.add_sum(mask ? row : f.data() + r * H, x.data() + r * H, row, H) : k.sum(row, H);
      const RowNorm n = norm_of(k, row, sum, H, eps);
      k.norm(row, n.mean, n.rstd, gamma.data(), beta.data(), y.data() + r * H, H);
      if (stats) stats.data()[2 * r] = n.mean, stats.data()[2 * r + 1] = n.rstd;
    }
  });

  // With g = dy * gamma and <.> the mean over a row:
  //   dh = rstd * (g - <g> - xhat * <g * xhat>)       dx += dh       df += dropout(dh)
  //   dgamma += sum over rows of dy * xhat            dbeta += sum over rows of dy, both in blocks of 64 rows, then pairwise
  record("residual_norm", y, {x, f, gamma, beta}, [=, x = x.grad_only(), f = f.grad_only(), y = y.grad_only()] {
    bool add_x = false, add_f = false;
    float *dx = x.needs_grad() ? x.grad_to_add(add_x).data() : nullptr, *df = f.needs_grad() ? f.grad_to_add(add_f).data() : nullptr;
    const float* dy = y.grad();
    Tensor sums(Shape{row_blocks(N), 2 * H}, 0.f);  // of a block: dgamma, dbeta
    parallel_for(row_blocks(N), [&](int64_t b) {
      float *dgamma = sums.data() + b * 2 * H, *dh = scratch(2, H);
      for (int64_t r = b * kRowBlock; r < std::min(N, (b + 1) * kRowBlock); r++) {
        const float mean = stats.data()[2 * r], rstd = stats.data()[2 * r + 1];
        k.norm_grad(h.data() + r * H, mean, rstd, gamma.data(), dy + r * H, dh, dgamma, dgamma + H, H);
        if (dx) put(k, dh, dx + r * H, H, add_x);
        if (mask) mask.apply(dh, dh, r * H, H);
        if (df) put(k, dh, df + r * H, H, add_f);
      }
    });
    if (!N) return;
    add_pairwise(sums.data(), row_blocks(N), 2 * H);
    if (gamma.needs_grad()) k.add(sums.data(), gamma.grad(), H);
    if (beta.needs_grad()) k.add(sums.data() + H, beta.grad(), H);
  });
  return y;
}

// y = x / (1 - p) where kept, else 0
Tensor dropout(const Tensor& x, Dropout& drop) {
  const Mask mask(drop.hidden, drop);
  if (!mask) return x;
  check_drawable("dropout", x.size() / 8);
  Tensor y(x.shape());
  parallel_ranges(x.size(), 1 << 14, [&](int64_t i, int64_t end) { mask.apply(x.data() + i, y.data() + i, i, end - i); });

  // dx += dropout(dy), by the same draws
  record("dropout", y, {x}, [=, x = x.grad_only(), y = y.grad_only()] {
    float *dx = x.grad(), *dy = y.grad();
    parallel_ranges(x.size(), 1 << 14, [&](int64_t i, int64_t end) {
      mask.apply(dy + i, dy + i, i, end - i);
      kernels().add(dy + i, dx + i, end - i);
    });
  });
  return y;
}

// ==== embedding ===================================================================================================
// dtable[ids[n]] += d[n] for n in token order. Ranges of columns go to threads, so that order holds for every element.
static void scatter_rows(const Tensor& table, const std::vector<int32_t>& ids, const float* d) {
  if (!table.needs_grad()) return;
  const int64_t H = table.cols();
  float* grad = table.grad();
  parallel_ranges(H, 64, [&](int64_t c0, int64_t c1) {
    for (size_t n = 0; n < ids.size(); n++) kernels().add(d + (int64_t)n * H + c0, grad + ids[n] * H + c0, c1 - c0);
  });
}

static constexpr int64_t kGatherRows = 1024;  // tokens, after which the pages of a word table in a file are given back

// e = word[ids] + segment[segments] + position[positions],  y = dropout(LayerNorm(e))       -> y [N,H]       kept: the three lists
Tensor embedding_norm(const Tensor& word, const Tensor& segment, const Tensor& position, const std::vector<int32_t>& ids,
                      const std::vector<int32_t>& segments, const std::vector<int32_t>& positions, const Tensor& gamma, const Tensor& beta,
                      float eps, Dropout& drop, Precision rounded) {
  const int64_t N = (int64_t)ids.size(), H = word.cols();
  if (segment.cols() != H || position.cols() != H || segments.size() != ids.size() || positions.size() != ids.size())
    throw Error("embedding_norm: tables " + shape_of(word) + ", " + shape_of(segment) + ", " + shape_of(position) +
                " or the numbers of ids differ");
  auto check = [](const char* what, const std::vector<int32_t>& list, const Tensor& table) {
    for (const int32_t id : list)
      if (id < 0 || id >= table.shape()[0])
        throw Error(std::string("embedding_norm: ") + what + " " + std::to_string(id) + " is not in the table " + shape_of(table));
  };
  check("id", ids, word), check("segment", segments, segment), check("position", positions, position);
  Tensor e(Shape{N, H});
  const Kernels& k = kernels();
  // A table in a file comes into memory by 16 pages a row: it leaves again, or in the end all of it would be there.
  for (int64_t first = 0; first < N; first += kGatherRows) {
    parallel_ranges(std::min(kGatherRows, N - first), kRowBlock, [&](int64_t n0, int64_t n1) {
      for (int64_t n = first + n0; n < first + n1; n++) {
        float* row = e.data() + n * H;
        if (const NarrowMatrix* const narrow = word.narrow())
          narrow->widen(ids[(size_t)n], row);
        else
          std::copy_n(word.data() + ids[(size_t)n] * H, H, row), round_row(rounded, row, H, scratch(3, H));
        k.add(segment.data() + segments[(size_t)n] * H, row, H);
        k.add(position.data() + positions[(size_t)n] * H, row, H);
      }
    });
    word.give_back();
  }

  // each table's row adds the de of every token that used it, in token order
  record("embedding", e, {word, segment, position}, [=, e = e.grad_only()] {
    scatter_rows(word, ids, e.grad()), scatter_rows(segment, segments, e.grad()), scatter_rows(position, positions, e.grad());
  });
  return dropout(residual_norm(e, {}, gamma, beta, eps, drop), drop);
}

// ==== rows ========================================================================================================
// y[i] = x[rows[i]]        x [N,H] -> y [n,H]        dx[rows[i]] += dy[i], in order
Tensor gather_rows(const Tensor& x, const std::vector<int64_t>& rows) {
  const int64_t n = (int64_t)rows.size(), H = x.cols();
  for (const int64_t r : rows)
    if (r < 0 || r >= x.rows()) throw Error("gather_rows: row " + std::to_string(r) + " is not in x " + shape_of(x));
  Tensor y(Shape{n, H});
  for (int64_t i = 0; i < n; i++) std::copy_n(x.data() + rows[(size_t)i] * H, H, y.data() + i * H);
  record("gather_rows", y, {x}, [=, x = x.grad_only(), y = y.grad_only()] {
    for (int64_t i = 0; i < n; i++) kernels().add(y.grad() + i * H, x.grad() + rows[(size_t)i] * H, H);
  });
  return y;
}

// y[rows[i]] = x[i], 0 elsewhere        x [M,H] -> y [n,H]        dx[i] += dy[rows[i]]        rows ascend
Tensor place_rows(const Tensor& x, const std::vector<int64_t>& rows, int64_t n) {
  const int64_t M = (int64_t)rows.size(), H = x.cols();
  if (x.rows() != M) throw Error("place_rows: x " + shape_of(x) + " has not " + std::to_string(M) + " rows");
  check_ascending("place_rows: rows", rows, n);
  Tensor y(Shape{n, H}, 0.f);
  for (int64_t i = 0; i < M; i++) std::copy_n(x.data() + i * H, H, y.data() + rows[(size_t)i] * H);
  record("place_rows", y, {x}, [=, x = x.grad_only(), y = y.grad_only()] {
    for (int64_t i = 0; i < M; i++) kernels().add(y.grad() + rows[(size_t)i] * H, x.grad() + i * H, H);
  });
  return y;
}

// y[r] = mean of x over the tokens of row r; 0 for a row without tokens        x [N,H] -> y [R,H]
Tensor mean_rows(const Tensor& x, const Offsets& offsets) {
  const int64_t R = (int64_t)offsets.size() - 1, H = x.cols();
  check_offsets("mean_rows", offsets, x.rows());
  Tensor y(Shape{R, H}, 0.f);
  const Kernels& k = kernels();
  auto share = [](int64_t tokens) { return 1 / (float)std::max<int64_t>(tokens, 1); };
  parallel_for(R, [&](int64_t r) {
    const int64_t begin = offsets[(size_t)r], end = offsets[(size_t)r + 1];
    float* out = y.data() + r * H;
    for (int64_t t = begin; t < end; t++) k.add(x.data() + t * H, out, H);
    k.scale(share(end - begin), out, out, H);
  });

  // dx[t] += dy[r] / tokens of r, for every token t of row r
  record("mean_rows", y, {x}, [=, rows = offsets, x = x.grad_only(), y = y.grad_only()] {
    float* dx = x.grad();
    parallel_for(R, [&](int64_t r) {
      const int64_t begin = rows[(size_t)r], end = rows[(size_t)r + 1];
      for (int64_t t = begin; t < end; t++) k.axpy(share(end - begin), y.grad() + r * H, dx + t * H, H);
    });
  });
  return y;
}

// y = x / n,  n = max(|x|_2, 1e-12) by row        x [R,H] -> y [R,H]        kept: n [R]
Tensor normalize_rows(const Tensor& x) {
  const int64_t R = x.rows(), H = x.cols();
  Tensor y(x.shape()), norm(Shape{R});
  const Kernels& k = kernels();
  parallel_for(R, [&](int64_t r) {
    const float* row = x.data() + r * H;
    const float n = norm.data()[r] = std::max(std::sqrt(k.dot(row, row, H)), 1e-12f);
    for (int64_t c = 0; c < H; c++) y.data()[r * H + c] = row[c] / n;
  });

  // dx += (dy - y <dy, y>) / n, the part of dy along y being lost to the normalisation (where n is the floor, dx += dy / n)
  record("normalize_rows", y, {x}, [=] {
    for (int64_t r = 0; r < R; r++) {
      const float *dy = y.grad() + r * H, *yr = y.data() + r * H, n = norm.data()[r];
      const float along = n > 1e-12f ? k.dot(dy, yr, H) : 0.f;
      for (int64_t c = 0; c < H; c++) x.grad()[r * H + c] += (dy[c] - yr[c] * along) / n;
    }
  });
  return y;
}

// ==== softmax =====================================================================================================
// y = exp(x - max) / sum        over the last dimension of x [...,C]        kept: y
Tensor softmax(const Tensor& x) {
  const int64_t C = x.cols();
  Tensor y(x.shape());
  const Kernels& k = kernels();
  parallel_for(x.rows(), [&](int64_t r) {
    const float* in = x.data() + r * C;
    float* out = y.data() + r * C;
    k.scale(1 / k.exp_sum(in, 1, k.max(in, C), out, C), out, out, C);
  });

  // dx += y * (dy - <dy, y>),  <.,.> the sum over the row
  record("softmax", y, {x}, [=] {
    float* dx = x.grad();
    parallel_for(x.rows(), [&](int64_t r) {
      float *dy = y.grad() + r * C, *yr = y.data() + r * C;
      k.softmax_grad(yr, dy, k.dot(dy, yr, C), 1, dy, C);
      k.add(dy, dx + r * C, C);
    });
  });
  return y;
}

// ==== pointwise ===================================================================================================
// y = a + b        da += dy        db += dy
Tensor add(const Tensor& a, const Tensor& b) {
  if (!(a.shape() == b.shape())) throw Error("add: shapes differ, " + shape_of(a) + " and " + shape_of(b));
  DefaultFloatMode mode;
  Tensor y(a.shape());
  for (int64_t i = 0; i < y.size(); i++) y.data()[i] = a.data()[i] + b.data()[i];
  record("add", y, {a, b}, [=, a = a.grad_only(), b = b.grad_only(), y = y.grad_only()] {
    for (const Tensor& t : {a, b})
      if (t.needs_grad()) kernels().add(y.grad(), t.grad(), y.size());
  });
  return y;
}

// y = x f        dx += dy f
Tensor scale(const Tensor& x, float factor) {
  DefaultFloatMode mode;
  Tensor y(x.shape());
  for (int64_t i = 0; i < y.size(); i++) y.data()[i] = x.data()[i] * factor;
  record("scale", y, {x}, [=, x = x.grad_only(), y = y.grad_only()] { kernels().axpy(factor, y.grad(), x.grad(), y.size()); });
  return y;
}

// y[r] = <a_r, b_r>        a, b [R,H] -> y [R,1]        da_r += dy[r] b_r        db_r += dy[r] a_r
Tensor row_dots(const Tensor& a, const Tensor& b) {
  if (!(a.shape() == b.shape())) throw Error("row_dots: shapes differ, " + shape_of(a) + " and " + shape_of(b));
  const int64_t R = a.rows(), H = a.cols();
  Tensor y(Shape{R, 1});
  const Kernels& k = kernels();
  for (int64_t r = 0; r < R; r++) y.data()[r] = k.dot(a.data() + r * H, b.data() + r * H, H);
  record("row_dots", y, {a, b}, [=] {
    for (int64_t r = 0; r < R; r++) {
      if (a.needs_grad()) k.axpy(y.grad()[r], b.data() + r * H, a.grad() + r * H, H);
      if (b.needs_grad()) k.axpy(y.grad()[r], a.data() + r * H, b.grad() + r * H, H);
    }
  });
  return y;
}

// ==== losses ======================================================================================================
// Each is a sum over its elements in double, divided once. `divisor` lets several micro-batches share one mean.

// With e = smoothing and w the class weights:
//   loss = sum over rows of ((1 - e) w_label (lse - x_label) + e/C sum_c w_c (lse - x_c)) / divisor,  lse = log sum exp(x)
//   x [M,C]        kept: x
Tensor cross_entropy(const Tensor& x, const std::vector<int32_t>& labels, double divisor, int64_t* right, const ClassRule& rule) {
  const int64_t M = x.rows(), C = x.cols();
  if ((int64_t)labels.size() != M)
    throw Error("cross_entropy: logits " + shape_of(x) + " and " + std::to_string(labels.size()) + " labels");
  if (!rule.weights.empty() && (int64_t)rule.weights.size() != C)
    throw Error("cross_entropy: " + std::to_string(rule.weights.size()) + " class weights for " + std::to_string(C) + " classes");
  double counted = 0, all_weights = 0;
  for (const int32_t label : labels) {
    if (label != kIgnored && (label < 0 || label >= C))
      throw Error("cross_entropy: label " + std::to_string(label) + " is not among the " + std::to_string(C) + " classes");
    if (label != kIgnored) counted += (double)rule.weight(label);
  }
  if (!divisor) divisor = counted > 0 ? counted : 1;
  for (int32_t c = 0; c < C; c++) all_weights += (double)rule.weight(c);
  const float sure = 1 - rule.smoothing, shared = rule.smoothing / (float)C;
  std::vector<double> loss((size_t)M);
  std::vector<uint8_t> best((size_t)M);
  const Kernels& k = kernels();
  parallel_for(M, [&](int64_t r) {
    const int32_t label = labels[(size_t)r];
    if (label == kIgnored) return;
    const float *row = x.data() + r * C, top = k.max(row, C);
    const auto lse = (double)(top + log_f32(k.exp_sum(row, 1, top, scratch(0, C), C)));
    loss[(size_t)r] = (double)(sure * rule.weight(label)) * (lse - (double)row[label]);
    for (int32_t c = 0; shared > 0 && c < C; c++) loss[(size_t)r] += (double)(shared * rule.weight(c)) * (lse - (double)row[c]);
    best[(size_t)r] = row[label] == top;
  });
  double sum = 0;
  for (int64_t r = 0; r < M; r++) {
    sum += loss[(size_t)r];
    if (right) *right += best[(size_t)r];
  }
  Tensor y(Shape{1}, (float)(sum / divisor));

  // dx += (softmax(x) ((1 - e) w_label + e/C sum_c w_c) - (1 - e) w_label onehot(label) - e/C w) * dy / divisor
  record("cross_entropy", y, {x}, [=] {
    bool add;
    float* dx = x.grad_to_add(add).data();
    const float scale = (float)((double)y.grad()[0] / divisor);
    parallel_for(M, [&](int64_t r) {
      const int32_t label = labels[(size_t)r];
      float *to = dx + r * C, *d = add ? scratch(0, C) : to;
      if (label == kIgnored) {
        if (!add) std::fill_n(to, C, 0.f);
        return;
      }
      const float *row = x.data() + r * C, own = sure * rule.weight(label) * scale, mass = own + shared * (float)all_weights * scale;
      const float total = k.exp_sum(row, 1, k.max(row, C), d, C);  // d = exp(x - top), which is softmax(x) total
      k.scale(mass / total, d, d, C);
      d[label] -= own;
      for (int32_t c = 0; shared > 0 && c < C; c++) d[c] -= shared * scale * rule.weight(c);
      if (add) k.add(d, to, C);
    });
  });
  return y;
}

// The products of linear_cross_entropy, for m rows of x from `first` on; in bf16 where the tape says so.
struct HeadProducts {
  static constexpr int64_t kAtOnce = 512;  // rows; a multiple of the products' 256 and of the sums' 64: the bytes do not depend on it
  const Tensor &x, &w, &b;
  bool training, narrow;
  NarrowMatrix x16 = {};
  std::optional<PackedWeights> w16 = {}, w16_transposed = {};  // for many rows: packed once

  HeadProducts(const Tensor& x_, const Tensor& w_, const Tensor& b_) : x(x_), w(w_), b(b_), training(recording({x_, w_, b_})) {
    narrow = training && current_tape->products() == Precision::bf16;
    if (!narrow) return;
    x16 = narrowed(x, Precision::bf16);
    if (x.rows() > kAtOnce) w16.emplace(w, false), w16_transposed.emplace(w, true);
  }
  NarrowMatrix part(int64_t first, int64_t m) const {
    return {.precision = Precision::bf16, .n = m, .k = x16.k, .data = x16.row(first), .owner = {}, .scales = {}};
  }
  Tensor rows(int64_t first, int64_t m) const { return Tensor::borrowed({m, x.cols()}, x.data() + first * x.cols(), {}); }
  // z [m,V] = x W^T + b
  void forward(int64_t first, const Tensor& z) const {
    const int64_t m = z.rows();
    const Gemm biased{.b_transposed = true, .epilogue = {.bias = b.data()}};
    if (w16)
      gemm(biased, m, part(first, m), *w16, z.data(), z.cols());
    else if (narrow)
      gemm(biased, m, part(first, m), w, z.data(), z.cols());
    else
      gemm({.b_transposed = true, .backend = training ? Backend::automatic : Backend::own}, rows(first, m), w, z, b);
  }
  // Rows of dx = dz W;  dW += dz^T x, for the first rows dW = dz^T x
  void backward(int64_t first, const Tensor& dz, const Tensor& dx, const Tensor& dw) const {
    const int64_t m = dz.rows(), E = x.cols();
    const Gemm up{.a_transposed = true, .b_transposed = narrow, .add = first > 0};
    if (narrow) {
      const NarrowMatrix dz16 = narrowed(dz, Precision::bf16);
      if (w16)
        gemm({.b_transposed = true}, m, dz16, *w16_transposed, dx.data() + first * E, E);
      else
        gemm({}, m, dz16, w, dx.data() + first * E, E);
      gemm(up, w.rows(), dz16, PackedWeights(part(first, m), true), dw.data(), E);
    } else {
      const Tensor own({m, E});  // a device keeps its product with the tensor asked for, which must outlive it
      gemm({}, dz, w, own);
      std::copy_n(own.data(), m * E, dx.data() + first * E);
      gemm(up, dz, rows(first, m), dw);
    }
  }
};

// z = x W^T + b,   loss = sum over rows of (lse - z_label) / divisor,   lse = log sum exp(z)        x [M,E]   W [V,E]   b [V]
// The logits [M,V] of a vocabulary would be the largest thing in a training step. So they are made for some rows at a time; where a tape
// listens their gradient takes their place and is multiplied on at once.        kept: the gradients of x, W and b, for d loss = 1
Tensor linear_cross_entropy(const Tensor& x, const Tensor& w, const Tensor& b, const std::vector<int32_t>& labels, double divisor,
                            int64_t* right) {
  constexpr int64_t kAtOnce = HeadProducts::kAtOnce;
  const int64_t M = x.rows(), V = w.rows(), blocks = row_blocks(M);
  if (w.cols() != x.cols() || b.size() != V || (int64_t)labels.size() != M)
    throw Error("linear_cross_entropy: x " + shape_of(x) + ", w " + shape_of(w) + ", b " + shape_of(b) + " and " +
                std::to_string(labels.size()) + " labels do not fit");
  for (const int32_t label : labels)
    if (label < 0 || label >= V)
      throw Error("linear_cross_entropy: label " + std::to_string(label) + " is not among the " + std::to_string(V) + " classes");
  if (!divisor) divisor = (double)std::max<int64_t>(M, 1);
  const HeadProducts products(x, w, b);
  const auto share = (float)(1 / divisor);
  const Kernels& k = kernels();
  std::vector<double> loss((size_t)M);
  std::vector<uint8_t> best((size_t)M);
  Tensor dx, dw, db;
  if (products.training)
    dx = Tensor(x.shape()), dw = M ? Tensor(w.shape()) : Tensor(w.shape(), 0.f), db = Tensor({std::max<int64_t>(blocks, 1), V}, 0.f);
  for (int64_t first = 0; first < M; first += kAtOnce) {
    const int64_t m = std::min(kAtOnce, M - first);
    Tensor z({m, V});
    products.forward(first, z);
    float* const scores = z.data();
    auto add_to_bias = [&](int64_t r, int64_t c0, int64_t c1) {
      k.add(scores + r * V + c0, db.data() + (first + r) / kRowBlock * V + c0, c1 - c0);
    };
    const bool few = row_blocks(m) < 4 * threads();  // the blocks would not be shared out evenly
    parallel_ranges(m, few ? 4 : kRowBlock, [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; r++) {
        float* const row = scores + r * V;
        const auto i = (size_t)(first + r);
        const float own = row[labels[i]], top = k.max(row, V), total = k.exp_sum(row, 1, top, row, V);  // row = exp(z - top)
        loss[i] = (double)(top + log_f32(total)) - (double)own, best[i] = own == top;
        if (!products.training) continue;
        k.scale(share / total, row, row, V);  // dz = (softmax(z) - onehot(label)) / divisor
        row[labels[i]] -= share;
        if (!few) add_to_bias(r, 0, V);
      }
    });
    if (products.training && few)
      parallel_ranges(V, 2048, [&](int64_t c0, int64_t c1) {
        for (int64_t r = 0; r < m; r++) add_to_bias(r, c0, c1);
      });
    if (products.training) products.backward(first, z, dx, dw);
  }
  double sum = 0;
  for (int64_t r = 0; r < M; r++) {
    sum += loss[(size_t)r];
    if (right) *right += best[(size_t)r];
  }
  Tensor y(Shape{1}, (float)(sum / divisor));
  if (products.training) add_pairwise(db.data(), blocks, V), db = Tensor({V}, {db.data(), (size_t)V});

  // dx += what is kept * dy, and so on
  record("linear_cross_entropy", y, {x, w, b}, [=, x = x.grad_only(), w = w.grad_only(), b = b.grad_only(), y = y.grad_only()] {
    const float dy = y.grad()[0];
    if (x.needs_grad()) x.add_grad(dx, dy);
    if (w.needs_grad()) w.add_grad(dw, dy);
    if (b.needs_grad()) b.add_grad(db, dy);
  });
  return y;
}

// For row r and column c, over the row's tokens t:   loss = sum over r, c of (log sum exp(x[t,c]) - x[label,c]) / (divisor C)
//   x [N,C]        kept: lse [R,C]        dx[t,c] += (softmax over t - onehot(label)) * dy / (divisor C)        all in double: it is small
Tensor position_cross_entropy(const Tensor& x, const Offsets& offsets, const std::vector<int32_t>& labels, double divisor, int64_t* right) {
  check_offsets("position_cross_entropy", offsets, x.rows());
  const int64_t R = (int64_t)offsets.size() - 1, C = x.cols();
  if ((int64_t)labels.size() != R * C)
    throw Error("position_cross_entropy: " + std::to_string(labels.size()) + " labels for " + std::to_string(R) + " rows of " +
                std::to_string(C) + " columns");
  int64_t counted = 0;
  for (int64_t i = 0; i < R * C; i++) {
    const int64_t length = offsets[(size_t)(i / C) + 1] - offsets[(size_t)(i / C)];
    if (labels[(size_t)i] != kIgnored && (labels[(size_t)i] < 0 || labels[(size_t)i] >= length))
      throw Error("position_cross_entropy: position " + std::to_string(labels[(size_t)i]) + " is not in a row of " +
                  std::to_string(length));
    counted += labels[(size_t)i] != kIgnored && i % C == 0;
  }
  if (!divisor) divisor = (double)std::max<int64_t>(counted, 1);
  const double share = 1 / (divisor * (double)C);
  // each(t, x) for the tokens of row i / C, column i % C
  auto column = [=, rows = offsets](int64_t i, auto each) {
    for (int64_t t = rows[(size_t)(i / C)]; t < rows[(size_t)(i / C) + 1]; t++) each(t * C + i % C, (double)x.data()[t * C + i % C]);
  };
  std::vector<double> lse((size_t)(R * C));
  double sum = 0;
  for (int64_t i = 0, all = 1; i < R * C; i++) {
    const int32_t label = labels[(size_t)i];
    if (i % C == 0) all = label != kIgnored;
    if (label == kIgnored) continue;
    const auto own = (double)x.data()[(offsets[(size_t)(i / C)] + label) * C + i % C];
    double top = own, total = 0;
    column(i, [&](int64_t, double v) { top = std::max(top, v); });
    column(i, [&](int64_t, double v) { total += std::exp(v - top); });
    lse[(size_t)i] = top + std::log(total);
    sum += lse[(size_t)i] - own;
    all &= own == top;
    if (right && i % C == C - 1) *right += all;
  }
  Tensor y(Shape{1}, (float)(sum * share));

  record("position_cross_entropy", y, {x}, [=, rows = offsets] {
    const double scale = (double)y.grad()[0] * share;
    for (int64_t i = 0; i < R * C; i++) {
      if (labels[(size_t)i] == kIgnored) continue;
      column(i, [&](int64_t at, double v) { x.grad()[at] += (float)(scale * std::exp(v - lse[(size_t)i])); });
      x.grad()[(rows[(size_t)(i / C)] + labels[(size_t)i]) * C + i % C] -= (float)scale;
    }
  });
  return y;
}

// A loss that is a sum of one term an element: value and slope of the term, in double.
template <class Term>
static Tensor elementwise_loss(const char* op, const Tensor& x, const Tensor& target, double divisor, Term term) {
  if (!(x.shape() == target.shape())) throw Error(std::string(op) + ": shapes differ, " + shape_of(x) + " and " + shape_of(target));
  if (!divisor) divisor = (double)std::max<int64_t>(x.size(), 1);
  DefaultFloatMode mode;
  double sum = 0;
  for (int64_t i = 0; i < x.size(); i++) sum += term(x.data()[i], target.data()[i]).first;
  Tensor y(Shape{1}, (float)(sum / divisor));
  record(op, y, {x}, [=] {
    for (int64_t i = 0; i < x.size(); i++) x.grad()[i] += (float)(term(x.data()[i], target.data()[i]).second * y.grad()[0] / divisor);
  });
  return y;
}

// term = -t log s - (1 - t) log(1 - s) with s = 1 / (1 + exp(-x)), written so that no exp overflows        slope = s - t
Tensor bce_with_logits(const Tensor& logits, const Tensor& targets, double divisor) {
  return elementwise_loss("bce_with_logits", logits, targets, divisor, [](double x, double t) {
    const double e = std::exp(-std::fabs(x));
    return std::pair{std::max(x, 0.0) - x * t + std::log1p(e), (x >= 0 ? 1 : e) / (1 + e) - t};
  });
}

// term = (x - t)^2        slope = 2 (x - t)
Tensor mse_loss(const Tensor& x, const Tensor& target, double divisor) {
  return elementwise_loss("mse_loss", x, target, divisor, [](double v, double t) { return std::pair{(v - t) * (v - t), 2 * (v - t)}; });
}

// With d = 1 - x:   term = d^2 / 2 where t is 1,  max(0, margin - d)^2 / 2 where it is 0        slope = -d,  max(0, margin - d)
Tensor contrastive_loss(const Tensor& x, const Tensor& target, float margin, double divisor) {
  return elementwise_loss("contrastive_loss", x, target, divisor, [margin](double v, double t) {
    const double d = 1 - v, lacks = std::max(0.0, (double)margin - d);
    return std::pair{(t * d * d + (1 - t) * lacks * lacks) / 2, (1 - t) * lacks - t * d};
  });
}

// loss = sum over rows of max(0, |a - p| - |a - n| + margin) / divisor        kept: both distances, >= 1e-6 each
Tensor triplet_loss(const Tensor& a, const Tensor& p, const Tensor& n, float margin, double divisor) {
  if (!(a.shape() == p.shape()) || !(a.shape() == n.shape()))
    throw Error("triplet_loss: shapes differ, " + shape_of(a) + ", " + shape_of(p) + " and " + shape_of(n));
  const int64_t R = a.rows(), H = a.cols();
  if (!divisor) divisor = (double)std::max<int64_t>(R, 1);
  std::vector<double> near((size_t)R), far((size_t)R);
  double sum = 0;
  for (int64_t r = 0; r < R; r++) {
    double to_p = 0, to_n = 0;
    for (int64_t i = r * H; i < (r + 1) * H; i++) {
      const double dp = (double)a.data()[i] - (double)p.data()[i], dn = (double)a.data()[i] - (double)n.data()[i];
      to_p += dp * dp, to_n += dn * dn;
    }
    near[(size_t)r] = std::max(std::sqrt(to_p), 1e-6), far[(size_t)r] = std::max(std::sqrt(to_n), 1e-6);
    sum += std::max(0.0, near[(size_t)r] - far[(size_t)r] + (double)margin);
  }
  Tensor y(Shape{1}, (float)(sum / divisor));

  // where the term is above 0, with u = (a - p) / |a - p| and v = (a - n) / |a - n|, times dy / divisor:  da += u - v,  dp -= u,  dn += v
  record("triplet_loss", y, {a, p, n}, [=] {
    const double scale = (double)y.grad()[0] / divisor;
    for (int64_t r = 0; r < R; r++) {
      if (near[(size_t)r] - far[(size_t)r] + (double)margin <= 0) continue;
      for (int64_t i = r * H; i < (r + 1) * H; i++) {
        const double dp = ((double)a.data()[i] - (double)p.data()[i]) / near[(size_t)r] * scale;
        const double dn = ((double)a.data()[i] - (double)n.data()[i]) / far[(size_t)r] * scale;
        if (a.needs_grad()) a.grad()[i] += (float)(dp - dn);
        if (p.needs_grad()) p.grad()[i] -= (float)dp;
        if (n.needs_grad()) n.grad()[i] += (float)dn;
      }
    }
  });
  return y;
}

// term = x * w        slope = w
Tensor weighted_sum(const Tensor& x, const Tensor& weights) {
  return elementwise_loss("weighted_sum", x, weights, 1, [](double v, double w) { return std::pair{v * w, w}; });
}

// ==== optimiser ===================================================================================================
double schedule_factor(Schedule schedule, int64_t step, int64_t warmup, int64_t steps) {
  if (step < warmup) return (double)(step + 1) / (double)warmup;
  if (schedule == Schedule::constant) return 1;
  const double through = (double)(step - warmup) / (double)std::max<int64_t>(steps - warmup, 1);
  if (through >= 1) return 0;
  return schedule == Schedule::linear ? 1 - through : 0.5 * (1 + std::cos(3.14159265358979323846 * through));
}

AdamW::AdamW(AdamWSettings settings, std::vector<Slot> slots) : settings_(settings), slots_(std::move(slots)) {
  for (Slot& s : slots_) {
    if (!s.m) s.m = Tensor(s.parameter.shape(), 0.f);
    if (!s.v) s.v = Tensor(s.parameter.shape(), 0.f);
  }
}

// With g = gradient * clip_factor, t = updates made, this one included:
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   AdamW:   p -= lr decay p;   p -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//   Google:  p -= lr (m / (sqrt(v) + eps) + decay p)
void AdamW::step(double lr, double clip_factor) {
  updates++;
  const double correct1 = 1 - std::pow(settings_.beta1, (double)updates), correct2 = 1 - std::pow(settings_.beta2, (double)updates);
  const Kernels& k = kernels();
  for (Slot& s : slots_) {
    if (!s.parameter.has_grad()) continue;
    const float *grad = s.parameter.grad(), decay = s.decay ? (float)settings_.weight_decay : 0.f;
    float *p = s.parameter.data(), *m = s.m.data(), *v = s.v.data();
    parallel_ranges(s.parameter.size(), 1 << 15, [&](int64_t i, int64_t end) {
      k.adamw(settings_, (float)(lr * s.lr_scale), decay, (float)clip_factor, (float)correct1, (float)correct2, grad + i, p + i, m + i,
              v + i, end - i);
    });
  }
  Profile::lap("adamw");
}

double gradient_norm(std::span<const Tensor> parameters) {
  constexpr int64_t kPiece = 1 << 14;
  double total = 0;
  for (const Tensor& p : parameters) {
    if (!p.has_grad()) continue;
    const float* g = p.grad();
    std::vector<double> sums((size_t)((p.size() + kPiece - 1) / kPiece));
    parallel_ranges(p.size(), kPiece, [&](int64_t i, int64_t end) { sums[(size_t)(i / kPiece)] = kernels().squares(g + i, end - i); });
    for (const double s : sums) total += s;
  }
  Profile::lap("gradient_norm");
  return std::sqrt(total);
}

double clip_factor(double norm, double limit, bool google) {
  return google ? limit / std::max(norm, limit) : std::min(1.0, limit / (norm + 1e-6));
}

}  // namespace bert
