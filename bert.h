// bert.h -- BERT in one header: a WordPiece tokenizer, the encoder with its heads, training, and Model for embedding programs.
//
//   To use:     copy tensor.h tensor.cpp autograd.cpp bert.h bert.cpp wordpiece.cpp; compile as C++20 with -O2 -ffp-contract=off
//               -pthread, link -lopenblas -ldl. The tokenizer alone: bert.h, tensor.h, wordpiece.cpp, and no OpenBLAS.
//   Threads:    a loaded Model, Bert or WordPiece is read-only: one of them, any number of threads.
//   Errors:     bert::Error; nothing prints, exits or aborts. Progress goes to callbacks that the caller owns.
//   Not here:   reading data files (main.cpp), decoders, tokenizers other than WordPiece.
//
//   A complete program:
//
//     #include "bert.h"
//     int main() {
//       bert::Model model = bert::Model::load("models/all-MiniLM-L6-v2");
//       std::vector<float> v = model.embed("A sentence to embed.");     // hidden_size floats
//     }
//
//   Contents:   1 WordPiece  2 config  3 batches  4 the model  5 training  6 pretraining data  7 tasks  8 metrics
//               9 model folders and Model  10 fingerprints
#pragma once
#include <bit>
#include <future>

#include "tensor.h"

namespace bert {

// ==== 1 WordPiece ======================================================================================= [wordpiece.cpp]
struct TokenizerSettings {
  bool lowercase = true;
  std::optional<bool> strip_accents;       // unset: as lowercase
  bool chinese = true;                     // a space on both sides of each Chinese character
  bool clean_text = true;                  // control characters go, white space becomes a space
};

// Tokens of a text or a pair, with what was added around them. All vectors have one entry a token.
struct Encoding {
  std::vector<int32_t> ids, type_ids;      // type_ids: 0 for the first text, 1 for the second
  std::vector<int32_t> words;              // number of the word (from 0 in each text); -1 for added tokens
  std::vector<int32_t> sequence;           // 0 or 1: which text; -1 for added tokens
  std::vector<uint8_t> special;            // 1 for added tokens
  std::vector<std::array<int64_t, 2>> offsets;   // [begin, end) in the text's bytes; [0, 0] for added tokens
};

enum class Truncation { longest_first, only_first, only_second };
struct EncodeOptions {
  bool add_special = true;                 // [CLS] a [SEP], or [CLS] a [SEP] b [SEP]
  bool parse_special = true;               // [MASK] and its like in the text are themselves; false: plain text
  int64_t max_length = 0;                  // including the added tokens; 0: no limit
  Truncation truncation = Truncation::longest_first;
  bool from_left = false;                  // cut the beginning instead of the end
  int64_t stride = 0;                      // overlap of the windows that encode_windows returns
  static EncodeOptions bare() { return {.add_special = false, .parse_special = false}; }
};
// A padding block of tokenizer.json. Nothing here pads: batches are packed.
struct Padding {
  int64_t length = 0, multiple_of = 0;     // length 0: the batch's longest; then up to a multiple, where that is not 0
  bool left = false;
  int32_t id = 0, type_id = 0;
};

// Hugging Face's fast BERT tokenizer, rule by rule. Read-only after loading: any number of threads.
class WordPiece {
 public:
  // A model folder (vocab.txt or tokenizer.json, and tokenizer_config.json), or a vocab.txt itself.
  static WordPiece load(const std::string& folder_or_file);
  static WordPiece from_vocab(std::string_view vocab_txt, const TokenizerSettings& settings, const std::string& where);

  Encoding encode(std::string_view text, const EncodeOptions& options = {}) const;
  Encoding encode(std::string_view text, std::string_view pair, const EncodeOptions& options = {}) const;
  // The encoding and, where it was cut, the windows that hold the rest, `stride` tokens of each repeated in the next.
  std::vector<Encoding> encode_windows(std::string_view text, const std::optional<std::string_view>& pair,
                                       const EncodeOptions& options) const;
  // Texts that are split into words already: Encoding::words counts the given words, offsets are in each word's bytes.
  std::vector<Encoding> encode_words_windows(std::span<const std::string> words, std::span<const std::string> pair, bool has_pair,
                                             const EncodeOptions& options) const;
  WordPiece with_settings(const TokenizerSettings& settings) const;   // the same vocabulary under other settings
  // Appends encode's ids, at a fraction of its cost. Without options the pieces and nothing else: [MASK] and its like are plain text.
  void append_ids(std::string_view text, std::vector<int32_t>& ids, const EncodeOptions& options = EncodeOptions::bare()) const;
  // The same of many texts, on `threads` threads; the answer is one thread's. ends: where in ids each text's end.
  void append_ids(std::span<const std::string_view> texts, std::vector<int32_t>& ids, std::vector<int64_t>& ends, int threads,
                  const EncodeOptions& options = EncodeOptions::bare()) const;
  // Appends the pieces as they stand in the vocabulary, joined by spaces.
  void append_pieces(std::span<const int32_t> ids, std::string& out) const;
  std::string decode(std::span<const int32_t> ids, bool skip_special = false, bool cleanup = true) const;

  int64_t size() const;                    // pieces: the vocabulary's largest id + 1
  std::string_view piece(int32_t id) const;   // "" where the id has none
  int32_t id(std::string_view piece) const;   // -1 when absent
  int32_t pad = -1, unk = -1, cls = -1, sep = -1, mask = -1;   // -1 when the vocabulary lacks it
  bool continuation(int32_t id) const;        // the piece begins with ##
  const TokenizerSettings& settings() const;
  int64_t model_max_length = 0;               // tokenizer_config.json's where it is sane, else 0
  std::vector<std::string> warnings;          // what was odd while loading, for the caller to show
  std::optional<EncodeOptions> file_truncation;   // tokenizer.json's blocks, for who asks: encode does not obey them
  std::optional<Padding> file_padding;

