// What the test files share: random tensors, the gradient checker, golden files, temporary folders, running ./bert.
#pragma once
#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "bert.h"

namespace testing {

// The folder of large goldens and real models beside the repository; tests that need it skip, saying so, where it is absent.
inline const std::string shared = "../shared/";
inline int skipped = 0;  // counted by SKIP_WITHOUT, printed by the test program's last line
#define SKIP_WITHOUT(path)                            \
  if (!std::filesystem::exists(path)) {               \
    testing::skipped++;                               \
    MESSAGE("skipped: " << (path) << " is not here"); \
    return;                                           \
  }

// Uniform in [-1, 1), from Philox.
inline bert::Tensor random_tensor(bert::Shape shape, uint64_t seed) {
  bert::Tensor t(shape);
  bert::Random random({seed, 0, 0, 0});
  for (int64_t i = 0; i < t.size(); i++) t.data()[i] = (float)(2 * random.uniform() - 1);
  return t;
}

inline double largest_difference(const float* a, const float* b, int64_t n) {
  double worst = 0;
  for (int64_t i = 0; i < n; i++) {
    const double d = std::fabs((double)a[i] - (double)b[i]);
    if (!(d <= worst) && !std::isnan(worst)) worst = d;  // a NaN stays
  }
  return worst;
}

// Largest |analytic - numeric| / max(1, |numeric|) over every element of every input, the output weighted by random numbers (under a
// plain sum the gradient of a softmax or a norm is 0, and a backward that does nothing would pass).
inline double grad_error(std::vector<bert::Tensor> in, const std::function<bert::Tensor()>& f) {
  for (bert::Tensor& t : in) t.set_needs_grad(), t.drop_grad();
  const bert::Tensor w = random_tensor(f().shape(), 7);
  {
    bert::Tape tape;
    tape.backward(bert::weighted_sum(f(), w));
  }
  const float h = 1e-2f;  // float32: truncation ~ h^2 and rounding ~ 1e-7 / h are both small
  double worst = 0;
  for (bert::Tensor& t : in)
    for (int64_t i = 0; i < t.size(); i++) {
      const float keep = t.data()[i];
      auto at = [&](float x) {
        t.data()[i] = x;
        const bert::Tensor y = f();
        double s = 0;  // in double: the sum's rounding would be divided by h
        for (int64_t j = 0; j < y.size(); j++) s += (double)y.data()[j] * (double)w.data()[j];
        return s;
      };
      const double up = at(keep + h), down = at(keep - h);
      t.data()[i] = keep;
      const double numeric = (up - down) / (double)((keep + h) - (keep - h));
      const double error = std::fabs((double)t.grad()[i] - numeric) / std::max(1.0, std::fabs(numeric));
      if (!(error <= worst) && !std::isnan(worst)) worst = error;
    }
  return worst;
}

// A folder of its own, removed at the end.
struct TemporaryFolder {
  std::string path;
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "bert-test-XXXXXX").string();
    if (!mkdtemp(name.data())) throw bert::Error("cannot make " + name);
    path = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
  std::string operator/(const std::string& file) const { return path + "/" + file; }
};

// The folder in which this program, and what it runs, keep which kernel is the fastest on a device.
inline std::string device_cache() {
  static const TemporaryFolder folder;
  return folder.path;
}

// The bert of this program's build folder, as a path from here.
inline const std::string& program() {
  static const std::string path = std::filesystem::relative(std::filesystem::read_symlink("/proc/self/exe").parent_path() / "bert");
  return path;
}

// Runs a shell command; its exit status, and what it wrote on either stream. ./bert is program(): a sanitizer's tests run a sanitizer's
// bert.
struct Ran {
  int status;
  std::string out, err;
};
inline Ran run(std::string command) {
  for (size_t at = 0; (at = command.find("./bert ", at)) != command.npos; at += program().size()) command.replace(at, 6, program());
  TemporaryFolder folder;
  const int code = std::system(("( " + command + " ) > " + (folder / "out") + " 2> " + (folder / "err")).c_str());
  return {WIFEXITED(code) ? WEXITSTATUS(code) : 128 + WTERMSIG(code), bert::read_file(folder / "out"), bert::read_file(folder / "err")};
}

}  // namespace testing
