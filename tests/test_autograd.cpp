// The tape, every differentiable op against finite differences, the optimiser against formulas.
#include <chrono>
#include <cstring>

#include "testing.h"
using namespace bert;
using testing::grad_error;
using testing::random_tensor;

namespace {
// Shapes that catch indexing errors: one row, one column, odd sizes, leading dimensions, more rows than a block of 64.
const Shape kShapes[] = {{1, 4}, {3, 1}, {3, 5}, {2, 3, 17}, {70, 3}};
// float32 differences with h = 0.01 are good to some 1e-3 at these sizes; what was measured stands beside each check.
constexpr double kTolerance = 2e-3;

Dropout dropping(float p, uint64_t seed = 5) { return {p, p, p, {seed, 1, 2, 0}}; }

// y = x with a backward that forgets to do anything, and one that is off by a factor.
Tensor wrong_identity(const Tensor& x, float factor) {
  Tensor y(x.shape(), {x.data(), (size_t)x.size()});
  record("wrong_identity", y, {x}, [=] {
    for (int64_t i = 0; i < x.size(); i++) x.grad()[i] += factor * y.grad()[i];
  });
  return y;
}
}  // namespace

TEST_CASE("testing: the largest difference of numbers among which is a NaN is that NaN") {
  const float a[] = {1, NAN, 3}, b[] = {1, 2, 7};
  CHECK(std::isnan(testing::largest_difference(a, b, 3)));
  CHECK(testing::largest_difference(a + 2, b + 2, 1) == 4);
}

TEST_CASE("the gradient checker itself: a backward that does nothing, or is a tenth off, is caught") {
  Tensor x = random_tensor({3, 5}, 1);
  CHECK(grad_error({x}, [&] { return wrong_identity(x, 0); }) > 0.1);
  CHECK(grad_error({x}, [&] { return softmax(wrong_identity(x, 0)); }) > 0.01);
  CHECK(grad_error({x}, [&] { return wrong_identity(x, 1.1f); }) > 0.05);
  CHECK(grad_error({x}, [&] { return wrong_identity(x, 1); }) < kTolerance);
}

TEST_CASE("a profile counts each op once a forward, on all threads, and its backward; without one nothing is counted") {
  const Tensor x = random_tensor({40, 96}, 1);
  Tensor w = random_tensor({32, 32}, 2);
  auto forward = [&] {
    Dropout none;
    return softmax(add(linear(attention(x, {0, 33, 40}, 4, 64, none), w), linear(x, random_tensor({32, 96}, 3))));
  };
  auto counts = [](const Profile& p, double& seconds) {
    std::map<std::string, int64_t> n;
    for (const auto& [op, total] : p.ops()) n[op] = total.calls, seconds += total.seconds;
    return n;
  };
  auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  const UseThreads two(2);
  forward();
  for (int again = 0; again < 2; again++) {  // the second sees nothing of the first, nor the time between them
    const double began = now();
    double seconds = 0;
    const Profile profile;
    CHECK_THROWS_AS(Profile(), Error);
    forward();
    CHECK(counts(profile, seconds) == std::map<std::string, int64_t>{{"attention", 1}, {"linear", 2}, {"add", 1}, {"softmax", 1}});
    CHECK(seconds <= now() - began);
    parallel_for(9, [&](int64_t) { Profile::lap(), forward(); });
    CHECK(counts(profile, seconds) == std::map<std::string, int64_t>{{"attention", 10}, {"linear", 20}, {"add", 10}, {"softmax", 10}});
  }
  forward();
  w.set_needs_grad();
  double seconds = 0;
  const Profile profile;
  Tape tape;
  tape.backward(weighted_sum(forward(), random_tensor({40, 32}, 4)));
  const auto n = counts(profile, seconds);
  for (const char* op : {"linear backward", "add backward", "softmax backward", "weighted_sum backward", "attention"}) {
    CAPTURE(op);
    CHECK(n.count(op) == 1);
  }
  CHECK(n.at("linear backward") == 1);  // the other one's weights need no gradient
  CHECK(n.count("attention backward") == 0);
}

TEST_CASE("linear: gradients of x, w and b, for each activation") {
  for (const Activation act : {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::tanh})
    for (const Shape& s : kShapes)
      for (const int64_t out : {1, 6, 33}) {
        CAPTURE(to_string(s));
        CAPTURE(out);
        CAPTURE((int)act);
        Tensor x = random_tensor(s, 1), w = random_tensor({out, s.back()}, 2), b = random_tensor({out}, 3);
        CHECK(grad_error({x, w, b}, [&] { return linear(x, w, b, act); }) < 4e-3);  // h^2 y''' of a sum of 17 products
        CHECK(grad_error({x, w}, [&] { return linear(x, w, {}, act); }) < 4e-3);
      }
  Tensor x({2, 3}, 1.f), w({2, 3}, 0.5f);  // relu has a kink, which a random point does not hit
  CHECK(grad_error({x, w}, [&] { return linear(x, w, {}, Activation::relu); }) < kTolerance);
}