 private:
  friend struct TokenizerFiles;
  struct Tables;
  std::shared_ptr<const Tables> tables_;
};

// Trains a vocabulary from words and their counts.
class VocabTrainer {
 public:
  // max_memory: bytes for the words; beyond, the rarest are dropped while counting, and then the text's order matters; 0: no limit
  explicit VocabTrainer(const TokenizerSettings& settings, int64_t max_memory = 0);
  void add_text(std::string_view text, int64_t times = 1);   // counts its words
  struct Options {
    int64_t size = 30000, min_count = 2, alphabet = 0;   // alphabet 0: every character seen min_count times, at most half of size
    std::function<void(int64_t pieces)> on_progress;
    std::function<void(int64_t left_out, int64_t characters)> on_left_out = {};   // when the alphabet has no room for all
    const WordPiece* extend = nullptr;     // a vocabulary whose pieces stay, under their ids; words begin as those
  };
  // The lines of vocab.txt: [PAD] [UNK] [CLS] [SEP] [MASK] (or what is extended), the alphabet, pieces in the order made. At most `size`.
  std::vector<std::string> train(const Options& options) const;
  int64_t words() const, distinct_words() const;
  int64_t dropped_count() const;           // words seen up to this often were dropped for max_memory; 0: none was

 private:
  struct State;
  std::shared_ptr<State> state_;
};
// tokenizer_config.json for a vocabulary of our own, as transformers reads it.
std::string tokenizer_config_json(const TokenizerSettings& settings, int64_t max_length);
// Invalid UTF-8 becomes U+FFFD, one for each maximal invalid part (Unicode's recommended practice); returns how many.
int64_t repair_utf8(std::string& text);
bool valid_utf8(std::string_view text);    // nothing to repair
// The encoding's offsets counted in code points of the texts it was made of, instead of bytes.
std::vector<std::array<int64_t, 2>> code_point_offsets(const Encoding& encoding, std::string_view text, std::string_view pair = {});
const char* unicode_tables();              // what the Unicode tables were made from
// The code point at s[i], U+FFFD for invalid bytes, and how many bytes it takes.
char32_t code_point(std::string_view s, size_t i, size_t& bytes);
char32_t lower_case(char32_t c);           // İ loses its dot: the only one whose lower case would be two
bool is_white_space(char32_t c);           // Unicode's White_Space
bool is_letter(char32_t c);                // a letter, digit or number, as Python's isalnum but for rare signs; no mark
const char* script_of(char32_t c);         // latin, chinese, digits, other ...: by the Unicode block that it stands in

// ==== 2 config =================================================================================================== [bert.cpp]
std::string join(std::span<const std::string> parts, const std::string& between);
std::vector<std::string> split(std::string_view text, char at);

struct Config {   // config.json, by the names there
  int64_t vocab_size = 0, hidden_size = 0, num_hidden_layers = 0, num_attention_heads = 0, intermediate_size = 0;
  int64_t max_position_embeddings = 512, type_vocab_size = 2, pad_token_id = 0;
  int64_t embedding_size = 0;                  // of ELECTRA's embeddings; 0: hidden_size
  Activation hidden_act = Activation::gelu;
  double hidden_dropout_prob = 0.1, attention_probs_dropout_prob = 0.1, initializer_range = 0.02, layer_norm_eps = 1e-12;
  std::optional<double> classifier_dropout;    // unset: hidden_dropout_prob
  std::string model_type = "bert";             // or distilbert, electra
  std::string architecture;                    // BertForPreTraining ...; "" where the file names none. A cousin's class by BERT's name
  std::string problem_type;                    // single_label_classification, multi_label_classification, regression, or ""
  std::vector<std::string> labels;             // id2label in order; empty where the file has none
  std::optional<Precision> quantized;          // products are in what each weight is stored in; the one of most: of `bert quantize`
  std::optional<double> null_threshold;        // qa: above it "no answer" is the answer; unset: there always is one
  // Of a fine-tuned folder: tokens of a window, and those that two of them share, in training and in answering; unset: all positions, 128
  std::optional<int64_t> window_length, window_stride;
  int64_t stride() const { return window_stride.value_or(128); }
  // Throws Error "where: key: ..." for what is missing or impossible. type_of_tensors: the model_type where the file does not say it.
  static Config parse(std::string_view json, const std::string& where, const std::string& type_of_tensors = "bert");
  static Config named(const std::string& name, int64_t vocab_size);   // tiny mini small medium base large minilm (facts: table of sizes)
  std::string to_json(const std::string& torch_dtype = "float32") const;
  std::string class_name() const;                                     // transformers' class: DistilBertForMaskedLM
  int64_t embedding() const { return embedding_size ? embedding_size : hidden_size; }
};

// ==== 3 batches ==================================================================================================
using Tokens = std::vector<int64_t>;               // some of a batch's, by their packed indices
// Rows packed one after another, without padding: no mask anywhere.
struct Batch {
  std::vector<int32_t> ids, segments, positions;   // [N]
  Offsets offsets{0};                              // [R+1]
  // what a loss or a masked-word head asks for:
  Tokens masked;                                   // [M] the masked tokens, ascending
  std::vector<int32_t> masked_labels;              // [M] its true id
  std::vector<int32_t> labels;                     // kIgnored: none. By the task: [R] class; [R] next sentence: 0 next, 1 random;
                                                   // tag [N] each token's; qa [R,2] start and end in the row; choice [G] the right row
  std::vector<float> targets;                      // [R,C] numbers (regression) or zeros and ones (multi-label); [G] of text pairs
  Offsets groups{0};                               // [G+1] rows that belong together: one question's choices, texts to compare

