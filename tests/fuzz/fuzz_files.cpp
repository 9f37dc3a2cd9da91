// Throws arbitrary bytes at the readers of files. With clang's libFuzzer: FUZZ=json, safetensors or torch says what the bytes are.
//
// Whatever they are, a reader throws Error or gives values, and every tensor that it lists can be loaded or is refused; the sanitizers
// see what reads past the end. libFuzzer's own limits (-rss_limit_mb, -timeout) are the check that nothing is taken on a file's word.
#include <cstdlib>
#include <memory>

#include "tensor.h"

static void read(const std::string& what, std::string_view bytes) {
  if (what == "json") {
    bert::json_quote(bytes);
    bert::Json::parse(bytes, "f", 100'000);
    return;
  }
  const bert::SafeTensors file = what == "torch" ? bert::SafeTensors::parse_torch(bytes, "f") : bert::SafeTensors::parse(bytes, "f");
  for (const bert::SafeTensors::Entry& e : file.entries()) {
    try {
      if (file.load(e).size() < 0) std::abort();
    } catch (const bert::Error&) {}
    try {  // as the loader of models does it
      const bert::NarrowMatrix m = file.narrow(e, file.find(e.name + "_scale"));
      std::vector<float> row((size_t)std::min<int64_t>(m.k, 1 << 20));
      if (m.n && m.k == (int64_t)row.size()) m.widen(m.n - 1, row.data());
    } catch (const bert::Error&) {}
  }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string what = std::getenv("FUZZ") ? std::getenv("FUZZ") : "safetensors";
  const std::unique_ptr<char[]> exact(new char[size]);  // of its own size, so that one byte too far is seen
  std::copy_n(data, size, exact.get());
  try {
    read(what, {exact.get(), size});
  } catch (const bert::Error&) {}
  return 0;
}
