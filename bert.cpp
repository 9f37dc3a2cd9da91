// bert.cpp -- the model, its heads, batches, training, tasks, metrics, model folders, fingerprints.   Interface: bert.h, 2 to 10.
//
// Read in this order: encoder_layer (the paper's figure 1, a line an operation), Bert::forward, Bert::masked_logits, batch_loss,
// Trainer::step; where its batches come from: mask_tokens, PretrainSampler::next. Data comes in as ids, or as the texts of an Item, which
// make_windows makes ids of: this file reads no user's data and writes no result. It computes nothing itself: every product, norm and
// softmax is an op of tensor.h.
//
// Contents:  families  config  parameters  the model  heads  batches  training  pretraining data (shards, rows, masking)
//            fine-tuning  metrics  model folders  tasks (windows, and what they answer together)  Model  fingerprints
#include "bert.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <set>

namespace bert {

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

std::string join(std::span<const std::string> parts, const std::string& between) {
  std::string out;
  for (size_t i = 0; i < parts.size(); i++) out += (i ? between : "") + parts[i];
  return out;
}
Strings split(std::string_view text, char at) {
  Strings out;
  for (size_t begin = 0;;) {
    const size_t end = text.find(at, begin);
    out.emplace_back(text.substr(begin, end == text.npos ? end : end - begin));
    if (end == text.npos) return out;
    begin = end + 1;
  }
}

static bool exists(const std::string& path) {
  struct stat s {};
  return stat(path.c_str(), &s) == 0;
}
// The first row of a table that fits, or null.
template <class Row, size_t n, class Fits>
static const Row* find_row(const Row (&table)[n], Fits fits) {
  const Row* found = std::find_if(table, table + n, fits);
  return found == table + n ? nullptr : found;
}
// 0, 1, 2 ...: n of them.
template <class T = int64_t>
static std::vector<T> count_up(size_t n) {
  std::vector<T> numbers(n);
  std::iota(numbers.begin(), numbers.end(), T(0));
  return numbers;
}

// ==== families ====================================================================================================
// BERT and its cousins: one encoder under several names. What BERT calls as on the left, a cousin calls as on the right; a key "" is
// one that it has not. Names are replaced in this order, and taken back in the other.
struct Family {
  const char *model_type, *classes, *prefix;  // DistilBertForMaskedLM: "DistilBert"; distilbert.embeddings...: "distilbert."
  const char* mark;                           // of a tensor's name without that prefix
  Activation pooler;                          // of the layer between [CLS] and what classifies
  std::vector<std::pair<const char*, const char*>> keys, names;

  bool is_bert() const { return pooler == Activation::tanh; }
  const char* key(const char* name) const {
    for (const auto& [ours, theirs] : keys)
      if (std::string_view(ours) == name) return theirs;
    return name;
  }
  bool has(const char* name) const { return *key(name); }
};
static const Family families[] = {
    {"bert", "Bert", "bert.", "", Activation::tanh, {{"embedding_size", ""}}, {}},
    {"distilbert",
     "DistilBert",
     "distilbert.",
     "transformer.layer.",
     Activation::relu,
     {{"hidden_size", "dim"},
      {"num_hidden_layers", "n_layers"},
      {"num_attention_heads", "n_heads"},
      {"intermediate_size", "hidden_dim"},
      {"hidden_act", "activation"},
      {"hidden_dropout_prob", "dropout"},
      {"attention_probs_dropout_prob", "attention_dropout"},
      {"classifier_dropout", "seq_classif_dropout"},
      {"type_vocab_size", ""},
      {"layer_norm_eps", ""},
      {"embedding_size", ""}},
     {{"encoder.layer.", "transformer.layer."},
      {"attention.self.query", "attention.q_lin"},
      {"attention.self.key", "attention.k_lin"},
      {"attention.self.value", "attention.v_lin"},
      {"attention.output.dense", "attention.out_lin"},
      {"attention.output.LayerNorm", "sa_layer_norm"},
      {"intermediate.dense", "ffn.lin1"},
      {"output.dense", "ffn.lin2"},
      {"output.LayerNorm", "output_layer_norm"},
      {"bert.pooler.dense", "pre_classifier"},
      {"cls.predictions.transform.dense", "vocab_transform"},
      {"cls.predictions.transform.LayerNorm", "vocab_layer_norm"},
      {"cls.predictions.decoder", "vocab_projector"},
      {"cls.predictions.bias", "vocab_projector.bias"}}},
    {"electra",
     "Electra",
     "electra.",
     "embeddings_project.",
     Activation::gelu,
     {},
     {{"classifier.", "classifier.out_proj."},
      {"bert.pooler.dense", "classifier.dense"},
      {"cls.predictions.transform", "generator_predictions"},
      {"cls.predictions.decoder", "generator_lm_head"},
      {"cls.predictions.bias", "generator_lm_head.bias"}}},
};
// What else a folder may hold: how its tensors are known, and what this engine lacks for it.
struct Stranger {
  const char *model_type, *tensors, *lacks;
};
static const Stranger strangers[] = {
    {"albert", "albert_layer", "a layer that is shared by all passes, and a SentencePiece tokenizer"},
    {"roberta", "roberta.", "a byte-level BPE tokenizer, and positions that begin at 2"},
    {"xlm-roberta", "", "a SentencePiece tokenizer, and positions that begin at 2"},
    {"camembert", "", "a SentencePiece tokenizer, and positions that begin at 2"},
    {"mpnet", "relative_attention_bias", "relative positions"},
    {"deberta", "deberta.", "attention over relative positions"},
    {"deberta-v2", "rel_embeddings", "attention over relative positions, and a SentencePiece tokenizer"},
    {"modernbert", "layers.0.attn.Wqkv", "rotary positions, gated layers, and a BPE tokenizer"},
    {"nomic_bert", "", "rotary positions and gated layers"},
    {"mobilebert", "mobilebert.", "bottleneck layers"},
    {"t5", "encoder.block.0.", "relative positions, a decoder, and a SentencePiece tokenizer"},
    {"gpt2", "h.0.attn.c_attn", "a decoder, and a byte-level BPE tokenizer"},
};

static const Family& find_family(const std::string& model_type, const std::string& where) {
  if (const Family* found = find_row(families, [&](const Family& f) { return model_type == f.model_type; })) return *found;
  const Stranger* stranger = find_row(strangers, [&](const Stranger& s) { return model_type == s.model_type; });
  const std::string lacks = stranger ? std::string(": it needs ") + stranger->lacks : "";
  throw Error(where + ": model_type: '" + model_type + "' is not built" + lacks + "; models of type bert, distilbert and electra are");
}
static const Family& family(const Config& config) { return find_family(config.model_type, "config"); }

// A tensor's name in a file of this family, from BERT's; and back, without what libraries put around it: "module." and the family's
// prefix in front, gamma and beta for LayerNorm's weight and bias.
static bool replace(std::string& name, const std::string& from, const std::string& to) {
  const size_t at = name.find(from);
  if (at != name.npos) name.replace(at, from.size(), to);
  return at != name.npos;
}
static std::string name_in_file(const Family& f, const HeadKind& head, std::string name) {
  for (const auto& [ours, theirs] : f.names)
    if (!head.tokens || !name.starts_with("classifier.")) replace(name, ours, theirs);  // of tokens it is a plain layer everywhere
  return name.starts_with("bert.") ? f.prefix + name.substr(5) : name;
}
static std::string canonical(const Family& f, std::string name) {
  for (const char* prefix : {"module.", f.prefix})
    if (name.starts_with(prefix)) name.erase(0, std::strlen(prefix));
  for (size_t i = f.names.size(); i-- > 0;) replace(name, f.names[i].second, f.names[i].first);
  if (name.starts_with("bert.")) name.erase(0, 5);
  for (const auto& [old, now] : {std::pair{"LayerNorm.gamma", "LayerNorm.weight"}, std::pair{"LayerNorm.beta", "LayerNorm.bias"}})
    if (name.ends_with(old)) replace(name, old, now);
  return name;
}

// ==== config ======================================================================================================
// The names that config.json uses for the activations there are.
static const std::pair<const char*, Activation> activations[] = {{"gelu", Activation::gelu},
                                                                 {"gelu_new", Activation::gelu_tanh},
                                                                 {"gelu_pytorch_tanh", Activation::gelu_tanh},
                                                                 {"relu", Activation::relu},
                                                                 {"tanh", Activation::tanh}};

// One key of a config: where it is kept and what it may be.
struct ConfigSize {
  const char* key;
  int64_t Config::*field;
  int64_t most;
  bool required;
};
static const ConfigSize config_sizes[] = {
    {"vocab_size", &Config::vocab_size, 1 << 24, true},
    {"hidden_size", &Config::hidden_size, 1 << 16, true},
    {"num_hidden_layers", &Config::num_hidden_layers, 1000, true},
    {"num_attention_heads", &Config::num_attention_heads, 1 << 12, true},
    {"intermediate_size", &Config::intermediate_size, 1 << 18, true},
    {"max_position_embeddings", &Config::max_position_embeddings, 1 << 20, true},
    {"type_vocab_size", &Config::type_vocab_size, 1 << 10, true},
    {"pad_token_id", &Config::pad_token_id, 1 << 24, false},
    {"embedding_size", &Config::embedding_size, 1 << 16, false},
};
struct ConfigNumber {
  const char* key;
  double Config::*field;
  double least, most;
};
static const ConfigNumber config_numbers[] = {
    {"hidden_dropout_prob", &Config::hidden_dropout_prob, 0, 0.99},
    {"attention_probs_dropout_prob", &Config::attention_probs_dropout_prob, 0, 0.99},
    {"initializer_range", &Config::initializer_range, 0, 10},
    {"layer_norm_eps", &Config::layer_norm_eps, 1e-20, 1},
};

// A number of the object `json` under `key`, between `least` and `most`; throws Error naming where, key and bounds.
static double bounded(const Json& value, const std::string& at, double least, double most) {
  const double v = value.as_double(at);
  if (!(v >= least && v <= most))
    throw Error(at + ": " + format_number(v) + " is not between " + format_number(least) + " and " + format_number(most));
  return v;
}

static std::vector<std::string> parse_labels(const Json& id2label, const std::string& where) {
  if (!id2label.is(Json::object)) throw Error(where + ": id2label: not an object {\"0\": \"name\", ...}");
  const auto& members = id2label.members();
  std::vector<std::string> labels(members.size());
  std::vector<bool> seen(members.size());
  for (const auto& [number, label] : members) {
    const size_t i = parse_number<size_t>(number).value_or(labels.size());
    if (i >= labels.size() || seen[i])
      throw Error(where + ": id2label: '" + number + "' is not one of the numbers 0 to " + std::to_string(labels.size() - 1) +
                  ", each once");
    labels[i] = label.as_string(where + ": id2label " + number);
    if (labels[i].find_first_of("\t\r\n") != std::string::npos)
      throw Error(where + ": id2label " + number + ": a label holds a TAB or an end of line; results are lines of columns");
    if (!labels[i].empty() && std::count(labels.begin(), labels.end(), labels[i]) > 1)
      throw Error(where + ": id2label " + number + ": '" + labels[i] + "' is the name of another label, too; rename one");
    seen[i] = true;
  }
  return labels;
}

static Json read_json(const std::string& path) { return Json::parse(read_file(path), path); }
// What the object `json` has under a key; null where it has none, or says null.
static const Json* given(const Json& json, const char* key) {
  const Json* v = json.find(key);
  return v && !v->is(Json::null) ? v : nullptr;
}

// What this engine's encoder is not: refused by name, never computed as if it were BERT.
static void refuse_variants(const Json& json, const std::string& where) {
  if (const Json* v = json.find("position_embedding_type"); v && v->is(Json::string) && v->as_string(where) != "absolute")
    throw Error(where + ": position_embedding_type: '" + v->as_string(where) + "' is not built; only absolute positions are");
  if (const Json* v = json.find("is_decoder"); v && v->is(Json::boolean) && v->as_bool(where))
    throw Error(where + ": is_decoder: a decoder is not built");
}

// Every head there is.
static const HeadKind head_kinds[] = {
    // task      name        architecture           problem_type                   pooler masked next   output  outputs  tokens
    {Task::embed, "embed", "BertModel", "", true, false, false, nullptr, 0, false},
    {Task::pretrain, "pretrain", "BertForPreTraining", "", true, true, true, nullptr, 0, false},
    {Task::replaced, "replaced", "ElectraForPreTraining", "", false, false, false, nullptr, 1, true},
    {Task::mlm, "mlm", "BertForMaskedLM", "", false, true, false, nullptr, 0, false},
    {Task::next_sentence, "next_sentence", "BertForNextSentencePrediction", "", true, false, true, nullptr, 0, false},
    {Task::classify, "classify", "BertForSequenceClassification", "single_label_classification", true, false, false, "classifier", 0,
     false},
    {Task::multilabel, "multilabel", "BertForSequenceClassification", "multi_label_classification", true, false, false, "classifier", 0,
     false},
    {Task::regress, "regress", "BertForSequenceClassification", "regression", true, false, false, "classifier", 0, false},
    {Task::tag, "tag", "BertForTokenClassification", "", false, false, false, "classifier", 0, true},
    {Task::qa, "qa", "BertForQuestionAnswering", "", false, false, false, "qa_outputs", 2, true},
    {Task::choice, "choice", "BertForMultipleChoice", "", true, false, false, "classifier", 1, false},
};

static const HeadKind* find_architecture(std::string_view name) {
  return find_row(head_kinds, [&](const HeadKind& h) { return name == h.architecture; });
}

Config Config::parse(std::string_view text, const std::string& where, const std::string& type_of_tensors) {
  const Json json = Json::parse(text, where);
  if (!json.is(Json::object)) throw Error(where + ": not an object; a config.json holds {\"vocab_size\": ..., ...}");
  auto given = [&](const char* key) { return *key ? bert::given(json, key) : nullptr; };
  Config c;
  c.model_type = given("model_type") ? given("model_type")->as_string(where + ": model_type") : type_of_tensors;
  const Family& f = find_family(c.model_type, where);
  refuse_variants(json, where);
  auto need = [&](const char* key) -> const Json& {
    if (const Json* v = given(f.key(key))) return *v;
    throw Error(where + ": " + f.key(key) + ": missing; a config of type " + c.model_type + " needs it");
  };
  for (const ConfigSize& s : config_sizes)
    if (f.has(s.key) && (s.required || given(f.key(s.key)))) {
      const std::string at = where + ": " + f.key(s.key);
      bounded(need(s.key), at, s.required, (double)s.most), c.*s.field = need(s.key).as_int(at);
    }
  for (const ConfigNumber& n : config_numbers)
    if (const Json* v = given(f.key(n.key))) c.*n.field = bounded(*v, where + ": " + f.key(n.key), n.least, n.most);
  if (const Json* v = given(f.key("classifier_dropout"))) c.classifier_dropout = bounded(*v, where + ": classifier_dropout", 0, 0.99);
  if (const Json* v = given("quantized")) {
    const std::string& name = v->as_string(where + ": quantized");
    for (const Precision p : {Precision::bf16, Precision::int8})
      if (name == name_of(p)) c.quantized = p;
    if (!c.quantized) throw Error(where + ": quantized: '" + name + "'; it may be bf16 or int8");
  }
  if (const Json* v = given("null_threshold")) c.null_threshold = bounded(*v, where + ": null_threshold", -1e9, 1e9);
  for (auto [key, least, field] : {std::tuple("window_length", 8, &c.window_length), {"window_stride", 0, &c.window_stride}})
    if (const Json* v = given(key)) {
      const std::string at = where + ": " + key;
      bounded(*v, at, least, (double)c.max_position_embeddings), *field = v->as_int(at);
    }
  if (c.hidden_size % c.num_attention_heads)
    throw Error(where + ": hidden_size " + std::to_string(c.hidden_size) + " is not a multiple of num_attention_heads " +
                std::to_string(c.num_attention_heads));
  const std::string& act = need("hidden_act").as_string(where + ": hidden_act");
  const auto* found = find_row(activations, [&](const auto& a) { return act == a.first; });
  if (!found) throw Error(where + ": hidden_act: '" + act + "' is not built; gelu, gelu_new, gelu_pytorch_tanh, relu and tanh are");
  c.hidden_act = found->second;
  if (const Json* v = given("architectures")) {
    const auto& names = v->items(where + ": architectures");
    if (!names.empty()) c.architecture = names[0].as_string(where + ": architectures");
    const bool own = find_architecture(c.architecture);  // ElectraForPreTraining is no BertForPreTraining
    if (!own && c.architecture.starts_with(f.classes)) c.architecture = "Bert" + c.architecture.substr(std::strlen(f.classes));
  }
  const HeadKind* head = find_architecture(c.architecture);
  if (const Json* v = given("tie_word_embeddings"); v && !v->as_bool(where + ": tie_word_embeddings") && head && head->masked_words)
    throw Error(where + ": tie_word_embeddings: false is not built; the decoder of masked words is the word embeddings");
  if (const Json* v = given("problem_type")) c.problem_type = v->as_string(where + ": problem_type");
  if (const Json* v = given("id2label")) {
    c.labels = parse_labels(*v, where);
  } else if (const Json* count = given("num_labels")) {  // transformers' names
    const double most = bounded(*count, where + ": num_labels", 1, 1 << 20);
    for (int i = 0; i < most; i++) c.labels.push_back("LABEL_" + std::to_string(i));
  }
  return c;
}

std::string Config::class_name() const {
  return architecture.starts_with("Bert") ? family(*this).classes + architecture.substr(4) : architecture;
}

Config Config::named(const std::string& name, int64_t vocab_size) {
  struct Size {
    const char* name;
    int64_t layers, hidden, heads;
  };
  static const Size sizes[] = {{"tiny", 2, 128, 2},   {"mini", 4, 256, 4},     {"small", 4, 512, 8},  {"medium", 8, 512, 8},
                               {"base", 12, 768, 12}, {"large", 24, 1024, 16}, {"minilm", 6, 384, 12}};
  for (const Size& s : sizes)
    if (name == s.name) {
      Config c;
      c.vocab_size = vocab_size, c.hidden_size = s.hidden, c.num_hidden_layers = s.layers, c.num_attention_heads = s.heads,
      c.intermediate_size = 4 * s.hidden;
      // Devlin et al.'s 0.02 belongs to their width of 768. Scaled by 1 / sqrt(width), products start with the same variance in narrower
      // models. Measured with tiny: 0.08 in place of 0.02 stood 0.06 nats lower after 1.5 million tokens, and 0.05 ended as low as 0.08.
      c.initializer_range = std::round(0.02 * std::sqrt(768.0 / (double)s.hidden) * 1e4) / 1e4;
      return c;
    }
  throw Error("config '" + name + "': no such name; tiny, mini, small, medium, base, large, minilm, or a config.json file");
}

std::string Config::to_json(const std::string& dtype) const {
  const Family& f = family(*this);
  const auto* act = find_row(activations, [&](const auto& a) { return a.second == hidden_act; });
  std::map<std::string, std::string> lines = {{f.key("hidden_act"), json_quote(act->first)},
                                              {"model_type", json_quote(model_type)},
                                              {"position_embedding_type", "\"absolute\""},
                                              {"tie_word_embeddings", "true"},
                                              {"torch_dtype", json_quote(dtype)}};
  for (const ConfigSize& s : config_sizes) lines[f.key(s.key)] = std::to_string(this->*s.field);
  for (const ConfigNumber& n : config_numbers) lines[f.key(n.key)] = format_number(this->*n.field);
  if (f.has("embedding_size")) lines["embedding_size"] = std::to_string(embedding());
  if (classifier_dropout) lines[f.key("classifier_dropout")] = format_number(*classifier_dropout);
  if (quantized) lines["quantized"] = json_quote(name_of(*quantized));
  if (null_threshold) lines["null_threshold"] = exact(*null_threshold);  // it is a margin itself
  if (window_length) lines["window_length"] = std::to_string(*window_length);
  if (window_stride) lines["window_stride"] = std::to_string(*window_stride);
  lines.erase("");  // what the family has not
  if (!architecture.empty()) lines["architectures"] = "[\n    " + json_quote(class_name()) + "\n  ]";
  if (!problem_type.empty()) lines["problem_type"] = json_quote(problem_type);
  for (size_t i = 0; i < labels.size(); i++) {
    const std::string number = std::to_string(i), before = i ? ",\n    " : "{\n    ", after = i + 1 < labels.size() ? "" : "\n  }";
    lines["id2label"] += before + "\"" + number + "\": " + json_quote(labels[i]) + after;
    lines["label2id"] += before + json_quote(labels[i]) + ": " + number + after;
  }
  std::string text;
  for (const auto& [key, value] : lines) text += (text.empty() ? "{\n  \"" : ",\n  \"") + key + "\": " + value;
  return text + "\n}\n";
}

// ==== parameters ==================================================================================================
const HeadKind& head_kind(Task task) {
  if (const HeadKind* head = find_row(head_kinds, [&](const HeadKind& h) { return h.task == task; })) return *head;
  throw Error("no such task");
}
const HeadKind* find_head(std::string_view name) {
  return find_row(head_kinds, [&](const HeadKind& h) { return name == h.name; });
}
// Without a problem_type one label means regression, more mean classes: transformers' rule.
const HeadKind& head_kind(const Config& config) {
  if (config.architecture.empty()) return head_kind(Task::embed);
  std::string problem = config.problem_type;
  if (problem.empty()) problem = config.labels.size() == 1 ? "regression" : "single_label_classification";
  for (const HeadKind& h : head_kinds)
    if (config.architecture == h.architecture && (!*h.problem_type || problem == h.problem_type)) return h;
  throw Error("config.json: architecture " + config.class_name() +
              (config.problem_type.empty() ? "" : " with problem_type " + config.problem_type) +
              " is not built; BertModel, and BertFor with PreTraining, MaskedLM, NextSentencePrediction, SequenceClassification, "
              "TokenClassification, QuestionAnswering and MultipleChoice are");
}

// The one table of parameters: visit(name, tensor, shape of the whole tensor, first row, rows) in checkpoint order. Query, key and
// value stand in one tensor [3H,H], under three names.
template <class Visit>
static void visit_parameters(Bert& m, Visit visit) {
  const Config& c = m.config;
  const HeadKind& head = head_kind(m.task);
  const Family& f = family(c);
  const int64_t H = c.hidden_size, F = c.intermediate_size, E = c.embedding();
  const std::string bert = m.task == Task::embed ? "" : "bert.";  // BertModel is saved without the prefix
  auto whole = [&](const std::string& name, Tensor& t, const Shape& s) { visit(name, t, s, (int64_t)0, s[0]); };
  auto both = [&](const std::string& name, Dense& d, const Shape& s) {
    whole(name + ".weight", d.weight, s), whole(name + ".bias", d.bias, {s[0]});
  };

  whole(bert + "embeddings.word_embeddings.weight", m.word, {c.vocab_size, E});
  whole(bert + "embeddings.position_embeddings.weight", m.position, {c.max_position_embeddings, E});
  if (f.has("type_vocab_size")) whole(bert + "embeddings.token_type_embeddings.weight", m.segment, {c.type_vocab_size, E});
  both(bert + "embeddings.LayerNorm", m.embeddings_norm, {E});
  if (E != H) both(bert + "embeddings_project", m.projection, {H, E});
  for (size_t l = 0; l < m.layers.size(); l++) {
    Layer& layer = m.layers[l];
    const std::string at = bert + "encoder.layer." + std::to_string(l) + ".";
    int64_t part = 0;
    for (const char* name : {"query", "key", "value"}) {
      visit(at + "attention.self." + name + ".weight", layer.qkv.weight, Shape{3 * H, H}, part, H);
      visit(at + "attention.self." + name + ".bias", layer.qkv.bias, Shape{3 * H}, part, H);
      part += H;
    }
    both(at + "attention.output.dense", layer.attention_out, {H, H}), both(at + "attention.output.LayerNorm", layer.attention_norm, {H});
    both(at + "intermediate.dense", layer.up, {F, H});
    both(at + "output.dense", layer.down, {H, F}), both(at + "output.LayerNorm", layer.output_norm, {H});
  }
  if (head.pooler && (f.is_bert() || head.output)) both(bert + "pooler.dense", m.pooler, {H, H});
  if (head.masked_words) {
    whole("cls.predictions.bias", m.decoder_bias, {c.vocab_size});
    both("cls.predictions.transform.dense", m.transform, {E, H}), both("cls.predictions.transform.LayerNorm", m.transform_norm, {E});
  }
  if (head.next_sentence) both("cls.seq_relationship", m.next_sentence, {2, H});
  if (head.output) both(head.output, m.classifier, {head.classes(c), H});
  if (m.task == Task::replaced) {
    both("discriminator_predictions.dense", m.transform, {H, H});
    both("discriminator_predictions.dense_prediction", m.classifier, {1, H});
  }
}

// A family without segments adds zeros for them.
static void add_segments(Bert& m) {
  if (!m.segment) m.segment = Tensor({m.config.type_vocab_size, m.config.embedding()}, 0.f);
}

Shape Parameter::shape() const { return tensor.shape().rank() == 1 ? Shape{rows} : Shape{rows, tensor.cols()}; }
bool Parameter::decay() const { return !name.ends_with("bias") && name.find("LayerNorm") == std::string::npos; }

Bert Bert::empty(const Config& config, Task task) {
  const HeadKind& head = head_kind(task);
  if (head.output && !head.classes(config)) throw Error("a " + std::string(head.name) + " model needs at least one label");
  Bert m;
  m.config = config, m.task = task;
  m.config.architecture = head.architecture, m.config.problem_type = head.problem_type;
  m.layers.resize((size_t)config.num_hidden_layers);
  // Asked before the first allocation: the system lends memory that it has not got, and kills whoever uses it.
  int64_t numbers = 0;
  visit_parameters(m, [&](const std::string&, Tensor&, const Shape& s, int64_t first, int64_t) { numbers += first ? 0 : s.size(); });
  const double MiB = 4.0 * (double)numbers / (1 << 20), there = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / (1 << 20);
  if (MiB > there)
    throw Error("config: a model of this shape needs " + format_number(std::round(MiB)) + " MiB of memory, and this machine has " +
                format_number(std::round(there)) + " MiB; take a smaller one");
  visit_parameters(m, [](const std::string&, Tensor& t, const Shape& s, auto...) { t = t ? t : Tensor(s); });
  add_segments(m);
  return m;
}

std::vector<Parameter> Bert::parameters() const {
  std::vector<Parameter> all;
  Bert copy = *this;  // handles, not numbers: the visitor takes a model it may fill
  visit_parameters(copy, [&](const std::string& name, Tensor& t, const Shape&, int64_t first, int64_t rows) {
    if (t) all.push_back({name, t, first, rows});
  });
  return all;
}

int64_t Bert::parameter_count() const {
  int64_t n = 0;
  for (const Parameter& p : parameters()) n += p.shape().size();
  return n;
}

void Bert::pack(Precision precision) {
  table_rounded = precision;
  if (head_kind(task).masked_words) {
    decoder = word.narrow() ? Tensor::narrow(*word.narrow()) : Tensor::borrowed(word.shape(), word.data(), {});
    decoder.pack(precision);
  }
  for (Dense* d : {&projection, &pooler, &transform, &next_sentence, &classifier})
    if (d->weight) d->weight.pack();
  for (Layer& l : layers)
    for (Dense* d : {&l.qkv, &l.attention_out, &l.up, &l.down}) d->weight.pack(precision);
}

// Draws one parameter's initial values: each block of 4096 elements has a counter of its own, so threads do not matter.
static void draw(const Parameter& p, double range, uint64_t seed, uint32_t index) {
  const bool norm = p.name.find("LayerNorm") != std::string::npos;
  float* values = p.data();
  const int64_t n = p.shape().size();
  if (norm || p.name.ends_with("bias")) return void(std::fill_n(values, n, norm && p.name.ends_with("weight") ? 1.f : 0.f));
  parallel_ranges(n, 4096, [&](int64_t i, int64_t end) {
    Random random({seed, (uint32_t)(i / 4096), 0, kInitStream + index});
    for (; i < end; i++) values[i] = (float)range * random.truncated_normal();
  });
}

Bert Bert::random(const Config& config, Task task, uint64_t seed) {
  Bert m = empty(config, task);
  uint32_t index = 0;
  for (const Parameter& p : m.parameters()) draw(p, config.initializer_range, seed, index++);
  return m;
}

// The layer that a parameter belongs to, from 1; 0: the embeddings; one above the last: a head.
static int64_t layer_of(const Parameter& p, int64_t layers) {
  const std::string mark = "encoder.layer.";
  const size_t at = p.name.find(mark);
  if (at != p.name.npos) return std::atoll(p.name.c_str() + at + mark.size()) + 1;
  return p.name.find("embeddings") != p.name.npos ? 0 : layers + 1;
}

void Bert::draw_again(int64_t top, uint64_t seed) {
  uint32_t index = 0;
  for (const Parameter& p : parameters()) {
    const int64_t layer = layer_of(p, config.num_hidden_layers);
    if ((layer > config.num_hidden_layers - top && layer <= config.num_hidden_layers) || p.name.find("pooler.") != p.name.npos)
      draw(p, config.initializer_range, seed, index);
    index++;
  }
}

// ==== the model ===================================================================================================
// One encoder layer, post-norm as in the paper (Vaswani et al. 2017, figure 1; Devlin et al. 2019).
//   x [N,H], packed rows split at offsets [R+1]   ->   [N,H]
// read: M tokens whose output is wanted; the others take part as keys and values, and their output is 0. Empty: M is N.
// Dropout behind the attention numbers its draws by these M rows.
static Tensor encoder_layer(const Tensor& x, const Offsets& rows, const Layer& p, const Config& c, Dropout& drop, const Tokens& read) {
  Tensor qkv = linear(x, p.qkv.weight, p.qkv.bias);                                                                  // [N,3H]
  Tensor mix = attention(qkv, rows, c.num_attention_heads, c.max_position_embeddings, drop, read);                   // [M,H]
  Tensor in = read.empty() ? x : gather_rows(x, read);                                                               // [M,H]
  Tensor out = linear(mix, p.attention_out.weight, p.attention_out.bias);                                            // [M,H]
  Tensor h = residual_norm(in, out, p.attention_norm.weight, p.attention_norm.bias, (float)c.layer_norm_eps, drop);  // [M,H]
  qkv = mix = in = out = {};  // without a tape nobody wants them any more: their room is free for the next
  Tensor up = linear(h, p.up.weight, p.up.bias, c.hidden_act);                                                 // [M,F]
  Tensor down = linear(up, p.down.weight, p.down.bias);                                                        // [M,H]
  Tensor y = residual_norm(h, down, p.output_norm.weight, p.output_norm.bias, (float)c.layer_norm_eps, drop);  // [M,H]
  return read.empty() ? y : place_rows(y, read, x.rows());
}

Tensor Bert::forward(const Batch& batch, Dropout& drop, bool recompute, const Tokens& read) const {
  Profile::lap();
  Tensor x = embedding_norm(word, segment, position, batch.ids, batch.segments, batch.positions, embeddings_norm.weight,
                            embeddings_norm.bias, (float)config.layer_norm_eps, drop, table_rounded);  // [N,E]
  if (projection.weight) x = linear(x, projection.weight, projection.bias);                            // [N,H], ELECTRA's
  const Tokens all;
  for (const Layer& layer : layers) {
    const Tokens& some = &layer == &layers.back() ? read : all;
    if (recompute) {
      auto again = [layer, rows = batch.offsets, c = config, some](const Tensor& in, Dropout& d) {
        return encoder_layer(in, rows, layer, c, d, some);
      };
      x = recomputed(x, layer.up.weight, again, drop);
    } else {
      x = encoder_layer(x, batch.offsets, layer, config, drop, some);
    }
  }
  return x;
}

// The first row of x that holds something that is not finite; -1: none.
static int64_t first_not_finite(const Tensor& x) {
  for (int64_t i = 0; i < x.rows(); i++)
    if (!std::isfinite(kernels().sum(x.data() + i * x.cols(), x.cols()))) return i;
  return -1;
}

// What is answered must be numbers: a weight that is finite but absurd makes sums that are not. Returns x.
static Tensor finite(const Tensor& x) {
  if (first_not_finite(x) >= 0)
    throw Error("the model's numbers are not finite: its weights are damaged, or were trained at too high a rate; take another copy");
  return x;
}

// Rows [first, last) of a batch as one of their own.
static Batch rows_of(const Batch& batch, int64_t first, int64_t last) {
  Batch some;
  for (int64_t r = first; r < last; r++) {
    const auto begin = (size_t)batch.offsets[(size_t)r], length = (size_t)batch.offsets[(size_t)r + 1] - begin;
    some.add_row(std::span(batch.ids).subspan(begin, length), std::span(batch.segments).subspan(begin, length));
  }
  return some;
}

// A few rows at a time go through all layers on one thread: what passes from op to op then stays in that core's second cache, and no
// thread waits for another between ops. The bytes are those of the whole batch at once.
static constexpr int64_t kGroupTokens = 128;  // measured: 64 and 256 are as fast, all at once is 5 % (f32) to 13 % (int8) slower
Tensor Bert::forward(const Batch& batch, const Tokens& read) const {
  if (!std::is_sorted(read.begin(), read.end()) || (!read.empty() && (read.front() < 0 || read.back() >= batch.tokens())))
    throw Error("forward: the tokens to read must ascend, and be of the batch's " + std::to_string(batch.tokens()));
  Offsets groups{0};  // rows
  for (int64_t r = 1; r <= batch.rows(); r++)
    if (r == batch.rows() || batch.offsets[(size_t)r + 1] - batch.offsets[(size_t)groups.back()] > kGroupTokens) groups.push_back(r);
  Dropout none;
  const bool packed = !layers.empty() && layers[0].up.weight.packed();  // plain weights would be packed for each group again
  if (!packed || device_in_use() || (int64_t)groups.size() <= 2 * threads()) return finite(forward(batch, none, false, read));
  const int64_t H = config.hidden_size;
  Tensor y({batch.tokens(), H});
  parallel_for((int64_t)groups.size() - 1, [&](int64_t g) {
    const int64_t first = groups[(size_t)g], last = groups[(size_t)g + 1];
    const int64_t begin = batch.offsets[(size_t)first], end = batch.offsets[(size_t)last];
    Dropout none;
    Tokens own;
    for (auto t = std::lower_bound(read.begin(), read.end(), begin); t != read.end() && *t < end; t++) own.push_back(*t - begin);
    if (own.empty() && !read.empty()) return void(std::fill_n(y.data() + begin * H, (end - begin) * H, 0.f));
    const Tensor part = finite(forward(rows_of(batch, first, last), none, false, own));
    std::copy_n(part.data(), part.size(), y.data() + begin * H);
  });
  return y;
}

// ==== heads =======================================================================================================
static Tokens first_tokens(const Batch& batch) { return {batch.offsets.begin(), batch.offsets.end() - 1}; }  // [CLS] of each row

Tensor Bert::pooled(const Tensor& hidden, const Batch& batch) const {
  if (!pooler.weight) throw Error("pooled: this model has no pooler");
  return linear(gather_rows(hidden, first_tokens(batch)), pooler.weight, pooler.bias, family(config).pooler);  // [R,H]
}

// What pooling reads; empty: every token.
static Tokens read_by(const Pooling& pooling, const Batch& batch) {
  for (const Pooling::Kind kind : pooling.kinds)
    if (kind != Pooling::cls && kind != Pooling::pooler) return {};
  return first_tokens(batch);
}

Tokens Bert::read_by_head(const Batch& batch, const Pooling& pooling) const {
  if (task == Task::embed) return read_by(pooling, batch);
  const HeadKind& head = head_kind(task);
  if (head.tokens) return {};
  const Tokens first = head.next_sentence || head.output ? first_tokens(batch) : Tokens();
  Tokens read;
  std::set_union(first.begin(), first.end(), batch.masked.begin(), batch.masked.end(), std::back_inserter(read));
  return read;
}

// What the masked words are told from: dense, activation, LayerNorm.   [M,E]
// The masked tokens are gathered first, so that the large product is [M,V] and not [N,V].
static Tensor masked_hidden(const Bert& m, const Tensor& hidden, const Tokens& masked) {
  Dropout none;
  const Activation act =
      family(m.config).pooler == Activation::gelu ? Activation::gelu : m.config.hidden_act;  // ELECTRA's heads know no other
  const Tensor x = linear(gather_rows(hidden, masked), m.transform.weight, m.transform.bias, act);
  return residual_norm(x, {}, m.transform_norm.weight, m.transform_norm.bias, (float)m.config.layer_norm_eps, none);
}

Tensor Bert::masked_logits(const Tensor& hidden, const Tokens& masked) const {
  return linear(masked_hidden(*this, hidden, masked), decoder ? decoder : word, decoder_bias);  // [M,V], tied to the embeddings
}

Tensor Bert::masked_loss(const Tensor& hidden, const Batch& batch, double divisor, int64_t* right) const {
  return linear_cross_entropy(masked_hidden(*this, hidden, batch.masked), word, decoder_bias, batch.masked_labels, divisor, right);
}

Tensor Bert::logits(const Tensor& hidden, const Batch& batch, Dropout& drop) const {
  const HeadKind& head = head_kind(task);
  if (head.next_sentence) return linear(pooled(hidden, batch), next_sentence.weight, next_sentence.bias);
  Tensor x = head.tokens ? hidden : pooled(hidden, batch);
  if (task == Task::replaced)
    return linear(linear(x, transform.weight, transform.bias, config.hidden_act), classifier.weight, classifier.bias);
  Dropout before = drop;
  before.hidden = task == Task::qa ? 0 : drop.classifier;  // as transformers does
  x = dropout(x, before);
  drop.key = before.key;
  return linear(x, classifier.weight, classifier.bias);
}

// One way of pooling, of all rows.   hidden [N,H]   ->   [R,H]
static Tensor pool_by(Pooling::Kind kind, const Bert& bert, const Tensor& hidden, const Batch& batch) {
  if (kind == Pooling::mean) return mean_rows(hidden, batch.offsets);
  if (kind == Pooling::cls) return gather_rows(hidden, first_tokens(batch));
  if (kind == Pooling::pooler) return bert.pooled(hidden, batch);
  const int64_t R = batch.rows(), H = hidden.cols();
  Tensor v(Shape{R, H}, kind == Pooling::max ? -std::numeric_limits<float>::infinity() : 0.f);
  parallel_for(R, [&](int64_t r) {
    const int64_t begin = batch.offsets[(size_t)r], end = batch.offsets[(size_t)r + 1], T = end - begin;
    float* out = v.data() + r * H;
    float weights = 0;
    for (int64_t t = kind == Pooling::last ? end - 1 : begin; t < end; t++) {
      const float* x = hidden.data() + t * H;
      const float weight = kind == Pooling::weighted_mean ? (float)(t - begin + 1) : 1;  // the later, the heavier
      weights += weight;
      for (int64_t c = 0; c < H; c++) out[c] = kind == Pooling::max ? std::max(out[c], x[c]) : std::fma(weight, x[c], out[c]);
    }
    const float divisor = kind == Pooling::weighted_mean ? weights : kind == Pooling::mean_sqrt ? std::sqrt((float)T) : 1;
    for (int64_t c = 0; c < H; c++) out[c] /= divisor;
  });
  return v;
}

// Vectors of a batch's rows from the encoder's output: [R, width].
static Tensor pool_rows(const Bert& bert, const Tensor& hidden, const Batch& batch, const Pooling& pooling) {
  std::vector<Tensor> parts;
  for (const Pooling::Kind kind : pooling.kinds) parts.push_back(pool_by(kind, bert, hidden, batch));
  Tensor v = parts[0];  // [R,H], or several side by side
  if (parts.size() > 1) {
    const int64_t R = batch.rows(), H = hidden.cols(), P = (int64_t)parts.size();
    v = Tensor(Shape{R, P * H});
    for (int64_t p = 0; p < P; p++)
      for (int64_t r = 0; r < R; r++) std::copy_n(parts[(size_t)p].data() + r * H, H, v.data() + (r * P + p) * H);
  }
  for (const Pooling::Layer& l : pooling.layers) v = linear(v, l.dense.weight, l.dense.bias, l.activation);
  return pooling.normalize ? normalize_rows(v) : v;
}

// The k-th row of each group.
static std::vector<int64_t> rows_of_groups(const Batch& batch, int64_t k) {
  std::vector<int64_t> rows;
  for (size_t g = 0; g + 1 < batch.groups.size(); g++) {
    if (batch.groups[g + 1] - batch.groups[g] <= k) throw Error("similarity: this loss compares " + std::to_string(k + 1) + " texts");
    rows.push_back(batch.groups[g] + k);
  }
  return rows;
}

// Of groups of texts, the first being compared with the others.
static Tensor pair_loss(const Bert& model, const Tensor& hidden, const Batch& batch, const LossCounts& counts, const LossRule& rule,
                        Losses& report) {
  const Pooling::Kind kind = rule.pooling.kinds[0];
  if (rule.pooling.kinds.size() > 1 || !rule.pooling.layers.empty() || kind > Pooling::pooler || kind == Pooling::max)
    throw Error("similarity: pooling by " + rule.pooling.name() + " cannot be trained; mean, cls and pooler can, without dense layers");
  const Tensor v = pool_rows(model, hidden, batch, rule.pooling);                   // [R,H]
  auto text = [&](int64_t k) { return gather_rows(v, rows_of_groups(batch, k)); };  // [G,H]
  if (rule.pairs == PairLoss::triplet) return triplet_loss(text(0), text(1), text(2), 5.f, counts.rows);
  const Tensor a = normalize_rows(text(0)), b = normalize_rows(text(1));
  if (rule.pairs == PairLoss::inbatch) {  // every other text of the batch is wrong for a text, the further ones of its own group too
    std::vector<int32_t> own;
    std::vector<int64_t> partners = rows_of_groups(batch, 1);
    for (size_t g = 0; g < partners.size(); g++) own.push_back((int32_t)g);
    for (size_t g = 0; g + 1 < batch.groups.size(); g++)
      for (int64_t r = batch.groups[g] + 2; r < batch.groups[g + 1]; r++) partners.push_back(r);
    const Tensor cosines = linear(a, normalize_rows(gather_rows(v, partners)));  // [G, partners]
    return cross_entropy(scale(cosines, (float)(1 / rule.temperature)), own, counts.rows, &report.next_right);
  }
  const Tensor cosines = row_dots(a, b), targets(cosines.shape(), batch.targets);
  return rule.pairs == PairLoss::cosine ? mse_loss(cosines, targets, counts.rows) : contrastive_loss(cosines, targets, 0.5f, counts.rows);
}

// The loss of the layer that answers.
static Tensor output_loss(const Bert& model, const Tensor& hidden, const Batch& batch, const LossCounts& counts, Dropout& drop,
                          const LossRule& rule, Losses& report) {
  const Tensor logits = model.logits(hidden, batch, drop);
  const double each = counts.rows * (double)logits.cols();
  switch (model.task) {
    case Task::classify:
    case Task::tag:
      return cross_entropy(logits, batch.labels, counts.rows, &report.next_right, rule.classes);
    case Task::qa:
      return position_cross_entropy(logits, batch.offsets, batch.labels, counts.rows, &report.next_right);
    case Task::choice:
      return position_cross_entropy(logits, batch.groups, batch.labels, counts.rows, &report.next_right);
    case Task::multilabel:
      return bce_with_logits(logits, Tensor(logits.shape(), batch.targets), each);
    default:
      return mse_loss(logits, Tensor(logits.shape(), batch.targets), each);
  }
}

Tensor batch_loss(const Bert& model, const Tensor& hidden, const Batch& batch, const LossCounts& counts, Dropout& drop, Losses& report,
                  const LossRule& rule) {
  const HeadKind& head = head_kind(model.task);
  std::vector<Tensor> parts;
  if (head.masked_words) {
    parts.push_back(model.masked_loss(hidden, batch, counts.masked, &report.masked_right));
    report.masked += parts.back().item();
  }
  if (head.next_sentence) {
    parts.push_back(cross_entropy(model.logits(hidden, batch, drop), batch.labels, counts.rows, &report.next_right));
    report.next_sentence += parts.back().item();
  }
  if (head.output) parts.push_back(output_loss(model, hidden, batch, counts, drop, rule, report));
  if (model.task == Task::embed && batch.groups.size() > 1) parts.push_back(pair_loss(model, hidden, batch, counts, rule, report));
  if (parts.empty()) throw Error("batch_loss: a model for " + std::string(head.name) + " has no loss");
  const Tensor loss = parts.size() == 2 ? add(parts[0], parts[1]) : parts[0];
  report.total += loss.item();
  return loss;
}

// ==== batches =====================================================================================================
void Batch::add_row(std::span<const int32_t> row, std::span<const int32_t> row_segments) {
  ids.insert(ids.end(), row.begin(), row.end());
  segments.insert(segments.end(), row_segments.begin(), row_segments.end());
  for (size_t t = 0; t < row.size(); t++) positions.push_back((int32_t)t);
  offsets.push_back((int64_t)ids.size());
}

// Row numbers cut into batches of at most `tokens` tokens (a longer row stands alone), similar lengths together.
static std::vector<std::vector<int64_t>> batches_by_tokens(const std::vector<int64_t>& lengths, int64_t tokens) {
  std::vector<int64_t> order = count_up(lengths.size());
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[(size_t)a] < lengths[(size_t)b]; });
  std::vector<std::vector<int64_t>> batches;
  int64_t held = 0;
  for (const int64_t row : order) {
    if (batches.empty() || held + lengths[(size_t)row] > tokens) batches.emplace_back(), held = 0;
    batches.back().push_back(row), held += lengths[(size_t)row];
  }
  return batches;
}

