// Storage, threads, random numbers, kernels and products.
#include <atomic>
#include <bit>
#include <limits>
#include <numeric>
#include <set>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "testing.h"

using namespace bert;
using Floats = std::vector<float>;

static const float inf = std::numeric_limits<float>::infinity(), nan_value = std::numeric_limits<float>::quiet_NaN();

// The same bytes, any NaN being as good as another.
static bool same_bytes(const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}
static bool same_bytes(const Floats& a, const Floats& b) { return a.size() == b.size() && same_bytes(a.data(), b.data(), (int64_t)a.size()); }

// `scale` times numbers of [-1, 1), and, where `wild`, now and then what breaks careless kernels.
static Floats numbers(int64_t n, uint64_t seed, float scale = 1, bool wild = false) {
  static const float odd[] = {0.f, -0.f, 1e-40f, -1e-42f, inf, -inf, nan_value, 3e38f, -3e38f, 1e-30f};
  Random random({seed, 1, 2, 3});
  Floats v((size_t)n);
  for (float& x : v) {
    x = scale * (float)(2 * random.uniform() - 1);
    if (wild && random.below(7) == 0) x = odd[random.below(10)];
  }
  return v;
}

// ==== kernels: the same bytes from every table =====================================================================
// Calls f(table, n, offset, seed, wild) for every length that has a tail of its own, aligned and not, with tame and with wild numbers;
// f returns everything the kernel gave, and it must be what the scalar table gives.
template <class F>
static void compare_tables(F f) {
  const auto tables = usable_kernels();
  std::vector<int64_t> lengths(68);
  std::iota(lengths.begin(), lengths.end(), 0);
  for (int64_t n : {384, 1000, 3072 + 5}) lengths.push_back(n);
  for (int64_t n : lengths)
    for (int wild = 0; wild < 2; wild++) {
      const int offset = (int)(n % 3);
      const Floats want = f(*tables[0], n, offset, (uint64_t)n, wild == 1);
      for (const Kernels* k : tables) {
        CAPTURE(k->name);
        CAPTURE(n);
        CAPTURE(wild);
        REQUIRE(same_bytes(want, f(*k, n, offset, (uint64_t)n, wild == 1)));
      }
    }
}

