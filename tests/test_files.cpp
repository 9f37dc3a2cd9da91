// Tests of tensor.h's sections 2 (JSON) and 8 (files). What is read here may come from anybody: most of this file is what must be refused.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <limits>
#include <numeric>

#include "testing.h"

using bert::Error;
using bert::Json;
using bert::SafeTensors;
using testing::shared;
using namespace std::string_literals;

namespace {

// The message of the Error that f throws; "" when it throws none.
template <class F>
std::string message(F&& f) {
  try {
    f();
  } catch (const Error& e) { return e.what(); }
  return "";
}
bool contains(const std::string& s, const std::string& part) { return s.find(part) != std::string::npos; }

std::string json_error(std::string_view text) {
  return message([&] { Json::parse(text, "f.json"); });
}
std::string string_of(std::string_view text) { return Json::parse(text, "f").as_string("f"); }

// The bytes of a safetensors file.
std::string container(const std::string& header, const std::string& data = "") {
  const uint64_t n = header.size();
  return std::string(reinterpret_cast<const char*>(&n), 8) + header + data;
}
std::string parse_error(const std::string& bytes) {
  return message([&] { SafeTensors::parse(bytes, "f.safetensors"); });
}
template <class T>
std::string bytes_of(const std::vector<T>& v) {
  return {reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T)};
}
// One tensor "a" over the whole data.
std::string single(const std::string& dtype, const std::string& shape, const std::string& data) {
  return container("{\"a\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":[0," + std::to_string(data.size()) + "]}}",
                   data);
}
std::vector<float> load_all(const std::string& bytes) {
  const SafeTensors file = SafeTensors::parse(bytes, "f.safetensors");
  const bert::Tensor t = file.load(file.entries().at(0));
  return {t.data(), t.data() + t.size()};
}
std::string load_error(const std::string& bytes) {
  return message([&] { load_all(bytes); });
}
size_t files_in(const std::string& folder) {
  size_t n = 0;
  for (const auto& f : std::filesystem::directory_iterator(folder)) n += f.exists();
  return n;
}
double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// While it lives no file may grow over `bytes`: what a full disk looks like to write(2), without one.
struct FileLimit {
  rlimit before;
  void (*handler)(int);
  explicit FileLimit(size_t bytes) : handler(std::signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before);
    const rlimit now{bytes, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~FileLimit() {
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
  }
};

}  // namespace

// ==== JSON ========================================================================================================
TEST_CASE("JSON: values of every kind") {
  const Json j = Json::parse(" {\"a\" : [1, -2.5e3, true, false, null, \"x\"],\r\n\t\"b\": {}, \"c\": [], \"a\": 7 } ", "f");
  REQUIRE(j.is(Json::object));
  REQUIRE(j.members().size() == 4);  // in their order, a key that stands twice kept twice
  const std::vector<Json>& a = j.find("a")->items("a");
  REQUIRE(a.size() == 6);
  CHECK(a[0].as_int("x") == 1);
  CHECK(a[1].as_double("x") == -2500);
  CHECK(a[2].as_bool("x"));
  CHECK(!a[3].as_bool("x"));
  CHECK(a[4].is(Json::null));
  CHECK(a[5].as_string("x") == "x");
  CHECK(j.find("b")->is(Json::object));
  CHECK(j.find("c")->items("c").empty());
  CHECK(j.find("z") == nullptr);
  CHECK(a[0].find("z") == nullptr);
  CHECK(message([&] { a[0].as_string("f.json: name"); }) == "f.json: name: not a string");
  CHECK(message([&] { a[5].as_int("f"); }) == "f: not a number");
  CHECK(message([&] { a[5].as_double("f"); }) == "f: not a number");
  CHECK(message([&] { a[5].as_bool("f"); }) == "f: not true or false");
  CHECK(message([&] { a[5].items("f"); }) == "f: not a list");
}

TEST_CASE("JSON: numbers") {
  for (const char* text : {"0", "-0", "10", "1.5", "1e5", "1E+5", "1e-5", "-12.25e2", "0.1", "0e0", "1234567890123456789012345678901"})
    CHECK_MESSAGE(Json::parse(text, "f").as_double("f") == std::strtod(text, nullptr), text);
  for (const char* text : {"",    " ",    "-",     "+1",  ".5",       "1.",   "1.e5", "01", "-01", "1e",
                           "1e+", "0x10", "1_000", "NaN", "Infinity", "-inf", "1 2",  "1,", "--1", "1.2.3"})
    CHECK_MESSAGE(json_error(text) != "", text);
  CHECK(Json::parse("9223372036854775807", "f").as_int("f") == INT64_MAX);
  CHECK(Json::parse("-9223372036854775808", "f").as_int("f") == INT64_MIN);
  for (const char* text : {"9223372036854775808", "-9223372036854775809", "1.5", "4e0", "4.0", "1000000000000000019884624838656"})
    CHECK_MESSAGE(contains(message([&] { Json::parse(text, "f").as_int("f: n"); }), "f: n: " + std::string(text) + " is not an integer"),
                  text);
  CHECK(message([] { Json::parse("-1e400", "f").as_double("f: x"); }) == "f: x: -1e400 is not within the range of double");
  CHECK(message([] { Json::parse(std::string(1000000, '9'), "f").as_int("f: n"); }).size() < 200);  // the file cannot fill the terminal
}

TEST_CASE("JSON: strings") {
  CHECK(string_of(R"("\"\\\/\b\f\n\r\t")") == "\"\\/\b\f\n\r\t");
  CHECK(string_of(R"("\u0041\u00e9\u4e2d\uD83D\uDE00\u0000x")") == "A\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80\0x"s);
  CHECK(string_of("\"\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80\x7F\"") == "\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80\x7F");
  const std::string bad[] = {R"("a)",
                             R"("\)",
                             R"("\x41")",
                             R"("\u12")",
                             R"("\u12G4")",
                             R"("\U00000041")",
                             R"("\ud800")",
                             R"("\udc00")",
                             R"("\ud800\u0041")",
                             R"("\ud800x")",
                             R"("\ud800\n")",
                             R"("\ud800\ue000")",
                             "'a'",
                             "\"a\nb\"",
                             "\"a\tb\"",
                             "\"\0\""s,
                             "\"\x1F\"",
                             "\"\x80\"",
                             "\"\xC0\xAF\"",
                             "\"\xC1\xBF\"",
                             "\"\xE0\x80\xAF\"",
                             "\"\xED\xA0\x80\"",
                             "\"\xF0\x80\x80\xAF\"",
                             "\"\xF4\x90\x80\x80\"",
                             "\"\xF5\x80\x80\x80\"",
                             "\"\xFF\"",
                             "\"\xE4\xB8\"",
                             "\"\xE4",
                             "\"\xC3(\""};
  for (const std::string& text : bad) CHECK_MESSAGE(json_error(text) != "", text);
}

TEST_CASE("JSON: structure") {
  for (const char* text : {"[",
                           "]",
                           "{",
                           "}",
                           "[1",
                           "[1,",
                           "[1,]",
                           "[,1]",
                           "[1 2]",
                           "[1}",
                           "{\"a\"",
                           "{\"a\":",
                           "{\"a\":1",
                           "{\"a\":1,",
                           "{\"a\":1,}",
                           "{a:1}",
                           "{1:1}",
                           "{\"a\" 1}",
                           "{\"a\":1 \"b\":2}",
                           "{\"a\":1]",
                           "tru",
                           "True",
                           "nul",
                           "truefalse",
                           "[1]x",
                           "{} {}",
                           "// c\n1",
                           "/* c */1",
                           "\xEF\xBB\xBF{}",
                           "\v1",
                           "\xC2\xA0"
                           "1"})
    CHECK_MESSAGE(json_error(text) != "", text);
  CHECK(json_error("[1]" + "\0"s) != "");
  // 128 deep is read, 129 is refused, 100,000 does not overflow the stack
  auto nested = [](size_t n) { return std::string(n, '[') + std::string(n, ']'); };
  CHECK(json_error(nested(129)) == "");
  CHECK(contains(json_error(nested(130)), "nested deeper than 128"));
  CHECK(contains(json_error(std::string(100000, '[')), "nested deeper than 128"));
  std::string objects;
  for (int i = 0; i < 100000; i++) objects += "{\"a\":";
  CHECK(contains(json_error(objects), "nested deeper than 128"));
  CHECK(message([] { Json::parse("[1,2,3]", "f", 4); }) == "");
  CHECK(contains(message([] { Json::parse("[1,2,3]", "f", 3); }), "too many values"));
}

TEST_CASE("JSON: an error says where") {
  CHECK(json_error("{\"a\": 1,\n \"b\" 2}") == "f.json:2:6: not JSON: ':' expected");
  CHECK(json_error("") == "f.json:1:1: not JSON: the text ends early");
  CHECK(json_error("{\n\n  \"a\": \"x") == "f.json:3:10: not JSON: a string that does not end");
  CHECK(json_error("[1] 2") == "f.json:1:5: not JSON: something follows the value");
}