TEST_CASE("linear: packed weights give the same bytes as plain ones without a tape") {
  for (const int64_t rows : {1, 2, 7, 33, 130})
    for (const int64_t out : {1, 31, 64, 100}) {
      Tensor x = random_tensor({rows, 300}, 1), w = random_tensor({out, 300}, 2), b = random_tensor({out}, 3);
      const Tensor plain = linear(x, w, b, Activation::gelu);
      w.pack();
      const Tensor packed = linear(x, w, b, Activation::gelu);
      CHECK(std::memcmp(plain.data(), packed.data(), sizeof(float) * (size_t)plain.size()) == 0);
    }
}

TEST_CASE("linear: what does not fit is named with its shapes") {
  const Tensor x({2, 8}, 0.f);
  CHECK_THROWS_WITH_AS(linear(x, Tensor({3, 7}, 0.f), Tensor({3}, 0.f)), "linear: x [2,8] needs w [out,8] and b [out], got [3,7] and [3]",
                       Error);
  CHECK_THROWS_AS(linear(x, Tensor({3, 8}, 0.f), Tensor({4}, 0.f)), Error);
  CHECK_THROWS_AS(linear(x, Tensor()), Error);
}

TEST_CASE("attention: gradients, with rows of length 1, odd heads, and dropout") {
  struct Case {
    Offsets rows;
    int64_t heads, D;
  };
  for (const Case& c : {Case{{0, 1}, 1, 4}, Case{{0, 3, 4, 9}, 2, 3}, Case{{0, 7}, 3, 1}, Case{{0, 0, 5}, 1, 5}})
    for (const float p : {0.f, 0.3f}) {
      CAPTURE(c.heads);
      CAPTURE(c.D);
      CAPTURE(p);
      Tensor qkv = random_tensor({c.rows.back(), 3 * c.heads * c.D}, 4);
      CHECK(grad_error({qkv}, [&] {
              Dropout drop = dropping(p);
              return attention(qkv, c.rows, c.heads, 16, drop);
            }) < kTolerance);
    }
}

namespace {
// softmax(q k^T / sqrt(D)) v as it is written, in double, for one row.
std::vector<double> plain_attention(const Tensor& qkv, int64_t T, int64_t heads) {
  const int64_t H = qkv.cols() / 3, D = H / heads;
  std::vector<double> y((size_t)(T * H));
  for (int64_t a = 0; a < heads; a++)
    for (int64_t i = 0; i < T; i++) {
      std::vector<double> p((size_t)T);
      double sum = 0;
      for (int64_t j = 0; j < T; j++) {
        double s = 0;
        for (int64_t d = 0; d < D; d++) s += (double)qkv.data()[i * 3 * H + a * D + d] * (double)qkv.data()[j * 3 * H + H + a * D + d];
        sum += p[(size_t)j] = std::exp(s / std::sqrt((double)D));
      }
      for (int64_t j = 0; j < T; j++)
        for (int64_t d = 0; d < D; d++)
          y[(size_t)(i * H + a * D + d)] += p[(size_t)j] / sum * (double)qkv.data()[j * 3 * H + 2 * H + a * D + d];
    }
  return y;
}
}  // namespace

TEST_CASE("attention: agrees with the formula, over several blocks of keys, and rows do not see each other") {
  for (const int64_t T : {1, 5, 127, 128, 129, 300}) {
    CAPTURE(T);
    Tensor qkv = random_tensor({T, 3 * 2 * 8}, (uint64_t)T);
    for (int64_t i = 0; i < qkv.size(); i++) qkv.data()[i] *= 4;  // scores up to some 30: the softmax is not flat
    Dropout none;
    const Tensor y = attention(qkv, {0, T}, 2, 512, none);
    const std::vector<double> want = plain_attention(qkv, T, 2);
    double worst = 0;
    for (size_t i = 0; i < want.size(); i++) worst = std::max(worst, std::fabs(want[i] - (double)y.data()[i]));
    CHECK(worst < 2e-5);  // scores reach 30, where a float's rounding moves exp by 2e-6 of itself; measured 4.4e-6
    // the same row behind another one: the same bytes
    const Tensor other = random_tensor({3, 48}, 9);
    Tensor both({T + 3, 48}, 0.f);
    std::copy_n(other.data(), other.size(), both.data());
    std::copy_n(qkv.data(), qkv.size(), both.data() + other.size());
    const Tensor z = attention(both, {0, 3, T + 3}, 2, 512, none);
    CHECK(std::memcmp(z.data() + 3 * 16, y.data(), sizeof(float) * (size_t)y.size()) == 0);
  }
}

