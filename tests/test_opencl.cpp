// Products on a device of OpenCL's: the CPU's bytes, what lies where, and drivers that fail (tests/opencl/stub.cpp).
#include <cstring>
#include <fstream>
#include <thread>

#include "testing.h"

using namespace bert;
using testing::Ran;
using testing::random_tensor;
using testing::TemporaryFolder;

namespace {

// Products of this many multiply-adds and more are a device's while it lives.
struct OnDevice {
  bool here = true;
  explicit OnDevice(int64_t least = 0, bool half = false) {
    try {
      use_device("opencl", {.half = half, .cache = testing::device_cache(), .least = least});
    } catch (const Error& e) {
      here = false, testing::skipped++;
      MESSAGE("skipped: " << std::string(e.what()));
    }
  }
  ~OnDevice() { use_device("cpu"); }
};

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), sizeof(float) * (size_t)a.size());
}
// ./bert with the stub in the place of OpenCL.
struct Stub {
  TemporaryFolder folder;
  explicit Stub(const std::string& flags) {
    const Ran made =
        testing::run("${CXX:-g++} -std=c++20 -O1 -shared -fPIC " + flags + " -o " + (folder / "libOpenCL.so.1") + " tests/opencl/stub.cpp");
    REQUIRE_MESSAGE(made.status == 0, made.err);
  }
  Ran bert(const std::string& arguments) const {
    return testing::run("XDG_CACHE_HOME=" + testing::device_cache() + " LD_LIBRARY_PATH=" + folder.path + " ./bert " + arguments);
  }
};
const std::string kModel = "tests/golden/models/tiny-pretrain";

}  // namespace

TEST_CASE("opencl: every form, tail and activation gives the CPU's bytes; what stays there comes home, what is written counts") {
  const OnDevice device;
  if (!device.here) return;
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{1, 1, 1}, {3, 5, 7}, {65, 129, 257}, {1, 300, 513}, {200, 33, 1000}, {300, 2, 31}})
    for (int form = 0; form < 40; form++) {
      const bool a_transposed = form & 1, b_transposed = form & 2, add = form & 4;
      const Activation act = (Activation)(form / 8);
      const int64_t depth = k;  // clang 14 captures no structured binding in a lambda
      CAPTURE(depth);
      CAPTURE(form);
      const Tensor a = random_tensor(a_transposed ? Shape{k, m} : Shape{m, k}, 1),
                   b = random_tensor(b_transposed ? Shape{n, k} : Shape{k, n}, 2);
      const Tensor bias = random_tensor({n}, 3), c = random_tensor({m, n}, 4), want = random_tensor({m, n}, 4), pre({m, n}),
                   want_pre({m, n});
      Gemm how{.a_transposed = a_transposed, .b_transposed = b_transposed, .add = add, .backend = Backend::own, .epilogue = {}};
      how.epilogue.activation = act;
      if (form % 3)
        gemm(how, a, b, c, bias, pre);
      else
        gemm(how, a, b, c);
      if (form % 3) how.epilogue.bias = bias.data(), how.epilogue.pre = want_pre.data();
      gemm(how, m, n, k, a.data(), a.cols(), b.data(), b.cols(), want.data(), n);
      CHECK(same_bytes(c, want));
      if (form % 3) CHECK(same_bytes(pre, want_pre));
    }
  const Tensor x = random_tensor({40, 30}, 1), w = random_tensor({20, 30}, 2);
  const Tensor before = linear(x, w);
  w.data()[7] += 1, x.data()[5] += 1;  // both lay there
  const Tensor after = linear(x, w), chained = linear(linear(x, w, {}, Activation::relu), random_tensor({10, 20}, 3));
  use_device("cpu");
  CHECK(same_bytes(after, linear(x, w)));
  CHECK_FALSE(same_bytes(after, before));
  CHECK(same_bytes(chained, linear(linear(x, w, {}, Activation::relu), random_tensor({10, 20}, 3))));
}

TEST_CASE("opencl: small products stay on the CPU, packed weights go with the device they were packed for") {
  const OnDevice device(1000);
  if (!device.here) return;
  Tensor x = random_tensor({10, 10}, 1), w = random_tensor({10, 10}, 2), packed = random_tensor({10, 10}, 2),
         late = random_tensor({10, 10}, 2);
  packed.pack();
  const Tensor on_it = linear(x, packed);
  use_device("cpu");
  late.pack();
  const Tensor want = linear(x, w);
  CHECK(same_bytes(want, linear(x, packed)));
  CHECK(same_bytes(want, on_it));
  use_device("opencl", {.half = false, .cache = testing::device_cache(), .least = 1000});
  CHECK(same_bytes(want, linear(x, late)));
  CHECK(same_bytes(want, linear(x, packed)));
  CHECK_THROWS_AS(gemm({}, x, random_tensor({11, 10}, 1), w), Error);
  CHECK(backend_description().find(device_in_use()->name) != std::string::npos);
}