TEST_CASE("JSON: what json_quote writes reads back") {
  std::string all;
  for (int c = 0; c < 128; c++) all += (char)c;
  for (const std::string& s : {""s, all, "\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80"s, "\\\"\\u0041"s})
    CHECK(string_of(bert::json_quote(s)) == s);
  CHECK(bert::json_quote("a\xFF"
                         "b\xE4\xB8") ==
        "\"a\xEF\xBF\xBD"
        "b\xEF\xBF\xBD\xEF\xBF\xBD\"");
  CHECK(bert::json_quote("\xED\xA0\x80") == "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\"");
  bert::Random random({5, 0, 0, 0});
  for (int round = 0; round < 200; round++) {
    std::string s;
    for (int i = 0; i < 40; i++) s += (char)random.below(256);
    const std::string once = string_of(bert::json_quote(s));  // whatever the bytes, the result is JSON, and then it is stable
    CHECK(string_of(bert::json_quote(once)) == once);
  }
}

// ==== numbers and plain files =====================================================================================
TEST_CASE("format_number is printf's %.9g, and reads back as the same float") {
  auto printed = [](double v) {
    char s[64];
    std::snprintf(s, sizeof s, "%.9g", v);
    return std::string(s);
  };
  for (double v : {0., -0., 1., -1., .1, 1e-5, 1e-4, 123456789., 1234567890., 1e9, 1e10, 1e22, 1e100, 5e-324, 1.7976931348623157e308,
                   0.30000000000000004})
    CHECK(bert::format_number(v) == printed(v));
  CHECK(bert::format_number(NAN) == "nan");
  CHECK(bert::format_number(-NAN) == "nan");
  CHECK(bert::format_number(INFINITY) == "inf");
  CHECK(bert::format_number(-INFINITY) == "-inf");
  int bad = 0;
  for (uint64_t i = 0; i < (uint64_t(1) << 32); i += 8191) {  // 524,352 floats, all exponents and signs
    const float f = std::bit_cast<float>((uint32_t)i);
    if (!std::isfinite(f)) continue;
    const std::string s = bert::format_number(f);
    float back = 0;
    std::from_chars(s.data(), s.data() + s.size(), back);
    bad += s != printed(f) || std::bit_cast<uint32_t>(back) != (uint32_t)i;
  }
  CHECK(bad == 0);
}

TEST_CASE("read_file") {
  testing::TemporaryFolder folder;
  const std::string bytes = "a\0\r\n\xFF"s + std::string(200000, 'x');
  bert::write_file(folder / "f", bytes);
  CHECK(bert::read_file(folder / "f") == bytes);
  CHECK(contains(message([&] { bert::read_file(folder / "none"); }), (folder / "none") + ": cannot open: No such file"));
  CHECK(contains(message([&] { bert::read_file(folder.path); }), folder.path + ": cannot read: Is a directory"));
}

TEST_CASE("AtomicFile: the file appears whole, under its name, with commit") {
  testing::TemporaryFolder folder;
  const std::string path = folder / "f";
  bert::write_file(path, "old");
  {
    bert::AtomicFile file(path);
    file.write("new ");
    for (int i = 0; i < 300000; i++) file.write("0123456789");
    file.write(std::string(1 << 20, 'z'));
    CHECK(bert::read_file(path) == "old");
    CHECK(files_in(folder.path) == 2);
    for (const auto& f : std::filesystem::directory_iterator(folder.path))
      if (f.path().filename() != "f") CHECK(f.path().filename().string().starts_with("f.tmp-" + std::to_string(getpid()) + "-"));
    file.commit();
    CHECK(contains(message([&] { file.write("x"); }), "committed"));
    CHECK(contains(message([&] { file.commit(); }), "committed"));
  }
  std::string expected = "new ";
  for (int i = 0; i < 300000; i++) expected += "0123456789";
  CHECK(bert::read_file(path) == expected + std::string(1 << 20, 'z'));
  CHECK(files_in(folder.path) == 1);
  bert::write_file(path, "");
  CHECK(bert::read_file(path).empty());
}

TEST_CASE("AtomicFile: without commit the old file stays and nothing else") {
  testing::TemporaryFolder folder;
  bert::write_file(folder / "f", "old");
  { bert::AtomicFile(folder / "f").write(std::string(1 << 20, 'x')); }
  CHECK(bert::read_file(folder / "f") == "old");
  CHECK(files_in(folder.path) == 1);
}

TEST_CASE("AtomicFile: two at once on one name do not mix") {
  testing::TemporaryFolder folder;
  bert::AtomicFile a(folder / "f"), b(folder / "f");
  a.write("a"), b.write("b");
  b.commit();
  CHECK(bert::read_file(folder / "f") == "b");
  a.commit();
  CHECK(bert::read_file(folder / "f") == "a");
  CHECK(files_in(folder.path) == 1);
}

TEST_CASE("AtomicFile: a temporary file that a killed process left is neither used nor removed") {
  testing::TemporaryFolder folder;
  const std::string start = (folder / "f.tmp-") + std::to_string(getpid()) + "-";
  int number = 0;
  {
    bert::AtomicFile file(folder / "f");
    while (!std::filesystem::exists(start + std::to_string(number))) REQUIRE(number++ < 100000);
  }
  bert::write_file(folder / "old", "old");
  std::filesystem::rename(folder / "old", start + std::to_string(number + 2));  // number + 1 was old's
  bert::write_file(folder / "f", "new");
  CHECK(bert::read_file(folder / "f") == "new");
  CHECK(bert::read_file(start + std::to_string(number + 2)) == "old");
  CHECK(files_in(folder.path) == 2);
}

TEST_CASE("AtomicFile: permissions are the umask's; a link stays a link; a relative name") {
  testing::TemporaryFolder folder;
  const mode_t before = umask(027);
  bert::write_file(folder / "f", "1");
  umask(before);
  struct stat s;
  REQUIRE(stat((folder / "f").c_str(), &s) == 0);
  CHECK((s.st_mode & 0777) == 0640);
  std::filesystem::create_symlink("f", folder / "link");
  bert::write_file(folder / "link", "2");
  CHECK(std::filesystem::is_symlink(folder / "link"));
  CHECK(bert::read_file(folder / "f") == "2");
  const std::filesystem::path here = std::filesystem::current_path();
  std::filesystem::current_path(folder.path);
  const std::string wrong = message([] { bert::write_file("g", "3"); });
  std::filesystem::current_path(here);
  CHECK(wrong == "");
  CHECK(bert::read_file(folder / "g") == "3");
}

TEST_CASE("AtomicFile: a place that cannot be written is an Error with its reason and cure") {
  testing::TemporaryFolder folder;
  auto wrong = [](const std::string& path) { return message([&] { bert::write_file(path, "x"); }); };
  CHECK(contains(wrong(folder / "none/f"), (folder / "none/f") + ": cannot write: No such file or directory; is its folder there?"));
  bert::write_file(folder / "f", "x");
  CHECK(contains(wrong(folder / "f/g"), "Not a directory"));
  CHECK(contains(wrong(folder.path), folder.path + ": cannot write: this is a folder"));
  CHECK(contains(wrong(folder.path + "/"), "this is a folder"));
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);  // a device would do, but a test that fails would put a file in its place
  CHECK(contains(wrong(folder / "pipe"), (folder / "pipe") + ": cannot write: not a plain file"));
  CHECK(contains(wrong(folder / std::string(300, 'n')), "File name too long"));
  CHECK(wrong("") == "cannot write a file without a name");
  CHECK(files_in(folder.path) == 2);
  bert::AtomicFile late(folder / "late");  // what is wrong with the name may also come after the start
  late.write("x");
  std::filesystem::create_directory(folder / "late");
  CHECK(contains(message([&] { late.commit(); }), (folder / "late") + ": cannot write: Is a directory"));
  CHECK(files_in(folder.path) == 3);
  // A folder that may not be written. Root may write everywhere but where nobody can: there the kernel's own folder stands in.
  std::filesystem::create_directory(folder / "closed");
  chmod((folder / "closed").c_str(), 0555);
  const std::string closed = geteuid() == 0 ? "/proc/self/bert-test" : folder / "closed/f";
  CHECK(contains(wrong(closed), closed + ": cannot write: "));
  chmod((folder / "closed").c_str(), 0755);
}

