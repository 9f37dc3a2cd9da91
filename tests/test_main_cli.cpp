// The command line, run as a user runs it: options, exit statuses, every reader's edges, and training from raw text to predictions.
#include <csignal>
#include <fstream>
#include <sstream>

#include "testing.h"

using testing::Ran;
using testing::TemporaryFolder;

namespace {

Ran bert_run(const std::string& arguments) { return testing::run("./bert " + arguments); }
bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
int64_t lines_in(const std::string& text) { return std::count(text.begin(), text.end(), '\n'); }
void put(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// A vocabulary that holds the words of these tests.
const char* const kVocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\nhello\nworld\n!\n##s\ntwo\nlines\nx\ny\n\"\n,\n";
struct Tokenizing {
  TemporaryFolder folder;
  Tokenizing() { put(folder / "vocab.txt", kVocab); }
  Ran text(const std::string& bytes, const std::string& file = "in.txt", const std::string& more = "") const {
    put(folder / file, bytes);
    return bert_run("tokenize --no-special --vocab " + (folder / "vocab.txt") + " --input " + (folder / file) + " " + more);
  }
};

// Sentences of a small grammar, in documents of eight: each noun has verbs of its own, so that there is something to learn.
std::string small_text(int documents, uint64_t seed) {
  static const char* const nouns[] = {"dog", "cat", "bird", "fish"};
  static const char* const verbs[] = {"barks", "sleeps", "sings", "swims"};
  static const char* const places[] = {"in the house", "in the garden", "by the river", "at night"};
  bert::Random random({seed, 0, 0, 0});
  std::ostringstream out;
  for (int d = 0; d < documents; d++) {
    const int64_t noun = random.below(4);
    for (int s = 0; s < 8; s++) out << "the " << nouns[noun] << " " << verbs[noun] << " " << places[random.below(4)] << ". ";
    out << "\n\n";
  }
  return out.str();
}

std::string labelled_text(int rows, uint64_t seed) {
  bert::Random random({seed, 0, 0, 0});
  std::ostringstream out;
  out << "text\tlabel\tgrade\ttags\n";
  for (int i = 0; i < rows; i++) {
    const bool dog = random.below(2);
    out << "the " << (dog ? "dog barks" : "bird sings") << (random.below(2) ? " at night" : " by the river") << "\t"
        << (dog ? "pet" : "wild") << "\t" << (dog ? 1 : 0) + 0.01 * (double)random.below(10) << "\t" << (dog ? "pet|loud" : "wild") << "\n";
  }
  return out.str();
}

// Text, vocabulary and a very small config.json, made once.
struct Small {
  TemporaryFolder folder;
  std::string pretrain;  // the command without --output and --steps
  Small() {
    put(folder / "text.txt", small_text(60, 1));
    put(folder / "train.tsv", labelled_text(120, 2));
    put(folder / "dev.tsv", labelled_text(40, 3));
    const Ran vocab = bert_run("vocab --input " + (folder / "text.txt") + " --size 120 --output " + (folder / "vocab"));
    REQUIRE_MESSAGE(vocab.status == 0, vocab.err);
    const int64_t pieces = lines_in(bert::read_file(folder / "vocab/vocab.txt"));
    put(folder / "config.json",
        "{\"architectures\":[\"BertForPreTraining\"],\"model_type\":\"bert\",\"vocab_size\":" + std::to_string(pieces) +
            ",\"hidden_size\":32,\"num_hidden_layers\":2,\"num_attention_heads\":2,\"intermediate_size\":64,\"hidden_act\":\"gelu\","
            "\"hidden_dropout_prob\":0.1,\"attention_probs_dropout_prob\":0.1,\"max_position_embeddings\":64,\"type_vocab_size\":2,"
            "\"initializer_range\":0.02,\"layer_norm_eps\":1e-12,\"pad_token_id\":0}");
    pretrain = "pretrain --input " + (folder / "text.txt") + " --vocab " + (folder / "vocab") + " --config " + (folder / "config.json") +
               " --batch-tokens 512 --max-length 48 --lr 1e-3 --dev-split 0.1 ";
  }
  std::string finetune(const std::string& model, const std::string& output) const {
    return "finetune --task classify --model " + model + " --train " + (folder / "train.tsv") + " --dev " + (folder / "dev.tsv") +
           " --lr 3e-3 --batch 8 --output " + output + " ";
  }
};
Small& small() {
  static Small made;
  return made;
}
// A pretrained model, made once.
const std::string& pretrained() {
  static const std::string path = [] {
    const std::string out = small().folder / "pretrained";
    const Ran r = bert_run(small().pretrain + "--steps 60 --output " + out);
    REQUIRE_MESSAGE(r.status == 0, r.err);
    return out;
  }();
  return path;
}
void same_run(const std::string& a, const std::string& b) {
  for (const char* file : {"/model.safetensors", "/training_state.safetensors", "/config.json", "/vocab.txt"}) {
    CAPTURE(file);
    CHECK(bert::read_file(a + file) == bert::read_file(b + file));
  }
}

}  // namespace

TEST_CASE("cli: help, version, unknown commands") {
  CHECK(bert_run("").status == 2);
  CHECK(bert_run("help").status == 0);
  CHECK(has(bert_run("--version").out, "bert "));
  CHECK(has(bert_run("--version").out, "Unicode tables from "));
  for (const char* name : {"vocab", "tokenize", "pretrain", "finetune", "evaluate", "predict", "fill-mask", "embed", "search", "info",
                           "convert", "quantize", "bench"}) {
    CAPTURE(name);
    const Ran r = bert_run(std::string("help ") + name);
    CHECK(r.status == 0);
    CHECK(has(r.out, std::string("bert ") + name));
    CHECK(has(r.out, "--threads N "));
    CHECK(r.out.find("  --dtype ") == r.out.rfind("  --dtype "));  // the command's own, where it has one
    CHECK(r.err.empty());
  }
  const std::string pretrain = bert_run("help pretrain").out;
  for (const char* line : {"--batch-tokens N    tokens of a batch (default: 8192)\n",
                           "--schedule linear|cosine|constant  (default: linear)\n", "(default: DIR.shards)\n", "--skip-bad "})
    CHECK_MESSAGE(has(pretrain, line), pretrain);
  CHECK(bert_run("pretrain --help").out == pretrain);
  const Ran wrong = bert_run("tokenise");
  CHECK(wrong.status == 2);
  CHECK(has(wrong.err, "did you mean bert tokenize?"));
  CHECK(has(bert_run("export").err, "not built yet"));
}

TEST_CASE("cli: a misspelt, repeated, valueless, ill-valued or unused option is exit 2 and says what was meant") {
  const std::pair<const char*, const char*> cases[] = {
      {"tokenize --vocab v --max-lenth 5", "no option --max-lenth; did you mean --max-length?"},
      {"tokenize --vcab v", "did you mean --vocab?"},
      {"tokenize --vocab v --vocab v", "--vocab is given twice"},
      {"tokenize --vocab v --stats --stats", "--stats is given twice"},
      {"tokenize --vocab", "--vocab needs a value"},
      {"tokenize --vocab --stats", "--vocab needs a value"},
      {"tokenize --vocab v --stats=yes", "--stats takes no value"},
      {"tokenize --vocab v --max-length many", "a whole number from 1"},
      {"tokenize --vocab v --max-length -3", "a whole number from 1"},
      {"tokenize --vocab v --max-length 2", "at least 3"},
      {"tokenize --vocab v --max-length 3 --stride 5", "--stride 5: not smaller than the windows of --max-length 3"},
      {"tokenize --vocab v --max-length 6 --stride 4", "at most 3"},
      {"tokenize --vocab v --max-length 3 --stride 2 --no-special", "at most 1"},
      {"tokenize --vocab v --stride 4", "--stride needs --max-length"},
      {"tokenize --vocab v --format ids", "--decode takes --format ids"},
      {"tokenize --vocab v --format tsv --decode", "--decode takes --format ids"},
      {"tokenize --vocab v --decode --stats", "exclude each other"},
      {"tokenize --vocab v --skip-special", "--skip-special needs --decode"},
      {"tokenize --vocab v --to piece", "did you mean pieces?"},
      {"tokenize --vocab v word", "belongs to no option"},
      {"tokenize --vocab v --format tvs", "did you mean tsv?"},
      {"tokenize --vocab v --no-header", "needs --columns"},
      {"tokenize --vocab v --threads -1", "--threads"},
      {"tokenize --vocab v --dtype f99", "f32"},
      {"tokenize --vocab v --chinese maybe", "yes or no"},
      {"embed --model m --layre 3", "did you mean --layer?"},
      {"embed --model m --device opencl:99 --layre 3", "did you mean --layer?"},
      {"vocab --output o --size 300 --model", "--model needs --extend"},
      {"vocab --output o --size 300 --extend e --cased", "exclude each other"},
      {"vocab --size 300", "--output is missing"},
      {"vocab --output o --size 1", "--size"},
      {"vocab --output o --size 300 --max-memory lots", "--max-memory"},
      {"pretrain --input t --vocab v --config tiny --output o", "--steps or --minutes"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --minutes 1", "--steps or --minutes"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --accumulate 3", "a power of two"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --dev d --dev-split 0.1", "exclude each other"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --cahce c", "did you mean --cache?"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --cache=", "--cache is empty"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --phases 128", "'128' is no phase"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --phases 128:0.9,", "'' is no phase"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --phases 4:1", "'4:1' is no phase"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --phases 128:0.9,512:0", "'512:0' is no phase"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --phases 128:0.9,512:nan", "'512:nan' is no phase"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --phases 512:0.1,128:0.9", "the long ones last"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --phases 128:0.9,512:0.2", "make 1.1, not 1"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --phases 128:1 --max-length 128", "exclude each other"},
      {"finetune --task clasify --model m --train t --output o", "did you mean classify?"},
      {"finetune --model m --train t --output o", "--task is missing: classify, multilabel, regress, tag"},
      {"finetune --task classify --model m --output o", "--train is missing"},
      {"predict --model m --jsonl --logits", "exclude each other"},
      {"predict --model m --logits --top 2", "exclude each other"},
      {"fill-mask --model m --score --top 2", "exclude each other"},
      {"pretrain --input t --vocab v --config tiny --output o --steps 5 --resume --overwrite", "exclude each other"},
      {"pretrain --input t --vocab v --config tiny --steps 5 --output=", "--output is missing"},
      {"bench foo", "gemm"},
      {"info --device gpu", "opencl"},
      {"bench gemm minilm-B1T32", "takes no CONFIG"},
      {"bench attention minilm-B1T32", "attention takes no CONFIG"},
      {"bench infer minilm", "minilm-B8T128"},
  };
  for (const auto& [arguments, message] : cases) {
    const std::string shown = arguments;  // clang 14 captures no structured binding in a lambda
    CAPTURE(shown);
    const Ran r = bert_run(std::string(arguments) + " < /dev/null");
    CHECK(r.status == 2);
    CHECK_MESSAGE(has(r.err, message), r.err);
    CHECK(r.out.empty());
    CHECK(lines_in(r.err) == 1);
  }
  for (const auto& [later, message] : {std::pair("embed --model m --device opencl --dtype int8", "goes with --device cpu"),
                                       {"embed --model m --dtype f16", "goes with --device opencl"},
                                       {"finetune --device opencl --dtype f16", "this command computes in f32 or bf16"},
                                       {"tokenize --dtype bf16", "--dtype bf16: this command computes in f32"},
                                       {"pretrain --dtype int8", "--dtype int8: this command computes in f32 or bf16"}}) {
    const Ran r = bert_run(later);
    CHECK(r.status == 1);
    CHECK(has(r.err, message));
  }
}

TEST_CASE("cli: whoever sends a line through a pipe is answered before the next") {
  const Tokenizing t;
  put(t.folder / "vocab.txt", kVocab);
  for (const std::string& command :
       {"tokenize --vocab " + (t.folder / "vocab.txt"), std::string("embed --model tests/golden/models/tiny-pretrain")}) {
    const Ran r =
        testing::run("cd " + t.folder.path + " && rm -f in out && mkfifo in out && cd - > /dev/null && sh -c 'timeout 20 ./bert " +
                     command + " < \"$0/in\" > \"$0/out\" & exec 3> \"$0/in\" 4< \"$0/out\"; for line in hello world a; do " +
                     "echo $line >&3; read -r answer <&4; echo \"$answer\"; done; exec 3>&-; wait' " + t.folder.path);
    CHECK(r.status == 0);
    CHECK_MESSAGE(lines_in(r.out) == 3, r.out);
    CHECK(has(r.out, "\n"));
  }
}

TEST_CASE("cli: a newcomer without a model is told what is needed") {
  TemporaryFolder folder;
  for (const std::string& path : {folder / "none", folder.path}) {
    const Ran r = bert_run("predict --model " + path + " < /dev/null");
    CHECK(r.status == 1);
    for (const char* part : {"config.json", "vocab.txt", "model.safetensors", "huggingface.co", "bert pretrain"}) CHECK(has(r.err, part));
  }
}

TEST_CASE("readers: lines, with a byte-order mark, carriage returns, an empty line, a pair, no end of line") {
  const Tokenizing t;
  CHECK(t.text("\xEF\xBB\xBFhello\r\n\r\na\tb c\nworld").out == "hello\n\na b c\nworld\n");
  CHECK(has(t.text("a\tb\tc\n").err, "in.txt:1: more than two texts"));
  const Ran piped = testing::run("printf 'hello\\nworld' | ./bert tokenize --to ids --vocab " + (t.folder / "vocab.txt"));
  CHECK(piped.out == "2 8 3\n2 9 3\n");
}

TEST_CASE("readers: tsv and csv by name, by --columns, quoted; too few fields, no column, bad quotes") {
  const Tokenizing t;
  CHECK(t.text("id\tsentence1\tsentence2\n1\ta\tb\n", "in.tsv").out == "a b\n");
  CHECK(t.text("id\tcontext\tquestion\n1\ta\tb\n", "in.tsv").out == "a b\n");  // in tsv by the columns' order
  CHECK(t.text("u\tv\na\tb\n", "in.tsv", "--columns text=v,pair=0").out == "b a\n");
  CHECK(t.text("a\tb\n", "in.tsv", "--no-header --columns text=1").out == "b\n");
  CHECK(has(t.text("text\na\n", "in.tsv").err, "text is 'text'"));
  CHECK(t.text("text\na\n", "in.tsv", "--quiet").err == "");
  CHECK(t.text("id,text,pair\r\n1,\"a \"\"b\"\", c\",\"two\r\nlines\"\r\n", "in.csv").out == "a \" b \" , c two lines\n");
  CHECK(t.text("text\n\"a\"\n\"\"\n", "in.csv").out == "a\n\n");
  CHECK(t.text("text,pair\n\"a\n\n\"\"b\"\",\nc\",x\"y\"\"\n,b\n", "in.csv").out == "a \" b \" , c x \" y \" \"\nb\n");
  const std::array<std::string, 3> bad[] = {
      {"id\ttext\n1\ta\n2\n", "in.tsv", "in.tsv:3: 1 field, but column 1"},
      {"text\na\tb\n", "in.tsv", "in.tsv:2: 2 fields, but the header has 1"},
      {"text,id\nWell, yes,b\n", "in.csv", "in.csv:2: 3 fields, but the header has 2"},
      {"u\tv\na\tb\n", "in.tsv", "in.tsv:1: no text"},
      {"", "in.tsv", "empty"},
      {"text\ttext\na\tb\n", "in.tsv", "in.tsv:1: 'text' stands there twice"},
      {"id,text\n1,\"a\n", "in.csv", "in.csv:2: a quote opens here and is never closed"},
      {"id,text\n1,\"a\"b\n", "in.csv", "in.csv:2: something follows a closing quote"},
  };
  for (const auto& [bytes, file, message] : bad) {
    const Ran r = t.text(bytes, file);
    CHECK(r.status == 1);
    CHECK_MESSAGE(has(r.err, message), r.err);
  }
  CHECK(t.text("text\ttext\na\tb\n", "in.tsv", "--columns text=1").out == "b\n");
  CHECK(t.text("id\ttext\n1\ta\t\t\n", "in.tsv").out == "a\n");  // empty fields at the end, as spreadsheets write them
  CHECK(has(t.text("u\tv\na\tb\n", "in.tsv", "--columns text=u,text=v").err, "text is given twice"));
  CHECK(has(t.text("text\na\n", "in.tsv", "--columns text=zz").err, "no 'zz'"));
  const Ran below = t.text("a\tb\n", "in.tsv", "--no-header --columns text=-1");
  CHECK_MESSAGE((below.status == 2 && has(below.err, "'-1' is no number from 0")), below.err);
  const Ran skipped = t.text("id\ttext\n1\ta\n2\n3\tb\n", "in.tsv", "--skip-bad");
  CHECK(skipped.status == 0);
  CHECK(skipped.out == "a\nb\n");
  CHECK(has(skipped.err, "1 line could not be used"));
}

TEST_CASE("readers: jsonl, fasttext, ids") {
  const Tokenizing t;
  CHECK(t.text("\"a\"\n{\"context\":\"b\",\"question\":\"c\"}\n{\"text\":\"\\u0068ello\"}\n", "in.jsonl").out == "a\nc b\nhello\n");
  CHECK(t.text("{\"text\":[\"hello\",\"world!\"]}\n", "in.jsonl", "--split-words").out == "hello world !\n");
  CHECK(has(t.text("{\"text\":3}\n", "in.jsonl").err, "in.jsonl:1: 'text' is not a string"));
  CHECK(has(t.text("\"a\"\n{\"text\":\"a\"\n", "in.jsonl").err, "in.jsonl:2: column 12"));
  CHECK(has(t.text("{\"foo\":\"a\"}\n", "in.jsonl").err, "no text"));
  CHECK(has(t.text("\"a\"\n \n", "in.jsonl").err, "in.jsonl:2: an empty line"));
  CHECK(has(t.text("hello\tworld x\n", "in.ft", "--format fasttext").err, "in.ft:1: a label that holds a TAB"));
  const Ran old = t.text("text\rhello\n", "in.tsv");  // a line of another system's ends stays one line
  CHECK_MESSAGE((old.status == 1 && has(old.err, "text\\rhello") && lines_in(old.err) == 1), old.err);
  for (const std::string other : {"{\"foo\":\"a\"}", "{}"}) {  // several without a text, after one that has it
    const Ran skipped = t.text("{\"text\":\"a\"}\n" + other + "\n" + other + "\n{\"text\":\"b\"}\n", "in.jsonl", "--skip-bad");
    CHECK(skipped.out == "a\nb\n");
    CHECK(has(skipped.err, "2 lines could not be used"));
  }
  CHECK(t.text("__label__x __label__y hello\npos world\n", "in.ft", "--format fasttext").out == "hello\nworld\n");
  CHECK(has(t.text("5 6\t0\n", "in.ids", "--format ids --decode").err, "2 ids but 1 segment ids"));
  CHECK(has(t.text("5 six\n", "in.ids", "--format ids --decode").err, "'six' is no token id"));
}

TEST_CASE("readers: missing, empty, unreadable, binary input is one clear line; invalid UTF-8 is repaired and counted") {
  const Tokenizing t;
  const std::string vocab = "tokenize --vocab " + (t.folder / "vocab.txt") + " --input ";
  for (const auto& [file, message] :
       {std::pair<std::string, const char*>{t.folder / "none", "cannot open"}, {t.folder.path, "this is a folder; give a file"}}) {
    const Ran r = bert_run(vocab + file);
    CHECK(r.status == 1);
    CHECK_MESSAGE(has(r.err, message), r.err);
    CHECK(lines_in(r.err) == 1);
  }
  CHECK(has(t.text("").err, "empty"));
  CHECK(has(t.text(std::string("hello\na\0b\n", 10)).err, "in.txt:2: a NUL byte"));
  const Ran bad = t.text("hello\nwor\xFFld\n\xC3\n");
  CHECK(bad.status == 0);
  CHECK(bad.out == "hello\nworld\n\n");
  CHECK(has(bad.err, "invalid UTF-8 in 2 lines"));
}

TEST_CASE("results: --output whole or not at all, a full device, a closed pipe") {
  const Tokenizing t;
  const std::string out = t.folder / "out.txt";
  CHECK(t.text("hello\n", "in.txt", "--output " + out).status == 0);
  CHECK(bert::read_file(out) == "hello\n");
  CHECK(t.text(std::string("hello\na\0b\n", 10), "in.txt", "--output " + out).status == 1);
  CHECK(bert::read_file(out) == "hello\n");
  CHECK(t.text("hello\n", "in.txt", "--output " + (t.folder / "no/such/folder")).status == 1);
  CHECK(t.text("hello\n", "in.txt", "--output /dev/null").status == 0);
  for (const char* full : {" > /dev/full", " --output /dev/full"}) {
    const Ran r = t.text("hello\n", "in.txt", full);
    CHECK(r.status == 1);
    CHECK(has(r.err, "No space left"));
  }
  CHECK(testing::run("./bert help > /dev/full").status == 1);
  const Ran lost = bert_run(small().finetune(pretrained(), t.folder / "tuned") + "--epochs 1 > /dev/full");  // with remarks between
  CHECK((lost.status == 1 && has(lost.err, "standard output: cannot write: No space left")));
  CHECK(bert_run("bench gemm --tsv --quiet > /dev/full").status == 1);
  std::filesystem::create_symlink(t.folder / "in.txt", t.folder / "link.txt");
  for (const char* file : {"in.txt", "link.txt", "vocab.txt"}) {  // what is read is not written
    const Ran same = t.text("hello\n", "in.txt", "--output " + (t.folder / file));
    CHECK(same.status == 2);
    CHECK_MESSAGE(has(same.err, ", which it would replace; give another"), same.err);
  }
  CHECK(bert::read_file(t.folder / "in.txt") == "hello\n");
  CHECK(bert::read_file(t.folder / "vocab.txt") == kVocab);
  std::string many;
  for (int i = 0; i < 200000; i++) many += "hello world\n";
  put(t.folder / "many.txt", many);
  const Ran pipe = testing::run("bash -c 'set -o pipefail; ./bert tokenize --vocab " + (t.folder / "vocab.txt") + " --input " +
                                (t.folder / "many.txt") + " | head -n 1'");
  CHECK(pipe.status == 0);
  CHECK(pipe.err == "");
  CHECK(lines_in(pipe.out) == 1);
}

TEST_CASE("tokenize: ids, jsonl, offsets in characters, windows, decoding, counts, settings") {
  const Tokenizing t;
  CHECK(t.text("hello worlds!\n", "in.txt", "--to ids").out == "8 9 11 10\n");
  CHECK(t.text("hello\n", "in.txt", "--to jsonl").out ==
        "{\"tokens\":[\"hello\"],\"ids\":[8],\"type_ids\":[0],\"special\":[0],\"offsets\":[[0,5]],\"words\":[0]}\n");
  CHECK(has(t.text("h\xC3\xA9llo world\n", "in.txt", "--to jsonl").out, "[[0,6],[7,12]]"));
  CHECK(has(t.text("h\xC3\xA9llo world\n", "in.txt", "--to jsonl --offsets chars").out, "[[0,5],[6,11]]"));
  CHECK(t.text("a b c x y\n", "in.txt", "--max-length 3 --stride 1").out == "a b c\nc x y\n");
  CHECK(t.text("a b c\n", "in.txt", "--max-length 2").out == "a b\n");
  CHECK(t.text("a b c\n", "in.txt", "--max-length 2 --side left").out == "b c\n");
  CHECK(t.text("2 8 9 11 3\n", "in.ids", "--decode").out == "[CLS] hello worlds [SEP]\n");
  CHECK(t.text("2 8 9 11 3\n", "in.ids", "--decode --skip-special").out == "hello worlds\n");
  CHECK(has(t.text("99\n", "in.ids", "--decode").err, "token id 99"));
  const Ran decoded = t.text("8\n5 99\n9\n", "in.ids", "--decode --skip-bad");
  CHECK(decoded.out == "hello\nworld\n");
  CHECK(has(decoded.err, "in.ids:2: token id 99, but the vocabulary has ids 0 to 17; skipped"));
  CHECK(t.text("Hello\n", "in.txt", "--cased").out == "[UNK]\n");
  CHECK(t.text("a b\nc\n", "in.txt", "--stats").out.starts_with("texts\t2\nwords\t3\ntokens\t3\n"));
  const std::string stats = t.text("a b \u0436\u0436\n", "in.txt", "--stats").out;  // a Cyrillic word, and no piece for its letter
  CHECK((has(stats, "latin_words\t2\n") && has(stats, "cyrillic_unknown_rate\t1\n") && has(stats, "unknown_character U+0436 \u0436\t2\n")));
  CHECK(t.text("a [MASK]\n").out == "a [MASK]\n");
  CHECK(t.text("a [MASK]\n", "in.txt", "--plain-special").out == "a [UNK] [UNK] [UNK]\n");
}

TEST_CASE("vocab: what is left out is said; a vocabulary and its model are extended") {
  TemporaryFolder folder;
  put(folder / "text.txt", small_text(50, 1));
  put(folder / "more.txt", small_text(20, 2) + "\u0436\u0437 \u0436\u0437 \u0436\u0437\n");
  const std::string train = "vocab --input " + (folder / "text.txt") + " --output " + (folder / "v");
  CHECK(has(bert_run(train + " --size 12").err, "characters; the rarer"));
  CHECK(has(bert_run(train + " --size 80 --overwrite --max-memory 1000").err, "than --max-memory holds"));
  CHECK(bert_run(train + " --size 80 --overwrite").err.find("rarer") == std::string::npos);
  CHECK(bert_run("pretrain --quiet --steps 1 --config tiny --input " + (folder / "text.txt") + " --vocab " + (folder / "v") + " --output " +
                 (folder / "m"))
            .status == 0);
  const std::string extend = "vocab --input " + (folder / "more.txt") + " --extend " + (folder / "m") + " --output " + (folder / "e");
  const std::string before = bert::read_file(folder / "v/vocab.txt"), size = std::to_string(lines_in(before) + 4);
  CHECK(has(bert_run(extend + " --size 20").err, "are there already"));
  CHECK(bert_run(extend + " --overwrite --model --size " + size).status == 0);
  std::string odd = before;
  for (size_t at = 0; (at = odd.find('\n', at)) != odd.npos; at += 2) odd.insert(at, "\r");
  std::filesystem::copy(folder / "m", folder / "odd"), put(folder / "odd/vocab.txt", odd);
  for (const std::string more : {"", " --model"}) {  // what is odd about the vocabulary is said once
    const Ran r = bert_run("vocab --input " + (folder / "more.txt") + " --extend " + (folder / "odd") + " --output " +
                           (folder / (more.empty() ? "e2" : "e3")) + " --size " + size + more);
    CHECK_MESSAGE(r.status == 0, r.err);
    CHECK_MESSAGE((has(r.err, "odd/vocab.txt") && r.err.find("odd/vocab.txt: ") == r.err.rfind("odd/vocab.txt: ")), r.err);
  }
  const std::string after = bert::read_file(folder / "e/vocab.txt");
  CHECK((after.starts_with(before) && has(after, "\u0436\n") && std::to_string(lines_in(after)) == size));
  CHECK(has(bert_run("info --model " + (folder / "e")).out, size));
  put(folder / "masked.txt", "\u0436\u0437 [MASK]\n");
  CHECK(bert_run("fill-mask --model " + (folder / "e") + " --input " + (folder / "masked.txt")).status == 0);
}

TEST_CASE("vocab: a folder that holds something is refused unless --overwrite; empty text is an error") {
  TemporaryFolder folder;
  put(folder / "text.txt", small_text(20, 1));
  const std::string command = "vocab --input " + (folder / "text.txt") + " --size 100 --output " + (folder / "v");
  CHECK(bert_run(command).status == 0);
  const std::string first = bert::read_file(folder / "v/vocab.txt");
  CHECK(first.starts_with("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"));
  CHECK(has(bert_run(command).err, "--overwrite"));
  CHECK(bert_run(command + " --overwrite --threads 1").status == 0);
  CHECK(bert::read_file(folder / "v/vocab.txt") == first);
  put(folder / "empty.txt", "");
  put(folder / "blank.txt", "\n\n");
  CHECK(bert_run("vocab --input " + (folder / "empty.txt") + " --size 100 --output " + (folder / "w")).status == 1);
  CHECK(has(bert_run("vocab --input " + (folder / "blank.txt") + " --size 100 --output " + (folder / "w")).err, "no words"));
  CHECK_FALSE(std::filesystem::exists(folder / "w"));
  put(folder / "file", "x");
  CHECK(has(bert_run("vocab --input " + (folder / "text.txt") + " --size 100 --output " + (folder / "file")).err, "a file"));
}

TEST_CASE("training: from raw text to a classifier, a regressor and a multi-label model that answer") {
  const std::string model = pretrained();
  for (const char* file : {"/config.json", "/vocab.txt", "/tokenizer_config.json", "/model.safetensors", "/log.jsonl", "/report.html"})
    CHECK_MESSAGE(std::filesystem::exists(model + file), file);
  const std::string log = bert::read_file(model + "/log.jsonl");
  for (const char* key : {"\"step\":60", "\"mlm_loss\"", "\"nsp_accuracy\"", "\"tokens_per_second\"", "\"dev\""})
    CHECK_MESSAGE(has(log, key), key);
  const std::string report = bert::read_file(model + "/report.html");
  for (const std::string& part : {std::string("<svg"), log, std::string("</html>")}) CHECK(has(report, part));
  for (const char* remote : {"http:", "https:", " src=", "@import"}) CHECK(!has(report, remote));
  const Ran scores = bert_run("evaluate --model " + model + " --input " + (small().folder / "text.txt"));
  REQUIRE_MESSAGE(scores.status == 0, scores.err);
  CHECK(has(scores.out, "loss\t"));
  const Ran guesses = testing::run("echo 'the dog [MASK] at night.' | ./bert fill-mask --top 3 --model " + model);
  REQUIRE_MESSAGE(guesses.status == 0, guesses.err);
  CHECK(lines_in(guesses.out) == 3);
  CHECK(guesses.out.starts_with("1\t1\t1\t"));
  CHECK(has(testing::run("echo 'no mask' | ./bert fill-mask --model " + model).err, "standard input:1: no [MASK]"));
  CHECK(lines_in(testing::run("printf 'the dog barks.\\nthe cat sleeps.\\n' | ./bert fill-mask --score --model " + model).out) == 2);

  const std::string out = small().folder / "classifier";
  const Ran tuned = bert_run(small().finetune(model, out) + "--test " + (small().folder / "dev.tsv"));
  REQUIRE_MESSAGE(tuned.status == 0, tuned.err);
  CHECK(has(tuned.out, "accuracy_dev\t"));
  CHECK(has(tuned.out, "accuracy_test\t"));
  CHECK(has(bert_run("evaluate --model " + out + " --input " + (small().folder / "dev.tsv")).out, "accuracy_low\t"));
  const Ran answers = testing::run("printf 'the dog barks at night\\nthe bird sings\\n' | ./bert predict --model " + out);
  REQUIRE_MESSAGE(answers.status == 0, answers.err);
  CHECK(answers.out.starts_with("pet\t"));
  CHECK(has(answers.out, "\nwild\t"));
  CHECK(has(testing::run("echo hello | ./bert predict --jsonl --model " + out).out, "\"scores\":{"));
  CHECK(has(testing::run("echo hello | ./bert predict --model " + model).err, "two, joined by a TAB"));

  const std::string rest = " --train " + (small().folder / "train.tsv") + " --epochs 2 --lr 2e-3 --model " + model + " --output ";
  const Ran grades = bert_run("finetune --task regress --columns text=text,label=grade" + rest + (small().folder / "regressor"));
  REQUIRE_MESSAGE(grades.status == 0, grades.err);
  CHECK(has(grades.out, "pearson_dev\t"));
  CHECK(lines_in(testing::run("echo the dog | ./bert predict --model " + (small().folder / "regressor")).out) == 1);
  const Ran tags = bert_run("finetune --task multilabel --columns text=text,label=tags" + rest + (small().folder / "tagger"));
  REQUIRE_MESSAGE(tags.status == 0, tags.err);
  CHECK(lines_in(testing::run("echo the dog | ./bert predict --model " + (small().folder / "tagger")).out) == 1);
  const Ran vectors = testing::run("printf 'the dog\\nthe bird\\n' | ./bert embed --model " + model);
  REQUIRE_MESSAGE(vectors.status == 0, vectors.err);
  CHECK(lines_in(vectors.out) == 2);
  CHECK(std::count(vectors.out.begin(), vectors.out.end(), '\t') == 62);
  CHECK(testing::run("printf 'the dog\\nthe bird\\n' | ./bert embed --to npy --model " + model).out.size() == 128 + 2 * 32 * 4);
  const Ran full = testing::run("ulimit -f 1; seq 20 | ./bert embed --to npy --model " + model);  // the disk is full when all is written
  CHECK(full.status == 1);
  CHECK_MESSAGE(has(full.err, "--to npy: the temporary file that the numbers wait in: File too large"), full.err);
  put(small().folder / "two.txt", "the dog\nthe bird\n");
  CHECK(bert_run("embed --to npy --model " + model + " --input " + (small().folder / "two.txt")).out ==
        testing::run("printf 'the dog\nthe bird\n' | ./bert embed --to npy --model " + model).out);
  CHECK(has(bert_run("info --model " + out).out, "labels\tpet|wild"));
  // A text over the limit: cut and counted, refused, or in windows, of which each token is one window's.
  std::string dogs;
  for (int i = 0; i < 40; i++) dogs += "the dog barks. ";
  put(small().folder / "long.txt", "the dog\n" + dogs + "\n");
  const std::string embed = "embed --max-length 32 --input " + (small().folder / "long.txt") + " --model " + model + " --long ";
  const Ran cut = bert_run(embed + "truncate"), refused = bert_run(embed + "error"), whole = bert_run(embed + "window");
  CHECK(has(cut.err, "1 of 2 texts were longer than 32 tokens and were cut"));
  CHECK(has(refused.err, "long.txt:2: longer than the model's 32 tokens"));
  CHECK((whole.status == 0 && whole.err.empty() && lines_in(whole.out) == 2));
  CHECK(whole.out.substr(0, whole.out.find('\n')) == cut.out.substr(0, cut.out.find('\n')));
  CHECK(whole.out != cut.out);
  const std::string ids = bert_run("tokenize --vocab " + model + " --input " + (small().folder / "long.txt") + " --to ids").out;
  CHECK(lines_in(bert_run(embed + "window --tokens").out) == std::count(ids.begin(), ids.end(), ' ') + 2);
  // What is embedded is read as sentence-transformers reads it; what is classified cannot inject a token.
  CHECK(has(testing::run("echo 'the [MASK]' | ./bert embed --tokens --model " + model).out, "1\t[MASK]\t"));
  const std::string injected = "printf 'the [SEP] dog\n' | ./bert predict --logits --model " + out;
  CHECK(testing::run(injected).out == testing::run("printf 'the [ SEP ] dog\n' | ./bert predict --logits --model " + out).out);
}

TEST_CASE("cli: --skip-bad passes over what a model cannot answer; weights that give no numbers are said") {
  const std::string model = pretrained();
  const std::string lines = "printf 'no mask\nthe [MASK] barks.\n' | ./bert fill-mask --top 1 --model " + model;
  CHECK(has(testing::run(lines).err, "standard input:1: no [MASK]"));
  const Ran skipped = testing::run(lines + " --skip-bad");
  CHECK(skipped.status == 0);
  CHECK(lines_in(skipped.out) == 1);
  CHECK(skipped.out.starts_with("2\t1\t1\t"));
  const std::string ids = "printf '2 3\n2 999999 3\n2 7 3\n' | ./bert embed --format ids --model " + model;
  CHECK(has(testing::run(ids).err, "standard input:2: token id 999999"));
  CHECK(lines_in(testing::run(ids + " --skip-bad").out) == 2);

  bert::ModelFolder damaged = bert::load_folder(model, false);
  bert::Tensor& weight = damaged.bert.layers[0].up.weight;
  std::fill_n(weight.data(), weight.size(), 3e38f);
  bert::save_folder(small().folder / "damaged", damaged.bert, damaged.carried);
  for (const char* command : {"embed", "fill-mask", "evaluate", "predict"}) {
    const Ran r = testing::run("printf 'the [MASK] barks.\tthe dog sings.\n' | ./bert " + std::string(command) + " --model " +
                               (small().folder / "damaged") + " --input " + (command[1] == 'v' ? small().folder / "text.txt" : "-"));
    CHECK(r.status == 1);
    CHECK_MESSAGE(has(r.err, "not finite"), r.err);
    CHECK(r.out.empty());
  }
}

TEST_CASE(
    "training: a folder that holds no run is not resumed into, --overwrite leaves nothing of the model before, --init its vocabulary") {
  const std::string model = pretrained(), copy = small().folder / "copy";
  std::filesystem::copy(model, copy, std::filesystem::copy_options::recursive);
  std::filesystem::remove(copy + "/training_state.safetensors"), std::filesystem::remove(copy + "/training_state-1.safetensors");
  put(copy + "/tokenizer.json", "{}"), put(copy + "/modules.json", "[]");
  const std::string before = bert::read_file(copy + "/model.safetensors");
  CHECK(has(bert_run(small().pretrain + "--steps 2 --resume --output " + copy).err, "holds no run that could go on"));
  std::filesystem::create_directory(small().folder / "begun");  // killed before anything was saved
  put((small().folder / "begun") + "/.lock", "");
  const Ran begun = bert_run(small().pretrain + "--steps 2 --resume --output " + (small().folder / "begun"));
  CHECK(begun.status == 0);
  CHECK(has(begun.err, "nothing was saved yet"));
  CHECK(has(bert_run(small().finetune(model, copy) + "--resume").err, "holds no run that could go on"));
  CHECK(bert::read_file(copy + "/model.safetensors") == before);
  const Ran over = bert_run(small().pretrain + "--steps 2 --overwrite --output " + copy);
  REQUIRE_MESSAGE(over.status == 0, over.err);
  CHECK(!std::filesystem::exists(copy + "/tokenizer.json"));
  CHECK(bert_run("info --model " + copy).status == 0);
  CHECK(has(bert_run(small().finetune(copy, copy) + "--overwrite").err, "the model that is started from"));

  std::string init = small().pretrain;
  init.replace(init.find("--config "), init.find(" --batch-tokens") - init.find("--config "), "--init " + model);
  const Ran further = bert_run(init + "--steps 2 --output " + (small().folder / "further"));
  CHECK_MESSAGE(further.status == 0, further.err);
  put(small().folder / "other-vocab.txt", kVocab);
  init.replace(init.find("--vocab ") + 8, (small().folder / "vocab").size(), small().folder / "other-vocab.txt");
  CHECK(has(bert_run(init + "--steps 2 --output " + (small().folder / "unfit")).err, "not the vocabulary of"));
}

TEST_CASE("golden: bert embed with all-MiniLM-L6-v2 gives sentence-transformers' vectors for the 60 sentences") {
  const std::string folder = testing::shared + "models/all-MiniLM-L6-v2", golden = testing::shared + "golden/models/minilm/";
  SKIP_WITHOUT(folder);
  const bert::SafeTensors file = bert::SafeTensors::open(golden + "golden.safetensors");
  const bert::Tensor want = file.load(*file.find("embeddings"));
  const Ran r = bert_run("embed --model " + folder + " --input " + golden + "sentences.jsonl");
  REQUIRE_MESSAGE(r.status == 0, r.err);
  CHECK(has(r.err, "1 of 60 texts were longer than 256 tokens"));
  std::istringstream numbers(r.out);
  std::vector<float> got((size_t)want.size());
  for (float& v : got) numbers >> v;
  CHECK(numbers.good());
  CHECK(testing::largest_difference(got.data(), want.data(), want.size()) < 2e-6);
}

TEST_CASE("search: vectors beside the corpus, killed and gone on with, made again for another text, the same lines as a plain search") {
  const std::string model = "tests/golden/models/tiny-pretrain";
  const TemporaryFolder folder;
  const std::string corpus = folder / "corpus.txt", index = corpus + ".bert-index";
  bert::Random random({1, 0, 0, 0});
  static const char* const words[] = {"dog", "old", "house", "the", "reads", "a", "sleeps", "and"};
  std::string text;
  for (int64_t line = 0; line < 30000; line++)
    for (int64_t w = 0; w < 9; w++) text += std::string(w ? " " : "") + words[random.below(8)] + (w == 8 ? "\n" : "");
  put(corpus, text);
  put(folder / "queries.txt", "the old dog\nshe reads a house\n");
  const std::string command = "search --model " + model + " --corpus " + corpus + " --input " + (folder / "queries.txt") + " ";
  testing::run("./bert " + command + "> /dev/null 2>&1 & p=$!; while kill -0 $p 2>/dev/null && [ \"$(stat -c %s " + index +
               ".part 2>/dev/null || echo 0)\" -le 1000000 ]; do sleep 0.01; done; kill -9 $p; wait $p");
  REQUIRE(std::filesystem::exists(index + ".part"));
  CHECK(!std::filesystem::exists(index));
  const Ran first = bert_run(command);
  CHECK(first.status == 0);
  CHECK(has(first.err, "going on after"));
  CHECK(lines_in(first.out) == 10);
  const std::string gone_on = bert::read_file(index);
  std::filesystem::remove(index);
  CHECK(bert_run(command + "--threads 1").out == first.out);
  CHECK(bert::read_file(index) == gone_on);  // the bytes of a run that was never stopped

  put(corpus, "\xEF\xBB\xBFthe dog sleeps\r\n\n  \nthe\told dog\nthe dog sleeps\nshe reads");  // no line without text is found
  const Ran again = bert_run(command + "--top 9");
  CHECK(has(again.err, "made again"));
  CHECK(lines_in(again.out) == 8);
  CHECK(has(again.out, "\t4\tthe\told dog\n"));
  CHECK(has(again.out, "\t1\tthe dog sleeps\n"));
  CHECK(bert_run(command + "--top 9 --quiet").out == again.out);
  const Ran pairs = bert_run("search --pairs --top 1 --model " + model + " --corpus " + corpus);
  CHECK(has(pairs.out, "\t1\t5\n"));
  CHECK(lines_in(pairs.out) == 1);
  std::istringstream score(pairs.out);
  double cosine = 0;
  CHECK((score >> cosine && std::fabs(cosine - 1) < 1e-6));

  CHECK(bert_run(command + "--index " + (folder / "queries.txt")).status == 1);
  CHECK(has(bert::read_file(folder / "queries.txt"), "old dog"));
  put(corpus, "");
  CHECK(has(bert_run(command).err, "empty"));
  CHECK(bert_run("search --pairs --input x --corpus y --model " + model).status == 2);
  CHECK(bert_run("search --corpus /dev/null --model " + model).status == 1);
  put(folder / "corpus.tsv", "text\tlabel\nthe dog\t1\n");
  const Ran table = bert_run("search --corpus " + (folder / "corpus.tsv") + " --model " + model);
  CHECK((table.status == 1 && has(table.err, "a text a line") && !std::filesystem::exists(folder / "corpus.tsv.bert-index")));
  std::string cut = "the old dog";
  for (int i = 0; i < 200; i++) cut += " sleeps";
  put(corpus, cut + "\n" + cut + "\nthe dog\n");
  const Ran counted = bert_run(command);  // of the corpus, and none of the queries
  CHECK((has(counted.err, "2 of 3 texts were longer") && counted.err.find("longer") == counted.err.rfind("longer")));
}

TEST_CASE("pretrain: sentences end at . ! ? before white space, but not after Mr. and its like or an initial") {
  const std::pair<const char*, int> cases[] = {
      {"The dog barks. The bird sings! Who swims? The fish", 4}, {"Mr. Smith met J. R. Jones in St. Louis. They left.", 2},
      {"(Dr. No said \"no.\" It rained.) The end.", 3},          {"Pi is 3.14, see example.org for more.", 1},
      {"Hm. Ms. Lee saw Mrs. Poe... Then she left.", 3},         {"The dog barks\xE3\x80\x82The bird sings.", 2}};
  for (const auto& [text, sentences] : cases) {
    const std::string shown = text;
    CAPTURE(shown);
    put(small().folder / "sentences.txt", text);
    const Ran r = bert_run("pretrain --dry-run --steps 1 --no-nsp --dev-split 0 --config tiny --vocab " + (small().folder / "vocab") +
                           " --input " + (small().folder / "sentences.txt") + " --output none");
    CHECK_MESSAGE(has(r.err, " " + std::to_string(sentences) + (sentences == 1 ? " sentence" : " sentences")), r.err);
  }
}

TEST_CASE("pretrain: shards beside the output or in --cache: killed and gone on with, kept, made again for another text") {
  const TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 700; i++) text += small_text(60, (uint64_t)i);  // some 2.3 million pieces
  put(folder / "large.txt", text);
  const std::string vocab = " --vocab " + (small().folder / "vocab") + " --config " + (small().folder / "config.json");
  const std::string command = "pretrain --dry-run --steps 1 --output " + (folder / "none") + vocab + " --max-length 32 --input ";
  const std::string cache = folder / "cache", large = command + (folder / "large.txt") + " --cache ";
  testing::run("./bert " + large + cache + " & p=$!; while kill -0 $p 2>/dev/null && [ ! -e " + cache +
               "/00000.ids ]; do sleep 0.002; done; kill -9 $p; wait $p");
  REQUIRE(std::filesystem::exists(cache + "/00000.ids"));
  CHECK(!std::filesystem::exists(cache + "/00002.ids"));
  const auto made_at = std::filesystem::last_write_time(cache + "/00000.ids");
  const Ran gone_on = bert_run(large + cache);
  REQUIRE_MESSAGE(gone_on.status == 0, gone_on.err);
  CHECK(has(gone_on.err, "going on after 1,"));
  CHECK(std::filesystem::last_write_time(cache + "/00000.ids") == made_at);
  const Ran whole = bert_run(large + (folder / "whole") + " --threads 1");
  CHECK(whole.out == gone_on.out);
  for (const char* file : {"/00000.ids", "/00001.ids", "/00002.ids"})
    CHECK(bert::read_file(cache + file) == bert::read_file((folder / "whole") + file));
  const Ran kept = bert_run(large + cache);
  CHECK(kept.out == whole.out);
  CHECK(!has(kept.err, "cache: "));

  // The options that change ids, the vocabulary and the text are in the key.
  const Ran other = bert_run(command + (small().folder / "text.txt") + " --cache " + cache);
  CHECK_MESSAGE(has(other.err, "shards of another text, vocabulary, settings or version; they are made again"), other.err);
  CHECK(!std::filesystem::exists(cache + "/00001.ids"));
  CHECK(!has(bert_run(command + (small().folder / "text.txt") + " --cache " + cache).err, "made again"));
  CHECK(has(bert_run(command + (small().folder / "text.txt") + " --format fasttext --cache " + cache).err, "made again"));
  std::filesystem::copy(small().folder / "vocab", folder / "vocab", std::filesystem::copy_options::recursive);
  put(folder / "vocab/tokenizer_config.json", "{\"do_lower_case\": false}");
  CHECK(has(bert_run("pretrain --dry-run --steps 1 --max-length 32 --output none --input " + (small().folder / "text.txt") + " --vocab " +
                     (folder / "vocab") + " --config " + (small().folder / "config.json") + " --cache " + cache)
                .err,
            "made again"));
  // A pipe cannot be read twice.
  const std::string pipe = "./bert " + command + "- --cache " + cache + " < " + (small().folder / "text.txt");
  CHECK(testing::run("cat " + (small().folder / "text.txt") + " | " + pipe.substr(0, pipe.find(" < "))).out == other.out);
  CHECK(has(testing::run(pipe).err, "made again"));

  CHECK(bert_run(command + (small().folder / "text.txt") + " --cache " + cache).status == 0);
  std::string bytes = bert::read_file(cache + "/00000.ids");
  bytes[bytes.size() / 2] ^= 1;
  put(cache + "/00000.ids", bytes);
  const Ran damaged = bert_run(command + (small().folder / "text.txt") + " --cache " + cache);
  CHECK(damaged.status == 1);
  CHECK(lines_in(damaged.err) == 1);
  CHECK_MESSAGE(has(damaged.err, "00000.ids: damaged: not what was written; remove it, and it is made again"), damaged.err);
  CHECK(std::filesystem::exists(folder / "cache"));
  CHECK(!std::filesystem::exists(folder / "none.shards"));

  // A run on several windows' worth of text, stopped and gone on with; the shards stand beside it.
  const std::string run =
      "pretrain --steps 4 --batch-tokens 256 --save-every 2 --phases 16:0.5,32:0.5 --input " + (folder / "large.txt") + vocab;
  const Ran trained = bert_run(run + " --output " + (folder / "model/"));
  REQUIRE_MESSAGE(trained.status == 0, trained.err);
  CHECK(std::filesystem::exists(folder / "model.shards/00002.ids"));
  CHECK(bert_run(run + " --cache " + (folder / "whole") + " --output " + (folder / "model2")).status == 0);
  same_run(folder / "model", folder / "model2");
  CHECK(has(bert_run(run + " --phases 16:0.25,32:0.75 --resume --output " + (folder / "model")).err, "given twice"));
}

TEST_CASE("pretrain: --phases, killed on both sides of the boundary, ends with the same bytes; a text of one document trains too") {
  std::string command = small().pretrain;
  command.replace(command.find("--max-length 48"), 15, "--phases 24:0.7,48:0.3");
  const std::string whole = small().folder / "phases", parts = small().folder / "phases-parts", dump = small().folder / "phases.jsonl";
  const std::string rest = "--steps 20 --save-every 1 --accumulate 2 --output ";
  REQUIRE(bert_run(command + rest + whole + " --dump-batches " + dump).status == 0);
  for (const char* step : {"6", "14", "15"}) {
    testing::run("./bert " + command + rest + parts + " --resume & p=$!; while kill -0 $p 2>/dev/null && ! grep -q '\"step\":" + step +
                 "," + "' " + parts + "/log.jsonl; do sleep 0.002; done; kill -9 $p; wait $p");
    if (!std::filesystem::exists(parts)) std::filesystem::create_directories(parts);
  }
  const Ran resumed = bert_run(command + rest + parts + " --resume");
  REQUIRE_MESSAGE(resumed.status == 0, resumed.err);
  same_run(whole, parts);
  // The batches' rows: short ones for 14 steps, then long ones.
  int64_t longest[2] = {0, 0};
  std::istringstream lines(bert::read_file(dump));
  for (std::string line; std::getline(lines, line);) {
    const bert::Json batch = bert::Json::parse(line, "batch");
    const auto& offsets = batch.find("offsets")->items("offsets");
    int64_t& most = longest[batch.find("step")->as_int("step") > 14];
    for (size_t r = 1; r < offsets.size(); r++) most = std::max(most, offsets[r].as_int("") - offsets[r - 1].as_int(""));
  }
  CHECK(longest[0] == 24);
  CHECK(longest[1] == 48);
  command.replace(command.find("24:0.7"), 6, "24:0.5,32:0.2");
  CHECK(has(bert_run(command + rest + whole + " --resume").err, "--phases (begun with 24:0.7,48:0.3, now 24:0.5,32:0.2,48:0.3)"));
  command.replace(command.find("48:0.3"), 6, "65:0.3");
  const Ran long_rows = bert_run(command + "--steps 2 --output " + (small().folder / "long-rows"));
  CHECK(long_rows.status == 1);
  CHECK(has(long_rows.err, "--phases: rows of 65, but the model has only 64 positions"));

  std::string one;  // document
  for (const char c : small_text(40, 9))
    if (c != '\n') one += c;
  put(small().folder / "one.txt", one);
  const std::string alone = "pretrain --steps 3 --batch-tokens 256 --max-length 32 --dev-split 0.1 --input " +
                            (small().folder / "one.txt") + " --vocab " + (small().folder / "vocab") + " --config " +
                            (small().folder / "config.json") + " --output ";
  const Ran spans = bert_run(alone + (small().folder / "one") + " --no-nsp");
  CHECK_MESSAGE(spans.status == 0, spans.err);
  CHECK(has(spans.err, "stretches of sentences"));
  CHECK(has(spans.out, "loss_dev\t"));
  CHECK(has(bert_run(alone + (small().folder / "pairs")).err, "at least two documents"));
  const Ran dry_run = bert_run(alone + (small().folder / "pairs") + " --dry-run");
  CHECK_MESSAGE((dry_run.status == 1 && has(dry_run.err, "at least two documents")), dry_run.err);
  const Ran scores = bert_run("evaluate --model " + pretrained() + " --input " + (small().folder / "one.txt"));
  CHECK_MESSAGE((scores.status == 0 && has(scores.out, "loss\t") && !has(scores.out, "nsp_")), scores.out);
  CHECK(has(scores.err, "no next-sentence figures"));
  CHECK(has(bert_run("evaluate --model " + pretrained() + " --input " + (small().folder / "text.txt")).out, "nsp_accuracy\t"));
  std::string dry = alone;
  dry.replace(dry.find("--dev-split 0.1"), 15, "--dry-run --dev " + (small().folder / "one.txt"));
  CHECK(has(bert_run(dry + (small().folder / "dry-pairs")).err, "at least two held-out documents"));
  CHECK(!std::filesystem::exists(small().folder / "dry-pairs.shards"));
}

TEST_CASE("training: bad labelled data is named with its line") {
  const TemporaryFolder folder;
  auto finetune = [&](const std::string& train, const std::string& dev, const std::string& task) {
    put(folder / "t.tsv", train), put(folder / "d.tsv", dev);
    return bert_run("finetune --task " + task + " --model " + pretrained() + " --train " + (folder / "t.tsv") + " --dev " +
                    (folder / "d.tsv") + " --output " + (folder / "o"));
  };
  const std::string good = "text\tlabel\na\tx\nb\ty\n";
  const std::array<std::string, 4> bad[] = {
      {good, "text\tlabel\na\tz\n", "classify", "d.tsv:2: label 'z', which training never saw"},
      {good, "text\na\n", "classify", "d.tsv:1: no label"},
      {"text\tlabel\na\tx\nb\n", good, "classify", "t.tsv:3: 1 field"},
      {"text\tlabel\na\tx\nb\t\n", good, "classify", "t.tsv:3: an empty label"},
      {"text\tlabel\na\tx\nb\tx\n", good, "classify", "only one label"},
      {good, good, "regress", "t.tsv:2: 'x' is no number"},
      {"text\tlabel\n", good, "classify", "no labelled text"},
      {good, "text\tpair\tlabel\na\tb\tx\n", "classify", "d.tsv: pairs of texts, but the training data is not"},
  };
  for (const auto& [train, dev, task, message] : bad) {
    const Ran r = finetune(train, dev, task);
    CHECK(r.status == 1);
    CHECK_MESSAGE(has(r.err, message), r.err);
    CHECK(!std::filesystem::exists(folder / "o"));
  }
  put(folder / "t.jsonl", "{\"text\":\"a\",\"labels\":[\"x|y\"]}\n");
  put(folder / "t.csv", "text,choice0,choice1,choice3,label\na,x,y,z,0\n");
  put(folder / "t.json",
      "{\"data\":[{\"paragraphs\":[{\"context\":\"a b\",\"qas\":[{\"id\":\"1\",\"question\":\"c\"},"
      "{\"id\":\"2\",\"question\":\"c\",\"answers\":[{\"text\":\"a\",\"answer_start\":-1}]}]}]}]}");
  const std::array<std::string, 3> others[] = {{"multilabel", "t.jsonl", "t.jsonl:1: a label that holds |"},
                                               {"choice", "t.csv", "t.csv:1: no choice2 among"},
                                               {"qa", "t.json", "t.json: question 1: no 'answers'; or pass over such lines"},
                                               {"qa", "t.json --skip-bad", "question 2: the answer 'a' does not stand in the context"}};
  for (const auto& [task, file, message] : others) {
    const Ran r =
        bert_run("finetune --task " + task + " --model " + pretrained() + " --output " + (folder / "o") + " --train " + (folder / file));
    CHECK_MESSAGE((r.status == 1 && has(r.err, message)), r.err);
  }
}

TEST_CASE("finetune: texts and pairs are not mixed, pairs that are not alike are no positives, options that would do nothing are refused") {
  const TemporaryFolder folder;
  put(folder / "pairs.jsonl", "{\"text\":\"a\",\"pair\":\"b\",\"label\":1}\n{\"text\":\"a\",\"pare\":\"b\",\"label\":0}\n");
  put(folder / "unlike.tsv", "text\tpair\tscore\na\tb\t1\na\tb\t0\n");
  put(folder / "alike.tsv", "text\tpair\nthe dog\tbarks\nthe cat\tsings\na\tb\nb\tc\n");  // needs no score
  put(folder / "named.tsv", "text\tpair\tlabel\na\tb\tyes\nb\tc\tno\na\tc\tyes\n");
  const std::string begin = "finetune --epochs 1 --model " + pretrained() + " --output " + (folder / "o") + " --task ";
  const std::string alike = "similarity --loss inbatch --train " + (folder / "alike.tsv"),
                    classes = "classify --train " + small().folder.path;
  const std::pair<std::string, const char*> wrong[] = {
      {"regress --train " + (folder / "pairs.jsonl"), "pairs.jsonl:2: one text, where the rows before have two"},
      {"similarity --loss inbatch --train " + (folder / "unlike.tsv"), "unlike.tsv:3: --loss inbatch wants two texts that are alike"},
      {alike + " --batch 1", "--loss inbatch compares the texts of a batch"},
      {classes + "/train.tsv --dev-split 0 --patience 1", "--patience needs held-out texts"},
      {classes + "/train.tsv --freeze 1 --from-scratch", "exclude each other"},
      {classes + "/train.tsv --max-length 32 --stride 16", "--stride 16: of windows of 32 tokens at most 15"},
      {"similarity --temperature 0.1 --train " + (folder / "alike.tsv"), "--temperature is for --loss inbatch"},
      {"similarity --loss inbatch --train " + (folder / "named.tsv"), "named.tsv:2: 'yes' is no number"},
      {classes + "/train.tsv --freeze 2 --reinit 1", "layers that begin anew would stay as drawn"}};
  for (const auto& [rest, message] : wrong) {
    const Ran r = bert_run(begin + rest);
    CHECK_MESSAGE((r.status != 0 && has(r.err, message)), r.err);
    CHECK(!std::filesystem::exists(folder / "o"));
  }
  const Ran skipped = bert_run(begin + "similarity --loss inbatch --dev-split 0 --skip-bad --train " + (folder / "unlike.tsv"));
  CHECK_MESSAGE((skipped.status == 0 && has(skipped.err, "1 line could not be used")), skipped.err);
  const std::string unnamed = "similarity --loss inbatch --columns text=0,pair=1 --train " + (folder / "named.tsv");
  CHECK(bert_run(begin + unnamed + " --dev-split 0 --batch 2 --overwrite").status == 0);  // the label is not asked for
  REQUIRE(bert_run(begin + alike + " --dev-split 0 --batch 4 --overwrite").status == 0);
  const std::string ranked = bert_run("evaluate --model " + (folder / "o") + " --input " + (folder / "alike.tsv")).out;
  for (const char* figure : {"mrr\t", "mrr_low\t", "mrr_high\t", "recall_10_low\t"}) CHECK_MESSAGE(has(ranked, figure), ranked);
  put(folder / "equal.tsv", "text\tpair\tscore\na\tb\t1\nb\tc\t1\n");
  CHECK(has(bert_run("evaluate --model " + (folder / "o") + " --input " + (folder / "equal.tsv")).err, "no correlation is defined"));
  CHECK(has(bert_run("predict --offsets chars --model " + (folder / "o")).err, "--offsets is for tags and questions"));
  CHECK(has(bert_run("predict --long error --stride 4 --model " + (folder / "o")).err, "--stride is for --long window"));
  CHECK(has(bert_run(begin + alike + " --seeds 2 --resume").err, "holds a run of its own"));
}

// Sentences with tags: dogs and cats are pets, what they do is an act.
std::string tagged_text(int sentences, uint64_t seed) {
  static const char* const nouns[] = {"dog", "cat", "bird", "fish"};
  static const char* const verbs[] = {"barks", "sleeps", "sings", "swims"};
  bert::Random random({seed, 0, 0, 0});
  std::ostringstream out;
  out << "-DOCSTART- X O\n\n";
  for (int s = 0; s < sentences; s++) {
    const int64_t noun = random.below(4), verb = random.below(4);
    out << "the DT O\n"
        << nouns[noun] << " NN " << (noun < 2 ? "B-PET" : "B-WILD") << "\n"
        << verbs[verb] << " VB I-" << (noun < 2 ? "PET" : "WILD") << "\nin IN O\nthe DT O\ngarden NN B-PLACE\n\n";
  }
  return out.str();
}

TEST_CASE("tags: trained from CoNLL, answered as CoNLL, as entities with offsets, in texts of any length") {
  const TemporaryFolder folder;
  put(folder / "train.conll", tagged_text(300, 1)), put(folder / "dev.conll", tagged_text(20, 2));
  const std::string model = folder / "tagger";
  const Ran r = bert_run("finetune --task tag --model " + pretrained() + " --train " + (folder / "train.conll") + " --dev " +
                         (folder / "dev.conll") + " --epochs 8 --lr 5e-3 --batch 8 --max-length 24 --stride 8 --output " + model);
  REQUIRE_MESSAGE(r.status == 0, r.err);
  CHECK_MESSAGE(has(r.out, "entity_f1_dev\t1\n"), r.out);
  CHECK(has(bert_run("info --model " + model).out, "max_length\t24\n"));  // it answers in windows like those that it was trained in
  put(folder / "classes.tsv", "text\tlabel\nthe cat swims\ta\nthe bird sings\tb\n");
  const std::string other = folder / "classifier";  // which begins with the tagger's config.json: a class sees all that the model can
  REQUIRE(bert_run("finetune --task classify --from-scratch --dev-split 0 --epochs 1 --model " + model + " --train " +
                   (folder / "classes.tsv") + " --output " + other)
              .status == 0);
  CHECK(has(bert_run("info --model " + other).out, "max_length\t64\n"));
  CHECK(has(bert_run("evaluate --model " + model + " --input " + (folder / "dev.conll")).out, "entity_f1\t1\n"));
  put(folder / "words.conll", "the\ncat\nswims\n\na\nbird\n");
  const Ran lines = bert_run("predict --model " + model + " --input " + (folder / "words.conll"));
  CHECK_MESSAGE(has(lines.out, "the\tO\ncat\tB-PET\nswims\tI-PET\n\na\t"), (lines.out + lines.err));
  put(folder / "text.txt", "the  cat swims in the garden \xE4\xBD\xA0 the bird sings");
  const Ran entities = bert_run("predict --model " + model + " --input " + (folder / "text.txt"));
  CHECK_MESSAGE(has(entities.out, "{\"entities\":["), (entities.out + entities.err));
  CHECK_MESSAGE(has(entities.out, "\"type\":\"PET\",\"text\":\"cat swims\",\"start\":5,\"end\":14,\"score\":"), entities.out);
  CHECK_MESSAGE(has(entities.out, "\"start\":37,"), entities.out);
  CHECK(has(bert_run("predict --offsets chars --model " + model + " --input " + (folder / "text.txt")).out, "\"start\":35,"));
  std::string long_text;
  for (int i = 0; i < 400; i++) long_text += "the river is in the house at night ";
  put(folder / "long.txt", long_text + "the cat swims in the garden " + long_text);
  const Ran found = bert_run("predict --stride 8 --model " + model + " --input " + (folder / "long.txt"));
  CHECK(has(found.out, "\"text\":\"cat swims\",\"start\":" + std::to_string(long_text.size() + 4)));
  put(folder / "bad.conll", "the O\ndog B-PET extra\n\n");
  CHECK(has(bert_run("evaluate --model " + model + " --input " + (folder / "bad.conll")).err,
            "bad.conll:2: 3 columns, but the file's first line has 2"));
  put(folder / "bad.conll", "the O\ndog\n\n");
  CHECK(has(bert_run("evaluate --model " + model + " --input " + (folder / "bad.conll")).err, "bad.conll:2: no tag"));
  put(folder / "bad.conll", "the O\ndog PET\ncat B-PET\n\n");
  CHECK(has(bert_run("evaluate --model " + model + " --input " + (folder / "bad.conll")).err,
            "bad.conll:1: word 2 (dog): tag 'PET' beside tags like B-PER"));
  put(folder / "bad.conll", "the O\nbird\n\nthe O\ncat B-PET\n\n");
  CHECK(has(bert_run("evaluate --skip-bad --model " + model + " --input " + (folder / "bad.conll")).err,
            "1 sentence could not be used and skipped"));
  put(folder / "bad.conll", "the O\ndog B-CAR\n\n");
  CHECK(has(bert_run("evaluate --model " + model + " --input " + (folder / "bad.conll")).err, "label 'B-CAR', which training never saw"));
}

TEST_CASE("questions: trained from SQuAD's format, answered from the context, with and without an answer, far inside a long one") {
  const TemporaryFolder folder;
  auto squad = [&](int questions, uint64_t seed) {
    static const char* const nouns[] = {"dog", "cat", "bird", "fish"};
    static const char* const places[] = {"in the house", "in the garden", "by the river", "at night"};
    bert::Random random({seed, 0, 0, 0});
    std::ostringstream out;
    out << "{\"version\":\"v2.0\",\"data\":[{\"title\":\"t\",\"paragraphs\":[";
    for (int q = 0; q < questions; q++) {
      const int64_t noun = random.below(4), place = random.below(4);
      const bool none = random.below(4) == 0;
      const std::string before = std::string("the ") + nouns[noun] + " sleeps ";
      out << (q ? "," : "") << "{\"context\":\"" << before << places[place] << ".\",\"qas\":[{\"id\":\"q" << q << "\",\"question\":\"the "
          << nouns[none ? (noun + 1) % 4 : noun] << "\",\"is_impossible\":" << (none ? "true" : "false") << ",\"answers\":[";
      if (!none) out << "{\"text\":\"" << places[place] << "\",\"answer_start\":" << before.size() << "}";
      out << "]}]}";
    }
    return out.str() + "]}]}";
  };
  put(folder / "train.json", squad(500, 1)), put(folder / "dev.json", squad(40, 2));
  const std::string model = folder / "qa";
  const Ran r = bert_run("finetune --task qa --model " + pretrained() + " --train " + (folder / "train.json") + " --dev " +
                         (folder / "dev.json") + " --epochs 8 --lr 3e-3 --batch 8 --max-length 48 --stride 8 --output " + model);
  REQUIRE_MESSAGE(r.status == 0, r.err);
  CHECK(has(r.out, "f1_dev\t"));
  CHECK_MESSAGE(has(bert::read_file(model + "/config.json"), "\"null_threshold\""), r.out);
  // What the folder says is what training said of it, whatever its tokenizer's own limit is.
  std::string tokenizer = bert::read_file(model + "/tokenizer_config.json");
  const size_t limit = tokenizer.find("\"model_max_length\": ");
  REQUIRE(limit != tokenizer.npos);
  tokenizer.replace(limit, tokenizer.find_first_of(",\n", limit) - limit, "\"model_max_length\": 16");
  put(model + "/tokenizer_config.json", tokenizer);
  const Ran scores = bert_run("evaluate --model " + model + " --input " + (folder / "dev.json"));
  REQUIRE_MESSAGE(scores.status == 0, scores.err);
  for (const char* name : {"exact", "f1"}) {
    const size_t at = r.out.find(std::string(name) + "_dev\t");
    REQUIRE(at != r.out.npos);
    const std::string value = r.out.substr(r.out.find('\t', at), r.out.find('\n', at) + 1 - r.out.find('\t', at));
    CHECK_MESSAGE(has(scores.out, name + value), (r.out + scores.out));
  }
  put(folder / "ask.jsonl", "{\"id\":\"a\",\"question\":\"the dog\",\"context\":\"the dog sleeps by the river.\"}\n");
  CHECK(bert_run("predict --model " + model + " --input " + (folder / "ask.jsonl")).out.starts_with("{\"id\":\"a\",\"answer\":\""));
  const Ran answer = bert_run("predict --jsonl --model " + model + " --input " + (folder / "ask.jsonl"));  // whether or not it says so
  CHECK_MESSAGE(has(answer.out, "\"answers\":[{\"answer\":\"by the river\",\"start\":15,\"end\":27,\"score\":"), (answer.out + answer.err));
  std::string filler;
  for (int i = 0; i < 300; i++) filler += "a bird sings and a cat swims. ";
  put(folder / "ask.jsonl", "{\"question\":\"the dog\",\"context\":\"" + filler + "the dog sleeps by the river. " + filler + "\"}\n");
  const Ran far = bert_run("predict --jsonl --stride 8 --model " + model + " --input " + (folder / "ask.jsonl"));
  CHECK_MESSAGE(has(far.out, "{\"answer\":\"by the river\",\"start\":" + std::to_string(filler.size() + 15)), (far.out + far.err));
  put(folder / "bad.jsonl", "{\"question\":\"q\",\"context\":\"a b c\",\"answers\":{\"text\":[\"d\"],\"answer_start\":[1]}}\n");
  CHECK(has(
      bert_run("finetune --task qa --model " + pretrained() + " --train " + (folder / "bad.jsonl") + " --output " + (folder / "no")).err,
      "bad.jsonl:1: the answer 'd' does not stand in the context at its answer_start"));
  const Ran misplaced = bert_run("evaluate --model " + model + " --input " + (folder / "bad.jsonl"));  // its text counts all the same
  CHECK_MESSAGE((misplaced.status == 0 && has(misplaced.out, "exact\t0\n")), misplaced.err);
  CHECK_MESSAGE(has(misplaced.err, "1 answer not where the file says in the context, the first in " + (folder / "bad.jsonl") + ":1"),
                misplaced.err);
  put(folder / "table.tsv", "question\tcontext\tanswer\nq\ta b c\tb\nq\ta b c\t\n");
  CHECK(bert_run("finetune --task qa --dev-split 0 --epochs 1 --model " + pretrained() + " --train " + (folder / "table.tsv") +
                 " --output " + (folder / "from-table"))
            .status == 0);
  // Some of these have no answer, and none that is held out could say when to say so: then where "no answer" scores best.
  CHECK(has(bert::read_file((folder / "from-table") + "/config.json"), "\"null_threshold\": 0,"));
  put(folder / "table.tsv", "question\tcontext\tanswer\nq\ta b c\td\n");
  CHECK(has(
      bert_run("finetune --task qa --model " + pretrained() + " --train " + (folder / "table.tsv") + " --output " + (folder / "no")).err,
      "table.tsv:2: the answer 'd' does not stand in the context"));
  put(folder / "ids.txt", "2 5 3 6 3\t0 0 0 1 1\n");
  CHECK(has(bert_run("predict --format ids --model " + model + " --input " + (folder / "ids.txt")).err,
            "ids.txt:1: ids have no text for an answer to stand in"));
  CHECK(bert::split(bert_run("predict --logits --format ids --model " + model + " --input " + (folder / "ids.txt")).out, '\t').size() ==
        10);
  put(folder / "bad.jsonl", "{\"question\":\"q\",\"answers\":[]}\n");
  CHECK(has(bert_run("evaluate --model " + model + " --input " + (folder / "bad.jsonl")).err, "no context"));
  put(folder / "bad.jsonl", "{\"context\":\"a b\"}\n");
  CHECK(has(bert_run("predict --model " + model + " --input " + (folder / "bad.jsonl")).err, "bad.jsonl:1: no text (text, sentence"));
  for (const char* answers : {"{\"text\":\"a\",\"answer_start\":0}", "[{\"text\":\"a\",\"answer_start\":0.5}]", "[{\"text\":7}]"}) {
    put(folder / "bad.jsonl", std::string("{\"question\":\"q\",\"context\":\"a b\",\"answers\":") + answers + "}\n");
    const Ran wrong = bert_run("evaluate --model " + model + " --input " + (folder / "bad.jsonl"));
    CHECK_MESSAGE((wrong.status == 1 && has(wrong.err, "bad.jsonl:1: ") && has(wrong.err, "--skip-bad")), wrong.err);
  }
  const Ran cut = bert_run("predict --long truncate --model " + model + " --input " + (folder / "ask.jsonl"));
  CHECK_MESSAGE(has(cut.err, "1 of 1 texts were longer than 48 tokens and were cut"), cut.err);
  const std::string begin = "a bird sings.\\n\\nthe dog sleeps by the river.\\n\\n" + filler;  // a window's, not a paragraph's
  put(folder / "ask.jsonl", "{\"question\":\"the dog\",\"context\":\"" + begin + "\"}\n");
  const Ran in_begin = bert_run("predict --jsonl --long truncate --model " + model + " --input " + (folder / "ask.jsonl"));
  CHECK_MESSAGE(has(in_begin.out, "the dog sleeps"), (in_begin.out + in_begin.err));
  // A question may take half of a window's 45 pieces: more is cut, and said.
  put(folder / "ask.jsonl", "{\"question\":\"" + filler.substr(0, 400) + "\",\"context\":\"the dog sleeps\",\"answers\":\"dog\"}\n");
  for (const char* command : {"predict", "evaluate"}) {
    const Ran said = bert_run(command + (" --model " + model) + " --input " + (folder / "ask.jsonl"));
    CHECK_MESSAGE(has(said.err, "1 of 1 texts were longer than 22 tokens and were cut"), said.err);
  }
  CHECK(has(bert_run("predict --long error --model " + model + " --input " + (folder / "ask.jsonl")).err, "longer than 22 tokens"));
  CHECK(has(testing::run("echo only a question | ./bert predict --model " + model).err, "a question and its context are wanted"));
}

TEST_CASE("choices and similarity: trained, scored, answered, and refused where a row does not fit") {
  const TemporaryFolder folder;
  std::string choices = "", pairs = "text\tpair\tscore\n", partners = "";
  for (int i = 0; i < 80; i++) {
    const bool dog = i % 2, first = i % 3 == 0;
    const std::string right = dog ? "barks" : "sings", wrong = dog ? "sings" : "barks", noun = dog ? "the dog" : "the bird";
    choices += "{\"text\":\"" + noun + "\",\"choices\":[\"" + (first ? right : wrong) + "\",\"" + (first ? wrong : right) +
               "\"],\"label\":" + (first ? "0" : "1") + "}\n";
    pairs += noun + " " + right + "\t" + (first ? noun : wrong) + "\t" + (first ? "1" : "0") + "\n";
    partners += "{\"text\":\"" + noun + "\",\"positive\":\"" + right + "\",\"negative\":\"" + wrong + "\"}\n";
  }
  put(folder / "choices.jsonl", choices), put(folder / "pairs.tsv", pairs), put(folder / "partners.jsonl", partners);
  const std::string rest = " --model " + pretrained() + " --epochs 30 --lr 3e-3 --batch 8 --output ";  // learned from any seed
  const Ran choice = bert_run("finetune --task choice --train " + (folder / "choices.jsonl") + rest + (folder / "choice"));
  REQUIRE_MESSAGE(choice.status == 0, choice.err);
  CHECK_MESSAGE(has(choice.out, "accuracy_dev\t1\n"), choice.out);
  put(folder / "ask.jsonl", "{\"text\":\"the dog\",\"choices\":[\"sings\",\"barks\"]}\n");
  const Ran said = bert_run("predict --model " + (folder / "choice") + " --input " + (folder / "ask.jsonl"));
  CHECK_MESSAGE(said.out.starts_with("1\t0."), (said.out + said.err));
  put(folder / "bad.jsonl", "{\"text\":\"a\",\"choices\":[\"b\",\"c\"],\"label\":2}\n");
  CHECK(has(bert_run("evaluate --model " + (folder / "choice") + " --input " + (folder / "bad.jsonl")).err,
            "bad.jsonl:1: '2' is no choice's number, from 0 to 1"));

  for (const char* loss : {"cosine", "contrastive"}) {
    const std::string out = folder / loss;
    const Ran r = bert_run("finetune --task similarity --train " + (folder / "pairs.tsv") + " --loss " + loss + rest + out);
    REQUIRE_MESSAGE(r.status == 0, r.err);
    CHECK_MESSAGE(has(r.out, "spearman_dev\t"), r.out);
    put(folder / "mixed.jsonl", partners.substr(0, partners.find('\n') + 1));
    put(folder / "scored.jsonl", "{\"text\":\"the dog\",\"pair\":\"barks\",\"label\":1}\n");
    std::string many;  // more than are answered at once
    for (int i = 0; i < 2048; i++) many += bert::read_file(folder / "mixed.jsonl");
    put(folder / "mixed.jsonl", many + bert::read_file(folder / "scored.jsonl"));
    const Ran mixed = bert_run("evaluate --model " + out + " --input " + (folder / "mixed.jsonl"));
    CHECK_MESSAGE((mixed.status == 1 && has(mixed.err, "some pairs have a score and some have none")), mixed.err);
    for (const char* file : {"/modules.json", "/1_Pooling/config.json", "/sentence_bert_config.json"})
      CHECK(std::filesystem::exists(out + file));
    CHECK(bert_run("evaluate --model " + out + " --input " + (folder / "pairs.tsv")).status == 0);
    const Ran cosine = testing::run("printf 'the dog barks\\tthe dog barks\\n' | ./bert predict --model " + out);
    CHECK_MESSAGE(std::fabs(std::atof(cosine.out.c_str()) - 1) < 1e-6, (cosine.out + cosine.err));
  }
  const Ran apart = bert_run("info --model " + pretrained() + " --compare " + (folder / "cosine"));  // with a head, and without
  CHECK_MESSAGE(!has(apart.out, "embeddings.word_embeddings.weight\tonly in"), apart.out);
  CHECK(has(apart.out, "cls.seq_relationship.weight\tonly in " + pretrained()));
  for (const char* loss : {"inbatch", "triplet"})
    CHECK(bert_run("finetune --task similarity --dev-split 0 --train " + (folder / "partners.jsonl") + " --loss " + loss + rest +
                   (folder / loss))
              .status == 0);
  CHECK(has(bert_run("finetune --task similarity --loss triplet --train " + (folder / "pairs.tsv") + rest + (folder / "no")).err,
            "pairs.tsv:2: --loss triplet wants a text, a positive and a negative one"));
  put(folder / "five.tsv", "text\tpair\tscore\nthe dog\tthe cat\t0.5\nthe dog\tthe dog\t5\n");
  for (const auto& [loss, message] : {std::pair("cosine", "five.tsv:3: --loss cosine wants two texts and their cosine, from -1 to 1"),
                                      {"contrastive", "five.tsv:2: --loss contrastive wants two texts and 1 or 0"}}) {
    const Ran r = bert_run("finetune --task similarity --train " + (folder / "five.tsv") + " --loss " + loss + rest + (folder / "no"));
    CHECK_MESSAGE((r.status == 1 && has(r.err, message)), r.err);
  }
  put(folder / "one.tsv", "text\tscore\nthe dog\t1\nthe cat\t0\n");
  CHECK(has(bert_run("finetune --task similarity --train " + (folder / "one.tsv") + rest + (folder / "no")).err, "one.tsv:2: one text"));
  CHECK(!std::filesystem::exists(folder / "no"));
}

TEST_CASE("finetune: frozen layers stay, the options of other tasks are refused, one answer for all is said") {
  const TemporaryFolder folder;
  const std::string out = folder / "frozen";
  REQUIRE(bert_run(small().finetune(pretrained(), out) +
                   "--epochs 1 --freeze 1 --layer-decay 0.9 --label-smoothing 0.1 --class-weights balanced")
              .status == 0);
  const Ran same = bert_run("info --model " + pretrained() + " --compare " + out);
  CHECK(has(same.out, "only in"));
  const bert::ModelFolder before = bert::load_folder(pretrained(), false), after = bert::load_folder(out, false);
  auto moved = [](const bert::Tensor& a, const bert::Tensor& b) {
    return std::memcmp(a.data(), b.data(), (size_t)a.size() * sizeof(float)) != 0;
  };
  CHECK(!moved(before.bert.word, after.bert.word));
  CHECK(!moved(before.bert.layers[0].up.weight, after.bert.layers[0].up.weight));
  CHECK(moved(before.bert.layers[1].up.weight, after.bert.layers[1].up.weight));
  CHECK(has(bert_run(small().finetune(pretrained(), folder / "x") + "--loss triplet").err,
            "--loss is for --task similarity, not for classify"));
  CHECK(has(bert_run(small().finetune(pretrained(), folder / "x") + "--freeze 3").err, "--freeze 3: the model has 2 layers"));
  const Ran none = bert_run("finetune --task classify --epochs 1 --lr 1e-9 --model " + pretrained() + " --train " +
                            (small().folder / "train.tsv") + " --output " + (folder / "none"));
  CHECK_MESSAGE(has(none.err, "every text was given one label"), none.err);
  CHECK(none.err.find("every text was given") == none.err.rfind("every text was given"));  // once, not at every epoch
  CHECK(has(bert::read_file((folder / "none") + "/report.html"), "The worst mistakes"));
}

TEST_CASE("training: a resumed run ends with the bytes of one that was never stopped, also at another number of threads") {
  const std::string whole = small().folder / "whole", parts = small().folder / "parts";
  REQUIRE(bert_run(small().pretrain + "--steps 30 --save-every 7 --threads 1 --output " + whole).status == 0);
  // Stopped by the third save: a process of its own that is killed as soon as the log has step 20.
  const std::string command = "./bert " + small().pretrain + "--steps 30 --save-every 7 --output " + parts;
  testing::run(command + " & p=$!; while kill -0 $p 2>/dev/null && ! grep -q '\"step\":20,' " + parts +
               "/log.jsonl; do sleep 0.01; done; kill -9 $p; wait $p");
  const Ran resumed = testing::run(command + " --resume");
  REQUIRE_MESSAGE(resumed.status == 0, resumed.err);
  same_run(whole, parts);
  const Ran again = testing::run(command + " --resume");
  CHECK(again.status == 0);
  same_run(whole, parts);
  const Ran other = bert_run(small().pretrain + "--steps 30 --lr 2e-3 --resume --output " + parts);
  CHECK(other.status != 0);
  CHECK(has(testing::run("./bert " + small().pretrain + "--steps 30 --save-every 7 --clip 2 --resume --output " + parts).err,
            "--clip (begun with 1, now 2)"));
  CHECK(has(bert_run(small().pretrain + "--steps 30 --output " + parts).err, "--overwrite"));
}

TEST_CASE("training: --recompute gives the same bytes; --dtype bf16 its own, near f32's, in f32 files, whatever the threads") {
  const std::string f32 = small().folder / "f32", again = small().folder / "again", bf16 = small().folder / "bf16",
                    two = small().folder / "two";
  REQUIRE(bert_run(small().pretrain + "--steps 20 --output " + f32).status == 0);
  REQUIRE(bert_run(small().pretrain + "--steps 20 --recompute --output " + again).status == 0);
  same_run(f32, again);
  const Ran rounded = bert_run(small().pretrain + "--steps 20 --dtype bf16 --output " + bf16);
  REQUIRE_MESSAGE(rounded.status == 0, rounded.err);
  REQUIRE(bert_run(small().pretrain + "--steps 20 --dtype bf16 --threads 1 --recompute --output " + two).status == 0);
  same_run(bf16, two);
  const Ran apart = bert_run("info --model " + f32 + " --compare " + bf16);
  CHECK(apart.status == 0);
  CHECK(bert::read_file(f32 + "/model.safetensors") != bert::read_file(bf16 + "/model.safetensors"));
  CHECK(std::filesystem::file_size(f32 + "/model.safetensors") == std::filesystem::file_size(bf16 + "/model.safetensors"));
  CHECK(has(bert_run(small().pretrain + "--steps 20 --resume --output " + bf16).err, "--dtype (begun with bf16, now f32)"));
}

TEST_CASE("training: SIGINT and SIGTERM save, say how to go on, and exit 130 and 143") {
  for (const auto& [name, status] : {std::pair<const char*, int>{"INT", 130}, {"TERM", 143}}) {
    const std::string out = small().folder / (std::string("signal-") + name), whole = out + "-whole";
    const std::string command = "./bert " + small().pretrain + "--steps 60 --accumulate 2 --output ";
    const Ran r = testing::run(command + out + " & p=$!; while kill -0 $p 2>/dev/null && ! grep -q '\"step\":5,' " + out +
                               "/log.jsonl; do sleep 0.01; done; kill -" + name + " $p; wait $p");
    CHECK(r.status == status);
    CHECK(has(r.err, "go on with\n  " + testing::program() + " pretrain"));
    CHECK(has(r.err, "--resume"));
    CHECK(bert_run("info --model " + out).status == 0);
    if (status == 143) continue;
    CHECK(testing::run(command + out + " --resume").status == 0);
    CHECK(testing::run(command + whole).status == 0);
    same_run(whole, out);
  }
}

TEST_CASE("training: fine-tuning resumed ends with the same bytes; --seeds gives mean and deviation") {
  const std::string whole = small().folder / "tuned-whole", parts = small().folder / "tuned-parts";
  const Ran r = bert_run(small().finetune(pretrained(), whole) + "--epochs 5");
  REQUIRE_MESSAGE(r.status == 0, r.err);
  const std::string command = "./bert " + small().finetune(pretrained(), parts) + "--epochs 5";
  testing::run(command + " & p=$!; while kill -0 $p 2>/dev/null && ! grep -q '\"step\":13,' " + parts +
               "/log.jsonl; do sleep 0.005; done; kill -INT $p; wait $p");
  REQUIRE(testing::run(command + " --resume").status == 0);
  same_run(whole, parts);

  // Stopped before the first epoch's end: no model yet, which the folder says, and the same end.
  const std::string early = small().folder / "tuned-early", early_whole = early + "-whole";
  put(small().folder / "long.tsv", labelled_text(1000, 4));  // an epoch that is still going when the signal comes, on a busy machine too
  const std::string few = "finetune --task classify --model " + pretrained() + " --train " + (small().folder / "long.tsv") + " --dev " +
                          (small().folder / "dev.tsv") + " --batch 2 --epochs 1 --threads 1 --output ";
  const Ran stopped = testing::run("./bert " + few + early + " & p=$!; while kill -0 $p 2>/dev/null && [ ! -s " + early +
                                   "/log.jsonl ]; do sleep 0.002; done; kill -INT $p; wait $p");
  CHECK(stopped.status == 130);
  CHECK(has(stopped.err, "--resume"));
  CHECK(!std::filesystem::exists(early + "/model.safetensors"));
  const std::string no_model = "no model yet; go on with its own command and --resume";
  CHECK(has(bert_run("predict --model " + early + " < /dev/null").err, no_model));
  bert::write_file(early + "/model.safetensors", "");  // as if killed before config.json, which is written last
  CHECK(has(bert_run("predict --model " + early + " < /dev/null").err, no_model));
  std::filesystem::remove(early + "/model.safetensors");
  CHECK(has(bert_run(few + early).err, "--resume"));
  CHECK(bert_run(few + early + " --resume").status == 0);
  std::string other = bert::read_file(small().folder / "dev.tsv");  // another held-out set of as many texts
  for (size_t at = 0; (at = other.find("\tpet\t", at)) != other.npos; at++) other.replace(at, 5, "\twild\t");
  put(small().folder / "other.tsv", other);
  std::string elsewhere = few + early + " --resume";
  elsewhere.replace(elsewhere.find("dev.tsv"), 7, "other.tsv");
  CHECK(has(bert_run(elsewhere).err, "data"));
  CHECK(bert_run(few + early_whole).status == 0);
  same_run(early_whole, early);

  const Ran seeds = bert_run(small().finetune(pretrained(), small().folder / "seeds") + "--epochs 1 --seeds 2");
  REQUIRE_MESSAGE(seeds.status == 0, seeds.err);
  CHECK(has(seeds.out, "accuracy_dev_std\t"));
  CHECK(has(bert_run(small().finetune(small().folder / "seeds/seed-1", small().folder / "seeds") + "--seeds 2 --overwrite").err,
            "seeds/seed-1: the model that is started from"));
  std::filesystem::remove_all(small().folder / "seeds/seed-2");  // as if it was stopped between the two
  CHECK(bert_run(small().finetune(pretrained(), small().folder / "seeds") + "--epochs 1 --seeds 2 --resume").out == seeds.out);
  const Ran rows = bert_run(small().finetune(pretrained(), small().folder / "scratch") + "--epochs 1 --from-scratch --tsv toy");
  REQUIRE_MESSAGE(rows.status == 0, rows.err);
  CHECK(has(rows.out, "finetune\tours-f32\ttoy\taccuracy_dev\t"));
  const Ran half = bert_run(small().finetune(pretrained(), small().folder / "half") + "--epochs 1 --tsv toy --dtype bf16");
  CHECK_MESSAGE(has(half.out, "finetune\tours-bf16\ttoy\taccuracy_dev\t"), half.out);
}

TEST_CASE("training: --dry-run writes nothing; --dump-batches holds every step; --minutes ends") {
  const std::string none = small().folder / "dry";
  const Ran dry = bert_run(small().pretrain + "--steps 5 --dry-run --accumulate 4 --output " + none);
  CHECK(dry.status == 0);
  CHECK(has(dry.out, "parameters\t"));
  CHECK(has(dry.out, "gradients\t3\n"));
  CHECK(!std::filesystem::exists(none));
  std::filesystem::create_directory(small().folder / "tiny");  // a folder of that name is no config
  const Ran named = testing::run("bert=$(realpath ./bert ); cd " + small().folder.path +
                                 " && $bert pretrain --input text.txt --vocab vocab --config tiny --steps 2 --dry-run --output dry");
  CHECK_MESSAGE((named.status == 0 && has(named.out, "parameters\t")), named.err);
  // The memory that it foretells, by kind, and what a run then takes.
  const std::string vocab = small().folder / "vocab-of-4000";
  REQUIRE(bert_run("vocab --input data/english.txt --size 4000 --output " + vocab).status == 0);
  for (const std::string& how : {std::string("--batch-tokens 4096"), std::string("--batch-tokens 4096 --dtype bf16 --recompute")}) {
    const std::string options = "pretrain --input data/english.txt --vocab " + vocab + " --config mini --steps 2 --dev-split 0 " + how;
    const Ran told = bert_run(options + " --dry-run --output " + none),
              run = bert_run(options + " --output " + (small().folder / "measured"));
    REQUIRE_MESSAGE(run.status == 0, run.err);
    auto number = [](const std::string& text, const std::string& before) {
      const size_t at = text.find(before);
      REQUIRE(at != text.npos);
      return std::stod(text.substr(at + before.size()));
    };
    const double all = number(told.out, "all_MiB\t"), sum = number(told.out, "weights_MiB\t") + number(told.out, "gradients_MiB\t") +
                                                            number(told.out, "moments_MiB\t") + number(told.out, "activations_MiB\t") +
                                                            number(told.out, "\nbuffers_MiB\t");
    CHECK(all == doctest::Approx(sum).epsilon(1e-5));
#ifndef __SANITIZE_ADDRESS__  // AddressSanitizer keeps memory of its own
    CHECK(number(run.err, "peak memory ") == doctest::Approx(all).epsilon(0.1));
#endif
    std::filesystem::remove_all(small().folder / "measured");
  }
  const std::string dump = small().folder / "batches.jsonl";
  CHECK(bert_run(small().pretrain + "--steps 3 --accumulate 2 --no-nsp --whole-word --dump-batches " + dump + " --output " +
                 (small().folder / "dumped"))
            .status == 0);
  CHECK(lines_in(bert::read_file(dump)) == 6);
  CHECK(bert_run(small().pretrain + "--minutes 0.02 --output " + (small().folder / "minutes")).status == 0);
}

TEST_CASE("training: --minutes fixes the number of steps, and a resumed run keeps it; the line and the report say how it goes") {
  const std::string out = small().folder / "timed", command = "./bert " + small().pretrain + "--minutes 5 --output " + out;
  // Stopped after some steps: what it says, and the number of its steps.
  auto stopped = [&](const std::string& more) {
    const std::string lines = "$(cat " + out + "/log.jsonl 2>/dev/null | wc -l)";
    const Ran r = testing::run("n=" + lines + "; " + command + more + " & p=$!; while kill -0 $p 2>/dev/null && [ " + lines +
                               " -le $n ]; do sleep 0.01; done; kill -INT $p; wait $p");
    REQUIRE_MESSAGE(r.status == 130, r.err);
    const std::string end = r.err.substr(r.err.find("stopped by a signal after step "));
    return std::pair{r.err, end.substr(end.find(" of ") + 4, end.find(" and saved") - end.find(" of ") - 4)};
  };
  const auto [said, steps] = stopped("");
  CHECK(has(said, "step 1/" + steps + "  loss "));
  CHECK(has(said, " % of masked words  "));
  CHECK(has(bert::read_file(out + "/report.html"), ">stopped by a signal: step "));
  const auto [said_then, steps_then] = stopped(" --resume");
  CHECK(steps_then == steps);
  CHECK(has(said_then, " of " + steps + "\n"));
  CHECK(has(bert::read_file(pretrained() + "/report.html"), ">finished: step 60/60"));
}

TEST_CASE("training: numbers that are not finite stop the run, or are skipped and logged until twenty came in a row") {
  bert::ModelFolder damaged = bert::load_folder(pretrained(), false);
  bert::Tensor& weight = damaged.bert.layers[0].up.weight;
  std::fill_n(weight.data(), weight.size(), 3e38f);
  bert::save_folder(small().folder / "absurd", damaged.bert, damaged.carried);
  std::string command = small().pretrain;
  command.replace(command.find("--config"), command.find("--batch-tokens") - command.find("--config"), "");
  command.replace(command.find("--vocab"), command.find("--batch-tokens") - command.find("--vocab"),
                  "--init " + (small().folder / "absurd") + " ");
  command.replace(command.find("--dev-split 0.1"), 15, "--dev-split 0");  // what cannot be evaluated stops a run too
  const std::string out = small().folder / "from-absurd";
  const Ran r = bert_run(command + "--steps 30 --output " + out),
            skipped = bert_run(command + "--steps 30 --skip-spikes --resume --output " + out);
  CHECK(r.status == 1);
  CHECK_MESSAGE(has(r.err, "step 1: not finite: the output of layer 1, first in row 0 of micro-batch 0 ("), r.err);
  CHECK(has(r.err, "; nothing was saved yet in " + out));
  CHECK(skipped.status == 1);
  CHECK_MESSAGE(has(skipped.err, "step 1 skipped: not finite: the output of layer 1, "), skipped.err);
  CHECK(has(skipped.err, "the 20th step in a row to be skipped"));
  const std::string log = bert::read_file(out + "/log.jsonl");
  CHECK(lines_in(log) == 19);
  CHECK(log.starts_with("{\"step\":1,\"skipped\":\"not finite: "));
  CHECK(has(bert::read_file(out + "/report.html"), ">stopped: step 20: not finite"));
}

TEST_CASE("training: a full disk is said, the state before it stands, and the run goes on from it to the same bytes") {
  const std::string whole = small().folder / "roomy", out = small().folder / "full";
  const std::string command = "./bert " + small().pretrain + "--steps 300 --save-every 5 --output ";
  REQUIRE(testing::run(command + whole).status == 0);
  REQUIRE(testing::run(command + out + " & p=$!; while kill -0 $p 2>/dev/null && ! grep -q '\"step\":7,' " + out +
                       "/log.jsonl; do sleep 0.01; done; kill -9 $p; wait $p; true")
              .status == 0);
  const std::string state = bert::read_file(out + "/training_state.safetensors");
  const size_t blocks = state.size() / 1024 - 2;  // a file may have so many KiB: enough for all but the state
  REQUIRE(std::filesystem::file_size(out + "/model.safetensors") < blocks * 1024);
  const Ran full = testing::run("ulimit -f " + std::to_string(2 * blocks) + "; " + command + out + " --resume");  // sh counts by 512 bytes
  CHECK(full.status == 1);
  CHECK_MESSAGE(has(full.err, "training_state-new.safetensors"), full.err);
  CHECK(has(full.err, "; the state of the last save stands in " + out));
  CHECK(bert::read_file(out + "/training_state.safetensors") == state);
  CHECK(bert_run("info --model " + out).status == 0);
  REQUIRE(testing::run(command + out + " --resume").status == 0);
  same_run(whole, out);
}

TEST_CASE("training: two runs cannot write one folder; data that does not fit is refused before anything is written") {
  const std::string out = small().folder / "locked";
  const Ran both = testing::run("./bert " + small().pretrain + "--steps 100000 --quiet --output " + out + " & p=$!; while [ ! -s " + out +
                                "/log.jsonl ]; do sleep 0.01; done; ./bert " + small().pretrain + "--steps 3 --overwrite --output " + out +
                                "; s=$?; kill -9 $p; wait $p; exit $s");
  CHECK(both.status == 1);
  CHECK_MESSAGE(has(both.err, out), both.err);
  put(small().folder / "tiny-vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n");
  std::string big = kVocab;
  for (int i = 0; i < 500; i++) big += "word" + std::to_string(i) + "\n";
  put(small().folder / "big-vocab.txt", big);
  const std::string fit = "pretrain --steps 3 --input " + (small().folder / "text.txt") + " --config " + (small().folder / "config.json") +
                          " --output " + (small().folder / "unfit") + " --vocab ";
  CHECK(has(bert_run(fit + (small().folder / "big-vocab.txt") + " --max-length 32").err, "pieces, but the model has room for"));
  CHECK(has(bert_run(small().pretrain.substr(0, small().pretrain.find(" --batch-tokens")) + " --max-length 65 --steps 3 --output " +
                     (small().folder / "unfit"))
                .err,
            "64 positions"));
  CHECK(!std::filesystem::exists(small().folder / "unfit"));
}

TEST_CASE("convert: any folder into one of ours; info --compare: the largest difference of each tensor") {
  const std::string from = "tests/golden/models/files/q-bin-bf16", to = small().folder / "converted";
  CHECK(bert_run("convert --model " + from + " --output " + to).status == 0);
  CHECK(has(bert_run("info --model " + from + " --compare " + to).out, "\nlargest_difference\t0\n"));
  CHECK(has(bert_run("convert --model " + from + " --output " + to).err, "--overwrite"));
  const Ran refused = bert_run("convert --model " + from + " --output " + pretrained());  // it has no --resume
  CHECK((refused.status == 1 && has(refused.err, "--overwrite") && !has(refused.err, "--resume")));
  CHECK(bert_run("convert --model " + from + " --output " + to + " --overwrite --dtype f16").status == 0);
  const Ran json = bert_run("info --json --model " + to + " --compare tests/golden/models/tiny-pretrain");
  CHECK(bert::Json::parse(json.out, "info").find("largest_difference")->as_double("info") > 0);
  const Ran other = bert_run("info --model " + to + " --compare tests/golden/models/heads/masked-lm");
  CHECK(has(other.out, "cls.seq_relationship.weight\tonly in " + to));
  CHECK(has(bert_run("info --model " + to + " --compare " + pretrained()).out, "\nlargest_difference\tinf\n"));
  CHECK(bert_run("info --compare " + to).status == 2);
  CHECK(bert_run("convert --model " + from + " --output " + to + " --dtype int8").status == 2);
  // Where there is no room for the weights, the model that stood there still answers.
  const std::string embed = "echo a | ./bert embed --model " + to, before = testing::run(embed).out;
  const Ran full = testing::run("ulimit -f 20; ./bert convert --overwrite --model " + pretrained() + " --output " + to);
  CHECK_MESSAGE((full.status == 1 && has(full.err, "model.safetensors")), full.err);
  const Ran after = testing::run(embed);
  CHECK_MESSAGE((after.status == 0 && after.out == before), after.err);
}

TEST_CASE("bench: attention by length of the rows; --profile: each op's time and share, of inference and training") {
  // The values of a bench's rows by config and metric.
  auto bench = [](const std::string& arguments) {
    const Ran r = bert_run("bench " + arguments + " --tsv --threads 2");
    REQUIRE_MESSAGE(r.status == 0, r.err);
    std::map<std::string, double> values;
    std::istringstream lines(r.out);
    for (std::string line; std::getline(lines, line);) {
      std::vector<std::string> cells(1);
      for (const char c : line) c == '\t' ? (void)cells.emplace_back() : (void)(cells.back() += c);
      REQUIRE_MESSAGE(cells.size() == 5, line);
      values[cells[2] + " " + cells[3]] = std::stod(cells[4]);
    }
    return values;
  };
  std::map<std::string, double> got = bench("attention");
  CHECK(got.size() == 12);
  for (const char* config : {"H384-A12-T32-t2 ", "H384-A12-T128-t2 ", "H384-A12-T512-t2 ", "H768-A12-T32-t2 ", "H768-A12-T128-t2 "}) {
    CAPTURE(config);  // 4 T H a token, of 4096
    const double T = std::stod(std::string(config).substr(10)), H = std::stod(std::string(config).substr(1));
    CHECK(got[std::string(config) + "ms"] * got[std::string(config) + "GFLOP/s"] == doctest::Approx(4e-6 * 4096 * T * H).epsilon(1e-3));
  }
  for (const std::string part : {"infer", "train"}) {
    const std::string config = "tiny-B4T32";
    CAPTURE(part);
    got = bench(part + " " + config);
    CHECK(got.size() == 5);
    CHECK(got[config + " %_of_gemm_peak"] > 1);  // of 100; on a busy machine each of the two may be timed in a slow moment
    CHECK(got[config + " %_of_gemm_peak"] < 400);
    const std::map<std::string, double> profiled = bench(part + " " + config + " --profile");
    double all = 0, shares = 0;
    for (const auto& [name, value] : profiled) {
      CHECK(value > 0);
      if (name.ends_with("_ms")) all += value;
      if (name.ends_with("_%")) shares += value;
    }
    CHECK(shares == doctest::Approx(100).epsilon(1e-3));
    CHECK(all > 0);
    for (const char* op : {"embedding", "linear", "attention", "residual_norm"}) {
      CHECK(profiled.count(config + " " + op + "_ms") == 1);
      CHECK(profiled.count(config + " " + op + " backward_%") == (part == "train"));
    }
    CHECK(all < 1.001 * profiled.at(config + " profiled"));
    CHECK(all > 0.9 * profiled.at(config + " profiled"));
    for (const char* op : {"mask_tokens", "cross_entropy", "gradient_norm", "adamw"})
      CHECK(profiled.count(config + " " + op + "_ms") == (part == "train"));
  }
}

namespace {
// A classifier, made once, its dev texts, and some texts to answer.
const std::string& to_quantize() {
  static const std::string path = [] {
    const std::string out = small().folder / "to-quantize";
    const Ran r = bert_run(small().finetune(pretrained(), out) + "--epochs 1");
    REQUIRE_MESSAGE(r.status == 0, r.err);
    put(small().folder / "some.txt",
        "the dog barks at night.\nthe bird sings\n\nthe cat sleeps in the house. the fish swims by the river.\n");
    return out;
  }();
  return path;
}
std::string answers(const std::string& command, const std::string& model, const std::string& more = "") {
  const Ran r = bert_run(command + " --model " + model + " --input " + (small().folder / "some.txt") + " " + more);
  CHECK_MESSAGE(r.status == 0, r.err);
  return r.out;
}
}  // namespace

TEST_CASE("quantize: a smaller folder that answers as --dtype does, with and without dev texts, and is read as plain numbers too") {
  const std::string model = to_quantize(), dev = " --dev " + (small().folder / "dev.tsv");
  for (const std::string dtype : {"int8", "bf16"}) {
    CAPTURE(dtype);
    const std::string out = small().folder / ("in-" + dtype), measured = out + "-measured", as = " --dtype " + dtype;
    const Ran made = bert_run("quantize --model " + model + " --output " + out + (dtype == "int8" ? "" : as));
    CHECK_MESSAGE(made.status == 0, made.err);
    CHECK((made.out.empty() && lines_in(made.err) == 1 && has(made.err, out + ": ") && has(made.err, "MiB of weights became")));
    CHECK(std::filesystem::file_size(out + "/model.safetensors") < std::filesystem::file_size(model + "/model.safetensors"));
    CHECK(has(bert::read_file(out + "/config.json"), "\"quantized\": \"" + dtype + "\""));
    CHECK(!std::filesystem::exists(out + "/.lock"));

    const Ran tried = bert_run("quantize --model " + model + " --output " + measured + as + dev);
    CHECK_MESSAGE(tried.status == 0, tried.err);
    std::istringstream lines(tried.out);
    std::string line;
    for (const std::string& begin : {std::string("part\tdtype\tcosine\tleast\taccuracy"), std::string("all\tf32\t"), "embeddings\t" + dtype,
                                     "layer 0\t" + dtype, "layer 1\t" + dtype, "all\t" + dtype}) {
      std::getline(lines, line);
      CHECK_MESSAGE(line.starts_with(begin), line);
      CHECK(std::count(line.begin(), line.end(), '\t') == 4);
    }
    CHECK(!std::getline(lines, line));
    for (const char* file : {"/model.safetensors", "/config.json", "/vocab.txt", "/tokenizer_config.json"}) {
      CAPTURE(file);
      CHECK(bert::read_file(out + file) == bert::read_file(measured + file));  // measuring changes nothing
    }

    const std::string f32 = answers("predict", model, "--logits"), low = answers("predict", model, "--logits" + as);
    CHECK(low != f32);
    CHECK(answers("predict", out, "--logits") == low);
    CHECK(answers("predict", out, "--logits" + as) == low);
    CHECK(answers("embed", out) == answers("embed", model, as));
    CHECK(answers("embed", out, "--layer 1") == answers("embed", model, "--layer 1" + as));
    CHECK(bert_run("evaluate --model " + out + " --input " + (small().folder / "dev.tsv")).out ==
          bert_run("evaluate --model " + model + as + " --input " + (small().folder / "dev.tsv")).out);
    const std::string numbers = answers("embed", out, "--dtype f32");
    CHECK((numbers != answers("embed", out) && numbers != answers("embed", model)));

    const std::string plain = out + "-plain";  // back in F32: the same numbers, and nothing that says quantized
    CHECK(bert_run("convert --model " + out + " --output " + plain).status == 0);
    CHECK(!has(bert::read_file(plain + "/config.json"), "quantized"));
    CHECK(answers("embed", plain) == numbers);
    CHECK(has(bert_run("info --model " + plain + " --compare " + out).out, "\nlargest_difference\t0\n"));
  }
  for (const std::string dtype : {"int8", "bf16"}) {  // a model for masked words
    const std::string out = small().folder / ("masked-" + dtype), masks = "printf 'the dog [MASK] at night.\n' | ./bert fill-mask --model ";
    CHECK(bert_run("quantize --model " + pretrained() + " --output " + out + " --dtype " + dtype).status == 0);
    const Ran said = testing::run(masks + out);
    CHECK((said.status == 0 && lines_in(said.out) == 5));
    CHECK(said.out == testing::run(masks + pretrained() + " --dtype " + dtype).out);
    CHECK(said.out != testing::run(masks + pretrained()).out);
    const std::string text = " --input " + (small().folder / "some.txt");
    const Ran loss = bert_run("evaluate --model " + out + text);
    CHECK(loss.status == 0);
    CHECK(loss.out == bert_run("evaluate --dtype " + dtype + " --model " + pretrained() + text).out);
  }
}

// A column of numbers under a header.
static std::vector<double> column(const std::string& table, int number) {
  std::istringstream lines(table);
  std::string line, field;
  std::vector<double> numbers;
  for (std::getline(lines, line); std::getline(lines, line);) {
    std::istringstream fields(line);
    for (int i = 0; i <= number; i++) std::getline(fields, field, '\t');
    numbers.push_back(bert::parse_number<double>(field).value_or(NAN));
  }
  return numbers;
}

TEST_CASE("quantize: --max-drop puts parts back until it holds, or says that it cannot") {
  const std::string model = to_quantize(), texts = " --dev " + (small().folder / "some.txt"),
                    dev = " --dev " + (small().folder / "dev.tsv"), out = small().folder / "dropped", quantize = "quantize --model ";
  // Of vectors any rounding is a drop: int8 ends with every part in bf16 and fails, bf16 with every part in f32.
  const Ran not_reached = bert_run(quantize + pretrained() + " --output " + out + texts + " --max-drop 0");
  CHECK(not_reached.status == 1);
  CHECK_MESSAGE(has(not_reached.err, "bert: --max-drop 0: not reached, with every part in bf16 the drop is "), not_reached.err);
  CHECK(lines_in(not_reached.err) == 1);
  CHECK(lines_in(not_reached.out) == 6 + 3);
  for (const char* part : {"\nall, embeddings in bf16\tint8\t", "\nall, layer 0 in bf16\tint8\t", "\nall, layer 1 in bf16\tint8\t"})
    CHECK(has(not_reached.out, part));
  CHECK(!std::filesystem::exists(out + "/config.json"));
  const Ran exact = bert_run(quantize + pretrained() + " --output " + out + texts + " --max-drop 0 --dtype bf16");
  CHECK_MESSAGE(exact.status == 0, exact.err);
  const std::vector<double> cosines = column(exact.out, 2);
  CHECK((cosines.size() > 5 && cosines.size() <= 5 + 3));  // rounding may end it before every part is in f32
  CHECK((cosines.back() >= cosines[0] && cosines[4] < cosines[0]));
  CHECK(bert_run(quantize + pretrained() + " --output " + out + texts + " --max-drop 1 --overwrite").status == 0);
  CHECK(answers("embed", out) == answers("embed", pretrained(), "--dtype int8"));

  const Ran most = bert_run(quantize + pretrained() + " --output " + out + texts + " --overwrite --max-drop 1e-4");
  CHECK_MESSAGE(most.status == 0, most.err);
  const std::vector<double> so_far = column(most.out, 2);
  for (size_t i = 4; i < so_far.size(); i++) CHECK((so_far[i] >= so_far[0] - 1e-4) == (i + 1 == so_far.size()));  // no part more than that
  const Ran labelled = bert_run(quantize + model + " --output " + out + dev + " --max-drop 0 --overwrite");
  const std::vector<double> accuracy = column(labelled.out, 4);
  CHECK((labelled.status == 0) == (accuracy.back() >= accuracy[0]));
  CHECK((labelled.status == 0 || has(labelled.err, "not reached")));
}

TEST_CASE("quantize: what is refused, and by which status") {
  const std::string model = to_quantize(), out = small().folder / "refused", both = "quantize --model " + model + " --output " + out;
  for (const auto& [more, message] : {std::pair{" --max-drop 0.1", "--max-drop needs --dev"},
                                      {" --dtype f16", "int8"},
                                      {" --dtype f32", "int8"},
                                      {" --dtype int4", "did you mean int8?"},
                                      {" --max-drop 1.5 --dev x", "--max-drop"},
                                      {" --max-drop -1 --dev x", "--max-drop"},
                                      {" --max-drp 1", "did you mean --max-drop?"}}) {
    const std::string shown = more;
    CAPTURE(shown);
    const Ran r = bert_run(both + more);
    CHECK(r.status == 2);
    CHECK_MESSAGE(has(r.err, message), r.err);
  }
  CHECK(has(bert_run("quantize --model " + model).err, "--output is missing"));
  CHECK(has(bert_run("quantize --output " + out).err, "--model is missing"));
  CHECK(!std::filesystem::exists(out));
  put(small().folder / "no-texts.tsv", "text\tlabel\n");
  for (const std::string dev : {"none.tsv", "no-texts.tsv", "text.txt"}) {  // missing, empty, without labels
    const Ran r = bert_run(both + " --dev " + (small().folder / dev));
    CHECK(r.status == 1);
    CHECK_MESSAGE(has(r.err, dev), r.err);
    CHECK(!std::filesystem::exists(out + "/config.json"));
  }

  // The weights are mapped from the folder that would be written.
  const std::string before = bert::read_file(model + "/model.safetensors"), link = small().folder / "link";
  std::filesystem::create_directory_symlink(model, link);
  for (const std::string& same : {model, model + "/.", link})
    for (const char* overwrite : {"", " --overwrite"}) {
      const Ran r = bert_run("quantize --model " + model + " --output " + same + overwrite);
      CHECK(r.status == 1);
      CHECK_MESSAGE(has(r.err, "give another --output"), r.err);
    }
  CHECK(bert::read_file(model + "/model.safetensors") == before);
  CHECK(bert_run(both).status == 0);
  const std::string first = bert::read_file(out + "/model.safetensors");
  const Ran again = bert_run(both + " --dtype bf16");
  CHECK(again.status == 1);
  CHECK(has(again.err, "--overwrite"));
  CHECK(bert::read_file(out + "/model.safetensors") == first);
  CHECK(bert_run(both + " --dtype bf16 --overwrite").status == 0);
  CHECK(bert::read_file(out + "/model.safetensors") != first);
  const Ran twice = bert_run("quantize --model " + out + " --output " + out + "-again --dtype bf16");  // what it holds already, to the byte
  CHECK(twice.status == 0);
  CHECK(bert::read_file(out + "-again/model.safetensors") == bert::read_file(out + "/model.safetensors"));
}

TEST_CASE("search: an index belongs to the precision of its vectors") {
  const std::string model = to_quantize(), corpus = small().folder / "corpus.txt", index = corpus + ".bert-index";
  put(corpus, small_text(20, 5));
  const std::string low = small().folder / "searched";
  CHECK(bert_run("quantize --model " + model + " --output " + low).status == 0);
  auto search = [&](const std::string& of, bool anew, const std::string& more = "") {
    const Ran r = bert_run("search --model " + of + " --corpus " + corpus + " --input " + (small().folder / "some.txt") + " " + more);
    CHECK_MESSAGE(r.status == 0, r.err);
    CHECK_MESSAGE(has(r.err, "made again") == anew, r.err);
    return r.out;
  };
  const std::string f32 = search(model, false), f32_index = bert::read_file(index);
  const std::string int8 = search(model, true, "--dtype int8"), int8_index = bert::read_file(index);
  CHECK(int8 != f32);
  CHECK(int8_index != f32_index);
  CHECK(search(model, false, "--dtype int8") == int8);
  std::filesystem::remove(index);
  CHECK(search(model, false, "--dtype int8") == int8);  // nothing of the index before was in it
  CHECK(bert::read_file(index) == int8_index);
  CHECK(search(model, true, "--dtype bf16") != f32);
  CHECK(search(model, true, "--dtype f32") == f32);
  CHECK(search(model, false) == f32);
  CHECK(bert::read_file(index) == f32_index);
  // A folder in int8: as it is, and as numbers.
  CHECK(search(low, true) == int8);
  const std::string numbers = search(low, true, "--dtype f32");
  CHECK(numbers != int8);
  CHECK(search(low, false, "--dtype f32") == numbers);
  CHECK(search(low, true) == int8);
  CHECK(search(low, false) == int8);
}
