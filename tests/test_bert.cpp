// The model against transformers' numbers, and what it promises: one answer, the same bytes, nothing silent.
#include <chrono>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <numeric>
#include <set>
#include <sstream>
#include <thread>
#include <tuple>

#include "testing.h"
using namespace bert;

namespace {
std::vector<float> flat(const Tensor& t) { return {t.data(), t.data() + t.size()}; }
const std::string kGolden = "tests/golden/models/";

std::vector<int32_t> ints(const Json& row, const char* key) {
  std::vector<int32_t> v;
  if (const Json* list = row.find(key))
    for (const Json& x : list->items(key)) v.push_back((int32_t)x.as_int(key));
  return v;
}

// The rows of a golden as one packed batch, with whatever labels they hold.
Batch read_rows(const std::vector<Json>& rows, bool multilabel, bool regression) {
  Batch batch;
  for (const Json& row : rows) {
    if (const Json* choices = row.find("choices")) {
      for (const Json& choice : choices->items("choices")) batch.add_row(ints(choice, "input_ids"), ints(choice, "token_type_ids"));
      batch.groups.push_back(batch.rows());
      batch.labels.push_back((int32_t)row.find("label")->as_int("label"));
      continue;
    }
    for (const int32_t label : ints(row, "labels")) batch.labels.push_back(label);
    for (const char* end : {"start", "end"})
      if (const Json* at = row.find(end)) batch.labels.push_back((int32_t)at->as_int(end));
    for (const int32_t p : ints(row, "masked_positions")) batch.masked.push_back(batch.tokens() + p);
    for (const int32_t id : ints(row, "masked_labels")) batch.masked_labels.push_back(id);
    batch.add_row(ints(row, "input_ids"), ints(row, "token_type_ids"));
    if (const Json* next = row.find("next_sentence_label")) batch.labels.push_back((int32_t)next->as_int("next"));
    const Json* label = row.find("label");
    if (!label) continue;
    if (multilabel)
      for (const int32_t t : ints(row, "label")) batch.targets.push_back((float)t);
    else if (regression)
      batch.targets.push_back((float)label->as_double("label"));
    else
      batch.labels.push_back((int32_t)label->as_int("label"));
  }
  return batch;
}
Batch read_rows(const std::string& path, Task task) {
  return read_rows(Json::parse(read_file(path), path).items(path), task == Task::multilabel, task == Task::regress);
}

// Largest difference of `got` from the golden tensor `name`.
double difference(const SafeTensors& golden, const std::string& name, const float* got, int64_t n) {
  const SafeTensors::Entry* e = golden.find(name);
  REQUIRE_MESSAGE(e, name);
  const Tensor want = golden.load(*e);
  REQUIRE(want.size() == n);
  return testing::largest_difference(got, want.data(), n);
}
double golden_number(const std::string& folder, const char* key) {
  return Json::parse(read_file(folder + "/golden.json"), folder).find(key)->as_double(key);
}

// A folder ready to train: its own weights, every parameter with a gradient.
ModelFolder trainable(const std::string& folder) {
  const Config c = Config::parse(read_file(folder + "/config.json"), folder);
  ModelFolder m = load_folder_for(folder, head_kind(c).task, c.labels, 1);
  for (const Parameter& p : m.bert.parameters()) Tensor(p.tensor).set_needs_grad();
  return m;
}

void check_gradients(const Bert& model, const SafeTensors& golden, double tolerance, double zero_tolerance) {
  for (const Parameter& p : model.parameters()) {
    CAPTURE(p.name);  // the failing tensor is named in the log
    REQUIRE(p.tensor.has_grad());
    const float* grad = p.tensor.grad() + (p.data() - p.tensor.data());
    const bool zero = p.name.ends_with("key.bias");  // true value 0
    CHECK(difference(golden, "grad." + p.name, grad, p.shape().size()) < (zero ? zero_tolerance : tolerance));
  }
}
}  // namespace

// Tolerances: four times the float32 error of torch that the golden's README measured.
TEST_CASE("golden: every output, loss and gradient of a pretraining model, both activations") {
  for (const char* name : {"tiny-pretrain", "tiny-pretrain-gelu-new"}) {
    CAPTURE(name);
    const std::string folder = kGolden + name;
    ModelFolder m = trainable(folder);
    CHECK(m.report.newly_initialised.empty());
    CHECK(m.report.ignored.empty());
    const SafeTensors golden = SafeTensors::open(folder + "/golden.safetensors");
    const Batch batch = read_rows(folder + "/rows.json", Task::pretrain);
    CHECK(batch.tokens() == 127);
    Dropout none;
    for (size_t l = 0; l <= 2; l++) {  // the output of layer l: a model that ends there
      Bert first = m.bert;
      first.layers.resize(l);
      const std::string what = l ? "layer_" + std::to_string(l - 1) : "embedding_output";
      CAPTURE(what);
      const Tensor x = first.forward(batch, none);
      CHECK(difference(golden, what, x.data(), x.size()) < 4 * (l == 0 ? 5.04e-7 : l == 1 ? 9.51e-7 : 1.38e-6));
    }
    for (const Tokens& read : {Tokens(), m.bert.read_by_head(batch)}) {  // every token's output; those that the head reads
      Tape tape;
      const Tensor hidden = m.bert.forward(batch, none, false, read);
      const Tensor pooled = m.bert.pooled(hidden, batch), mlm = m.bert.masked_logits(hidden, batch.masked),
                   nsp = m.bert.logits(hidden, batch, none);
      CHECK(difference(golden, "pooled", pooled.data(), pooled.size()) < 4 * 7.84e-7);
      CHECK(difference(golden, "mlm_logits", mlm.data(), mlm.size()) < 4 * 1.88e-6);
      CHECK(difference(golden, "nsp_logits", nsp.data(), nsp.size()) < 4 * 6.5e-7);
      Losses losses;
      const Tensor loss = batch_loss(m.bert, hidden, batch, {(double)batch.masked.size(), (double)batch.rows()}, none, losses);
      CHECK(std::fabs(losses.masked - golden_number(folder, "mlm_loss")) < 4 * 2.64e-7);
      CHECK(std::fabs(losses.next_sentence - golden_number(folder, "nsp_loss")) < 4 * 2.64e-7);
      CHECK(std::fabs(losses.total - golden_number(folder, "total_loss")) < 4 * 2.64e-7);
      tape.backward(loss);
      check_gradients(m.bert, golden, 4 * 5.99e-7, 4 * 1.79e-8);
      for (const Parameter& p : m.bert.parameters()) Tensor(p.tensor).drop_grad();
    }
  }
}

TEST_CASE("golden: ten optimiser steps, four ways") {
  struct Run {
    const char* name;
    bool google;
    double clip, loss, norm, final;
  };
  // loss, norm, final: the README's float32 - float64
  for (const Run& run :
       {Run{"adamw-noclip", false, 0, 6.4e-7, 5.6e-6, 2.6e-7}, Run{"adamw-clip1.0", false, 1, 5.9e-7, 6.0e-6, 2.7e-7},
        Run{"adamw-clip0.1", false, 0.1, 6.6e-7, 7.1e-6, 2.8e-7}, Run{"google-clip1.0", true, 1, 4.6e-7, 4.5e-6, 6.4e-7}}) {
    CAPTURE(run.name);
    const std::string folder = kGolden + "tiny-training/";
    std::vector<Batch> batches;
    const Json file = Json::parse(read_file(folder + "batches.json"), folder);
    for (const Json& b : file.items(folder)) batches.push_back(read_rows(b.find("rows")->items(folder), false, false));
    ModelFolder m = trainable(kGolden + "tiny-pretrain");
    std::vector<AdamW::Slot> slots;
    std::vector<Tensor> tensors;
    for (const Parameter& p : m.bert.parameters())
      if (!p.first_row) slots.push_back({p.tensor, {}, {}, p.decay()}), tensors.push_back(p.tensor);
    AdamWSettings settings;
    settings.google = run.google;
    if (run.google) settings.eps = 1e-6f;
    AdamW adam(settings, slots);
    std::ifstream log(folder + run.name + ".jsonl");
    for (int step = 0; step < 10; step++) {  // by hand: the golden's schedule is the library's, ours begins at (s + 1) / W
      CAPTURE(step);
      std::string line;
      REQUIRE(std::getline(log, line));
      const Json want = Json::parse(line, run.name);
      const Batch& batch = batches[(size_t)step % 4];
      Dropout none;
      Losses losses;
      {
        Tape tape;
        tape.backward(
            batch_loss(m.bert, m.bert.forward(batch, none), batch, {(double)batch.masked.size(), (double)batch.rows()}, none, losses));
      }
      const double norm = gradient_norm(tensors), lr = want.find("lr")->as_double("lr");
      CHECK(std::fabs(losses.total - want.find("loss")->as_double("loss")) < 4 * run.loss);
      CHECK(std::fabs(norm - want.find("grad_norm")->as_double("norm")) < 4 * run.norm);
      adam.step(lr, run.clip > 0 ? clip_factor(norm, run.clip, run.google) : 1);
      for (Tensor& t : tensors) t.drop_grad();
      if (step != 1 && step != 9) continue;
      const SafeTensors golden = SafeTensors::open(folder + run.name + (step == 1 ? ".step2" : ".final") + ".safetensors");
      for (const Parameter& p : m.bert.parameters()) {
        CAPTURE(p.name);  // key biases have no gradient but rounding, which Adam divides by its own size
        CHECK(difference(golden, p.name, p.data(), p.shape().size()) < (p.name.ends_with("key.bias") ? 5e-3 : 10 * run.final));
      }
    }
  }
}

TEST_CASE("golden: heads, their losses and every gradient") {
  struct Head {
    const char* name;
    Task task;
    double logits, loss, grad, zero;
  };
  for (const Head& h : {Head{"sequence-classification", Task::classify, 5.82e-7, 4.7e-9, 4.28e-7, 1.3e-8},
                        Head{"multi-label", Task::multilabel, 8.76e-7, 5.5e-8, 2.21e-7, 4.66e-9},
                        Head{"regression", Task::regress, 4.82e-7, 1.8e-6, 8.59e-6, 1.49e-7},
                        Head{"token-classification", Task::tag, 1.81e-6, 2.2e-7, 2.82e-7, 9.78e-9},
                        Head{"question-answering", Task::qa, 7.09e-7, 2.4e-7, 4.62e-7, 3.85e-8},
                        Head{"multiple-choice", Task::choice, 1.14e-6, 9.8e-9, 1.15e-6, 3.35e-8},
                        Head{"masked-lm", Task::mlm, 2.33e-6, 5.3e-7, 3.14e-7, 1.09e-8}}) {
    CAPTURE(h.name);
    const std::string folder = kGolden + "heads/" + h.name;
    ModelFolder m = trainable(folder);
    REQUIRE(m.bert.task == h.task);
    const SafeTensors golden = SafeTensors::open(folder + "/golden.safetensors");
    const Batch batch = read_rows(folder + "/rows.json", h.task);
    Dropout none;
    for (const Tokens& read : {Tokens(), m.bert.read_by_head(batch)}) {
      Losses losses;
      Tape tape;
      const Tensor hidden = m.bert.forward(batch, none, false, read);
      const Tensor logits = h.task == Task::mlm ? m.bert.masked_logits(hidden, batch.masked) : m.bert.logits(hidden, batch, none);
      if (h.task == Task::qa) {
        std::vector<float> start, end;
        for (int64_t i = 0; i < logits.rows(); i++) start.push_back(logits.data()[2 * i]), end.push_back(logits.data()[2 * i + 1]);
        CHECK(difference(golden, "start_logits", start.data(), batch.tokens()) < 4 * h.logits);
        CHECK(difference(golden, "end_logits", end.data(), batch.tokens()) < 4 * h.logits);
      } else {
        CHECK(difference(golden, "logits", logits.data(), logits.size()) < 4 * h.logits);
      }
      double rows = (double)(h.task == Task::choice ? (int64_t)batch.groups.size() - 1 : batch.rows());
      if (h.task == Task::tag)
        rows = (double)std::count_if(batch.labels.begin(), batch.labels.end(), [](int32_t l) { return l != kIgnored; });
      tape.backward(batch_loss(m.bert, hidden, batch, {(double)batch.masked.size(), rows}, none, losses));
      // a loss moves as far as its logits do: where the README's figure is below their error, it is luck
      CHECK(std::fabs(losses.total - golden_number(folder, "loss")) < std::max(4 * h.loss, h.logits));
      check_gradients(m.bert, golden, 4 * h.grad, 4 * std::max(h.zero, 1e-8));
      for (const Parameter& p : m.bert.parameters()) Tensor(p.tensor).drop_grad();
    }
  }
}

TEST_CASE("config: what is missing, absurd or not BERT is refused by name") {
  const std::string good = Config::named("tiny", 1000).to_json();
  const Config c = Config::parse(good, "config.json");
  CHECK(c.hidden_size == 128);
  CHECK(c.to_json() == good);
  auto with = [&](const std::string& from, const std::string& to) {
    std::string s = good;
    const size_t at = s.find(from);
    REQUIRE(at != std::string::npos);
    return s.replace(at, from.size(), to);
  };
  struct Bad {
    const char *from, *to, *named;
  };
  for (const Bad& b :
       {Bad{"\"hidden_size\": 128", "\"hidden_size\": 127", "num_attention_heads"},
        Bad{"\"hidden_size\": 128", "\"hidden_size\": 0", "hidden_size"},
        Bad{"\"hidden_size\": 128", "\"hidden_size\": -128", "hidden_size"},
        Bad{"\"hidden_size\": 128", "\"hidden_size\": 1e30", "hidden_size"},
        Bad{"\"hidden_size\": 128", "\"hidden_size\": 128.5", "hidden_size"},
        Bad{"\"hidden_size\": 128", "\"hidden_size\": \"128\"", "hidden_size"},
        Bad{"\"hidden_size\": 128", "\"hidden_sise\": 128", "hidden_size"},
        Bad{"\"vocab_size\": 1000", "\"vocab_size\": null", "vocab_size"},
        Bad{"\"hidden_act\": \"gelu\"", "\"hidden_act\": \"swish\"", "swish"}, Bad{"\"hidden_act\": \"gelu\",", "", "hidden_act"},
        Bad{"\"layer_norm_eps\": 1e-12", "\"layer_norm_eps\": -1", "layer_norm_eps"},
        Bad{"\"model_type\": \"bert\"", "\"model_type\": \"roberta\"", "roberta"}, Bad{"\"absolute\"", "\"relative_key\"", "relative_key"},
        Bad{"\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false, \"architectures\": [\"BertForMaskedLM\"]",
            "tie_word_embeddings"},
        Bad{"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 100000", "num_hidden_layers"},
        Bad{"\"vocab_size\": 1000", "\"vocab_size\": 1000, \"id2label\": [\"no\", \"yes\"]", "id2label"},
        Bad{"\"vocab_size\": 1000", "\"vocab_size\": 1000, \"window_length\": 513", "window_length"},
        Bad{"\"vocab_size\": 1000", "\"vocab_size\": 1000, \"num_labels\": 0", "num_labels"}}) {
    CAPTURE(b.to);
    try {
      Config::parse(with(b.from, b.to), "config.json");
      CHECK_MESSAGE(false, "accepted");
    } catch (const Error& e) {
      CAPTURE(e.what());
      CHECK(std::string(e.what()).starts_with("config.json"));
      CHECK(std::string(e.what()).find(b.named) != std::string::npos);
    }
  }
  CHECK_THROWS_AS(Config::named("huge", 10), Error);
  CHECK(Config::parse(with("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false"), "c").hidden_size == 128);  // no decoder
  CHECK(c.labels.empty());
  CHECK(Config::parse(with("\"vocab_size\": 1000", "\"vocab_size\": 1000, \"num_labels\": 3"), "c").labels ==
        std::vector<std::string>{"LABEL_0", "LABEL_1", "LABEL_2"});
}

TEST_CASE("parameters: counts of the published sizes, each name once") {
  struct Size {
    const char* name;
    int64_t encoder, pretraining;
  };
  for (const Size& s : {Size{"tiny", 4385920, 4433468}, Size{"mini", 11170560, 11267900}, Size{"small", 28763648, 29058876},
                        Size{"medium", 41373184, 41668412}}) {
    const Config c = Config::named(s.name, 30522);
    CHECK(Bert::empty(c, Task::embed).parameter_count() == s.encoder);
    const Bert model = Bert::empty(c, Task::pretrain);
    CHECK(model.parameter_count() == s.pretraining);
    std::map<std::string, int> names;
    for (const Parameter& p : model.parameters()) CHECK(++names[p.name] == 1);
  }
}

TEST_CASE("parameters: a shape that this machine cannot hold is refused before anything is allocated") {
  Config c = Config::named("large", 1 << 24);
  c.hidden_size = 1 << 13, c.num_attention_heads = 1, c.intermediate_size = 1 << 15, c.num_hidden_layers = 1000;  // each tensor would fit
  CHECK_THROWS_WITH_AS(Bert::empty(c, Task::pretrain), doctest::Contains("of memory"), Error);
}

TEST_CASE("initialisation: cut at two deviations, biases 0, norms 1, the same at any number of threads") {
  Config c = Config::named("tiny", 500);
  CHECK(c.initializer_range == 0.049);
  CHECK(Config::named("base", 500).initializer_range == 0.02);
  c.initializer_range = 0.02;
  const Bert model = Bert::random(c, Task::pretrain, 3);
  double sum = 0, squares = 0, largest = 0;
  const auto n = (double)model.word.size();
  for (int64_t i = 0; i < model.word.size(); i++) {
    const double x = (double)model.word.data()[i];
    sum += x, squares += x * x, largest = std::max(largest, std::fabs(x));
  }
  CHECK(largest <= 0.04);
  CHECK(largest > 0.0399);
  CHECK(std::fabs(sum / n) < 3e-4);
  CHECK(std::sqrt(squares / n) == doctest::Approx(0.0176).epsilon(0.01));  // facts: the true deviation of a normal cut at 2
  CHECK(model.pooler.bias.data()[5] == 0);
  CHECK(model.embeddings_norm.weight.data()[5] == 1);
  UseThreads use(1);
  const Bert again = Bert::random(c, Task::pretrain, 3), other = Bert::random(c, Task::pretrain, 4);
  CHECK(std::memcmp(model.word.data(), again.word.data(), 4 * (size_t)model.word.size()) == 0);
  CHECK(std::memcmp(model.word.data(), other.word.data(), 400) != 0);
  CHECK(std::memcmp(model.layers[0].up.weight.data(), model.layers[1].up.weight.data(), 400) != 0);
}

namespace {
// Sentences of the golden words: ids 5 .. 199 of tiny-pretrain's vocabulary, in 30 documents.
Corpus tiny_corpus() {
  Corpus corpus;
  Random random({11, 0, 0, 0});
  for (int d = 0; d < 30; d++) {
    for (int s = 0; s < 20; s++) {
      const int64_t n = 1 + random.below(12);
      for (int64_t i = 0; i < n; i++) corpus.ids.push_back((int32_t)(5 + random.below(195)));
      corpus.end_sentence();
    }
    corpus.end_document();
  }
  return corpus;
}
const MaskVocabulary kSpecial{2, 3, 4, std::vector<uint8_t>(200)};
PretrainSettings tiny_settings() {
  PretrainSettings s;
  s.batch_tokens = 200, s.max_length = 32;
  return s;
}
}  // namespace