// ==== training ====================================================================================================
static std::vector<AdamW::Slot> optimizer_slots(const Bert& model, const TrainSettings& settings) {
  std::vector<AdamW::Slot> slots;
  const int64_t layers = model.config.num_hidden_layers;
  for (const Parameter& p : model.parameters()) {
    const int64_t layer = layer_of(p, layers);
    if (p.first_row || (settings.freeze && layer <= settings.freeze)) continue;  // query, key and value are one tensor
    slots.push_back({p.tensor, {}, {}, p.decay(), (float)std::pow(settings.layer_decay, (double)(layers + 1 - layer))});
  }
  return slots;
}

Trainer::Trainer(Bert model, const TrainSettings& settings)
    : model_(std::move(model)), settings_(settings), optimizer_(settings.optimizer, optimizer_slots(model_, settings)) {
  if (settings.accumulate < 1 || (settings.accumulate & (settings.accumulate - 1)))
    throw Error("accumulate: " + std::to_string(settings.accumulate) + " is not a power of two");
  for (const AdamW::Slot& s : optimizer_.slots()) Tensor(s.parameter).set_needs_grad();
}

// Leaves in the parameters the gradient of micro-batches [first, first + count), by backward(i) for each: their sum in a binary tree by
// index, so that it does not matter which machine makes which. At most 1 + log2 count gradients are held.
static void sum_gradients(std::vector<Tensor>& parameters, size_t first, size_t count, const std::function<void(size_t)>& backward) {
  if (count == 1) return backward(first);
  const size_t half = std::bit_floor(count - 1);
  sum_gradients(parameters, first, half, backward);
  std::vector<Tensor> earlier;
  for (Tensor& p : parameters) earlier.push_back(p.has_grad() ? p.take_grad() : Tensor());
  sum_gradients(parameters, first + half, count - half, backward);
  for (size_t i = 0; i < parameters.size(); i++)
    if (earlier[i]) {
      float *sum = parameters[i].grad(), *from = earlier[i].data();
      parallel_ranges(earlier[i].size(), 1 << 15, [&](int64_t b, int64_t e) { kernels().add(from + b, sum + b, e - b); });
    }
}

// Rows of the losses: of labels, what their classes weigh; of start and end together one; of texts to compare their groups.
static LossCounts count_labels(std::span<const Batch> batches, Task task, const ClassRule& rule) {
  LossCounts counts;
  const double each = task == Task::qa ? 0.5 : 1;
  for (const Batch& b : batches) {
    counts.masked += (double)b.masked_labels.size();
    for (const int32_t label : b.labels)
      if (label != kIgnored) counts.rows += task == Task::classify || task == Task::tag ? (double)rule.weight(label) : each;
    if (b.labels.empty()) counts.rows += (double)(b.groups.size() > 1 ? (int64_t)b.groups.size() - 1 : b.rows());
  }
  return {counts.masked > 0 ? counts.masked : 1, counts.rows > 0 ? counts.rows : 1};
}

// The probabilities of a micro-batch's dropout, and its draws' key.
static Dropout step_dropout(const Config& c, const TrainSettings& settings, int64_t step, size_t micro) {
  auto p = [&](double of_config) { return (float)(settings.dropout >= 0 ? settings.dropout : of_config); };
  return {p(c.hidden_dropout_prob),
          p(c.attention_probs_dropout_prob),
          p(c.classifier_dropout.value_or(c.hidden_dropout_prob)),
          {settings.seed, (uint32_t)step, (uint32_t)micro, 0}};
}

double forward_flops(const Config& c, const Batch& b, const Tokens& read) {
  const double H = (double)c.hidden_size, F = (double)c.intermediate_size, N = (double)b.tokens();
  double attention = 0, left_out = 0;  // of a layer; of the last one
  for (int64_t r = 0; r < b.rows(); r++) {
    const int64_t begin = b.offsets[(size_t)r], end = b.offsets[(size_t)r + 1];
    const auto first = std::lower_bound(read.begin(), read.end(), begin), last = std::lower_bound(first, read.end(), end);
    const double T = (double)(end - begin);
    attention += 4 * H * T * T;
    if (!read.empty()) left_out += (T - (double)(last - first)) * (4 * H * T + 2 * (H * H + 2 * H * F));
  }
  return (double)c.num_hidden_layers * (N * 2 * (4 * H * H + 2 * H * F) + attention) - left_out;
}

// A training step's: each product has two in backward, but for those of frozen layers; those of the masked words are counted too.
static double step_flops(const Bert& model, const Batch& b, const Tokens& read, int64_t frozen) {
  const double head = b.masked.empty() ? 0 : 2 * (double)b.masked.size() * (double)(model.transform.weight.size() + model.word.size());
  const double all = forward_flops(model.config, b, read);
  const double in_frozen = (double)frozen / (double)model.config.num_hidden_layers * forward_flops(model.config, b);
  return 3 * (all + head) - 2 * std::min(all, in_frozen);
}

MemoryUse training_memory(const Bert& model, const TrainSettings& settings, int64_t tokens, int64_t masked) {
  const Config& c = model.config;
  const bool narrow = settings.products == Precision::bf16;
  const double H = (double)c.hidden_size, F = (double)c.intermediate_size, L = (double)c.num_hidden_layers,
               A = (double)c.num_attention_heads;
  const double N = (double)tokens, M = (double)masked, word = (double)model.word.size(), V = (double)c.vocab_size;
  const double parameters = (double)model.parameter_count(), in_layers = L * (4 * H * H + 2 * H * F);
  // Floats a token: of a layer its input, q, k and v, the mixed heads, two sums, their norm, and up before and after its activation.
  // Of the last layer those behind q, k and v are the masked tokens' alone ([CLS] is not counted).
  const double layer = (narrow ? 7.5 * H + F : 8 * H + 2 * F) + A + 4, ends = 4 * H + M / N * 4 * H;
  const double few = layer - 4 * H, left_out = settings.recompute ? 0 : (1 - M / N) * few;
  const double kept = settings.recompute ? H : layer, up = F * (narrow ? 2 : 1);
  const double backward = up + (narrow ? 5 : 3) * H + (settings.recompute ? layer : 0);
  const double earlier = (double)std::bit_width((uint64_t)settings.accumulate) - 1;  // gradients of micro-batches, whole ones
  // The loss: all that is kept, and some rows' logits, in bf16 with the vocabulary's weights in panels; or the gradients of up
  // and down in the layer before the last, in bf16 with two copies (the last layer's few rows leave no room that is large enough). The end:
  // all gradients.
  const double logits =
      std::max(std::min(M, 512.) * V * (narrow ? 1.5 : 1) + (narrow ? 2 * word : 0), settings.recompute ? 0 : N * (up + 2 * H));
  const double at_loss = N * (L * kept - left_out) + word + logits, at_end = parameters + N * backward;
  MemoryUse use;
  use.weights = 4 * parameters, use.moments = 8 * parameters;
  use.gradients = 4 * (earlier * parameters + (at_loss > at_end ? word : parameters));
  use.activations = 4 * N * ((at_loss > at_end ? L * kept - left_out : kept) + ends) + (narrow ? 2 * in_layers : 0);
  use.buffers = 4 * (at_loss > at_end ? logits : N * backward);
  if (settings.recompute)  // measured: half of the smaller finds room where the larger was
    use.buffers = 4 * (logits + N * backward - 0.5 * std::min(logits, N * backward) + M * few);
  use.buffers += 0.09 * use.total() + (20 << 20) + 512 * V;  // measured: what the pool cannot fill, the program, a vocabulary's tables
  return use;
}

