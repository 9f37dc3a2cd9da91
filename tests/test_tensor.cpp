// Storage, threads, random numbers, kernels and products.
#include <atomic>
#include <bit>
#include <limits>
#include <numeric>
#include <set>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
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
static bool same_bytes(const Floats& a, const Floats& b) {
  return a.size() == b.size() && same_bytes(a.data(), b.data(), (int64_t)a.size());
}

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
  CHECK(tables.size() == (getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? 3 : 2));
#endif
  MESSAGE("tables: " << tables.size() << ", best " << std::string(tables.back()->name) << "; " << backend_description());
}
TEST_CASE("kernels: sums along a row") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    const Floats x = numbers(n + o, seed, 3, wild), y = numbers(n + o, seed + 1, 3, wild);
    Floats both((size_t)(n + 1), 7.f);
    both.push_back(k.add_sum(x.data() + o, y.data() + o, both.data(), n));
    for (const float more : Floats{(float)k.squares(x.data() + o, n), k.sum(x.data() + o, n), k.dot(x.data() + o, y.data() + o, n),
                                   k.max(x.data() + o, n), k.squares_about(x.data() + o, 0.3f, n), k.squares_about(x.data() + o, inf, n)})
      both.push_back(more);
    return both;
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
    x.push_back(k.exp_sum(x.data() + o, 0.1f, 2.f, x.data() + o, n));  // in place
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
          k.finish(act, nullptr, bias ? b.data() + o : nullptr, y.data() + o, pre.data() + o, 0, 1, n);
          Floats alone = pre;
          k.finish(act, nullptr, nullptr, alone.data() + o, nullptr, 0, 1, n);
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
    k.norm_grad(x.data() + o, n % 2 ? inf : 0.1f, 1.7f, g.data() + o, b.data() + o, dx2.data() + o, nullptr, nullptr, n);
    k.softmax_grad(x.data() + o, g.data() + o, 0.2f, 0.125f, ds.data() + o, n);
    for (const Floats* more : {&dx, &dx2, &dg, &db, &ds}) y.insert(y.end(), more->begin(), more->end());
    return y;
  });
}
TEST_CASE("kernels: draws and dropout") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    const PhiloxKey key{seed * 0x123456789ABCDEFull, 3, 4, 5};
    std::vector<uint16_t> d((size_t)(8 * n + o + 1), 9);
    k.draws(key, wild ? 0xFFFFFFF0u : 17u, n, d.data() + o);  // wild: the block number passes 2^32
    const Floats x = numbers(8 * n + o, seed, 1, wild);
    Floats y((size_t)(8 * n + o + 1), 7.f), all(d.begin(), d.end());
    for (int64_t m : {8 * n, std::max<int64_t>(0, 8 * n - 5)}) {
      const uint32_t thresholds[] = {6554, m ? d[(size_t)(o + m - 1)] : 0u, 65536};  // the second: a draw that is just high enough
      for (uint32_t threshold : thresholds) {
        k.drop(x.data() + o, d.data() + o, threshold, 1 / 0.9f, y.data() + o, m);
        all.insert(all.end(), y.begin(), y.end());
      }
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
            const bool add = flags & 1, along = flags & 2;  // along: the rows of op(a) lie side by side, as when it is transposed
            const int64_t a_row = along ? 1 : depth + 3, a_step = along ? t->mr + 1 : 1, c_row = t->nr + 2;
            Floats c = numbers(t->mr * c_row, 7), want = c;
            t->tile(depth, a.data() + 1, a_row, a_step, panel.data(), c.data(), c_row, rows, cols, add);
            for (int i = 0; i < rows; i++)
              for (int j = 0; j < cols; j++) {
                float acc = 0;
                for (int64_t k = 0; k < depth; k++)
                  acc = std::fma(a[(size_t)(1 + i * a_row + k * a_step)], panel[(size_t)(k * t->nr + j)], acc);
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

TEST_CASE("kernels: a column's sums, which are the tile's") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    const Floats a = numbers(17 * (n + 3) + o, seed, 1, wild), b = numbers(n + o, seed + 1, 1, wild);
    Floats panel((size_t)(n * k.nr)), all;
    for (int64_t i = 0; i < n; i++) panel[(size_t)(i * k.nr)] = b[(size_t)(i + o)];
    for (int rows = 1; rows <= 17; rows++)
      for (const bool add : {false, true}) {
        Floats c = numbers(rows * 2, 7), tiled = c;
        k.column(n, a.data() + o, n + 3, b.data() + o, c.data(), 2, rows, add);
        for (int i = 0; i < rows; i++) k.tile(n, a.data() + o + i * (n + 3), 1, 1, panel.data(), tiled.data() + 2 * i, 1, 1, 1, add);
        REQUIRE((wild || same_bytes(c, tiled)));
        all.insert(all.end(), c.begin(), c.end());
      }
    return all;
  });
}