  int64_t tokens() const { return (int64_t)ids.size(); }
  int64_t rows() const { return (int64_t)offsets.size() - 1; }
  void add_row(std::span<const int32_t> ids, std::span<const int32_t> segments);   // positions count from 0
};

// ==== 4 the model ================================================================================================
struct Dense { Tensor weight, bias; };             // [out, in], [out]
using Norm = Dense;                                // gamma, beta [H]

struct Layer {
  Dense qkv;                                       // [3H,H]: query, key, value of the checkpoint, stacked
  Dense attention_out;                             // [H,H]
  Norm attention_norm;
  Dense up, down;                                  // [F,H], [H,F]
  Norm output_norm;
};

// What a model ends in. One row of a table in bert.cpp each.
// (`replaced`: ELECTRA's discriminator, a logit for each token.)
enum class Task { embed, pretrain, mlm, next_sentence, classify, multilabel, regress, tag, qa, choice, replaced };
struct HeadKind {
  Task task;
  const char* name;                                // of --task, or of what `bert info` prints
  const char* architecture;                        // transformers' class
  const char* problem_type;                        // config.json's, or ""
  bool pooler, masked_words, next_sentence;        // which parameters it has beyond the encoder
  const char* output;                              // the name of the layer that the answers come from, or null
  int64_t outputs;                                 // its rows; 0: one a label
  bool tokens;                                     // it is asked of every token, not of the row
  int64_t classes(const Config& config) const { return next_sentence ? 2 : outputs ? outputs : (int64_t)config.labels.size(); }
};
const HeadKind& head_kind(Task task);
const HeadKind* find_head(std::string_view name);   // null when there is none
const HeadKind& head_kind(const Config& config);   // by architecture and problem_type; throws Error naming one that is not built

// A parameter under its Hugging Face name: `rows` rows of `tensor` from `first_row` on.
struct Parameter {
  std::string name;
  Tensor tensor;
  int64_t first_row = 0, rows = 0;                 // of a vector: elements
  Shape shape() const;
  float* data() const { return tensor.data() + first_row * tensor.size() / tensor.shape()[0]; }
  bool decay() const;                              // false for biases and LayerNorm
};

// How a text's vector is made of its tokens': pooled (in several ways: side by side), through dense layers, normalised.
struct Pooling {
  enum Kind { mean, cls, max, pooler, mean_sqrt, weighted_mean, last };
  struct Layer { Dense dense; Activation activation; };
  std::vector<Kind> kinds = {mean};
  std::vector<Layer> layers;
  bool normalize = false;
  bool has(Kind kind) const { return std::find(kinds.begin(), kinds.end(), kind) != kinds.end(); }
  int64_t width(int64_t hidden) const { return layers.empty() ? hidden * (int64_t)kinds.size() : layers.back().dense.weight.rows(); }
  std::string name() const;                        // mean; cls+mean; ...
};

struct Bert {
  Config config;
  Task task = Task::embed;
  Tensor word, position, segment;                  // [V,E] [P,E] [S,E]; E is H but in ELECTRA
  Norm embeddings_norm;
  Dense projection;                                // [H,E]; empty where E is H
  std::vector<Layer> layers;
  Dense pooler;                                    // [H,H]; these are empty where the task has none
  Dense transform;                                 // [E,H]  masked words: dense, activation, LayerNorm, then word^T + decoder_bias
  Norm transform_norm;
  Tensor decoder_bias;                             // [V]
  Dense next_sentence;                             // [2,H]
  Dense classifier;                                // [C,H]; qa_outputs of question answering
  Tensor decoder;                                  // [V,H] packed copy of `word` for masked words; made by pack()

  // Every parameter drawn as Google's BERT does: normal(0, initializer_range) cut at two deviations; biases 0, LayerNorm 1 and 0.
  static Bert random(const Config& config, Task task, uint64_t seed);
  static Bert empty(const Config& config, Task task);   // storage without values
  std::vector<Parameter> parameters() const;       // each once, in checkpoint order
  int64_t parameter_count() const;
  void draw_again(int64_t layers, uint64_t seed);  // the top layers, and the pooler, begin anew
  // For inference: linear weights into panels, those of layers and decoder in this precision; what is narrow already stays as it is.
  // The word embeddings stay plain, and their rows are rounded when they are looked up.
  void pack(Precision precision = Precision::f32);
  Precision table_rounded = Precision::f32;        // by pack()

  // The encoder: packed tokens -> [N,H]. For the output of layer l take a copy whose `layers` are cut to l: copies share their numbers.
  // recompute: of each layer a tape keeps the input alone. read: the tokens whose output is wanted, ascending (empty: all). The last layer
  // makes theirs alone, and the others' is 0: masked words are a seventh of the tokens, and [CLS] is one of a row.
  Tensor forward(const Batch& batch, Dropout& drop, bool recompute = false, const Tokens& read = {}) const;
  Tensor forward(const Batch& batch, const Tokens& read = {}) const;   // without dropout
  // The tokens whose output the model's head reads, or `pooling` where it has no head; empty: all. What forward takes as `read`.
  Tokens read_by_head(const Batch& batch, const Pooling& pooling = {}) const;
  Tensor pooled(const Tensor& hidden, const Batch& batch) const;                               // tanh(W h_CLS + b)  [R,H]
  Tensor masked_logits(const Tensor& hidden, const Tokens& masked) const;                      // [M,V]
  Tensor masked_loss(const Tensor& hidden, const Batch& batch, double divisor, int64_t* right) const;   // [1] for training: not packed
  // Of the head that answers about rows [R,C], or about tokens [N,C]: tags; start and end; above 0: the token was replaced.
  Tensor logits(const Tensor& hidden, const Batch& batch, Dropout& drop) const;
};

// How texts are compared in training for similarity: the cosine against a number; each text's partner among all partners of the batch
// (Henderson et al. 2017, section 4.4); alike or not (Hadsell et al. 2006); closer to the second text than to the third (Schroff et al.
// 2015).
enum class PairLoss { cosine, inbatch, contrastive, triplet };
// What a loss may be told beside the model and the batch.
struct LossRule {
  ClassRule classes;                               // classify, tag
  PairLoss pairs = PairLoss::cosine;
  double temperature = 0.05;                       // inbatch: cosines are divided by it
  Pooling pooling;                                 // similarity: how a text's vector is made
};
// Counts that a whole step's losses are divided by.
struct LossCounts { double masked = 0, rows = 0; };
struct Losses { double total = 0, masked = 0, next_sentence = 0; int64_t masked_right = 0, next_right = 0; };
// The loss of a batch for the model's task, as a Tensor [1] for Tape::backward; its parts are added to `report`.
Tensor batch_loss(const Bert& model, const Tensor& hidden, const Batch& batch, const LossCounts& counts, Dropout& drop, Losses& report,
                  const LossRule& rule = {});

// ==== 5 training =================================================================================================
struct TrainSettings {
  int64_t steps = 0;                               // 0: by minutes (pretraining) or epochs (fine-tuning)
  int64_t accumulate = 1;                          // micro-batches of a step, a power of two
  double lr = 1e-4, warmup = 0.1;                  // peak rate; warm-up as a share of the steps
  Schedule schedule = Schedule::linear;
  AdamWSettings optimizer;
  double clip = 1.0;                               // global norm; 0: none
  Precision products = Precision::f32;             // or bf16; weights, sums, norms, softmax and moments stay f32
  double dropout = -1;                             // hidden and attention; negative: the config's
  double layer_decay = 1;                          // each layer's rate is this times that of the one above it; the heads' is lr
  int64_t freeze = 0;                              // so many layers, and the embeddings, keep their weights
  bool skip_spikes = false;                        // a step that is a spike, or not finite, changes nothing instead of being made or thrown
  LossRule loss;
  bool recompute = false;                          // each layer once more in backward: less memory, a third more time, the same bytes
  uint64_t seed = 1;
};
struct StepReport {
  int64_t step = 0, steps = 0;                     // steps done and in all
  int64_t tokens = 0, rows = 0, masked = 0;
  Losses loss;
  double lr = 0, grad_norm = 0;
  double flops = 0;                                // of its products by formula, forward and backward, whatever was computed twice
  std::string fault;                               // a spike, or not finite: where, and in which row of the batches
  bool skipped = false;                            // for that its update was left out
};
// A forward's products, 2 a multiply-add: the six of a layer and attention's two, without the heads'. read: as Bert::forward takes it.
double forward_flops(const Config& config, const Batch& batch, const Tokens& read = {});

// What a pretraining run holds at the moment when it holds most, in bytes: while the loss is made, or at the end of backward. tokens: of a
// micro-batch. Activations are what ops keep for backward, of which autograd.cpp says how much; buffers what is made and let go in between,
// what the pool of tensors cannot fill, and the program.
struct MemoryUse {
  double weights = 0, gradients = 0, moments = 0, activations = 0, buffers = 0;
  double total() const { return weights + gradients + moments + activations + buffers; }
};
MemoryUse training_memory(const Bert& model, const TrainSettings& settings, int64_t tokens, int64_t masked);

// One model, its optimiser and where it stands.
class Trainer {
 public:
  Trainer(Bert model, const TrainSettings& settings);
  // One step over micro-batches that together make the batch: for each one forward, loss, backward, from gradients of zero; added in a
  // binary tree by index; clip; AdamW. Throws Error naming step, layer, tensor and row, the model unchanged, when loss or a gradient is not
  // finite; with skip_spikes when it would skip the 20th step in a row. A spike (of masked words only): after 100 updates the loss is
  // above 1.5 times its running mean, and above that mean by 6 standard deviations. Both are of the updates made, with a memory of 100;
  // the deviation is that of one step from the next, so that a loss that falls does not widen it.
  StepReport step(std::span<const Batch> micro_batches);
  const Bert& model() const { return model_; }
  const TrainSettings& settings() const { return settings_; }
  void set_steps(int64_t steps) { settings_.steps = steps; }
  int64_t done() const { return done_; }           // steps made
  // The whole state in one safetensors file: parameters, both moments, steps, and `about` (the caller's own settings and place).
  void save(const std::string& path, const std::map<std::string, std::string>& about) const;
  std::map<std::string, std::string> load(const std::string& path);   // returns `about`