// ---- what went wrong in a step, looked for once it has
// A row of the step's batches for people: where it is and how it begins.
static std::string row_name(std::span<const Batch> batches, size_t micro, int64_t row) {
  const Batch& b = batches[micro];
  const int64_t begin = b.offsets[(size_t)row], end = b.offsets[(size_t)row + 1];
  std::string ids;
  for (int64_t t = begin; t < std::min(end, begin + 12); t++) ids += " " + std::to_string(b.ids[(size_t)t]);
  return "row " + std::to_string(row) + " of micro-batch " + std::to_string(micro) + " (" + std::to_string(end - begin) + " tokens, ids" +
         ids + (end > begin + 12 ? " ...)" : ")");
}

// The largest size of n numbers; of some that are not finite the first.
static float largest(const float* x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n && std::isfinite(most); i++)
    if (!(std::fabs(x[i]) <= most)) most = std::fabs(x[i]);
  return most;
}

// The parameter of a layer (0: the embeddings, L + 1: the heads) that holds the largest number, and that number.
static std::string largest_weight(const Bert& model, int64_t layer) {
  float most = -1;
  std::string name;
  for (const Parameter& p : model.parameters()) {
    if (layer_of(p, model.config.num_hidden_layers) != layer) continue;
    const float top = largest(p.data(), p.shape().size());
    if (std::isfinite(most) && !(top <= most)) most = top, name = p.name;
  }
  return name + ", up to " + format_number(most);
}

// The largest size in a parameter's gradient.
static float largest_gradient(const Parameter& p) {
  return p.tensor.has_grad() ? largest(p.tensor.grad() + (p.data() - p.tensor.data()), p.shape().size()) : 0;
}

// The loss of each row's masked words, 0 for a row without.   [R,1]
// A row at a time: the scores of all would take more memory than the step did.
static Tensor row_losses(const Bert& model, const Tensor& hidden, const Batch& batch) {
  Tensor losses({batch.rows(), 1}, 0.f);
  for (int64_t r = 0, m = 0; r < batch.rows(); r++) {
    Batch own;
    for (; m < (int64_t)batch.masked.size() && batch.masked[(size_t)m] < batch.offsets[(size_t)r + 1]; m++)
      own.masked.push_back(batch.masked[(size_t)m]), own.masked_labels.push_back(batch.masked_labels[(size_t)m]);
    if (!own.masked.empty()) losses.data()[r] = model.masked_loss(hidden, own, 0, nullptr).item();
  }
  return losses;
}

// Where a step's numbers part from the finite: the forward is made again, layer by layer, with the same dropout.
static std::string not_finite(const Bert& model, std::span<const Batch> batches, const TrainSettings& settings, int64_t step) {
  const int64_t L = model.config.num_hidden_layers;
  Bert cut = model;
  for (size_t i = 0; i < batches.size(); i++)
    for (int64_t layer = 0; layer <= L + 1; layer++) {
      Dropout drop = step_dropout(model.config, settings, step, i);
      cut.layers.assign(model.layers.begin(), model.layers.begin() + std::min(layer, L));
      Tensor x = cut.forward(batches[i], drop, false, layer < L ? Tokens() : model.read_by_head(batches[i], settings.loss.pooling));
      if (layer > L) x = row_losses(model, x, batches[i]);
      const int64_t at = first_not_finite(x);  // a token, or of losses a row
      if (at < 0) continue;
      const Offsets& rows = batches[i].offsets;
      const int64_t row = layer > L ? at : std::upper_bound(rows.begin(), rows.end(), at) - rows.begin() - 1;
      const std::string what =
          layer > L ? "the scores of masked words" : "the output of " + (layer ? "layer " + std::to_string(layer) : "the embeddings");
      return "not finite: " + what + ", first in " + row_name(batches, i, row) +
             "; the largest weights there: " + largest_weight(model, layer);
    }
  for (const Parameter& p : model.parameters())
    if (!std::isfinite(largest_gradient(p))) return "not finite: the gradient of " + p.name;
  return "not finite: the loss";
}

// Where a loss that is too large comes from: the row that has the largest, and the parameter with the largest gradient.
static std::string largest_of(const Bert& model, std::span<const Batch> batches, const TrainSettings& settings, int64_t step) {
  double worst = -1;
  float most = -1;
  std::string text, name;
  for (size_t i = 0; i < batches.size(); i++) {
    const Batch& b = batches[i];
    Dropout drop = step_dropout(model.config, settings, step, i);
    const Tensor losses = row_losses(model, model.forward(b, drop, false, model.read_by_head(b, settings.loss.pooling)), b);
    const float* const most_here = std::max_element(losses.data(), losses.data() + b.rows());
    if (*most_here <= worst) continue;
    worst = *most_here;
    text = "largest, " + format_number(worst) + ", in " + row_name(batches, i, most_here - losses.data());
  }
  for (const Parameter& p : model.parameters())
    if (const float top = largest_gradient(p); top > most) most = top, name = p.name;
  return text + "; the largest gradient is of " + name;
}

// The gradient's norm is no sign: in runs that go well single steps have 9 times the mean's, and clipping deals with them.
constexpr int64_t kSpikeMemory = 100, kMostSkipped = 20;
bool Trainer::spike(const StepReport& r) const {
  const double over = r.loss.total - loss_mean_;
  return r.masked && optimizer_.updates >= kSpikeMemory && over > 0.5 * loss_mean_ && over > 6 * std::sqrt(loss_variance_);
}

StepReport Trainer::step(std::span<const Batch> micro_batches) {
  if (micro_batches.empty() || (int64_t)micro_batches.size() > settings_.accumulate)
    throw Error("Trainer::step: " + std::to_string(micro_batches.size()) + " micro-batches, of 1 to " +
                std::to_string(settings_.accumulate));
  DefaultFloatMode mode;
  std::vector<Tensor> parameters;
  for (const AdamW::Slot& s : optimizer_.slots()) parameters.push_back(s.parameter);
  for (Tensor& p : parameters) p.drop_grad();  // what a step that threw, or a backward of the caller, has left
  StepReport report;
  report.step = done_ + 1, report.steps = settings_.steps;
  const LossCounts counts = count_labels(micro_batches, model_.task, settings_.loss.classes);
  sum_gradients(parameters, 0, micro_batches.size(), [&](size_t i) {
    const Batch& batch = micro_batches[i];
    Dropout drop = step_dropout(model_.config, settings_, done_, i);
    Tape tape(settings_.products);
    const Tokens read = model_.read_by_head(batch, settings_.loss.pooling);
    const Tensor hidden = model_.forward(batch, drop, settings_.recompute, read);
    tape.backward(batch_loss(model_, hidden, batch, counts, drop, report.loss, settings_.loss));
    report.tokens += batch.tokens(), report.rows += batch.rows(), report.masked += (int64_t)batch.masked.size();
    report.flops += step_flops(model_, batch, read, settings_.freeze);
  });

  report.grad_norm = gradient_norm(parameters);
  const auto warmup = (int64_t)std::llround(settings_.warmup * (double)settings_.steps);
  report.lr = settings_.lr * schedule_factor(settings_.schedule, done_, warmup, settings_.steps);
  const bool is_finite = std::isfinite(report.grad_norm) && std::isfinite(report.loss.total);
  if (!is_finite)
    report.fault = not_finite(model_, micro_batches, settings_, done_);
  else if (spike(report))
    report.fault = "a spike: loss " + format_number(report.loss.total) + " after a mean of " + format_number(loss_mean_) + ", " +
                   largest_of(model_, micro_batches, settings_, done_);
  report.skipped = settings_.skip_spikes && !report.fault.empty();
  if ((!is_finite && !report.skipped) || (report.skipped && skipped_in_a_row_ + 1 == kMostSkipped)) {
    for (Tensor& p : parameters) p.drop_grad();
    throw Error("step " + std::to_string(done_ + 1) + ": " + report.fault +
                (report.skipped ? "; the " + std::to_string(kMostSkipped) + "th step in a row to be skipped" : "") +
                "; lower --lr, or lengthen --warmup");
  }
  skipped_in_a_row_ = report.skipped ? skipped_in_a_row_ + 1 : 0;
  if (!report.skipped) {
    optimizer_.step(report.lr, settings_.clip > 0 ? clip_factor(report.grad_norm, settings_.clip, settings_.optimizer.google) : 1);
    const double share = 1 / (double)std::min(optimizer_.updates, kSpikeMemory), loss = report.loss.total;
    if (optimizer_.updates > 1) loss_variance_ += share * (std::pow(loss - last_loss_, 2) / 2 - loss_variance_);
    loss_mean_ += share * (loss - loss_mean_), last_loss_ = loss;
  }
  for (Tensor& p : parameters) p.drop_grad();
  done_++;
  return report;
}

// The tensors of a training state: each parameter, and, where it is trained, its moments under the same name behind "m." and "v.".
static std::vector<NamedTensor> state_tensors(const Bert& model, const std::vector<AdamW::Slot>& slots) {
  std::vector<NamedTensor> all;
  for (const Parameter& p : model.parameters()) {
    const auto slot = std::find_if(slots.begin(), slots.end(), [&](const AdamW::Slot& s) { return s.parameter.same(p.tensor); });
    const int64_t from = p.data() - p.tensor.data();
    all.push_back({p.name, p.shape(), p.data()});
    if (slot == slots.end()) continue;  // frozen
    all.push_back({"m." + p.name, p.shape(), slot->m.data() + from});
    all.push_back({"v." + p.name, p.shape(), slot->v.data() + from});
  }
  return all;
}

constexpr const char* kStateVersion = "2";

void Trainer::save(const std::string& path, const std::map<std::string, std::string>& about) const {
  std::map<std::string, std::string> all = about;
  all["bert_state_version"] = kStateVersion;
  all["bert_steps_done"] = std::to_string(done_);
  all["bert_steps"] = std::to_string(settings_.steps);
  all["bert_updates"] = std::to_string(optimizer_.updates);
  all["bert_skipped_in_a_row"] = std::to_string(skipped_in_a_row_);
  all["bert_loss_mean"] = exact(loss_mean_), all["bert_loss_variance"] = exact(loss_variance_), all["bert_loss_last"] = exact(last_loss_);
  save_safetensors(path, state_tensors(model_, const_cast<AdamW&>(optimizer_).slots()), {all.begin(), all.end()});
}

std::map<std::string, std::string> Trainer::load(const std::string& path) {
  const SafeTensors file = SafeTensors::open(path);
  std::map<std::string, std::string> about(file.metadata().begin(), file.metadata().end());
  if (about["bert_state_version"] != kStateVersion)
    throw Error(path + ": not a training state of this version; start again without --resume");
  auto number = [&](const char* key, int64_t most) {
    const int64_t n = parse_number<int64_t>(about[key]).value_or(-1);
    if (n < 0 || n > most)
      throw Error(path + ": " + key + ": '" + about[key] + "' is not a number of steps from 0 to " + std::to_string(most));
    return n;
  };
  const int64_t steps = number("bert_steps", INT32_MAX), done = number("bert_steps_done", steps);
  const int64_t updates = number("bert_updates", done), skipped = number("bert_skipped_in_a_row", done - updates);
  auto real = [&](const char* key) {
    const double v = parse_number<double>(about[key]).value_or(NAN);
    if (!std::isfinite(v)) throw Error(path + ": " + key + ": '" + about[key] + "' is no number");
    return v;
  };
  const double mean = real("bert_loss_mean"), variance = real("bert_loss_variance"), last = real("bert_loss_last");
  const std::vector<NamedTensor> tensors = state_tensors(model_, optimizer_.slots());
  std::vector<Tensor> values;
  for (const NamedTensor& t : tensors) {  // everything is checked before anything is overwritten
    const SafeTensors::Entry* e = file.find(t.name);
    if (!e) throw Error(path + ": " + t.name + ": missing; the state belongs to another model");
    values.push_back(file.load(*e));
    if (!(values.back().shape() == t.shape))
      throw Error(path + ": " + t.name + ": shape " + to_string(values.back().shape()) + ", the model has " + to_string(t.shape));
  }
  for (size_t i = 0; i < tensors.size(); i++) std::copy_n(values[i].data(), values[i].size(), const_cast<float*>(tensors[i].data));
  done_ = done, optimizer_.updates = updates, settings_.steps = steps;
  skipped_in_a_row_ = skipped, loss_mean_ = mean, loss_variance_ = variance, last_loss_ = last;
  return about;
}

TrainingStates::TrainingStates(const std::string& folder, int64_t keep) : folder_(folder), keep_(keep) {}

std::string TrainingStates::name(int64_t i) const {
  return folder_ + "/training_state" + (i ? "-" + std::to_string(i) : "") + ".safetensors";
}

bool TrainingStates::any() const { return fs::exists(name(0)) || fs::exists(name(1)); }

void TrainingStates::save(const Trainer& trainer, const About& about) const {
  const std::string fresh = folder_ + "/training_state-new.safetensors";
  trainer.save(fresh, about);
  std::error_code code;  // an older state that is not there, or cannot be linked, is no failure
  for (int64_t i = keep_ - 1; i > 1; i--) fs::rename(name(i - 1), name(i), code);
  fs::remove(name(1), code);
  if (keep_ > 1) fs::create_hard_link(name(0), name(1), code);
  fs::rename(fresh, name(0));
}

// A resumed run must be the run that was begun.
void TrainingStates::check(const About& run, const About& stored, const std::function<void(const std::string&)>& say) const {
  auto get = [](const About& m, const std::string& key) { return m.count(key) ? m.at(key) : "none"; };
  auto same = [&](const std::string& key) { return get(run, key) == get(stored, key); };
  About all = run;  // the keys of both
  all.insert(stored.begin(), stored.end());
  Strings differ;
  for (const auto& [key, value] : all)
    if (key.starts_with("--") && !same(key)) differ.push_back(key + " (begun with " + get(stored, key) + ", now " + get(run, key) + ")");
  if (differ.empty() && !same("data")) differ = {"other data"};
  if (differ.empty() && !same("weights")) differ = {"another model or vocabulary to start from"};
  if (!differ.empty())
    throw Error(folder_ + ": --resume with what the run did not begin with: " + join(differ, ", ") +
                "; give the same, or begin anew in another folder");
  if (!same("backend"))
    say("the run began on " + get(stored, "backend") + ", here are " + get(run, "backend") + ": its last bits may come out otherwise");
}

TrainingStates::About TrainingStates::load(Trainer& trainer, const About& run, const std::function<void(const std::string&)>& say) const {
  std::string remark;
  for (int64_t i = 0; i < 2; i++) {
    if (!fs::exists(name(i))) continue;
    About about;
    try {
      const SafeTensors state = SafeTensors::open(name(i));
      about.insert(state.metadata().begin(), state.metadata().end());
    } catch (const Error& e) {
      if (i || !fs::exists(name(1))) throw;
      remark = e.what() + ("; going on from " + name(1));
      continue;
    }
    check(run, about, say);
    About loaded = trainer.load(name(i));
    if (!remark.empty()) say(remark);
    return loaded;
  }
  return {};
}

void TrainingStates::remove_all() const {
  std::error_code code;
  for (int64_t i = 0; i < 100; i++) fs::remove(name(i), code);
}

// ==== pretraining data ============================================================================================
// Whether a full stop at line[at] only shortens the word before it: Mr. Mrs. Ms. Dr. St., and initials.
static bool abbreviates(std::string_view line, size_t at) {
  size_t begin = at;
  while (begin && (std::isalpha((unsigned char)line[begin - 1]) || (line[begin - 1] & 0x80))) begin--;
  const std::string_view word = line.substr(begin, at - begin);
  for (const char* known : {"Mr", "Mrs", "Ms", "Dr", "St"})
    if (line[at] == '.' && word == known) return true;
  return line[at] == '.' && word.size() == 1 && word[0] <= 'Z';
}

std::vector<std::string_view> split_sentences(std::string_view line) {
  auto one_of = [&](size_t i, std::initializer_list<std::string_view> list) -> size_t {
    for (std::string_view s : list)
      if (line.substr(i, s.size()) == s) return s.size();
    return 0;
  };
  auto stop = [&](size_t i) { return one_of(i, {".", "!", "?"}); };
  auto wide_stop = [&](size_t i) { return one_of(i, {"。", "！", "？"}); };
  auto closer = [&](size_t i) { return one_of(i, {"\"", "'", ")", "]", "}", "”", "’", "»", "」", "』", "）"}); };
  std::vector<std::string_view> sentences;
  size_t begin = 0;
  for (size_t i = 0; i < line.size();) {
    const size_t first = i;
    const bool wide = wide_stop(i) > 0;
    if (!wide && !stop(i)) {
      i++;
      continue;
    }
    for (size_t n; i < line.size() && ((n = stop(i)) || (n = wide_stop(i)) || (n = closer(i)));) i += n;
    if (!wide && i < line.size() && line[i] != ' ' && line[i] != '\t') continue;  // 3.14, example.org
    if (i == first + 1 && abbreviates(line, first)) continue;
    sentences.push_back(line.substr(begin, i - begin));
    begin = i;
  }
  if (begin < line.size()) sentences.push_back(line.substr(begin));
  return sentences;
}

void Corpus::end_sentence() {
  if ((int64_t)ids.size() > sentences.back()) sentences.push_back((int64_t)ids.size());
}
void Corpus::end_document() {
  const auto all = (int64_t)sentences.size() - 1;
  if (all > documents.back()) documents.push_back(all);
}
void Corpus::add_sentences(std::span<const int64_t> bounds, const int32_t* from) {
  const int64_t shift = (int64_t)ids.size() - bounds.front();
  ids.insert(ids.end(), from + bounds.front(), from + bounds.back());
  for (const int64_t end : bounds.subspan(1)) sentences.push_back(end + shift);
}

// ---- shards
static constexpr int64_t kBlock = 1 << 15, kWindow = 1 << 20, kMostHeldOut = 100000;  // tokens

template <class T>
static std::string_view bytes_of(std::span<const T> list) {
  return {reinterpret_cast<const char*>(list.data()), list.size_bytes()};
}
static uint64_t fingerprint_of(std::span<const int64_t> documents, std::span<const int64_t> sentences, std::span<const int32_t> ids) {
  Fingerprint f;
  f.bytes(bytes_of(documents)), f.bytes(bytes_of(sentences)), f.bytes(bytes_of(ids));
  return f.state;
}
// From 0 up, each more than the one before, to `last`.
static bool ascends(std::span<const int64_t> bounds, int64_t last) {
  return bounds.front() == 0 && bounds.back() == last &&
         std::adjacent_find(bounds.begin(), bounds.end(), std::greater_equal<>()) == bounds.end();
}

Shards::Shards(std::string folder, std::optional<uint64_t> key, int64_t pieces)
    : folder_(std::move(folder)), key_(key), counts_((size_t)pieces) {
  while (!whole() && open_next()) continue;
}

std::string Shards::name(int64_t number) const {
  const std::string digits = std::to_string(number);
  return folder_ + "/" + std::string(5 - std::min<size_t>(5, digits.size()), '0') + digits + ".ids";
}

// Maps a shard; nothing where there is none, or one of another version. What it says of itself is checked, not yet what it holds.
std::optional<Shards::View> Shards::open(int64_t number, Header& h) const {
  static_assert(sizeof(Header) == 96);
  const std::string path = name(number);
  const Header ours;
  if (!exists(path)) return {};
  const Mapped file = map_file(path);
  auto damaged = [&] { return Error(path + ": not a whole shard of ids, or damaged; remove it, and it is made again"); };
  if (file.bytes.size() < sizeof h || std::memcmp(file.bytes.data(), ours.magic, sizeof ours.magic)) throw damaged();
  std::memcpy(&h, file.bytes.data(), sizeof h);
  if (h.version != ours.version) return {};  // its header may be another
  Fingerprint header;
  header.bytes(file.bytes.substr(0, offsetof(Header, header)));
  uint64_t words = 0;  // what follows the header, in halves of int64
  for (const int64_t n : {h.documents, h.documents, h.sentences, h.sentences, h.tokens})
    words += std::min<uint64_t>((uint64_t)n, 1ull << 48);
  if (header.state != h.header || file.bytes.size() != sizeof h + (words + 4) * 4) throw damaged();
  const auto* const lists = reinterpret_cast<const int64_t*>(file.bytes.data() + sizeof h);
  const std::span documents(lists, (size_t)h.documents + 1), sentences(lists + h.documents + 1, (size_t)h.sentences + 1);
  return View{documents, sentences, reinterpret_cast<const int32_t*>(sentences.data() + sentences.size()), file.owner};
}

// Reads the next shard once, to see that it holds what was written, to count its pieces and to lay out its blocks.
bool Shards::open_next() {
  const auto number = (int64_t)shards_.size();
  Header h;
  const std::optional<View> shard = open(number, h);
  if (!shard || h.key != key_ || h.number != number) return stale_ |= exists(name(number)), false;
  const auto& [documents, sentences, ids, owner] = *shard;
  const std::span all(ids, (size_t)h.tokens);
  const bool sound = h.data == fingerprint_of(documents, sentences, all) && ascends(documents, h.sentences) &&
                     ascends(sentences, h.tokens) &&
                     std::all_of(all.begin(), all.end(), [&](int32_t id) { return (uint32_t)id < counts_.size(); });
  if (!sound) throw Error(name(number) + ": damaged: not what was written; remove it, and it is made again");
  for (const int32_t id : all) counts_[(size_t)id]++;
  const bool goes_on = number && h.documents && shards_.back().header.open;  // its first document began in the shard before
  shards_.push_back({h, size_.documents - goes_on, size_.sentences});
  tokens_ += h.tokens, size_.tokens += h.tokens, size_.sentences += h.sentences, size_.documents += h.documents - goes_on;
  // A block ends with a document, or inside of one that would make it twice as long.
  Block block{number, 0, 0, 0};
  for (int64_t d = 0; d < h.documents; d++)
    for (int64_t s = documents[(size_t)d]; s < documents[(size_t)d + 1]; s++) {
      block.tokens += sentences[(size_t)s + 1] - sentences[(size_t)s], block.end = s + 1;
      if (block.end != h.sentences && block.tokens < (block.end == documents[(size_t)d + 1] ? kBlock : 2 * kBlock)) continue;
      blocks_.push_back(block), block = {number, block.end, block.end, 0};
    }
  return true;
}

void Shards::add(const Corpus& text, int64_t rows, bool last) {
  std::error_code ignored;
  fs::create_directories(folder_, ignored);  // or the lock says that it cannot be written
  if (!lock_) lock_ = std::make_shared<FolderLock>(folder_);
  const auto number = (int64_t)shards_.size();
  const TextSize size = text.size();
  std::vector<int64_t> documents = text.documents;
  if (documents.back() < size.sentences) documents.push_back(size.sentences);
  Header h{.key = key_.value_or(0),
           .data = fingerprint_of(documents, text.sentences, text.ids),
           .number = number,
           .rows = rows,
           .tokens = size.tokens,
           .sentences = size.sentences,
           .documents = (int64_t)documents.size() - 1,
           .open = documents.size() > text.documents.size(),
           .last = last};
  Fingerprint header;
  header.bytes({reinterpret_cast<const char*>(&h), offsetof(Header, header)});
  h.header = header.state;
  AtomicFile file(name(number));
  file.write({reinterpret_cast<const char*>(&h), sizeof h});
  file.write(bytes_of<int64_t>(documents)), file.write(bytes_of<int64_t>(text.sentences)), file.write(bytes_of<int32_t>(text.ids));
  file.commit();
  key_ = h.key;  // without a key those that stood here did not fit; our own do
  if (!open_next()) throw Error(name(number) + ": changed since it was written; is another run making shards here?");
  if (!last) return;
  lock_.reset();
  for (int64_t more = number + 1; fs::remove(name(more), ignored); more++) continue;  // of a longer text that stood here
}

Shards::View Shards::view(int64_t shard) const {
  Header now;
  std::optional<View> found = open(shard, now);
  if (!found || now.header != shards_[(size_t)shard].header.header)
    throw Error(name(shard) + ": gone, or another than when the run began; begin again, with a folder of shards for each text");
  return *found;
}

// The block's sentences behind `to`, without what is held out.
void Shards::append(const Block& block, const View& shard, Corpus& to) const {
  const Shard& at = shards_[(size_t)block.shard];
  auto held = std::lower_bound(held_.begin(), held_.end(), at.first_sentence + block.begin,
                               [](const Stretch& stretch, int64_t sentence) { return stretch.end <= sentence; });
  auto d = std::upper_bound(shard.documents.begin(), shard.documents.end(), block.begin) - 1;
  for (int64_t s = block.begin; s < block.end; s++) {
    const int64_t number = at.first_sentence + s;
    if (held != held_.end() && held->end <= number) held++;
    if (held == held_.end() || number < held->begin) to.add_sentences(shard.sentences.subspan((size_t)s, 2), shard.ids);
    if (s + 1 < std::min(d[1], block.end)) continue;
    if (to.documents.back() < to.size().sentences)
      to.end_document(), to.sources.push_back(at.first_document + (d - shard.documents.begin()));
    d++;
  }
}

// What a block can give away as held-out text: its whole documents, or with a length its documents cut into stretches.
std::vector<Shards::Stretch> Shards::units(const Block& block, int64_t stretch) const {
  const View shard = view(block.shard);
  const Shard& at = shards_[(size_t)block.shard];
  std::vector<Stretch> units;
  for (size_t d = 0; d + 1 < shard.documents.size(); d++) {
    const bool began_before = !d && block.shard && shards_[(size_t)block.shard - 1].header.open;
    const bool cut = began_before || (d + 2 == shard.documents.size() && at.header.open);
    int64_t s = std::max(shard.documents[d], block.begin), end = std::min(shard.documents[d + 1], block.end);
    if (!stretch && (cut || s != shard.documents[d] || end != shard.documents[d + 1])) continue;
    for (int64_t next; s < end; s = next) {
      next = stretch ? std::min(s + stretch, end) : end;
      units.push_back({at.first_sentence + s, at.first_sentence + next, shard.sentences[(size_t)next] - shard.sentences[(size_t)s]});
    }
  }
  return units;
}