TEST_CASE("AtomicFile: a write that fails leaves the old file and no temporary one") {
  testing::TemporaryFolder folder;
  const std::string path = folder / "f";
  bert::write_file(path, "old");
  std::string at_once, at_commit, after, saved;
  {
    FileLimit limit(100000);
    bert::AtomicFile file(path);
    at_once = message([&] { file.write(std::string(1 << 20, 'x')); });
    after = message([&] { file.commit(); });
    at_commit = message([&] { bert::write_file(path, std::string(150000, 'x')); });  // still in the buffer until then
    const std::vector<float> x(50000);
    saved = message([&] { bert::save_safetensors(path, {{"x", {50000}, x.data()}}, {}); });
  }
  for (const std::string& m : {at_once, at_commit, saved}) CHECK(contains(m, path + ": cannot write: File too large; raise the limit"));
  CHECK(contains(after, "failed"));
  CHECK(bert::read_file(path) == "old");
  CHECK(files_in(folder.path) == 1);
}

TEST_CASE("AtomicFile: a full disk") {
  testing::TemporaryFolder folder;  // a small file system of our own, in a namespace of our own: for root, where the kernel allows it
  const std::string disk = folder / "disk";
  std::filesystem::create_directory(disk);
  if (geteuid() != 0 || testing::run("mount -t tmpfs -o size=256k tmpfs " + disk).status != 0) {
    testing::skipped++;
    MESSAGE("skipped: no small file system can be mounted here");
    return;
  }
  bert::write_file(disk + "/f", "old");
  const std::string wrong = message([&] { bert::write_file(disk + "/f", std::string(1 << 20, 'x')); });
  const std::string left = bert::read_file(disk + "/f");
  const size_t files = files_in(disk);
  testing::run("umount " + disk);
  CHECK(contains(wrong, "/disk/f: cannot write: No space left on device; no space left: free some"));
  CHECK(left == "old");
  CHECK(files == 1);
}

TEST_CASE("safetensors: open") {
  testing::TemporaryFolder folder;
  const float x[] = {1, 2};
  bert::save_safetensors(folder / "f", {{"x", {2}, x}}, {});
  bert::write_file(folder / "empty", "");
  {
    bert::Tensor t;
    {
      const SafeTensors file = SafeTensors::open(folder / "f");
      t = file.load(file.entries()[0]);
    }
    CHECK(contains(bert::read_file("/proc/self/maps"), folder.path));
    std::filesystem::remove(folder / "f");
    CHECK(t.data()[1] == 2);  // the tensor keeps the mapping, also when the name is gone
  }
  CHECK(!contains(bert::read_file("/proc/self/maps"), folder.path));
  auto wrong = [](const std::string& path) { return message([&] { SafeTensors::open(path); }); };
  CHECK(wrong(folder / "empty") == (folder / "empty") + ": 0 bytes are too short for a safetensors file");
  CHECK(wrong(folder / "none") == (folder / "none") + ": cannot open: No such file or directory");
  CHECK(wrong(folder.path) == folder.path + ": this is a folder, where a file is needed");
  CHECK(wrong("/dev/zero") == "/dev/zero: not a plain file");
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK(wrong(folder / "pipe") == (folder / "pipe") + ": not a plain file");  // and does not wait for a writer
}

// ==== safetensors =================================================================================================
TEST_CASE("safetensors: what is read") {
  const std::string data = bytes_of<float>({1, 2, 3, 4, 5, 6, 7});
  const std::string header =
      "{\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[4,28]},\"__metadata__\":{\"format\":\"pt\",\"k\":\"\\u00e9\"},"
      "\"a\":{\"data_offsets\":[0,4],\"dtype\":\"F32\",\"shape\":[],\"unknown\":[1]}}";
  for (const std::string& h : {header, header + "     ", " \n" + header}) {
    const SafeTensors file = SafeTensors::parse(container(h, data), "f");
    REQUIRE(file.entries().size() == 2);
    CHECK(file.entries()[0].name == "a");  // in file order
    CHECK(file.entries()[1].begin == 4);
    CHECK(file.entries()[1].end == 28);
    CHECK(file.metadata() == std::vector<std::pair<std::string, std::string>>{{"format", "pt"}, {"k", "\xC3\xA9"}});
    CHECK(file.find("b") == &file.entries()[1]);
    CHECK(file.find("c") == nullptr);
    CHECK(file.where() == "f");
  }
  const std::string bytes = container(header, data);
  const SafeTensors file = SafeTensors::parse(bytes, "f");
  CHECK(file.load(*file.find("a")).item() == 1);
  const bert::Tensor b = file.load(*file.find("b"));
  CHECK(b.shape() == bert::Shape{2, 3});
  CHECK(b.data()[0] == 2);
  CHECK(b.data()[5] == 7);
  CHECK(SafeTensors::parse(container("{}"), "f").entries().empty());
  CHECK(load_all(single("F32", "[0,5]", "")).empty());
  CHECK(load_all(single("F32", "[1,1,1,1]", bytes_of<float>({9}))) == std::vector<float>{9});
  CHECK(contains(load_error(single("F32", "[1,1,1,1,1]", bytes_of<float>({9}))), "f.safetensors: a: shape [1,1,1,1,1] has more than four"));
  // empty tensors anywhere between others
  const std::string gaps =
      "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"e\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]},"
      "\"d\":{\"dtype\":\"I8\",\"shape\":[0,2],\"data_offsets\":[4,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[4,7]}}";
  CHECK(parse_error(container(gaps, "1234567")) == "");
}

TEST_CASE("safetensors: a view where it lies aligned, a copy where not") {
  const std::vector<float> x{1, 2, 3};
  for (int shift = 0; shift < 8; shift++) {
    const std::string bytes =
        container("{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]}}" + std::string((size_t)shift, ' '), bytes_of(x));
    const SafeTensors file = SafeTensors::parse(bytes, "f");
    const bert::Tensor t = file.load(file.entries()[0]);
    CHECK(std::vector<float>(t.data(), t.data() + 3) == x);
    const char* in_file = bytes.data() + bytes.size() - 12;
    const bool aligned = reinterpret_cast<uintptr_t>(in_file) % alignof(float) == 0;
    CHECK((reinterpret_cast<const char*>(t.data()) == in_file) == aligned);
  }
}

TEST_CASE("safetensors: pages given back leave this process's memory, and are the same when they are read again") {
  const testing::TemporaryFolder folder;
  const bert::Tensor x = testing::random_tensor({1 << 14, 256}, 1);  // 16 MiB
  bert::save_safetensors(folder / "f", {{"a", x.shape(), x.data()}, {"b", {3}, x.data()}}, {});
  auto file_pages = [] {  // of this process, mapped from files
    int64_t all = 0, resident = 0, shared_pages = 0;
    std::istringstream(bert::read_file("/proc/self/statm")) >> all >> resident >> shared_pages;
    return shared_pages;
  };
  const SafeTensors file = SafeTensors::open(folder / "f");
  const int64_t before = file_pages(), whole = x.size() * 4 / sysconf(_SC_PAGESIZE);
  const bert::Tensor t = file.load(*file.find("a"));
  CHECK(file_pages() - before > whole * 9 / 10);
  file.give_back(*file.find("a"));
  CHECK(file_pages() - before < whole / 10);
  CHECK(std::equal(t.data(), t.data() + t.size(), x.data()));
  t.give_back();
  CHECK(file_pages() - before < whole / 10);
  std::vector<int32_t> ids((size_t)x.rows()), zeros(ids.size());
  std::iota(ids.begin(), ids.end(), 0);
  const bert::Tensor none({1, 256}, 0.f), gamma({256}, 1.f), beta({256}, 0.f);
  bert::Dropout drop;
  auto embedded = [&](const bert::Tensor& table) {
    return bert::embedding_norm(table, none, none, ids, zeros, zeros, gamma, beta, 1e-12f, drop);
  };
  const bert::Tensor y = embedded(t);  // every row of the table is read, never is it in memory as a whole
  CHECK(file_pages() - before < whole / 10);
  const bert::Tensor same = embedded(x);
  CHECK(std::equal(y.data(), y.data() + y.size(), same.data()));

  const std::string bytes = bert::read_file(folder / "f");  // not mapped: nothing may be taken away
  const SafeTensors held = SafeTensors::parse(bytes, "f");
  held.give_back(*held.find("a")), held.load(*held.find("a")).give_back();
  CHECK(std::memcmp(held.load(*held.find("a")).data(), x.data(), (size_t)x.size() * 4) == 0);
}