TEST_CASE("opencl: many threads at once, on the same weights, get the answers of one") {
  const OnDevice device;
  if (!device.here) return;
  const Tensor w = random_tensor({70, 50}, 1);
  std::vector<Tensor> got(6), want;
  std::vector<std::thread> all;
  for (size_t i = 0; i < got.size(); i++)
    all.emplace_back([&, i] {
      for (int turn = 0; turn < 20; turn++) {
        got[i] = linear(random_tensor({30 + (int64_t)i, 50}, i), w, {}, Activation::gelu);
        if (i == 0) CHECK(w.data()[0] == w.data()[0]);  // takes the device's copy away
      }
    });
  for (std::thread& t : all) t.join();
  use_device("cpu");
  for (size_t i = 0; i < got.size(); i++)
    CHECK(same_bytes(got[i], linear(random_tensor({30 + (int64_t)i, 50}, i), w, {}, Activation::gelu)));
}

TEST_CASE("opencl: weights in f16 are the rounded ones, and what f16 cannot hold is refused") {
  const OnDevice device(0, true);
  if (!device.here) return;
  Tensor x = random_tensor({33, 70}, 1), w = random_tensor({20, 70}, 2), plain = random_tensor({20, 70}, 2);
  for (int64_t i = 0; i < plain.size(); i++) {
    const float x = plain.data()[i], step = std::exp2((float)std::max(std::ilogb(x), -14) - 10);
    plain.data()[i] = std::nearbyint(x / step) * step;
  }
  w.pack();
  const Tensor got = linear(x, w);
  Tensor large({1, 1}, 70000.f);
  CHECK_THROWS_WITH_AS(linear(Tensor({1, 1}, 1.f), large), doctest::Contains("too large for f16"), Error);
  use_device("cpu");
  CHECK(same_bytes(got, linear(x, plain)));
}

TEST_CASE("opencl: the search's result is kept, and a damaged note is searched again") {
  if (!OnDevice().here) return;
  TemporaryFolder folder;
  int64_t least = 7;  // others than before: a device that is open already searches no more
  auto open = [&] {
    use_device("opencl", {.half = false, .cache = folder / "new", .least = least++});
    return std::filesystem::directory_iterator(folder / "new")->path().string();
  };
  const std::string note = open(), first = read_file(note);
  CHECK(first.find(device_in_use()->name + "\t") != std::string::npos);
  const auto written = std::filesystem::last_write_time(note);
  CHECK(open() == note);
  CHECK(std::filesystem::last_write_time(note) == written);
  for (const std::string& damaged : {"999" + first.substr(1), std::string("\0\xff\n\n", 4), std::string()}) {
    std::ofstream(note, std::ios::binary) << damaged;
    open();
    CHECK(read_file(note).substr(1) == first.substr(1));
  }
  std::filesystem::remove(note), std::filesystem::create_directory(note);  // cannot be written: searched each time
  open();
  use_device("cpu");
}

TEST_CASE("opencl: without a device, with a bad library or driver: one clear line") {
  const std::string embed = "embed --model " + kModel + " --input " + kModel + "/vocab.txt --device opencl";
  for (const auto& [flags, message] : {std::pair("-DEMPTY", "libOpenCL.so.1 has no cl"),
                                       {"-DREFUSES", "clGetPlatformIDs says -30"},
                                       {"-DNO_BUILD", "do not build (-11): kernel.cl:7: error: no such thing and more"},
                                       {"-DGARBAGE", "computes wrong: 0 in a small product"},
                                       {"-DLAUNCHES=3", "clEnqueueNDRangeKernel says -5: out of device memory, or the device is lost"},
                                       {"-DBYTES=100000", "out of device memory: "}}) {
    const std::string shown = flags;
    CAPTURE(shown);
    const Stub stub(flags);
    const Ran r = stub.bert(embed);
    CHECK(r.status == 1);
    CHECK(r.out.empty());
    CHECK_MESSAGE(r.err.find(message) != std::string::npos, r.err);
    CHECK_MESSAGE(std::count(r.err.begin(), r.err.end(), '\n') == 1, r.err);
    const Ran info = stub.bert("info");  // names what is wrong, and goes on
    CHECK(info.status == 0);
    CHECK_MESSAGE(info.out.find(message) != std::string::npos, info.out);
  }
  TemporaryFolder folder;
  std::ofstream(folder / "libOpenCL.so.1") << "no library\n";
  const Ran r = testing::run("LD_LIBRARY_PATH=" + folder.path + " ./bert " + embed);
  CHECK(r.status == 1);
  CHECK_MESSAGE(r.err.find("libOpenCL.so.1") != std::string::npos, r.err);
  const Stub good("");
  for (const auto& [which, message] : {std::pair("opencl:7", "opencl:7: there is no such device; here are 0 (Stub device)"),
                                       {"opencl:Radeon", "opencl:Radeon: there is no such device"}}) {
    const Ran none = good.bert("embed --model " + kModel + " --device " + which);
    CHECK(none.status == 1);
    CHECK_MESSAGE(none.err.find(message) != std::string::npos, none.err);
  }
  const std::string input = " < " + kModel + "/vocab.txt --device ";
  const Ran cpu = good.bert("embed --model " + kModel + input + "cpu"),
            other = good.bert("embed --model " + kModel + input + "opencl:STUB");
  CHECK(other.status == 0);
  CHECK(other.err == cpu.err);
  CHECK(other.out.size() > cpu.out.size() / 2);
}