 private:
  Bert model_;
  TrainSettings settings_;
  AdamW optimizer_;
  int64_t done_ = 0, skipped_in_a_row_ = 0;
  double loss_mean_ = 0, loss_variance_ = 0, last_loss_ = 0;   // of the updates made, the first two running
  bool spike(const StepReport& report) const;
};

// The states of a run in its folder: training_state.safetensors and, before it, training_state-1.safetensors ...: at every moment one whole
// file bears a name that load looks for.
class TrainingStates {
 public:
  using About = std::map<std::string, std::string>;
  TrainingStates(const std::string& folder, int64_t keep);   // keep: files, at least 1
  bool any() const;
  void save(const Trainer& trainer, const About& about) const;
  // The newest state that can be read; empty where there is none. Throws Error where it is not of this `run`, whose settings (under
  // --name), "data" and "weights" must be the same; says when its "backend" is another, and when a newer state could not be read.
  About load(Trainer& trainer, const About& run, const std::function<void(const std::string&)>& say) const;
  void remove_all() const;

 private:
  std::string folder_;
  int64_t keep_;
  std::string name(int64_t i) const;
  void check(const About& run, const About& stored, const std::function<void(const std::string&)>& say) const;
};

// ==== 6 pretraining data =========================================================================================
// The sentences of a line: cut after . ! ? and what closes quotes and brackets, where white space follows, and after their full-width
// forms. Nothing is lost: the rest of the line is a sentence too.
std::vector<std::string_view> split_sentences(std::string_view line);
struct TextSize { int64_t tokens = 0, sentences = 0, documents = 0; };
// A text as ids: sentences in documents.
struct Corpus {
  std::vector<int32_t> ids;
  std::vector<int64_t> sentences{0};               // sentence s is ids[sentences[s] .. sentences[s+1])
  std::vector<int64_t> documents{0};               // document d is sentences documents[d] .. documents[d+1]
  std::vector<int64_t> sources;                    // of a window: the document of the whole text that each is, or is a part of; else empty
  TextSize size() const { return {(int64_t)ids.size(), (int64_t)sentences.size() - 1, (int64_t)documents.size() - 1}; }
  void end_sentence();                             // closes what was appended to ids; an empty one is dropped
  void end_document();
  void add_sentences(std::span<const int64_t> bounds, const int32_t* ids);   // sentence i is ids[bounds[i] .. bounds[i+1])
};

// A text's ids in files of about a million tokens, FOLDER/00000.ids and on, made once, mapped where they are read. Of the text itself
// nothing is held in memory but a table of its blocks: runs of documents of some 2^15 tokens (a longer document's parts lie in several).
// An epoch goes through the blocks in an order of its own, in windows of at most some 2^20 tokens: as many blocks from anywhere.
// A file is 96 bytes of header, then documents and sentences as Corpus has them, int64, then the ids, int32.
class Shards {
 public:
  static constexpr int64_t kTokens = 1 << 20;      // of a shard: whoever adds closes one when it has so many
  // Opens the shards of this key (of text, vocabulary and settings; unset: none fits), as far as they go without a gap. Throws Error
  // for a file that is damaged, cut short or something else; `pieces`: the vocabulary's size.
  Shards(std::string folder, std::optional<uint64_t> key, int64_t pieces);
  bool whole() const { return !shards_.empty() && shards_.back().header.last; }
  bool stale() const { return stale_; }            // there was a shard for another key or of another version, which will be replaced
  int64_t rows() const { return shards_.empty() ? 0 : shards_.back().header.rows; }   // rows of the input that stand in them
  // The next shard: what follows in the text, up to this row of the input. On the disk when it returns. A document that is not ended
  // goes on in the next shard.
  void add(const Corpus& text, int64_t rows, bool last);
  // Takes text out as held-out text, about `share` of it and at most 100,000 tokens: whole documents chosen by the seed, two or more.
  // Where the text is too short for that or its documents are too long, stretches of up to 50 sentences, each a document there.
  Corpus hold_out(double share, uint64_t seed);
  bool in_stretches() const { return in_stretches_; }
  // Without what is held out:
  TextSize size() const { return size_; }
  const std::vector<int64_t>& counts() const { return counts_; }   // [pieces] how often each stands in it
  int64_t windows() const;                         // of an epoch
  Corpus window(int64_t number, const PhiloxKey& order) const;     // throws Error when a shard has changed since
  uint64_t fingerprint() const;                    // of all ids, sentences and documents