TEST_CASE("attention: backward over several blocks agrees with a row cut by hand") {
  // 300 tokens are three blocks of keys and of queries. The gradient along a random direction, by differences in double of the loss.
  const int64_t T = 300;
  Tensor qkv = random_tensor({T, 48}, 1);
  const Tensor w = random_tensor({T, 16}, 2), direction = random_tensor({T, 48}, 3);
  qkv.set_needs_grad();
  {
    Dropout none;
    Tape tape;
    tape.backward(weighted_sum(attention(qkv, {0, T}, 2, 512, none), w));
  }
  auto loss = [&](double step) {
    Tensor moved({T, 48});
    for (int64_t i = 0; i < qkv.size(); i++) moved.data()[i] = (float)((double)qkv.data()[i] + step * (double)direction.data()[i]);
    const std::vector<double> y = plain_attention(moved, T, 2);
    double s = 0;
    for (size_t i = 0; i < y.size(); i++) s += y[i] * (double)w.data()[i];
    return s;
  };
  double analytic = 0;
  for (int64_t i = 0; i < qkv.size(); i++) analytic += (double)qkv.grad()[i] * (double)direction.data()[i];
  CHECK(analytic == doctest::Approx((loss(1e-2) - loss(-1e-2)) / 2e-2).epsilon(1e-3));
}

TEST_CASE("attention: some tokens' queries alone give the bytes, and the gradients, that all give there") {
  // Rows of several tiles; one without a query, one with all its own; more queries of a row than a tile holds.
  const Offsets rows{0, 300, 305, 310, 460};
  std::vector<int64_t> queries;
  for (int64_t t = 0; t < 300; t += 2) queries.push_back(t);
  for (const int64_t t : {305, 306, 307, 308, 309, 459}) queries.push_back(t);
  for (const float p : {0.f, 0.3f}) {
    CAPTURE(p);
    const Tensor w = random_tensor({(int64_t)queries.size(), 16}, 2);
    std::vector<Tensor> answers, gradients;
    for (const bool some : {true, false}) {
      Tensor qkv = random_tensor({460, 48}, 1);
      qkv.set_needs_grad();
      Dropout drop = dropping(p);
      Tape tape;
      answers.push_back(some ? attention(qkv, rows, 2, 512, drop, queries) : gather_rows(attention(qkv, rows, 2, 512, drop), queries));
      tape.backward(weighted_sum(answers.back(), w));
      gradients.push_back(qkv.take_grad());
    }
    CHECK(std::memcmp(answers[0].data(), answers[1].data(), sizeof(float) * (size_t)w.size()) == 0);
    CHECK(testing::largest_difference(gradients[0].data(), gradients[1].data(), gradients[0].size()) < 1e-5);
  }
  Tensor qkv = random_tensor({9, 18}, 4);
  auto twice = [&] {  // the second adds to the first's gradient
    Dropout drop = dropping(0.3f);
    const Tensor some = attention(qkv, {0, 3, 4, 9}, 2, 16, drop, {1, 4, 8});
    return add(some, attention(qkv, {0, 3, 4, 9}, 2, 16, drop, {0, 2, 5}));
  };
  CHECK(grad_error({qkv}, twice) < kTolerance);
}

TEST_CASE("attention: bad arguments are named") {
  Dropout none;
  for (const std::vector<int64_t>& queries : {std::vector<int64_t>{1, 1}, {2, 1}, {-1}, {4}})
    CHECK_THROWS_WITH_AS(attention(Tensor({4, 12}, 0.f), {0, 4}, 2, 16, none, queries),
                         "attention: queries must ascend, each one of 4 and there once", Error);
  CHECK_THROWS_AS(attention(Tensor({4, 12}, 0.f), {0, 3}, 2, 16, none), Error);  // offsets end early
  CHECK_THROWS_AS(attention(Tensor({4, 12}, 0.f), {0, 3, 2, 4}, 2, 16, none), Error);
  CHECK_THROWS_AS(attention(Tensor({4, 12}, 0.f), {}, 2, 16, none), Error);
  CHECK_THROWS_AS(attention(Tensor({4, 12}, 0.f), {0, 4}, 3, 16, none), Error);  // 4 does not cut into 3 heads
  Dropout drop = dropping(0.5f);
  CHECK_THROWS_AS(attention(Tensor({4, 12}, 0.f), {0, 4}, 2, 3, drop), Error);  // a row longer than the positions
}

TEST_CASE("residual_norm: gradients of x, f, gamma and beta, without f, and with dropout") {
  for (const Shape& s : kShapes) {
    if (s.back() == 1) continue;  // a norm over one element is constant: eps alone keeps it finite
    CAPTURE(to_string(s));
    Tensor x = random_tensor(s, 1), f = random_tensor(s, 2), gamma = random_tensor({s.back()}, 3), beta = random_tensor({s.back()}, 4);
    Dropout none;
    CHECK(grad_error({x, f, gamma, beta}, [&] { return residual_norm(x, f, gamma, beta, 1e-2f, none); }) < 4e-3);
    CHECK(grad_error({x, gamma, beta}, [&] { return residual_norm(x, {}, gamma, beta, 1e-2f, none); }) < 4e-3);
    CHECK(grad_error({x, f, gamma, beta}, [&] {
            Dropout drop = dropping(0.4f);
            return residual_norm(x, f, gamma, beta, 1e-2f, drop);
          }) < 4e-3);
    CHECK(grad_error({x, gamma}, [&] { return residual_norm(x, x, gamma, beta, 1e-2f, none); }) < 4e-3);  // used twice
  }
  Dropout none;
  CHECK_THROWS_WITH_AS(residual_norm(Tensor({2, 8}, 0.f), {}, Tensor({7}, 0.f), Tensor({8}, 0.f), 1e-5f, none),
                       "residual_norm: x [2,8] needs gamma and beta [8], got [7] and [8]", Error);
}