TEST_CASE("safetensors: every kind of bad file is refused with its tensor and reason") {
  const std::string good = "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", four(16, '\0');
  REQUIRE(parse_error(container(good, four)) == "");
  auto length = [&](uint64_t n) { return std::string(reinterpret_cast<const char*>(&n), 8) + good; };
  auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{\"a\":{" + (dtype.empty() ? "" : "\"dtype\":" + dtype + ",") + (shape.empty() ? "" : "\"shape\":" + shape + ",") +
           (offsets.empty() ? "\"x\":0" : "\"data_offsets\":" + offsets) + "}}";
  };
  auto two = [](const std::string& a, const std::string& b) {
    return "{\"a\":{\"dtype\":\"U8\",\"shape\":[16],\"data_offsets\":" + a +
           "},\"b\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":" + b + "}}";
  };
  auto with = [&](const std::string& more) { return good.substr(0, good.size() - 1) + "," + more + "}"; };
  const struct {
    std::string bytes, expected;
  } bad[] = {
      {"", "f.safetensors: 0 bytes are too short"},
      {"\x05\0\0\0\0\0\0"s, "7 bytes are too short"},
      {container(good).substr(0, 40), "a header of 55 bytes, but 32 follow"},
      {length(1ull << 63), "a header of 9223372036854775808 bytes, but 55 follow"},
      {length(~0ull), "a header of 18446744073709551615 bytes, but 55 follow"},
      {length(~0ull - 7), "bytes, but 55 follow"},
      {length(100'000'001), "a header of 100000001 bytes"},
      {length(0), "header:1:1: not JSON: the text ends early"},
      {container("hello"), "header:1:1: not JSON"},
      {container(good.substr(0, 30), four), "header:1:31: not JSON"},
      {container("[1]"), "the header is not an object"},
      {container("null"), "the header is not an object"},
      {container(good + "x", four), "header:1:56: not JSON: something follows"},
      {container(good + "\0"s, four), "something follows"},
      {container("{\"\xFF\xFE\":1}"), "not UTF-8"},
      {container("{\"\\ud800\":1}"), "high surrogate"},
      {container(with(good.substr(1, good.size() - 2)), four), ": a: stands twice"},
      {container("{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}"), "nested deeper"},
      {container(one("\"F31\"", "[4]", "[0,16]"), four), ": a: unknown dtype F31"},
      {container(one("\"f32\"", "[4]", "[0,16]"), four), ": a: unknown dtype f32"},
      {container(one("\"\"", "[4]", "[0,16]"), four), ": a: unknown dtype \"\""},
      {container(one("\"F4\"", "[32]", "[0,16]"), four), ": a: unknown dtype F4"},
      {container(one("32", "[4]", "[0,16]"), four), ": a: dtype: not a string"},
      {container(one("", "[4]", "[0,16]"), four), ": a: dtype is missing"},
      {container(one("\"F32\"", "", "[0,16]"), four), ": a: shape is missing"},
      {container(one("\"F32\"", "[4]", ""), four), ": a: data_offsets is missing"},
      {container(one("\"F32\",\"dtype\":\"I32\"", "[4]", "[0,16]"), four), ": a: dtype: stands twice"},
      {container(one("\"F32\"", "\"4\"", "[0,16]"), four), ": a: shape: not a list"},
      {container(one("\"F32\"", "4", "[0,16]"), four), ": a: shape: not a list"},
      {container(one("\"F32\"", "[-2,-2]", "[0,16]"), four), ": a: shape: -2 is negative"},
      {container(one("\"F32\"", "[4.5]", "[0,16]"), four), ": a: shape: 4.5 is not an integer"},
      {container(one("\"F32\"", "[4e0]", "[0,16]"), four), ": a: shape: 4e0 is not an integer"},
      {container(one("\"F32\"", "[4.0]", "[0,16]"), four), ": a: shape: 4.0 is not an integer"},
      {container(one("\"F32\"", "[\"4\"]", "[0,16]"), four), ": a: shape: not a number"},
      {container(one("\"F32\"", "[null]", "[0,16]"), four), ": a: shape: not a number"},
      {container(one("\"F32\"", "[4611686018427387904,4]", "[0,0]")), ": a: shape [4611686018427387904,4] is too large"},
      {container(one("\"F32\"", "[4294967296,4294967296,1]", "[0,0]")), ": a: shape [4294967296,4294967296,1] is too large"},
      {container(one("\"F32\"", "[4611686018427387904]", "[0,0]")), ": a: shape [4611686018427387904] is too large"},
      {container(one("\"F32\"", "[2305843009213693952,0,8]", "[0,0]")), "is too large"},
      {container(one("\"U8\"", "[9223372036854775807]", "[0,0]")), "is too large"},
      {container(one("\"F32\"", "[9223372036854775808]", "[0,0]")), ": a: shape: 9223372036854775808 is not an integer of 64 bits"},
      {container(one("\"F32\"", "[3]", "[0,16]"), four), ": a: shape [3] of F32 needs 12 bytes, data_offsets give 16"},
      {container(one("\"F32\"", "[5]", "[0,16]"), four), ": a: shape [5] of F32 needs 20 bytes, data_offsets give 16"},
      {container(one("\"F64\"", "[4]", "[0,16]"), four), ": a: shape [4] of F64 needs 32 bytes"},
      {container(one("\"F32\"", "[0]", "[0,16]"), four), ": a: shape [0] of F32 needs 0 bytes"},
      {container(one("\"F32\"", "[]", "[0,16]"), four), ": a: shape [] of F32 needs 4 bytes"},
      {container(one("\"F32\"", "[100]", "[0,400]"), four), ": a: ends at 400, the file has 16 bytes"},
      {container(one("\"F32\"", "[4]", "[16,0]"), four), ": a: data_offsets [16,0] are reversed"},
      {container(one("\"F32\"", "[4]", "[-16,0]"), four), ": a: data_offsets: -16 is negative"},
      {container(one("\"F32\"", "[4]", "[18446744073709551600,18446744073709551616]"), four),
       ": a: data_offsets: 18446744073709551600 is not"},
      {container(one("\"F32\"", "[4]", "[9223372036854775791,9223372036854775807]"), four), ": a: ends at 9223372036854775807"},
      {container(one("\"F32\"", "[4]", "[0.0,16]"), four), ": a: data_offsets: 0.0 is not an integer"},
      {container(one("\"F32\"", "[4]", "[16]"), four), ": a: data_offsets needs two numbers, has 1"},
      {container(one("\"F32\"", "[4]", "[0,16,16]"), four), ": a: data_offsets needs two numbers, has 3"},
      {container(one("\"F32\"", "[4]", "{}"), four), ": a: data_offsets: not a list"},
      {container(two("[0,16]", "[8,16]"), four), ": b: overlaps a"},
      {container(two("[8,24]", "[8,16]"), std::string(24, '\0')), ": b: starts at 8, the tensors before it end at 0"},
      {container(
           "{\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}",
           std::string(8, '\0')),
       ": b: overlaps a"},
      {container(
           "{\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},\"e\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[4,4]}}",
           std::string(8, '\0')),
       ": e: overlaps a"},
      {container(two("[0,16]", "[24,32]"), std::string(32, '\0')), ": b: starts at 24, the tensors before it end at 16"},
      {container(two("[8,24]", "[24,32]"), std::string(32, '\0')), ": a: starts at 8, the tensors before it end at 0"},
      {container(two("[0,16]", "[16,24]"), std::string(20, '\0')), ": b: ends at 24, the file has 20 bytes"},
      {container(two("[0,16]", "[16,24]"), std::string(32, '\0')), "8 bytes after the last tensor"},
      {container("{}", "x"), "1 bytes after the last tensor"},
      {container(with("\"__metadata__\":{\"step\":5}"), four), ": __metadata__: step: not a string"},
      {container(with("\"__metadata__\":[]"), four), ": __metadata__: not an object"},
      {container(with("\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}"), four), ": __metadata__: k: stands twice"},
      {container(with("\"__metadata__\":{},\"__metadata__\":{}"), four), ": __metadata__: stands twice"},
      {container("{\"a\":5}"), ": a: not an object"},
      {container("{\"a\":null}"), ": a: not an object"},
  };
  for (const auto& b : bad) {
    const std::string m = parse_error(b.bytes);
    CHECK_MESSAGE(contains(m, b.expected), "expected: " << b.expected << "\n  got: " << m);
    CHECK_MESSAGE(m.starts_with("f.safetensors: "), m);
  }
}

TEST_CASE("safetensors: a name from outside cannot paint the terminal or fill it") {
  const std::string m = parse_error(container("{\"a\\u001b[31m\\nb\":5,\"c\":5}"));
  CHECK(contains(m, "\"a\\u001b[31m\\nb\": not an object"));
  const std::string c1 =
      parse_error(container("{\"a\xC2\x9B"
                            "31m\x7F\xC2\xA0\":5}"));  // U+009B does what ESC [ does
  CHECK(contains(c1, "\"a\\u009b31m\\u007f\xC2\xA0\": not an object"));
  CHECK(parse_error(container("{\"" + std::string(1000000, 'n') + "\":5}")).size() < 400);
  CHECK(contains(parse_error(container("{\"\":5}")), ": \"\": not an object"));
}