TEST_CASE("sampling: rows fit, specials in place, segments and labels, about half random, every sentence used") {
  const Corpus corpus = tiny_corpus();
  const PretrainSettings settings = tiny_settings();
  PretrainSampler sampler(corpus, settings, kSpecial, 1);
  const int64_t batches = sampler.window_batches();
  int64_t rows = 0, random = 0, masked = 0, kept = 0, replaced = 0;
  for (int64_t b = 0; b < batches; b++) {
    const Batch batch = sampler.next(b, 0);
    CHECK(batch.tokens() <= settings.batch_tokens);
    CHECK(batch.labels.size() == (size_t)batch.rows());
    for (int64_t r = 0; r < batch.rows(); r++) {
      const int64_t begin = batch.offsets[(size_t)r], end = batch.offsets[(size_t)r + 1], n = end - begin;
      CHECK(n <= settings.max_length);
      CHECK(n >= 5);
      CHECK(batch.ids[(size_t)begin] == kSpecial.cls);
      CHECK(batch.ids[(size_t)end - 1] == kSpecial.sep);
      CHECK(batch.segments[(size_t)begin] == 0);
      CHECK(batch.segments[(size_t)end - 1] == 1);
      int64_t here = 0;
      for (const int64_t t : batch.masked) here += t >= begin && t < end;
      CHECK(here == std::max<int64_t>(1, (int64_t)std::nearbyint((double)n * 0.15)));
      rows++, random += batch.labels[(size_t)r];
    }
    CHECK(std::is_sorted(batch.masked.begin(), batch.masked.end()));
    for (size_t m = 0; m < batch.masked.size(); m++) {
      const int32_t now = batch.ids[(size_t)batch.masked[m]], was = batch.masked_labels[m];
      CHECK(was >= 5);
      masked++, kept += now == was, replaced += now == kSpecial.mask;
    }
  }
  CHECK((double)replaced / (double)masked == doctest::Approx(0.8).epsilon(0.06));
  CHECK((double)kept / (double)masked == doctest::Approx(0.1).epsilon(0.35));
  CHECK((double)random / (double)rows > 0.42);
  CHECK((double)random / (double)rows < 0.68);  // a lone sentence is always paired at random
  CHECK(sampler.place().epoch == 0);
  const Batch next = sampler.next(0, 0);  // same step, next epoch: other pairs
  CHECK(sampler.place().epoch == 1);
  PretrainSampler again(corpus, settings, kSpecial, 1);
  CHECK(again.next(0, 0).ids != next.ids);
  again.go_to({1, 0, 0});
  CHECK(again.next(0, 0).ids == next.ids);
  for (const PretrainSampler::Place place :
       {PretrainSampler::Place{0, 0, -1}, {-1, 0, 0}, {0, 1, 0}, {0, -1, 0}, {0, 0, batches + 1}, {0, 0, 0, 4}})
    CHECK_THROWS_AS(again.go_to(place), Error);
}

TEST_CASE("sampling: labels tell the truth") {
  // Document d holds only the id 10 + d, so a row shows where both halves come from.
  Corpus corpus;
  for (int d = 0; d < 20; d++) {
    for (int s = 0; s < 9; s++) corpus.ids.insert(corpus.ids.end(), 3, 10 + d), corpus.end_sentence();
    corpus.end_document();
  }
  PretrainSampler sampler(corpus, tiny_settings(), kSpecial, 1);
  const int64_t batches = sampler.window_batches();
  for (int64_t b = 0; b < batches; b++) {
    Batch batch = sampler.next(b, 0);
    for (size_t m = 0; m < batch.masked.size(); m++) batch.ids[(size_t)batch.masked[m]] = batch.masked_labels[m];
    for (int64_t r = 0; r < batch.rows(); r++) {
      const int32_t a = batch.ids[(size_t)batch.offsets[(size_t)r] + 1], z = batch.ids[(size_t)batch.offsets[(size_t)r + 1] - 2];
      CHECK((a != z) == (batch.labels[(size_t)r] == 1));  // 1: from another document, never the same one
    }
  }
}

TEST_CASE("sampling: one document alone needs --no-nsp, and an empty text is refused") {
  Corpus corpus;
  CHECK_THROWS_AS(PretrainSampler(corpus, tiny_settings(), kSpecial, 1), Error);
  corpus.ids = {5, 6, 7}, corpus.end_sentence(), corpus.end_document();
  CHECK_THROWS_AS(PretrainSampler(corpus, tiny_settings(), kSpecial, 1), Error);
  PretrainSettings alone = tiny_settings();
  alone.next_sentence = false;
  PretrainSampler sampler(corpus, alone, kSpecial, 1);
  const Batch batch = sampler.next(0, 0);
  CHECK(batch.tokens() == 5);
  CHECK(batch.labels.empty());
}

TEST_CASE("sampling: without next sentences a row is as many whole sentences as fit, and no token is lost or used twice") {
  PretrainSettings settings = tiny_settings();
  settings.next_sentence = false;
  Corpus corpus;  // token i of the text is the id 10 + i, so a row shows where it comes from
  std::vector<int64_t> document_of;
  Random random({3, 0, 0, 0});
  for (int d = 0; d < 12; d++) {
    for (int s = 0; s < 15; s++) {
      const int64_t n = s == 7 ? 75 : 1 + random.below(12);  // one sentence is longer than two rows
      for (int64_t i = 0; i < n; i++) corpus.ids.push_back(10 + (int32_t)corpus.ids.size()), document_of.push_back(d);
      corpus.end_sentence();
    }
    corpus.end_document();
  }
  const auto tokens = (int64_t)corpus.ids.size();
  PretrainSampler sampler(corpus, settings, {2, 3, 4, std::vector<uint8_t>((size_t)tokens + 10)}, 1);
  std::vector<int> seen((size_t)tokens);
  const int64_t batches = sampler.window_batches(), most = settings.max_length - 2;
  CHECK(batches <= tokens / settings.batch_tokens + 3);  // they are full
  for (int64_t b = 0; b < batches; b++) {
    Batch batch = sampler.next(b, 0);
    for (size_t m = 0; m < batch.masked.size(); m++) batch.ids[(size_t)batch.masked[m]] = batch.masked_labels[m];
    CHECK(batch.tokens() <= settings.batch_tokens);
    CHECK(batch.labels.empty());
    for (int64_t r = 0; r < batch.rows(); r++) {
      const int64_t begin = batch.offsets[(size_t)r], n = batch.offsets[(size_t)r + 1] - begin - 2;
      REQUIRE(n >= 1);
      CHECK(n <= most);
      CHECK(batch.ids[(size_t)begin] == kSpecial.cls);
      CHECK(batch.ids[(size_t)(begin + n) + 1] == kSpecial.sep);
      const int64_t first = batch.ids[(size_t)begin + 1] - 10, end = first + n;
      for (int64_t i = 0; i < n + 2; i++) CHECK(batch.positions[(size_t)(begin + i)] == i);
      for (int64_t i = 0; i < n; i++) {
        CHECK(batch.ids[(size_t)(begin + i) + 1] - 10 == first + i);
        seen[(size_t)(first + i)]++;
      }
      CHECK(document_of[(size_t)first] == document_of[(size_t)end - 1]);
      if (end == tokens || document_of[(size_t)end] != document_of[(size_t)first]) continue;  // the document ends
      // Nothing more would have fitted: the next sentence is too long, or this one was cut where the row was full.
      const auto next = std::upper_bound(corpus.sentences.begin(), corpus.sentences.end(), end);
      CHECK(*next - first > most);
      CHECK((*(next - 1) == end || n == most));
    }
  }
  CHECK(std::count(seen.begin(), seen.end(), 1) == tokens);
}

namespace {
constexpr int64_t kPieces = 30000;
// A text whose sentences are all different and say where they stand: document d, sentence s are the ids 10 + d / 1000, 10 + d % 1000,
// 2000 + s / 1000, 2000 + s % 1000, then as many 5000 + d % 1000 as make `length` tokens.
void add_document(Corpus& to, int64_t d, int64_t sentences, int64_t length) {
  for (int64_t s = 0; s < sentences; s++) {
    for (const int64_t id : {10 + d / 1000, 10 + d % 1000, 2000 + s / 1000, 2000 + s % 1000}) to.ids.push_back((int32_t)id);
    to.ids.insert(to.ids.end(), (size_t)length - 4, (int32_t)(5000 + d % 1000));
    to.end_sentence();
  }
  to.end_document();
}
using Sentence = std::pair<int64_t, int64_t>;  // document and number
std::vector<Sentence> sentences_of(const Corpus& text) {
  std::vector<Sentence> all;
  for (int64_t s = 0; s < text.size().sentences; s++) {
    const int32_t* at = &text.ids[(size_t)text.sentences[(size_t)s]];
    all.emplace_back((at[0] - 10) * 1000 + at[1] - 10, (at[2] - 2000) * 1000 + at[3] - 2000);
  }
  return all;
}
// The text in shards, closed after so many sentences: also inside of documents.
Shards shards_of(const Corpus& text, const std::string& folder, int64_t sentences, std::optional<uint64_t> key = 7) {
  Shards shards(folder, key, kPieces);
  Corpus part;
  for (int64_t s = 0, d = 0, n = text.size().sentences; s < n && !shards.whole(); s++) {
    const bool passed_over = s < shards.rows();  // here a row is a sentence
    if (!passed_over) part.add_sentences({&text.sentences[(size_t)s], 2}, text.ids.data());
    if (s + 1 == text.documents[(size_t)d + 1]) part.end_document(), d++;
    if (part.size().sentences == sentences || s + 1 == n) shards.add(part, s + 1, s + 1 == n), part = Corpus();
  }
  return shards;
}
Corpus window(const Shards& shards, int64_t number, uint32_t epoch = 0) { return shards.window(number, {1, epoch, 0, kOrderStream}); }
// 60 documents of 10 sentences of 8 tokens.
Corpus numbered_corpus() {
  Corpus text;
  for (int64_t d = 0; d < 60; d++) add_document(text, d, 10, 8);
  return text;
}
}  // namespace

TEST_CASE("shards: what was put in comes out; whole ones are kept, and the run goes on to the same bytes") {
  const testing::TemporaryFolder folder;
  const Corpus text = numbered_corpus();
  const std::string path = folder / "shards";
  const Shards made = shards_of(text, path, 64);
  CHECK(made.whole());
  CHECK(!made.stale());
  CHECK(made.size().tokens == 4800);
  CHECK(made.size().sentences == 600);
  CHECK(made.size().documents == 60);  // although shards end inside of some
  CHECK(!std::filesystem::exists(path + "/.lock"));
  const Corpus all = window(made, 0);
  CHECK(all.ids == text.ids);
  CHECK(all.sentences == text.sentences);
  CHECK(all.size().documents > 60);  // their parts, which know it
  for (int64_t d = 0; d < all.size().documents; d++)
    CHECK(all.sources[(size_t)d] == sentences_of(all)[(size_t)all.documents[(size_t)d]].first);
  CHECK(std::accumulate(made.counts().begin(), made.counts().end(), int64_t{0}) == 4800);
  CHECK(made.counts()[5003] == 40);

  std::vector<std::string> files;
  for (int i = 0; i < 10; i++) files.push_back(read_file(path + "/0000" + std::to_string(i) + ".ids"));
  CHECK(!std::filesystem::exists(path + "/00010.ids"));
  for (int i = 4; i < 10; i++) std::filesystem::remove(path + "/0000" + std::to_string(i) + ".ids");
  std::ofstream(path + "/00004.ids.tmp-1-1") << "half a shard of a killed run";
  const Shards part(path, 7, kPieces);
  CHECK(!part.whole());
  CHECK(part.rows() == 256);
  const Shards gone_on = shards_of(text, path, 64);
  CHECK(gone_on.fingerprint() == made.fingerprint());
  CHECK(!std::filesystem::exists(path + "/00004.ids.tmp-1-1"));
  for (int i = 0; i < 10; i++) CHECK(read_file(path + "/0000" + std::to_string(i) + ".ids") == files[(size_t)i]);
  const Shards again(path, 7, kPieces);
  CHECK(again.whole());
  CHECK(again.fingerprint() == made.fingerprint());

  // Another text, and one of which nothing is known, take their place, and what is left of the longer one goes.
  Corpus other;
  for (int64_t d = 0; d < 3; d++) add_document(other, d, 40, 8);
  CHECK(Shards(path, 8, kPieces).stale());
  const Shards second = shards_of(other, path, 64, 8);
  CHECK(second.size().documents == 3);
  CHECK(second.fingerprint() != made.fingerprint());
  CHECK(!std::filesystem::exists(path + "/00002.ids"));
  CHECK(Shards(path, {}, kPieces).stale());
  CHECK(shards_of(other, path, 64, {}).fingerprint() == second.fingerprint());
  CHECK_THROWS_WITH_AS(window(second, 0), doctest::Contains("00000.ids: gone, or another than when the run began"), Error);
}

TEST_CASE("shards: damaged, cut short, too long, of another version, no shard at all") {
  const testing::TemporaryFolder folder;
  const std::string path = folder / "shards", file = path + "/00001.ids";
  shards_of(numbered_corpus(), path, 64);
  const std::string bytes = read_file(file);
  auto says = [&](const std::string& now, int64_t pieces = kPieces) -> std::string {
    std::ofstream(file, std::ios::binary | std::ios::trunc) << now;
    try {
      const Shards shards(path, 7, pieces);
      return shards.stale() ? "stale" : "fits";
    } catch (const Error& e) { return e.what(); }
  };
  CHECK(says(bytes) == "fits");
  for (size_t at = 0; at < bytes.size(); at += at < 200 ? 1 : 97) {  // every byte of the header, and some of the rest
    CAPTURE(at);
    std::string changed = bytes;
    changed[at] ^= 0x10;
    const std::string said = says(changed);
    const bool version = at >= 8 && at < 16;
    CHECK_MESSAGE((version ? said == "stale" : said.find("00001.ids: ") != said.npos && said.find("remove it") != said.npos), said);
  }
  for (const size_t length : {size_t{0}, size_t{7}, size_t{95}, size_t{96}, size_t{200}, bytes.size() - 1})
    CHECK(says(bytes.substr(0, length)).find("remove it") != std::string::npos);
  CHECK(says(bytes + "x").find("remove it") != std::string::npos);
  CHECK(says("a user's own file, which happens to have this name").find("not a whole shard") != std::string::npos);
  CHECK(says(bytes, 1000).find("damaged") != std::string::npos);  // ids that the vocabulary does not have
  CHECK(says(read_file(path + "/00002.ids")) == "stale");         // another number
  std::filesystem::remove(file);
  CHECK(Shards(path, 7, kPieces).rows() == 64);  // as far as they go without a gap
  std::filesystem::remove_all(path);
  std::ofstream(path) << "a file where the folder should be";
  CHECK_THROWS_AS(shards_of(numbered_corpus(), path, 64), Error);
}

TEST_CASE("held-out text: whole documents, which training does not see; stretches where documents are too few or too long") {
  const testing::TemporaryFolder folder;
  struct Case {
    int64_t documents, sentences, length;
    double share;
    bool whole;
    int64_t least, most;  // tokens held out
  };
  for (const Case& c : {Case{60, 10, 8, 0.1, true, 400, 480}, Case{60, 10, 8, 0.01, true, 160, 160},  // 1 % is less than two documents
                        Case{4, 500, 8, 0.1, false, 1500, 1700}, Case{1, 300, 8, 0.05, false, 100, 140},
                        Case{300, 200, 20, 0.01, true, 8000, 12000}, Case{800, 250, 10, 0.5, true, 95000, 100000}}) {
    CAPTURE(c.documents);
    std::filesystem::remove_all(folder.path + "/shards");
    Corpus text;
    for (int64_t d = 0; d < c.documents; d++) add_document(text, d, c.sentences, c.length);
    Shards shards = shards_of(text, folder / "shards", 40000), same = shards_of(text, folder / "shards", 40000);
    const Corpus dev = shards.hold_out(c.share, 5);
    CHECK(dev.ids == same.hold_out(c.share, 5).ids);
    CHECK(dev.ids != shards_of(text, folder / "shards", 40000).hold_out(c.share, 6).ids);
    CHECK(dev.size().tokens >= c.least);
    CHECK(dev.size().tokens <= c.most);
    CHECK(dev.size().documents >= 2);
    CHECK(shards.size().tokens + dev.size().tokens == c.documents * c.sentences * c.length);
    // Each sentence is in one of the two.
    std::set<Sentence> held, all;
    for (const Sentence& s : sentences_of(dev)) held.insert(s);
    all = held;
    for (int64_t w = 0; w < shards.windows(); w++)
      for (const Sentence& s : sentences_of(window(shards, w))) all.insert(s);
    CHECK((int64_t)all.size() == c.documents * c.sentences);
    CHECK(dev.size().sentences + shards.size().sentences == (int64_t)all.size());
    std::map<int64_t, int64_t> of_document;
    for (const Sentence& s : held) of_document[s.first]++;
    if (c.whole) {
      for (const auto& [d, n] : of_document) CHECK(n == c.sentences);
      CHECK(shards.size().documents == c.documents - dev.size().documents);
    } else {
      CHECK(of_document.size() <= (size_t)c.documents);
      for (int64_t d = 0; d < dev.size().documents; d++) CHECK(dev.documents[(size_t)d + 1] - dev.documents[(size_t)d] <= 50);
    }
    std::vector<int64_t> counts((size_t)kPieces);
    for (int64_t w = 0; w < shards.windows(); w++)
      for (const int32_t id : window(shards, w).ids) counts[(size_t)id]++;
    CHECK(counts == shards.counts());
  }
}

TEST_CASE("windows: each sentence once an epoch, from all over the text, in another order each time; any place can be gone to") {
  const testing::TemporaryFolder folder;
  Corpus text;
  for (int64_t d = 0; d < 500; d++) add_document(text, d, d == 250 ? 9000 : 60, 50);  // one is longer than a dozen blocks
  const Shards shards = shards_of(text, folder / "shards", 20000);
  REQUIRE(shards.windows() == 2);
  std::set<Sentence> seen;
  for (int64_t w = 0; w < 2; w++) {
    const Corpus part = window(shards, w), next = window(shards, w, 1);
    CHECK(part.ids != next.ids);
    CHECK(std::abs(part.size().tokens - text.size().tokens / 2) <= 1 << 16);
    int64_t early = 0, again = 0;
    for (const Sentence& s : sentences_of(part)) early += s.first < 250, again += !seen.insert(s).second;
    CHECK(again == 0);
    CHECK((double)early / (double)part.size().sentences > 0.2);  // of 0.38, not all or nothing
    for (int64_t d = 0; d < part.size().documents; d++) {
      const int32_t* at = &part.ids[(size_t)part.sentences[(size_t)part.documents[(size_t)d]]];
      CHECK(part.sources[(size_t)d] == (at[0] - 10) * 1000 + at[1] - 10);
    }
  }
  CHECK((int64_t)seen.size() == text.size().sentences);

  PretrainSettings settings;
  settings.batch_tokens = 4000, settings.max_length = 203;  // pairs of four sentences
  const MaskVocabulary vocabulary{2, 3, 4, std::vector<uint8_t>((size_t)kPieces)};
  PretrainSampler sampler(shards, settings, vocabulary, 1), other(shards, settings, vocabulary, 1);
  int64_t rows = 0, random = 0, wrong = 0, not_full = 0;
  for (int64_t step = 0; sampler.place().epoch < 1 || sampler.place().window < 1; step++) {
    const PretrainSampler::Place place = sampler.place();
    Batch batch = sampler.next(step, 0);
    if (place.epoch == 0 && place.window == 0) not_full += batch.tokens() < settings.batch_tokens - settings.max_length;
    if (step % 200 == 0 || place.batch == 0) {
      other.go_to(place);
      CHECK(other.next(step, 0).ids == batch.ids);
    }
    for (size_t m = 0; m < batch.masked.size(); m++) batch.ids[(size_t)batch.masked[m]] = batch.masked_labels[m];
    for (int64_t r = 0; r < batch.rows(); r++) {  // the last id of a half names its document
      int64_t sep = batch.offsets[(size_t)r];
      while (batch.segments[(size_t)sep + 1] == 0) sep++;
      const int32_t a = batch.ids[(size_t)sep - 1], b = batch.ids[(size_t)batch.offsets[(size_t)r + 1] - 2];
      const bool is_random = batch.labels[(size_t)r] == 1;
      if (a >= 5000 && b >= 5000) rows++, random += is_random, wrong += is_random != (a != b);
    }
  }
  CHECK(rows > 10000);
  CHECK(wrong == 0);
  CHECK(not_full <= 1);  // the last one of a window
  CHECK((double)random / (double)rows == doctest::Approx(0.5).epsilon(0.15));
  CHECK_THROWS_AS(sampler.go_to({0, 2, 0}), Error);

  Corpus one;
  add_document(one, 0, 9000, 20);  // in several blocks, but one document
  const Shards single = shards_of(one, folder / "one", 4000);
  CHECK(single.size().documents == 1);
  CHECK(window(single, 0).size().documents > 2);
  CHECK_THROWS_WITH_AS(PretrainSampler(single, settings, vocabulary, 1), doctest::Contains("there is one; or pass --no-nsp"), Error);
}