TEST_CASE("embedding_norm: gradients of the tables, tokens that repeat, and dropout") {
  const std::vector<int32_t> ids = {3, 0, 3, 3, 4, 1}, segments = {0, 0, 1, 1, 0, 1}, positions = {0, 1, 2, 0, 1, 2};
  Tensor word = random_tensor({5, 7}, 1), segment = random_tensor({2, 7}, 2), position = random_tensor({4, 7}, 3),
         gamma = random_tensor({7}, 4), beta = random_tensor({7}, 5);
  for (const float p : {0.f, 0.3f})
    CHECK(grad_error({word, segment, position, gamma, beta}, [&] {
            Dropout drop = dropping(p);
            return embedding_norm(word, segment, position, ids, segments, positions, gamma, beta, 1e-2f, drop);
          }) < 4e-3);
  Dropout none;
  CHECK_THROWS_WITH_AS(embedding_norm(word, segment, position, {5}, {0}, {0}, gamma, beta, 1e-2f, none),
                       "embedding_norm: id 5 is not in the table [5,7]", Error);
  CHECK_THROWS_AS(embedding_norm(word, segment, position, {1}, {2}, {0}, gamma, beta, 1e-2f, none), Error);
  CHECK_THROWS_AS(embedding_norm(word, segment, position, {1}, {0}, {-1}, gamma, beta, 1e-2f, none), Error);
}

TEST_CASE("rows, softmax, add: gradients") {
  Tensor x = random_tensor({6, 5}, 1), y = random_tensor({6, 5}, 2);
  CHECK(grad_error({x}, [&] { return gather_rows(x, {5, 0, 0, 3}); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return place_rows(x, {0, 1, 3, 4, 7, 8}, 9); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return mean_rows(x, {0, 1, 1, 4, 6}); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return normalize_rows(x); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return softmax(x); }) < kTolerance);
  CHECK(grad_error({x, y}, [&] { return add(x, y); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return add(x, x); }) < kTolerance);  // used twice
  Tensor one = random_tensor({4, 1}, 3);
  CHECK(grad_error({one}, [&] { return add(softmax(one), one); }) < kTolerance);  // rows of length 1
  CHECK_THROWS_AS(add(x, one), Error);
  CHECK_THROWS_AS(gather_rows(x, {6}), Error);
  CHECK_THROWS_AS(place_rows(x, {0, 1, 2, 3, 4}, 9), Error);
  CHECK_THROWS_AS(place_rows(x, {0, 1, 2, 3, 4, 9}, 9), Error);
  CHECK_THROWS_AS(mean_rows(x, {0, 5}), Error);
  CHECK_THROWS_AS(mean_rows(x, {0, 9, 6}), Error);  // the end is right, the way there is not
  CHECK_THROWS_AS(mean_rows(x, {}), Error);
  const Tensor mean = mean_rows(x, {0, 1, 1, 4, 6});
  CHECK(mean.data()[5] == 0);  // a row without tokens
  CHECK(mean.data()[10] == doctest::Approx((x.data()[5] + x.data()[10] + x.data()[15]) / 3));
  CHECK(grad_error({x}, [&] { return scale(x, -2.5f); }) < kTolerance);
  CHECK(grad_error({x, y}, [&] { return row_dots(x, y); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return row_dots(x, x); }) < kTolerance);
  CHECK(grad_error({one}, [&] { return row_dots(one, one); }) < kTolerance);
  CHECK(row_dots(x, y).shape() == Shape{6, 1});
  CHECK_THROWS_AS(row_dots(x, one), Error);
}