TEST_CASE("kernels: a transpose of any size, between rows of any distance") {
  for (const Kernels* t : usable_kernels())
    for (int64_t rows = 0; rows <= 17; rows++)
      for (int64_t cols = 0; cols <= 17; cols++) {
        const int64_t x_row = cols + 3, y_row = rows + 1;
        const Floats x = numbers(rows * x_row + 1, 1);
        Floats y((size_t)(cols * y_row + 1), 7), want = y;
        for (int64_t i = 0; i < rows; i++)
          for (int64_t j = 0; j < cols; j++) want[(size_t)(1 + j * y_row + i)] = x[(size_t)(1 + i * x_row + j)];
        t->transpose(x.data() + 1, x_row, rows, cols, y.data() + 1, y_row);
        CAPTURE(t->name);
        REQUIRE(same_bytes(want, y));
      }
}
TEST_CASE("kernels: rounding to bf16 and to int8, and sums of int8 made numbers") {
  compare_tables([](const Kernels& k, int64_t n, int o, uint64_t seed, bool wild) {
    const Floats x = numbers(n + o, seed, 3, wild), scales = numbers(n + o, seed + 1), bias = numbers(n + o, seed + 2, 1, wild);
    std::vector<uint16_t> halves((size_t)(n + 1), 7);
    k.to_bf16(x.data() + o, halves.data(), n);
    Floats all(halves.begin(), halves.end());
    std::vector<uint8_t> bytes((size_t)(n + 1), 7);
    for (const int zero : {0, 128}) {
      all.push_back(k.to_int8(x.data() + o, zero, bytes.data(), n));
      if (std::isfinite(all.back())) all.insert(all.end(), bytes.begin(), bytes.end());  // else the scale says all
    }
    Floats wide((size_t)(n + 1), 7), words((size_t)(n + 1), 7);
    k.from_bf16(halves.data(), wide.data(), n);
    const uint16_t* const some = halves.data();
    for (const auto& [even, odd] : {std::pair{some, some}, {some, nullptr}, {nullptr, some}, {nullptr, nullptr}}) {
      k.interleave(even, odd, words.data(), n);
      const Floats of_halves = words;
      k.round_pairs(even ? x.data() + o : nullptr, odd ? x.data() + o : nullptr, words.data(), n);
      CHECK(same_bytes(of_halves, words));
      for (const float w : words)
        all.push_back((float)(std::bit_cast<uint32_t>(w) >> 16)), all.push_back((float)(std::bit_cast<uint32_t>(w) & 0xFFFF));
    }
    for (const float w : wide) all.push_back((float)(std::bit_cast<uint32_t>(w) >> 16));
    std::vector<int32_t> zeros((size_t)(n + o), 1000);
    Random random({seed, 4, 4, 4});
    Floats sums((size_t)(2 * (n + o) + 1));
    for (float& s : sums) s = std::bit_cast<float>((int32_t)random.next() >> 3);
    const float rows[] = {0.25f, 3e-7f};
    Floats other = sums;
    const Kernels::Int8Sums how{rows, scales.data() + o, zeros.data() + o};
    k.finish(Activation::gelu, &how, bias.data() + o, sums.data() + o, nullptr, n + o, 2, n);
    k.finish(Activation::none, &how, nullptr, other.data() + o, nullptr, n + o, 2, n);
    for (const Floats* more : {&sums, &other}) all.insert(all.end(), more->begin(), more->end());
    return all;
  });
}
// Every bf16 is itself; what lies between two goes to the nearer one, of two equally near to the even one.
TEST_CASE("kernels: bf16 is the nearest, int8 has 127 steps of the largest") {
  const Kernels& k = kernels();
  for (uint32_t b = 0; b < 0x8000; b++) {
    const uint32_t bits = b << 16;
    uint16_t got[5];
    const float x[5] = {std::bit_cast<float>(bits), std::bit_cast<float>(bits | 0x7FFF), std::bit_cast<float>(bits | 0x8000),
                        std::bit_cast<float>(bits | 0x8001), std::bit_cast<float>(bits | 0x80000000)};
    k.to_bf16(x, got, 5);
    const bool tiny = b < 0x80, nan = b >= 0x7F80;
    if (nan) {  // infinity; behind it NaN stays NaN
      CHECK(got[0] == (b == 0x7F80 ? 0x7F80 : (b | 0x40)));
      CHECK((got[1] & 0x7FFF) > 0x7F80);
      continue;
    }
    REQUIRE(got[0] == (tiny ? 0 : b));
    REQUIRE(got[1] == (tiny ? 0 : b));
    REQUIRE(got[2] == (tiny ? 0 : b + (b & 1)));
    REQUIRE(got[3] == (tiny ? 0 : b + 1));
    REQUIRE(got[4] == (0x8000 | (tiny ? 0 : b)));
  }
  const Floats x = {-2, 1, 0.5f, 0.0118f, 2, 0, -0.f};
  int8_t q[7];
  CHECK(k.to_int8(x.data(), 0, q, 7) == 2.f / 127);
  CHECK(std::vector<int>(q, q + 7) == std::vector<int>{-127, 64, 32, 1, 127, 0, 0});  // 63.5 and 31.75; ties to even
  const Floats tiny = {1e-31f, -5e-31f};
  CHECK(k.to_int8(tiny.data(), 0, q, 2) == 0);
  CHECK((q[0] == 0 && q[1] == 0));
  CHECK(std::isnan(k.to_int8(Floats{1, nan_value, 2}.data(), 0, q, 3)));
  CHECK(k.to_int8(Floats{1, -inf, 2}.data(), 0, q, 3) == inf);
}
// Words of `depth` by `n`: two bf16 or four int8, of int8 also the extremes alone.
static Floats words(int64_t n, uint64_t seed, bool bf16, bool extreme) {
  Random random({seed, 9, 9, 9});
  Floats v((size_t)n);
  for (float& x : v) {
    uint32_t w = random.next();
    if (bf16) {  // exponents around 1, at times around the smallest, so that products and sums are denormals
      const uint32_t exponent = extreme ? 0x1E80u : 0x3F80u;
      w = (w & 0x80FF80FFu) | exponent << 16 | exponent;
      if (random.below(9) == 0) w &= 0x807F807Fu;  // denormals
    } else if (extreme) {
      w = random.below(2) ? 0x7F7F7F7Fu : 0x81818181u;
    } else {
      for (int bit = 0; bit < 32; bit += 8)
        if ((w >> bit & 0xFF) == 0x80) w ^= 1u << bit;  // -128 does not occur
    }
    x = std::bit_cast<float>(w);
  }
  return v;
}
// `rows` rows of words of bf16, `apart` from each other, two words of a row `step`: as VDPBF16PS wants them.
static void pair_words(float* from, int64_t rows, int64_t apart, int64_t depth, int64_t step) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < depth; k += 2) {
      float &first = from[r * apart + k * step], &second = from[r * apart + (k + 1) * step];
      const uint32_t x = std::bit_cast<uint32_t>(first), y = std::bit_cast<uint32_t>(second);
      first = std::bit_cast<float>(x << 16 | (y & 0xFFFF)), second = std::bit_cast<float>(x >> 16 << 16 | y >> 16);
    }
}
// The two bf16 of each word as floats, lower half first.
static Floats halves_of(const Floats& words) {
  Floats wide;
  for (const float word : words)
    for (const uint32_t half : {std::bit_cast<uint32_t>(word) << 16, std::bit_cast<uint32_t>(word) & 0xFFFF0000u})
      wide.push_back(std::bit_cast<float>(half));
  return wide;
}
// The four int8 of each word as two words of int16: 0 and 2, 1 and 3.
static Floats wide_bytes_of(const Floats& words) {
  Floats wide;
  for (const float word : words) {
    const auto byte = std::bit_cast<std::array<int8_t, 4>>(word);
    for (const size_t i : {0, 1}) wide.push_back(std::bit_cast<float>(std::array<int16_t, 2>{byte[i], byte[i + 2]}));
  }
  return wide;
}
TEST_CASE("kernels: the tiles of bf16 and int8 give the scalar one's bytes at every number of rows and columns") {
  const Kernels& scalar = *usable_kernels()[0];
  for (const Kernels* t : usable_kernels())
    for (const bool bf16 : {false, true})
      for (const bool extreme : {false, true})
        for (const int64_t depth : {16, 32, 48, 128, 256}) {
          const int64_t a_row = depth + 3, b_row = t->nr, mr = bf16 ? t->mr_bf16 : t->mr_int8, c_row = t->nr + 2;
          const Floats b = words(depth * b_row + 1, 1, bf16, extreme), a = words(a_row * mr + 1, 2, bf16, extreme);
          const bool is_wide = bf16 ? t->halves == Kernels::Halves::floats : t->int8_wide;
          const Floats wide = bf16 ? halves_of(a) : wide_bytes_of(a);
          Floats its_a = is_wide ? wide : a, its_b = b;  // as the instruction wants them
          if (bf16 && t->halves == Kernels::Halves::pairs)
            pair_words(its_a.data() + 1, mr, a_row, depth, 1), pair_words(its_b.data() + 1, b_row, 1, depth, b_row);
          if (!bf16 && t->int8_zero)
            for (float& x : its_a) x = std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ 0x80808080u);
          Floats panels((size_t)(b_row * depth * scalar.nr));  // the scalar tile wants panels of its own width: one for each column
          for (int64_t j = 0; j < b_row; j++)
            for (int64_t k = 0; k < depth; k++) panels[(size_t)((j * depth + k) * scalar.nr)] = b[(size_t)(1 + k * b_row + j)];
          for (const bool add : {false, true}) {
            Floats start = numbers(mr * c_row, 7, extreme ? 1e-38f : 1);
            for (float& x : start)
              if (!bf16) x = std::bit_cast<float>((int32_t)(x * 1e6f));  // sums that are there already
            Floats all = start;
            const DefaultFloatMode mode(bf16);
            for (int64_t i = 0; i < mr; i++)
              for (int64_t j = 0; j < b_row; j++) {
                float& to = all[(size_t)(i * c_row + j)];
                const float* const panel = panels.data() + j * depth * scalar.nr;
                const float* const row = bf16 ? wide.data() + 2 * (1 + i * a_row) : a.data() + 1 + i * a_row;
                (bf16 ? scalar.tile_bf16 : scalar.tile_int8)(depth, row, 1, 1, panel, &to, 1, 1, 1, add);
                for (int64_t k = 0; !bf16 && t->int8_zero && k < depth; k++)  // 128 times the column is to be taken off again
                  for (int bit = 0; bit < 32; bit += 8)
                    to = std::bit_cast<float>(std::bit_cast<int32_t>(to) +
                                              128 * (int8_t)(std::bit_cast<uint32_t>(panel[k * scalar.nr]) >> bit));
              }
            for (int rows = 1; rows <= mr; rows++)
              for (int cols = 1; cols <= t->nr; cols += cols % 7 == 0 ? 1 : 3) {
                Floats c = start, want = start;
                for (int i = 0; i < rows; i++) std::copy_n(all.begin() + i * c_row, cols, want.begin() + i * c_row);
                t->tiles_on();
                (bf16 ? t->tile_bf16 : t->tile_int8)(depth, its_a.data() + (is_wide ? 2 : 1), is_wide ? 2 * a_row : a_row, 1,
                                                     its_b.data() + 1, c.data(), c_row, rows, cols, add);
                t->tiles_off();
                CAPTURE(t->name);
                CAPTURE(bf16);
                CAPTURE(depth);
                CAPTURE(rows);
                CAPTURE(cols);
                REQUIRE(same_bytes(want, c));
              }
          }
        }
}