// Chooses what is held out, of blocks in this order: whole documents, or stretches. Returns its tokens.
int64_t Shards::choose(const std::vector<int64_t>& order, int64_t stretch, int64_t want, int64_t most, Random& random) {
  held_.clear();
  const int64_t from_each = want / std::max<int64_t>(1, std::min<int64_t>(64, (int64_t)order.size()));  // from many places
  int64_t got = 0;
  auto enough = [&] { return got + got / 19 >= want && held_.size() >= 2; };  // 95 %: not the few words that just fit, from all over
  for (size_t b = 0; b < order.size() && !enough(); b++) {
    std::vector<Stretch> list = units(blocks_[(size_t)order[b]], stretch);
    random.shuffle(list);
    const int64_t stop = b + 1 == order.size() ? want : got + from_each;
    for (size_t i = 0; i < list.size() && !enough() && (got < stop || held_.size() < 2); i++) {
      const auto held = (int64_t)held_.size();
      if (stretch ? order.size() == 1 && held + 1 == (int64_t)list.size() : held + 2 >= size_.documents) continue;  // some text stays
      if (got + list[i].tokens > most && (!stretch || held >= 2)) continue;
      held_.push_back(list[i]), got += list[i].tokens;
    }
  }
  return got;
}

Corpus Shards::hold_out(double share, uint64_t seed) {
  const auto want = std::min(kMostHeldOut, (int64_t)((double)size_.tokens * share));
  const int64_t most = std::max(want, std::min(kMostHeldOut, size_.tokens / 20));  // two documents may be more than their share
  std::vector<int64_t> order = count_up(blocks_.size());
  Random random({seed, 0, 0, kSplitStream});
  random.shuffle(order);
  in_stretches_ = choose(order, 0, want, most, random) < want / 2 || held_.size() < 2;
  if (in_stretches_)
    choose(order, std::clamp<int64_t>((int64_t)((double)size_.sentences * share / 8), 2, 50), want, most, random);
  else
    size_.documents -= (int64_t)held_.size();
  std::sort(held_.begin(), held_.end(), [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
  Corpus dev;
  for (const Stretch& s : held_) {
    const auto at =
        std::upper_bound(shards_.begin(), shards_.end(), s.begin, [](int64_t b, const Shard& x) { return b < x.first_sentence; }) - 1;
    const View shard = view(at - shards_.begin());
    dev.add_sentences(shard.sentences.subspan((size_t)(s.begin - at->first_sentence), (size_t)(s.end - s.begin) + 1), shard.ids);
    dev.end_document();
  }
  for (const int32_t id : dev.ids) counts_[(size_t)id]--;
  size_.tokens -= dev.size().tokens, size_.sentences -= dev.size().sentences;
  return dev;
}

int64_t Shards::windows() const { return std::max<int64_t>(1, (tokens_ + kWindow - 1) / kWindow); }

Corpus Shards::window(int64_t number, const PhiloxKey& key) const {
  std::vector<int64_t> order = count_up(blocks_.size()), mine;
  Random(key).shuffle(order);
  int64_t before = 0, size = 0;  // tokens
  for (const int64_t i : order) {
    const int64_t tokens = blocks_[(size_t)i].tokens;
    if (before * windows() / tokens_ == number) mine.push_back(i), size += tokens;
    before += tokens;
  }
  std::sort(mine.begin(), mine.end());  // each shard is mapped once; rows are shuffled later
  Corpus text;
  text.ids.reserve((size_t)size);
  int64_t mapped = -1;
  View shard;
  for (const int64_t i : mine) {
    const Block& block = blocks_[(size_t)i];
    if (block.shard != mapped) shard = view(mapped = block.shard);
    append(block, shard, text);
  }
  return text;
}

uint64_t Shards::fingerprint() const {
  Fingerprint all;
  for (const Shard& shard : shards_) all.number(shard.header.data);
  return all.state;
}

// ---- rows
PretrainSampler::PretrainSampler(const Corpus* corpus, const Shards* shards, const PretrainSettings& settings,
                                 const MaskVocabulary& vocabulary, uint64_t seed)
    : corpus_(corpus), shards_(shards), settings_(settings), vocabulary_(vocabulary), seed_(seed) {
  if (settings.max_length < 5) throw Error("max-length " + std::to_string(settings.max_length) + ": a pretraining row needs at least 5");
  const TextSize size = corpus ? corpus->size() : shards->size();
  if (!size.documents) throw Error("pretraining text: no token in it");
  plan_window();
  if (settings.next_sentence && std::min(size.documents, text().size().documents) < 2)  // parts of one document are none
    throw Error(
        "pretraining text: next-sentence pairs need at least two documents (a blank line between them), there is one; or pass --no-nsp");
}
PretrainSampler::PretrainSampler(const Corpus& text, const PretrainSettings& settings, const MaskVocabulary& vocabulary, uint64_t seed)
    : PretrainSampler(&text, nullptr, settings, vocabulary, seed) {}
PretrainSampler::PretrainSampler(const Shards& text, const PretrainSettings& settings, const MaskVocabulary& vocabulary, uint64_t seed)
    : PretrainSampler(nullptr, &text, settings, vocabulary, seed) {}

// Rows as create_pretraining_data.py makes them: sentences of the document are gathered until a target length is reached; A is the
// first of them; B is the rest, or, half of the time, a part of another document, and then the unused sentences are put back.
void PretrainSampler::plan_pairs(int64_t d, Random& random) {
  const auto& [ids, sentences, documents, sources] = text();
  const int64_t D = text().size().documents, most = settings_.max_length - 3;
  const int64_t target = random.uniform() < 0.1 ? 2 + random.below(most - 1) : most;
  const int64_t end = documents[(size_t)d + 1];
  for (int64_t first = documents[(size_t)d], s = first; s < end; s++) {
    if (s + 1 < end && sentences[(size_t)s + 1] - sentences[(size_t)first] < target) continue;  // gather on
    const int64_t count = s + 1 - first, a_sentences = count > 1 ? 1 + random.below(count - 1) : count;
    Example e{sentences[(size_t)first], sentences[(size_t)(first + a_sentences)], 0, 0, count == 1 || random.uniform() < 0.5};
    if (e.random) {
      int64_t other = d;  // any document but this one, also no other part of it as long as one is found
      for (int tries = 0; other == d || (!sources.empty() && sources[(size_t)other] == sources[(size_t)d] && tries < 100); tries++)
        other = (d + 1 + random.below(D - 1)) % D;
      const int64_t from = documents[(size_t)other] + random.below(documents[(size_t)other + 1] - documents[(size_t)other]);
      int64_t to = from;
      do to++;
      while (to < documents[(size_t)other + 1] && sentences[(size_t)to] - sentences[(size_t)from] < target - (e.a_end - e.a_begin));
      e.b_begin = sentences[(size_t)from], e.b_end = sentences[(size_t)to];
      s = first + a_sentences - 1;  // the rest is put back
    } else {
      e.b_begin = e.a_end, e.b_end = sentences[(size_t)s + 1];
    }
    while (e.a_end - e.a_begin + e.b_end - e.b_begin > most) {  // truncate_seq_pair there: the longer side loses a token
      const bool longer_a = e.a_end - e.a_begin > e.b_end - e.b_begin, front = random.uniform() < 0.5;
      front ? (longer_a ? e.a_begin : e.b_begin)++ : (longer_a ? e.a_end : e.b_end)--;
    }
    examples_.push_back(e);
    first = s + 1;
  }
}

void PretrainSampler::plan_spans(int64_t d) {
  const auto& [ids, sentences, documents, sources] = text();
  const auto last = sentences.begin() + documents[(size_t)d + 1];
  auto whole = sentences.begin() + documents[(size_t)d];
  for (int64_t begin = *whole, end; begin < *last; begin = end) {
    whole = std::upper_bound(whole, last + 1, begin + settings_.max_length - 2) - 1;  // the last end of a sentence that fits
    end = *whole > begin ? *whole : begin + settings_.max_length - 2;
    examples_.push_back({begin, end, 0, 0, false});
  }
}

// One window: every document once.
void PretrainSampler::plan_window() {
  const auto epoch = (uint32_t)place_.epoch, window = (uint32_t)place_.window;
  if (shards_) window_ = Corpus(), window_ = shards_->window(place_.window, {seed_, epoch, 0, kOrderStream});
  Random random({seed_, epoch, window, kOrderStream + 1});
  examples_.clear(), batches_.clear();
  const int64_t documents = text().size().documents;
  if (settings_.next_sentence && documents < 2) return;  // nothing to pair with
  auto length = [&](const Example& e) { return e.a_end - e.a_begin + e.b_end - e.b_begin + (settings_.next_sentence ? 3 : 2); };
  for (int64_t d = 0; d < documents; d++) settings_.next_sentence ? plan_pairs(d, random) : plan_spans(d);
  // Similar lengths come together among the rows of some 64 batches; the last of these is not full and waits for the next 64. Then the
  // batches are shuffled.
  random.shuffle(examples_);
  std::vector<int64_t> rows;
  for (size_t i = 0; i < examples_.size();) {
    for (int64_t tokens = 0; i < examples_.size() && tokens < 64 * settings_.batch_tokens; i++)
      rows.push_back((int64_t)i), tokens += length(examples_[i]);
    std::vector<int64_t> lengths;
    for (const int64_t row : rows) lengths.push_back(length(examples_[(size_t)row]));
    auto made = batches_by_tokens(lengths, settings_.batch_tokens);
    for (auto& batch : made)
      for (int64_t& row : batch) row = rows[(size_t)row];
    rows.clear();
    if (i < examples_.size() && made.size() > 1) rows = std::move(made.back()), made.pop_back();
    std::move(made.begin(), made.end(), std::back_inserter(batches_));
  }
  random.shuffle(batches_);
}

void PretrainSampler::next_window() {
  const bool last = place_.window + 1 >= (shards_ ? shards_->windows() : 1);
  place_ = {place_.epoch + last, last ? 0 : place_.window + 1};
  plan_window();
}

void PretrainSampler::set_max_length(int64_t max_length) {
  if (max_length != std::exchange(settings_.max_length, max_length)) place_.batch ? next_window() : plan_window();
}

void PretrainSampler::go_to(Place place) {
  const int64_t windows = shards_ ? shards_->windows() : 1, length = place.max_length ? place.max_length : settings_.max_length;
  if (place.epoch < 0 || place.epoch > UINT32_MAX || place.window < 0 || place.window >= windows || length < 5)
    throw Error("pretraining: there is no window " + std::to_string(place.window) + " in epoch " + std::to_string(place.epoch) +
                ", which has " + std::to_string(windows));
  settings_.max_length = length;
  place_ = {place.epoch, place.window};
  plan_window();
  if (place.batch < 0 || place.batch > window_batches())
    throw Error("pretraining: there is no batch " + std::to_string(place.batch) + " in epoch " + std::to_string(place.epoch) + ", window " +
                std::to_string(place.window) + ", which has " + std::to_string(window_batches()));
  place_.batch = place.batch;
}

MaskVocabulary mask_vocabulary(const WordPiece& tokenizer) {
  MaskVocabulary v{tokenizer.cls, tokenizer.sep, tokenizer.mask, std::vector<uint8_t>((size_t)tokenizer.size())};
  for (size_t id = 0; id < v.continues.size(); id++) v.continues[id] = tokenizer.continuation((int32_t)id);
  return v;
}

// The candidates of a row, each a word's pieces or one token, as its first token and the one after its last: all but [CLS] and [SEP].
static std::vector<std::pair<int64_t, int64_t>> mask_candidates(const Batch& batch, int64_t begin, int64_t end,
                                                                const MaskVocabulary& vocabulary, bool whole_word) {
  std::vector<std::pair<int64_t, int64_t>> words;
  bool inside = false;  // whether a continuation piece would continue the last word
  for (int64_t t = begin; t < end; t++) {
    const int32_t id = batch.ids[(size_t)t];
    const bool added = id == vocabulary.cls || id == vocabulary.sep;
    if (!added && whole_word && inside && vocabulary.continues[(size_t)id])
      words.back().second = t + 1;
    else if (!added)
      words.emplace_back(t, t + 1);
    inside = !added;
  }
  return words;
}

void mask_tokens(Batch& batch, const MaskVocabulary& vocabulary, double share, bool whole_word, const PhiloxKey& key) {
  for (int64_t r = 0; r < batch.rows(); r++) {
    const int64_t begin = batch.offsets[(size_t)r], end = batch.offsets[(size_t)r + 1];
    Random random({key.seed, key.step, key.micro, key.op + (uint32_t)r});
    auto words = mask_candidates(batch, begin, end, vocabulary, whole_word);
    random.shuffle(words);
    // nearbyint, as Python rounds: halves to even. The length counts [CLS] and [SEP].
    const int64_t count = std::max<int64_t>(1, (int64_t)std::nearbyint((double)(end - begin) * share));
    std::vector<int64_t> chosen;
    for (const auto& [first, after] : words)  // a word that does not fit is passed over, later ones are tried
      if ((int64_t)chosen.size() + after - first <= count)
        for (int64_t t = first; t < after; t++) chosen.push_back(t);
    std::sort(chosen.begin(), chosen.end());
    for (const int64_t t : chosen) {
      int32_t& id = batch.ids[(size_t)t];
      batch.masked.push_back(t), batch.masked_labels.push_back(id);
      const double u = random.uniform();
      if (u < 0.8)
        id = vocabulary.mask;
      else if (u < 0.9)
        id = (int32_t)random.below((int64_t)vocabulary.continues.size());
    }
  }
  Profile::lap("mask_tokens");
}

Batch PretrainSampler::next(int64_t step, int64_t micro) {
  while (place_.batch >= window_batches()) next_window();
  Batch batch;
  std::vector<int32_t> ids, segments;
  auto add = [&, from = text().ids.begin()](int64_t begin, int64_t end) {
    ids.insert(ids.end(), from + begin, from + end), ids.push_back(vocabulary_.sep);
  };
  for (const int64_t i : batches_[(size_t)place_.batch++]) {
    const Example& e = examples_[(size_t)i];
    ids.assign(1, vocabulary_.cls);
    add(e.a_begin, e.a_end);
    segments.assign(ids.size(), 0);
    if (settings_.next_sentence) add(e.b_begin, e.b_end), segments.resize(ids.size(), 1);
    batch.add_row(ids, segments);
    if (settings_.next_sentence) batch.labels.push_back(e.random);
  }
  mask_tokens(batch, vocabulary_, settings_.mask, settings_.whole_word, {seed_, (uint32_t)step, (uint32_t)micro, kMaskStream});
  return batch;
}

int64_t max_length_at(std::span<const Phase> phases, int64_t step, int64_t steps) {
  double until = 0;
  for (const Phase& phase : phases)
    if (until += phase.share; step < std::llround(until * (double)steps)) return phase.max_length;
  return phases.back().max_length;
}

StepBatches::StepBatches(PretrainSampler sampler, const std::vector<Phase>& phases, int64_t accumulate, int64_t first, int64_t steps)
    : sampler_(std::move(sampler)), phases_(phases), accumulate_(accumulate), step_(first), steps_(steps) {
  begin();
}
void StepBatches::begin() {
  if (step_ >= steps_) return;
  ahead_ = std::async(std::launch::async, [this, step = step_++] {
    Profile::lap();  // this thread's time begins here
    Step made;
    sampler_.set_max_length(max_length_at(phases_, step, steps_));
    for (int64_t i = 0; i < accumulate_; i++) made.micro.push_back(sampler_.next(step, i));
    made.after = sampler_.place();
    return made;
  });
}
StepBatches::Step StepBatches::next() {
  if (!ahead_.valid()) throw Error("pretraining: there is no step " + std::to_string(step_ + 1) + " of " + std::to_string(steps_));
  Step made = ahead_.get();
  begin();
  return made;
}

PretrainScores evaluate_pretraining(const Bert& model, const Corpus& heldout, const PretrainSettings& settings,
                                    const MaskVocabulary& vocabulary, uint64_t seed, const std::vector<int64_t>& unigram) {
  PretrainSettings used = settings;
  used.batch_tokens = 2048;  // not the training's: scores of two runs on one text are to be of the same pairs and masks
  used.next_sentence = settings.next_sentence && head_kind(model.task).next_sentence && heldout.size().documents > 1;
  PretrainSampler sampler(heldout, used, vocabulary, seed);
  const double seen = std::accumulate(unigram.begin(), unigram.end(), (double)unigram.size());
  PretrainScores s;
  Losses sums;
  Dropout none;
  const int64_t batches = sampler.window_batches();
  for (int64_t b = 0; b < batches; b++) {
    const Batch batch = sampler.next(b, 0);
    const Tensor hidden = model.forward(batch, model.read_by_head(batch));
    sums.masked += cross_entropy(finite(model.masked_logits(hidden, batch.masked)), batch.masked_labels, 1, &sums.masked_right).item();
    if (used.next_sentence)
      sums.next_sentence += cross_entropy(finite(model.logits(hidden, batch, none)), batch.labels, 1, &sums.next_right).item();
    s.masked += (int64_t)batch.masked.size(), s.rows += batch.rows();
    if (!unigram.empty())
      for (const int32_t label : batch.masked_labels) s.unigram_loss -= std::log(((double)unigram[(size_t)label] + 1) / seen);
  }
  const double masked = std::max(1.0, (double)s.masked);  // none where every word is longer than its row's share of masks
  s.masked_loss = sums.masked / masked, s.masked_accuracy = (double)sums.masked_right / masked, s.unigram_loss /= masked;
  if (!used.next_sentence) return s;
  s.pairs = s.rows, s.next_loss = sums.next_sentence / (double)s.pairs, s.next_accuracy = (double)sums.next_right / (double)s.pairs;
  return s;
}

// ==== fine-tuning =================================================================================================
static Batch make_batch(std::span<const Example> examples, std::span<const int64_t> which) {
  Batch batch;
  for (const int64_t i : which) {
    const Example& e = examples[(size_t)i];
    batch.add_row(e.ids, e.segments);
    for (const Example& other : e.others) batch.add_row(other.ids, other.segments);
    if (!e.others.empty()) batch.groups.push_back(batch.rows());
    if (e.targets.empty() && e.labels.empty() && (e.label != kIgnored || e.others.empty())) batch.labels.push_back(e.label);
    batch.labels.insert(batch.labels.end(), e.labels.begin(), e.labels.end());
    batch.targets.insert(batch.targets.end(), e.targets.begin(), e.targets.end());
  }
  return batch;
}

void Labels::set(const Strings& list) {
  names = list, ids.clear();
  for (size_t i = 0; i < list.size(); i++) ids.emplace(list[i], (int32_t)i);
}

void Labels::learn(std::span<const Strings> of_items, const Strings& of_model) {
  std::set<std::string> seen;
  for (const Strings& own : of_items) seen.insert(own.begin(), own.end());
  if (seen == std::set<std::string>(of_model.begin(), of_model.end())) return set(of_model);
  Strings ordered(seen.begin(), seen.end());
  auto number = [](const std::string& s) { return parse_number<int64_t>(s); };
  if (std::all_of(ordered.begin(), ordered.end(), [&](const auto& s) { return number(s).has_value(); }))
    std::stable_sort(ordered.begin(), ordered.end(), [&](const auto& x, const auto& y) { return *number(x) < *number(y); });
  set(ordered);
}

void Labels::put_in(Gold& gold, std::span<const std::string> own) const {
  if (task == Task::classify) gold.label = ids.at(own[0]);
  if (task == Task::multilabel) gold.targets.assign(names.size(), 0);
  for (const std::string& name : own) {
    if (task == Task::multilabel) gold.targets[(size_t)ids.at(name)] = 1;
    if (task == Task::tag) gold.tags.push_back(ids.at(name));
  }
}

std::string Labels::some() const {
  const auto all = std::span(names);
  return all.size() > 8 ? join(all.first(8), ", ") + ", …" : join(all, ", ");
}

// Tags of entities, of IOB1, IOB2, BIOES or BILOU: O, or one of their prefixes and a type.
static bool has_prefix(std::string_view tag) {
  return !tag.empty() && std::string_view("BIESLU").find(tag[0]) != tag.npos && (tag.size() == 1 || tag[1] == '-');
}
static bool entity_tag(std::string_view tag) { return tag == "O" || (tag.size() > 2 && has_prefix(tag)); }

// The names of labels that an item may have.
static void check_names(const Item& item, const Labels& labels, bool known, const Strings& names) {
  const bool tags = labels.task == Task::tag;
  if (labels.task == Task::classify && names.size() != 1)
    throw Error(names.empty() ? "an empty label" : "several labels; for these there is --task multilabel");
  if (tags && names.size() != item.words.size())
    throw Error("words: " + std::to_string(item.words.size()) + ", tags: " + std::to_string(names.size()) + "; one a word is wanted");
  const bool typed = std::any_of(names.begin(), names.end(), [](const auto& n) { return n.size() > 1 && entity_tag(n); });
  for (size_t i = 0; i < names.size(); i++) {
    const std::string& name = names[i];
    const std::string where = tags ? "word " + std::to_string(i + 1) + " (" + item.words[i] + "): " : "";
    if (name.empty() || name.find_first_of("\t\r\n") != name.npos)
      throw Error(where + "a label that is empty, or holds a TAB or an end of line; results are lines of columns");
    if (tags && typed && !entity_tag(name))
      throw Error(where + "tag '" + name + "' beside tags like B-PER: it is neither O nor B-, I-, E- or S- and a type; correct it");
    if (labels.task == Task::multilabel && name.find('|') != name.npos)
      throw Error("a label that holds |, which stands between the labels of a text in results; rename it");
    if (known && !labels.ids.count(name))
      throw Error(where + "label '" + name + "', which training never saw (it knows " + labels.some() + "); correct it");
  }
}

// The one answer as a number.
template <class T>
static std::optional<T> told_number(const Told& told) {
  return told.answers.size() == 1 ? parse_number<T>(told.answers[0]) : std::nullopt;
}

Gold make_gold(const Item& item, const Told& told, const Labels& labels, bool known, Strings& names) {
  Gold gold;
  names.clear();
  const bool partner = labels.task == Task::embed && (item.pair || !item.others.empty());  // it says by itself what is alike
  if (told.answers.empty() && !told.listed && !partner) throw Error("no label");
  if (labels.task == Task::qa) {
    if (!item.pair) throw Error("a question without a context");
    gold.answers = told.answers, gold.starts = told.starts;
  } else if (labels.task == Task::choice) {
    const auto right = told_number<int32_t>(told);
    if (item.others.size() < 2) throw Error("fewer than two choices");
    if (!right || *right < 0 || *right >= (int32_t)item.others.size())
      throw Error("'" + join(told.answers, "|") + "' is no choice's number, from 0 to " + std::to_string(item.others.size() - 1));
    gold.label = *right;
  } else if (labels.task == Task::regress || labels.task == Task::embed) {
    if (told.answers.empty()) return gold;
    const auto value = told_number<float>(told);
    if (!value || !std::isfinite(*value)) throw Error("'" + join(told.answers, "|") + "' is no number, which this task wants");
    if (labels.task == Task::embed && !item.pair) throw Error("one text with a score; two are compared");
    gold.targets = {*value};
  } else {
    names = told.answers;
    if (labels.task == Task::multilabel && !told.listed) names = split(told.answers[0], '|');
    if (labels.task != Task::tag) std::erase(names, "");
    check_names(item, labels, known, names);
  }
  return gold;
}

std::vector<double> label_counts(std::span<const Gold> golds, size_t classes) {
  std::vector<double> counts(classes);
  for (const Gold& g : golds) {
    if (g.label != kIgnored) counts[(size_t)g.label]++;
    for (size_t c = 0; c < g.targets.size(); c++) counts[c] += (double)g.targets[c];
    for (const int32_t tag : g.tags) counts[(size_t)tag]++;
  }
  return counts;
}

std::vector<float> balanced_weights(const std::vector<double>& counts) {
  const double all = std::accumulate(counts.begin(), counts.end(), 0.0);
  std::vector<float> weights;
  for (const double n : counts) weights.push_back(n > 0 ? (float)(all / ((double)counts.size() * n)) : 0.f);
  return weights;
}

void check_partner(const Item& item, Gold& gold, PairLoss loss) {
  static const std::pair<const char*, const char*> wants[] = {
      {"cosine", "two texts and their cosine, from -1 to 1 (other scores are scaled first)"},
      {"inbatch", "two texts that are alike, with a score above 0 or none"},
      {"contrastive", "two texts and 1 or 0"},
      {"triplet", "a text, a positive and a negative one"}};
  const size_t texts = (item.pair ? 2 : 1) + item.others.size();
  const float score = gold.targets.empty() ? NAN : gold.targets[0];
  const bool fits[] = {texts >= 2 && std::fabs(score) <= 1, texts >= 2 && !(score <= 0), texts >= 2 && (score == 0 || score == 1),
                       texts == 3};
  const auto& [name, want] = wants[(size_t)loss];
  if (!fits[(size_t)loss]) throw Error(std::string("--loss ") + name + " wants " + want + "; give such data, or another --loss");
  if (loss == PairLoss::inbatch) gold.targets.clear();
}

bool only_partners(Task task, std::span<const Gold> golds) {
  return task == Task::embed && std::all_of(golds.begin(), golds.end(), [](const Gold& g) { return g.targets.empty(); });
}

// What an item is one of, where a held-out set is to have its share: the class; of several labels or tags the rarest; of numbers the tenth
// of all that it lies in.
static std::vector<int64_t> strata(std::span<const Gold> golds, Task task) {
  std::map<int64_t, int64_t> count;  // of labels
  std::vector<float> sorted;
  auto each = [&](const Gold& g, auto&& call) {
    for (size_t c = 0; c < g.targets.size(); c++)
      if (g.targets[c] > 0) call((int64_t)c);
    for (const int32_t tag : std::set<int32_t>(g.tags.begin(), g.tags.end())) call((int64_t)tag);
  };
  const bool number = task == Task::regress || task == Task::embed;
  for (const Gold& g : golds)
    if (number && !g.targets.empty())
      sorted.push_back(g.targets[0]);
    else
      each(g, [&](int64_t label) { count[label]++; });
  std::sort(sorted.begin(), sorted.end());
  std::vector<int64_t> of;
  for (const Gold& g : golds) {
    int64_t stratum = g.label;
    if (number && !g.targets.empty())
      stratum = 10 * (std::lower_bound(sorted.begin(), sorted.end(), g.targets[0]) - sorted.begin()) / (int64_t)sorted.size();
    else
      each(g, [&](int64_t label) { stratum = stratum < 0 || count[label] < count[stratum] ? label : stratum; });
    of.push_back(stratum);
  }
  return of;
}

// Questions about one context stay together: contexts in the order of the seed, those that bring their number nearer to what is wanted.
static std::vector<uint8_t> held_contexts(std::span<const Item> items, int64_t take, Random& random) {
  std::map<std::string_view, std::vector<size_t>> of;
  for (size_t i = 0; i < items.size(); i++) of[*items[i].pair].push_back(i);
  std::vector<const std::vector<size_t>*> contexts;
  for (const auto& [context, questions] : of) contexts.push_back(&questions);
  random.shuffle(contexts);
  std::vector<uint8_t> held(items.size());
  const auto least =
      *std::min_element(contexts.begin(), contexts.end(), [](const auto* a, const auto* b) { return a->size() < b->size(); });
  int64_t taken = 0;
  auto hold = [&](const std::vector<size_t>& questions) {
    for (const size_t i : questions) held[i] = 1;
    taken += (int64_t)questions.size();
  };
  for (const auto* questions : contexts)
    if (taken + (int64_t)questions->size() < (int64_t)items.size() &&
        std::abs(taken + (int64_t)questions->size() - take) < std::abs(taken - take))
      hold(*questions);
  if (!taken) hold(*least);
  return held;
}

LabelledSet hold_out(LabelledSet& set, Task task, double share, uint64_t seed) {
  const auto n = (int64_t)set.golds.size();
  if (n < 2) throw Error("one labelled text cannot be split into training and held-out data; give more, or none to hold out");
  const int64_t take = std::clamp<int64_t>(std::llround((double)n * share), 1, n - 1);
  Random random({seed, 0, 0, kSplitStream});
  auto several = [&] {
    return std::any_of(set.items.begin(), set.items.end(), [&](const Item& i) { return i.pair != set.items[0].pair; });
  };
  std::vector<uint8_t> held((size_t)n);
  if (task == Task::qa && several()) {
    held = held_contexts(set.items, take, random);
  } else {
    std::vector<int64_t> order = count_up((size_t)n);
    random.shuffle(order);
    // Ordered by where each stands in its stratum: of every one the first are taken, as many as its share.
    const std::vector<int64_t> of = strata(set.golds, task);
    std::map<int64_t, double> size, seen;
    for (const int64_t stratum : of) size[stratum]++;
    std::vector<double> place((size_t)n);
    for (const int64_t i : order) place[(size_t)i] = (seen[of[(size_t)i]]++ + 0.5) / size[of[(size_t)i]];
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return place[(size_t)x] < place[(size_t)y]; });
    for (int64_t i = 0; i < take; i++) held[(size_t)order[(size_t)i]] = 1;
  }
  LabelledSet dev, rest;
  for (size_t i = 0; i < held.size(); i++) {
    LabelledSet& to = held[i] ? dev : rest;
    to.items.push_back(std::move(set.items[i])), to.golds.push_back(std::move(set.golds[i]));
  }
  set = std::move(rest);
  return dev;
}