TEST_CASE("phases: each length has its share of the steps; batches made ahead are the same, from any step on; their errors arrive") {
  const std::vector<Phase> phases = {{16, 0.7}, {24, 0.2}, {32, 0.1}};
  std::string lengths;
  for (int64_t step = 0; step < 20; step++) lengths += std::to_string(max_length_at(phases, step, 20)) + " ";
  CHECK(lengths == "16 16 16 16 16 16 16 16 16 16 16 16 16 16 24 24 24 24 32 32 ");
  CHECK(max_length_at(phases, 0, 1) == 16);
  CHECK(max_length_at({{{16, 0.5}, {32, 0.5}}}, 1, 1) == 32);

  const testing::TemporaryFolder folder;
  Corpus text;
  for (int64_t d = 0; d < 60; d++) add_document(text, d, 10, 6);
  const Shards shards = shards_of(text, folder / "shards", 64);
  PretrainSettings settings = tiny_settings();
  settings.max_length = 16;
  const MaskVocabulary vocabulary{2, 3, 4, std::vector<uint8_t>((size_t)kPieces)};
  PretrainSampler plain(shards, settings, vocabulary, 1);
  StepBatches ahead(plain, phases, 2, 0, 20);
  std::vector<std::vector<int32_t>> ids;
  std::vector<PretrainSampler::Place> places = {plain.place()};
  for (int64_t step = 0; step < 20; step++) {
    plain.set_max_length(max_length_at(phases, step, 20));
    const StepBatches::Step made = ahead.next();
    REQUIRE(made.micro.size() == 2);
    int64_t longest = 0;
    for (int64_t i = 0; i < 2; i++) {
      const Batch want = plain.next(step, i), &got = made.micro[(size_t)i];
      CHECK(got.ids == want.ids);
      CHECK(got.masked == want.masked);
      CHECK(got.labels == want.labels);
      CHECK(got.tokens() <= settings.batch_tokens);
      for (int64_t r = 0; r < got.rows(); r++) longest = std::max(longest, got.offsets[(size_t)r + 1] - got.offsets[(size_t)r]);
      ids.push_back(got.ids);
    }
    const int64_t limit = max_length_at(phases, step, 20);
    CHECK(longest <= limit);
    CHECK(longest > limit - 8);
    CHECK(made.after.batch == plain.place().batch);  // of this step, not of the one made ahead
    CHECK(made.after.max_length == limit);
    places.push_back(made.after);
  }
  CHECK_THROWS_WITH_AS(ahead.next(), doctest::Contains("no step 21 of 20"), Error);
  for (int64_t step = 0; step < 20; step++) {
    PretrainSampler sampler(shards, settings, vocabulary, 1);
    sampler.go_to(places[(size_t)step]);
    StepBatches resumed(sampler, phases, 2, step, 20);
    CHECK(resumed.next().micro[1].ids == ids[(size_t)step * 2 + 1]);
    if (step < 19) CHECK(resumed.next().micro[0].ids == ids[(size_t)step * 2 + 2]);
  }
  StepBatches broken(PretrainSampler(shards, settings, vocabulary, 1), {{16, 1}}, 1, 0, 1000);
  std::filesystem::remove(folder / "shards/00003.ids");
  CHECK_THROWS_WITH_AS(
      [&] {
        for (;;) broken.next();
      }(),
      doctest::Contains("00003.ids: gone"), Error);
}

TEST_CASE("masking: halves round to even, whole words stay together") {
  for (const auto& [n, count] : {std::pair{30, 4}, {70, 10}, {110, 16}, {31, 5}, {4, 1}}) {  // 30 * .15 = 4.5 -> 4
    Batch batch;
    std::vector<int32_t> ids((size_t)n, 50);
    ids.front() = kSpecial.cls, ids.back() = kSpecial.sep;
    batch.add_row(ids, std::vector<int32_t>((size_t)n, 0));
    mask_tokens(batch, kSpecial, 0.15, false, {1, 0, 0, kMaskStream});
    CHECK(batch.masked.size() == (size_t)count);
  }
  MaskVocabulary with_words = kSpecial;
  with_words.continues[100] = 1;
  Batch batch;
  std::vector<int32_t> ids = {kSpecial.cls};
  for (int i = 0; i < 30; i++) ids.insert(ids.end(), {50, 100, 100});  // words of three pieces
  ids.push_back(kSpecial.sep);
  batch.add_row(ids, std::vector<int32_t>(ids.size(), 0));
  mask_tokens(batch, with_words, 0.15, true, {1, 0, 0, kMaskStream});
  REQUIRE(batch.masked.size() == 12);  // 14 asked for: a fifth word would not fit
  for (size_t m = 0; m < 12; m += 3) CHECK(((batch.masked[m] - 1) % 3 == 0 && batch.masked[m + 2] == batch.masked[m] + 2));
}

namespace {
// Trains a small model for some steps and returns the bytes of its state file.
std::string train_bytes(int threads, int64_t accumulate, int64_t stop_at, Precision products = Precision::f32, bool recompute = false) {
  UseThreads use(threads);
  testing::TemporaryFolder folder;
  Config c = Config::named("tiny", 200);
  c.hidden_size = 24, c.intermediate_size = 40, c.num_attention_heads = 3, c.max_position_embeddings = 32;
  const Corpus corpus = tiny_corpus();
  TrainSettings settings;
  settings.steps = 6, settings.lr = 1e-2, settings.accumulate = accumulate, settings.products = products, settings.recompute = recompute;
  PretrainSampler sampler(corpus, tiny_settings(), kSpecial, 1);
  auto trainer = std::make_unique<Trainer>(Bert::random(c, Task::pretrain, 1), settings);
  for (int64_t s = 0; s < 6; s++) {
    if (s == stop_at) {  // as a killed run that goes on: everything made anew from the state file
      trainer->save(folder / "state", {{"batch", std::to_string(sampler.place().batch)}});
      trainer = std::make_unique<Trainer>(Bert::random(c, Task::pretrain, 99), settings);
      const int64_t batch = std::stoll(trainer->load(folder / "state").at("batch"));
      sampler = PretrainSampler(corpus, tiny_settings(), kSpecial, 1);
      sampler.go_to({0, 0, batch});
    }
    std::vector<Batch> micro;
    for (int64_t g = 0; g < accumulate; g++) micro.push_back(sampler.next(s, g));
    const StepReport report = trainer->step(micro);
    CHECK(report.step == s + 1);
    CHECK(std::isfinite(report.loss.total));
  }
  trainer->save(folder / "state", {});
  return read_file(folder / "state");
}
}  // namespace

TEST_CASE("training: the same bytes at any number of threads, resumed or not, with accumulation") {
  for (const int64_t accumulate : {1, 4}) {
    const std::string want = train_bytes(1, accumulate, -1);
    CHECK(want == train_bytes(2, accumulate, -1));
    CHECK(want == train_bytes(1, accumulate, 3));
    CHECK(want != train_bytes(1, accumulate == 1 ? 2 : 1, -1));
    CHECK(want == train_bytes(2, accumulate, -1, Precision::f32, true));  // layers computed again, dropout too
    const std::string rounded = train_bytes(2, accumulate, -1, Precision::bf16);
    CHECK(rounded != want);
    CHECK(rounded == train_bytes(1, accumulate, 3, Precision::bf16));
    CHECK(rounded == train_bytes(3, accumulate, -1, Precision::bf16, true));
  }
}

TEST_CASE("training: micro-batches of a step add up to the gradient of the whole batch") {
  const ModelFolder a = trainable(kGolden + "tiny-pretrain"), b = trainable(kGolden + "tiny-pretrain");
  const std::string path = kGolden + "tiny-pretrain/rows.json";
  const Json rows = Json::parse(read_file(path), path);
  std::vector<Batch> parts;
  for (const Json& row : rows.items(path)) parts.push_back(read_rows({row}, false, false));
  TrainSettings settings;
  settings.steps = 10, settings.accumulate = 8, settings.dropout = 0;
  Trainer whole(a.bert, settings), cut(b.bert, settings);
  const Batch all = read_rows(path, Task::pretrain);
  const StepReport x = whole.step({&all, 1}), y = cut.step(parts);
  CHECK(x.loss.total == doctest::Approx(y.loss.total).epsilon(1e-6));
  CHECK(x.grad_norm == doctest::Approx(y.grad_norm).epsilon(1e-6));
  CHECK(x.tokens == y.tokens);
}

namespace {
// What Trainer::step throws; empty: nothing.
std::string refused(Trainer& trainer, const Batch& batch) {
  try {
    trainer.step({&batch, 1});
  } catch (const Error& e) { return e.what(); }
  return "";
}
}  // namespace

TEST_CASE("training: a loss that is not finite stops with step, layer, tensor and row, the model untouched") {
  ModelFolder m = trainable(kGolden + "tiny-pretrain");
  const Batch batch = read_rows(kGolden + "tiny-pretrain/rows.json", Task::pretrain);
  TrainSettings settings;
  settings.steps = 10;
  Trainer trainer(m.bert, settings);
  float& weight = m.bert.layers[1].up.weight.data()[7];  // shared with the trainer's handles
  const float before = m.bert.word.data()[700], kept = weight;
  weight = 3e38f;
  std::string what = refused(trainer, batch);
  CAPTURE(what);
  CHECK(what.starts_with("step 1: not finite: the output of layer 2, first in row 3 of micro-batch 0 (28 tokens, ids 2 26 4 "));
  CHECK(what.find("bert.encoder.layer.1.intermediate.dense.weight, up to 3.0") != std::string::npos);
  weight = kept;
  const int64_t row = batch.rows() - 1, begin = batch.offsets[(size_t)row], length = batch.offsets[(size_t)row + 1] - begin;
  Batch odd = batch;
  odd.ids[(size_t)begin + 1] = 199;  // in that row alone, and its vector damaged
  for (int32_t& id : odd.ids)
    if (id == 199 && &id != &odd.ids[(size_t)begin + 1]) id = 198;
  m.bert.word.data()[199 * m.bert.config.hidden_size] = NAN;
  what = refused(trainer, odd);
  CHECK(what.starts_with("step 1: not finite: the output of the embeddings, first in row " + std::to_string(row) + " of micro-batch 0 (" +
                         std::to_string(length) + " tokens, ids " + std::to_string(batch.ids[(size_t)begin]) + " 199"));
  CHECK(what.find("bert.embeddings.word_embeddings.weight, up to nan") != std::string::npos);
  m.bert.word.data()[199 * m.bert.config.hidden_size] = 0;
  m.bert.decoder_bias.data()[3] = INFINITY;
  CHECK(refused(trainer, batch).starts_with("step 1: not finite: the scores of masked words, first in row 0"));
  m.bert.decoder_bias.data()[3] = 0;
  CHECK(m.bert.word.data()[700] == before);
  CHECK(trainer.done() == 0);
  CHECK(refused(trainer, batch).empty());
}

namespace {
// Rows of words 5 .. 8 with one masked, whose label is not among them when `odd`: what a model that has learned them finds absurd.
Batch easy_batch(uint64_t seed, bool odd) {
  Batch batch;
  Random random({seed, 0, 0, 0});
  for (int r = 0; r < 6; r++) {
    std::vector<int32_t> ids = {kSpecial.cls};
    for (int64_t n = 8 + random.below(5); n > 0; n--) ids.push_back((int32_t)(5 + random.below(4)));
    batch.masked.push_back((int64_t)batch.ids.size() + 3), batch.masked_labels.push_back(odd && r == 4 ? 150 : ids[3]);
    ids[3] = kSpecial.mask;
    batch.add_row(ids, std::vector<int32_t>(ids.size(), 0));
  }
  for (size_t r = 0; odd && r < 3; r++) batch.masked_labels[r] = 160;
  return batch;
}
Trainer easy_trainer(bool skip) {
  Config c = Config::named("tiny", 200);
  c.hidden_size = 24, c.intermediate_size = 40, c.num_attention_heads = 3, c.max_position_embeddings = 32;
  TrainSettings settings;
  settings.steps = 400, settings.lr = 1e-2, settings.skip_spikes = skip;
  return Trainer(Bert::random(c, Task::mlm, 1), settings);
}
// The bytes of a trainer's tensors, without where it stands.
std::string numbers_of(const Trainer& trainer, const std::string& path) {
  trainer.save(path, {});
  const SafeTensors file = SafeTensors::open(path);
  std::string bytes;
  for (const SafeTensors::Entry& e : file.entries()) {
    const Tensor t = file.load(e);
    bytes.append(reinterpret_cast<const char*>(t.data()), (size_t)t.size() * sizeof(float));
  }
  return bytes;
}
}  // namespace

TEST_CASE("training: a spike is found and named; skipped it changes nothing but the count; resumed the same bytes; twenty in a row stop") {
  testing::TemporaryFolder folder;
  Trainer trainer = easy_trainer(true), made = easy_trainer(false);
  auto step = [](Trainer& t, bool odd) {
    const Batch batch = easy_batch((uint64_t)t.done(), odd);
    return t.step({&batch, 1});
  };
  for (int s = 0; s < 150; s++) {
    const StepReport r = step(trainer, s == 20), same = step(made, s == 20);  // before there is a mean to speak of
    CHECK_MESSAGE((r.fault.empty() && !r.skipped), r.fault);
    CHECK(same.loss.total == r.loss.total);
  }
  trainer.save(folder / "before", {});
  const std::string before = numbers_of(trainer, folder / "numbers");
  StepReport r = step(trainer, true);
  CAPTURE(r.fault);
  CHECK((r.skipped && r.step == 151 && trainer.done() == 151));
  CHECK(r.fault.starts_with("a spike: loss "));
  CHECK(r.fault.find("in row ") != std::string::npos);
  CHECK(r.fault.find("of micro-batch 0 (") != std::string::npos);
  CHECK(r.fault.find("; the largest gradient is of ") != std::string::npos);
  CHECK(numbers_of(trainer, folder / "numbers") == before);
  const StepReport not_skipped = step(made, true);
  CHECK((not_skipped.fault == r.fault && !not_skipped.skipped));
  CHECK(numbers_of(made, folder / "numbers") != before);

  // Not finite, and skipped too.
  Batch batch = easy_batch(151, false);
  float& weight = Tensor(trainer.model().layers[0].up.weight).data()[3];
  const float kept = std::exchange(weight, NAN);
  r = trainer.step({&batch, 1});
  weight = kept;
  CHECK((r.skipped && r.fault.starts_with("not finite: the output of layer 1, ")));
  CHECK(numbers_of(trainer, folder / "numbers") == before);
  for (int s = 0; s < 5; s++) CHECK(step(trainer, false).fault.empty());
  CHECK(numbers_of(trainer, folder / "numbers") != before);

  // Two runs from a state between: the one that was stopped in the middle of skipped steps counts on.
  for (int s = 0; s < 12; s++) CHECK(step(trainer, true).skipped);
  trainer.save(folder / "state", {});
  Trainer resumed = easy_trainer(true);
  resumed.load(folder / "state");
  for (int s = 0; s < 7; s++) CHECK((step(trainer, true).skipped && step(resumed, true).skipped));
  CHECK(refused(trainer, easy_batch((uint64_t)trainer.done(), true)).find("the 20th step in a row to be skipped") != std::string::npos);
  CHECK(refused(resumed, easy_batch((uint64_t)trainer.done(), true)).find("the 20th step in a row") != std::string::npos);
  for (int s = 0; s < 3; s++) step(trainer, false), step(resumed, false);
  trainer.save(folder / "a", {}), resumed.save(folder / "b", {});
  CHECK(read_file(folder / "a") == read_file(folder / "b"));
}

TEST_CASE("training: a step starts from gradients of zero, whatever an earlier backward left") {
  const ModelFolder a = trainable(kGolden + "tiny-pretrain"), b = trainable(kGolden + "tiny-pretrain");
  const Batch batch = read_rows(kGolden + "tiny-pretrain/rows.json", Task::pretrain);
  TrainSettings settings;
  settings.steps = 10;
  Trainer clean(a.bert, settings), dirty(b.bert, settings);
  b.bert.word.grad()[7] = 5;
  CHECK(clean.step({&batch, 1}).grad_norm == dirty.step({&batch, 1}).grad_norm);
}

TEST_CASE("training: a model that was loaded to be looked at can be trained too") {
  const Batch batch = read_rows(kGolden + "tiny-pretrain/rows.json", Task::pretrain);
  TrainSettings settings;
  settings.steps = 10;
  Trainer trainer(load_folder(kGolden + "tiny-pretrain", false).bert, settings);  // not a view of the file, which cannot be written
  trainer.step({&batch, 1});
  CHECK(trainer.done() == 1);
}

TEST_CASE("training: a state that makes no sense is refused before a number of the model changes") {
  testing::TemporaryFolder folder;
  const ModelFolder m = trainable(kGolden + "tiny-pretrain");
  TrainSettings settings;
  settings.steps = 10;
  Trainer trainer(m.bert, settings);
  trainer.save(folder / "good", {});
  m.bert.word.data()[700] = 0.25f;
  const SafeTensors good = SafeTensors::open(folder / "good");
  std::vector<Tensor> values;
  std::vector<NamedTensor> tensors;
  for (const SafeTensors::Entry& e : good.entries()) values.push_back(good.load(e));
  for (size_t i = 0; i < values.size(); i++) tensors.push_back({good.entries()[i].name, values[i].shape(), values[i].data()});
  for (const char* done : {"-1", "11", "x", ""}) {
    CAPTURE(done);
    save_safetensors(folder / "bad", tensors, {{"bert_state_version", "2"}, {"bert_steps", "10"}, {"bert_steps_done", done}});
    CHECK_THROWS_WITH_AS(trainer.load(folder / "bad"), doctest::Contains("bert_steps_done"), Error);
    CHECK(m.bert.word.data()[700] == 0.25f);
  }
  for (const auto& [key, value] : {std::pair<std::string, std::string>("bert_updates", "6"),
                                   {"bert_updates", ""},
                                   {"bert_skipped_in_a_row", "3"},
                                   {"bert_loss_mean", "nan"},
                                   {"bert_loss_mean", ""},
                                   {"bert_loss_variance", "inf"},
                                   {"bert_loss_last", "x"}}) {
    const std::string shown = key;  // clang 14 captures no structured binding
    CAPTURE(shown);
    std::map<std::string, std::string> about(good.metadata().begin(), good.metadata().end());
    about["bert_steps_done"] = "5", about["bert_updates"] = "3", about[key] = value;
    save_safetensors(folder / "bad", tensors, {about.begin(), about.end()});
    CHECK_THROWS_WITH_AS(trainer.load(folder / "bad"), doctest::Contains(key.c_str()), Error);
    CHECK(m.bert.word.data()[700] == 0.25f);
  }
  trainer.load(folder / "good");
  CHECK(m.bert.word.data()[700] != 0.25f);
}