// ==== the engine's own functions ==================================================================================
static double ulp(double x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1., std::max(exponent, -125) - 24);
}
struct Errors {
  double ulp, absolute;
};
// The largest error of f against g over the floats of [low, high], each `step`-th one of both signs: in ulp of g, and absolute.
template <class F, class G>
static Errors largest_error(uint32_t step, float low, float high, F f, G g) {
  double in_ulp = 0, absolute = 0;
  for (uint64_t b = 0; b < 0xFF800000u; b += step) {
    const float x = std::bit_cast<float>((uint32_t)b);
    if (!(x >= low && x <= high)) continue;
    const double want = g((double)x), error = std::fabs((double)f(x) - want);
    if (std::isnan(error)) return {error, error};
    in_ulp = std::max(in_ulp, error / ulp(want)), absolute = std::max(absolute, error);
  }
  return {in_ulp, absolute};
}
static float act(Activation a, float x) {
  usable_kernels()[0]->finish(a, nullptr, nullptr, &x, nullptr, 0, 1, 1);
  return x;
}
static float slope(Activation a, float x) {
  const float one = 1;
  usable_kernels()[0]->activate_grad(a, &x, &one, &x, 1);
  return x;
}
static void check_functions(uint32_t step) {
  auto normal = [](double x) { return std::erfc(-x * std::sqrt(0.5)) / 2; };
  auto density = [](double x) { return std::exp(-x * x / 2) * 0.3989422804014327; };
  auto gate = [](double x) { return 1 / (1 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))); };
  CHECK(largest_error(step, -87, 88.72283f, exp_f32, [](double x) { return std::exp(x); }).ulp < 0.9);
  CHECK(largest_error(step, 1.2e-38f, 3e38f, log_f32, [](double x) { return std::log(x); }).ulp < 0.8);
  CHECK(largest_error(step, -30, 30, tanh_f32, [](double x) { return std::tanh(x); }).ulp < 1.4);
  CHECK(largest_error(step, -1, inf, normal_cdf_f32, normal).ulp < 1.3);
  CHECK(largest_error(step, -6.f, -1, normal_cdf_f32, normal).ulp < 4000);  // of a value down to 1e-9: relative 3e-4
  CHECK(largest_error(step, -3e38f, inf, normal_cdf_f32, normal).absolute < 6e-8);
  auto gelu = [](float x) { return act(Activation::gelu, x); };
  CHECK(largest_error(step, -1, 100, gelu, [&](double x) { return x * normal(x); }).ulp < 1.7);
  CHECK(largest_error(step, -100, -1, gelu, [&](double x) { return x * normal(x); }).absolute < 2e-8);
  auto gelu_tanh = [](float x) { return act(Activation::gelu_tanh, x); };
  CHECK(largest_error(step, -1, 100, gelu_tanh, [&](double x) { return x * gate(x); }).ulp < 4);
  CHECK(largest_error(step, -100, -1, gelu_tanh, [&](double x) { return x * gate(x); }).absolute < 2e-7);
  CHECK(largest_error(
            step, -100, 100, [](float x) { return slope(Activation::gelu, x); }, [&](double x) { return normal(x) + x * density(x); })
            .absolute < 2e-7);
  CHECK(largest_error(
            step, -100, 100, [](float x) { return slope(Activation::gelu_tanh, x); },
            [&](double x) { return gate(x) + x * gate(x) * (1 - gate(x)) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x); })
            .absolute < 3e-6);
}
TEST_CASE("functions: errors against double, a sample of the floats") { check_functions(65521); }
TEST_CASE("functions: errors against double, very many floats" * doctest::skip()) { check_functions(127); }
TEST_CASE("functions: where they end") {
  CHECK(exp_f32(-87.1f) == 0);
  CHECK(exp_f32(-87.f) > 0);
  CHECK(exp_f32(-inf) == 0);
  CHECK(exp_f32(0) == 1);
  CHECK(exp_f32(88.722832f) < inf);
  CHECK(exp_f32(88.72284f) == inf);
  CHECK(exp_f32(inf) == inf);
  CHECK(tanh_f32(inf) == 1);
  CHECK(tanh_f32(-1000) == -1);
  CHECK(normal_cdf_f32(inf) == 1);
  CHECK(normal_cdf_f32(-inf) == 0);
  CHECK(log_f32(1) == 0);
  for (auto f : {exp_f32, tanh_f32, normal_cdf_f32}) CHECK(std::isnan(f(nan_value)));
  for (Activation a : {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::tanh, Activation::relu}) {
    CHECK(std::isnan(act(a, nan_value)));
    CHECK(act(a, 1000) == (a == Activation::tanh ? 1 : 1000));
    CHECK(slope(a, 1000) == (a == Activation::tanh ? 0 : 1));
  }
}