 private:
  struct Header {
    char magic[8] = {'b', 'e', 'r', 't', ' ', 'i', 'd', 's'};
    uint64_t version = 1, key = 0, data = 0;       // version: also of how text is cut into sentences; data: fingerprint of what follows
    int64_t number = 0, rows = 0, tokens = 0, sentences = 0, documents = 0;
    uint64_t open = 0, last = 0;                   // open: the last document goes on in the next shard
    uint64_t header = 0;                           // fingerprint of the above
  };
  struct View {                                    // a shard, mapped
    std::span<const int64_t> documents, sentences;
    const int32_t* ids;
    std::shared_ptr<const void> owner;
  };
  struct Shard { Header header; int64_t first_document, first_sentence; };   // numbers in the whole text
  struct Block { int64_t shard, begin, end, tokens; };   // sentences of the shard
  struct Stretch { int64_t begin, end, tokens; };        // sentences of the whole text
  std::string name(int64_t number) const;
  std::optional<View> open(int64_t number, Header& header) const;
  bool open_next();
  View view(int64_t shard) const;
  void append(const Block& block, const View& shard, Corpus& to) const;
  std::vector<Stretch> units(const Block& block, int64_t stretch) const;
  int64_t choose(const std::vector<int64_t>& order, int64_t stretch, int64_t want, int64_t most, Random& random);
  std::string folder_;
  std::optional<uint64_t> key_;
  bool stale_ = false, in_stretches_ = false;
  TextSize size_;
  int64_t tokens_ = 0;                             // with what is held out
  std::vector<int64_t> counts_;
  std::vector<Shard> shards_;
  std::vector<Block> blocks_;
  std::vector<Stretch> held_;                      // what is held out, ascending
  std::shared_ptr<FolderLock> lock_;               // while they are made
};
// What masking needs to know of a vocabulary.
struct MaskVocabulary {
  int32_t cls, sep, mask;
  std::vector<uint8_t> continues;                  // for each piece: it begins with ##
};
MaskVocabulary mask_vocabulary(const WordPiece& tokenizer);
struct PretrainSettings {
  int64_t batch_tokens = 8192, max_length = 128;   // max_length: of the first rows, where phases follow
  double mask = 0.15;
  bool whole_word = false, next_sentence = true;
};
// Replaces tokens of each row by [MASK] (80 %), a random id (10 %) or themselves (10 %) and lists them in batch.masked.
// Devlin et al. 2019, section 3.1; counts as google-research/bert create_pretraining_data.py. whole_word: a word's pieces together.
void mask_tokens(Batch& batch, const MaskVocabulary& vocabulary, double share, bool whole_word, const PhiloxKey& key);

// Batches without end: epoch after epoch, rows sampled anew, order from the seed. With next_sentence a row is a pair. Without it a row is a
// span: as many whole sentences of one document as max_length has room for (RoBERTa's DOC-SENTENCES, Liu et al. 2019, section 4.2).
// A longer sentence goes on in the next row, and nothing is lost. Since rows are packed there is nothing to fill up: each span is a row of
// its own, sees itself only, counts its positions from 0, and a batch takes rows to its budget of tokens.
class PretrainSampler {
 public:
  // Keeps a reference to the text, which is one window or many.
  PretrainSampler(const Corpus& text, const PretrainSettings& settings, const MaskVocabulary& vocabulary, uint64_t seed);
  PretrainSampler(const Shards& text, const PretrainSettings& settings, const MaskVocabulary& vocabulary, uint64_t seed);
  Batch next(int64_t step, int64_t micro);         // masked by (step, micro)
  struct Place { int64_t epoch = 0, window = 0, batch = 0, max_length = 0; };   // max_length: of the window's rows; 0: the settings'
  Place place() const { return {place_.epoch, place_.window, place_.batch, settings_.max_length}; }
  void go_to(Place place);                         // throws Error for a place that the text does not have
  void set_max_length(int64_t max_length);         // where it is another one: of the rows from the next window on, which begins here
  int64_t window_batches() const { return (int64_t)batches_.size(); }   // in the window begun

 private:
  struct Example { int64_t a_begin, a_end, b_begin, b_end; bool random; };   // token ranges in the window's ids
  PretrainSampler(const Corpus* corpus, const Shards* shards, const PretrainSettings& settings, const MaskVocabulary& vocabulary,
                  uint64_t seed);
  const Corpus& text() const { return corpus_ ? *corpus_ : window_; }
  void plan_window();
  void next_window();
  void plan_pairs(int64_t document, Random& random);
  void plan_spans(int64_t document);
  const Corpus* corpus_;                           // one of them is null
  const Shards* shards_;
  PretrainSettings settings_;
  MaskVocabulary vocabulary_;
  uint64_t seed_;
  Place place_;
  Corpus window_;
  std::vector<Example> examples_;
  std::vector<std::vector<int64_t>> batches_;
};
// BERT's phases: short rows first, long ones last, each with its share of the steps (Devlin et al. 2019, appendix A.2).
struct Phase { int64_t max_length; double share; };
int64_t max_length_at(std::span<const Phase> phases, int64_t step, int64_t steps);   // of the rows of this step, from 0
// The batches of one step after the other. A thread samples and masks the next step's while this one's are computed with: the same
// bytes as without it, since they depend on nothing but their place.
class StepBatches {
 public:
  struct Step {
    std::vector<Batch> micro;                      // `accumulate` of them
    PretrainSampler::Place after;                  // where a run goes on that has made this step
  };
  StepBatches(PretrainSampler sampler, const std::vector<Phase>& phases, int64_t accumulate, int64_t first, int64_t steps);
  StepBatches(StepBatches&&) = delete;             // nor is it copied
  Step next();                                     // of step `first`, then the following ones, up to steps - 1; throws what sampling threw