TEST_CASE("losses: values by hand, gradients, ignored labels, divisors") {
  Tensor x = random_tensor({5, 4}, 1);
  const std::vector<int32_t> labels = {3, kIgnored, 0, 1, 0};
  CHECK(grad_error({x}, [&] { return cross_entropy(x, labels); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return cross_entropy(x, labels, 17); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return add(cross_entropy(x, labels), cross_entropy(x, labels, 3)); }) < kTolerance);  // the second adds
  double want = 0;
  for (int r = 0; r < 5; r++) {
    if (labels[(size_t)r] == kIgnored) continue;
    double sum = 0;
    for (int c = 0; c < 4; c++) sum += std::exp((double)x.data()[r * 4 + c]);
    want += std::log(sum) - (double)x.data()[r * 4 + labels[(size_t)r]];
  }
  CHECK(cross_entropy(x, labels).item() == doctest::Approx(want / 4).epsilon(1e-6));
  CHECK(cross_entropy(x, labels, 17).item() == doctest::Approx(want / 17).epsilon(1e-6));
  int64_t right = 0;
  cross_entropy(Tensor({2, 2}, std::vector<float>{1, 2, 2, 1}), {1, 1}, 0, &right);
  CHECK(right == 1);
  CHECK_THROWS_WITH_AS(cross_entropy(x, {0, 0, 4, 0, 0}), "cross_entropy: label 4 is not among the 4 classes", Error);
  CHECK_THROWS_AS(cross_entropy(x, {0}), Error);

  Tensor far({1, 3}, std::vector<float>{200, -200, 0}), t({1, 3}, std::vector<float>{1, 1, 0.5f});
  CHECK(bce_with_logits(far, t, 1).item() == doctest::Approx(200 + std::log(2.0)));  // nothing overflows
  Tensor target = random_tensor({5, 4}, 2);
  CHECK(grad_error({x}, [&] { return bce_with_logits(x, target); }) < kTolerance);
  CHECK(grad_error({x}, [&] { return mse_loss(x, target, 3); }) < kTolerance);
  CHECK(mse_loss(Tensor({2}, std::vector<float>{1, 3}), Tensor({2}, std::vector<float>{0, 0})).item() == 5);
}

TEST_CASE("cross entropy by class: weights and smoothing by hand, and their gradients") {
  Tensor x = random_tensor({5, 4}, 1);
  const std::vector<int32_t> labels = {3, kIgnored, 0, 1, 0};
  const ClassRule rule = {{0.5f, 2, 1, 3}, 0.1f};
  double want = 0, weights = 0;
  for (int r = 0; r < 5; r++) {
    const int32_t label = labels[(size_t)r];
    if (label == kIgnored) continue;
    double sum = 0;
    for (int c = 0; c < 4; c++) sum += std::exp((double)x.data()[r * 4 + c]);
    auto minus_log = [&](int c) { return std::log(sum) - (double)x.data()[r * 4 + c]; };
    want += 0.9 * (double)rule.weight(label) * minus_log(label), weights += (double)rule.weight(label);
    for (int c = 0; c < 4; c++) want += 0.1 / 4 * (double)rule.weight(c) * minus_log(c);
  }
  CHECK(cross_entropy(x, labels, 0, nullptr, rule).item() == doctest::Approx(want / weights).epsilon(1e-6));
  for (const ClassRule& r : {rule, ClassRule{{}, 0.2f}, ClassRule{{1, 2, 3, 4}, 0}})
    CHECK(grad_error({x}, [&] { return cross_entropy(x, labels, 3, nullptr, r); }) < kTolerance);
  CHECK_THROWS_AS(cross_entropy(x, labels, 0, nullptr, ClassRule{{1, 2}, 0}), Error);
}

TEST_CASE("position cross entropy: values by hand, gradients, rows of length 1, none asked") {
  Tensor x = random_tensor({6, 2}, 1), one = random_tensor({6, 1}, 2);
  const Offsets offsets = {0, 1, 4, 6};
  const std::vector<int32_t> labels = {0, 0, 2, 1, kIgnored, kIgnored};
  double want = 0;
  for (int c = 0; c < 2; c++) {
    double sum = 0;
    for (int t = 1; t < 4; t++) sum += std::exp((double)x.data()[2 * t + c]);
    want += std::log(sum) - (double)x.data()[2 * (1 + labels[(size_t)(2 + c)]) + c];
  }
  CHECK(position_cross_entropy(x, offsets, labels).item() == doctest::Approx(want / 4).epsilon(1e-6));  // two rows, two columns
  CHECK(grad_error({x}, [&] { return position_cross_entropy(x, offsets, labels); }) < kTolerance);
  CHECK(grad_error({one}, [&] { return position_cross_entropy(one, offsets, {0, 1, 0}, 7); }) < kTolerance);
  int64_t right = 0;
  position_cross_entropy(Tensor({3, 2}, std::vector<float>{0, 5, 1, 0, 0, 0}), {0, 3}, {1, 0}, 0, &right);
  position_cross_entropy(Tensor({3, 2}, std::vector<float>{0, 5, 1, 0, 0, 0}), {0, 3}, {1, 1}, 0, &right);
  CHECK(right == 1);
  CHECK_THROWS_AS(position_cross_entropy(x, offsets, {0, 0, 3, 0, 0, 0}), Error);  // beyond its row
  CHECK_THROWS_AS(position_cross_entropy(x, offsets, {0, 0}), Error);
  CHECK_THROWS_AS(position_cross_entropy(x, {0, 5}, {0, 0}), Error);
}

