// The drop-in set "BERT", training: a classifier from a model folder and a few labelled texts, saved, loaded, and asked.
#include <cstdio>

#include "bert.h"

int main(int argc, char** argv) try {
  using namespace bert;
  const std::string from = argc > 1 ? argv[1] : "tests/golden/models/tiny-pretrain", to = argc > 2 ? argv[2] : "build/finetuned";
  const std::pair<const char*, int> texts[] = {{"the dog sleeps", 0}, {"the old man reads", 1}, {"a dog", 0}, {"an old man", 1}};
  ModelFolder start = load_folder_for(from, Task::classify, {"animal", "human"}, 1);
  std::vector<Example> examples;
  for (const auto& [text, label] : texts) {
    const Item item = {text, {}};
    for (const Example& e : make_examples(Task::classify, make_windows(start.tokenizer, Task::classify, item, 32, 8), {.label = label}))
      examples.push_back(e);
  }
  TrainSettings settings;
  settings.steps = 40, settings.lr = 1e-2;
  Trainer trainer(std::move(start.bert), settings);
  FinetuneSampler sampler(examples, 4, 1, settings.seed);
  while (trainer.done() < settings.steps) trainer.step(sampler.next(trainer.done()));
  save_folder(to, trainer.model(), start.carried);
  const Model model = Model::load(to);
  for (const auto& [text, label] : texts) std::printf("%s: %s\n", text, model.classify(text)[(size_t)label] > 0.5f ? "right" : "wrong");
} catch (const bert::Error& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