 private:
  void begin();
  PretrainSampler sampler_;
  std::vector<Phase> phases_;
  int64_t accumulate_, step_, steps_;
  std::future<Step> ahead_;                        // the last member: the thread uses the others
};
struct PretrainScores {   // on held-out text, masked once from the seed
  double masked_loss = 0, next_loss = 0, masked_accuracy = 0, next_accuracy = 0;
  double unigram_loss = 0;   // of the add-one-smoothed unigram of the training text on the same targets
  int64_t masked = 0, rows = 0;
  int64_t pairs = 0;         // rows asked for the next sentence; 0: next_loss and next_accuracy say nothing
};
PretrainScores evaluate_pretraining(const Bert& model, const Corpus& heldout, const PretrainSettings& settings,
                                    const MaskVocabulary& vocabulary, uint64_t seed, const std::vector<int64_t>& unigram_counts);

// ==== 7 tasks ====================================================================================================
// A row of data, in the user's own words.
struct Item {
  std::string text;                                // qa: the question; choice: what stands before every choice
  std::optional<std::string> pair;                 // the second text; qa: the context
  std::vector<std::string> words = {};             // tag: a text that comes in words; empty: they are found, as CoNLL's data has them
  std::vector<std::string> others = {};            // choice: the choices; similarity: the text to compare with, and one that is not alike
};
// What is right about it.
struct Gold {
  int32_t label = kIgnored;                        // classify; choice: the number of the right one
  std::vector<float> targets = {};                 // regress, similarity: one number; multilabel: C zeros and ones
  std::vector<int32_t> tags = {};                  // tag: one a word
  std::vector<std::string> answers = {};           // qa: each of them is right; none: there is no answer in the context
  std::vector<int64_t> starts = {};                // qa: where each begins in the context, in bytes
};
// What a data file says is right, in words.
struct Told {
  bool listed = false;                             // the answer was a list, else it is one text in answers[0]
  std::vector<std::string> answers = {};           // none: no label; tags: one a word
  std::vector<int64_t> starts = {};                // qa: where each begins in the context, in bytes
};
struct LabelledSet {                               // one gold an item
  std::vector<Item> items;
  std::vector<Gold> golds;
};
// The names of labels, by their numbers.
struct Labels {
  Task task = Task::classify;
  std::vector<std::string> names;
  std::map<std::string, int32_t> ids = {};
  void set(const std::vector<std::string>& list);
  // Those that items have: in the model's order where it has the same ones, else numbers by value, names by their bytes.
  void learn(std::span<const std::vector<std::string>> of_items, const std::vector<std::string>& of_model);
  void put_in(Gold& gold, std::span<const std::string> own) const;   // an item's, as numbers
  bool named() const { return task == Task::classify || task == Task::multilabel || task == Task::tag; }  // else outputs have no names
  std::string some() const;                        // for a message
};
// An item's gold without its labels, whose names are left in `names`, for put_in. known: of these names alone. Throws Error that says what
// does not do.
Gold make_gold(const Item& item, const Told& told, const Labels& labels, bool known, std::vector<std::string>& names);
struct Answer {                                    // a part of a text; qa: of the context
  std::string text;
  int64_t start = 0, end = 0;                      // bytes
  double score = 0;                                // probability among the best ones, of all windows
};
// What a model says of an item.
struct Outcome {
  std::vector<float> outputs = {};                 // classify, multilabel, regress: the head's [C]; choice: one each; similarity: cosine
  std::vector<int32_t> tags = {};                  // tag: each word's best one ...
  std::vector<float> scores = {};                  // ... its probability ...
  std::vector<std::array<int64_t, 2>> words = {};  // ... and where the word stands in the text, in bytes
  std::vector<Answer> answers = {};                // qa: the best parts of the context, best first
  double null_margin = 0;                          // qa: the score of "no answer" in the window of the best part, less that part's
  int64_t cut_to = 0;                              // as of its windows
  Answer answer(std::optional<double> null_threshold) const;   // qa: the best part; an empty one where the margin is above the threshold
};

// Similarity: throws Error unless an item holds what the loss compares; where that is no score, its score goes.
void check_partner(const Item& item, Gold& gold, PairLoss loss);
bool only_partners(Task task, std::span<const Gold> golds);   // texts to compare, and no score

// One labelled text or pair as ids.
struct Example {
  std::vector<int32_t> ids, segments;
  int32_t label = kIgnored;                        // classify; choice: the number of the right one
  std::vector<float> targets = {};                 // regress: one number; multilabel: C zeros and ones; similarity: none or one number
  std::vector<int32_t> labels = {};                // tag: one a token, kIgnored where none is asked; qa: start and end, 0 0: no answer
  std::vector<Example> others = {};                // choice: the further choices; similarity: the texts to compare with
};
// A stretch of an item that fits the model, as ids, and where its tokens stand in the text that is asked about.
struct Window {
  Example example;
  std::vector<int32_t> words = {};                 // [T] each token's word; -1: not of that text
  std::vector<std::array<int64_t, 2>> places = {}; // [T] its bytes there; of given words: in the word
  std::vector<uint8_t> starts = {}, decides = {};  // [T] the first piece of a word; no other window sees more around it
  int32_t part = 0;                                // choice: which one; similarity: which text
  int64_t cut_to = 0;                              // of a pair's text that stands in every window: the pieces left of it; 0: all
};
// The item in windows of at most max_length tokens, `stride` tokens of each repeated in the next (at most half of what a window has room
// for). Of a pair the longer text goes through the windows; of a question at most its first 64 pieces stand in each. A text to tag, not
// given as words, or a context to answer from that needs several goes paragraph by paragraph, if so told: to a blank line, where there is
// none to the end of a line. Similarity: each text by itself, with the prompt in front.
std::vector<Window> make_windows(const WordPiece& tokenizer, Task task, const Item& item, int64_t max_length, int64_t stride,
                                 const std::string& prompt = "", bool paragraphs = true);
// What to train with: every window of tags and questions, otherwise the first one. An answer that a window does not hold whole is at [CLS].
std::vector<Example> make_examples(Task task, std::vector<Window> windows, const Gold& gold);
// All items so, made in parallel; cut: how many have more text than is trained with.
std::vector<Example> training_examples(const WordPiece& tokenizer, Task task, const LabelledSet& set, int64_t max_length, int64_t stride,
                                       const std::string& prompt, int64_t& cut);
bool in_windows(std::span<const Window> windows);  // some text of the item did not fit into one
int64_t cut_to(std::span<const Window> windows);   // what is left of the pair's other text, in pieces; 0: all of it
// Takes items out as a held-out set: `share` of them, chosen by the seed, of each class (rarest label or tag, tenth of the numbers) its
// share; at least one, and one stays. Questions about one context stay together, where there are several contexts.
LabelledSet hold_out(LabelledSet& set, Task task, double share, uint64_t seed);
// How often each label is right: of items, or of words.   [C]
std::vector<double> label_counts(std::span<const Gold> golds, size_t classes);
// What makes all labels count alike: n / (C its own number), as scikit-learn's "balanced"; 0 where there is none.   [C]
std::vector<float> balanced_weights(const std::vector<double>& counts);
// The batches of every step: epoch after epoch, each in an order from the seed; its last step takes what is left.
class FinetuneSampler {
 public:
  FinetuneSampler(std::span<const Example> examples, int64_t batch, int64_t accumulate, uint64_t seed);   // keeps the span
  int64_t epoch_steps() const;
  std::vector<Batch> next(int64_t step);           // at most `accumulate` batches of at most `batch` examples