// ==== products ====================================================================================================
// What tensor.h promises, written plainly.
static Floats chain_product(const Gemm& how, int64_t m, int64_t n, int64_t k, const Floats& a, int64_t lda, const Floats& b, int64_t ldb,
                            Floats c, int64_t ldc, Floats& pre) {
  const Kernels& scalar = *usable_kernels()[0];
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float& to = c[(size_t)(i * ldc + j)];
      if (!how.add && !k) to = 0;
      for (int64_t k0 = 0; k0 < k; k0 += 256) {
        float acc = 0;
        for (int64_t x = k0; x < std::min(k, k0 + 256); x++)
          acc = std::fma(a[(size_t)(how.a_transposed ? x * lda + i : i * lda + x)],
                         b[(size_t)(how.b_transposed ? j * ldb + x : x * ldb + j)], acc);
        to = how.add || k0 ? to + acc : acc;
      }
      const float* bias = how.epilogue.bias ? how.epilogue.bias + j : nullptr;
      scalar.finish(how.epilogue.activation, nullptr, bias, &to, how.epilogue.pre ? &pre[(size_t)(i * ldc + j)] : nullptr, 0, 1, 1);
    }
  return c;
}
static double relative_difference(const Floats& a, const Floats& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); i++)
    worst = std::max(worst, std::fabs((double)a[i] - (double)b[i]) / std::max(1., std::fabs((double)a[i])));
  return worst;
}

static const int64_t product_shapes[][3] = {{1, 1, 1},    {1, 33, 257},  {2, 64, 64},  {3, 5, 300},   {5, 31, 520},
                                            {8, 200, 40}, {12, 32, 256}, {13, 97, 17}, {33, 70, 129}, {64, 65, 255},
                                            {127, 3, 64}, {130, 40, 33}, {250, 77, 5}, {61, 390, 30}};