FinetuneSampler::FinetuneSampler(std::span<const Example> examples, int64_t batch, int64_t accumulate, uint64_t seed)
    : examples_(examples), batch_(batch), accumulate_(accumulate), seed_(seed) {
  if (examples.empty() || batch < 1 || accumulate < 1) throw Error("FinetuneSampler: no examples, or batches of none");
}

int64_t FinetuneSampler::epoch_steps() const { return ((int64_t)examples_.size() + batch_ * accumulate_ - 1) / (batch_ * accumulate_); }

// Shuffled; then within stretches of fifty batches by length, so that a batch holds similar ones; then the batches shuffled, but for
// a last one that is not full.
void FinetuneSampler::arrange(int64_t epoch) {
  order_ = count_up(examples_.size()), epoch_ = epoch;
  const int64_t whole = (int64_t)order_.size() / batch_;
  Random random({seed_, (uint32_t)epoch, 0, kOrderStream});
  random.shuffle(order_);
  auto length = [&](int64_t i) {
    size_t tokens = examples_[(size_t)i].ids.size();
    for (const Example& other : examples_[(size_t)i].others) tokens += other.ids.size();
    return tokens;
  };
  for (int64_t at = 0; at < whole * batch_; at += 50 * batch_)
    std::stable_sort(order_.begin() + at, order_.begin() + std::min(at + 50 * batch_, whole * batch_),
                     [&](int64_t x, int64_t y) { return length(x) < length(y); });
  std::vector<int64_t> batches = count_up((size_t)whole), arranged;
  random.shuffle(batches);
  for (const int64_t b : batches) arranged.insert(arranged.end(), order_.begin() + b * batch_, order_.begin() + (b + 1) * batch_);
  std::copy(arranged.begin(), arranged.end(), order_.begin());
}

std::vector<Batch> FinetuneSampler::next(int64_t step) {
  const int64_t n = (int64_t)examples_.size(), epoch = step / epoch_steps(), first = step % epoch_steps() * batch_ * accumulate_;
  if (epoch != epoch_) arrange(epoch);
  std::vector<Batch> micro;
  for (int64_t at = first; at < std::min(n, first + batch_ * accumulate_); at += batch_)
    micro.push_back(make_batch(examples_, std::span(order_).subspan((size_t)at, (size_t)std::min(batch_, n - at))));
  return micro;
}

// Runs `each(batch, row numbers)` over all examples in batches to a token budget.
template <class Each>
static void for_batches(std::span<const Example> examples, int64_t batch_tokens, Each each) {
  std::vector<int64_t> lengths;
  for (const Example& e : examples) lengths.push_back((int64_t)e.ids.size());
  for (const auto& rows : batches_by_tokens(lengths, batch_tokens)) each(make_batch(examples, rows), rows);
}

// What `answer` makes of a batch, C numbers for each row or for each token, in the examples' order.
template <class Answer>
static Tensor gather_answers(std::span<const Example> examples, int64_t C, bool tokens, int64_t batch_tokens, Answer answer) {
  Offsets at{0};  // where each example's rows begin
  for (const Example& e : examples) at.push_back(at.back() + (tokens ? (int64_t)e.ids.size() : 1));
  Tensor out({at.back(), C});
  for_batches(examples, batch_tokens, [&](const Batch& batch, const std::vector<int64_t>& which) {
    const Tensor numbers = answer(batch);
    const float* from = numbers.data();
    for (const int64_t i : which) {
      const int64_t n = (at[(size_t)i + 1] - at[(size_t)i]) * C;
      std::copy_n(from, n, out.data() + at[(size_t)i] * C);
      from += n;
    }
  });
  return out;
}

Tensor head_outputs(const Bert& model, std::span<const Example> examples, int64_t batch_tokens) {
  const HeadKind& head = head_kind(model.task);
  if (!head.output && !head.next_sentence)
    throw Error("a model for " + std::string(head.name) + " answers nothing about a text; use fill-mask or embed, or fine-tune it");
  return gather_answers(examples, head.classes(model.config), head.tokens, batch_tokens, [&](const Batch& batch) {
    Dropout none;
    return finite(model.logits(model.forward(batch, model.read_by_head(batch)), batch, none));
  });
}

Tensor token_vectors(const Bert& model, std::span<const Example> examples, int64_t batch_tokens) {
  return gather_answers(examples, model.config.hidden_size, true, batch_tokens, [&](const Batch& b) { return model.forward(b); });
}

Tensor embed_examples(const Bert& model, std::span<const Example> examples, const Pooling& pooling, int64_t batch_tokens) {
  return gather_answers(examples, pooling.width(model.config.hidden_size), false, batch_tokens,
                        [&](const Batch& b) { return pool_rows(model, model.forward(b, read_by(pooling, b)), b, pooling); });
}

std::vector<Example> examples_of(std::span<const std::vector<Window>> windows) {
  std::vector<Example> examples;
  for (const std::vector<Window>& list : windows)
    for (const Window& w : list) examples.push_back(w.example);
  return examples;
}

// ==== metrics =====================================================================================================
namespace {
// Precision, recall and F1 of one class (or label, or type of entity), from counts.
struct ClassCounts {
  double hit = 0, said = 0, is = 0;
  double precision() const { return said > 0 ? hit / said : 0; }
  double recall() const { return is > 0 ? hit / is : 0; }
  double f1() const { return said + is > 0 ? 2 * hit / (said + is) : 0; }
};
}  // namespace

static ClassCounts total(std::span<const ClassCounts> counts) {
  ClassCounts all;
  for (const ClassCounts& c : counts) all.hit += c.hit, all.said += c.said, all.is += c.is;
  return all;
}

// Gorodkin 2004, eq. 8 (for two classes Matthews 1975): 0 where a factor of the denominator is 0.
static double matthews(std::span<const ClassCounts> counts) {
  double n = 0, right = 0, pt = 0, pp = 0, tt = 0;
  for (const ClassCounts& c : counts) n += c.is, right += c.hit, pt += c.said * c.is, pp += c.said * c.said, tt += c.is * c.is;
  const double below = (n * n - pp) * (n * n - tt);
  return below > 0 ? (right * n - pt) / std::sqrt(below) : 0;
}

static double pearson(std::span<const double> x, std::span<const double> y) {
  const auto n = (double)x.size();
  const double mx = std::accumulate(x.begin(), x.end(), 0.0) / n, my = std::accumulate(y.begin(), y.end(), 0.0) / n;
  double xy = 0, xx = 0, yy = 0;
  for (size_t i = 0; i < x.size(); i++) xy += (x[i] - mx) * (y[i] - my), xx += (x[i] - mx) * (x[i] - mx), yy += (y[i] - my) * (y[i] - my);
  return xx > 0 && yy > 0 ? xy / std::sqrt(xx * yy) : 0;
}

static std::vector<double> ranks(std::span<const double> x) {
  std::vector<size_t> order = count_up<size_t>(x.size());
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] < x[b]; });
  std::vector<double> rank(x.size());
  for (size_t i = 0, j; i < order.size(); i = j) {
    for (j = i; j < order.size() && x[order[j]] == x[order[i]];) j++;
    for (size_t k = i; k < j; k++) rank[order[k]] = (double)(i + j - 1) / 2;  // ties share their mean rank
  }
  return rank;
}
static double spearman(std::span<const double> x, std::span<const double> y) { return pearson(ranks(x), ranks(y)); }

// scores(which, all) of all items, and from a seed percentile bootstrap intervals (Efron 1979): the items drawn anew with replacement,
// 1,000 times; of more than 20,000 items fewer times, so that no more than 20 million are drawn, but 100 times at least: the interval of
// so many is narrow, and its ends need no fine percentiles. Those that only `all` gives have none.
template <class F>
static std::vector<Metric> with_intervals(int64_t items, std::optional<uint64_t> seed, F&& scores) {
  const auto resamples = seed ? (size_t)std::clamp<int64_t>(20'000'000 / items, 100, 1000) : 0;
  std::vector<Scores> drawn(resamples);
  parallel_for((int64_t)resamples, [&](int64_t s) {
    Random random({*seed, (uint32_t)s, 0, kSplitStream});
    std::vector<int64_t> which((size_t)items);
    for (int64_t& i : which) i = random.below(items);
    drawn[(size_t)s] = scores(which, false);
  });
  std::vector<Metric> out;
  for (const auto& [name, value] : scores(count_up((size_t)items), seed.has_value())) {
    out.push_back({name, value, NAN, NAN});
    if (!seed || out.size() > drawn[0].size()) continue;
    std::vector<double> sorted;
    for (const Scores& s : drawn) sorted.push_back(s[out.size() - 1].second);
    std::sort(sorted.begin(), sorted.end());
    out.back().low = sorted[resamples / 40], out.back().high = sorted[resamples - 1 - resamples / 40];
  }
  return out;
}

std::vector<Metric> rank_scores(const Tensor& queries, const Tensor& candidates, std::optional<uint64_t> seed) {
  if (queries.shape() != candidates.shape() || queries.rows() < 1)
    throw Error("rank_scores: queries " + to_string(queries.shape()) + ", candidates " + to_string(candidates.shape()));
  constexpr int64_t kBlock = 512;  // queries and candidates multiplied at once
  const Tensor q = normalize_rows(queries), c = normalize_rows(candidates);
  const int64_t n = q.rows();
  auto block = [&](const Tensor& x, int64_t at) {
    return Tensor::borrowed({std::min(kBlock, n - at), x.cols()}, x.data() + at * x.cols(), {});
  };
  std::vector<int64_t> nearer((size_t)n);
  for (int64_t q0 = 0; q0 < n; q0 += kBlock) {
    Tensor some = block(q, q0);
    some.pack();
    const Tensor own = linear(block(c, q0), some);  // by the product that it is compared with, so that equal vectors tie to the bit
    const int64_t Q = own.rows();
    for (int64_t c0 = 0; c0 < n; c0 += kBlock) {
      const Tensor cosines = linear(block(c, c0), some);
      const float *cosine = cosines.data(), *best = own.data();
      for (int64_t r = 0; r < cosines.rows(); r++)  // written so that NaN counts as nearer
        for (int64_t i = 0; i < Q; i++) nearer[(size_t)(q0 + i)] += c0 + r != q0 + i && !(cosine[r * Q + i] < best[i * Q + i]);
    }
  }
  return with_intervals(n, seed, [&](std::span<const int64_t> which, bool) {
    double mrr = 0, first = 0, among_ten = 0;
    for (const int64_t i : which) {
      const int64_t k = nearer[(size_t)i];
      mrr += 1 / (double)(k + 1), first += k < 1, among_ten += k < 10;
    }
    const auto all = (double)which.size();
    return Scores{{"mrr", mrr / all}, {"recall_1", first / all}, {"recall_10", among_ten / all}};
  });
}

// ---- entities
namespace {
// B-PER is 'B' of PER. What has no prefix stands alone, as S- does. A prefix without a type has the type _, as in seqeval.
struct Tag {
  char prefix = 'O';
  std::string_view type;
  bool same(const Tag& other) const { return prefix != 'O' && other.prefix != 'O' && type == other.type; }
};
struct Entity {
  std::string type;
  int64_t begin, end;  // words
  friend bool operator==(const Entity&, const Entity&) = default;
};
enum class Scheme { any, iob1, iob2, iobes };
}  // namespace

static Tag read_tag(std::string_view tag) {
  if (tag.empty() || tag == "O") return {};
  if (!has_prefix(tag)) return {'S', tag};
  const char prefix = tag[0] == 'L' ? 'E' : tag[0] == 'U' ? 'S' : tag[0];  // BILOU's names of them
  return {prefix, tag.size() > 2 ? tag.substr(2) : "_"};
}

// any: by the rule of conlleval, whatever the scheme; also I-X after O, or after another type, begins an entity. The others as seqeval's
// mode "strict" (its scheme.py): only what the scheme allows is an entity.
//   iob2   B-X I-X ...                   iobes   S-X, or B-X I-X ... E-X
//   iob1   I-X I-X ..., or after a word of X: B-X I-X ...; as there not a B-X of one word that B-Y follows
static std::vector<Entity> find_entities(std::span<const std::string> tags, Scheme scheme) {
  std::vector<Entity> found;
  const auto n = (int64_t)tags.size();
  auto at = [&](int64_t i) { return i < 0 || i >= n ? Tag{} : read_tag(tags[(size_t)i]); };
  for (int64_t i = 0, end; i < n; i = end) {
    const Tag tag = at(i);
    end = i + 1;
    const bool begins = scheme == Scheme::any    ? tag.prefix != 'O'
                        : scheme == Scheme::iob1 ? tag.prefix == 'I' || (tag.prefix == 'B' && tag.same(at(i - 1)))
                                                 : tag.prefix == 'B';
    if (!begins && tag.prefix != 'S') continue;
    char last = tag.prefix;
    for (; (last == 'B' || last == 'I') && at(end).same(tag) && (at(end).prefix == 'I' || at(end).prefix == 'E'); end++)
      last = at(end).prefix;
    const bool whole = scheme == Scheme::iobes  ? last == 'S' || last == 'E'
                       : scheme == Scheme::iob1 ? last != 'B' || at(end).prefix != 'B' || at(end).same(tag)
                                                : true;
    if (whole) found.push_back({std::string(tag.type), i, end});
  }
  return found;
}

// ---- answers
// The words of an answer as the script counts them: lower case, without ASCII's punctuation and without the articles; what Python's
// str.lower, \b and str.split make of other scripts (but for what stands between a final sigma and the end of its word).
static std::vector<std::u32string> answer_words(std::string_view text) {
  std::u32string all, s;
  for (size_t i = 0, n; i < text.size(); i += n) all += code_point(text, i, n);
  auto letter = [](const std::u32string& in, size_t i) { return i < in.size() && is_letter(in[i]); };  // also of i = 0 - 1
  for (size_t i = 0; i < all.size(); i++) {
    const char32_t c = all[i];
    if (c > ' ' && c < 0x7F && !is_letter(c)) continue;
    s += c != 0x3A3 ? lower_case(c) : letter(all, i - 1) && !letter(all, i + 1) ? 0x3C2 : 0x3C3;
    if (c == 0x130) s += 0x307;  // İ keeps its dot
  }
  std::vector<std::u32string> words(1);
  for (size_t i = 0, end; i < s.size(); i = end) {
    for (end = i; letter(s, end);) end++;
    const std::u32string run = s.substr(i, end - i);
    if (run == U"a" || run == U"an" || run == U"the" || (run.empty() && (is_white_space(s[i]) || (s[i] >= 0x1C && s[i] <= 0x1F))))
      words.emplace_back();
    else
      words.back() += run.empty() ? s.substr(i, 1) : run;
    end += run.empty();
  }
  std::erase(words, U"");
  return words;
}

namespace {
// An answer beside a right one: the script's numbers before it divides.
struct Overlap {
  bool exact = false;
  float same = 0, said = 1, right = 1;  // words
  double f1() const {
    if (same == 0) return 0;
    const double precision = (double)same / (double)said, recall = (double)same / (double)right;
    return 2 * precision * recall / (precision + recall);
  }
};
}  // namespace

// SQuAD's official scores of an answer, the best over the right ones: exact if one is, and the words of the one with the largest F1. An
// empty list is {""}: there is no answer.   Rajpurkar et al. 2016, section 6.1, and the evaluation script of version 2.0
static Overlap best_overlap(const std::string& said, std::span<const std::string> right) {
  std::vector<std::vector<std::u32string>> golds;
  for (const std::string& r : right) golds.push_back(answer_words(r));
  std::erase(golds, std::vector<std::u32string>{});
  if (golds.empty()) golds.emplace_back();
  std::vector<std::u32string> words = answer_words(said);
  Overlap best;
  for (std::vector<std::u32string>& gold : golds) {
    best.exact |= words == gold;
    std::vector<std::u32string> a = words, same;
    std::sort(a.begin(), a.end()), std::sort(gold.begin(), gold.end());
    std::set_intersection(a.begin(), a.end(), gold.begin(), gold.end(), std::back_inserter(same));
    Overlap o{false, (float)same.size(), (float)a.size(), (float)gold.size()};
    if (a.empty() || gold.empty()) o = {false, (float)(a.empty() && gold.empty()), 1, 1};
    if (o.f1() > best.f1()) best.same = o.same, best.said = o.said, best.right = o.right;
  }
  return best;
}

// ---- Scorer
// The numbers of an item:
//   classify, choice   said, is                        regress, embed   said, is
//   multilabel         of each label: 1 said + 2 is    qa               exact, words that are the same, said, right; has an answer
//   tag                words, right ones, and as hit, said, is: entities; strict ones; as strict in IOB1; of each of types_
static constexpr size_t kShownClasses = 20;                // with more, the figures of single ones are not shown
static constexpr int64_t kStrict = 5, kTypes = 3 * 3 + 2;  // where in the row

Scorer::Scorer(Task task, std::vector<std::string> labels) : task_(task), labels_(std::move(labels)) {
  if (!head_kind(task).output && task != Task::embed)
    throw Error("score: a model for " + std::string(head_kind(task).name) + " has no labelled data");
  width_ = task == Task::multilabel ? (int64_t)labels_.size() : task == Task::qa ? 5 : 2;
  if (task != Task::tag) return;
  for (const std::string& label : labels_) entities_ |= entity_tag(label);
  for (const std::string& label : labels_) {
    const std::string type(entities_ ? read_tag(label).type : label);
    if ((!entities_ || label != "O") && std::find(types_.begin(), types_.end(), type) == types_.end()) types_.push_back(type);
  }
  if (types_.size() > kShownClasses) types_.clear();
  width_ = kTypes + 3 * (int64_t)types_.size();
}

// Of several labels those are said whose probability, as it is printed, is one half or more.
static float logistic(float x) { return 1 / (1 + exp_f32(-x)); }
static bool holds(float logit) { return logistic(logit) >= 0.5f; }

void Scorer::add(const Outcome& said, const Gold& is) {
  const std::string where = "score: item " + std::to_string(items_ + 1);
  auto fits = [&](bool yes, const char* what) {
    if (!yes) throw Error(where + ": " + what);
  };
  const size_t C = labels_.size();
  const std::vector<float>& out = said.outputs;
  for (const float x : out) fits(std::isfinite(x), "the model's output is not finite");
  std::vector<float> row((size_t)width_);
  if (task_ == Task::classify || task_ == Task::choice) {
    fits(!out.empty() && (task_ == Task::choice || out.size() == C), "the model's outputs are not one a class");
    fits(is.label >= 0 && is.label < (int64_t)out.size(), "its label is not one of the model's");
    row = {(float)(std::max_element(out.begin(), out.end()) - out.begin()), (float)is.label};
  } else if (task_ == Task::multilabel) {
    fits(out.size() == C && is.targets.size() == C, "the model's outputs, or its targets, are not one a label");
    for (size_t c = 0; c < C; c++) row[c] = (float)(holds(out[c]) + 2 * (is.targets[c] > 0.5f));
  } else if (task_ == Task::regress || task_ == Task::embed) {
    fits(out.size() == 1, "the model's output is not one number");
    fits(is.targets.size() == 1 && std::isfinite(is.targets[0]), "it has no number to compare with");
    row = {out[0], is.targets[0]};
  } else if (task_ == Task::tag) {
    fits(said.tags.size() == is.tags.size(), "as many tags as words are needed");
    for (const int32_t t : said.tags) fits(t >= -1 && t < (int64_t)C, "the model's tag is none of its labels");
    for (const int32_t t : is.tags) fits(t >= 0 && t < (int64_t)C, "its tag is not one of the model's labels");
    add_tags(said.tags, is.tags, row.data());
  } else {
    fits(!std::isnan(said.null_margin), "the score of no answer is no number");
    const Overlap o = best_overlap(said.answers.empty() ? "" : said.answers[0].text, is.answers);
    row = {(float)o.exact, o.same, o.said, o.right, (float)!is.answers.empty()};
    margins_.push_back(std::clamp(said.null_margin, -1e9, 1e9));  // infinite where the context holds nothing to answer with
  }
  rows_.insert(rows_.end(), row.begin(), row.end()), items_++;
}

// A word that the model says nothing of (-1) is outside of entities.
void Scorer::add_tags(std::span<const int32_t> said, std::span<const int32_t> is, float* row) {
  const auto outside = (int32_t)(std::find(labels_.begin(), labels_.end(), "O") - labels_.begin());
  std::vector<std::string> said_tags, is_tags;
  for (size_t i = 0; i < is.size(); i++) {
    const int32_t s = said[i] < 0 ? outside : said[i];
    said_tags.push_back(s < (int32_t)labels_.size() ? labels_[(size_t)s] : "O"), is_tags.push_back(labels_[(size_t)is[i]]);
    row[0]++, row[1] += s == is[i];
    if (entities_ || types_.empty()) continue;
    if (said[i] >= 0) row[kTypes + 3 * said[i] + 1]++;
    row[kTypes + 3 * is[i]] += said[i] == is[i], row[kTypes + 3 * is[i] + 2]++;
  }
  if (!entities_) return;
  Tag before;
  for (const std::string& name : is_tags) {
    const Tag tag = read_tag(name);
    iob1_ &= tag.prefix != 'B' || tag.same(before), iob2_ &= tag.prefix != 'I' || tag.same(before);
    before = tag;
  }
  auto count = [&](const std::vector<Entity>& found, const std::vector<Entity>& there, int64_t at, bool by_type) {
    auto add = [&](const Entity& e, int64_t what, float n) {
      row[at + what] += n;
      if (by_type && !types_.empty()) row[kTypes + 3 * (std::find(types_.begin(), types_.end(), e.type) - types_.begin()) + what] += n;
    };
    for (const Entity& e : there) add(e, 2, 1);
    for (const Entity& e : found) {
      const auto same = std::lower_bound(there.begin(), there.end(), e, [](const Entity& x, const Entity& y) { return x.begin < y.begin; });
      add(e, 1, 1), add(e, 0, same != there.end() && *same == e);
    }
  };
  const bool ends =
      std::any_of(labels_.begin(), labels_.end(), [](const std::string& l) { return has_prefix(l) && l[0] != 'B' && l[0] != 'I'; });
  auto count_as = [&](Scheme scheme, int64_t at, bool by_type) {
    count(find_entities(said_tags, scheme), find_entities(is_tags, scheme), at, by_type);
  };
  count_as(Scheme::any, 2, true), count_as(ends ? Scheme::iobes : Scheme::iob2, kStrict, false);
  if (!ends) count_as(Scheme::iob1, kStrict + 3, false);
}

// Adds precision, recall and F1: of all decisions together, the mean over `classes` of the classes, that weighted by how often each is
// right, and of each class. What `scores` has stays.
static void add_averages(Scores& scores, std::span<const ClassCounts> counts, const std::vector<std::string>& labels, double classes) {
  auto add = [&](const std::string& name, double value) {
    if (std::none_of(scores.begin(), scores.end(), [&](const auto& s) { return s.first == name; })) scores.emplace_back(name, value);
  };
  const ClassCounts all = total(counts);
  using Rate = double (ClassCounts::*)() const;
  const std::pair<std::string, Rate> rates[] = {
      {"precision", &ClassCounts::precision}, {"recall", &ClassCounts::recall}, {"f1", &ClassCounts::f1}};
  for (const auto& [name, rate] : rates) {
    double sum = 0, weighted = 0;
    for (const ClassCounts& c : counts) sum += (c.*rate)(), weighted += c.is * (c.*rate)();
    add(name + "_micro", (all.*rate)()), add(name + "_macro", sum / classes), add(name + "_weighted", all.is > 0 ? weighted / all.is : 0);
  }
  if (labels.size() <= kShownClasses)
    for (size_t c = 0; c < labels.size(); c++)
      for (const auto& [name, rate] : rates) add(name + "_" + labels[c], (counts[c].*rate)());
}

