// The tokenizer stands alone: bert.h, tensor.h and wordpiece.cpp, without OpenBLAS, tensor.cpp or anything else.
#include "bert.h"

int main() {
  const bert::WordPiece tokenizer = bert::WordPiece::from_vocab("[UNK]\n[CLS]\n[SEP]\nhel\n##lo\n,\nworld\n", {}, "a vocabulary of seven");
  const bert::Encoding e = tokenizer.encode("H\u00E9llo, WORLD");
  std::printf("%s\n", tokenizer.decode(e.ids).c_str());
  return tokenizer.decode(e.ids, true) == "hello, world" ? 0 : 1;
}