TEST_CASE("gemm: the promised bytes at odd sizes, all transposes, with every epilogue, however it is called") {
  int turn = 0;
  for (const auto& shape : product_shapes)
    for (int flags = 0; flags < 8; flags++, turn++) {
      const int64_t m = shape[0], n = shape[1], k = shape[2];
      Gemm how{.a_transposed = (flags & 1) != 0, .b_transposed = (flags & 2) != 0, .add = (flags & 4) != 0, .backend = Backend::own};
      const int64_t lda = (how.a_transposed ? m : k) + turn % 3, ldb = (how.b_transposed ? k : n) + turn % 2, ldc = n + turn % 4;
      const Floats a = numbers((how.a_transposed ? k : m) * lda, 1), b = numbers((how.b_transposed ? n : k) * ldb, 2), bias = numbers(n, 3);
      const Floats start = numbers(m * ldc, 4);
      Floats pre(start.size(), 5.f), want_pre = pre;
      if (turn % 3) how.epilogue.bias = bias.data();
      if (turn % 5 == 1) how.epilogue.pre = pre.data();
      how.epilogue.activation = (Activation)(turn % 5);
      const Floats want = chain_product(how, m, n, k, a, lda, b, ldb, start, ldc, want_pre);
      CAPTURE(m);
      CAPTURE(n);
      CAPTURE(k);
      CAPTURE(flags);
      for (int count : {1, 2, 3}) {
        UseThreads use(count);
        Floats c = start;
        gemm(how, m, n, k, a.data(), lda, b.data(), ldb, c.data(), ldc);
        REQUIRE(same_bytes(want, c));
        REQUIRE(same_bytes(want_pre, pre));
      }
      Floats c = start;
      gemm_here(how, m, n, k, a.data(), lda, b.data(), ldb, c.data(), ldc);
      REQUIRE(same_bytes(want, c));
      if (how.b_transposed && !how.add && !how.a_transposed && ldb == k) {
        const PackedWeights packed(b.data(), n, k);
        c = start;
        gemm(m, a.data(), lda, packed, c.data(), ldc, how.epilogue);
        REQUIRE(same_bytes(want, c));
        for (int64_t i = 0; i < m; i++) {  // and a row alone gives what it gave among others
          Floats row((size_t)n);
          Epilogue alone = how.epilogue;
          alone.pre = nullptr;
          gemm(1, a.data() + i * lda, lda, packed, row.data(), n, alone);
          REQUIRE(same_bytes(row.data(), want.data() + i * ldc, n));
        }
      }
    }
}
TEST_CASE("gemm: large enough for several tasks, the same bytes with any number of threads") {
  const int64_t m = 700, n = 450, k = 300;
  const Floats a = numbers(m * k, 1), b = numbers(n * k, 2), bias = numbers(n, 3);
  const PackedWeights packed(b.data(), n, k);
  for (bool a_transposed : {false, true}) {
    Gemm how{
        .a_transposed = a_transposed, .b_transposed = true, .backend = Backend::own, .epilogue = {bias.data(), Activation::gelu, nullptr}};
    Floats first((size_t)(m * n)), c = first;
    gemm_here(how, m, n, k, a.data(), a_transposed ? m : k, b.data(), k, first.data(), n);
    for (int count : {1, 2, 5}) {
      UseThreads use(count);
      gemm(how, m, n, k, a.data(), a_transposed ? m : k, b.data(), k, c.data(), n);
      CHECK(same_bytes(first, c));
      if (a_transposed) continue;
      std::fill(c.begin(), c.end(), 9.f);
      gemm(m, a.data(), k, packed, c.data(), n, how.epilogue);
      CHECK(same_bytes(first, c));
    }
  }
}
// What tensor.h promises of bf16 and int8, written plainly, of one element; of bf16 added to `sum`.
static float narrow_product(Precision precision, const float* a, const float* w, int64_t k, float bias, float sum = 0) {
  const Kernels& scalar = *usable_kernels()[0];
  if (precision == Precision::int8) {
    std::vector<int8_t> x((size_t)k), y((size_t)k);
    const float scale = scalar.to_int8(a, 0, x.data(), k) * scalar.to_int8(w, 0, y.data(), k);
    int64_t whole = 0;
    for (size_t i = 0; i < x.size(); i++) whole += x[i] * y[i];
    return std::fma((float)whole, scale, bias);
  }
  std::vector<uint16_t> x((size_t)k), y((size_t)k);
  scalar.to_bf16(a, x.data(), k), scalar.to_bf16(w, y.data(), k);
  auto wide = [](uint16_t half) { return std::bit_cast<float>((uint32_t)half << 16); };
  for (int64_t k0 = 0; k0 < k; k0 += 32) {
    float chain[2] = {};
    for (int64_t i = k0; i < std::min(k, k0 + 32); i++) chain[i % 2] = std::fma(wide(x[(size_t)i]), wide(y[(size_t)i]), chain[i % 2]);
    sum += chain[0] + chain[1];
  }
  return sum + bias;
}
TEST_CASE("gradient without numbers: it is shared, and the numbers go back to the pool") {
  Tensor x({1 << 20}, 1.f);
  x.set_needs_grad();
  const size_t before = pool_use().in_use;
  Tensor side = x.grad_only();
  x.grad()[3] = 5;
  CHECK((side.needs_grad() && side.has_grad() && side.grad()[3] == 5 && side.shape() == x.shape()));
  CHECK_THROWS_WITH_AS(side.data(), doctest::Contains("only the gradient kept"), Error);
  x = {};
  CHECK(pool_use().in_use < before + 100);  // one gradient came, the numbers went
  side.add_grad(Tensor({1 << 20}, 2.f), 3);
  CHECK((side.grad()[0] == 6 && side.grad()[3] == 11));
  CHECK_THROWS_AS(side.add_grad(Tensor({7}, 1.f), 1), Error);
  const Tensor own({1 << 20}, 4.f);
  side.drop_grad();
  side.add_grad(own, 1);
  CHECK(side.grad() == own.data());
  CHECK(!Tensor().grad_only());
}
TEST_CASE("gemm in bf16 and int8: the promised bytes at odd sizes, at any number of threads, alone and among others, from narrow rows") {
  for (const Precision precision : {Precision::bf16, Precision::int8})
    for (const auto& shape : {std::array<int64_t, 3>{1, 1, 1},
                              {1, 33, 257},
                              {5, 31, 520},
                              {13, 97, 17},
                              {33, 70, 130},
                              {121, 40, 33},
                              {250, 77, 7},
                              {130, 800, 12}}) {
      const int64_t m = shape[0], n = shape[1], k = shape[2];
      CAPTURE(m);
      CAPTURE(n);
      CAPTURE(k);
      Floats a = numbers(m * k, 1), w = numbers(n * k, 2), bias = numbers(n, 3);
      if (m > 1) std::fill_n(a.data() + k, k, 0.f);  // a row of zeros
      Floats want((size_t)(m * n)), c = want;
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
          want[(size_t)(i * n + j)] =
              act(Activation::relu, narrow_product(precision, a.data() + i * k, w.data() + j * k, k, bias[(size_t)j]));
      const PackedWeights packed(w.data(), n, k, precision);
      const Epilogue epilogue{bias.data(), Activation::relu, nullptr};
      for (const int count : {1, 2, 3}) {
        UseThreads use(count);
        std::fill(c.begin(), c.end(), 9.f);
        gemm(m, a.data(), k, packed, c.data(), n, epilogue);
        REQUIRE(same_bytes(want, c));
      }
      for (int64_t i = 0; i < m; i += 7) {
        gemm(1, a.data() + i * k, k, packed, c.data(), n, epilogue);
        REQUIRE(same_bytes(want.data() + i * n, c.data(), n));
      }
      NarrowMatrix rows{.precision = precision, .n = n, .k = k, .owner = {}, .scales = {}};
      std::string bytes((size_t)(n * rows.row_bytes()), '\0');
      for (int64_t j = 0; j < n; j++)
        if (precision == Precision::bf16)
          kernels().to_bf16(w.data() + j * k, bytes.data() + j * rows.row_bytes(), k);
        else
          rows.scales.push_back(kernels().to_int8(w.data() + j * k, 0, bytes.data() + j * rows.row_bytes(), k));
      rows.data = bytes.data();
      Tensor held = Tensor::narrow(rows);
      CHECK(held.shape() == Shape{n, k});
      CHECK_THROWS_WITH_AS(held.data(), doctest::Contains("not in f32"), Error);
      held.pack();
      CHECK(held.packed()->precision() == precision);
      gemm(m, a.data(), k, *held.packed(), c.data(), n, epilogue);
      REQUIRE(same_bytes(want, c));
    }
  Floats a = numbers(40 * 8, 1), w = numbers(40 * 8, 2), c(40 * 40);
  a[5 * 8 + 3] = nan_value, a[6 * 8] = inf;
  for (const Precision precision : {Precision::bf16, Precision::int8}) {
    gemm(40, a.data(), 8, PackedWeights(w.data(), 40, 8, precision), c.data(), 40, {});
    for (size_t i = 0; i < c.size(); i++) CHECK(std::isfinite(c[i]) == (i / 40 != 5 && i / 40 != 6));
  }
}
// What training multiplies: x W^T, dz W, dz^T x, each matrix rounded as it lies.
TEST_CASE("gemm of bf16 matrices: the promised bytes in the layouts of training, at any number of threads") {
  auto transposed = [](const Floats& x, int64_t rows, int64_t cols) {
    Floats t(x.size());
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) t[(size_t)(j * rows + i)] = x[(size_t)(i * cols + j)];
    return Tensor({cols, rows}, t);
  };
  for (const auto& shape :
       {std::array<int64_t, 3>{1, 1, 1}, {7, 33, 2}, {33, 70, 129}, {121, 31, 257}, {300, 65, 600}, {5, 300, 3000}, {513, 9, 40}}) {
    const int64_t m = shape[0], n = shape[1], k = shape[2];
    CAPTURE(m);
    CAPTURE(k);
    const Floats a = numbers(m * k, 1), b = numbers(n * k, 2);
    Floats once((size_t)(m * n)), twice = once, c = once;
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0, at = i * n; j < n; j++, at++) {
        once[(size_t)at] = narrow_product(Precision::bf16, a.data() + i * k, b.data() + j * k, k, 0);
        twice[(size_t)at] = narrow_product(Precision::bf16, a.data() + i * k, b.data() + j * k, k, 0, once[(size_t)at]);
      }
    const NarrowMatrix plain = narrowed(Tensor({m, k}, a), Precision::bf16), turned = narrowed(transposed(a, m, k), Precision::bf16);
    const PackedWeights right(narrowed(Tensor({n, k}, b), Precision::bf16)),
        right_turned(narrowed(transposed(b, n, k), Precision::bf16), true);
    for (const bool a_transposed : {false, true})
      for (const PackedWeights* w : {&right, &right_turned})
        for (const int count : {1, 3}) {
          UseThreads use(count);
          std::fill(c.begin(), c.end(), 9.f);
          gemm({.a_transposed = a_transposed, .b_transposed = true}, m, a_transposed ? turned : plain, *w, c.data(), n);
          REQUIRE(same_bytes(once, c));
          gemm({.a_transposed = a_transposed, .b_transposed = true, .add = true}, m, a_transposed ? turned : plain, *w, c.data(), n);
          REQUIRE(same_bytes(twice, c));
        }
    const Tensor rows({n, k}, b), columns = transposed(b, n, k);  // rounded as they are packed
    for (const bool a_transposed : {false, true})
      for (const bool b_transposed : {false, true})
        for (const int count : {1, 3}) {
          UseThreads use(count);
          Gemm how{.a_transposed = a_transposed, .b_transposed = b_transposed};
          for (const Floats* want : {&once, &twice}) {
            gemm(how, m, a_transposed ? turned : plain, b_transposed ? rows : columns, c.data(), n);
            REQUIRE(same_bytes(*want, c));
            how.add = true;
          }
        }
    CHECK_THROWS_WITH_AS(gemm({.b_transposed = true}, m + 1, plain, right, c.data(), n), doctest::Contains("do not multiply"), Error);
    CHECK_THROWS_WITH_AS(gemm({.b_transposed = true}, m + 1, plain, rows, c.data(), n), doctest::Contains("do not multiply"), Error);
  }
  CHECK_THROWS_AS(PackedWeights(narrowed(Tensor({2, 2}, 1.f), Precision::int8), true), Error);
}
TEST_CASE("gemm: OpenBLAS gives nearly the same, whatever the threads, and gets its own setting back") {
  if (!has_openblas()) {
    Floats x(4);
    CHECK_THROWS_AS(gemm({.backend = Backend::openblas}, 2, 2, 1, x.data(), 1, x.data(), 2, x.data(), 2), Error);
    return;
  }
  for (const auto& shape : {std::array<int64_t, 3>{1, 1, 1}, {33, 70, 129}, {5, 31, 520}, {700, 900, 30}, {3, 4, 0}})
    for (int flags = 0; flags < 8; flags++) {
      const int64_t m = shape[0], n = shape[1], k = shape[2];
      Gemm how{.a_transposed = (flags & 1) != 0, .b_transposed = (flags & 2) != 0, .add = (flags & 4) != 0};
      const int64_t lda = std::max<int64_t>(1, how.a_transposed ? m : k), ldb = std::max<int64_t>(1, how.b_transposed ? k : n);
      const Floats a = numbers(m * k, 1), b = numbers(n * k, 2), bias = numbers(n, 3), start = numbers(m * n, 4);
      how.epilogue = {bias.data(), Activation::gelu, nullptr};
      Floats own = start, blas = start, again = start;
      how.backend = Backend::own;
      gemm(how, m, n, k, a.data(), lda, b.data(), ldb, own.data(), n);
      how.backend = Backend::openblas;
      gemm(how, m, n, k, a.data(), lda, b.data(), ldb, blas.data(), n);
      UseThreads one(1);
      gemm(how, m, n, k, a.data(), lda, b.data(), ldb, again.data(), n);
      CAPTURE(flags);
      CAPTURE(k);
      CHECK(relative_difference(own, blas) < 2e-5);
      CHECK(same_bytes(blas, again));
    }
}
TEST_CASE("gemm: nothing to do, and what is refused") {
  Floats a(4, 1.f), c = {1, 2, 3, 4};
  const Floats bias = {10, 20};
  gemm({}, 0, 2, 2, a.data(), 2, a.data(), 2, c.data(), 2);
  gemm({}, 2, 0, 2, a.data(), 2, a.data(), 2, c.data(), 2);
  CHECK(c == Floats{1, 2, 3, 4});
  gemm({.add = true}, 2, 2, 0, a.data(), 0, a.data(), 2, c.data(), 2);
  CHECK(c == Floats{1, 2, 3, 4});
  gemm({.epilogue = {bias.data(), Activation::none, nullptr}}, 2, 2, 0, a.data(), 0, a.data(), 2, c.data(), 2);
  CHECK(c == Floats{10, 20, 10, 20});
  const PackedWeights nothing(a.data(), 2, 0);
  gemm(2, a.data(), 0, nothing, c.data(), 2, {});
  CHECK(c == Floats{0, 0, 0, 0});
  CHECK_THROWS_WITH_AS(gemm({}, 2, 2, 2, a.data(), 1, a.data(), 2, c.data(), 2), "gemm: m 2, n 2, k 2: rows overlap: lda 1, ldb 2, ldc 2",
                       Error);
  CHECK_THROWS_AS(gemm_here({}, -1, 2, 2, a.data(), 2, a.data(), 2, c.data(), 2), Error);
}
TEST_CASE("gemm: a NaN stays where it belongs") {
  Floats a = numbers(40 * 40, 1), b = numbers(40 * 40, 2), c(40 * 40);
  a[5 * 40 + 3] = nan_value;
  gemm({.backend = Backend::own}, 40, 40, 40, a.data(), 40, b.data(), 40, c.data(), 40);
  for (size_t i = 0; i < c.size(); i++) CHECK(std::isnan(c[i]) == (i / 40 == 5));
}