TEST_CASE("losses of pairs: values by hand and gradients") {
  const Tensor t({3, 1}, std::vector<float>{1, 0, 0});
  Tensor x({3, 1}, std::vector<float>{0.2f, 0.9f, 0.1f});
  // 0.8^2/2; (0.5 - 0.1)^2/2; far enough apart
  CHECK(contrastive_loss(x, t, 0.5f).item() == doctest::Approx((0.64 / 2 + 0.16 / 2) / 3).epsilon(1e-6));
  CHECK(grad_error({x}, [&] { return contrastive_loss(x, t, 0.5f); }) < kTolerance);
  Tensor a = random_tensor({4, 7}, 1), p = random_tensor({4, 7}, 2), n = random_tensor({4, 7}, 3);
  CHECK(grad_error({a, p, n}, [&] { return triplet_loss(a, p, n, 5); }) < kTolerance);
  CHECK(triplet_loss(a, a, n, 0).item() == 0);  // nearer by more than the margin: nothing to learn
  CHECK(triplet_loss(Tensor({1, 2}, std::vector<float>{0, 0}), Tensor({1, 2}, std::vector<float>{3, 4}),
                     Tensor({1, 2}, std::vector<float>{0, 1}), 2)
            .item() == doctest::Approx(6));
  CHECK_THROWS_AS(triplet_loss(a, p, x, 1), Error);
}

TEST_CASE("dropout: the share that stays, its scale, the same draws in backward, no draw twice") {
  Tensor x({1000, 37}, 1.f);
  Dropout drop = dropping(0.25f);
  const Tensor y = dropout(x, drop), z = dropout(x, drop);
  int64_t kept = 0, both = 0;
  for (int64_t i = 0; i < y.size(); i++) {
    CHECK_UNARY(y.data()[i] == 0 || y.data()[i] == doctest::Approx(1 / 0.75));
    kept += y.data()[i] != 0, both += y.data()[i] != 0 && z.data()[i] != 0;
  }
  CHECK((double)kept / (double)y.size() == doctest::Approx(0.75).epsilon(0.01));
  CHECK((double)both / (double)y.size() == doctest::Approx(0.75 * 0.75).epsilon(0.02));  // the second op draws anew
  CHECK(drop.key.op == 2);
  Dropout zero = dropping(0);
  CHECK(dropout(x, zero).same(x));
  Tensor small = random_tensor({9, 5}, 3);
  CHECK(grad_error({small}, [&] {
          Dropout d = dropping(0.5f);
          return dropout(small, d);
        }) < kTolerance);
  Dropout bad = dropping(1.f);
  CHECK_THROWS_AS(dropout(x, bad), Error);
}

TEST_CASE("tape: what the loss does not use is passed over, and gets no gradient") {
  Tensor x = testing::random_tensor({6, 5}, 1), w = testing::random_tensor({6, 5}, 2);
  x.set_needs_grad();
  Tape tape;
  const Tensor unused = mean_rows(softmax(x), {0, 2, 6});
  tape.backward(weighted_sum(x, w));
  CHECK(!unused.has_grad());
  CHECK(std::equal(w.data(), w.data() + w.size(), x.grad()));
}

TEST_CASE("tape: one a thread, one backward, freed as it goes, nothing kept without one") {
  Tensor x = random_tensor({4, 4}, 1);
  x.set_needs_grad();
  const Tensor without = softmax(x);
  CHECK(!without.needs_grad());
  Tape tape;
  CHECK_THROWS_AS(Tape(), Error);
  const Tensor loss = weighted_sum(softmax(x), random_tensor({4, 4}, 2));
  CHECK(tape.size() == 2);
  CHECK_THROWS_AS(tape.backward(softmax(x)), Error);  // more than one element
  tape.backward(loss);
  CHECK(tape.size() == 0);
  CHECK_THROWS_AS(tape.backward(loss), Error);
}

// Small whole numbers are bf16 already and their sums exact: there both tapes must say the same.
TEST_CASE("a tape of bf16: the same bytes where nothing is rounded, a bf16's accuracy elsewhere, nothing rounded without a tape") {
  auto run = [](Precision precision, bool whole, Activation act, int count) {
    UseThreads use(count);
    Tensor x = random_tensor({150, 33}, 1), w = random_tensor({70, 33}, 2), b = random_tensor({70}, 3), share = random_tensor({150, 70}, 4);
    for (const Tensor& t : {x, w, b, share})
      for (int64_t i = 0; whole && i < t.size(); i++) t.data()[i] = std::round(3 * t.data()[i]);
    for (Tensor t : {x, w, b}) t.set_needs_grad();
    Tape tape(precision);
    const Tensor y = linear(x, w, b, act);
    std::vector<float> all(y.data(), y.data() + y.size());
    tape.backward(weighted_sum(y, share));
    for (const Tensor& t : {x, w, b}) all.insert(all.end(), t.grad(), t.grad() + t.size());
    return all;
  };
  CHECK(run(Precision::bf16, true, Activation::relu, 1) == run(Precision::f32, true, Activation::relu, 1));
  const auto rounded = run(Precision::bf16, false, Activation::gelu, 1), plain = run(Precision::f32, false, Activation::gelu, 2);
  CHECK(rounded == run(Precision::bf16, false, Activation::gelu, 3));
  double error = 0, size = 0;
  for (size_t i = 0; i < plain.size(); i++)
    error += std::pow((double)plain[i] - (double)rounded[i], 2), size += std::pow((double)plain[i], 2);
  CHECK(std::sqrt(error / size) < 4e-3);
  CHECK(std::sqrt(error / size) > 1e-4);  // it was rounded
  CHECK_THROWS_AS(Tape{Precision::int8}, Error);
}