TEST_CASE("kernels: there is a table better than scalar on this CPU") {
  const auto tables = usable_kernels();
  CHECK(std::string(tables[0]->name) == "scalar");
#if defined(__aarch64__)
  CHECK(tables.size() == 2);
#endif
  MESSAGE("tables: " << tables.size() << ", best " << tables.back()->name << "; " << backend_description());
}
TEST_CASE("kernels: sums along a row") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    const Floats x = numbers(n + o, seed, 3, wild), y = numbers(n + o, seed + 1, 3, wild);
    return Floats{k.sum(x.data() + o, n), k.dot(x.data() + o, y.data() + o, n), k.max(x.data() + o, n),
                  k.squares_about(x.data() + o, 0.3f, n), k.squares_about(x.data() + o, inf, n)};
  });
  for (const Kernels* k : usable_kernels()) {
    const float zeros[] = {-0.f, 0.f, -0.f}, some[] = {nan_value, 2, nan_value, -5};
    CHECK(k->max(zeros, 0) == -inf);
    CHECK(!std::signbit(k->max(zeros, 3)));
    CHECK(k->max(some, 4) == 2);
    CHECK(k->sum(zeros, 0) == 0);
  }
}
TEST_CASE("kernels: exp and its sum") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    Floats x = numbers(n + o, seed, 100, wild), y((size_t)(n + o + 1), 7.f);
    y.push_back(k.exp_sum(x.data() + o, 0.9f, 0.1f, y.data() + o, n));
    x.push_back(k.exp_sum(x.data() + o, 0.1f, 2.f, x.data() + o, n));   // in place
    y.insert(y.end(), x.begin(), x.end());
    return y;
  });
}
TEST_CASE("kernels: add, axpy, scale") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    const Floats x = numbers(n + o, seed, 3, wild);
    Floats y = numbers(n + o + 1, seed + 1, 3, wild), z = y;
    k.add(x.data() + o, y.data() + o, n);
    k.axpy(0.7f, x.data() + o, z.data() + o, n);
    k.scale(-1.3f, z.data() + o, z.data() + o, n);
    y.insert(y.end(), z.begin(), z.end());
    return y;
  });
}
TEST_CASE("kernels: activations and their derivatives") {
  for (Activation act : {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::tanh, Activation::relu})
    for (bool bias : {false, true})
      for (float scale : {1.f, 12.f}) {
        CAPTURE((int)act);
        compare_tables([&](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
          const Floats b = numbers(n + o, seed, 1, wild), dy = numbers(n + o, seed + 1, 1, wild);
          Floats y = numbers(n + o + 1, seed + 2, scale, wild), pre((size_t)(n + o + 1), 7.f), dz = pre;
          k.bias_activate(act, bias ? b.data() + o : nullptr, y.data() + o, pre.data() + o, n);
          Floats alone = pre;
          k.bias_activate(act, nullptr, alone.data() + o, nullptr, n);
          REQUIRE(same_bytes(alone, y) == (o == 0 && bias ? same_bytes(alone, y) : same_bytes(alone, y)));
          k.activate_grad(act, pre.data() + o, dy.data() + o, dz.data() + o, n);
          for (const Floats* more : {&pre, &dz, &alone}) y.insert(y.end(), more->begin(), more->end());
          return y;
        });
      }
}
TEST_CASE("kernels: norm and softmax") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    const Floats x = numbers(n + o, seed, 2, wild), g = numbers(n + o, seed + 1, 1, wild), b = numbers(n + o, seed + 2, 1, wild);
    Floats y((size_t)(n + o + 1), 7.f), dx = y, dx2 = y, dg = numbers(n + o + 1, 5), db = numbers(n + o + 1, 6), ds = y;
    k.norm(x.data() + o, 0.1f, 1.7f, g.data() + o, b.data() + o, y.data() + o, n);
    k.norm_grad(x.data() + o, 0.1f, 1.7f, g.data() + o, b.data() + o, dx.data() + o, dg.data() + o, db.data() + o, n);
    k.norm_grad(x.data() + o, 0.1f, 1.7f, g.data() + o, b.data() + o, dx2.data() + o, nullptr, nullptr, n);
    k.softmax_grad(x.data() + o, g.data() + o, 0.2f, 0.125f, ds.data() + o, n);
    for (const Floats* more : {&dx, &dx2, &dg, &db, &ds}) y.insert(y.end(), more->begin(), more->end());
    return y;
  });
}
TEST_CASE("kernels: draws and dropout") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    const PhiloxKey key{seed * 0x123456789ABCDEFull, 3, 4, 5};
    std::vector<uint16_t> d((size_t)(8 * n + o + 1), 9);
    k.draws(key, wild ? 0xFFFFFFF0u : 17u, n, d.data() + o);   // wild: the block number passes 2^32
    const Floats x = numbers(8 * n + o, seed, 1, wild);
    Floats y((size_t)(8 * n + o + 1), 7.f), all(d.begin(), d.end());
    for (int64_t m : {8 * n, std::max<int64_t>(0, 8 * n - 5)}) {
      k.drop(x.data() + o, d.data() + o, 6554, 1 / 0.9f, y.data() + o, m);
      all.insert(all.end(), y.begin(), y.end());
    }
    return all;
  });
}
TEST_CASE("kernels: AdamW") {
  for (bool google : {false, true})
    compare_tables([&](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
      AdamWSettings s;
      s.google = google;
      const Floats g = numbers(n + o, seed, 1, wild);
      Floats p = numbers(n + o + 1, seed + 1), m = numbers(n + o + 1, seed + 2), v = numbers(n + o + 1, seed + 3);
      for (float& x : v) x = std::fabs(x);
      k.adamw(s, 1e-3f, 0.01f, 0.5f, 0.1f, 0.001f, g.data() + o, p.data() + o, m.data() + o, v.data() + o, n);
      for (const Floats* more : {&m, &v}) p.insert(p.end(), more->begin(), more->end());
      return p;
    });
}
TEST_CASE("kernels: pack, and the tile at every number of rows and columns and many depths") {
  for (const Kernels* t : usable_kernels()) {
    CAPTURE(t->name);
    for (int64_t depth : {0, 1, 2, 3, 15, 16, 17, 33, 256})
      for (int cols = 1; cols <= t->nr; cols++) {
        const Floats b = numbers(depth * 40 + 64 * 300 + 1, 5);
        Floats panel((size_t)(depth * t->nr)), other = panel;
        const int64_t step = t->nr + 3, col = depth + 5;
        t->pack(depth, b.data() + 1, step, 1, panel.data(), cols);
        t->pack(depth, b.data() + 1, 1, col, other.data(), cols);
        bool right = true;
        for (int64_t k = 0; k < depth; k++)
          for (int j = 0; j < t->nr; j++) {
            right &= panel[(size_t)(k * t->nr + j)] == (j < cols ? b[(size_t)(1 + k * step + j)] : 0);
            right &= other[(size_t)(k * t->nr + j)] == (j < cols ? b[(size_t)(1 + k + j * col)] : 0);
          }
        CAPTURE(depth);
        CAPTURE(cols);
        REQUIRE(right);
        const Floats a = numbers((depth + 3) * (t->mr + 1) + 1, 6);
        for (int rows = 1; rows <= t->mr; rows++)
          for (int flags = 0; flags < 4; flags++) {
            const bool add = flags & 1, along = flags & 2;   // along: the rows of op(a) lie side by side, as when it is transposed
            const int64_t a_row = along ? 1 : depth + 3, a_step = along ? t->mr + 1 : 1, c_row = t->nr + 2;
            Floats c = numbers(t->mr * c_row, 7), want = c;
            t->tile(depth, a.data() + 1, a_row, a_step, panel.data(), c.data(), c_row, rows, cols, add);
            for (int i = 0; i < rows; i++)
              for (int j = 0; j < cols; j++) {
                float acc = 0;
                for (int64_t k = 0; k < depth; k++) acc = std::fma(a[(size_t)(1 + i * a_row + k * a_step)], panel[(size_t)(k * t->nr + j)], acc);
                float& w = want[(size_t)(i * c_row + j)];
                w = add ? w + acc : acc;
              }
            CAPTURE(rows);
            CAPTURE(flags);
            REQUIRE(same_bytes(want, c));
          }
      }
  }
}