// A text, a vocabulary and the command that pretrains on it, without --output, steps and device.
struct Training {
  TemporaryFolder folder;
  std::string pretrain, finetune;
  Training() {
    const Ran vocab = testing::run("./bert vocab --input data/english-heldout.txt --size 400 --output " + (folder / "vocab"));
    REQUIRE_MESSAGE(vocab.status == 0, vocab.err);
    testing::run("head -n 120 data/spam/train.tsv > " + (folder / "train.tsv") + "; head -n 40 data/spam/dev.tsv > " +
                 (folder / "dev.tsv"));
    pretrain = "pretrain --input data/english-heldout.txt --vocab " + (folder / "vocab") +
               " --config tiny --batch-tokens 400 --max-length 64 --seed 3 --save-every 1 ";
    finetune = "finetune --task classify --train " + (folder / "train.tsv") + " --dev " + (folder / "dev.tsv") + " --epochs 1 --model ";
  }
  Ran bert(const std::string& arguments) const {
    return testing::run("BERT_GEMM=own XDG_CACHE_HOME=" + testing::device_cache() + " ./bert " + arguments);  // not OpenBLAS's bytes
  }
};

TEST_CASE("opencl: pretraining, resuming, fine-tuning and answers through the command line, with the CPU's bytes") {
  if (!OnDevice().here) return;
  const Training t;
  auto weights = [&](const std::string& model) { return read_file(t.folder / (model + "/model.safetensors")); };
  for (const std::string device : {"cpu", "opencl"}) {
    const std::string model = t.folder / device, options = " --device " + device;
    const Ran trained = t.bert(t.pretrain + "--steps 3 --output " + model + options);
    REQUIRE_MESSAGE(trained.status == 0, trained.err);
    const Ran tuned = t.bert(t.finetune + model + " --output " + model + "-tuned" + options);
    REQUIRE_MESSAGE(tuned.status == 0, tuned.err);
    const Ran answers =
        t.bert("predict --model " + model + "-tuned --input " + (t.folder / "dev.tsv") + options + " --output " + model + ".tsv");
    REQUIRE_MESSAGE(answers.status == 0, answers.err);
  }
  CHECK(weights("cpu") == weights("opencl"));
  CHECK(weights("cpu-tuned") == weights("opencl-tuned"));
  CHECK(read_file(t.folder / "cpu.tsv") == read_file(t.folder / "opencl.tsv"));
  CHECK(read_file(t.folder / "opencl/training_state.safetensors").find("\"backend\":\"OpenCL on ") != std::string::npos);
  const Ran resumed = t.bert(t.pretrain + "--steps 3 --resume --output " + (t.folder / "cpu") + " --device opencl");
  CHECK_MESSAGE(resumed.err.find("the run began on ") != std::string::npos, resumed.err);
  const std::string embed =
      "embed --model " + (t.folder / "cpu") + " --input data/english-heldout.txt --batch-tokens 4096 --device opencl --dtype ";
  const Ran full = t.bert(embed + "f32"), half = t.bert(embed + "f16");
  CHECK_MESSAGE(half.status == 0, half.err);
  CHECK(std::count(half.out.begin(), half.out.end(), '\n') == std::count(full.out.begin(), full.out.end(), '\n'));
  CHECK(half.out != full.out);
  const Ran info = t.bert("info");
  CHECK_MESSAGE(info.out.find("\ndevices\tcpu opencl:0") != std::string::npos, info.out);
  CHECK_MESSAGE(info.out.find(" GFLOP/s\n") != std::string::npos, info.out);
}

TEST_CASE("opencl: a device that is lost ends the run with one line, and the run goes on from its last state") {
  const Training t;
  const Stub stub("-DLAUNCHES=120");
  const std::string command = t.pretrain + "--steps 6 --quiet --output " + (t.folder / "model");
  const Ran lost = stub.bert(command + " --device opencl");
  CHECK(lost.status == 1);
  CHECK_MESSAGE(std::count(lost.err.begin(), lost.err.end(), '\n') == 1, lost.err);
  CHECK_MESSAGE(lost.err.find("the device is lost") != std::string::npos, lost.err);
  REQUIRE(std::filesystem::exists(t.folder / "model/training_state.safetensors"));
  const Ran resumed = t.bert(command + " --resume");
  CHECK_MESSAGE(resumed.status == 0, resumed.err);
  CHECK(std::filesystem::exists(t.folder / "model/model.safetensors"));
}