TEST_CASE("safetensors: every cut and every changed byte of a good file is refused or read, and nothing worse") {
  const std::string good = container(
      "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F16\",\"shape\":[2,2],\"data_offsets\":[0,8]},"
      "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}",
      std::string(12, 'x'));
  REQUIRE(parse_error(good) == "");
  for (size_t n = 0; n < good.size(); n++) CHECK(parse_error(good.substr(0, n)) != "");
  bert::Random random({3, 0, 0, 0});
  int refused = 0;
  for (int round = 0; round < 20000; round++) {
    std::string bytes = good;
    for (int k = 0; k < 1 + round % 3; k++)
      bytes[random.below(bytes.size())] = round % 2 ? (char)random.below(256) : "0189[]{},:\"-e"[random.below(13)];
    const std::unique_ptr<char[]> exact(new char[bytes.size()]);  // so that a sanitizer sees one byte too far
    std::memcpy(exact.get(), bytes.data(), bytes.size());
    try {
      const SafeTensors file = SafeTensors::parse({exact.get(), bytes.size()}, "f");
      for (const auto& e : file.entries()) file.load(e);
    } catch (const Error&) { refused++; }
  }
  CHECK(refused > 5000);
  CHECK(refused < 20000);
}

TEST_CASE("safetensors: a large header is read in time that grows with its size, and in bounded memory") {
  auto many = [](int n) {
    std::string h = "{";
    for (int i = 0; i < n; i++)
      h += (i ? ",\"t" : "\"t") + std::to_string(i * 7919 % n) + "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[" +
           std::to_string(n - 1 - i) + "," + std::to_string(n - i) + "]}";
    return container(h + "}", std::string((size_t)n, 'x'));
  };
  const auto start = std::chrono::steady_clock::now();
  CHECK(parse_error(many(50000)) == "");
  CHECK(contains(parse_error(many(100000)), "too many values"));  // values take more memory than text: 500,000 of them, 8 a tensor
  std::string numbers = "{\"a\":[0";
  for (int i = 0; i < 5000000; i++) numbers += ",0";
  CHECK(contains(parse_error(container(numbers + "]}")), "too many values"));
  CHECK(seconds_since(start) < 60);  // some 0.4 s; a comparison of all pairs takes minutes
}

TEST_CASE("safetensors: F16, BF16 and F64 are widened exactly") {
  std::vector<uint16_t> halves, brains;
  for (int h = 0; h < 0x10000; h++) {
    if ((h & 0x7C00) != 0x7C00) halves.push_back((uint16_t)h);
    if ((h & 0x7F80) != 0x7F80) brains.push_back((uint16_t)h);
  }
  const std::string n16 = std::to_string(halves.size()), nb = std::to_string(brains.size());
  const std::vector<float> f16 = load_all(single("F16", "[" + n16 + "]", bytes_of(halves)));
  int bad = 0;
  for (size_t i = 0; i < halves.size(); i++) {  // by the definition: sign, exponent of bias 15, 10 bits
    const int e = halves[i] >> 10 & 31, m = halves[i] & 1023;
    const double v = (e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24)) * (halves[i] >> 15 ? -1 : 1);
    bad += f16[i] != v || std::signbit(f16[i]) != (halves[i] >> 15);
  }
  CHECK(bad == 0);
  const std::vector<float> bf16 = load_all(single("BF16", "[1," + nb + "]", bytes_of(brains)));
  for (size_t i = 0; i < brains.size(); i++) bad += std::bit_cast<uint32_t>(bf16[i]) != (uint32_t)brains[i] << 16;
  CHECK(bad == 0);
  const std::vector<double> d{0.1, -0., 1e-45, 3.4028234663852886e38, 1 + 0x1p-24, 1 + 0x1.8p-23, 1e-300};
  const std::vector<float> f64 = load_all(single("F64", "[7]", bytes_of(d)));
  for (size_t i = 0; i < d.size(); i++) CHECK(std::bit_cast<uint32_t>(f64[i]) == std::bit_cast<uint32_t>((float)d[i]));
}

TEST_CASE("safetensors: weights that are no finite floats are refused, naming tensor and place") {
  CHECK(
      contains(load_error(single("F32", "[2,2]", bytes_of<float>({1, 2, NAN, INFINITY}))), "f.safetensors: a: element 2 of [2,2] is nan"));
  CHECK(contains(load_error(single("F32", "[1]", bytes_of<float>({-INFINITY}))), ": a: element 0 of [1] is -inf"));
  CHECK(contains(load_error(single("F16", "[2]", bytes_of<uint16_t>({0x3C00, 0x7C00}))), ": a: element 1 of [2] is inf"));
  CHECK(contains(load_error(single("F16", "[1]", bytes_of<uint16_t>({0xFC01}))), ": a: element 0 of [1] is nan"));
  CHECK(contains(load_error(single("BF16", "[2]", bytes_of<uint16_t>({0x3F80, 0xFF80}))), ": a: element 1 of [2] is -inf"));
  CHECK(contains(load_error(single("F64", "[2]", bytes_of<double>({1, 1e39}))), ": a: element 1 of [2] is 1e+39 (in f32 inf)"));
  for (const char* dtype : {"I32", "U32"})
    CHECK(contains(load_error(single(dtype, "[1]", "1234")), std::string(": a: dtype ") + dtype + " where a float"));
  for (const char* dtype : {"BOOL", "I8", "U8", "F8_E4M3"})
    CHECK(contains(load_error(single(dtype, "[1]", "1")), std::string("dtype ") + dtype));
  for (const char* dtype : {"I64", "U64", "C64"})
    CHECK(contains(load_error(single(dtype, "[1]", "12345678")), std::string("dtype ") + dtype));
  for (const char* dtype : {"I16", "U16"}) CHECK(contains(load_error(single(dtype, "[1]", "12")), std::string("dtype ") + dtype));
  std::vector<float> large(300000, 1);  // the first place, with many threads over many pieces
  large[299999] = large[170001] = large[170003] = NAN;
  CHECK(contains(load_error(single("F32", "[300000]", bytes_of(large))), "element 170001 of"));
}

TEST_CASE("save_safetensors: what it writes, byte for byte") {
  testing::TemporaryFolder folder;
  const std::vector<float> x{1, 2, 3, 4, 5, 6};
  const std::vector<std::pair<std::string, std::string>> pt{{"format", "pt"}};
  const std::vector<bert::NamedTensor> tensors{{"b", {2, 2}, x.data()}, {"a\"\xC3\xA9", {}, x.data() + 4}, {"c", {0, 3}, nullptr}};
  bert::save_safetensors(folder / "f", tensors, pt);
  std::string header =
      "{\"__metadata__\":{\"format\":\"pt\"},\"a\\\"\xC3\xA9\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},"
      "\"b\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[4,20]},\"c\":{\"dtype\":\"F32\",\"shape\":[0,3],\"data_offsets\":[20,20]}"
      "}";
  while (header.size() % 8) header += ' ';
  CHECK(bert::read_file(folder / "f") == container(header, bytes_of<float>({5, 1, 2, 3, 4})));
  bert::save_safetensors(folder / "g", {tensors[2], tensors[1], tensors[0]}, pt);
  CHECK(bert::read_file(folder / "g") == bert::read_file(folder / "f"));
  const SafeTensors file = SafeTensors::open(folder / "f");
  CHECK(file.metadata() == pt);
  CHECK(file.load(*file.find("b")).data()[3] == 4);
  CHECK(file.load(*file.find("a\"\xC3\xA9")).item() == 5);
  CHECK(file.load(*file.find("c")).size() == 0);
  bert::save_safetensors(folder / "none", {}, {});
  CHECK(bert::read_file(folder / "none") == container("{}      "));
  CHECK(SafeTensors::open(folder / "none").entries().empty());
  bert::save_safetensors(folder / "metadata", {}, pt);
  CHECK(SafeTensors::open(folder / "metadata").metadata() == pt);
  CHECK(contains(message([&] { bert::save_safetensors(folder / "f", {tensors[0], tensors[0]}, {}); }), ": b: this name"));
  CHECK(contains(message([&] { bert::save_safetensors(folder / "f", {{"__metadata__", {}, x.data()}}, {}); }), "__metadata__"));
  CHECK(SafeTensors::open(folder / "f").entries().size() == 3);  // still the old one
}

