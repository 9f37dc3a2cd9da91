// The drop-in set "BERT": a program that embeds two texts with a model folder and prints their cosine.
#include <cmath>
#include <cstdio>

#include "bert.h"

int main(int argc, char** argv) try {
  const bert::Model model = bert::Model::load(argc > 1 ? argv[1] : "tests/golden/models/tiny-pretrain");
  const std::vector<float> a = model.embed("the dog sleeps"), b = model.embed("the old man reads");
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); i++) ab += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
  std::printf("%zu numbers, cosine %.6f\n", a.size(), ab / std::sqrt(aa * bb));
} catch (const bert::Error& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