TEST_CASE("one answer: a row's outputs are the same bytes alone, in any batch, at any number of threads") {
  const std::string folder = kGolden + "heads/sequence-classification";
  const ModelFolder m = load_folder(folder);
  std::vector<Example> examples;
  Random random({21, 0, 0, 0});
  for (int i = 0; i < 60; i++) {
    Example e;
    const int64_t n = 3 + random.below(60);
    for (int64_t t = 0; t < n; t++) e.ids.push_back((int32_t)(5 + random.below(195))), e.segments.push_back(t > n / 2);
    examples.push_back(e);
  }
  std::vector<float> alone;
  for (const Example& e : examples) {
    const std::vector<float> one = flat(head_outputs(m.bert, {&e, 1}, 1));
    alone.insert(alone.end(), one.begin(), one.end());
  }
  for (const int threads : {1, 2, 3})
    for (const int64_t tokens : {1, 64, 500, 100000}) {
      UseThreads use(threads);
      CHECK(flat(head_outputs(m.bert, examples, tokens)) == alone);
    }
  const ModelFolder plain = load_folder(folder, false);  // not packed: the same bytes too
  CHECK(flat(head_outputs(plain.bert, examples, 500)) == alone);
}

TEST_CASE("embedding in windows: the mean of them, by the tokens that each decides about; one window is the text itself") {
  ModelFolder m = load_folder_for(kGolden + "tiny-pretrain", Task::embed, {}, 1);
  std::string text;
  for (int i = 0; i < 9; i++) text += "the old dog sleeps in the house and reads ";
  const std::vector<std::vector<Window>> windows = {make_windows(m.tokenizer, Task::embed, {text, "the dog"}, 16, 4),
                                                    make_windows(m.tokenizer, Task::embed, {"a", {}}, 16, 4)};
  const Tensor merged = embed_windows(m.bert, windows, m.pooling, 500);
  REQUIRE(merged.rows() == 3);
  std::vector<double> sum((size_t)merged.cols());
  int64_t tokens = 0;
  for (const Window& w : windows[0]) {
    if (w.part) continue;
    CHECK(w.example.ids.size() <= 16);
    const int64_t n = std::count(w.decides.begin(), w.decides.end(), 1);
    const Tensor v = embed_examples(m.bert, {&w.example, 1}, m.pooling, 1);
    for (size_t h = 0; h < sum.size(); h++) sum[h] += (double)n * (double)v.data()[h];
    tokens += n;
  }
  CHECK(tokens == (int64_t)m.tokenizer.encode(text).ids.size() - 2);  // each decided about once
  for (size_t h = 0; h < sum.size(); h++) CHECK(merged.data()[h] == doctest::Approx(sum[h] / (double)tokens).epsilon(1e-5));
  const Model model = Model::load(kGolden + "tiny-pretrain");
  const std::vector<float> dog = model.embed("the dog"), a = model.embed("a");
  CHECK(std::equal(dog.begin(), dog.end(), merged.data() + merged.cols()));
  CHECK(std::equal(a.begin(), a.end(), merged.data() + 2 * merged.cols()));

  const std::string none, prompt = "the old ";
  const Item bare = {"dog sleeps", "house"}, whole = {"the old dog sleeps", "the old house"};
  const Asked plain = {m.bert, m.tokenizer, m.pooling, none, 16, 4, 500}, prompted = {m.bert, m.tokenizer, m.pooling, prompt, 16, 4, 500};
  CHECK(answer_items(prompted, {&bare, 1})[0].outputs == answer_items(plain, {&whole, 1})[0].outputs);
  CHECK(answer_items(plain, {&bare, 1})[0].outputs != answer_items(plain, {&whole, 1})[0].outputs);
  const Item alone = {"dog sleeps", {}};
  CHECK_THROWS_WITH_AS(answer_items(plain, {&alone, 1}), "similarity: an item of one text; two are compared", Error);
  CHECK(answer_items(plain, {}).empty());
}

TEST_CASE("a running text's words are those that tagged data has: one tag for U.S. and Jean-Luc, by their first piece") {
  const ModelFolder m = load_folder(kGolden + "heads/token-classification");
  auto words_of = [&](const std::string& text, int64_t length) {
    std::vector<std::string> words;
    int32_t last = -1;
    for (const Window& w : make_windows(m.tokenizer, Task::tag, {text, {}}, length, 2))
      for (size_t i = 0; i < w.words.size(); i++) {
        if (w.words[i] < 0 || w.words[i] < last) continue;
        if (w.decides[i]) CHECK((w.starts[i] != 0) == (w.words[i] > last));
        const std::string piece = text.substr((size_t)w.places[i][0], (size_t)(w.places[i][1] - w.places[i][0]));
        if (w.words[i] > last && w.starts[i]) words.push_back(""), last = w.words[i];
        if (w.decides[i]) words.back() += piece;
      }
    return words;
  };
  const std::vector<std::string> apart = {
      "Jean-Luc", "saw",   "the", "U.S.",   "and", "B.",     "Young", ",", "O'Neil", ",", "AT&T", ";",  "1,000",
      "to",       "12:30", ".",   "Japan",  "'",   "s",      "a",     "-", "b",      "c", ".",    "d.", "caf\u00E9-bar",
      "(",        "x_y",   ")",   "\u4E2D", "-",   "\u6587", "3.5",   ".", "No",     ":", "7"};
  const std::string text =
      "Jean-Luc saw the U.S. and B. Young, O'Neil, AT&T; 1,000 to 12:30. Japan's a - b c . d. caf\u00E9-bar (x_y) \u4E2D-\u6587 3.5. No:7";
  CHECK(words_of(text, 512) == apart);
  for (const std::string nothing : {"", " ", ".", "-", "'s", ". . .", "a.", ".a", "--a--b--"}) CHECK_NOTHROW(words_of(nothing, 512));
  const std::string one = "U.S.", given = "the " + one + " dog";
  const std::vector<Window> running = make_windows(m.tokenizer, Task::tag, {given, {}}, 32, 2),
                            in_words = make_windows(m.tokenizer, Task::tag, {"", {}, {"the", one, "dog"}}, 32, 2);
  CHECK(running[0].example.ids == in_words[0].example.ids);
  CHECK(running[0].words == in_words[0].words);
  CHECK(running[0].starts == in_words[0].starts);
}
TEST_CASE("long texts go paragraph by paragraph, tagged and answered as alone; the one with the question's rare words answers") {
  const ModelFolder m = load_folder(kGolden + "heads/question-answering");
  const std::string none, question = "the black dog by the river", paragraph = "the black dog is by the river and eats";
  const Asked how = {m.bert, m.tokenizer, m.pooling, none, 32, 8, 500};
  auto ask = [&](const std::string& context) {
    const Item item = {question, context};
    return answer_items(how, {&item, 1})[0];
  };
  auto windows_of = [&](const std::string& context) { return make_windows(m.tokenizer, Task::qa, {question, context}, 32, 8); };
  const Outcome alone = ask(paragraph);
  REQUIRE(windows_of(paragraph).size() == 1);
  const std::string one = "the man and the woman walk in the old city";
  for (const char* mark : {"\n\n", "\r\n\r\n", "\n \t\n", "\n\n\n\n", "\n"}) {
    std::string before, after;
    for (int i = 0; i < 40; i++) before += std::string("in the house") + mark, after += mark + std::string("in the house");
    const std::string context = before + paragraph + after;
    const std::vector<Window> windows = windows_of(context);
    REQUIRE(windows.size() == 81);  // none of what stands between
    const Window &there = windows[40], by_itself = windows_of(paragraph)[0];
    CHECK(there.example.ids == by_itself.example.ids);
    CHECK(there.decides == by_itself.decides);
    for (size_t i = 0; i < there.words.size(); i++)
      if (there.words[i] >= 0) CHECK(there.places[i][0] == by_itself.places[i][0] + (int64_t)before.size());
    const Outcome found = ask(context);
    CHECK(found.answers[0].text == alone.answers[0].text);
    CHECK(found.answers[0].start == alone.answers[0].start + (int64_t)before.size());
    CHECK(found.null_margin == alone.null_margin);
    Gold gold;
    gold.answers = {"black"}, gold.starts = {(int64_t)before.size() + 4};
    const std::vector<Example> examples = make_examples(Task::qa, windows, gold);
    for (size_t i = 0; i < examples.size(); i++) CHECK((examples[i].labels != std::vector<int32_t>{0, 0}) == (i == 40));
  }
  CHECK(windows_of(one + "\n" + one).size() == 1);                             // one window holds both
  CHECK(windows_of(one + "\n" + one + "\n" + one + "\n\n" + one).size() > 2);  // lines of one paragraph, which needs several windows
  CHECK(windows_of(one + "\n" + one + "\n" + one + "\n\n" + one).back().example.ids == windows_of(one)[0].example.ids);
  const ModelFolder tagger = load_folder(kGolden + "heads/token-classification");
  const Asked tagging = {tagger.bert, tagger.tokenizer, tagger.pooling, none, 32, 8, 500};
  const Item line = {one, {}}, lines = {one + "\n\n" + one + " " + paragraph + " " + one + " " + one + "\n\n\n" + one, {}};
  const Outcome of_line = answer_items(tagging, {&line, 1})[0], of_lines = answer_items(tagging, {&lines, 1})[0];
  REQUIRE(of_line.tags.size() == 10);
  REQUIRE(of_lines.tags.size() == 59);
  for (size_t i = 0; i < 10; i++)  // the first paragraph and the last, as alone
    for (const auto& [word, shift] : {std::pair(i, (size_t)0), {i + 49, lines.text.size() - one.size()}}) {
      CHECK((of_lines.tags[word] == of_line.tags[i] && of_lines.scores[word] == of_line.scores[i]));
      for (const size_t end : {0, 1}) CHECK(of_lines.words[word][end] == of_line.words[i][end] + (int64_t)shift);
    }
  double total = 0;
  for (const Answer& a : ask(one + "\n\n" + paragraph + "\n\n" + one + " " + one).answers) total += a.score;
  CHECK(total == doctest::Approx(1));
}

TEST_CASE("what a model does not answer is refused; a choice of none has no probability") {
  for (const char* name : {"token-classification", "question-answering", "multiple-choice", "masked-lm"}) {
    const Model model = Model::load(kGolden + "heads/" + name);
    CHECK_THROWS_WITH_AS(model.classify("the dog", "sleeps"), doctest::Contains("classify: the model is for "), Error);
  }
  const Model choice = Model::load(kGolden + "heads/multiple-choice");
  CHECK(choice.choose("the dog", {}).empty());
  const std::vector<std::string> two = {"sleeps", "reads a house"};
  const std::vector<float> p = choice.choose("the dog", two);
  REQUIRE(p.size() == 2);
  CHECK(p[0] + p[1] == doctest::Approx(1));
}

TEST_CASE("guesses of hundreds of masks in one batch are those of each text alone") {
  const ModelFolder m = load_folder(kGolden + "tiny-pretrain");
  std::vector<Example> examples;
  for (int32_t row = 0; row < 12; row++) {
    Example e{{m.tokenizer.cls}, {}};
    for (int32_t i = 0; i < 25 + row; i++) e.ids.push_back(i % 4 == row % 4 ? 10 + row : m.tokenizer.mask);
    e.ids.push_back(m.tokenizer.sep), e.segments.resize(e.ids.size());
    examples.push_back(e);
  }
  const auto all = guess_masks(m, examples, 2, 100000);
  size_t guesses = 0;
  for (size_t i = 0; i < examples.size(); i++) {
    const std::vector<MaskGuess> alone = guess_masks(m, {&examples[i], 1}, 2, 1)[0];
    REQUIRE(all[i].size() == alone.size());
    for (size_t g = 0; g < alone.size(); g++) {
      const MaskGuess &x = all[i][g], &y = alone[g];
      CHECK((x.mask == y.mask && x.id == y.id && x.probability == y.probability));
    }
    guesses += alone.size();
  }
  CHECK(guesses > 2 * 256);  // more masks than are computed at once
}

TEST_CASE("rows for added pieces: the mean of those that a piece would be read as, also where embeddings are narrower than layers") {
  const std::vector<std::string> old = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "do", "##g"}, more = {"dog", "x"};
  const WordPiece tokenizer = WordPiece::from_vocab(join(old, "\n") + "\n", {}, "old");
  Config config = Config::named("tiny", 7);
  config.model_type = "electra", config.hidden_size = 24, config.embedding_size = 16, config.num_attention_heads = 2;
  const Bert before = Bert::random(config, Task::mlm, 1);
  Bert after = before;
  std::vector<std::string> pieces = old;
  pieces.insert(pieces.end(), more.begin(), more.end());
  extend_rows(after, tokenizer, pieces);
  REQUIRE(after.word.shape() == Shape{9, 16});
  REQUIRE(after.decoder_bias.shape() == Shape{9});
  const float *was = before.word.data(), *is = after.word.data();
  CHECK(std::equal(was, was + 7 * 16, is));
  for (int64_t c = 0; c < 16; c++) {
    double all = 0;
    for (int64_t i = 0; i < 7; i++) all += (double)was[i * 16 + c] / 7;
    CHECK(is[7 * 16 + c] == doctest::Approx(((double)was[5 * 16 + c] + (double)was[6 * 16 + c]) / 2));
    CHECK(is[8 * 16 + c] == doctest::Approx(all));
  }
  CHECK(after.masked_logits(Tensor(Shape{1, 24}, 1.f), {0}).cols() == 9);
}

TEST_CASE("one model, many threads at once: each gets the answer it would get alone") {
  const Model model = Model::load(kGolden + "tiny-pretrain");
  const char* texts[] = {"the dog sleeps", "the old [MASK] reads", "a", "the [MASK] and the [MASK] of the house"};
  auto answer = [&](const char* text) {
    std::vector<float> all = model.embed(text);
    for (const MaskGuess& g : model.fill_mask(text)) all.push_back((float)g.id), all.push_back((float)g.probability);
    all.push_back((float)model.score(text).log_likelihood);
    const std::string both[] = {text, "the"};  // in a batch, and by a thread pool that all share
    for (const std::vector<float>& v : model.embed(both)) all.insert(all.end(), v.begin(), v.end());
    return all;
  };
  std::vector<std::vector<float>> alone, together(16);
  for (const char* text : texts) alone.push_back(answer(text));
  std::vector<std::thread> threads;
  for (size_t t = 0; t < together.size(); t++) threads.emplace_back([&, t] { together[t] = answer(texts[t % 4]); });
  for (std::thread& t : threads) t.join();
  for (size_t t = 0; t < together.size(); t++) CHECK(together[t] == alone[t % 4]);
  const std::vector<float> the = model.embed("the");
  for (const auto& all : alone) CHECK(std::equal(the.begin(), the.end(), all.end() - (int64_t)the.size()));
  CHECK(model.fill_mask("the [MASK]", -1).empty());
}

// Whole numbers, so that products are exact and often equal; row 7 holds NaN.
static Tensor whole_numbers(int64_t rows, uint64_t seed) {
  Tensor t({rows, 5});
  Random random({seed, 0, 0, 0});
  for (int64_t i = 0; i < t.size(); i++) t.data()[i] = (float)(random.below(5) - 2);
  if (rows > 7) t.data()[7 * 5 + 2] = NAN;
  return t;
}
static std::vector<Match> best_of(std::vector<Match> all, size_t top) {
  auto key = [](const Match& m) { return std::tuple(-m.score, m.a, m.b); };
  std::sort(all.begin(), all.end(), [&](const Match& x, const Match& y) { return key(x) < key(y); });
  all.resize(std::min(top, all.size()));
  return all;
}
static float product(const Tensor& x, int64_t i, const Tensor& y, int64_t j) {
  return std::inner_product(x.data() + i * 5, x.data() + i * 5 + 5, y.data() + j * 5, 0.f);
}
static bool same(const std::vector<Match>& x, const std::vector<Match>& y) {
  return std::equal(x.begin(), x.end(), y.begin(), y.end(),
                    [](const Match& a, const Match& b) { return a.score == b.score && a.a == b.a && a.b == b.b; });
}

TEST_CASE("search: the nearest rows and pairs are those of a plain search of all, equal ones by number, at any number of threads") {
  const Tensor vectors = whole_numbers(20000, 1), queries = whole_numbers(7, 2), few = whole_numbers(600, 3);
  std::vector<Match> pairs;
  for (int64_t a = 0; a < few.rows(); a++)
    for (int64_t b = a + 1; b < few.rows(); b++)
      if (a != 7 && b != 7) pairs.push_back({product(few, a, few, b), a, b});
  for (const int threads : {1, 3}) {
    UseThreads use(threads);
    const auto got = nearest_rows(queries, vectors, 30), many = nearest_rows(few, vectors, 3);
    REQUIRE(got.size() == 7);
    REQUIRE(many.size() == 600);
    for (int64_t q = 0; q < 7; q++) {
      std::vector<Match> all;
      for (int64_t r = 0; r < vectors.rows(); r++)
        if (r != 7) all.push_back({product(queries, q, vectors, r), q, r});
      CHECK(same(got[(size_t)q], best_of(all, 30)));
    }
    const Tensor one({1, 5}, {few.data() + 599 * 5, 5});
    CHECK(many[599][2].b == nearest_rows(one, vectors, 3)[0][2].b);  // alone or among others
    CHECK(many[7].empty());
    for (const size_t top : {1, 40}) CHECK(same(nearest_pairs(few, (int64_t)top), best_of(pairs, top)));
  }
  CHECK(nearest_rows(queries, few, 1000)[0].size() == 599);
  CHECK_THROWS_AS(nearest_rows(Tensor({1, 4}, 0.f), few, 1), Error);
  CHECK_THROWS_AS(nearest_pairs(few, 0), Error);
}

TEST_CASE("search: a query beside reading all vectors once: 1.5 times on a quiet machine" * doctest::skip()) {
  const Tensor vectors({200000, 384}, 0.05f), query({1, 384}, 0.05f);
  std::vector<float> sums(200);
  double read = 1e9, search = 1e9;  // the least of many, in turns: other programs run too
  auto time = [](double& least, auto&& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  };
  for (int i = 0; i < 60; i++) {
    time(read,
         [&] { parallel_for(200, [&](int64_t part) { sums[(size_t)part] = kernels().sum(vectors.data() + part * 384000, 384000); }); });
    time(search, [&] { nearest_rows(query, vectors, 5); });
  }
  MESSAGE("reading " << 1e3 * read << " ms, searching " << 1e3 * search << " ms");
  CHECK(search < 3 * read);  // a busy machine included
}