 private:
  void arrange(int64_t epoch);
  std::span<const Example> examples_;
  int64_t batch_, accumulate_, epoch_ = -1;        // epoch_: whose order it is
  uint64_t seed_;
  std::vector<int64_t> order_;
};
// Of examples, in their order, computed in batches to a token budget: raw outputs of the head [examples, C], or of every token
// [tokens of all, C]; the encoder's output [tokens of all, H]; vectors [examples, width].
Tensor head_outputs(const Bert& model, std::span<const Example> examples, int64_t batch_tokens);
Tensor token_vectors(const Bert& model, std::span<const Example> examples, int64_t batch_tokens);
Tensor embed_examples(const Bert& model, std::span<const Example> examples, const Pooling& pooling, int64_t batch_tokens);
std::vector<Example> examples_of(std::span<const std::vector<Window>> windows);   // one after another

// ==== 8 metrics ==================================================================================================
// low, high: bootstrap 95 % interval from the seed; NaN where none is drawn (averages beside the main ones, single classes).
struct Metric { std::string name; double value, low, high; };
using Scores = std::vector<std::pair<std::string, double>>;   // figures by name, in order
// The task's official metrics, an item at a time: it keeps a few numbers of each, no text.
class Scorer {
 public:
  // similarity: Task::embed, whose items have one target each. Throws Error for a task that has no labelled items.
  Scorer(Task task, std::vector<std::string> labels);
  void add(const Outcome& said, const Gold& is);   // throws Error when they do not fit each other or the task
  int64_t size() const { return items_; }
  // The main one first. qa: an item whose null_margin is above null_threshold counts as answered by "no answer". Without a seed the main
  // figures alone, without intervals: for a look in between.
  std::vector<Metric> metrics(std::optional<uint64_t> seed, std::optional<double> null_threshold = {}) const;
  // qa: the one that F1 is largest with; of several the smallest, which answers least. Always some item's margin: the last to be
  // answered; where it is best to answer none, less than all of them.
  double best_null_threshold() const;
  std::vector<int64_t> confusion() const;          // classify: [C,C], row: is, column: said
  // Where all items were given one and the same answer, and not all have it: says which. Not of numbers, nor of answers to questions.
  std::optional<std::string> only_answer() const;
  bool flat() const;                               // regress, similarity: all said is one number, or all right ones are: no correlation

