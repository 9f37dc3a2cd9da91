// The test program: doctest's, with one closing line that says how many test cases passed, failed and were skipped.
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

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  const int status = context.run();
  if (context.shouldExit()) return status;
  std::printf("%d passed, %d failed, %d skipped\n", Counter::passed - testing::skipped, Counter::failed, testing::skipped);
  return status;
}