TEST_CASE("search: an index goes on where it was stopped, and is not taken for another model, text or file") {
  const testing::TemporaryFolder folder;
  const std::string path = folder / "index", part = path + ".part";
  const VectorIndex::Key key{1, 2, 5, 10};
  const Tensor x = whole_numbers(10, 4);
  auto rows = [&](int64_t begin, int64_t end) { return std::span(x.data() + begin * 5, (size_t)(end - begin) * 5); };
  {
    VectorIndex index(path, key);
    CHECK((index.count() == 0 && !index.stale() && !index.vectors()));
    index.append(rows(0, 4));
    CHECK_THROWS_WITH_AS(VectorIndex(path, key), doctest::Contains("another process"), Error);
    CHECK_THROWS_AS(index.append(rows(0, 7)), Error);
    CHECK_THROWS_AS(index.append({x.data(), 3}), Error);
  }
  std::ofstream(part, std::ios::app | std::ios::binary) << "half a vector, not counted yet";
  {
    VectorIndex index(path, key);
    CHECK(index.count() == 4);
    index.append(rows(4, 10));
    REQUIRE(index.vectors());
    CHECK(std::memcmp(index.vectors().data(), x.data(), 200) == 0);
  }
  CHECK(!std::filesystem::exists(part));
  CHECK(VectorIndex(path, key).vectors().shape() == Shape{10, 5});
  for (const VectorIndex::Key other : {VectorIndex::Key{9, 2, 5, 10}, {1, 9, 5, 10}, {1, 2, 4, 10}, {1, 2, 5, 11}}) {
    VectorIndex index(path, other);
    CHECK((index.stale() && index.count() == 0 && !index.vectors()));
  }
  CHECK(VectorIndex(path, key).count() == 10);  // it stays until another is whole
  std::filesystem::resize_file(path, 100);
  CHECK(VectorIndex(path, key).stale());
  for (const char* other : {"a text of somebody", "bertvecs"}) {
    std::ofstream(path) << other;
    CHECK_THROWS_WITH_AS(VectorIndex(path, key), doctest::Contains("something else"), Error);
    CHECK(read_file(path) == other);
  }
  CHECK_THROWS_AS(VectorIndex(folder / "no/such/folder", key), Error);
}

TEST_CASE("folders: what is saved loads again bit for bit, for each head") {
  for (const char* name : {"tiny-pretrain", "heads/sequence-classification", "heads/multi-label", "heads/regression", "heads/masked-lm"}) {
    CAPTURE(name);
    const ModelFolder m = load_folder(kGolden + name, false);
    CHECK(m.report.unexpected.empty());
    testing::TemporaryFolder folder;
    save_folder(folder.path, m.bert, m.carried);
    const ModelFolder again = load_folder(folder.path, false);
    CHECK(again.bert.task == m.bert.task);
    CHECK(again.config.labels == m.config.labels);
    const auto p = m.bert.parameters(), q = again.bert.parameters();
    REQUIRE(p.size() == q.size());
    for (size_t i = 0; i < p.size(); i++) {
      CHECK(p[i].name == q[i].name);
      CHECK(std::memcmp(p[i].data(), q[i].data(), 4 * (size_t)p[i].shape().size()) == 0);
    }
    CHECK(read_file(folder / "vocab.txt") == read_file(kGolden + name + "/vocab.txt"));
  }
  CHECK_THROWS_WITH_AS(save_folder("Makefile/inside", load_folder(kGolden + "tiny-pretrain").bert, {}),
                       doctest::Contains("Makefile/inside"), Error);
}

TEST_CASE("folders: a fine-tune takes the encoder, draws the head, and says so") {
  const ModelFolder m = load_folder_for(kGolden + "tiny-pretrain", Task::classify, {"no", "yes", "maybe"}, 5);
  CHECK(m.report.newly_initialised == std::vector<std::string>{"classifier.weight", "classifier.bias"});
  CHECK(m.report.ignored.size() == 7);  // cls.predictions.* and cls.seq_relationship.*
  CHECK(m.bert.classifier.weight.shape() == Shape{3, 32});
  const ModelFolder same = load_folder_for(kGolden + "heads/sequence-classification", Task::classify, m.config.labels, 5);
  CHECK(same.report.newly_initialised.size() == 2);  // other label names: other rows
  const Config c = Config::parse(read_file(kGolden + "heads/sequence-classification/config.json"), "c");
  CHECK(load_folder_for(kGolden + "heads/sequence-classification", Task::classify, c.labels, 5).report.newly_initialised.empty());
}

TEST_CASE("folders: a pretraining checkpoint under a narrower architecture: the heads that it has no use for are ignored by name") {
  // bert-base-uncased calls itself BertForMaskedLM and holds the next-sentence head and the pooler too; Google's small models name
  // none, and then the tensors tell
  for (const auto& [architecture, task, ignored] :
       {std::tuple{"\"BertForMaskedLM\"", Task::mlm, 4}, {"\"BertModel\"", Task::embed, 7}, {"", Task::pretrain, 0}}) {
    testing::TemporaryFolder folder;
    std::filesystem::copy(kGolden + "tiny-pretrain", folder.path, std::filesystem::copy_options::recursive);
    std::string config = read_file(folder / "config.json");
    const std::string was = "\"BertForPreTraining\"";
    REQUIRE(config.find(was) != std::string::npos);
    write_file(folder / "config.json", config.replace(config.find(was), was.size(), architecture));
    const ModelFolder m = load_folder(folder.path);
    CHECK(m.bert.task == task);
    CHECK(m.report.ignored.size() == (size_t)ignored);
    CHECK(m.report.unexpected.empty());
    CHECK(m.report.newly_initialised.empty());
  }
}

TEST_CASE("folders: missing files, missing, extra and ill-shaped tensors are refused by name") {
  CHECK_THROWS_WITH_AS(load_folder("no/such/folder"), doctest::Contains("no such folder"), Error);
  CHECK_THROWS_WITH_AS(load_folder("tests"), doctest::Contains("config.json, vocab.txt, model.safetensors missing"), Error);
  CHECK_THROWS_WITH_AS(load_folder("Makefile"), doctest::Contains("a file, where"), Error);
  SKIP_WITHOUT(testing::shared + "golden/models/files");
  const std::string files = testing::shared + "golden/models/files/";
  CHECK_THROWS_WITH_AS(load_folder(files + "h-extra"), doctest::Contains("cls.extra.weight"), Error);
  CHECK_THROWS_WITH_AS(load_folder(files + "i-missing"), doctest::Contains("bert.encoder.layer.1.output.dense.weight"), Error);
  CHECK_THROWS_WITH_AS(load_folder(files + "j-wrong-shape"),
                       doctest::Contains("bert.encoder.layer.0.intermediate.dense.weight: shape [32,64]"), Error);
  CHECK_THROWS_WITH_AS(load_folder(files + "o-untied-decoder"), doctest::Contains("cls.predictions.decoder.weight"), Error);
  for (const char* good : {"f-gamma-beta-module", "n-old-buffers"}) {
    const ModelFolder m = load_folder(files + good), want = load_folder(kGolden + "tiny-pretrain");
    CHECK(m.report.unexpected.empty());
    const Batch batch = read_rows(kGolden + "tiny-pretrain/rows.json", Task::pretrain);
    const Tensor x = m.bert.forward(batch), y = want.bert.forward(batch);
    CHECK(std::memcmp(x.data(), y.data(), 4 * (size_t)x.size()) == 0);
  }
}

// A folder of the test's own with another's files; `edit` takes config.json's text.
static void copy_folder(const std::string& from, const std::string& to, const std::function<std::string(std::string)>& edit) {
  std::filesystem::copy(from, to, std::filesystem::copy_options::recursive);
  write_file(to + "/config.json", edit(read_file(to + "/config.json")));
}
static std::string without(std::string text, const std::string& key) {  // a line of a config.json
  const size_t at = text.find("  \"" + key + "\"");
  if (at == std::string::npos) throw Error("no " + key);
  size_t end = text.find(",\n", at);
  if (text.find('[', at) < end) end = text.find("],\n", at) + 1;
  return text.erase(at, end + 2 - at);
}

TEST_CASE("folders: one model in every container gives the same bytes") {
  const Batch batch = read_rows(kGolden + "tiny-pretrain/rows.json", Task::pretrain);
  auto outputs = [&](const std::string& folder) {
    const ModelFolder m = load_folder(folder);
    CHECK(m.report.unexpected.empty());
    const Tensor hidden = m.bert.forward(batch);
    Dropout none;
    std::vector<float> all = flat(hidden);
    for (const Tensor& t : {m.bert.masked_logits(hidden, batch.masked), m.bert.logits(hidden, batch, none)})
      all.insert(all.end(), t.data(), t.data() + t.size());
    return all;
  };
  const std::vector<float> want = outputs(kGolden + "tiny-pretrain");
  for (const char* name : {"e-sharded", "k-bin-views", "l-bin-legacy-views"}) {
    CAPTURE(name);
    CHECK(outputs(kGolden + "files/" + name) == want);
  }
  testing::TemporaryFolder folder;  // shards of the older format; and an index that does not tell the truth
  std::filesystem::copy(kGolden + "files/k-bin-views", folder.path, std::filesystem::copy_options::recursive);
  const auto all = SafeTensors::open_torch(folder / "pytorch_model.bin");
  std::filesystem::rename(folder / "pytorch_model.bin", folder / "one.bin");
  auto index = [&](const std::string& left_out, const std::string& more) {
    std::string map;
    for (const auto& e : all.entries())
      if (e.name != left_out) map += (map.empty() ? "" : ",") + json_quote(e.name) + ":\"one.bin\"";
    write_file(folder / "pytorch_model.bin.index.json", "{\"weight_map\":{" + map + more + "}}");
    return folder.path;
  };
  CHECK(outputs(index("", "")) == want);
  CHECK_THROWS_WITH_AS(outputs(index("cls.seq_relationship.bias", "")), doctest::Contains("one.bin: cls.seq_relationship.bias: not in"),
                       Error);
  CHECK_THROWS_WITH_AS(outputs(index("", ",\"x\":\"one.bin\"")), doctest::Contains("one.bin: x: missing, but in"), Error);
  CHECK_THROWS_WITH_AS(outputs(index("", ",\"x\":\"../one.bin\"")), doctest::Contains("of the same folder"), Error);
  CHECK_THROWS_WITH_AS(outputs(index("", ",\"x\":\"two.bin\"")), doctest::Contains("two.bin: cannot open"), Error);
  SKIP_WITHOUT(testing::shared + "golden/models/files");
  for (const char* name : {"a-bin-zip", "b-bin-legacy", "f-gamma-beta-module", "m-bin-parameters", "n-old-buffers", "p-f64"}) {
    CAPTURE(name);
    CHECK(outputs(testing::shared + "golden/models/files/" + name) == want);
  }
  for (const char* name : {"c-f16", "d-bf16", "q-bin-bf16"}) {  // rounded weights have logits of their own
    CAPTURE(name);
    const std::string files = testing::shared + "golden/models/files/";
    const ModelFolder m = load_folder(files + name);
    const SafeTensors golden = SafeTensors::open(files + (std::string(name) == "c-f16" ? "c-f16" : "d-bf16") + "/golden.safetensors");
    const Tensor mlm = m.bert.masked_logits(m.bert.forward(batch), batch.masked);
    CHECK(difference(golden, "mlm_logits", mlm.data(), mlm.size()) < 4 * 1.88e-6);
  }
  const ModelFolder bare = load_folder(testing::shared + "golden/models/files/g-no-bert-prefix");
  CHECK(bare.bert.task == Task::embed);
  CHECK(flat(bare.bert.forward(batch)) == std::vector<float>(want.begin(), want.begin() + 127 * 32));
}

// Tolerances: four times what float32 costs in torch (the golden's README).
TEST_CASE("golden: DistilBERT and ELECTRA, layer by layer, their heads, saved and loaded again") {
  struct Variant {
    const char* name;
    Task task;
    double embedding, first, last, logits;
  };
  for (const Variant& v : {Variant{"distilbert-masked-lm", Task::mlm, 4.88e-7, 1.32e-6, 1.38e-6, 2.17e-6},
                           Variant{"distilbert-sequence-classification", Task::classify, 4.37e-7, 1.41e-6, 1.97e-6, 6.27e-7},
                           Variant{"electra-discriminator", Task::replaced, 4.52e-7, 1.06e-6, 1.27e-6, 4.1e-7}}) {
    CAPTURE(v.name);
    const std::string folder = kGolden + "variants/" + v.name;
    const SafeTensors golden = SafeTensors::open(folder + "/golden.safetensors");
    Batch batch;
    const Json rows = Json::parse(read_file(folder + "/rows.json"), folder);
    for (const Json& row : rows.items(folder)) {
      const std::vector<int32_t> ids = ints(row, "input_ids");
      batch.add_row(ids, row.find("token_type_ids") ? ints(row, "token_type_ids") : std::vector<int32_t>(ids.size()));
    }
    testing::TemporaryFolder saved;
    const ModelFolder plain = load_folder(folder, false);
    save_folder(saved.path, plain.bert, plain.carried);
    CHECK(SafeTensors::open(saved / "model.safetensors").entries().size() ==
          SafeTensors::open(folder + "/model.safetensors").entries().size());
    for (const std::string& path : {folder, saved.path}) {
      const ModelFolder m = load_folder(path);
      REQUIRE(m.bert.task == v.task);
      CHECK(m.report.ignored.empty());
      CHECK(m.report.unexpected.empty());
      for (size_t l = 0; l <= 2; l++) {
        Bert first = m.bert;
        first.layers.resize(l);
        const Tensor x = first.forward(batch);
        CHECK(difference(golden, l ? "layer_" + std::to_string(l - 1) : "embedding_output", x.data(), x.size()) < 4 * (l == 0 ? v.embedding
                                                                                                                       : l == 1 ? v.first
                                                                                                                                : v.last));
      }
      const Tensor hidden = m.bert.forward(batch);
      std::vector<int64_t> every((size_t)batch.tokens());
      for (size_t i = 0; i < every.size(); i++) every[i] = (int64_t)i;
      Dropout none;
      const Tensor logits = v.task == Task::mlm ? m.bert.masked_logits(hidden, every) : m.bert.logits(hidden, batch, none);
      CHECK(difference(golden, "logits", logits.data(), logits.size()) < 4 * v.logits);
    }
    const Config c = Config::parse(read_file(saved / "config.json"), "c");
    CHECK(c.class_name() == Config::parse(read_file(folder + "/config.json"), "c").class_name());
    CHECK(c.to_json() == read_file(saved / "config.json"));
  }
  // training goes through the cousins too: no gradient for segments that are not there
  ModelFolder m = load_folder_for(kGolden + "variants/distilbert-masked-lm", Task::classify, {"a", "b"}, 3);
  CHECK(m.report.newly_initialised.size() == 4);
  CHECK(m.report.newly_initialised[0] == "pre_classifier.weight");
  CHECK(m.report.ignored.size() == 5);
  TrainSettings settings;
  settings.steps = 3, settings.lr = 1e-2;
  Trainer trainer(m.bert, settings);
  Batch batch;
  for (int32_t r = 0; r < 4; r++)
    batch.add_row(std::vector<int32_t>{2, 10 + r, 20, 3}, std::vector<int32_t>(4)), batch.labels.push_back(r % 2);
  const double before = trainer.step({&batch, 1}).loss.total;
  trainer.step({&batch, 1});
  CHECK(trainer.step({&batch, 1}).loss.total < before);
  CHECK_THROWS_WITH_AS(load_folder_for(kGolden + "variants/distilbert-masked-lm", Task::pretrain, {}, 3), doctest::Contains("--no-nsp"),
                       Error);
}

TEST_CASE("golden: the other heads of DistilBERT and ELECTRA, saved and loaded again under the same names") {
  const Batch batch = read_rows(kGolden + "variant-heads/rows.json", Task::mlm);
  auto names = [](const std::string& folder) {
    std::set<std::string> all;
    const SafeTensors file = SafeTensors::open(folder + "/model.safetensors");
    for (const SafeTensors::Entry& e : file.entries()) all.insert(e.name);
    return all;
  };
  for (const auto& head : {std::pair{"DistilBertForTokenClassification", Task::tag},
                           {"DistilBertForQuestionAnswering", Task::qa},
                           {"DistilBertForMultipleChoice", Task::choice},
                           {"ElectraForMaskedLM", Task::mlm},
                           {"ElectraForSequenceClassification", Task::classify},
                           {"ElectraForTokenClassification", Task::tag},
                           {"ElectraForQuestionAnswering", Task::qa}}) {
    const std::string name = head.first;
    const Task task = head.second;
    CAPTURE(name);
    const std::string folder = kGolden + "variant-heads/" + name;
    testing::TemporaryFolder saved;
    const ModelFolder plain = load_folder(folder, false);
    save_folder(saved.path, plain.bert, plain.carried);
    CHECK(names(saved.path) == names(folder));
    for (const std::string& path : {folder, saved.path}) {
      const ModelFolder m = load_folder(path);
      REQUIRE(m.bert.task == task);
      CHECK((m.report.ignored.empty() && m.report.newly_initialised.empty()));
      const Tensor hidden = m.bert.forward(batch);
      std::vector<int64_t> every((size_t)batch.tokens());
      std::iota(every.begin(), every.end(), 0);
      Dropout none;
      const Tensor logits = task == Task::mlm ? m.bert.masked_logits(hidden, every) : m.bert.logits(hidden, batch, none);
      CHECK(difference(SafeTensors::open(folder + "/golden.safetensors"), "logits", logits.data(), logits.size()) < 4 * 7.75e-7);
    }
  }
  testing::TemporaryFolder folder;
  const std::string path = folder / "m";
  copy_folder(kGolden + "variant-heads/ElectraForSequenceClassification", path, [](std::string text) {
    const size_t at = text.find("ForSequenceClassification");
    return at == text.npos ? text : text.replace(at, 25, "ForMultipleChoice");
  });
  CHECK_THROWS_WITH_AS(load_folder(path), doctest::Contains("ElectraForMultipleChoice is not built"), Error);
}

TEST_CASE("folders: what config.json does not say, the tensors tell; strangers are refused by name") {
  struct Silent {
    const char *folder, *key;
    Task task;
  };
  for (const Silent& s : {Silent{"tiny-pretrain", "architectures", Task::pretrain}, Silent{"heads/masked-lm", "architectures", Task::mlm},
                          Silent{"heads/sequence-classification", "architectures", Task::classify},
                          Silent{"variants/distilbert-masked-lm", "model_type", Task::mlm},
                          Silent{"variants/electra-discriminator", "architectures", Task::replaced},
                          Silent{"variants/electra-discriminator", "model_type", Task::replaced}}) {
    CAPTURE(s.folder);
    testing::TemporaryFolder folder;
    const std::string path = folder / "m";
    copy_folder(kGolden + s.folder, path, [&](const std::string& text) { return without(text, s.key); });
    CHECK(load_folder(path).bert.task == s.task);
  }
  for (const auto& [type, lacks] : {std::pair{"albert", "SentencePiece"},
                                    {"roberta", "byte-level BPE"},
                                    {"gpt2", "a decoder"},
                                    {"t5", "a decoder"},
                                    {"squeezebert", "distilbert and electra"}}) {
    testing::TemporaryFolder folder;
    write_file(folder / "config.json", "{\"model_type\": \"" + std::string(type) + "\"}");
    CHECK_THROWS_WITH_AS(load_folder(folder.path), doctest::Contains(lacks), Error);
  }
  SKIP_WITHOUT(testing::shared + "golden/models/variants");
  for (const char* name : {"albert-masked-lm", "roberta-masked-lm"})
    CHECK_THROWS_WITH_AS(load_folder(testing::shared + "golden/models/variants/" + name), doctest::Contains("it needs"), Error);
}