// classify, choice, multilabel
Scores Scorer::class_scores(Which which, bool all) const {
  const size_t C = labels_.size();
  std::vector<ClassCounts> counts(C);
  double right = 0, f1 = 0, classes = 0;
  for (const int64_t i : which) {
    const float* r = row(i);
    bool same = true;
    if (task_ == Task::multilabel)
      for (size_t c = 0; c < C; c++) {
        const int said = (int)r[c] & 1, is = (int)r[c] >> 1;
        counts[c].said += said, counts[c].is += is, counts[c].hit += said & is, same &= said == is;
      }
    else if (same = r[0] == r[1]; task_ == Task::classify)
      counts[(size_t)r[0]].said++, counts[(size_t)r[1]].is++, counts[(size_t)r[1]].hit += same;
    right += same;
  }
  right /= (double)which.size();
  if (task_ == Task::choice) return {{"accuracy", right}};
  // Means are over the classes that occur, over all labels of several: as sklearn does.
  for (const ClassCounts& c : counts) f1 += c.f1(), classes += task_ == Task::multilabel || c.said + c.is > 0;
  Scores scores;
  if (task_ == Task::multilabel) {
    scores = {{"f1_micro", total(counts).f1()}, {"f1_macro", f1 / classes}, {"exact", right}};
  } else if (C == 2) {  // of the second label, as GLUE counts
    scores = {{"accuracy", right}, {"f1", counts[1].f1()}, {"mcc", matthews(counts)}};
    if (all) scores.insert(scores.end(), {{"precision", counts[1].precision()}, {"recall", counts[1].recall()}});
  } else {
    scores = {{"accuracy", right}, {"f1_macro", f1 / classes}, {"mcc", matthews(counts)}};
  }
  if (all) add_averages(scores, counts, labels_, classes);
  return scores;
}

// The strict score is seqeval's, mode "strict". It finds the scheme in the right tags: IOBES (or BILOU) where words are marked as ends or
// as single, else IOB2. It never finds IOB1, and would see no entity in tags that follow it; so here IOB1 is what all right tags obey
// where they do not obey IOB2.
Scores Scorer::tag_scores(Which which, bool all) const {
  auto sum = [&](int64_t column) {
    double s = 0;
    for (const int64_t i : which) s += row(i)[column];
    return s;
  };
  auto counts = [&](int64_t column) { return ClassCounts{sum(column), sum(column + 1), sum(column + 2)}; };
  const double words = sum(0);
  Scores scores = {{"accuracy", words > 0 ? sum(1) / words : 0}};
  if (entities_) {
    const ClassCounts found = counts(2);
    scores.insert(scores.begin(), {{"entity_f1", found.f1()}, {"precision", found.precision()}, {"recall", found.recall()}});
    scores.emplace_back("entity_f1_strict", counts(iob1_ && !iob2_ ? kStrict + 3 : kStrict).f1());
  }
  if (all)
    for (size_t t = 0; t < types_.size(); t++) scores.emplace_back("f1_" + types_[t], counts(kTypes + 3 * (int64_t)t).f1());
  return scores;
}

std::array<double, 2> Scorer::answer_score(int64_t item, std::optional<double> null_threshold) const {
  const float* r = row(item);
  if (null_threshold && margins_[(size_t)item] > *null_threshold) return {1.0 - r[4], 1.0 - r[4]};
  return {r[0], Overlap{false, r[1], r[2], r[3]}.f1()};
}

Scores Scorer::answer_scores(Which which, std::optional<double> null_threshold, bool all) const {
  std::array<double, 2> sum[3] = {};  // of those without an answer, of those with one, of all: exact, F1
  double n[2] = {};
  for (const int64_t i : which) {
    const auto has = (size_t)row(i)[4];
    const auto score = answer_score(i, null_threshold);
    for (const size_t k : {has, (size_t)2}) sum[k][0] += score[0], sum[k][1] += score[1];
    n[has]++;
  }
  Scores scores = {{"exact", sum[2][0] / (double)which.size()}, {"f1", sum[2][1] / (double)which.size()}};
  if (all && n[0] > 0) {
    if (n[1] > 0) scores.insert(scores.end(), {{"has_answer_exact", sum[1][0] / n[1]}, {"has_answer_f1", sum[1][1] / n[1]}});
    scores.insert(scores.end(), {{"no_answer_exact", sum[0][0] / n[0]}, {"no_answer_f1", sum[0][1] / n[0]}});
  }
  return scores;
}

// As the official script's find_best_thresh, but that items of one margin stay together: no threshold parts them.
double Scorer::best_null_threshold() const {
  if (task_ != Task::qa || !items_) throw Error("score: a threshold is found from answers to questions");
  std::vector<int64_t> order = count_up((size_t)items_);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return margins_[(size_t)a] < margins_[(size_t)b]; });
  double best = 0, gain = 0, threshold = margins_[(size_t)order[0]] - 1;  // answering none
  for (size_t i = 0; i < order.size(); i++) {
    const double margin = margins_[(size_t)order[i]];
    gain += answer_score(order[i], {})[1] - (1.0 - row(order[i])[4]);
    if (gain > best && (i + 1 == order.size() || margins_[(size_t)order[i + 1]] != margin)) best = gain, threshold = margin;
  }
  return threshold;
}

std::vector<int64_t> Scorer::confusion() const {
  if (task_ != Task::classify) throw Error("score: only classes have a confusion matrix");
  std::vector<int64_t> matrix(labels_.size() * labels_.size());
  for (int64_t i = 0; i < items_; i++) matrix[(size_t)row(i)[1] * labels_.size() + (size_t)row(i)[0]]++;
  return matrix;
}

std::optional<std::string> Scorer::only_answer() const {
  if (task_ == Task::tag) {
    double said = 0, is = 0;
    for (int64_t i = 0; i < items_; i++) said += row(i)[3], is += row(i)[4];
    return entities_ && said == 0 && is > 0 ? std::optional<std::string>("no entity was found") : std::nullopt;
  }
  if (!items_ || (task_ != Task::classify && task_ != Task::choice && task_ != Task::multilabel)) return {};
  auto said = [&](int64_t i, int64_t c) { return task_ == Task::multilabel ? (int)row(i)[c] & 1 : (int)row(i)[0]; };
  auto is = [&](int64_t i, int64_t c) { return task_ == Task::multilabel ? (int)row(i)[c] >> 1 : (int)row(i)[1]; };
  bool one_said = true, one_is = true;
  for (int64_t i = 1; i < items_; i++)
    for (int64_t c = 0; c < width_; c++) one_said &= said(i, c) == said(0, c), one_is &= is(i, c) == is(0, c);
  if (!one_said || one_is) return {};
  if (task_ == Task::choice) return "choice " + std::to_string(said(0, 0)) + " was taken every time";
  if (task_ == Task::classify) return "every text was given one label, " + labels_[(size_t)said(0, 0)];
  Strings labels;
  for (int64_t c = 0; c < width_; c++)
    if (said(0, c)) labels.push_back(labels_[(size_t)c]);
  return labels.empty() ? "no text was given a label" : "every text was given the same labels, " + join(labels, ", ");
}

bool Scorer::flat() const {
  for (int64_t column = 0; column < 2 && (task_ == Task::regress || task_ == Task::embed); column++) {
    bool same = true;
    for (int64_t i = 1; i < items_; i++) same &= row(i)[column] == row(0)[column];
    if (same) return true;
  }
  return false;
}

std::optional<Mistake> find_mistake(const Labels& labels, const Item& item, const Gold& is, const Outcome& said,
                                    std::optional<double> null_threshold) {
  const Task task = labels.task;
  const bool words = !item.pair && !item.words.empty();
  Mistake m{0, item.pair ? item.text + " / " + *item.pair : words ? join(item.words, " ") : item.text, "", ""};
  auto name = [&](int32_t label) { return !labels.named() ? std::to_string(label) : label < 0 ? "O" : labels.names[(size_t)label]; };
  if (task == Task::qa) {
    const Answer best = said.answer(null_threshold);
    const double f1 = best_overlap(best.text, is.answers).f1();
    m.size = (1 - f1) * (best.text.empty() ? 1 : best.score), m.right = join(is.answers, " | "), m.said = best.text;
    return f1 == 1 ? std::nullopt : std::optional(m);
  }
  if (task == Task::tag) {
    for (size_t i = 0; i < is.tags.size(); i++) {
      if (said.tags[i] == is.tags[i]) continue;
      m.size += (double)said.scores[i], m.right += name(is.tags[i]) + " ", m.said += item.words[i] + "/" + name(said.tags[i]) + " ";
    }
    return m.size > 0 ? std::optional(m) : std::nullopt;
  }
  if (task == Task::regress || task == Task::embed) {
    if (is.targets.empty()) return {};
    m.size = std::fabs((double)said.outputs[0] - (double)is.targets[0]), m.right = exact(is.targets[0]), m.said = exact(said.outputs[0]);
    return m;
  }
  const std::vector<float> p = probabilities(task, said.outputs);
  if (task == Task::multilabel) {
    for (size_t c = 0; c < p.size(); c++) {
      m.size += std::fabs((double)p[c] - (double)is.targets[c]);
      if (is.targets[c] > 0.5f) m.right += name((int32_t)c) + " ";
      if (p[c] >= 0.5f) m.said += name((int32_t)c) + " ";
    }
    return m.right == m.said ? std::nullopt : std::optional(m);
  }
  const auto best = (int32_t)(std::max_element(p.begin(), p.end()) - p.begin());
  m.size = (double)(p[(size_t)best] - p[(size_t)is.label]), m.right = name(is.label), m.said = name(best);
  return best == is.label ? std::nullopt : std::optional(m);
}

Scores Scorer::scores(Which which, std::optional<double> null_threshold, bool all) const {
  if (task_ == Task::tag) return tag_scores(which, all);
  if (task_ == Task::qa) return answer_scores(which, null_threshold, all);
  if (task_ != Task::regress && task_ != Task::embed) return class_scores(which, all);
  std::vector<double> x, y;
  for (const int64_t i : which) x.push_back(row(i)[0]), y.push_back(row(i)[1]);
  Scores scores = {{"pearson", pearson(x, y)}, {"spearman", spearman(x, y)}};
  if (task_ == Task::embed) std::swap(scores[0], scores[1]);  // a cosine's order counts, not its scale
  return scores;
}

std::vector<Metric> Scorer::metrics(std::optional<uint64_t> seed, std::optional<double> null_threshold) const {
  if (!items_) throw Error("score: no labelled row");
  return with_intervals(items_, seed, [&](Which which, bool all) { return scores(which, null_threshold, all); });
}

std::vector<float> probabilities(Task task, std::span<const float> outputs, int64_t C) {
  if (task == Task::regress || outputs.empty()) return {outputs.begin(), outputs.end()};
  std::vector<float> p(outputs.size());
  if (task == Task::multilabel) {
    for (size_t i = 0; i < p.size(); i++) p[i] = logistic(outputs[i]);
    return p;
  }
  if (!C) C = (int64_t)outputs.size();
  const Tensor y = softmax(Tensor(Shape{(int64_t)outputs.size() / C, C}, outputs));
  std::copy_n(y.data(), y.size(), p.data());
  return p;
}

// ==== model folders ===============================================================================================

static void make_folders(const std::string& path) {
  std::error_code failed;
  fs::create_directories(path, failed);
  if (failed) throw Error(path + ": cannot make this folder: " + failed.message());
}

// Files that travel with a model unchanged.
static const char* const carried_files[] = {
    // the tokenizer's
    "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    // the recipe's
    "modules.json", "sentence_bert_config.json", "sentence_distilbert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json"};

static std::string list_names(std::span<const std::string> names) {
  if (names.size() <= 4) return join(names, ", ");
  return join(names.first(4), ", ") + " and " + std::to_string(names.size() - 4) + " more";
}

static Tensor widened(const NarrowMatrix& m) {
  const Tensor values({m.n, m.k});
  parallel_each(m.n, 64, [&](int64_t i) { m.widen(i, values.data() + i * m.k); });
  return values;
}

// A second copy of what the model holds once (the decoder is the word embeddings, its bias cls.predictions.bias).
static void check_tied(const SafeTensors& file, const SafeTensors::Entry& copy, const Tensor& original) {
  const Tensor t = file.load(copy), held = original.narrow() ? widened(*original.narrow()) : original;
  if (t.size() != held.size() || std::memcmp(t.data(), held.data(), (size_t)t.size() * sizeof(float)))
    throw Error(file.where() + ": " + copy.name + ": differs from the tensor it is tied to; an untied decoder is not built");
}

// What load_weights may do.
struct LoadPlan {
  bool own = false;                         // copy all into memory of its own, so that it can be trained
  bool classifier = true;                   // false: the file's is for other labels and is left aside
  std::optional<uint64_t> seed = {};        // heads that the file lacks are drawn from it; unset: none may lack
  std::optional<Precision> precision = {};  // of products; unset: of each weight what it is stored in
};

static bool starts_with_any(const std::string& name, std::initializer_list<const char*> prefixes) {
  return std::any_of(prefixes.begin(), prefixes.end(), [&](const char* prefix) { return name.starts_with(prefix); });
}

// A tensor of one of the files.
struct Found {
  const SafeTensors* file;
  const SafeTensors::Entry* entry;
};
static std::map<std::string, Found> tensors_by_name(const std::vector<SafeTensors>& files, const Family& f) {
  std::map<std::string, Found> there;
  for (const SafeTensors& file : files)
    for (const SafeTensors::Entry& e : file.entries())
      if (!there.emplace(canonical(f, e.name), Found{&file, &e}).second)
        throw Error(file.where() + ": " + e.name + ": there twice, once under another prefix");
  return there;
}

// The model_type that the tensors' names tell, for a config.json that does not.
static std::string type_of_tensors(const std::vector<SafeTensors>& files) {
  std::string type = families[0].model_type;
  for (const SafeTensors& file : files)
    for (const SafeTensors::Entry& e : file.entries()) {
      for (const Stranger& s : strangers)
        if (*s.tensors && e.name.find(s.tensors) != e.name.npos) return s.model_type;
      for (const Family& f : families)
        if (!f.is_bert() && (e.name.find(f.prefix) != e.name.npos || e.name.find(f.mark) != e.name.npos)) type = f.model_type;
    }
  return type;
}

// The architecture that the tensors tell, for a config.json that names none; and how many labels a classifier has.
static void architecture_of_tensors(Config& config, const std::map<std::string, Found>& there) {
  auto has = [&](const char* name) { return there.count(name) > 0; };
  const bool words = has("cls.predictions.transform.dense.weight"), next = has("cls.seq_relationship.weight");
  config.architecture = words && next                                              ? "BertForPreTraining"
                        : words                                                    ? "BertForMaskedLM"
                        : next                                                     ? "BertForNextSentencePrediction"
                        : has("classifier.weight") && has("pooler.dense.weight")   ? "BertForSequenceClassification"
                        : has("classifier.weight")                                 ? "BertForTokenClassification"
                        : has("qa_outputs.weight")                                 ? "BertForQuestionAnswering"
                        : has("discriminator_predictions.dense_prediction.weight") ? "ElectraForPreTraining"
                                                                                   : "";
  if (!has("classifier.weight") || !config.labels.empty()) return;
  const std::vector<int64_t>& shape = there.at("classifier.weight").entry->shape;
  for (int64_t i = 0; !shape.empty() && i < std::min<int64_t>(shape[0], 1 << 20); i++)
    config.labels.push_back("LABEL_" + std::to_string(i));
}

// The numbers of one tensor: as floats, or as they are stored where that may be and products want them so. Its scales are
// loaded with it.
static Tensor load_tensor(const std::pair<const std::string, Found>& found, std::map<std::string, Found>& there, const LoadPlan& plan,
                          bool may_be_narrow, LoadReport& report) {
  const auto& [file, entry] = found.second;
  report.loaded.push_back(entry->name);
  const bool int8 = entry->dtype == "I8";
  const Precision stored = int8 ? Precision::int8 : Precision::bf16;
  const bool stays = may_be_narrow && !plan.own && plan.precision.value_or(stored) == stored && entry->strides.empty();
  if (!int8 && (entry->dtype != "BF16" || !stays)) return file->load(*entry);
  const auto scales = there.find(found.first + "_scale");
  const bool scaled = int8 && scales != there.end() && scales->second.file == file;
  const NarrowMatrix narrow = file->narrow(*entry, scaled ? scales->second.entry : nullptr);
  if (scaled) report.loaded.push_back(scales->second.entry->name), there.erase(scales);
  return stays ? Tensor::narrow(narrow) : widened(narrow);
}

// Puts the rows of a narrow matrix below those that are there.
static void add_rows(NarrowMatrix& all, const NarrowMatrix& more) {
  const auto bytes = std::make_shared<std::string>(all.data, (size_t)(all.n * all.row_bytes()));
  bytes->append(more.data, (size_t)(more.n * more.row_bytes()));
  all.precision = more.precision, all.n += more.n, all.k = more.k, all.data = bytes->data(), all.owner = bytes;
  all.scales.insert(all.scales.end(), more.scales.begin(), more.scales.end());
}

// Puts rows [first, first + rows) of a parameter into its tensor; false where they are not of the type of those before. Narrow ones are
// gathered in `stack` until they are whole.
static bool put_rows(Tensor& t, NarrowMatrix& stack, const Tensor& values, const Shape& whole, int64_t first, int64_t rows) {
  const NarrowMatrix* const narrow = values.narrow();
  if (first && whole.rank() == 2 && (narrow ? stack.n != first || stack.precision != narrow->precision : stack.n)) return false;
  if (narrow) {
    add_rows(stack, *narrow);
    if (first + rows == whole[0]) t = Tensor::narrow(std::exchange(stack, {}));
  } else {
    if (!t) t = Tensor(whole);
    std::copy_n(values.data(), values.size(), Parameter{"", t, first, rows}.data());
  }
  return true;
}

// What no parameter asked for: second copies, and what does not belong there.
static void account_for_rest(const Bert& model, const std::map<std::string, Found>& rest, const std::string& where, LoadReport& report) {
  for (const auto& [name, found] : rest) {
    const bool decoder = name == "cls.predictions.decoder.weight", decoder_bias = name == "cls.predictions.decoder.bias";
    if (decoder || decoder_bias) {
      check_tied(*found.file, *found.entry, decoder ? model.word : model.decoder_bias);
      found.file->give_back(*found.entry);
    }
    (decoder || decoder_bias ? report.tied : report.unexpected).push_back(found.entry->name);
  }
  if (!report.unexpected.empty())
    throw Error(where + ": unexpected " + list_names(report.unexpected) + "; config.json describes a model without it");
}

// Loads the model's parameters from the files and accounts for every tensor of both.
static void load_weights(ModelFolder& m, const std::vector<SafeTensors>& files, Task task, const LoadPlan& plan) {
  Bert& model = m.bert;
  LoadReport& report = m.report;
  if (plan.own) m.config.quantized = {};  // plain numbers from here on
  model.config = m.config, model.task = task, model.layers.resize((size_t)m.config.num_hidden_layers);
  const Family& f = family(m.config);
  const std::string& where = files[0].where();
  if (!f.is_bert() && head_kind(task).next_sentence)
    throw Error(where + ": a model of type " + f.model_type + " has no head for next sentences; pretrain with --no-nsp");
  if (f.model_type == std::string_view("electra") && task == Task::choice)
    throw Error(where + ": ElectraForMultipleChoice is not built: its sequence_summary may be of several kinds; take a BERT or DistilBERT");
  Strings wanted;
  visit_parameters(model, [&](const std::string& name, auto&&...) { wanted.push_back(canonical(families[0], name)); });
  // A checkpoint may hold more than its architecture uses: bert-base-uncased is a BertForMaskedLM with a next-sentence head and a pooler.
  auto no_use = [&](const std::string& name) {
    if (name == "embeddings.position_ids" || (!plan.classifier && starts_with_any(name, {"classifier.", "qa_outputs."}))) return true;
    for (const std::string head :
         {"pooler.dense.", "cls.predictions.", "cls.seq_relationship.", "discriminator_predictions.", "qa_outputs."})
      if (name.starts_with(head)) return std::none_of(wanted.begin(), wanted.end(), [&](const auto& w) { return w.starts_with(head); });
    return false;
  };
  std::map<std::string, Found> there = tensors_by_name(files, f);
  std::erase_if(there, [&](const auto& t) { return no_use(t.first) && (report.ignored.push_back(t.second.entry->name), true); });
  const bool no_pooler = !plan.seed && task == Task::embed && !m.pooling.has(Pooling::pooler);  // many sentence encoders come without one
  std::vector<std::string> missing;
  uint32_t index = 0;
  NarrowMatrix stack;  // of query, key and value as they come
  visit_parameters(model, [&](const std::string& name, Tensor& t, const Shape& whole, int64_t first, int64_t rows) {
    const uint32_t number = index++;
    const std::string plain = canonical(families[0], name), theirs = name_in_file(f, head_kind(task), name);
    const bool table = plain.starts_with("embeddings."), layer = plain.starts_with("encoder.");
    auto found = there.find(plain);
    if (found == there.end() && name == "cls.predictions.bias") found = there.find("cls.predictions.decoder.bias");
    if (found == there.end()) {
      if (no_pooler && plain.starts_with("pooler.dense.")) return;
      if (!plan.seed || table || layer || plain.starts_with("embeddings_project.")) return missing.push_back(theirs);
      if (!missing.empty()) return;
      if (!t) t = Tensor(whole);
      draw({name, t, first, rows}, model.config.initializer_range, *plan.seed, number);
      return report.newly_initialised.push_back(theirs);
    }
    const auto& [file, entry] = found->second;
    const std::vector<int64_t> want = whole.rank() == 1 ? std::vector{rows} : std::vector{rows, whole[1]};
    if (entry->shape != want)
      throw Error(file->where() + ": " + entry->name + ": shape " + shape_text(entry->shape) + ", the config asks for " + shape_text(want));
    if (!missing.empty()) return;  // it fails below
    const Tensor values =
        load_tensor(*found, there, plan, whole.rank() == 2 && (layer || plain == "embeddings.word_embeddings.weight"), report);
    if (rows == whole[0] && !plan.own)
      t = values;
    else if (!put_rows(t, stack, values, whole, first, rows))
      throw Error(file->where() + ": " + entry->name + ": " + entry->dtype +
                  ", of another type than the query's; query, key and value of a layer must be of one");
    // Packed as soon as it is whole, and the file's pages given back: never are both forms of more than one tensor in memory.
    if (!plan.own && first + rows == whole[0] && whole.rank() == 2 && !table)
      t.pack(layer ? plan.precision.value_or(Precision::f32) : Precision::f32);
    if (!table || !t.narrow()) file->give_back(*entry);
    there.erase(found);
  });
  if (!missing.empty())
    throw Error(where + ": missing " + list_names(missing) + "; the file does not hold the model that config.json describes");
  account_for_rest(model, there, where, report);
  add_segments(model);
}

void check_folder(const std::string& folder, bool weights) {
  const std::string where_from =
      "; a model folder holds config.json, vocab.txt (or tokenizer.json) and model.safetensors (or pytorch_model.bin). Make one with bert "
      "pretrain, or take one from the hub: git clone https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2";
  std::error_code none;
  if (!exists(folder)) throw Error(folder + ": no such folder" + where_from);
  if (!fs::is_directory(folder, none)) throw Error(folder + ": a file, where a model's folder is wanted" + where_from);
  auto has = [&](const char* file) { return exists(folder + "/" + file); };
  weights = weights && !has_checkpoint(folder);  // whether they are missing
  if (has("log.jsonl") && (weights || !has("config.json")))  // which is written last
    throw Error(folder + ": a training run began here, but has no model yet; " +
                (has("training_state.safetensors") ? "go on with its own command and --resume" : "let it go on, or start it again"));
  if (has("config.json")) {  // a model of another kind lacks files of ours, but that is not what is wrong with it
    const std::string path = folder + "/config.json";
    const Json config = read_json(path);
    if (const Json* type = config.find("model_type"); type && type->is(Json::string)) find_family(type->as_string(path), path);
  }
  std::vector<std::string> missing;
  if (!has("config.json")) missing.push_back("config.json");
  if (!has("vocab.txt") && !has("tokenizer.json")) missing.push_back("vocab.txt");
  if (weights) missing.push_back("model.safetensors");
  if (!missing.empty()) throw Error(folder + ": " + list_names(missing) + " missing" + where_from);
}

void check_output(const std::string& path, std::optional<bool> resumes, bool overwrite) {
  const bool resume = resumes.value_or(false);
  const bool there = fs::exists(path), state = TrainingStates(path, 1).any();
  if (there && !fs::is_directory(path)) throw Error(path + ": a file, where a folder is wanted; give another --output");
  if (resume && !there) throw Error(path + ": no such folder; --resume goes on in the folder of the run that was stopped");
  // What a run leaves that ended before its first save; with nothing else there, it begins again.
  static const std::set<std::string> of_unfinished_run = {".lock", "log.jsonl", "report.html", "training_state-new.safetensors"};
  std::string foreign;
  if (there)
    for (const auto& entry : fs::directory_iterator(path))
      if (const std::string name = entry.path().filename().string(); !of_unfinished_run.count(name) && name.find(".tmp-") == name.npos)
        foreign = name;
  if (foreign.empty() || overwrite || (resume && state)) return;
  if (resume) throw Error(path + ": holds no run that could go on (no training_state.safetensors); begin anew without --resume");
  throw Error(path + ": holds files already (" + foreign + "); give another --output, or --overwrite" +
              (state && resumes ? ", or go on with --resume" : ""));
}