TEST_CASE("save_safetensors: F16 and BF16 are rounded to nearest even, and what is too large is refused by name") {
  testing::TemporaryFolder folder;
  auto written = [&](const std::vector<float>& x, const char* dtype) {
    bert::save_safetensors(folder / "f", {{"a", {(int64_t)x.size()}, x.data()}}, {}, dtype);
    const SafeTensors file = SafeTensors::open(folder / "f");
    CHECK(file.entries()[0].dtype == dtype);
    const bert::Tensor t = file.load(file.entries()[0]);
    return std::vector<float>(t.data(), t.data() + t.size());
  };
  CHECK(written({1, -2, 0.1f, 65504, 65519, 0x1p-24f, 0x1p-25f, 0x1.8p-24f, -0x1.8p-25f, 0x1.ffcp-15f, 1 + 0x1p-11f, 1 + 0x3p-11f},
                "F16") == std::vector<float>{1, -2, 0x1.998p-4f, 65504, 65504, 0x1p-24f, 0, 0x1p-23f, -0x1p-24f, 0x1p-14f, 1, 1 + 0x1p-9f});
  CHECK(written({1, -2, 0.1f, 1e30f, 1 + 0x1p-8f, 1 + 0x3p-8f, 0x1p-140f}, "BF16") ==
        std::vector<float>{1, -2, 0x1.9ap-4f, 0x1.94p+99f, 1, 1 + 0x1p-6f, 0x1p-133f * 0});
  CHECK(contains(message([&] { written({1, 65520}, "F16"); }), "f: a: element 1 is 65520, too large for F16; bf16 or f32 hold it"));
  CHECK(contains(message([&] { written({3.4e38f}, "BF16"); }), "too large for BF16"));
  CHECK(contains(message([&] { written({1}, "I8"); }), "I8 is not written"));
  // every half is read and written back as itself
  std::vector<float> halves;
  for (uint32_t i = 0; i < 0x7C00; i++) halves.push_back(i < 0x400 ? (float)i * 0x1p-24f : std::bit_cast<float>((i << 13) + (112u << 23)));
  CHECK(written(halves, "F16") == halves);
}

// ==== narrow matrices ===============================================================================================
namespace {
using bert::NamedTensor;
using bert::NarrowMatrix;
using bert::Precision;

// What SafeTensors::narrow says of the matrix "m" with the scales "m_scale", each by type, shape and bytes; "" when it is read.
struct Part {
  std::string dtype, shape, data;
};
std::string narrow_error(const Part& matrix, const std::optional<Part>& scales) {
  auto entry = [](const std::string& name, const Part& p, size_t begin) {
    return "\"" + name + "\":{\"dtype\":\"" + p.dtype + "\",\"shape\":" + p.shape + ",\"data_offsets\":[" + std::to_string(begin) + "," +
           std::to_string(begin + p.data.size()) + "]}";
  };
  const std::string header = "{" + entry("m", matrix, 0) + (scales ? "," + entry("m_scale", *scales, matrix.data.size()) : "") + "}";
  const std::string bytes = container(header, matrix.data + (scales ? scales->data : ""));
  return message([&] {
    const SafeTensors file = SafeTensors::parse(bytes, "f.safetensors");
    file.narrow(*file.find("m"), file.find("m_scale"));
  });
}

// The tiny model in int8, its tensors as they are in the file, for a test to change and write back.
struct Int8Folder {
  testing::TemporaryFolder folder;
  std::vector<NamedTensor> tensors;
  Int8Folder() {
    const bert::ModelFolder plain = bert::load_folder("tests/golden/models/tiny-pretrain", false);
    bert::Bert narrow = plain.bert;
    for (int64_t part = 0; part < bert::quantized_parts(plain.config); part++)
      bert::narrow_part(narrow, part, plain.bert, part == 2 ? Precision::bf16 : Precision::int8);
    narrow.config.quantized = Precision::int8;
    bert::save_folder(folder.path, narrow, plain.carried);
    const SafeTensors file = SafeTensors::open(folder / "model.safetensors");
    for (const SafeTensors::Entry& e : file.entries()) {
      NamedTensor t{e.name, bert::Shape(std::span<const int64_t>(e.shape)), nullptr};
      if (e.dtype == "F32")
        kept_.push_back(file.load(e)), t.data = kept_.back().data();
      else
        t.narrow = file.narrow(e, file.find(e.name + "_scale"));
      tensors.push_back(t);
    }
  }
  NamedTensor& at(const std::string& name) {
    for (NamedTensor& t : tensors)
      if (t.name == name) return t;
    throw Error("no " + name);
  }
  void remove(const std::string& name) {
    std::erase_if(tensors, [&](const NamedTensor& t) { return t.name == name; });
  }
  NarrowMatrix narrowed(const std::string& name, Precision precision) {  // anew
    const NarrowMatrix was = *at(name).narrow;
    const bert::Tensor numbers({was.n, was.k});
    for (int64_t i = 0; i < was.n; i++) was.widen(i, numbers.data() + i * was.k);
    return bert::narrowed(numbers, precision);
  }
  // What loading says, whatever is asked for; it is one line that names the file.
  std::string error() {
    bert::save_safetensors(folder / "model.safetensors", tensors, {});
    const std::string first = message([&] { bert::load_folder(folder.path); });
    CHECK((first.empty() || contains(first, folder / "model.safetensors: ")));
    CHECK(!contains(first, "\n"));
    return first;
  }
  std::string error_as_numbers() {
    return message([&] { bert::load_folder(folder.path, false); });
  }

 private:
  std::vector<bert::Tensor> kept_;
};
}  // namespace

TEST_CASE("safetensors: narrow matrices with what is wrong about them or their scales, naming file and tensor") {
  const Part int8{"I8", "[2,3]", "\1\2\3\xFF\x81\x80"s}, scales{"F32", "[2]", bytes_of<float>({0.5f, 2})};
  const Part bf16{"BF16", "[1,3]", bytes_of<uint16_t>({0x3F80, 0xC000, 0x7F7F})};
  CHECK(narrow_error(int8, scales) == "");
  CHECK(narrow_error(bf16, {}) == "");
  CHECK(narrow_error({"I8", "[0,3]", ""}, Part{"F32", "[0]", ""}) == "");
  const std::string at = "f.safetensors: m: ", of_scale = "f.safetensors: m_scale: ";
  CHECK(narrow_error(int8, {}) == at + "int8 without its scales; m_scale [2] is needed beside it");
  for (const Part& wrong : {Part{"F32", "[3]", bytes_of<float>({1, 1, 1})},
                            {"F32", "[2,1]", scales.data},
                            {"F32", "[]", bytes_of<float>({1})},
                            {"F32", "[0]", ""}})
    CHECK(narrow_error(int8, wrong) == at + "int8 with scales of shape " + wrong.shape + "; m_scale [2] is needed beside it");
  CHECK(contains(narrow_error(int8, Part{"I32", "[2]", scales.data}), of_scale + "dtype I32 where a float"));
  CHECK(contains(narrow_error(int8, Part{"I8", "[2]", "\1\1"}), of_scale + "dtype I8 where a float"));
  CHECK(contains(narrow_error(int8, Part{"F32", "[2]", bytes_of<float>({1, NAN})}), of_scale + "element 1 of [2] is nan"));
  CHECK(contains(narrow_error(int8, Part{"F32", "[2]", bytes_of<float>({-INFINITY, 1})}), of_scale + "element 0 of [2] is -inf"));
  for (const int damaged : {0x7F80, 0xFF80, 0x7FC0, 0xFF81})
    CHECK(contains(narrow_error({"BF16", "[1,3]", bytes_of<uint16_t>({1, 2, (uint16_t)damaged})}, {}),
                   at + "element 2 of [1,3] is not finite"));
  for (const Part& other : {Part{"I8", "[6]", int8.data},
                            {"I8", "[1,2,3]", int8.data},
                            {"U8", "[2,3]", int8.data},
                            {"BF16", "[3]", int8.data},
                            {"F32", "[1,1]", "\0\0\0\0"s}})
    CHECK(narrow_error(other, {}) == at + other.dtype + " " + other.shape + ", where a matrix of BF16 or I8 is needed");
  const std::string bytes = container(
      "{\"m\":{\"dtype\":\"I8\",\"shape\":[2,3],\"data_offsets\":[0,6]},"
      "\"m_scale\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[6,14]}}",
      int8.data + scales.data);
  const SafeTensors file = SafeTensors::parse(bytes, "f");
  const NarrowMatrix m = file.narrow(*file.find("m"), file.find("m_scale"));
  std::vector<float> rows(6);
  m.widen(0, rows.data()), m.widen(1, rows.data() + 3);
  CHECK(rows == std::vector<float>{0.5, 1, 1.5, -2, -254, -256});
}