TEST_CASE("what is recomputed: the same bytes, through frozen and trained parts, with dropout, keeping its input alone") {
  auto run = [](bool again, bool x_trained) {
    Tensor x = random_tensor({40, 24}, 1), w = random_tensor({24, 24}, 2), gamma = random_tensor({24}, 3), beta = random_tensor({24}, 4);
    std::vector<Tensor> trained = {w, gamma, beta};
    if (x_trained) trained.push_back(x);
    for (Tensor& t : trained) t.set_needs_grad();
    const Recomputable f = [=](const Tensor& in, Dropout& d) {
      return residual_norm(in, linear(in, w, {}, Activation::gelu), gamma, beta, 1e-12f, d);
    };
    Dropout drop = dropping(0.3f);
    Tape tape;
    Tensor y = x;
    for (int l = 0; l < 3; l++) y = again ? recomputed(y, w, f, drop) : f(y, drop);
    const size_t kept = tape.size();
    tape.backward(weighted_sum(y, random_tensor({40, 24}, 5)));
    std::vector<float> all(y.data(), y.data() + y.size());
    for (const Tensor& t : trained) all.insert(all.end(), t.grad(), t.grad() + t.size());
    return std::pair(all, kept);
  };
  for (const bool x_trained : {false, true}) {
    const auto plain = run(false, x_trained), again = run(true, x_trained);
    CHECK(plain.first == again.first);
    CHECK(plain.second == 6);
    CHECK(again.second == 3);
  }
}

TEST_CASE("the loss of a vocabulary: the bytes of cross_entropy over linear, in parts, at any number of threads") {
  for (const int64_t M : {1, 70, 1100}) {
    auto run = [&](bool parts, int count) {
      UseThreads use(count);
      Tensor x = random_tensor({M, 24}, 1), w = random_tensor({300, 24}, 2), b = random_tensor({300}, 3);
      std::vector<int32_t> labels;
      for (int64_t r = 0; r < M; r++) labels.push_back((int32_t)(r * 7 % 300));
      for (Tensor t : {x, w, b}) t.set_needs_grad();
      int64_t right = 0;
      Tape tape;
      const Tensor loss = parts ? linear_cross_entropy(x, w, b, labels, 0, &right) : cross_entropy(linear(x, w, b), labels, 0, &right);
      tape.backward(loss);
      std::vector<float> all = {loss.item(), (float)right};
      for (const Tensor& t : {x, w, b}) all.insert(all.end(), t.grad(), t.grad() + t.size());
      return all;
    };
    const std::vector<float> parts = run(true, 1), whole = run(false, 1);
    if (M > 512 &&
        backend_description().ends_with(" for products"))  // several parts: OpenBLAS's bytes for a row depend on how many there are
      CHECK(testing::largest_difference(parts.data(), whole.data(), (int64_t)whole.size()) < 1e-5);
    else
      CHECK(parts == whole);
    CHECK(parts == run(true, 3));
  }
  Tensor x = random_tensor({5, 3}, 1), w = random_tensor({4, 3}, 2), b = random_tensor({4}, 3);
  const std::vector<int32_t> labels = {3, 2, 0, 1, 0};
  CHECK(grad_error({x, w, b}, [&] { return scale(linear_cross_entropy(x, w, b, labels, 3), 2); }) < kTolerance);
  CHECK(grad_error({x, w, b}, [&] { return add(linear_cross_entropy(x, w, b, labels), linear_cross_entropy(x, w, b, labels)); }) <
        kTolerance);
  CHECK(linear_cross_entropy(x, w, b, labels).item() == cross_entropy(linear(x, w, b), labels).item());  // without a tape
  CHECK(linear_cross_entropy(Tensor({0, 3}), w, b, {}).item() == 0);
  CHECK_THROWS_AS(linear_cross_entropy(x, w, b, {3, 2, 0, 1}), Error);
  CHECK_THROWS_WITH_AS(linear_cross_entropy(x, w, b, {3, 2, 0, 4, 0}), doctest::Contains("label 4"), Error);
}