TEST_CASE("folders: sentence-transformers' recipes: every way of pooling, side by side, dense layers, the default prompt") {
  testing::TemporaryFolder folder;
  const std::string path = folder / "m";
  copy_folder(kGolden + "tiny-pretrain", path, [](const std::string& text) { return text; });
  auto recipe = [&](const std::string& pooling, const std::string& more) {
    std::filesystem::create_directories(path + "/1_Pooling");
    write_file(path + "/1_Pooling/config.json", pooling);
    write_file(path + "/modules.json",
               "[{\"type\":\"sentence_transformers.models.Transformer\",\"path\":\"\"},"
               "{\"type\":\"sentence_transformers.models.Pooling\",\"path\":\"1_Pooling\"}" +
                   more + "]");
  };
  const char* text = "the dog sleeps";
  const ModelFolder plain = load_folder(kGolden + "tiny-pretrain");
  const Encoding e = plain.tokenizer.encode(text);
  Batch batch;
  batch.add_row(e.ids, e.type_ids);
  const Tensor hidden = plain.bert.forward(batch);
  const int64_t T = hidden.rows(), H = hidden.cols();
  auto expected = [&](const std::string& mode, int64_t c) {
    double sum = 0, weighted = 0, most = -1e30;
    for (int64_t t = 0; t < T; t++) {
      const double x = hidden.data()[t * H + c];
      sum += x, weighted += (double)(t + 1) * x, most = std::max(most, x);
    }
    return mode == "cls"                    ? hidden.data()[c]
           : mode == "max"                  ? most
           : mode == "mean"                 ? sum / (double)T
           : mode == "mean_sqrt_len_tokens" ? sum / std::sqrt((double)T)
           : mode == "weightedmean"         ? weighted / ((double)(T * (T + 1)) / 2)
                                            : hidden.data()[(T - 1) * H + c];
  };
  const std::vector<std::string> modes = {"cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"};
  std::string flags, names;
  for (const std::string& mode : modes) {
    const std::string flag = "\"pooling_mode_" + mode +
                             (mode == "cls"                                               ? "_token"
                              : mode == "max" || mode == "mean" || mode == "weightedmean" ? "_tokens"
                                                                                          : "") +
                             "\":true";
    flags = flag + (flags.empty() ? "" : ",") + flags;  // any order in the file: sentence-transformers has one of its own
    names += (names.empty() ? "\"" : ",\"") + mode + "\"";
    recipe("{" + flag + "}", "");
    const std::vector<float> v = Model::load(path).embed(text);
    REQUIRE(v.size() == (size_t)H);
    for (int64_t c = 0; c < H; c++) CHECK(v[(size_t)c] == doctest::Approx(expected(mode, c)).epsilon(1e-5));
  }
  for (const std::string& config : {"{" + flags + "}", "{\"pooling_mode\":[" + names + "]}"}) {
    recipe(config, "");
    const Model model = Model::load(path);
    CHECK(model.folder().pooling.name() == "cls+max+mean+mean_sqrt_len_tokens+weightedmean+lasttoken");
    const std::vector<float> v = model.embed(text);
    REQUIRE(v.size() == (size_t)(6 * H));
    for (int64_t i = 0; i < 6 * H; i++) CHECK(v[(size_t)i] == doctest::Approx(expected(modes[(size_t)(i / H)], i % H)).epsilon(1e-5));
  }
  const Tensor w = testing::random_tensor({5, H}, 1), b = testing::random_tensor({5}, 2);
  std::filesystem::create_directories(path + "/2_Dense");
  save_safetensors(path + "/2_Dense/model.safetensors", {{"linear.weight", {5, H}, w.data()}, {"linear.bias", {5}, b.data()}}, {});
  write_file(path + "/2_Dense/config.json", "{\"activation_function\":\"torch.nn.modules.activation.Tanh\"}");
  const std::string dense = ",{\"type\":\"sentence_transformers.models.Dense\",\"path\":\"2_Dense\"}",
                    norm = ",{\"type\":\"sentence_transformers.models.Normalize\",\"path\":\"3_Normalize\"}";
  recipe("{\"pooling_mode\":\"mean\"}", dense + norm);
  const ModelFolder m = load_folder(path, false);
  CHECK(m.carried.count("2_Dense/model.safetensors") == 1);
  const std::string saved = folder / "saved";
  save_folder(saved, m.bert, m.carried);
  for (const std::string& at : {path, saved}) {
    const std::vector<float> v = Model::load(at).embed(text);
    REQUIRE(v.size() == 5);
    double y[5], length = 0;
    for (int64_t o = 0; o < 5; o++) {
      double sum = b.data()[o];
      for (int64_t c = 0; c < H; c++) sum += w.data()[o * H + c] * expected("mean", c);
      y[o] = std::tanh(sum), length += y[o] * y[o];
    }
    for (size_t o = 0; o < 5; o++) CHECK(v[o] == doctest::Approx(y[o] / std::sqrt(length)).epsilon(1e-5));
  }
  recipe("{\"pooling_mode\":[\"mean\",\"cls\"]}", dense);
  CHECK_THROWS_WITH_AS(load_folder(path), doctest::Contains("do not fit vectors of 64"), Error);
  recipe("{\"pooling_mode\":\"mean\"}", norm + dense);
  CHECK_THROWS_WITH_AS(load_folder(path), doctest::Contains("Dense after Normalize"), Error);
  recipe("{\"pooling_mode\":\"median\"}", "");
  CHECK_THROWS_WITH_AS(load_folder(path), doctest::Contains("median"), Error);
  recipe("{\"pooling_mode\":\"mean\"}", "");
  write_file(path + "/config_sentence_transformers.json", "{\"prompts\":{\"query\":\"the old \"},\"default_prompt_name\":\"query\"}");
  CHECK(Model::load(path).embed("dog") == Model::load(kGolden + "tiny-pretrain").embed("the old dog"));
  recipe("{\"pooling_mode\":\"mean\",\"include_prompt\":false}", "");
  CHECK_THROWS_WITH_AS(load_folder(path), doctest::Contains("1_Pooling/config.json: include_prompt"), Error);
  write_file(path + "/config_sentence_transformers.json", "{\"prompts\":{\"query\":\"the old \",\"document\":\"\"}}");
  CHECK(Model::load(path).embed("dog") == Model::load(kGolden + "tiny-pretrain").embed("dog"));
  CHECK(folder_prompt(path, "document") == "");
  CHECK_THROWS_WITH_AS(folder_prompt(path, "query"), doctest::Contains("include_prompt"), Error);
  recipe("{\"pooling_mode\":\"mean\"}", dense);
  for (const char* odd : {"\"use_residual\":true", "\"activation_function\":\"my.GELU\"", "\"module_input_name\":\"token_embeddings\""}) {
    write_file(path + "/2_Dense/config.json", "{" + std::string(odd) + "}");
    CHECK_THROWS_WITH_AS(load_folder(path), doctest::Contains("is not built"), Error);
  }
}

TEST_CASE("folders: do_lower_case of a sentence-transformers folder lower-cases the text, accents stay") {
  testing::TemporaryFolder folder;
  const std::string path = folder / "m";
  copy_folder(kGolden + "tiny-pretrain", path, [](const std::string& text) { return text; });
  write_file(path + "/tokenizer_config.json", "{\"do_lower_case\": false}");
  const WordPiece uncased = load_folder(kGolden + "tiny-pretrain").tokenizer, cased = load_folder(path).tokenizer;
  REQUIRE(!cased.settings().lowercase);
  CHECK(cased.encode("The DOG").ids != uncased.encode("the dog").ids);
  write_file(path + "/sentence_bert_config.json", "{\"max_seq_length\": 20, \"do_lower_case\": true}");
  const ModelFolder m = load_folder(path);
  CHECK(m.max_length == 20);
  CHECK(m.tokenizer.encode("The DOG").ids == uncased.encode("the dog").ids);
  CHECK(m.tokenizer.encode("D\xC3\x93G").ids == cased.encode("d\xC3\xB3g").ids);
  CHECK(m.tokenizer.encode("D\xC3\x93G").ids != uncased.encode("d\xC3\xB3g").ids);
}

TEST_CASE("folders: saved in f16 and bf16, and what bf16 held comes back without a difference") {
  testing::TemporaryFolder folder;
  const ModelFolder m = load_folder(kGolden + "files/q-bin-bf16", false);
  for (const char* dtype : {"F32", "BF16", "F16"}) {
    save_folder(folder.path, m.bert, m.carried, dtype);
    const ModelFolder again = load_folder(folder.path, false);
    const auto p = m.bert.parameters(), q = again.bert.parameters();
    REQUIRE(p.size() == q.size());
    for (size_t i = 0; i < p.size(); i++) {
      const double most = testing::largest_difference(p[i].data(), q[i].data(), p[i].shape().size());
      CHECK(most <= (dtype == std::string("F16") ? 1e-3 : 0));
    }
    CHECK(SafeTensors::open(folder / "model.safetensors").entries()[0].dtype == dtype);
  }
  CHECK(read_file(folder / "config.json").find("\"float16\"") != std::string::npos);
}

// ---- bf16 and int8 ---------------------------------------------------------------------------------------------------
namespace {
constexpr Precision kNarrow[] = {Precision::bf16, Precision::int8};

std::vector<Example> random_examples(int count, int most) {
  std::vector<Example> examples;
  Random random({21, 0, 0, 0});
  for (int i = 0; i < count; i++) {
    Example e;
    const int64_t n = 3 + random.below(most - 2);
    for (int64_t t = 0; t < n; t++) e.ids.push_back((int32_t)(5 + random.below(190))), e.segments.push_back(t > n / 2);
    examples.push_back(e);
  }
  return examples;
}

void append(std::vector<float>& to, const Tensor& t) { to.insert(to.end(), t.data(), t.data() + t.size()); }
// Hidden states, and what the heads make of them.
std::vector<float> everything(const Bert& bert, const Batch& batch) {
  const Tensor hidden = bert.forward(batch);
  std::vector<float> all = flat(hidden);
  std::vector<int64_t> every((size_t)batch.tokens());
  std::iota(every.begin(), every.end(), 0);
  const HeadKind& head = head_kind(bert.task);
  Dropout none;
  if (head.masked_words) append(all, bert.masked_logits(hidden, every));
  if (head.next_sentence || head.output || bert.task == Task::replaced) append(all, bert.logits(hidden, batch, none));
  return all;
}
double farthest(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  return testing::largest_difference(a.data(), b.data(), (int64_t)a.size());
}

// A folder with these parts of the one at `from` in these precisions; and the same in memory, ready to answer.
Bert save_narrow(const std::string& folder, const std::string& from, const std::vector<Precision>& parts, Precision called) {
  const ModelFolder plain = load_folder(from, false);
  Bert bert = plain.bert;
  for (size_t i = 0; i < parts.size(); i++) narrow_part(bert, (int64_t)i, plain.bert, parts[i]);
  bert.config.quantized = called;
  save_folder(folder, bert, plain.carried);
  bert.pack();
  return bert;
}
std::vector<std::string> sorted(std::vector<std::string> names) {
  std::sort(names.begin(), names.end());
  return names;
}
std::map<std::string, std::string> types_in(const std::string& folder) {
  std::map<std::string, std::string> types;
  const SafeTensors file = SafeTensors::open(folder + "/model.safetensors");
  for (const SafeTensors::Entry& e : file.entries()) types[e.name] = e.dtype;
  return types;
}
// Every tensor of the file was loaded, and nothing else happened.
void check_all_loaded(const LoadReport& report, const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& [name, type] : types_in(folder)) names.push_back(name);
  CHECK(sorted(report.loaded) == names);
  for (const auto* none : {&report.tied, &report.newly_initialised, &report.ignored, &report.unexpected}) CHECK(none->empty());
}
}  // namespace

TEST_CASE("bf16 and int8: near f32 and not f32; one answer alone, in any batch, at any number of threads, masked words too") {
  const std::string folder = kGolden + "tiny-pretrain";
  const ModelFolder f32 = load_folder(folder);
  const Batch batch = read_rows(folder + "/rows.json", Task::pretrain);
  const std::vector<Example> examples = random_examples(40, 60);
  struct Bound {
    Precision precision;
    double embeddings, first, last, words;  // largest differences, some 1.5 times what was measured
  };
  for (const Bound& b : {Bound{Precision::bf16, 0.0085, 0.025, 0.04, 0.02}, Bound{Precision::int8, 0.018, 0.085, 0.14, 0.07}}) {
    CAPTURE(std::string(name_of(b.precision)));
    const ModelFolder m = load_folder(folder, true, b.precision);
    CHECK(sorted(m.report.loaded) == sorted(f32.report.loaded));
    for (size_t l = 0; l <= 2; l++) {
      Bert first = m.bert, plain = f32.bert;
      first.layers.resize(l), plain.layers.resize(l);
      const double most = farthest(flat(first.forward(batch)), flat(plain.forward(batch)));
      CHECK(most > 0);
      CHECK(most < (l == 0 ? b.embeddings : l == 1 ? b.first : b.last));
    }
    const Tensor hidden = f32.bert.forward(batch);  // the same for both: what the decoder alone costs
    const double words = farthest(flat(m.bert.masked_logits(hidden, batch.masked)), flat(f32.bert.masked_logits(hidden, batch.masked)));
    CHECK(words > 0);
    CHECK(words < b.words);

    std::vector<float> alone, alone_words;
    for (const Example& e : examples) {
      UseThreads one(1);
      Batch row;
      row.add_row(e.ids, e.segments);
      std::vector<int64_t> every(e.ids.size());
      std::iota(every.begin(), every.end(), 0);
      const Tensor x = m.bert.forward(row);
      append(alone, x), append(alone_words, m.bert.masked_logits(x, every));
    }
    const Tensor all({(int64_t)alone.size() / 32, 32}, alone);
    std::vector<int64_t> every((size_t)all.rows());
    std::iota(every.begin(), every.end(), 0);
    for (const int threads : {1, 2, 3}) {
      UseThreads use(threads);
      for (const int64_t tokens : {1, 64, 500, 100000}) CHECK(flat(token_vectors(m.bert, examples, tokens)) == alone);
      CHECK(flat(m.bert.masked_logits(all, every)) == alone_words);
    }
  }
}

TEST_CASE("forward: tokens that are read have the bytes of a forward of all, the others 0, alone and in many rows, in every precision") {
  const std::string folder = kGolden + "tiny-pretrain";
  const Batch batch = read_rows(folder + "/rows.json", Task::pretrain);
  for (const Precision precision : {Precision::f32, Precision::bf16, Precision::int8}) {
    CAPTURE(std::string(name_of(precision)));
    const ModelFolder m = load_folder(folder, true, precision);
    const Tokens read = m.bert.read_by_head(batch);
    CHECK(read.size() == batch.masked.size() + (size_t)batch.rows());
    for (const Tokens& bad : {Tokens{3, 2}, Tokens{-1}, Tokens{0, batch.tokens()}}) CHECK_THROWS_AS(m.bert.forward(batch, bad), Error);
    const std::vector<float> all = flat(m.bert.forward(batch));
    std::vector<float> want(all.size(), 0.f);
    for (const int64_t t : read) std::copy_n(all.begin() + t * 32, 32, want.begin() + t * 32);
    Dropout none;
    CHECK(flat(m.bert.forward(batch, none, false, read)) == want);
    Batch many;  // several groups of rows, each on a thread of its own
    Tokens read_of_many;
    std::vector<float> want_of_many;
    for (int64_t i = 0; i < 12; i++) {
      const bool none = i % 4 == 1;  // of this copy nothing is read
      for (const int64_t t : none ? Tokens() : read) read_of_many.push_back(many.tokens() + t);
      for (int64_t r = 0; r < batch.rows(); r++) {
        const auto begin = batch.ids.begin() + batch.offsets[(size_t)r], end = batch.ids.begin() + batch.offsets[(size_t)r + 1];
        const auto segments = batch.segments.begin() + batch.offsets[(size_t)r];
        many.add_row({begin, end}, {segments, segments + (end - begin)});
      }
      if (none)
        want_of_many.resize(want_of_many.size() + want.size());
      else
        want_of_many.insert(want_of_many.end(), want.begin(), want.end());
    }
    for (const int threads : {1, 3}) {
      const UseThreads use(threads);
      CHECK(flat(m.bert.forward(many, read_of_many)) == want_of_many);
    }
    const std::vector<Example> examples = random_examples(40, 60);
    Pooling first;
    first.kinds = {Pooling::cls};
    const Tensor tokens = token_vectors(m.bert, examples, 500), vectors = embed_examples(m.bert, examples, first, 500);
    for (int64_t i = 0, t = 0; i < vectors.rows(); t += (int64_t)examples[(size_t)i++].ids.size())
      CHECK(std::memcmp(vectors.data() + i * 32, tokens.data() + t * 32, 32 * sizeof(float)) == 0);
  }
}

TEST_CASE("training: similarity by [CLS], or by the pooler, has the loss and the gradients of a forward of all") {
  const Batch rows = read_rows(kGolden + "tiny-pretrain/rows.json", Task::pretrain);
  Batch batch;
  batch.ids = rows.ids, batch.segments = rows.segments, batch.positions = rows.positions, batch.offsets = rows.offsets;
  batch.groups = {0, 2, 5}, batch.targets = {0.2f, 0.9f};
  REQUIRE(batch.rows() == 5);
  for (const Pooling::Kind kind : {Pooling::cls, Pooling::pooler}) {
    ModelFolder m = load_folder_for(kGolden + "tiny-pretrain", Task::embed, {}, 1);
    for (const Parameter& p : m.bert.parameters()) Tensor(p.tensor).set_needs_grad();
    LossRule rule;
    rule.pooling.kinds = {kind};
    CHECK(m.bert.read_by_head(batch, rule.pooling) == Tokens(batch.offsets.begin(), batch.offsets.end() - 1));
    CHECK(m.bert.read_by_head(batch).empty());
    std::vector<std::vector<float>> gradients(2);
    std::vector<double> losses;
    for (const bool all : {true, false}) {
      Dropout none;
      Losses report;
      Tape tape;
      const Tensor hidden = m.bert.forward(batch, none, false, all ? Tokens() : m.bert.read_by_head(batch, rule.pooling));
      tape.backward(batch_loss(m.bert, hidden, batch, {1, 2}, none, report, rule));
      losses.push_back(report.total);
      for (const Parameter& p : m.bert.parameters())
        if (!p.first_row && p.tensor.has_grad()) append(gradients[all], Tensor(p.tensor).take_grad());
    }
    CHECK(losses[0] == doctest::Approx(losses[1]).epsilon(1e-6));  // the same bytes, but on OpenBLAS
    REQUIRE(gradients[0].size() == gradients[1].size());
    CHECK(testing::largest_difference(gradients[0].data(), gradients[1].data(), (int64_t)gradients[0].size()) < 1e-6);
    CHECK(*std::max_element(gradients[0].begin(), gradients[0].end()) > 1e-3);
  }
}