std::map<std::string, std::string> tokenizer_files(const std::string& path, const WordPiece& tokenizer, int64_t max_length) {
  std::map<std::string, std::string> files;
  std::error_code none;
  if (!fs::is_directory(path, none)) files["vocab.txt"] = read_file(path);
  for (const char* name : {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"})
    if (exists(path + "/" + name)) files[name] = read_file(path + "/" + name);
  if (!files.count("tokenizer_config.json")) files["tokenizer_config.json"] = tokenizer_config_json(tokenizer.settings(), max_length);
  return files;
}

// The modules of a sentence-transformers folder: the last word of the type, and the place.
struct Module {
  std::string type, folder;
};
static std::vector<Module> read_modules(const std::string& folder) {
  std::vector<Module> all;
  const std::string path = folder + "/modules.json";
  const Json modules = exists(path) ? read_json(path) : Json::parse("[]", path);
  for (const Json& module : modules.items(path)) {
    const Json *type = module.find("type"), *at = module.find("path");
    if (!type || !at) throw Error(path + ": a module without type or path");
    const std::string &name = type->as_string(path + ": type"), &place = at->as_string(path + ": path");
    if (place.starts_with("/") || place.find("..") != place.npos) throw Error(path + ": path: '" + place + "' lies outside of the folder");
    all.push_back({name.substr(name.rfind('.') + 1), place});
    if (all.size() == 1 && all[0].type == "Transformer" && !place.empty())
      throw Error(path + ": the transformer is in " + place + "; give that folder, or save the model again with sentence-transformers");
  }
  return all;
}

// A prompt's tokens count in the pooling like others.
static void need_prompts_pooled(const std::string& folder) {
  for (const Module& m : read_modules(folder))
    if (const std::string path = folder + "/" + m.folder + "/config.json"; m.type == "Pooling") {
      const Json config = read_json(path);
      if (const Json* v = config.find("include_prompt"); v && !v->as_bool(path + ": include_prompt"))
        throw Error(path + ": include_prompt: false is not built; the model can embed texts without a prompt");
    }
}

std::string folder_prompt(const std::string& folder, const std::string& name) {
  const std::string path = folder + "/config_sentence_transformers.json";
  if (!exists(path) && name.empty()) return "";
  if (!exists(path)) throw Error(path + ": missing, so the model has no prompts");
  const Json json = read_json(path);
  const Json *prompts = json.find("prompts"), *standard = given(json, "default_prompt_name");
  if (name.empty() && !standard) return "";
  const std::string wanted = name.empty() ? standard->as_string(path + ": default_prompt_name") : name;
  const Json* found = prompts ? prompts->find(wanted) : nullptr;
  if (found) {
    const std::string& prompt = found->as_string(path + ": prompts");
    if (!prompt.empty()) need_prompts_pooled(folder);
    return prompt;
  }
  std::vector<std::string> names;
  if (prompts)
    for (const auto& member : prompts->members()) names.push_back(member.first);
  throw Error(path + ": no prompt '" + wanted + "'; there " + (names.empty() ? "is none" : "are " + list_names(names)));
}

// The names that sentence-transformers has for the ways of pooling, in the order in which its old flags are joined.
struct PoolingMode {
  Pooling::Kind kind;
  const char *name, *flag;
};
static const PoolingMode pooling_modes[] = {{Pooling::cls, "cls", "pooling_mode_cls_token"},
                                            {Pooling::max, "max", "pooling_mode_max_tokens"},
                                            {Pooling::mean, "mean", "pooling_mode_mean_tokens"},
                                            {Pooling::mean_sqrt, "mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens"},
                                            {Pooling::weighted_mean, "weightedmean", "pooling_mode_weightedmean_tokens"},
                                            {Pooling::last, "lasttoken", "pooling_mode_lasttoken"}};

static std::vector<Pooling::Kind> read_pooling_modes(const std::string& path) {
  const Json config = read_json(path);
  std::vector<Pooling::Kind> kinds;
  auto add = [&](const std::string& name) {
    const PoolingMode* mode = find_row(pooling_modes, [&](const PoolingMode& m) { return name == m.name; });
    if (!mode) throw Error(path + ": pooling_mode: '" + name + "' is not built");
    kinds.push_back(mode->kind);
  };
  if (const Json* mode = config.find("pooling_mode")) {
    if (mode->is(Json::string))
      add(mode->as_string(path));
    else
      for (const Json& m : mode->items(path + ": pooling_mode")) add(m.as_string(path + ": pooling_mode"));
    return kinds;
  }
  for (const auto& [key, value] : config.members())
    if (key.starts_with("pooling_mode_") && value.is(Json::boolean) && value.as_bool(path) &&
        !find_row(pooling_modes, [&, k = key](const PoolingMode& m) { return k == m.flag; }))
      throw Error(path + ": " + key + " is not built");
  for (const PoolingMode& m : pooling_modes)
    if (const Json* on = config.find(m.flag); on && on->as_bool(path + ": " + m.flag)) kinds.push_back(m.kind);
  return kinds.empty() ? std::vector{Pooling::mean} : kinds;
}

// A Dense module: config.json says its activation, the weights are linear.weight [out,in] and linear.bias.
static Pooling::Layer read_dense(const std::string& folder, int64_t in) {
  static const std::pair<const char*, Activation> known[] = {
      {"Tanh", Activation::tanh}, {"Identity", Activation::none}, {"ReLU", Activation::relu}, {"GELU", Activation::gelu}};
  const std::string path = folder + "/config.json";
  const Json config = read_json(path);
  const Json *name = config.find("activation_function"), *residual = config.find("use_residual");
  const std::string text = name ? name->as_string(path + ": activation_function") : "torch.nn.Tanh", act = text.substr(text.rfind('.') + 1);
  const auto* found = find_row(known, [&](const auto& a) { return act == a.first; });
  if (!found || !text.starts_with("torch.nn."))
    throw Error(path + ": activation_function: '" + text + "' is not built; torch.nn's Tanh, Identity, ReLU and GELU are");
  if (residual && residual->as_bool(path + ": use_residual")) throw Error(path + ": use_residual: true is not built");
  for (const char* key : {"module_input_name", "module_output_name"})
    if (const Json* v = given(config, key); v && v->as_string(path + ": " + key) != "sentence_embedding")
      throw Error(path + ": " + key + ": '" + v->as_string(path) + "' is not built; sentence_embedding is");
  Pooling::Layer layer{{}, found->second};
  for (const SafeTensors& file : open_checkpoint(folder))
    for (const SafeTensors::Entry& e : file.entries()) {
      if (e.name != "linear.weight" && e.name != "linear.bias") throw Error(file.where() + ": unexpected " + e.name);
      (e.name == "linear.weight" ? layer.dense.weight : layer.dense.bias) = file.load(e);
    }
  const Tensor &w = layer.dense.weight, &b = layer.dense.bias;
  if (!w || w.shape().rank() != 2 || w.cols() != in || (b && !(b.shape() == Shape{w.rows()})))
    throw Error(folder + ": linear.weight " + (w ? to_string(w.shape()) : "missing") + " and linear.bias " +
                (b ? to_string(b.shape()) : "missing") + " do not fit vectors of " + std::to_string(in));
  return layer;
}

// Pooling, then dense layers, then normalisation, as a sentence-transformers folder says; mean pooling where it says nothing.
Pooling folder_pooling(const std::string& folder, const Config& config) {
  Pooling pooling;
  for (const Module& m : read_modules(folder)) {
    const std::string at = folder + "/" + m.folder;
    if (m.type == "Pooling")
      pooling.kinds = read_pooling_modes(at + "/config.json");
    else if (m.type == "Dense" && !pooling.normalize)
      pooling.layers.push_back(read_dense(at, pooling.width(config.hidden_size)));
    else if (m.type == "Normalize")
      pooling.normalize = true;
    else if (m.type != "Transformer" && m.type != "Dropout")
      throw Error(folder + "/modules.json: a module " + m.type + (pooling.normalize ? " after Normalize" : "") +
                  " is not built; Transformer, Pooling, Dense and Normalize, in this order, are");
  }
  return pooling;
}

std::map<std::string, std::string> sentence_files(const Pooling& pooling, int64_t hidden, int64_t max_length) {
  const std::string type = "sentence_transformers.models.";
  std::string modules, flags;
  auto add = [&](const char* number, const std::string& path, const std::string& name) {
    modules += (modules.empty() ? "[\n  " : ",\n  ") + std::string("{\"idx\": ") + number + ", \"name\": \"" + number + "\", \"path\": \"" +
               path + "\", \"type\": \"" + type + name + "\"}";
  };
  add("0", "", "Transformer"), add("1", "1_Pooling", "Pooling");
  if (pooling.normalize) add("2", "2_Normalize", "Normalize");
  for (const PoolingMode& m : pooling_modes) flags += std::string(",\n  \"") + m.flag + "\": " + (pooling.has(m.kind) ? "true" : "false");
  return {{"modules.json", modules + "\n]\n"},
          {"1_Pooling/config.json", "{\n  \"word_embedding_dimension\": " + std::to_string(hidden) + flags + "\n}\n"},
          {"sentence_bert_config.json", "{\n  \"max_seq_length\": " + std::to_string(max_length) + ",\n  \"do_lower_case\": false\n}\n"}};
}

std::string Pooling::name() const {
  std::string text;
  for (const Kind k : kinds) {
    const PoolingMode* mode = find_row(pooling_modes, [&](const PoolingMode& m) { return m.kind == k; });
    text += (text.empty() ? "" : "+") + std::string(mode ? mode->name : "pooler");
  }
  for (const Layer& l : layers) text += " dense " + to_string(l.dense.weight.shape());
  return text;
}

// What sentence_bert_config.json says of the text: that it is lower-cased (as Hugging Face's Lowercase does it: accents stay, whatever the
// tokenizer itself does then), and how long it may be: as long as the windows of training, else its max_seq_length, else the tokenizer's
// limit, else the positions there are; never more than those.
static void read_sentence_config(const std::string& folder, ModelFolder& m) {
  const std::optional<int64_t> windows = m.config.window_length;
  m.max_length = windows.value_or(m.config.max_position_embeddings);
  if (m.tokenizer.model_max_length > 0 && !windows) m.max_length = std::min(m.max_length, m.tokenizer.model_max_length);
  std::string path = folder + "/sentence_bert_config.json";
  if (!exists(path)) path = folder + "/sentence_distilbert_config.json";
  if (!exists(path)) return;
  const Json json = read_json(path);
  const Json *length = given(json, "max_seq_length"), *lower = given(json, "do_lower_case");
  if (length && !windows)
    m.max_length = std::min(m.config.max_position_embeddings, std::max<int64_t>(1, length->as_int(path + ": max_seq_length")));
  TokenizerSettings settings = m.tokenizer.settings();
  if (!lower || !lower->as_bool(path + ": do_lower_case") || settings.lowercase) return;
  settings.lowercase = true, settings.strip_accents = settings.strip_accents.value_or(false);
  m.tokenizer = m.tokenizer.with_settings(settings);
}

// Everything of a folder but the weights, whose files are opened: where config.json says too little, they tell the rest.
static ModelFolder read_folder(const std::string& folder, const std::vector<SafeTensors>& files) {
  const std::string config = folder + "/config.json";
  ModelFolder m{Config::parse(read_file(config), config, type_of_tensors(files)), WordPiece::load(folder), {}, {}, 0, "", {}, {}};
  if (m.config.architecture.empty()) architecture_of_tensors(m.config, tensors_by_name(files, family(m.config)));
  if (m.tokenizer.size() > m.config.vocab_size)
    throw Error(folder + ": the vocabulary has " + std::to_string(m.tokenizer.size()) + " pieces, the model has rows for " +
                std::to_string(m.config.vocab_size) + "; take the vocabulary that the model was trained with");
  std::vector<std::string> names(std::begin(carried_files), std::end(carried_files));
  for (const Module& module : read_modules(folder))
    for (const char* file : {"config.json", "model.safetensors", "pytorch_model.bin"})
      if (!module.folder.empty()) names.push_back(module.folder + "/" + file);
  for (const std::string& name : names)
    if (exists(folder + "/" + name)) m.carried[name] = read_file(folder + "/" + name);
  read_sentence_config(folder, m);
  m.prompt = folder_prompt(folder, "");
  return m;
}

static Task folder_task(const std::string& folder, const Config& config) try { return head_kind(config).task; } catch (const Error& e) {
  throw Error(folder + "/" + e.what());
}

ModelFolder load_folder(const std::string& folder, bool pack, std::optional<Precision> precision) {
  check_folder(folder);
  const std::vector<SafeTensors> files = open_checkpoint(folder);
  ModelFolder m = read_folder(folder, files);
  m.pooling = folder_pooling(folder, m.config);
  const Task task = folder_task(folder, m.config);
  if (head_kind(task).output && !head_kind(task).classes(m.config)) m.config.labels = {"LABEL_0", "LABEL_1"};  // transformers' default
  if (!m.config.quantized && !precision) precision = Precision::f32;
  load_weights(m, files, task, {.own = !pack, .precision = precision});
  if (!m.bert.pooler.weight || !m.bert.pooler.bias) m.bert.pooler = {};
  if (pack) m.bert.pack(precision.value_or(Precision::f32));
  return m;
}

ModelFolder load_folder_for(const std::string& folder, Task task, const std::vector<std::string>& labels, uint64_t seed) {
  check_folder(folder);
  const std::vector<SafeTensors> files = open_checkpoint(folder);
  ModelFolder m = read_folder(folder, files);
  const HeadKind& head = head_kind(task);
  const bool same_head = folder_task(folder, m.config) == task && m.config.labels == labels;  // else its rows mean something else
  m.config.labels = labels, m.config.architecture = head.architecture, m.config.problem_type = head.problem_type;
  m.config.window_length.reset(), m.config.window_stride.reset();
  if (task != Task::embed)  // a recipe for sentence vectors would say that it still makes those
    std::erase_if(m.carried, [](const auto& file) { return !starts_with_any(file.first, {"vocab.txt", "tokenizer", "special_tokens"}); });
  load_weights(m, files, task, {.own = true, .classifier = same_head, .seed = seed});
  return m;
}

void save_folder(const std::string& folder, const Bert& bert, const std::map<std::string, std::string>& carried, const std::string& dtype) {
  make_folders(folder);
  std::vector<NamedTensor> tensors;
  for (const Parameter& p : bert.parameters()) {
    const std::string name = name_in_file(family(bert.config), head_kind(bert.task), p.name);
    const NarrowMatrix* const narrow = p.tensor.narrow();
    tensors.push_back({name, p.shape(), narrow ? nullptr : p.data()});
    if (!narrow) continue;
    NarrowMatrix rows = *narrow;  // those of this parameter
    rows.n = p.rows, rows.data = narrow->row(p.first_row);
    const bool scaled = rows.precision == Precision::int8;
    if (scaled && dtype != "F32")
      throw Error(folder + ": " + name + ": int8, whose scales are F32; save it with F32, or load it as numbers first");
    tensors.back().narrow = std::move(rows);
    if (scaled) tensors.push_back({name + "_scale", {p.rows}, narrow->scales.data() + p.first_row});
  }
  // The large file first: where a disk is full, what stood here before stays as it is.
  save_safetensors(folder + "/model.safetensors", tensors, {{"format", "pt"}}, dtype);  // transformers asks for "pt"
  std::error_code none;
  for (const char* name : carried_files)  // of a model that was here before: its tokenizer and pooling are not this one's
    if (!carried.count(name)) fs::remove(folder + "/" + name, none);
  for (const auto& [name, bytes] : carried) {
    make_folders(fs::path(folder + "/" + name).parent_path());
    write_file(folder + "/" + name, bytes);
  }
  const char* torch_dtype = dtype == "F16" ? "float16" : dtype == "BF16" ? "bfloat16" : "float32";
  write_file(folder + "/config.json", bert.config.to_json(torch_dtype));
}

// The old pieces that a new one would be read as, longest first.
static std::vector<int32_t> old_pieces(const WordPiece& t, std::string_view piece) {
  std::vector<int32_t> ids;
  for (size_t at = piece.starts_with("##") ? 2 : 0, n; at < piece.size(); at += n) {
    int32_t id = -1;
    for (n = piece.size() - at + 1; id < 0 && --n > 0;) id = t.id((at ? "##" : "") + std::string(piece.substr(at, n)));
    if (id < 0) n = 1;
    if (id >= 0) ids.push_back(id);
  }
  return ids;
}

void extend_rows(Bert& bert, const WordPiece& t, const std::vector<std::string>& pieces) {
  const auto before = (size_t)t.size();
  bert.config.vocab_size = std::max(bert.config.vocab_size, (int64_t)pieces.size());
  const std::vector<int32_t> all = count_up<int32_t>(before);
  auto extend = [&](Tensor& table) {
    const int64_t width = table.size() / table.shape()[0], V = bert.config.vocab_size;
    Tensor rows(table.shape().rank() == 1 ? Shape{V} : Shape{V, width}, 0.f);
    std::copy_n(table.data(), table.size(), rows.data());
    for (size_t i = before; i < pieces.size(); i++) {
      const auto found = old_pieces(t, pieces[i]);
      const auto& ids = found.empty() ? all : found;
      for (int64_t c = 0; c < width; c++) {
        double sum = 0;
        for (const int32_t id : ids) sum += table.data()[id * width + c];
        rows.data()[(int64_t)i * width + c] = (float)(sum / (double)ids.size());
      }
    }
    table = rows;
  };
  extend(bert.word);
  if (head_kind(bert.task).masked_words) extend(bert.decoder_bias);
}

int64_t quantized_parts(const Config& config) { return config.num_hidden_layers + 1; }
void narrow_part(Bert& bert, int64_t part, const Bert& from, Precision precision) {
  auto narrow = [&](const Tensor& t) { return precision == Precision::f32 ? t : Tensor::narrow(narrowed(t, precision)); };
  if (!part) return void(bert.word = narrow(from.word));
  Layer& to = bert.layers[(size_t)part - 1];
  const Layer& plain = from.layers[(size_t)part - 1];
  for (Dense Layer::*weights : {&Layer::qkv, &Layer::attention_out, &Layer::up, &Layer::down})
    (to.*weights).weight = narrow((plain.*weights).weight);
}

// ==== tasks =======================================================================================================
// The first `pieces` pieces of a text.
static std::string_view cut_text(const WordPiece& t, std::string_view text, int64_t pieces) {
  EncodeOptions options = EncodeOptions::bare();
  options.max_length = pieces;
  const Encoding e = t.encode(text, options);
  return (int64_t)e.ids.size() < pieces ? text : text.substr(0, (size_t)e.offsets.back()[1]);
}

static int64_t piece_count(const WordPiece& t, std::string_view text) {
  std::vector<int32_t> ids;
  t.append_ids(text, ids);
  return (int64_t)ids.size();
}

constexpr int64_t kQuestionPieces = 64;  // of a question; google-research/bert run_squad.py: max_query_length

// The windows of a pair: over the longer text, the other one being cut to half of the room if it needs more.
static std::vector<Encoding> pair_windows(const WordPiece& t, Task task, std::string_view a, std::string_view b, EncodeOptions& options,
                                          int32_t& asked, int64_t& cut_to) {
  const int64_t room = options.max_length - 3;
  const int64_t of_a = piece_count(t, a), of_b = piece_count(t, b);
  asked = task == Task::qa || of_b > of_a;
  const int64_t most = task == Task::qa ? std::min(kQuestionPieces, room / 2) : std::max(room / 2, room - (asked ? of_b : of_a));
  const int64_t of_other = asked ? of_a : of_b;
  cut_to = of_other > most ? most : 0;
  (asked ? a : b) = cut_text(t, asked ? a : b, most);
  options.truncation = asked ? Truncation::only_second : Truncation::only_first;
  options.stride = std::min(options.stride, (room - std::min(most, of_other)) / 2);
  return t.encode_windows(a, b, options);
}

// Marks the first piece of each word, and the tokens that a window decides about: of the windows that hold a token the one that sees most
// on both sides of it. google-research/bert run_squad.py, _check_is_max_context
static void mark_tokens(std::span<Window> windows, int64_t stride) {
  struct Token {
    double context = -1;
    size_t window = 0, at = 0;
    int32_t word = -1;
  };
  std::vector<Token> text;  // that is asked about
  int64_t begin = 0;        // of a window in it
  for (size_t w = 0; w < windows.size(); w++) {
    Window& window = windows[w];
    const int64_t n = std::count_if(window.words.begin(), window.words.end(), [](int32_t word) { return word >= 0; });
    if (w) begin -= stride;
    int64_t i = 0;
    for (size_t at = 0; at < window.words.size(); at++) {
      if (window.words[at] < 0) continue;
      const size_t place = (size_t)(begin + i);
      if (place >= text.size()) text.resize(place + 1);
      const double context = (double)std::min(i, n - 1 - i) + 0.01 * (double)n;
      if (context > text[place].context) text[place] = {context, w, at, window.words[at]};
      window.starts[at] = !place || text[place - 1].word != window.words[at];
      i++;
    }
    begin += n;
  }
  for (const Token& t : text) windows[t.window].decides[t.at] = 1;
}

// Makes the words of a running text those that tagged data has (CoNLL's, the Penn Treebank's), where the tokenizer splits at every
// punctuation: - . & / _ between letters or digits stand inside of a word (Jean-Luc, AT&T), , and : between digits, ' where no English
// ending follows (O'Neil, but Japan 's); a full stop behind one letter, alone or after another stop, belongs to it (J., U.S.).
static void join_words(const std::string& text, std::span<Encoding> encodings) {
  std::vector<std::array<size_t, 2>> words;  // of the tokenizer: begin, end
  for (const Encoding& e : encodings)
    for (size_t i = 0; i < e.ids.size(); i++) {
      if (e.words[i] < 0) continue;
      const auto begin = (size_t)e.offsets[i][0], end = (size_t)e.offsets[i][1], word = (size_t)e.words[i];
      if (word >= words.size()) words.resize(word + 1, {text.size(), 0});
      words[word] = {std::min(words[word][0], begin), std::max(words[word][1], end)};
    }
  auto word = [&](size_t i) { return std::string_view(text).substr(words[i][0], words[i][1] - words[i][0]); };
  auto touches = [&](size_t i) { return i > 0 && i < words.size() && words[i][0] == words[i - 1][1]; };  // the word before it
  auto letter = [&](size_t at) {  // or digit, of a script that puts spaces between its words; `at`: in the middle of it, too
    while (at > 0 && ((uint8_t)text[at] & 0xC0) == 0x80) at--;
    const auto c = (uint8_t)text[at];
    return std::isalnum(c) || (c >= 0xC3 && c <= 0xE1);  // U+00C0 to U+1FFF
  };
  std::vector<uint8_t> joined(words.size());  // with the word before it
  for (size_t i = 1; i < words.size(); i++) {
    const std::string_view mark = word(i);
    if (!touches(i) || !letter(words[i][0] - 1)) continue;
    if (touches(i + 1) && letter(words[i][1])) {
      const bool digits = std::isdigit((uint8_t)text[words[i][0] - 1]) && std::isdigit((uint8_t)text[words[i][1]]);
      static const std::set<std::string_view> inside = {"-", ".", "&", "/", "_"}, endings = {"s", "S", "m", "d", "t", "ll", "re", "ve"};
      if (inside.count(mark) || ((mark == "," || mark == ":") && digits) ||
          ((mark == "'" || mark == "\u2019") && !endings.count(word(i + 1))))
        joined[i] = joined[i + 1] = 1;
    } else if (mark == "." && word(i - 1).size() == 1 && std::isalpha((uint8_t)word(i - 1)[0]) &&
               (!touches(i - 1) || word(i - 2) == ".")) {
      joined[i] = 1;
    }
  }
  std::vector<int32_t> numbers(words.size());
  for (size_t i = 1; i < words.size(); i++) numbers[i] = numbers[i - 1] + !joined[i];
  for (Encoding& e : encodings)
    for (int32_t& number : e.words) number = number < 0 ? number : numbers[(size_t)number];
}

// The windows of one text or pair.
static std::vector<Window> text_windows(const WordPiece& t, Task task, const Item& item, const std::optional<std::string>& pair,
                                        int64_t max_length, int64_t stride) {
  EncodeOptions options;
  options.parse_special = task == Task::embed, options.max_length = max_length;
  options.stride = std::min(stride, (max_length - 2) / 2);
  int32_t asked = 0;
  int64_t cut_to = 0;
  std::vector<Encoding> encodings = !item.words.empty() ? t.encode_words_windows(item.words, {}, false, options)
                                    : pair              ? pair_windows(t, task, item.text, *pair, options, asked, cut_to)
                                                        : t.encode_windows(item.text, {}, options);
  if (task == Task::tag && item.words.empty()) join_words(item.text, encodings);
  std::vector<Window> windows;
  for (Encoding& e : encodings) {
    for (size_t i = 0; i < e.ids.size(); i++)
      if (e.sequence[i] != asked) e.words[i] = -1;
    const size_t n = e.ids.size();
    const std::vector<uint8_t> no(n);
    windows.push_back({{std::move(e.ids), std::move(e.type_ids)}, std::move(e.words), std::move(e.offsets), no, no, 0, cut_to});
  }
  mark_tokens(windows, options.stride);
  return windows;
}

// Where the paragraph that begins at `at` ends: behind its blank line, or where there are none in the text, behind its line.
static size_t paragraph_end(const std::string& text, size_t at, bool blank_lines) {
  while ((at = text.find('\n', at)) != std::string::npos) {
    const size_t next = text.find_first_not_of(" \t\r", ++at);
    if (!blank_lines || (next != std::string::npos && text[next] == '\n')) return at;
  }
  return text.size();
}

// The windows of a text to tag or a context to answer from that one window does not hold: of each paragraph by itself, as if it were alone.
static std::vector<Window> paragraph_windows(const WordPiece& t, Task task, const Item& item, int64_t max_length, int64_t stride) {
  const std::string& text = task == Task::qa ? *item.pair : item.text;
  const bool blank_lines = paragraph_end(text, 0, true) < text.size();
  std::vector<Window> all;
  int32_t words = 0;  // before the paragraph
  for (size_t begin = 0, end; begin < text.size(); begin = end) {
    end = paragraph_end(text, begin, blank_lines);
    Item one = {item.text, item.pair};
    (task == Task::qa ? *one.pair : one.text) = text.substr(begin, end - begin);
    int32_t next = words;
    for (Window& w : text_windows(t, task, one, one.pair, max_length, stride)) {
      for (size_t i = 0; i < w.words.size(); i++) {
        if (w.words[i] < 0) continue;
        w.words[i] += words, next = std::max(next, w.words[i] + 1);
        for (int64_t& place : w.places[i]) place += (int64_t)begin;
      }
      if (next > words) all.push_back(std::move(w));  // not of a blank line alone
    }
    words = next;
  }
  return all;
}

std::vector<Window> make_windows(const WordPiece& t, Task task, const Item& item, int64_t max_length, int64_t stride,
                                 const std::string& prompt, bool paragraphs) {
  if (task == Task::qa && !item.pair) throw Error("a question without a context");
  if (max_length < 8) throw Error("windows of " + std::to_string(max_length) + " tokens are too short; 8 are wanted at least");
  if (task != Task::choice && task != Task::embed) {
    std::vector<Window> windows = text_windows(t, task, item, item.pair, max_length, stride);
    paragraphs = paragraphs && windows.size() > 1 && (task == Task::qa || (task == Task::tag && item.words.empty()));
    return paragraphs ? paragraph_windows(t, task, item, max_length, stride) : windows;
  }
  std::vector<Window> all;
  int32_t part = 0;
  auto add = [&](const Item& one, const std::optional<std::string>& pair) {
    for (Window& w : text_windows(t, task, one, pair, max_length, stride)) w.part = part, all.push_back(std::move(w));
    part++;
  };
  auto text = [&](const std::string& alone) { add({prompt + alone, {}}, {}); };
  if (task == Task::embed) text(item.text);
  if (task == Task::embed && item.pair) text(*item.pair);
  for (const std::string& other : item.others) task == Task::embed ? text(other) : add(item, item.pair ? *item.pair + " " + other : other);
  return all;
}

// The first and the last byte's end of the tokens that an answer touches: what the tokenizer drops at its ends (a space) is none of it.
using ByteRange = std::array<int64_t, 2>;
static ByteRange answered_tokens(std::span<const Window> windows, const Gold& gold) {
  if (gold.answers.empty()) return {0, 0};
  if (gold.starts.empty()) throw Error("the answer '" + gold.answers[0] + "' without its place in the context; give its start in bytes");
  const int64_t begin = gold.starts[0], end = begin + (int64_t)gold.answers[0].size();
  ByteRange touched = {end, begin};  // of none
  for (const Window& w : windows)
    for (size_t i = 0; i < w.words.size(); i++)
      if (w.words[i] >= 0 && w.places[i][0] < end && w.places[i][1] > begin)
        touched = {std::min(touched[0], w.places[i][0]), std::max(touched[1], w.places[i][1])};
  return touched;
}

// A window's example for training. answer: qa, from answered_tokens
static void label_window(Task task, Window& w, const Gold& gold, ByteRange answer) {
  Example& e = w.example;
  e.label = gold.label, e.targets = gold.targets;
  if (task == Task::tag) {
    e.labels.assign(e.ids.size(), kIgnored);
    for (size_t i = 0; i < e.ids.size(); i++) {
      if (!w.starts[i]) continue;
      if ((size_t)w.words[i] >= gold.tags.size())
        throw Error("tags: " + std::to_string(gold.tags.size()) + ", but the text has more words; give one a word");
      e.labels[i] = gold.tags[(size_t)w.words[i]];
    }
  }
  if (task != Task::qa) return;
  e.labels = {0, 0};
  int32_t first = -1, last = -1;
  for (size_t i = 0; i < e.ids.size(); i++)
    if (w.words[i] >= 0 && w.places[i][0] < answer[1] && w.places[i][1] > answer[0]) last = (int32_t)i, first = first < 0 ? last : first;
  if (first >= 0 && w.places[(size_t)first][0] == answer[0] && w.places[(size_t)last][1] == answer[1]) e.labels = {first, last};
}

std::vector<Example> make_examples(Task task, std::vector<Window> windows, const Gold& gold) {
  std::vector<Example> out;
  const ByteRange answer = task == Task::qa ? answered_tokens(windows, gold) : ByteRange();
  for (size_t i = 0; i < windows.size(); i++) {
    Window& w = windows[i];
    if (w.part > 0 && w.part != windows[i - 1].part) out[0].others.push_back(std::move(w.example));  // one example holds all parts
    if (w.part > 0 || (!out.empty() && task != Task::tag && task != Task::qa)) continue;             // a long text: its first window
    label_window(task, w, gold, answer);
    out.push_back(std::move(w.example));
  }
  return out;
}

int64_t cut_to(std::span<const Window> windows) {
  const auto cut = std::find_if(windows.begin(), windows.end(), [](const Window& w) { return w.cut_to > 0; });
  return cut == windows.end() ? 0 : cut->cut_to;
}

bool in_windows(std::span<const Window> windows) {
  auto same_part = [](const Window& a, const Window& b) { return a.part == b.part; };
  return std::adjacent_find(windows.begin(), windows.end(), same_part) != windows.end();
}

std::vector<Example> training_examples(const WordPiece& tokenizer, Task task, const LabelledSet& set, int64_t max_length, int64_t stride,
                                       const std::string& prompt, int64_t& cut) {
  std::vector<std::vector<Example>> made(set.items.size());
  std::vector<uint8_t> is_cut(made.size());
  parallel_each((int64_t)made.size(), 8, [&](int64_t i) {
    std::vector<Window> windows = make_windows(tokenizer, task, set.items[(size_t)i], max_length, stride, prompt);
    is_cut[(size_t)i] = (task != Task::tag && task != Task::qa && in_windows(windows)) || cut_to(windows);
    made[(size_t)i] = make_examples(task, std::move(windows), set.golds[(size_t)i]);
  });
  cut = std::count(is_cut.begin(), is_cut.end(), 1);
  std::vector<Example> all;
  for (std::vector<Example>& list : made) std::move(list.begin(), list.end(), std::back_inserter(all));
  return all;
}

// Each word's tag, from the window that sees most around its first piece.
static Outcome tag_outcome(const Item& item, std::span<const Window> windows, std::span<const float> outputs, int64_t classes) {
  Outcome o;
  int64_t at = 0;
  for (const std::string& word : item.words) {  // as they stand in the words joined by spaces
    o.words.push_back({at, at + (int64_t)word.size()});
    at += (int64_t)word.size() + 1;
  }
  std::vector<size_t> found;  // words that have a piece
  std::vector<float> logits;
  const float* row = outputs.data();
  for (const Window& w : windows)
    for (size_t i = 0; i < w.words.size(); i++, row += classes) {
      if (w.words[i] < 0) continue;
      const auto word = (size_t)w.words[i];
      if (item.words.empty()) {
        if (word >= o.words.size()) o.words.resize(word + 1, {w.places[i][0], 0});
        if (w.starts[i]) o.words[word][0] = w.places[i][0];
        o.words[word][1] = std::max(o.words[word][1], w.places[i][1]);
      }
      if (w.starts[i] && w.decides[i]) found.push_back(word), logits.insert(logits.end(), row, row + classes);
    }
  o.tags.assign(o.words.size(), -1), o.scores.assign(o.words.size(), 0);
  if (found.empty()) return o;
  const Tensor p = softmax(Tensor(Shape{(int64_t)found.size(), classes}, logits));
  for (size_t k = 0; k < found.size(); k++) {
    const float *of = p.data() + (int64_t)k * classes, *best = std::max_element(of, of + classes);
    o.tags[found[k]] = (int32_t)(best - of), o.scores[found[k]] = *best;
  }
  return o;
}

std::vector<TextEntity> entities_in(const Outcome& o, std::span<const std::string> labels, const std::string& text) {
  std::vector<std::string> tags;
  for (const int32_t tag : o.tags) tags.push_back(tag < 0 ? "O" : labels[(size_t)tag]);
  std::vector<TextEntity> list;
  for (const Entity& e : find_entities(tags, Scheme::any)) {
    const int64_t begin = o.words[(size_t)e.begin][0], end = o.words[(size_t)e.end - 1][1];
    double score = 0;
    for (int64_t w = e.begin; w < e.end; w++) score += (double)o.scores[(size_t)w] / (double)(e.end - e.begin);
    list.push_back({{text.substr((size_t)begin, (size_t)(end - begin)), begin, end, score}, e.type});
  }
  return list;
}

// The logarithm of how likely each window is to be the one that a question is about, but for a common constant: summed over the question's
// pieces that it lacks, log(the share of windows that have the piece). A rare word of the question that stands in one window of many speaks
// for that one, a common one for none: the weights of tf-idf (Sparck Jones 1972), by which Clark and Gardner (2018, section 2.1) choose
// paragraphs.
static std::vector<double> window_likelihoods(std::span<const Window> windows) {
  auto pieces = [](const Window& w, bool of_context) {
    std::set<int32_t> set;
    for (size_t i = 0; i < w.words.size(); i++)
      if ((w.words[i] >= 0) == of_context) set.insert(w.example.ids[i]);
    return set;
  };
  std::vector<std::set<int32_t>> contexts;
  for (const Window& w : windows) contexts.push_back(pieces(w, true));
  std::vector<double> likelihoods(windows.size());
  for (const int32_t piece : pieces(windows[0], false)) {
    const auto have = std::count_if(contexts.begin(), contexts.end(), [&](const auto& context) { return context.count(piece) > 0; });
    if (have == 0) continue;
    for (size_t w = 0; w < contexts.size(); w++)
      if (!contexts[w].count(piece)) likelihoods[w] += std::log((double)have / (double)contexts.size());
  }
  return likelihoods;
}

// The logarithm of the sum of exp of every second of n pairs' numbers.
static double log_sum(const float* x, size_t n) {
  float top = x[0];
  for (size_t i = 1; i < n; i++) top = std::max(top, x[2 * i]);
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += std::exp((double)(x[2 * i] - top));
  return (double)top + std::log(sum);
}

// The best parts of the context over all windows. A part goes from one of the twenty best starts that its window decides about to one of
// the twenty best ends, at most thirty pieces (google-research/bert run_squad.py, write_predictions). Its score is the probability of both
// in their window times the window's. In one window that is the order of the sums of logits. Of many the plain sum prefers whatever is
// loudest: what training makes comparable are the scores inside a window, not those of two (Clark and Gardner 2018, section 3). Of 72
// answers from SQuAD's articles in 20,000 words of novels without a paragraph's end, plain sums left 45 in their own paragraph, these 72.
static Outcome answer_outcome(const Item& item, std::span<const Window> windows, std::span<const float> outputs) {
  constexpr size_t kBest = 20, kLongest = 30;
  struct Part {
    double score;  // the logarithm
    float margin;  // of [CLS], which says "no answer", over its sum of logits
    int64_t begin, end;
  };
  std::vector<Part> parts;
  const std::vector<double> likelihoods = window_likelihoods(windows);
  const float* logits = outputs.data();  // [tokens, 2]: of starting here, of ending here
  for (size_t at = 0; at < windows.size(); at++) {
    const Window& w = windows[at];
    const size_t n = w.words.size();
    const double window = likelihoods[at] - log_sum(logits, n) - log_sum(logits + 1, n);
    auto best = [&](size_t which) {
      std::vector<size_t> list;
      for (size_t i = 0; i < n; i++)
        if (w.words[i] >= 0 && (which || w.decides[i])) list.push_back(i);
      std::stable_sort(list.begin(), list.end(), [&](size_t a, size_t b) { return logits[2 * a + which] > logits[2 * b + which]; });
      list.resize(std::min(list.size(), kBest));
      return list;
    };
    const std::vector<size_t> ends = best(1);
    for (const size_t a : best(0))
      for (const size_t b : ends) {
        if (b < a || b >= a + kLongest) continue;
        const float sum = logits[2 * a] + logits[2 * b + 1];
        parts.push_back({(double)sum + window, logits[0] + logits[1] - sum, w.places[a][0], w.places[b][1]});
      }
    logits += 2 * n;
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.score > b.score; });
  Outcome o;
  double total = 0;
  for (const Part& p : parts) {
    std::string text = item.pair->substr((size_t)p.begin, (size_t)(p.end - p.begin));
    if (o.answers.size() == kBest) break;
    if (std::any_of(o.answers.begin(), o.answers.end(), [&](const Answer& a) { return a.text == text; })) continue;
    o.answers.push_back({std::move(text), p.begin, p.end, std::exp(p.score - parts[0].score)}), total += o.answers.back().score;
  }
  o.null_margin = parts.empty() ? std::numeric_limits<double>::infinity() : (double)parts[0].margin;
  for (Answer& a : o.answers) a.score /= total;
  return o;
}

Answer Outcome::answer(std::optional<double> null_threshold) const {
  return answers.empty() || (null_threshold && null_margin > *null_threshold) ? Answer() : answers[0];
}

// The mean of the outputs of all windows of a part, part by part.
static std::vector<float> mean_outputs(std::span<const Window> windows, std::span<const float> outputs, int64_t classes) {
  std::vector<float> means;
  for (size_t w = 0, n; w < windows.size(); w += n) {
    std::vector<double> sum((size_t)classes);
    for (n = 0; w + n < windows.size() && windows[w + n].part == windows[w].part; n++)
      for (size_t c = 0; c < sum.size(); c++) sum[c] += (double)outputs[(w + n) * sum.size() + c];
    for (const double s : sum) means.push_back((float)(s / (double)n));
  }
  return means;
}

Tensor embed_windows(const Bert& bert, std::span<const std::vector<Window>> windows, const Pooling& pooling, int64_t batch_tokens) {
  Pooling plain = pooling;
  plain.normalize = false;
  const Tensor v = embed_examples(bert, examples_of(windows), plain, batch_tokens);
  const int64_t width = v.cols();
  std::vector<float> means;
  const float* row = v.data();
  for (const std::vector<Window>& list : windows)
    for (size_t begin = 0, end; begin < list.size(); begin = end) {
      std::vector<double> decided;  // tokens, of the part's windows
      for (end = begin; end < list.size() && list[end].part == list[begin].part; end++)
        decided.push_back((double)std::count(list[end].decides.begin(), list[end].decides.end(), 1));
      const double all = std::accumulate(decided.begin(), decided.end(), 0.0);
      for (int64_t h = 0; h < width; h++) {
        double sum = 0;
        for (size_t k = 0; k < decided.size(); k++) sum += decided[k] / all * (double)row[(int64_t)k * width + h];
        means.push_back(decided.size() == 1 ? row[h] : (float)sum);
      }
      row += (int64_t)decided.size() * width;
    }
  const Tensor out(Shape{(int64_t)means.size() / width, width}, means);
  return pooling.normalize ? normalize_rows(out) : out;
}

// Vectors of the items' first two texts.   Both [items, width]
static std::array<Tensor, 2> pair_vectors(const Bert& bert, const Pooling& pooling, std::span<const std::vector<Window>> windows,
                                          int64_t batch_tokens) {
  std::vector<int64_t> first, second;  // rows of the vectors
  int64_t row = 0;
  for (const std::vector<Window>& list : windows) {
    const int64_t texts = list.back().part + 1;
    if (texts < 2) throw Error("similarity: an item of one text; two are compared");
    first.push_back(row), second.push_back(row + 1), row += texts;
  }
  const Tensor vectors = embed_windows(bert, windows, pooling, batch_tokens);
  return {gather_rows(vectors, first), gather_rows(vectors, second)};
}

std::vector<Outcome> answer_windows(const Bert& bert, const Pooling& pooling, std::span<const Item> items,
                                    std::span<const std::vector<Window>> windows, int64_t batch_tokens) {
  if (items.empty()) return {};
  std::vector<Outcome> out(items.size());
  if (bert.task == Task::embed) {
    const auto [a, b] = pair_vectors(bert, pooling, windows, batch_tokens);
    const Tensor cosines = row_dots(normalize_rows(a), normalize_rows(b));
    for (size_t i = 0; i < out.size(); i++) out[i].outputs = {cosines.data()[i]};
    return out;
  }
  const HeadKind& head = head_kind(bert.task);
  const Tensor outputs = head_outputs(bert, examples_of(windows), batch_tokens);
  const int64_t classes = outputs.cols();
  size_t at = 0;  // in outputs
  for (size_t i = 0; i < items.size(); i++) {
    const std::span<const Window> list = windows[i];
    size_t rows = list.size();
    if (head.tokens) rows = 0, std::for_each(list.begin(), list.end(), [&](const Window& w) { rows += w.words.size(); });
    const std::span<const float> own(outputs.data() + at, rows * (size_t)classes);
    if (bert.task == Task::tag)
      out[i] = tag_outcome(items[i], list, own, classes);
    else if (bert.task == Task::qa)
      out[i] = answer_outcome(items[i], list, own);
    else
      out[i].outputs = mean_outputs(list, own, classes);
    out[i].cut_to = cut_to(list);
    at += own.size();
  }
  return out;
}

// The items' windows, cut in parallel.
static std::vector<std::vector<Window>> windows_of(const Asked& how, std::span<const Item> items) {
  std::vector<std::vector<Window>> windows(items.size());
  parallel_each((int64_t)items.size(), 8, [&](int64_t i) {
    windows[(size_t)i] = make_windows(how.tokenizer, how.bert.task, items[(size_t)i], how.max_length, how.stride, how.prompt);
  });
  return windows;
}

std::vector<Outcome> answer_items(const Asked& how, std::span<const Item> items) {
  return answer_windows(how.bert, how.pooling, items, windows_of(how, items), how.batch_tokens);
}

void score_items(const Asked& how, std::span<const Item> items, std::span<const Gold> golds, Scorer& scorer,
                 const std::function<void(size_t, const Outcome&)>& each) {
  constexpr size_t kAtOnce = 2048;  // so that memory does not grow with the number of items
  for (size_t at = 0; at < items.size(); at += kAtOnce) {
    const std::vector<Outcome> said = answer_items(how, items.subspan(at, std::min(kAtOnce, items.size() - at)));
    for (size_t i = 0; i < said.size(); i++) {
      scorer.add(said[i], golds[at + i]);
      if (each) each(at + i, said[i]);
    }
  }
}

std::vector<Metric> rank_partners(const Asked& how, std::span<const Item> items, std::optional<uint64_t> seed) {
  std::vector<std::vector<Window>> windows = windows_of(how, items);
  for (std::vector<Window>& list : windows) std::erase_if(list, [](const Window& w) { return w.part > 1; });
  const auto [texts, partners] = pair_vectors(how.bert, how.pooling, windows, how.batch_tokens);
  return rank_scores(texts, partners, seed);
}

// ==== Model =======================================================================================================
static void need_masked_words(const Bert& bert, const std::string& what) {
  if (!head_kind(bert.task).masked_words)
    throw Error(what + " needs a model that guesses masked words (BertForPreTraining or BertForMaskedLM), this one is for " +
                head_kind(bert.task).name);
}

std::vector<std::vector<MaskGuess>> guess_masks(const ModelFolder& folder, std::span<const Example> examples, int64_t top,
                                                int64_t batch_tokens) {
  const Bert& bert = folder.bert;
  need_masked_words(bert, "fill-mask");
  constexpr size_t kAtOnce = 256;  // masks: the probabilities of thousands would take gigabytes
  std::vector<std::vector<MaskGuess>> out(examples.size());
  for_batches(examples, batch_tokens, [&](Batch batch, const std::vector<int64_t>& rows) {
    std::vector<std::pair<int64_t, int64_t>> places;  // row in the batch, number of the mask in it
    for (int64_t r = 0; r < batch.rows(); r++)
      for (int64_t t = batch.offsets[(size_t)r], n = 0; t < batch.offsets[(size_t)r + 1]; t++)
        if (batch.ids[(size_t)t] == folder.tokenizer.mask) batch.masked.push_back(t), places.push_back({r, n++});
    if (places.empty()) return;
    const Tensor hidden = bert.forward(batch, batch.masked);
    const int64_t V = bert.config.vocab_size, count = std::clamp<int64_t>(top, 0, V);
    std::vector<int32_t> ids((size_t)V);
    Tensor p;
    for (size_t m = 0; m < places.size(); m++) {
      if (m % kAtOnce == 0) {
        const auto first = batch.masked.begin() + (int64_t)m;
        p = softmax(finite(bert.masked_logits(hidden, {first, first + (int64_t)std::min(kAtOnce, places.size() - m)})));
      }
      const float* row = p.data() + (int64_t)(m % kAtOnce) * V;
      std::iota(ids.begin(), ids.end(), 0);
      std::partial_sort(ids.begin(), ids.begin() + count, ids.end(),
                        [&](int32_t a, int32_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
      auto& guesses = out[(size_t)rows[(size_t)places[m].first]];
      for (int64_t i = 0; i < count; i++) {
        const int32_t id = ids[(size_t)i];
        guesses.push_back({places[m].second, std::string(folder.tokenizer.piece(id)), id, (double)row[id]});
      }
    }
  });
  return out;
}

std::vector<TextScore> score_texts(const ModelFolder& folder, std::span<const Example> examples, int64_t batch_tokens) {
  const Bert& bert = folder.bert;
  need_masked_words(bert, "--score");
  std::vector<TextScore> out(examples.size());
  for (size_t i = 0; i < examples.size(); i++) {
    const Example& e = examples[i];
    std::vector<size_t> tokens;
    for (size_t t = 0; t < e.ids.size(); t++)
      if (e.ids[t] != folder.tokenizer.cls && e.ids[t] != folder.tokenizer.sep) tokens.push_back(t);
    const size_t rows = (size_t)std::max<int64_t>(1, batch_tokens / std::max<int64_t>(1, (int64_t)e.ids.size()));
    for (size_t from = 0; from < tokens.size(); from += rows) {
      Batch batch;
      std::vector<int32_t> ids = e.ids;
      for (size_t k = from; k < std::min(tokens.size(), from + rows); k++) {  // a row for each token, that one masked
        ids[tokens[k]] = folder.tokenizer.mask;
        batch.masked.push_back(batch.tokens() + (int64_t)tokens[k]), batch.masked_labels.push_back(e.ids[tokens[k]]);
        batch.add_row(ids, e.segments);
        ids[tokens[k]] = e.ids[tokens[k]];
      }
      const Tensor logits = finite(bert.masked_logits(bert.forward(batch, batch.masked), batch.masked));
      for (int64_t m = 0; m < logits.rows(); m++) {  // one by one: a sum in float over a batch would depend on the batch
        const float* row = logits.data() + m * logits.cols();
        double sum = 0, highest = *std::max_element(row, row + logits.cols());
        for (int64_t v = 0; v < logits.cols(); v++) sum += std::exp((double)row[v] - highest);
        out[i].log_likelihood += (double)row[batch.masked_labels[(size_t)m]] - highest - std::log(sum);
      }
    }
    out[i].tokens = (int64_t)tokens.size();
  }
  return out;
}

Model Model::load(const std::string& folder, std::optional<Precision> precision) {
  Model m;
  m.folder_ = std::make_shared<const ModelFolder>(load_folder(folder, true, precision));
  return m;
}

// A text as ids. In what is classified "[SEP]" is a word like others: a user's text cannot inject a token. Where masks are asked for it is
// itself, as here, and in what is embedded too, as sentence-transformers does it: the vectors are to be the same.
static Example example_of(const ModelFolder& folder, std::string_view text) {
  EncodeOptions options;
  options.max_length = folder.max_length;
  Encoding e = folder.tokenizer.encode(text, options);
  return {std::move(e.ids), std::move(e.type_ids)};
}

std::vector<float> Model::embed(std::string_view text) const {
  const std::string copy(text);
  return embed({&copy, 1}, 1)[0];
}
std::vector<std::vector<float>> Model::embed(std::span<const std::string> texts, int64_t batch_tokens) const {
  std::vector<Example> examples(texts.size());
  parallel_for((int64_t)texts.size(), [&](int64_t i) { examples[(size_t)i] = example_of(*folder_, folder_->prompt + texts[(size_t)i]); });
  const Tensor v = embed_examples(folder_->bert, examples, folder_->pooling, batch_tokens);
  std::vector<std::vector<float>> out;
  for (size_t i = 0; i < texts.size(); i++) out.emplace_back(v.data() + (int64_t)i * v.cols(), v.data() + (int64_t)(i + 1) * v.cols());
  return out;
}
TextScore Model::score(std::string_view text) const {
  const Example e = example_of(*folder_, text);
  return score_texts(*folder_, {&e, 1}, 8192)[0];
}
std::vector<MaskGuess> Model::fill_mask(std::string_view text, int64_t top) const {
  const Example e = example_of(*folder_, text);
  return guess_masks(*folder_, {&e, 1}, top, 1)[0];
}
// What the model says of one item, however long.
Outcome Model::ask(const Item& item) const {
  const ModelFolder& f = *folder_;
  return answer_items({f.bert, f.tokenizer, f.pooling, f.prompt, f.max_length, f.config.stride(), 8192}, {&item, 1})[0];
}
void Model::need(Task task, const char* what) const {
  if (folder_->bert.task != task)
    throw Error(std::string(what) + ": the model is for " + head_kind(folder_->bert.task).name + ", not for " + head_kind(task).name);
}
std::vector<float> Model::classify(std::string_view text, std::optional<std::string_view> pair) const {
  const HeadKind& head = head_kind(folder_->bert.task);
  if (head.tokens || head.task == Task::choice || !(head.output || head.next_sentence))
    throw Error("classify: the model is for " + std::string(head.name) + ", which has no classes of texts");
  return probabilities(head.task, ask({std::string(text), pair ? std::optional(std::string(*pair)) : std::nullopt}).outputs);
}
std::vector<TextEntity> Model::tag(std::string_view text) const {
  need(Task::tag, "tag");
  const std::string copy(text);
  return entities_in(ask({copy, {}}), folder_->config.labels, copy);
}
Answer Model::answer(std::string_view question, std::string_view context) const {
  need(Task::qa, "answer");
  return ask({std::string(question), std::string(context)}).answer(folder_->config.null_threshold);
}
std::vector<float> Model::choose(std::string_view text, std::span<const std::string> choices) const {
  need(Task::choice, "choose");
  return probabilities(Task::choice, ask({std::string(text), {}, {}, {choices.begin(), choices.end()}}).outputs);
}
float Model::similarity(std::string_view a, std::string_view b) const {
  need(Task::embed, "similarity");
  return ask({std::string(a), std::string(b)}).outputs[0];
}

// ==== fingerprints ================================================================================================
void Fingerprint::bytes(std::string_view s) {
  for (size_t i = 0; i < s.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, s.data() + i, std::min<size_t>(8, s.size() - i));
    number(word);
  }
  number(s.size());
}

void Fingerprint::add(const Example& e) {
  add(e.ids), add(e.segments), add(e.targets), number((uint64_t)e.label), add(e.labels);
  for (const Example& other : e.others) add(other.ids);
}

bool Fingerprint::file(const std::string& path) {
  std::FILE* const f = std::fopen(path.c_str(), "rb");
  if (!f) return false;
  std::string part(1 << 20, 0);
  for (size_t n; (n = std::fread(part.data(), 1, part.size(), f)) > 0;) bytes(std::string_view(part).substr(0, n));
  std::fclose(f);
  return true;
}

uint64_t folder_fingerprint(const std::string& folder) {
  std::set<std::string> files;
  for (const char* name : carried_files) files.insert(name);
  std::error_code none;
  for (const auto& entry : fs::recursive_directory_iterator(folder, none)) {
    const std::string name = fs::relative(entry.path(), folder).string(), file = entry.path().filename().string();
    if (name == "config.json" || starts_with_any(file, {"model", "pytorch_model"})) files.insert(name);
  }
  Fingerprint all;
  for (const std::string& name : files)
    if (all.file(folder + "/" + name)) all.bytes(name);
  return all.state;
}

}  // namespace bert
