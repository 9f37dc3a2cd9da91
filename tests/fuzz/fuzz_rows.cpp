// Throws arbitrary bytes at the readers of rows (tables, JSON lines, CoNLL, SQuAD, fasttext, ids), with clang's libFuzzer. The first
// two bytes say the format, the task and what else the reader was told; the rest is the file.
//
// Whatever it is, a line becomes a row or one Error, and of a row holds what the commands take for granted.
#define main bert_main
#include "main.cpp"
#undef main

#include <sys/mman.h>

namespace bert {

static void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "a row's %s\n", what);
  std::abort();
}

static Source source_of(uint8_t format, uint8_t flags, const std::string& path) {
  static constexpr std::optional<Task> tasks[] = {{}, Task::classify, Task::regress, Task::tag, Task::qa, Task::choice, Task::embed};
  Source s;
  s.files = {path};
  s.format = (Format)(1 + format % 8);
  s.task = tasks[format / 8 % std::size(tasks)];
  s.header = !(flags & 1), s.skip_bad = flags & 2, s.labels = flags & 4, s.word_lists = flags & 8, s.raw = flags & 16;
  s.keep_bytes = flags & 32, s.training = format & 128;
  if (!s.header || flags & 64) s.columns = flags & 128 ? "text=0,pair=1,label=2" : "text=1,label=0";
  return s;
}

static void check(const Row& row, const Source& s) {
  require(!row.where.empty(), "place");
  require(s.keep_bytes || (valid_utf8(row.text) && valid_utf8(row.pair.value_or(""))), "text is not UTF-8");
  require(row.ids.size() == row.segments.size(), "segments");
  if (s.labels && s.format == kConll) require(row.told.answers.size() == row.words.size(), "tags");
  require(row.told.starts.empty() || row.told.starts.size() == row.told.answers.size(), "starts of answers");
  for (size_t i = 0; i < row.told.starts.size(); i++)
    require(row.pair && row.pair->compare((size_t)row.told.starts[i], row.told.answers[i].size(), row.told.answers[i]) == 0, "answer");
}

}  // namespace bert

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int file = memfd_create("rows", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(file);
  bert::quiet = true;
  if (size < 2 || ftruncate(file, 0) || pwrite(file, data + 2, size - 2, 0) != (ssize_t)size - 2) return -1;
  const bert::Source source = bert::source_of(data[0], data[1], path);
  try {
    bert::Rows rows(source);
    for (bert::Row row; rows.next(row);) bert::check(row, source);
  } catch (const bert::Error&) {}
  return 0;
}