TEST_CASE("bf16 and int8: a folder saved so answers with the bytes of the f32 folder loaded so, and loads as numbers and otherwise too") {
  for (const std::string name :
       {"tiny-pretrain", "heads/sequence-classification", "heads/token-classification", "variants/distilbert-masked-lm",
        "variants/distilbert-sequence-classification", "variants/electra-discriminator", "variant-heads/ElectraForMaskedLM"})
    for (const Precision precision : kNarrow) {
      const std::string from = kGolden + name;
      CAPTURE(from);
      CAPTURE(std::string(name_of(precision)));
      const ModelFolder plain = load_folder(from, false);
      Batch batch;
      for (const Example& e : random_examples(6, 16)) batch.add_row(e.ids, e.segments);
      testing::TemporaryFolder saved;
      const Bert held = save_narrow(saved.path, from, std::vector((size_t)quantized_parts(plain.config), precision), precision);
      const ModelFolder again = load_folder(saved.path);
      CHECK(again.config.quantized == precision);
      const std::vector<float> answers = everything(again.bert, batch), f32 = everything(load_folder(from).bert, batch);
      CHECK(answers == everything(load_folder(from, true, precision).bert, batch));
      CHECK(answers == everything(held, batch));
      CHECK(answers == everything(load_folder(saved.path, true, precision).bert, batch));
      CHECK(answers != f32);

      size_t narrow = 0, scales = 0;
      for (const auto& [tensor, type] : types_in(saved.path)) {
        narrow += type == (precision == Precision::int8 ? "I8" : "BF16"), scales += tensor.ends_with("_scale");
        if (tensor.ends_with("_scale")) CHECK(type == "F32");
      }
      CHECK(narrow == 1 + 6 * plain.bert.layers.size());  // the table, and six matrices of each layer
      CHECK(scales == (precision == Precision::int8 ? narrow : 0));
      const ModelFolder numbers = load_folder(saved.path, false);
      for (const ModelFolder* m : {&again, &numbers}) check_all_loaded(m->report, saved.path);

      CHECK(!numbers.config.quantized);  // and saved again it is a plain folder
      CHECK(!numbers.bert.config.quantized);
      CHECK(!load_folder_for(saved.path, Task::tag, {"a", "b"}, 1).config.quantized);
      const auto p = plain.bert.parameters(), q = numbers.bert.parameters();
      REQUIRE(p.size() == q.size());
      for (size_t i = 0; i < p.size(); i++) {
        CAPTURE(p[i].name);
        const int64_t n = p[i].shape().size(), k = p[i].shape().back();
        const bool rounded = types_in(saved.path)[q[i].name] != "F32" && p[i].shape().rank() == 2;
        CHECK((rounded || std::memcmp(p[i].data(), q[i].data(), (size_t)n * 4) == 0));
        for (int64_t row = 0; rounded && row < n; row += k) {  // half a step: of 127 to the row's largest, or of the eighth bit
          float largest = 0;
          for (int64_t j = row; j < row + k; j++) largest = std::max(largest, std::fabs(p[i].data()[j]));
          const double most = testing::largest_difference(p[i].data() + row, q[i].data() + row, k);
          CHECK(most <= (precision == Precision::int8 ? (double)largest / 254 * 1.0001 : (double)largest / 256));
        }
      }
      const std::vector<float> widened = everything(numbers.bert, batch);
      CHECK(farthest(widened, f32) < (precision == Precision::bf16 ? 0.05 : 0.21));  // 1.5 times what was measured
      CHECK(widened != f32);
      for (const Precision other : {Precision::f32, Precision::bf16, Precision::int8}) {
        if (other == precision) continue;
        Bert packed = load_folder(saved.path, false).bert;
        packed.pack(other);
        const std::vector<float> so = everything(load_folder(saved.path, true, other).bert, batch);
        CHECK(so == everything(packed, batch));
        CHECK(so != answers);
        CHECK((other != Precision::f32 || so == widened));
      }
    }
}

TEST_CASE("bf16 and int8: parts of several kinds survive saving and loading, to the byte") {
  constexpr Precision f32 = Precision::f32, bf16 = Precision::bf16, int8 = Precision::int8;
  const ModelFolder plain = load_folder(kGolden + "tiny-pretrain", false);
  CHECK(quantized_parts(plain.config) == 3);
  const Batch batch = read_rows(kGolden + "tiny-pretrain/rows.json", Task::pretrain);
  const char* const types[] = {"F32", "BF16", "I8"};
  std::set<std::vector<float>> different;
  for (const std::vector<Precision>& parts :
       {std::vector{f32, bf16, int8}, {int8, f32, bf16}, {bf16, int8, f32}, {int8, f32, f32}, {f32, f32, int8}, {f32, f32, f32}}) {
    testing::TemporaryFolder saved;
    const Bert held = save_narrow(saved.path, kGolden + "tiny-pretrain", parts, int8);
    const ModelFolder again = load_folder(saved.path);
    check_all_loaded(again.report, saved.path);
    const std::vector<float> answers = everything(held, batch);
    CHECK(everything(again.bert, batch) == answers);
    different.insert(answers);
    auto in_file = types_in(saved.path);
    CHECK(in_file["bert.embeddings.word_embeddings.weight"] == types[(size_t)parts[0]]);
    for (size_t l = 0; l < 2; l++)
      for (const char* weight : {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                                 "intermediate.dense", "output.dense"})
        CHECK(in_file["bert.encoder.layer." + std::to_string(l) + "." + weight + ".weight"] == types[(size_t)parts[l + 1]]);
    Bert numbers = load_folder(saved.path, false).bert;
    numbers.pack(bf16);
    CHECK(everything(load_folder(saved.path, true, bf16).bert, batch) == everything(numbers, batch));
  }
  CHECK(different.size() == 6);
  CHECK(different.count(everything(load_folder(kGolden + "tiny-pretrain").bert, batch)) == 1);  // all in f32
  Bert narrow = plain.bert;
  narrow_part(narrow, 2, plain.bert, int8);
  testing::TemporaryFolder folder;
  CHECK_THROWS_WITH_AS(save_folder(folder.path, narrow, plain.carried, "BF16"), doctest::Contains("scales are F32"), Error);
  narrow_part(narrow, 2, plain.bert, bf16);
  save_folder(folder.path, narrow, plain.carried, "BF16");
}

TEST_CASE("bf16: a folder that the hub has in it, tied decoder and all, computes in it as the same numbers in F32 do") {
  const ModelFolder plain = load_folder(kGolden + "files/q-bin-bf16", false);
  const Batch batch = read_rows(kGolden + "tiny-pretrain/rows.json", Task::pretrain);
  testing::TemporaryFolder folder;
  save_folder(folder.path, plain.bert, plain.carried, "BF16");
  const std::string file = folder / "model.safetensors";
  std::vector<Tensor> values;
  std::vector<NamedTensor> tensors;
  const SafeTensors saved = SafeTensors::open(file);
  for (const SafeTensors::Entry& e : saved.entries()) {
    values.push_back(saved.load(e)), tensors.push_back({e.name, values.back().shape(), values.back().data()});
    if (e.name == "bert.embeddings.word_embeddings.weight")
      tensors.push_back({"cls.predictions.decoder.weight", values.back().shape(), values.back().data()});
  }
  save_safetensors(file, tensors, {{"format", "pt"}}, "BF16");
  const std::vector<float> f32 = everything(plain.bert, batch);
  CHECK(everything(load_folder(folder.path).bert, batch) == f32);
  for (const Precision precision : kNarrow) {
    CAPTURE(std::string(name_of(precision)));
    Bert packed = load_folder(kGolden + "files/q-bin-bf16", false).bert;
    packed.pack(precision);
    const std::vector<float> want = everything(packed, batch);
    CHECK(want != f32);
    const ModelFolder m = load_folder(folder.path, true, precision);
    CHECK(m.report.tied == std::vector<std::string>{"cls.predictions.decoder.weight"});
    CHECK(everything(m.bert, batch) == want);
    CHECK(everything(load_folder(kGolden + "files/q-bin-bf16", true, precision).bert, batch) == want);
  }
  std::vector<float> other;
  for (NamedTensor& t : tensors)
    if (t.name == "cls.predictions.decoder.weight") other.assign(t.data, t.data + t.shape.size()), other[100] += 1, t.data = other.data();
  save_safetensors(file, tensors, {{"format", "pt"}}, "BF16");
  for (const std::optional<Precision> precision : {std::optional<Precision>(), {Precision::bf16}, {Precision::int8}})
    CHECK_THROWS_WITH_AS(load_folder(folder.path, true, precision), doctest::Contains("untied decoder"), Error);
}

TEST_CASE("golden: rxnfp (a pytorch_model.bin of the older format, a config.json without architectures)") {
  const std::string folder = testing::shared + "models/rxnfp-bert-mlm", golden_folder = testing::shared + "golden/models/rxnfp/";
  SKIP_WITHOUT(folder);
  const ModelFolder m = load_folder(folder);
  REQUIRE(m.bert.task == Task::pretrain);
  const SafeTensors golden = SafeTensors::open(golden_folder + "golden.safetensors");
  const Batch batch = read_rows(golden_folder + "rows.json", Task::pretrain);
  Dropout none;
  for (const auto& [layers, name, float32] :
       {std::tuple{0, "embedding_output", 7.98e-7}, {1, "layer_0", 1.89e-6}, {12, "layer_11", 3.02e-6}}) {
    Bert first = m.bert;
    first.layers.resize((size_t)layers);
    const Tensor x = first.forward(batch);
    CHECK(difference(golden, name, x.data(), x.size()) < 4 * float32);
  }
  const Tensor hidden = m.bert.forward(batch), pooled = m.bert.pooled(hidden, batch), mlm = m.bert.masked_logits(hidden, batch.masked),
               nsp = m.bert.logits(hidden, batch, none);
  CHECK(difference(golden, "pooled", pooled.data(), pooled.size()) < 4 * 3.3e-7);
  CHECK(difference(golden, "mlm_logits", mlm.data(), mlm.size()) < 4 * 4.42e-6);
  CHECK(difference(golden, "nsp_logits", nsp.data(), nsp.size()) < 5 * 1.63e-6);  // ten numbers of up to 13.8: 8 units in the last place
}

TEST_CASE("golden: RNABERT, its names mapped, from safetensors and from torch's files") {
  const std::string models = testing::shared + "models/rnabert/", golden_folder = testing::shared + "golden/models/rnabert/";
  SKIP_WITHOUT(models);
  const SafeTensors golden = SafeTensors::open(golden_folder + "golden.safetensors");
  const Batch batch = read_rows(golden_folder + "rows.json", Task::pretrain);
  for (const char* name : {"RNABERT.safetensors", "RNABERT.pth", "bert_mul_2.pth"}) {  // the last with "module." in front of names
    CAPTURE(name);
    const SafeTensors file =
        std::string(name).ends_with(".pth") ? SafeTensors::open_torch(models + name) : SafeTensors::open(models + name);
    std::vector<Tensor> keep;
    std::vector<NamedTensor> tensors;
    for (const auto& e : file.entries()) {
      const size_t at = e.name.find("bert."), self = e.name.find("selfattn");
      if (at == std::string::npos) continue;  // its own heads
      std::string mapped = e.name.substr(at + 5);
      if (self != std::string::npos) mapped.replace(mapped.find("selfattn"), 8, "self");
      keep.push_back(file.load(e));
      tensors.push_back({mapped, keep.back().shape(), keep.back().data()});
    }
    testing::TemporaryFolder folder;
    save_safetensors(folder / "model.safetensors", tensors, {});
    write_file(folder / "vocab.txt", "[PAD]\n[MASK]\nA\nU\nG\nC\n");
    std::string config = read_file(models + "RNA_bert_config.json");
    write_file(folder / "config.json", config.replace(config.find('{'), 1, "{\"hidden_size\": 120, "));
    const ModelFolder m = load_folder(folder.path);
    const Tensor hidden = m.bert.forward(batch);
    CHECK(difference(golden, "last_hidden_state", hidden.data(), hidden.size()) < 4 * 7.98e-7);
    Bert first = m.bert;
    first.layers.clear();
    const Tensor x = first.forward(batch);
    CHECK(difference(golden, "embedding_output", x.data(), x.size()) < 4 * 1.52e-7);
  }
}

TEST_CASE("labels: what a data file says becomes a gold, and what does not do is refused") {
  Labels labels{Task::classify, {}, {}};
  labels.set({"a", "b"});
  std::vector<std::string> names;
  auto gold = [&](Task task, const Item& item, const Told& told, bool known = true) {
    labels.task = task;
    return make_gold(item, told, labels, known, names);
  };
  const Told one{false, {"a"}, {}}, none{true, {}, {}};
  CHECK((gold(Task::classify, {"x", {}}, one).label == kIgnored && names == one.answers));  // its number comes with put_in
  gold(Task::multilabel, {"x", {}}, {false, {"a||b"}, {}});
  CHECK(names == std::vector<std::string>{"a", "b"});
  gold(Task::multilabel, {"x", {}}, none);
  CHECK(names.empty());
  gold(Task::classify, {"x", {}}, {false, {"new"}, {}}, false);
  CHECK(names[0] == "new");
  CHECK(gold(Task::regress, {"x", {}}, {false, {"2.5"}, {}}).targets == std::vector<float>{2.5f});
  CHECK(gold(Task::choice, {"x", {}, {}, {"p", "q"}}, {false, {"1"}, {}}).label == 1);
  CHECK(gold(Task::qa, {"q", "a b"}, {true, {"b"}, {2}}).starts == std::vector<int64_t>{2});
  CHECK(gold(Task::qa, {"q", "a b"}, none).answers.empty());
  CHECK(gold(Task::embed, {"x", {}, {}, {"y"}}, {}).targets.empty());  // a partner, and no score
  const std::tuple<Task, Item, Told, const char*> bad[] = {
      {Task::classify, {"x", {}}, {}, "no label"},
      {Task::classify, {"x", {}}, {false, {""}, {}}, "an empty label"},
      {Task::classify, {"x", {}}, {true, {"a", "b"}, {}}, "several labels; for these there is --task multilabel"},
      {Task::classify,
       {"x", {}},
       {false, {"a\tb"}, {}},
       "a label that is empty, or holds a TAB or an end of line; results are lines of columns"},
      {Task::classify, {"x", {}}, {false, {"c"}, {}}, "label 'c', which training never saw (it knows a, b); correct it"},
      {Task::tag, {"x", {}, {"x", "y"}}, {true, {"a"}, {}}, "words: 2, tags: 1; one a word is wanted"},
      {Task::tag,
       {"x", {}, {"x", "y"}},
       {true, {"B-P", "P"}, {}},
       "word 1 (x): label 'B-P', which training never saw (it knows a, b); correct it"},
      {Task::choice, {"x", {}, {}, {"p"}}, {false, {"0"}, {}}, "fewer than two choices"},
      {Task::choice, {"x", {}, {}, {"p", "q"}}, {false, {"2"}, {}}, "'2' is no choice's number, from 0 to 1"},
      {Task::regress, {"x", {}}, {false, {"inf"}, {}}, "'inf' is no number, which this task wants"},
      {Task::embed, {"x", {}}, {false, {"1"}, {}}, "one text with a score; two are compared"},
      {Task::qa, {"q", {}}, none, "a question without a context"}};
  for (const auto& [task, item, told, message] : bad) CHECK_THROWS_WITH_AS(gold(task, item, told), message, Error);
  const WordPiece t = WordPiece::from_vocab("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n", {}, "vocab");
  const Item tagged = {"", {}, {"a", "b"}}, question = {"a", "a b"};
  Gold lacking;
  lacking.tags = {0}, lacking.answers = {"b"};
  for (const auto& [task, item, message] :
       {std::tuple(Task::tag, tagged, "tags: 1, but the text has more words; give one a word"),
        {Task::qa, question, "the answer 'b' without its place in the context; give its start in bytes"}})
    CHECK_THROWS_WITH_AS(make_examples(task, make_windows(t, task, item, 16, 4), lacking), message, Error);
  // A space at an answer's end is none of its tokens; a window that holds a part of it says "not here".
  const Item asked = {"a", "b a b a b a b"};
  auto labels_of = [&](const char* answer, int64_t start, int64_t max_length) {
    Gold right;
    right.answers = {answer}, right.starts = {start};
    std::vector<std::vector<int32_t>> labels;
    for (const Example& e : make_examples(Task::qa, make_windows(t, Task::qa, asked, max_length, 2), right)) labels.push_back(e.labels);
    return labels;
  };
  for (const auto& [answer, start] : {std::pair("a b", 2), {" a b", 1}, {"a b ", 2}, {" a b ", 1}})
    CHECK(labels_of(answer, start, 16) == std::vector<std::vector<int32_t>>{{4, 5}});
  CHECK(labels_of(" a b", 5, 8) == std::vector<std::vector<int32_t>>{{0, 0}, {4, 5}, {0, 0}});
  CHECK(split("a||b", '|') == std::vector<std::string>{"a", "", "b"});
  CHECK((split("", ',') == std::vector<std::string>{""} && split("a,", ',').size() == 2));
}

TEST_CASE("finetune: of questions whole contexts are held out, where there are several") {
  for (const auto& [contexts, share] : {std::pair(10, 0.25), {10, 0.95}, {2, 0.5}, {1, 0.3}}) {
    LabelledSet all;
    for (int i = 0; i < 40; i++) all.items.push_back({"q" + std::to_string(i), "c" + std::to_string(i * i % 7 % contexts)});
    all.golds.resize(40);
    LabelledSet copy = all, other = all;
    const LabelledSet dev = hold_out(all, Task::qa, share, 3);
    std::set<std::string> of_dev, of_train;
    for (const Item& item : dev.items) of_dev.insert(*item.pair);
    for (const Item& item : all.items) of_train.insert(*item.pair);
    CHECK(dev.items.size() + all.items.size() == 40);
    CHECK((!of_dev.empty() && !of_train.empty()));
    for (const std::string& context : of_dev) CHECK((contexts == 1) == (of_train.count(context) > 0));
    CHECK(hold_out(copy, Task::qa, share, 3).items[0].text == dev.items[0].text);
    if (contexts == 1) CHECK(dev.items.size() == 12);
  }
  for (uint64_t seed = 1; seed < 9; seed++) {  // a large context is not held out for a small share
    LabelledSet uneven;
    for (int i = 0; i < 100; i++) uneven.items.push_back({"q", i < 90 ? "large" : "small"});
    uneven.golds.resize(100);
    CHECK(hold_out(uneven, Task::qa, 0.1, seed).items.size() == 10);
  }
}
TEST_CASE("finetune: what is held out has its share of rare labels, of rare tags and of each tenth of the numbers") {
  for (uint64_t seed = 1; seed < 9; seed++) {
    LabelledSet many, tags, numbers;
    for (int i = 0; i < 200; i++) {
      many.items.push_back({"x", {}}), tags.items.push_back({"x", {}}), numbers.items.push_back({"x", {}});
      Gold labels, tagged, number;
      labels.targets = {1, i % 10 == 3 ? 1.f : 0.f}, tagged.tags = {0, i % 10 == 7 ? 1 : 0, 0}, number.targets = {(float)i};
      many.golds.push_back(labels), tags.golds.push_back(tagged), numbers.golds.push_back(number);
    }
    int rare = 0, tagged = 0, tenths[10] = {};
    for (const Gold& g : hold_out(many, Task::multilabel, 0.1, seed).golds) rare += g.targets[1] > 0;
    for (const Gold& g : hold_out(tags, Task::tag, 0.1, seed).golds) tagged += g.tags[1];
    for (const Gold& g : hold_out(numbers, Task::regress, 0.1, seed).golds) tenths[(int)g.targets[0] / 20]++;
    CHECK((rare == 2 && tagged == 2));
    for (const int n : tenths) CHECK(n == 2);
  }
}