TEST_CASE("results do not depend on the number of threads: forward and every gradient, byte for byte") {
  auto run = [](int n) {
    UseThreads use(n);
    const int64_t N = 150, H = 24;
    Tensor x = random_tensor({N, H}, 1), w = random_tensor({3 * H, H}, 2), b = random_tensor({3 * H}, 3), gamma = random_tensor({H}, 4),
           beta = random_tensor({H}, 5);
    std::vector<Tensor> all = {x, w, b, gamma, beta};
    for (Tensor& t : all) t.set_needs_grad();
    Dropout drop = dropping(0.1f);
    Tape tape;
    const Tensor mix = attention(linear(x, w, b, Activation::gelu), {0, 1, 70, 150}, 4, 128, drop);
    const Tensor y = residual_norm(x, mix, gamma, beta, 1e-12f, drop);
    tape.backward(cross_entropy(y, std::vector<int32_t>((size_t)N, 3)));
    std::string bytes((const char*)y.data(), (size_t)y.size() * 4);
    for (const Tensor& t : all) bytes.append((const char*)t.grad(), (size_t)t.size() * 4);
    return bytes;
  };
  const std::string one = run(1);
  CHECK(one == run(2));
  CHECK(one == run(5));
}

TEST_CASE("schedule: facts' rule, at every step") {
  CHECK(schedule_factor(Schedule::linear, 0, 4, 10) == 0.25);  // no wasted first step
  CHECK(schedule_factor(Schedule::linear, 3, 4, 10) == 1);
  CHECK(schedule_factor(Schedule::linear, 4, 4, 10) == 1);
  CHECK(schedule_factor(Schedule::linear, 7, 4, 10) == 0.5);
  CHECK(schedule_factor(Schedule::linear, 9, 4, 10) == doctest::Approx(1 / 6.0));
  CHECK(schedule_factor(Schedule::linear, 10, 4, 10) == 0);
  CHECK(schedule_factor(Schedule::cosine, 7, 4, 10) == doctest::Approx(0.5));
  CHECK(schedule_factor(Schedule::constant, 9, 4, 10) == 1);
  CHECK(schedule_factor(Schedule::linear, 0, 0, 1) == 1);
}

TEST_CASE("AdamW: two updates by hand, decay only where asked, Google's without bias correction") {
  for (const bool google : {false, true}) {
    AdamWSettings s;
    s.google = google;
    if (google) s.eps = 1e-6f;
    Tensor p({3}, std::vector<float>{1, -2, 0.5f}), q({3}, std::vector<float>{1, -2, 0.5f});
    p.set_needs_grad(), q.set_needs_grad();
    AdamW adam(s, {{p, {}, {}, true}, {q, {}, {}, false}});
    double m[3] = {}, v[3] = {}, want[2][3] = {{1, -2, 0.5}, {1, -2, 0.5}};
    for (int t = 1; t <= 2; t++) {
      const double g[3] = {0.1 * t, -3, 1e-4}, lr = 0.01, clip = 0.5;
      for (Tensor* x : {&p, &q})
        for (int i = 0; i < 3; i++) x->drop_grad(), x->grad()[i] = 0;
      for (Tensor* x : {&p, &q})
        for (int i = 0; i < 3; i++) x->grad()[i] = (float)g[i];
      adam.step(lr, clip);
      for (int i = 0; i < 3; i++) {
        m[i] = 0.9 * m[i] + 0.1 * g[i] * clip, v[i] = 0.999 * v[i] + 0.001 * g[i] * clip * g[i] * clip;
        for (int k = 0; k < 2; k++) {
          const double decay = k == 0 ? 0.01 : 0;
          if (google)
            want[k][i] -= lr * (m[i] / (std::sqrt(v[i]) + 1e-6) + decay * want[k][i]);
          else {
            want[k][i] -= lr * decay * want[k][i];
            want[k][i] -= lr * (m[i] / (1 - std::pow(0.9, t))) / (std::sqrt(v[i] / (1 - std::pow(0.999, t))) + 1e-8);
          }
        }
      }
      for (int i = 0; i < 3; i++) {
        CAPTURE(google);
        CAPTURE(t);
        CAPTURE(i);
        CHECK(p.data()[i] == doctest::Approx(want[0][i]).epsilon(2e-6));
        CHECK(q.data()[i] == doctest::Approx(want[1][i]).epsilon(2e-6));
      }
    }
  }
}

TEST_CASE("global norm and clipping") {
  Tensor a({3}, 0.f), b({40000}, 0.f), none({5}, 0.f);
  for (int i = 0; i < 3; i++) a.grad()[i] = 2;
  for (int i = 0; i < 40000; i++) b.grad()[i] = 0.01f;
  CHECK(gradient_norm(std::vector<Tensor>{a, b, none}) == doctest::Approx(4));  // sqrt(12 + 4)
  CHECK(clip_factor(4, 1, false) == doctest::Approx(1 / (4 + 1e-6)).epsilon(1e-12));
  CHECK(clip_factor(4, 1, true) == 0.25);
  CHECK(clip_factor(0.5, 1, false) == 1);
  CHECK(clip_factor(0.5, 1, true) == 1);
  b.grad()[39999] = NAN;
  CHECK(!std::isfinite(gradient_norm(std::vector<Tensor>{a, b})));
}