TEST_CASE(
    "folders of narrow weights: scales that lack, do not fit or are left over, and types that do not go together, are refused by name") {
  const std::string query = "bert.encoder.layer.0.attention.self.query.weight", key = "bert.encoder.layer.0.attention.self.key.weight",
                    value = "bert.encoder.layer.0.attention.self.value.weight", up = "bert.encoder.layer.0.intermediate.dense.weight",
                    later = "bert.encoder.layer.1.intermediate.dense.weight", bias = "bert.encoder.layer.0.intermediate.dense.bias";
  CHECK(Int8Folder().error() == "");
  const std::vector<float> ones(200, 1.f);
  auto both = [](Int8Folder& f, const std::string& part) {
    CHECK_MESSAGE(contains(f.error(), part), f.error());
    CHECK_MESSAGE(contains(f.error_as_numbers(), part), f.error_as_numbers());
  };
  {
    Int8Folder f;
    f.remove(up + "_scale");
    both(f, ": " + up + ": int8 without its scales; " + up + "_scale [64] is needed");
  }
  {
    Int8Folder f;
    f.at(up + "_scale").shape = {63};
    both(f, ": " + up + ": int8 with scales of shape [63]; " + up + "_scale [64] is needed");
  }
  {
    Int8Folder f;
    std::vector<float> scales = ones;
    scales[3] = NAN, f.at(up + "_scale").data = scales.data();
    both(f, ": " + up + "_scale: element 3 of [64] is nan");
  }
  {
    Int8Folder f;
    f.at(up + "_scale").narrow = bert::narrowed(bert::Tensor({64, 1}, 1.f), Precision::int8);
    both(f, ": " + up + "_scale: dtype I8 where a float");
  }
  {
    Int8Folder f;
    f.at(bias).narrow = bert::narrowed(bert::Tensor({64, 1}, 1.f), Precision::int8);
    f.tensors.push_back({bias + "_scale", {64}, ones.data()});
    both(f, ": " + bias + ": I8 [64], where a matrix of BF16 or I8 is needed");
  }
  {
    Int8Folder f;
    const bert::Tensor numbers({64, 32}, 0.25f);
    f.at(up).narrow = {}, f.at(up).data = numbers.data();
    both(f, ": unexpected " + up + "_scale");
    f.remove(up + "_scale");
    CHECK(f.error() == "");
    f.tensors.push_back({later + "_scale", {64}, ones.data()});  // of one in bf16
    both(f, ": unexpected " + later + "_scale");
  }
  {
    Int8Folder f;  // bytes of another type would be taken for numbers of this one
    f.at(key).narrow = f.narrowed(key, Precision::bf16), f.remove(key + "_scale");
    CHECK_MESSAGE(contains(f.error(), ": " + key + ": BF16, of another type than the query's"), f.error());
    CHECK(f.error_as_numbers() == "");
  }
  for (const std::string& other : {query, key, value}) {
    Int8Folder f;
    const bert::Tensor numbers({32, 32}, 0.25f);
    f.at(other).narrow = {}, f.at(other).data = numbers.data(), f.remove(other + "_scale");
    CHECK_MESSAGE(contains(f.error(), "of another type than the query's"), f.error());
    CHECK(f.error_as_numbers() == "");
    CHECK(message([&] { bert::load_folder(f.folder.path, true, Precision::f32); }) == "");
    f.remove(query);
    CHECK(contains(f.error(), ": missing " + query));
  }
}

TEST_CASE("config.json: quantized is bf16 or int8") {
  const std::string was = bert::read_file("tests/golden/models/tiny-pretrain/config.json");
  auto config = [&](const std::string& quantized) { return "{\"quantized\": " + quantized + "," + was.substr(was.find('{') + 1); };
  auto error = [&](const std::string& quantized) { return message([&] { bert::Config::parse(config(quantized), "c.json"); }); };
  CHECK(error("\"int4\"") == "c.json: quantized: 'int4'; it may be bf16 or int8");
  CHECK(error("\"f32\"") == "c.json: quantized: 'f32'; it may be bf16 or int8");
  CHECK(error("\"INT8\"") == "c.json: quantized: 'INT8'; it may be bf16 or int8");
  for (const char* wrong : {"8", "true", "[\"int8\"]", "{}"}) CHECK(error(wrong) == "c.json: quantized: not a string");
  for (const Precision p : {Precision::bf16, Precision::int8}) {
    const bert::Config c = bert::Config::parse(config("\"" + std::string(bert::name_of(p)) + "\""), "c.json");
    CHECK(c.quantized == p);
    CHECK(bert::Config::parse(c.to_json(), "c.json").quantized == p);
  }
  CHECK(!bert::Config::parse(config("null"), "c.json").quantized);
  CHECK(!contains(bert::Config::parse(was, "c.json").to_json(), "quantized"));
}

TEST_CASE("save_safetensors: several types in one file lie aligned, each as it is, the same bytes in any order") {
  testing::TemporaryFolder folder;
  const std::vector<float> x{1, -2, 3, 127, -5, 0.5f, 9};
  const bert::Tensor matrix({1, 7}, x);
  const NarrowMatrix bf16 = bert::narrowed(matrix, Precision::bf16), int8 = bert::narrowed(matrix, Precision::int8);
  std::vector<NamedTensor> tensors{{"a", {1, 7}, nullptr, int8}, {"a_scale", {1}, int8.scales.data()},
                                   {"b", {1, 7}, nullptr, bf16}, {"c", {7}, x.data()},
                                   {"d", {1, 7}, nullptr, int8}, {"d_scale", {1}, int8.scales.data()}};
  for (const char* dtype : {"F32", "BF16", "F16"}) {
    CAPTURE(dtype);
    bert::save_safetensors(folder / "f", tensors, {}, dtype);
    std::reverse(tensors.begin(), tensors.end());
    bert::save_safetensors(folder / "g", tensors, {}, dtype);
    CHECK(bert::read_file(folder / "f") == bert::read_file(folder / "g"));
    const std::string bytes = bert::read_file(folder / "f");
    const SafeTensors file = SafeTensors::open(folder / "f");
    uint64_t data_at = 0;
    std::memcpy(&data_at, bytes.data(), 8), data_at += 8;
    CHECK(file.entries().size() == 6);
    for (const SafeTensors::Entry& e : file.entries()) {
      const std::string want = e.name == "a" || e.name == "d" ? "I8" : e.name == "b" ? "BF16" : dtype;
      CHECK(e.dtype == want);
      CHECK((data_at + e.begin) % (want == "F32" ? 4 : want == "I8" ? 1 : 2) == 0);
    }
    const NarrowMatrix a = file.narrow(*file.find("a"), file.find("a_scale")), b = file.narrow(*file.find("b"), nullptr);
    CHECK((a.precision == Precision::int8 && b.precision == Precision::bf16));
    CHECK(std::string_view(a.data, 7) == std::string_view(int8.data, 7));
    CHECK(std::string_view(b.data, 14) == std::string_view(bf16.data, 14));
    if (dtype == "F32"s) CHECK(a.scales == int8.scales);
  }
  tensors.push_back({"a", {7}, x.data()});
  CHECK(contains(message([&] { bert::save_safetensors(folder / "f", tensors, {}); }), ": a: this name can stand only once"));
}

// ==== pytorch_model.bin ===========================================================================================
namespace {
std::string torch_error(const std::string& bytes) {
  return message([&] { SafeTensors::parse_torch(bytes, "f.bin"); });
}
// A legacy file around one pickled object; `data` follows the list of storages.
std::string legacy(const std::string& object, const std::string& keys = "]", const std::string& data = "") {
  return "\x80\2\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\2M\xe9\x03.\x80\2}.\x80\2"s + object + ".\x80\2" + keys + "." + data;
}
std::string pickled(const std::string& text) { return "X" + std::string(1, (char)text.size()) + "\0\0\0"s + text; }
// A tensor "name" over storage "0" of `count` floats: offset, shape and strides as pickled.
std::string tensor(const std::string& name, int count, const std::string& offset, const std::string& shape, const std::string& strides) {
  return pickled(name) + "ctorch._utils\n_rebuild_tensor_v2\n((" + pickled("storage") + "ctorch\nFloatStorage\n" + pickled("0") +
         pickled("cpu") + "K" + (char)count + "tQ" + offset + shape + strides + "\x89}tR";
}
}  // namespace

TEST_CASE("pytorch_model.bin: views, strides and shared storages are read as torch means them") {
  const std::string data = "\6\0\0\0\0\0\0\0"s + bytes_of<float>({0, 1, 2, 3, 4, 5}), keys = "](" + pickled("0") + "e";
  const std::string object = "}(" + tensor("plain", 6, "K\0"s, "K\2K\3\x86", "K\3K\1\x86") +
                             tensor("turned", 6, "K\0"s, "K\3K\2\x86", "K\1K\3\x86") + tensor("part", 6, "K\2", "K\3\x85", "K\1\x85") +
                             tensor("one", 6, "K\5", ")", ")") + tensor("none", 6, "K\0"s, "K\0\x85"s, "K\1\x85") + "u";
  const std::string bytes = legacy(object, keys, data);  // which the views are into
  const SafeTensors file = SafeTensors::parse_torch(bytes, "f.bin");
  auto values = [&](const char* name) {
    const bert::Tensor t = file.load(*file.find(name));
    return std::vector<float>(t.data(), t.data() + t.size());
  };
  CHECK(values("plain") == std::vector<float>{0, 1, 2, 3, 4, 5});
  CHECK(values("turned") == std::vector<float>{0, 3, 1, 4, 2, 5});
  CHECK(values("part") == std::vector<float>{2, 3, 4});
  CHECK(values("one") == std::vector<float>{5});
  CHECK(values("none").empty());
}

