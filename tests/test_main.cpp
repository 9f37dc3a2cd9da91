// The test program: doctest's, with one closing line that says how many test cases passed, failed and were skipped. Without arguments the
// goldens, gradients and training run a second time, with every product on a device of OpenCL's; --opencl and doctest's arguments: that
// alone.
#define DOCTEST_CONFIG_IMPLEMENT
#include "testing.h"

namespace {
struct Counter : doctest::IReporter {
  explicit Counter(const doctest::ContextOptions&) {}
  static inline int passed = 0, failed = 0;
  void test_case_end(const doctest::CurrentTestCaseStats& s) override { (s.testCaseSuccess ? passed : failed)++; }
  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_run_end(const doctest::TestRunStats&) override {}
  void test_case_start(const doctest::TestCaseData&) override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void log_message(const doctest::MessageData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}
};
REGISTER_LISTENER("counter", 1, Counter);
}  // namespace

// The same test cases on a device; where there is none a line says so.
static int run_on_device(int argc, char** argv) {
  doctest::Context context(argc, argv);
  if (argc == 1)
    context.addFilter("test-case", "golden: *,*gradients*,linear*,training: the same bytes*,training: micro*,training: a step*,one *");
  try {
    bert::use_device("opencl", {.half = false, .cache = testing::device_cache(), .least = 0});
  } catch (const bert::Error& e) {
    std::printf("skipped on a device: %s\n", e.what());
    return 0;
  }
  std::printf("again on %s\n", bert::device_in_use()->name.c_str());
  return context.run();
}

int main(int argc, char** argv) {
  const bool on_device = argc > 1 && std::string(argv[1]) == "--opencl";
  int status = 0;
  if (!on_device) {
    doctest::Context context(argc, argv);
    status = context.run();
    if (context.shouldExit()) return status;
  }
  if (on_device || argc == 1) status |= run_on_device(argc, argv);
  std::printf("%d passed, %d failed, %d skipped\n", Counter::passed - testing::skipped, Counter::failed, testing::skipped);
  return status;
}