 private:
  using Which = std::span<const int64_t>;          // items, some of them perhaps several times: that is how the bootstrap draws
  void add_tags(std::span<const int32_t> said, std::span<const int32_t> is, float* row);
  Scores scores(Which which, std::optional<double> null_threshold, bool all) const;   // all: also those without interval
  Scores class_scores(Which which, bool all) const;
  Scores tag_scores(Which which, bool all) const;
  Scores answer_scores(Which which, std::optional<double> null_threshold, bool all) const;
  std::array<double, 2> answer_score(int64_t item, std::optional<double> null_threshold) const;   // exact, F1
  const float* row(int64_t item) const { return rows_.data() + item * width_; }
  Task task_;
  std::vector<std::string> labels_, types_;        // types_: of the entities, or where tags name none the labels; none where too many
  int64_t items_ = 0, width_ = 0;                  // width_: numbers of an item
  bool entities_ = false, iob1_ = true, iob2_ = true;   // tag: there are entities; all right tags so far were legal in this scheme
  std::vector<float> rows_;                        // [items, width], laid out as bert.cpp says
  std::vector<double> margins_;                    // qa: each null_margin as it is, so that a threshold parts the same items again
};
// Where the model is wrong about an item: how wrong, and for people the item, what is right and what it said. Nothing where it is right.
struct Mistake {
  double size;
  std::string text, right, said;
};
std::optional<Mistake> find_mistake(const Labels& labels, const Item& item, const Gold& is, const Outcome& said,
                                    std::optional<double> null_threshold = {});
// How high each query's own candidate (that of its number) ranks among all by cosine; a candidate as near as it counts as nearer.
//   queries, candidates [n,D]; mrr: mean of 1 / rank (Voorhees 1999), recall_1, recall_10: share of those with rank <= k; intervals
//   where there is a seed
std::vector<Metric> rank_scores(const Tensor& queries, const Tensor& candidates, std::optional<uint64_t> seed = {});

// ==== 9 model folders and Model ==================================================================================
// Where every tensor of the file and of the model went. Nothing is silent.
struct LoadReport {
  std::vector<std::string> loaded, tied, newly_initialised, ignored, unexpected;
};
// A model folder read: config, tokenizer, weights, and the files that travel with them unchanged.
struct ModelFolder {
  Config config;
  WordPiece tokenizer;
  Bert bert;
  Pooling pooling;
  int64_t max_length = 0;                          // by the order that cli.md gives
  std::string prompt;                              // in front of every text to embed: the folder's default prompt
  LoadReport report;
  std::map<std::string, std::string> carried;      // vocab.txt, tokenizer.json, tokenizer_config.json ...: name, bytes
};
// Throws Error that says what the folder lacks, and to a newcomer where models come from. weights: whether it must hold them.
void check_folder(const std::string& folder, bool weights = true);
// Throws Error for a folder to write that holds something else, and with `resume` for one that holds no run; unset: what writes it has no
// --resume.
void check_output(const std::string& folder, std::optional<bool> resume, bool overwrite);
// The tokenizer's files as they are, of a folder or of a vocab.txt, for a model folder that is made from it.
std::map<std::string, std::string> tokenizer_files(const std::string& folder_or_file, const WordPiece& tokenizer, int64_t max_length);
// The text that a sentence-transformers folder has under `name`, to go in front of every text; "": its default, if any. Throws Error
// when it has none of that name.
std::string folder_prompt(const std::string& folder, const std::string& name);
// The pooling recipe of a folder: sentence-transformers' modules.json, else the mean; and the files that say a recipe there.
Pooling folder_pooling(const std::string& folder, const Config& config);
std::map<std::string, std::string> sentence_files(const Pooling& pooling, int64_t hidden, int64_t max_length);
// Loads for the folder's own task, or for `task`: then the encoder is taken and a head the file lacks is drawn from `seed`
// (its classifier has a row for each of `labels`). A missing, unexpected or ill-shaped tensor throws Error naming it.
// pack: ready for inference, no longer for saving; false: a copy in memory, to look at, save or train. precision: of products; unset:
// f32, or of a folder that was quantized what each weight is stored in.
ModelFolder load_folder(const std::string& folder, bool pack = true, std::optional<Precision> precision = {});
ModelFolder load_folder_for(const std::string& folder, Task task, const std::vector<std::string>& labels, uint64_t seed);
// Writes config.json, model.safetensors (F32, F16 or BF16; what is narrow as it is, int8 with NAME_scale beside it) and what the folder
// carries; every file atomically.
void save_folder(const std::string& folder, const Bert& bert, const std::map<std::string, std::string>& carried,
                 const std::string& dtype = "F32");

// What `bert quantize` makes smaller, by parts: part 0 is the word embeddings, part l the four weights of layer l, from 1.
int64_t quantized_parts(const Config& config);
// The part of `bert` becomes that of `from`, whose weights are plain, in this precision.
void narrow_part(Bert& bert, int64_t part, const Bert& from, Precision precision);

// Rows for pieces that were added behind the tokenizer's, each the mean of the rows of the pieces that it would be read as (of all,
// where there is none). `pieces`: the whole new vocabulary.
void extend_rows(Bert& bert, const WordPiece& tokenizer, const std::vector<std::string>& pieces);

// [n,C] -> [n,C]: softmax of each row (classify, next sentence), sigmoid (multilabel), as it is (regress). classes 0: one row.
std::vector<float> probabilities(Task task, std::span<const float> outputs, int64_t classes = 0);
struct MaskGuess { int64_t mask; std::string token; int32_t id; double probability; };   // mask: number of the [MASK] in the text

// For each row the guesses of each [MASK] in it, mask by mask, best first.
std::vector<std::vector<MaskGuess>> guess_masks(const ModelFolder& folder, std::span<const Example> examples, int64_t top,
                                                int64_t batch_tokens);
// Pseudo-log-likelihood (Salazar et al. 2020): each token that is not added around the text masked alone, its log-probability summed.
struct TextScore { double log_likelihood = 0; int64_t tokens = 0; };
std::vector<TextScore> score_texts(const ModelFolder& folder, std::span<const Example> examples, int64_t batch_tokens);

// Each item's windows put to the model and merged: of a class the mean of the outputs, of a word the tag of the window that sees most
// around it, of a question the best answers of all windows, of two texts the cosine of what embed_windows makes of them.
std::vector<Outcome> answer_windows(const Bert& bert, const Pooling& pooling, std::span<const Item> items,
                                    std::span<const std::vector<Window>> windows, int64_t batch_tokens);
// Who is asked, and how: a model in training as well as one of a folder.
struct Asked {
  const Bert& bert;
  const WordPiece& tokenizer;
  const Pooling& pooling;
  const std::string& prompt;                       // similarity: in front of every text
  int64_t max_length, stride, batch_tokens;
};
std::vector<Outcome> answer_items(const Asked& how, std::span<const Item> items);
// Adds what the model says of the items to the scorer, a few thousand at a time; each(number, outcome) sees it too.
void score_items(const Asked& how, std::span<const Item> items, std::span<const Gold> golds, Scorer& scorer,
                 const std::function<void(size_t, const Outcome&)>& each = {});
// Of texts and their partners: how near each one's partner is among the partners of all.
std::vector<Metric> rank_partners(const Asked& how, std::span<const Item> items, std::optional<uint64_t> seed = {});

struct TextEntity : Answer { std::string type; };  // a named part of a text, with the mean of its words' probabilities
std::vector<TextEntity> entities_in(const Outcome& outcome, std::span<const std::string> labels, const std::string& text);

// A folder ready to answer. Read-only: any number of threads.
class Model {
 public:
  static Model load(const std::string& folder, std::optional<Precision> precision = {});
  const ModelFolder& folder() const { return *folder_; }
  std::vector<float> embed(std::string_view text) const;                        // by the folder's pooling recipe
  // The same bytes for each text, in batches of similar length: faster.
  std::vector<std::vector<float>> embed(std::span<const std::string> texts, int64_t batch_tokens = 8192) const;
  std::vector<MaskGuess> fill_mask(std::string_view text, int64_t top = 5) const;
  TextScore score(std::string_view text) const;                                 // pseudo-log-likelihood
  // probability of each label (classify, multilabel), or the value
  std::vector<float> classify(std::string_view text, std::optional<std::string_view> pair = {}) const;
  std::vector<TextEntity> tag(std::string_view text) const;                     // its entities, in order
  Answer answer(std::string_view question, std::string_view context) const;     // its text is empty where the model finds none
  std::vector<float> choose(std::string_view text, std::span<const std::string> choices) const;   // probability of each
  float similarity(std::string_view a, std::string_view b) const;               // cosine of the texts' vectors

 private:
  Outcome ask(const Item& item) const;
  void need(Task task, const char* what) const;
  std::shared_ptr<const ModelFolder> folder_;
};
// Vectors of texts in windows: of each item one for each of its parts, the mean of that part's windows, which count by the tokens that
// they decide about.   [parts of all items, width]
Tensor embed_windows(const Bert& bert, std::span<const std::vector<Window>> windows, const Pooling& pooling, int64_t batch_tokens);

// ==== 10 fingerprints ============================================================================================
// Tells whether data is what it was; no protection against who wants two to be the same.
struct Fingerprint {
  uint64_t state = 14695981039346656037ull;        // FNV-1a's numbers; the shift takes the upper bits into account
  void number(uint64_t v) { state = (state ^ v) * 1099511628211ull, state ^= state >> 32; }
  void bytes(std::string_view s);                  // their number, too
  bool file(const std::string& path);              // its bytes; false when it cannot be opened
  void add(const Example& e);
  template <class List>
  void add(const List& list) {
    for (const auto v : list)
      if constexpr (std::is_same_v<decltype(v), const float>)
        number(std::bit_cast<uint32_t>(v));
      else
        number((uint64_t)v);
    number(list.size());
  }
};
// Of what a model's answers depend on: config, tokenizer, recipe, weights.
uint64_t folder_fingerprint(const std::string& folder);

}  // namespace bert