TEST_CASE("pytorch_model.bin: what is no dict of tensors is refused, and nothing is run") {
  const std::string data = "\4\0\0\0\0\0\0\0"s + std::string(16, '\0'), keys = "](" + pickled("0") + "e";
  auto one = [&](const std::string& offset, const std::string& shape, const std::string& strides) {
    return torch_error(legacy("}(" + tensor("a", 4, offset, shape, strides) + "u", keys, data));
  };
  CHECK(one("K\0"s, "K\4\x85", "K\1\x85") == "");
  CHECK(contains(one("K\1", "K\4\x85", "K\1\x85"), "f.bin: a: needs 5 elements, storage 0 has 4"));
  CHECK(contains(one("K\0"s, "K\5\x85", "K\0\x85"s), "f.bin: a: shape [5] is too large"));  // expanded: more than its storage
  CHECK(contains(one("J\xff\xff\xff\xff", "K\4\x85", "K\1\x85"), "f.bin: a: offset"));
  CHECK(contains(one("K\0"s, "K\4\x85", "J\xff\xff\xff\xff\x85"), "f.bin: a: negative stride"));
  CHECK(contains(one("K\0"s, "K\2K\2\x86", "K\2\x85"), "f.bin: a: shape and strides differ in rank"));
  CHECK(contains(one("K\0"s, "\x8a\x08\0\0\0\0\0\0\0\x40K\4\x86"s, "K\0K\0\x86"s), "f.bin: a: shape"));
  for (const auto& bad : {std::pair{"cos\nsystem\n)R"s, "forbidden global os.system"},
                          {"\x8c\5posix\x8c\6system\x93"s, "forbidden global posix.system"},
                          {"ctorch\nload\n"s, "forbidden global torch.load"},
                          {"ccollections\nOrderedDict\nK\1\x85R"s, "builds no tensor"},
                          {"i"s, "unknown opcode 0x69"},
                          {"0"s, "unknown opcode 0x30"},
                          {"K\5"s, "not a dict of tensors"},
                          {"}K\5K\6s"s, "a key that is not a string"},
                          {"}" + pickled("a") + "Ns", "f.bin: a: not a tensor"},
                          {"}" + pickled("a") + "h\7s", "memo 7 unknown"},
                          {"}K\1s"s, "stack underflow"},
                          {"}(K\1u"s, "a key without value"},
                          {"}q\0(K\1h\0u"s, "a key that is not a string"},
                          {"}q\0("s + pickled("a") + "h\0u"s, "f.bin: a: not a tensor"},
                          {"}(" + pickled("a") + ")Qu", "f.bin: a: not a tensor"},
                          {"(0"s, "unknown opcode"},
                          {std::string(400000, ']'), "steps"},
                          {"X\xff\xff\xff\xff"s, "ends inside"}}) {
    const std::string m = torch_error(legacy(bad.first));
    CHECK_MESSAGE(contains(m, bad.second), m);
  }
  // a tensor of thousands of numbers under thousands of names: many times the file
  std::string many = "}(";
  for (int i = 0; i < 200; i++) many += tensor("t" + std::to_string(i), 100, "K\0"s, "K\x64\x85", "K\1\x85");
  CHECK(torch_error(legacy(many + "u", keys, "\x64\0\0\0\0\0\0\0"s + std::string(400, '\0'))) == "");
  std::string big = "}(";
  for (int i = 0; i < 2000; i++) big += pickled("t" + std::to_string(i)) + "h\1";
  const std::string first = tensor("a", 0, "K\0"s, "M\x10\x27\x85", "K\1\x85");
  std::string wide = first;
  wide.replace(wide.find("K\0tQ"s), 2, "M\x10\x27");
  const std::string shared_often = "}(" + wide + "q\1" + big.substr(2) + "u";
  CHECK(contains(torch_error(legacy(shared_often, keys, "\x10\x27\0\0\0\0\0\0"s + std::string(40000, '\0'))), "many times the file"));
}

TEST_CASE("pytorch_model.bin: every cut and every changed byte of a good file is refused or read, and nothing worse") {
  for (const char* name : {"good-tiny-zip.bin", "good-tiny-legacy.bin"}) {
    const std::string good = bert::read_file("tests/golden/files/"s + name);
    auto read = [](const std::string& bytes) {
      const std::unique_ptr<char[]> exact(new char[bytes.size()]);  // so that a sanitizer sees one byte too far
      std::copy(bytes.begin(), bytes.end(), exact.get());
      return message([&] {
        const SafeTensors file = SafeTensors::parse_torch({exact.get(), bytes.size()}, "f");
        for (const auto& e : file.entries()) file.load(e);
      });
    };
    CHECK(read(good) == "");
    int refused = 0;
    for (size_t n = 0; n < good.size(); n++) refused += read(good.substr(0, n)) != "";
    CHECK(refused == (int)good.size());
    bert::Random random({9, 0, 0, 0});
    for (int i = 0; i < 20000; i++) {
      std::string bytes = good;
      for (int64_t k = 1 + random.below(3); k > 0; k--) bytes[(size_t)random.below((int64_t)bytes.size())] = (char)random.below(256);
      refused += read(bytes) != "";
    }
    CHECK(refused > 5000);
  }
}

// ==== golden files ================================================================================================
namespace {
void refuse_all(const std::string& folder, size_t at_least) {
  size_t n = 0;
  for (const auto& f : std::filesystem::directory_iterator(folder)) {
    const std::string path = f.path().string(), name = f.path().filename().string();
    const bool torch = f.path().extension() == ".bin";
    if (!torch && f.path().extension() != ".safetensors") continue;
    const bool legal = name.starts_with("good-") || name.starts_with("weird-but-legal-") || name == "zip-traversal.bin";
    const auto start = std::chrono::steady_clock::now();
    const std::string m = message([&] {
      const SafeTensors file = torch ? SafeTensors::open_torch(path) : SafeTensors::open(path);
      for (const auto& e : file.entries()) file.load(e);
    });
    CHECK_MESSAGE((m == "") == legal, path << ": " << m);
    if (!legal) CHECK_MESSAGE(m.starts_with(path + ": "), m);
    CHECK(seconds_since(start) < 5);
    n++;
  }
  CHECK(n >= at_least);
}
}  // namespace

TEST_CASE("golden files: bad ones are refused, odd but legal ones are read") { refuse_all("tests/golden/files", 50); }

TEST_CASE("golden files: all of the larger collection") {
  SKIP_WITHOUT(shared + "golden/models/files/bad");
  refuse_all(shared + "golden/models/files/bad", 90);
  auto wrong = [](const std::string& name) {
    return message([&] {
      const SafeTensors file = SafeTensors::open(shared + "golden/models/files/bad/" + name + ".safetensors");
      for (const auto& e : file.entries()) file.load(e);
    });
  };
  CHECK(contains(wrong("nan-weights"), "element 1 of [4] is nan"));
  CHECK(contains(wrong("int-weights"), "word_embeddings"));
  CHECK(contains(wrong("int-weights"), "dtype I32 where a float is needed"));
}

TEST_CASE("golden files: what is read is written back byte for byte as the reference library wrote it") {
  testing::TemporaryFolder folder;
  const std::string path = "tests/golden/models/tiny-pretrain/model.safetensors";
  const SafeTensors file = SafeTensors::open(path);
  std::vector<bert::Tensor> keep;
  std::vector<bert::NamedTensor> tensors;
  for (const auto& e : file.entries()) {
    keep.push_back(file.load(e));
    tensors.push_back({e.name, keep.back().shape(), keep.back().data()});
  }
  std::reverse(tensors.begin(), tensors.end());
  bert::save_safetensors(folder / "f", tensors, file.metadata());
  CHECK(bert::read_file(folder / "f") == bert::read_file(path));
}

TEST_CASE("golden files: one model in four dtypes") {
  SKIP_WITHOUT(shared + "golden/models/files/p-f64/model.safetensors");
  const SafeTensors f32 = SafeTensors::open("tests/golden/models/tiny-pretrain/model.safetensors");
  const struct {
    const char* folder;
    double relative;
  } cases[] = {{"p-f64", 0}, {"c-f16", 0x1p-11}, {"d-bf16", 0x1p-8}};
  for (const auto& c : cases) {
    const SafeTensors other = SafeTensors::open(shared + "golden/models/files/" + c.folder + "/model.safetensors");
    REQUIRE(other.entries().size() == f32.entries().size());
    int bad = 0;
    for (const auto& e : f32.entries()) {
      const bert::Tensor a = f32.load(e), b = other.load(*other.find(e.name));
      REQUIRE(a.shape() == b.shape());
      for (int64_t i = 0; i < a.size(); i++)
        bad += std::fabs(a.data()[i] - b.data()[i]) > c.relative * std::fabs(a.data()[i]) + (c.relative ? 0x1p-25 : 0);
    }
    CHECK_MESSAGE(bad == 0, c.folder);
  }
}