// ==== random numbers ==============================================================================================
TEST_CASE("philox: the known answers of Random123") {
  // kat_vectors: counter 4 words, key 2 words, result
  using Words = std::array<uint32_t, 4>;
  CHECK(philox({0, 0, 0, 0}, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox({~uint64_t(0), ~0u, ~0u, ~0u}, ~0u) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox({0x299f31d0a4093822, 0x243f6a88, 0x85a308d3, 0x13198a2e}, 0x03707344) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
  uint16_t d[8];
  kernels().draws({0, 0, 0, 0}, 0, 1, d);
  CHECK(d[0] == 0xe8d5);
  CHECK(d[1] == 0x6627);
  CHECK(d[7] == 0x9b00);
}
TEST_CASE("Random: uniform over its range, the same for the same key") {
  Random r({7, 0, 0, 1}), same({7, 0, 0, 1}), other({8, 0, 0, 1});
  for (int i = 0; i < 9; i++) {
    const uint32_t x = r.next();
    CHECK(x == same.next());
    CHECK(x != other.next());
  }
  for (int64_t n : {1, 2, 3, 7, 100}) {
    std::vector<int64_t> hits((size_t)n);
    for (int i = 0; i < 20000; i++) hits[(size_t)r.below(n)]++;  // out of range: the sanitizer says so
    const double mean = 20000. / (double)n;
    for (int64_t h : hits) CHECK(std::fabs((double)h - mean) < 5 * std::sqrt(mean) + 1);
  }
  const int64_t big = (int64_t)1 << 40;
  int64_t most = 0;
  for (int i = 0; i < 1000; i++) {
    const int64_t x = r.below(big + 1);
    CHECK((x >= 0 && x <= big));
    most = std::max(most, x);
  }
  CHECK(most > big / 10 * 9);
  CHECK_THROWS_AS(r.below(0), Error);

  double sum = 0, square = 0, normal = 0, normal2 = 0;
  for (int i = 0; i < 20000; i++) {
    const double u = r.uniform(), z = (double)r.truncated_normal();
    CHECK((u >= 0 && u < 1 && std::fabs(z) <= 2));
    sum += u, square += u * u, normal += z, normal2 += z * z;
  }
  CHECK(sum / 20000 == doctest::Approx(0.5).epsilon(0.02));
  CHECK(square / 20000 == doctest::Approx(1. / 3).epsilon(0.02));
  CHECK(std::fabs(normal / 20000) < 0.03);
  CHECK(std::sqrt(normal2 / 20000) == doctest::Approx(0.8796).epsilon(0.01));

  std::vector<int> v(20), w, sorted(20);
  std::iota(v.begin(), v.end(), 0);
  sorted = w = v;
  Random s1({1, 2, 3, 4}), s2({1, 2, 3, 4});
  s1.shuffle(v), s2.shuffle(w);
  CHECK(v == w);
  CHECK(v != sorted);
  std::sort(v.begin(), v.end());
  CHECK(v == sorted);
}

// ==== shapes, tensors, the pool ===================================================================================
TEST_CASE("Shape: sizes and what is refused") {
  CHECK(Shape{}.size() == 1);
  CHECK(Shape{3, 0, 2}.size() == 0);
  CHECK(to_string(Shape{8, 128, 768}) == "[8,128,768]");
  CHECK(to_string(Shape{}) == "[]");
  CHECK(Shape{2, 3} == Shape{2, 3});
  CHECK(Shape{2, 3} != Shape{2, 3, 1});
  CHECK_THROWS_AS((Shape{1, 2, 3, 4, 5}), Error);
  CHECK_THROWS_AS((Shape{2, -1}), Error);
  CHECK_THROWS_AS((Shape{(int64_t)1 << 40, (int64_t)1 << 40}), Error);
}
TEST_CASE("Tensor: handles, gradients, errors") {
  const Tensor empty;
  CHECK(!empty);
  CHECK_THROWS_AS(empty.data(), Error);
  CHECK_THROWS_AS(empty.shape(), Error);
  Tensor t({2, 3}, 1.5f), copy = t;
  CHECK(copy.same(t));
  copy.data()[5] = 2;
  CHECK(t.data()[5] == 2);
  CHECK((uintptr_t)t.data() % 64 == 0);
  CHECK(t.rows() == 2);
  CHECK(t.cols() == 3);
  CHECK_THROWS_AS(t.item(), Error);
  CHECK(Tensor({1}, 4.f).item() == 4);
  CHECK(Tensor({0, 5}).size() == 0);
  CHECK_THROWS_AS(Tensor({2}, Floats{1, 2, 3}), Error);
  CHECK_THROWS_WITH_AS(Tensor({(int64_t)1 << 58}), doctest::Contains("out of memory: a tensor [288230376151711744] needs"), Error);

  CHECK(!t.has_grad());
  bool add = true;
  t.grad_to_add(add).data()[0] = 3;
  CHECK(!add);
  CHECK(t.grad_to_add(add).data()[0] == 3);
  CHECK(add);
  const Tensor g = t.take_grad();
  CHECK(!t.has_grad());
  CHECK(g.data()[0] == 3);
  CHECK(t.grad()[0] == 0);  // a new one, of zeros
  t.drop_grad();
  CHECK(!t.has_grad());

  auto owner = std::make_shared<Floats>(Floats{1, 2, 3, 4});
  Tensor view = Tensor::borrowed({2, 2}, owner->data(), owner);
  CHECK(owner.use_count() == 2);
  CHECK(view.data() == owner->data());
  view.pack();
  CHECK(owner.use_count() == 1);
  CHECK(view.packed()->rows() == 2);
  CHECK_THROWS_AS(view.data(), Error);
  CHECK_THROWS_AS(Tensor(g).take_grad().data(), Error);
  CHECK_THROWS_AS(Tensor({2, 2, 2}, 0.f).pack(), Error);
}
TEST_CASE("pool: a steady state takes nothing from the system") {
  const UseThreads one(1);  // others take their scratch with their first task, which may be a later one
  auto step = [] {
    std::vector<Tensor> kept;
    for (int64_t n : {10, 1000, 100000, 3000000, 1000, 70000}) kept.emplace_back(Shape{n}, 1.f);
    kept.erase(kept.begin() + 2);
    kept.emplace_back(Shape{100000}, 2.f);
    Floats a(300 * 300, 1.f);
    gemm({.a_transposed = true}, 300, 300, 300, a.data(), 300, a.data(), 300, kept[2].data(), 300);
  };
  step();
  const PoolUse before = pool_use();
  for (int i = 0; i < 5; i++) step();
  CHECK(pool_use().held == before.held);
  CHECK(pool_use().in_use == before.in_use);
  CHECK(pool_use().peak == before.peak);
  CHECK(before.held >= before.in_use);
  const Tensor large({3000000});
  CHECK((uintptr_t)large.data() % (2 << 20) == 0);
  CHECK(pool_use().in_use >= before.in_use + 12000000);
  CHECK(pool_use().in_use <= before.in_use + 12000000 / 8 * 9);  // little is wasted
}
TEST_CASE("pool: shapes that never come back do not pile up") {
  const size_t most = std::max<size_t>(pool_use().peak, 64 << 20);
  for (size_t bytes = most / 8; bytes < most; bytes += bytes / 8) Tensor({(int64_t)(bytes / sizeof(float))});  // together some 7 * most
  CHECK(pool_use().held <= pool_use().peak / 4 * 5 + (64 << 20));
}
TEST_CASE("pool: from many threads") {
  UseThreads use(4);
  parallel_for(400, [](int64_t i) {
    Tensor t({1 + i % 50, 100}, (float)i);
    Tensor u({1 + i % 7, 1000}, (float)i);
    for (int64_t j = 0; j < t.size(); j++)
      if (t.data()[j] != (float)i) throw Error("another task's numbers");
  });
}

// ==== threads =====================================================================================================
TEST_CASE("parallel_for: every index once, nested runs on its own thread, errors arrive") {
  CHECK(available_threads() >= 1);
  for (int count : {1, 2, 4}) {
    UseThreads use(count);
    CHECK(threads() == count);
    std::vector<std::atomic<int>> hits(1000);
    parallel_for(1000, [&](int64_t i) {
      hits[(size_t)i]++;
      if (count > 1) {
        if (threads() != 1) throw Error("a task has threads of its own");
        int64_t sum = 0;  // no lock: one thread
        parallel_for(10, [&](int64_t j) { sum += j; });
        if (sum != 45) throw Error("nested");
      }
    });
    for (auto& h : hits) CHECK(h == 1);
    CHECK_THROWS_WITH_AS(parallel_for(100,
                                      [](int64_t i) {
                                        if (i == 57) throw Error("task 57");
                                      }),
                         "task 57", Error);
    CHECK(threads() == count);
    {
      UseThreads inner(3);
      CHECK(threads() == 3);
    }
    CHECK(threads() == count);
    int64_t covered = 0;
    UseThreads one(1);
    parallel_ranges(103, 10, [&](int64_t begin, int64_t end) { covered += end - begin; });
    CHECK(covered == 103);
    parallel_for(0, [](int64_t) { throw Error("never"); });
  }
  CHECK_THROWS_AS(UseThreads(-1), Error);
  CHECK(threads() == available_threads());
}
TEST_CASE("parallel_for: several threads call it at once, some of their tasks throw") {
  std::atomic<int64_t> sum{0}, thrown{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; caller++)
    callers.emplace_back([&, caller] {
      UseThreads use(1 + caller % 4);
      for (int round = 0; round < 200; round++) try {
          parallel_for(20, [&](int64_t i) {
            if (round % 50 == 49 && i == 19) throw Error("the last one");
            sum += i;
          });
        } catch (const Error&) { thrown++; }
    });
  for (std::thread& t : callers) t.join();
  CHECK(thrown == 6 * 4);
  CHECK(sum == 6 * (200 * 190 - 4 * 19));
}
#if defined(__x86_64__)
TEST_CASE("threads compute in the default floating-point mode, and the caller's comes back") {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
  volatile float tiny = 1e-40f;
  CHECK(tiny * 1.f == 0);
  for (int count : {1, 2}) {
    UseThreads use(count);
    std::atomic<int> wrong{0};
    parallel_for(8, [&](int64_t) { wrong += tiny * 1.f == 0; });
    CHECK(wrong == 0);
    float a = 1e-40f, b = 1, c = 0;
    gemm_here({}, 1, 1, 1, &a, 1, &b, 1, &c, 1);
    CHECK(std::bit_cast<uint32_t>(c) == std::bit_cast<uint32_t>(a));
  }
  CHECK((_mm_getcsr() & 0x8040) == 0x8040);
  _mm_setcsr(before);
}
#endif