static double value_of(const std::vector<Metric>& metrics, const std::string& name) {
  for (const Metric& m : metrics)
    if (m.name == name) return m.value;
  return std::numeric_limits<double>::quiet_NaN();
}

TEST_CASE("metrics: by hand") {
  const std::vector<int32_t> said = {1, 1, 0, 0, 1, 0}, is = {1, 0, 0, 0, 1, 1};
  Scorer numbers(Task::regress, {}), equal(Task::regress, {});
  for (const auto& [x, y] : {std::pair{1.f, 10.f}, {2, 30}, {2, 20}, {4, 40}}) numbers.add({.outputs = {x}}, {.targets = {y}});
  CHECK(value_of(numbers.metrics({}), "pearson") == doctest::Approx(0.923380516876694));   // numpy.corrcoef
  CHECK(value_of(numbers.metrics({}), "spearman") == doctest::Approx(0.948683298050514));  // scipy.stats.spearmanr
  for (const float y : {1.f, 2.f}) equal.add({.outputs = {1}}, {.targets = {y}});
  CHECK(value_of(equal.metrics({}), "spearman") == 0);
  Scorer two(Task::classify, {"no", "yes"});
  for (size_t i = 0; i < 6; i++) two.add({.outputs = {said[i] ? -1.f : 1.f, 0}}, {.label = is[i]});
  const std::vector<Metric> m = two.metrics(1);
  CHECK(m[0].name == "accuracy");
  CHECK(m[0].value == doctest::Approx(4 / 6.0));
  CHECK(m[0].low <= m[0].value);
  CHECK(m[0].high >= m[0].value);
  CHECK(m[1].name == "f1");
  CHECK(m[1].value == doctest::Approx(4 / 6.0));          // 2 * 2 / (3 + 3)
  CHECK(value_of(m, "mcc") == doctest::Approx(1.0 / 3));  // tp 2 fp 1 fn 1 tn 2: (4 - 1) / 9
  CHECK(two.confusion() == std::vector<int64_t>{2, 1, 1, 2});
  Scorer one_said(Task::classify, {"no", "yes"}), right(Task::classify, {"a", "b", "c"});
  for (const int32_t label : {0, 1}) one_said.add({.outputs = {0, 1}}, {.label = label});
  CHECK(value_of(one_said.metrics({}), "mcc") == 0);
  for (const int32_t label : {0, 1, 2}) right.add({.outputs = {label == 0 ? 1.f : 0.f, label == 1 ? 1.f : 0.f, 0.5f}}, {.label = label});
  CHECK(value_of(right.metrics({}), "mcc") == doctest::Approx(1));
  Scorer three(Task::classify, {"a", "b", "c"});  // said 0 1 0; the third class neither said nor true
  three.add({.outputs = {1, 0, 0}}, {.label = 0}), three.add({.outputs = {0, 1, 0}}, {.label = 1});
  three.add({.outputs = {1, 0, 0}}, {.label = 1});
  CHECK(three.metrics(1)[1].name == "f1_macro");
  CHECK(three.metrics(1)[1].value == doctest::Approx(2 / 3.0));  // sklearn's: the classes that occur
  Scorer choice(Task::choice, {});
  choice.add({.outputs = {1, 2}}, {.label = 1}), choice.add({.outputs = {3, 2, 1}}, {.label = 2});
  CHECK(choice.metrics(1).size() == 1);
  CHECK(choice.metrics(1)[0].value == 0.5);
}

TEST_CASE("metrics: what does not fit is refused, and leaves the scorer as it was") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Scorer two(Task::classify, {"no", "yes"}), number(Task::regress, {}), alike(Task::embed, {}), many(Task::multilabel, {"x", "y"}),
      tags(Task::tag, {"O", "B-X"}), answers(Task::qa, {});
  CHECK_THROWS_WITH_AS(two.add({.outputs = {0, nan}}, {.label = 0}), doctest::Contains("item 1: the model's output is not finite"), Error);
  CHECK_THROWS_AS(two.add({.outputs = {0, 1}}, {}), Error);
  CHECK_THROWS_AS(two.add({.outputs = {0, 1}}, {.label = 2}), Error);
  CHECK_THROWS_AS(two.add({.outputs = {0, 1, 2}}, {.label = 2}), Error);
  CHECK_THROWS_AS(number.add({.outputs = {0}}, {.label = 0}), Error);
  CHECK_THROWS_AS(number.add({.outputs = {0}}, {.targets = {nan}}), Error);
  CHECK_THROWS_AS(alike.add({.outputs = {0}}, {}), Error);  // a text and its partner: rank_scores
  CHECK_THROWS_AS(many.add({.outputs = {0, 1}}, {.targets = {1}}), Error);
  CHECK_THROWS_AS(tags.add({.tags = {0}}, {.tags = {0, 1}}), Error);
  CHECK_THROWS_AS(tags.add({.tags = {2}}, {.tags = {0}}), Error);
  CHECK_THROWS_AS(tags.add({.tags = {0}}, {.tags = {-1}}), Error);
  CHECK_THROWS_AS(answers.add({.null_margin = nan}, {}), Error);
  for (const Scorer* s : {&two, &number, &alike, &many, &tags, &answers}) {
    CHECK(s->size() == 0);
    CHECK_THROWS_WITH_AS(s->metrics(1), "score: no labelled row", Error);
  }
  CHECK_THROWS_AS(answers.best_null_threshold(), Error);
  CHECK_THROWS_AS(number.confusion(), Error);
  CHECK_THROWS_AS(Scorer(Task::mlm, {}), Error);
  CHECK_THROWS_AS(rank_scores(Tensor(Shape{2, 3}, 1.f), Tensor(Shape{3, 3}, 1.f)), Error);
}

namespace {
const std::string kMetrics = "tests/golden/metrics/";
Json metrics_file(const std::string& name) { return Json::parse(read_file(kMetrics + name), name); }
std::vector<Json> metrics_lines(const std::string& name) {
  std::vector<Json> rows;
  std::ifstream lines(kMetrics + name);
  for (std::string line; std::getline(lines, line);) rows.push_back(Json::parse(line, name));
  return rows;
}
std::vector<double> doubles(const Json& row, const char* key) {
  std::vector<double> v;
  for (const Json& x : row.find(key)->items(key)) v.push_back(x.as_double(key));
  return v;
}
// Every figure of the golden is there with its value, and there is no other.
void check_metrics(const std::vector<Metric>& got, const Json& want) {
  CHECK(got.size() == want.members().size());
  for (const auto& member : want.members()) {
    CAPTURE(member.first);
    CHECK(std::fabs(value_of(got, member.first) - member.second.as_double("value")) < 1e-12);
  }
}
std::vector<std::string> split(const std::string& line) {
  std::istringstream in(line);
  return {std::istream_iterator<std::string>(in), {}};
}
struct Found {
  std::string type;
  int64_t begin, end;  // words
  friend bool operator==(const Found&, const Found&) = default;
};
// The entities that these tags of words mark.
std::vector<Found> entities_of(const std::vector<std::string>& tags) {
  Outcome o;
  for (int32_t i = 0; i < (int32_t)tags.size(); i++) o.tags.push_back(i), o.scores.push_back(1), o.words.push_back({i, i + 1});
  std::vector<Found> found;
  for (const TextEntity& e : entities_in(o, tags, std::string(tags.size(), ' '))) found.push_back({e.type, e.start, e.end});
  return found;
}
}  // namespace

TEST_CASE("metrics: classes and labels as scikit-learn's") {
  const Json cases = metrics_file("classes.json");
  for (const Json& c : cases.items("classes.json")) {
    const bool many = c.find("task")->as_string("task") == "multilabel";
    const int64_t C = c.find("classes")->as_int("classes");
    CAPTURE(many);
    CAPTURE(C);
    std::vector<std::string> labels;
    for (int64_t i = 0; i < C; i++) labels.push_back("L" + std::to_string(i));
    Scorer scorer(many ? Task::multilabel : Task::classify, labels);
    const std::vector<Json>&said = c.find("said")->items("said"), &is = c.find("is")->items("is");
    for (size_t i = 0; i < is.size(); i++) {
      Outcome o{.outputs = std::vector<float>((size_t)C, -1)};
      Gold g;
      if (many)
        for (size_t k = 0; k < (size_t)C; k++)
          o.outputs[k] = said[i].items("said")[k].as_int("said") ? 1.f : -1.f,
          g.targets.push_back((float)is[i].items("is")[k].as_int("is"));
      else
        o.outputs[(size_t)said[i].as_int("said")] = 1, g.label = (int32_t)is[i].as_int("is");
      scorer.add(o, g);
    }
    check_metrics(scorer.metrics(1), *c.find("metrics"));
    if (!many) {
      std::vector<int64_t> want;
      for (const double x : doubles(c, "confusion")) want.push_back((int64_t)x);
      CHECK(scorer.confusion() == want);
    }
  }
}

TEST_CASE("metrics: Pearson and Spearman as scipy's; cosine ranks") {
  const Json cases = metrics_file("numbers.json");
  for (const Json& c : cases.items("numbers.json")) {
    const std::vector<double> said = doubles(c, "said"), is = doubles(c, "is");
    Scorer regress(Task::regress, {}), alike(Task::embed, {});
    for (size_t i = 0; i < is.size(); i++)
      for (Scorer* s : {&regress, &alike}) s->add({.outputs = {(float)said[i]}}, {.targets = {(float)is[i]}});
    const std::vector<Metric> r = regress.metrics(1), a = alike.metrics(1);
    CHECK(r[0].name == "pearson");
    CHECK(a[0].name == "spearman");
    for (const char* name : {"pearson", "spearman"}) {
      CHECK(std::fabs(value_of(r, name) - c.find(name)->as_double(name)) < 1e-12);
      CHECK(value_of(a, name) == value_of(r, name));
    }
  }
  const Json ranks = metrics_file("ranks.json");
  std::vector<float> q, c;
  for (const Json& row : ranks.find("queries")->items("queries"))
    for (const Json& x : row.items("row")) q.push_back((float)x.as_double("x"));
  for (const Json& row : ranks.find("candidates")->items("candidates"))
    for (const Json& x : row.items("row")) c.push_back((float)x.as_double("x"));
  const int64_t n = (int64_t)q.size() / 4;
  const std::vector<Metric> scores = rank_scores(Tensor(Shape{n, 4}, q), Tensor(Shape{n, 4}, c), 1);
  CHECK(std::fabs(value_of(scores, "mrr") - ranks.find("mrr")->as_double("mrr")) < 1e-12);
  CHECK(value_of(scores, "recall_1") == ranks.find("recall_1")->as_double("recall_1"));
  CHECK(value_of(scores, "recall_10") == ranks.find("recall_10")->as_double("recall_10"));
  for (const Metric& m : scores) CHECK((m.low <= m.value && m.value <= m.high && m.low < m.high));
}

TEST_CASE("metrics: entities of 1,000 tag sequences as seqeval's") {
  const std::vector<Json> rows = metrics_lines("tags.jsonl");
  CHECK(rows.size() == 1000);
  int64_t g = 0;
  const Json groups = metrics_file("tags.json");
  for (const Json& group : groups.items("tags.json")) {
    CAPTURE(g);
    std::vector<std::string> labels;
    for (const Json& label : group.find("labels")->items("labels")) labels.push_back(label.as_string("label"));
    Scorer scorer(Task::tag, labels);
    auto numbers = [&](const std::vector<std::string>& tags) {
      std::vector<int32_t> v;
      for (const std::string& t : tags) v.push_back((int32_t)(std::find(labels.begin(), labels.end(), t) - labels.begin()));
      return v;
    };
    for (const Json& row : rows) {
      if (row.find("group")->as_int("group") != g) continue;
      const std::vector<std::string> said = split(row.find("said")->as_string("said"));
      CAPTURE(row.find("said")->as_string("said"));
      std::vector<Found> want;
      for (const Json& e : row.find("found")->items("found"))
        want.push_back({e.items("e")[0].as_string("type"), e.items("e")[1].as_int("begin"), e.items("e")[2].as_int("end")});
      CHECK(entities_of(said) == want);
      std::vector<int32_t> tags = numbers(said);
      for (int32_t& t : tags) t = labels[(size_t)t] == "O" && g % 2 ? -1 : t;  // a word that the model says nothing of
      scorer.add({.tags = tags}, {.tags = numbers(split(row.find("is")->as_string("is")))});
    }
    const std::vector<Metric> got = scorer.metrics(1);
    CHECK(got[0].name == "entity_f1");
    check_metrics(got, *group.find("metrics"));
    g++;
  }
}

TEST_CASE("metrics: tags without a scheme stand alone; parts of speech have no entities") {
  CHECK(entities_of({"PER", "PER", "O", "I", "I", ""}) == std::vector<Found>{{"PER", 0, 1}, {"PER", 1, 2}, {"_", 3, 5}});
  Scorer bare(Task::tag, {"O", "LOC", "PER"});
  bare.add({.tags = {2, 2, 0, 1}}, {.tags = {2, 1, 0, 1}});
  CHECK(value_of(bare.metrics(1), "entity_f1") == doctest::Approx(2 / 3.0));
  Scorer pos(Task::tag, {"NOUN", "VERB", "E"});
  pos.add({.tags = {0, -1, 1}}, {.tags = {0, 0, 0}});
  const std::vector<Metric> m = pos.metrics(1);
  REQUIRE(m.size() == 4);
  CHECK(m[0].name == "accuracy");
  CHECK(m[0].value == doctest::Approx(1 / 3.0));
  CHECK(value_of(m, "f1_NOUN") == doctest::Approx(0.5));  // 2 * 1 / (1 + 3)
  CHECK(value_of(m, "f1_VERB") == 0);
  CHECK(value_of(m, "f1_E") == 0);
}

TEST_CASE("metrics: answers as SQuAD's script scores them, to the last digit") {
  Scorer scorer(Task::qa, {});
  for (const Json& row : metrics_lines("answers.jsonl")) {
    const std::string said = row.find("said")->as_string("said");
    Gold gold;
    for (const Json& a : row.find("answers")->items("answers")) gold.answers.push_back(a.as_string("answer"));
    CAPTURE(said);
    const Outcome outcome{.answers = {{.text = said}}, .null_margin = row.find("margin")->as_double("margin")};
    Scorer one(Task::qa, {});
    for (Scorer* s : {&one, &scorer}) s->add(outcome, gold);
    CHECK(value_of(one.metrics({}), "exact") == row.find("exact")->as_double("exact"));
    CHECK(value_of(one.metrics({}), "f1") == row.find("f1")->as_double("f1"));
  }
  const Json want = metrics_file("answers.json");
  const double threshold = scorer.best_null_threshold();
  Config config = Config::named("tiny", 100);  // a file must give a threshold back to the last bit: it is an item's own margin
  for (const double margin : {threshold, (double)0.1f, (double)-3.3333333f}) {
    config.null_threshold = margin;
    CHECK(Config::parse(config.to_json(), "config").null_threshold == margin);
  }
  const Outcome unsure{.answers = {{.text = "x", .score = 0.9}}, .null_margin = 1};
  for (const auto& [right, at_0, at_2] : {std::tuple("x", true, false), {"", false, true}}) {
    Gold gold;
    if (*right) gold.answers = {right};
    CHECK(find_mistake({Task::qa, {}, {}}, {"q", "c"}, gold, unsure, 0).has_value() == at_0);  // it says that there is none
    CHECK(find_mistake({Task::qa, {}, {}}, {"q", "c"}, gold, unsure, 2).has_value() == at_2);
  }
  CHECK(threshold == want.find("threshold")->as_double("threshold"));
  check_metrics(scorer.metrics(1), *want.find("as_they_are"));
  const std::vector<Metric> best = scorer.metrics(1, threshold);
  check_metrics(best, *want.find("at_threshold"));
  CHECK(best[0].name == "exact");
  CHECK(best[1].value == doctest::Approx(want.find("f1_at_best")->as_double("f1")).epsilon(1e-14));
}

TEST_CASE("metrics: the null threshold keeps equal margins together and answers none where that is best") {
  auto ask = [](Scorer& s, const char* said, std::vector<std::string> right, double margin) {
    s.add({.answers = {{.text = said}}, .null_margin = margin}, {.answers = std::move(right)});
  };
  Scorer none(Task::qa, {});
  ask(none, "x", {}, -3), ask(none, "x", {"y"}, -5);
  CHECK(none.best_null_threshold() == -6);
  CHECK(none.metrics(1, -6)[1].value == 0.5);
  Scorer equal(Task::qa, {});  // after the first alone F1 would be larger; the two cannot be parted
  ask(equal, "y", {"y"}, 1), ask(equal, "x", {}, 1), ask(equal, "z", {"z"}, 2);
  CHECK(equal.best_null_threshold() == 2);
  CHECK(equal.metrics(1).size() == 6);
  Scorer empty(Task::qa, {});  // contexts without a word
  for (const char* right : {"y", ""}) {
    Outcome nothing;
    nothing.null_margin = std::numeric_limits<double>::infinity();
    empty.add(nothing, {.answers = *right ? std::vector<std::string>{right} : std::vector<std::string>{}});
  }
  CHECK(empty.metrics({})[1].value == 0.5);
  CHECK(std::isfinite(empty.best_null_threshold()));
  Scorer all(Task::qa, {});  // SQuAD 1.1: no part without an answer
  ask(all, "y", {"y"}, 1);
  CHECK(all.metrics(1).size() == 2);
}

TEST_CASE("metrics: 100,000 items take bounded time, and the interval is where the formula has it") {
  Scorer scorer(Task::classify, {"a", "b"});
  Random random({3, 0, 0, 0});
  for (int i = 0; i < 100'000; i++) {
    const bool right = random.uniform() < 0.8;
    scorer.add({.outputs = {right ? 1.f : 0.f, right ? 0.f : 1.f}}, {.label = 0});
  }
  const Metric accuracy = scorer.metrics(1)[0];
  const double half = 1.96 * std::sqrt(accuracy.value * (1 - accuracy.value) / 100'000);  // the normal one
  CHECK(std::fabs(accuracy.value - accuracy.low - half) < 0.2 * half);
  CHECK(std::fabs(accuracy.high - accuracy.value - half) < 0.2 * half);
}

TEST_CASE("golden: all-MiniLM-L6-v2, the 60 sentences: embeddings and hidden states") {
  const std::string folder = testing::shared + "models/all-MiniLM-L6-v2", golden_folder = testing::shared + "golden/models/minilm/";
  SKIP_WITHOUT(folder);
  const Model model = Model::load(folder);
  const SafeTensors golden = SafeTensors::open(golden_folder + "golden.safetensors");
  const Tensor want = golden.load(*golden.find("embeddings"));
  std::ifstream lines(golden_folder + "sentences.jsonl");
  std::string line;
  for (int64_t i = 0; std::getline(lines, line); i++) {
    CAPTURE(i);
    const Json row = Json::parse(line, "sentences.jsonl");
    const std::string text = row.find("text")->as_string("text");
    EncodeOptions options;
    options.max_length = model.folder().max_length;
    CHECK(model.folder().tokenizer.encode(text, options).ids == ints(row, "input_ids"));
    const std::vector<float> v = model.embed(text);
    REQUIRE(v.size() == 384);
    CHECK(testing::largest_difference(v.data(), want.data() + i * 384, 384) < 2e-6);
  }
}
