# make          builds ./bert                      make demo     trains and answers on data/ alone, a few minutes
# make test     builds and runs the tests          make check    everything slow: sanitizers, clang, scalar kernels, one thread
# make layers   links each drop-in set alone       make install PREFIX=/usr/local
# make fuzz     arbitrary input for every reader, 80 minutes (SECONDS=600 each; clang)
# make check-arm    the NEON kernels, cross-compiled and emulated: a few minutes
#
# Yours to set:  make CXX=clang++ CXXFLAGS="-O3 -g" BLAS=none OUT=build-mine
CXXFLAGS ?= -O2
PREFIX   ?= /usr/local
OUT      ?= build

# BLAS=none builds without OpenBLAS, on the engine's own kernels. Where it is not installed that happens by itself, and is said.
ifeq ($(origin BLAS),undefined)
  BLAS := $(shell echo 'int main(){}' | $(CXX) -include cblas.h -x c++ - -o /dev/null -lopenblas 2>/dev/null && echo -lopenblas || echo none)
  ifeq ($(BLAS),none)
    $(info OpenBLAS is not installed (Debian: libopenblas-dev): building on the engine's own kernels alone)
  endif
endif
ifeq ($(BLAS),none)
  override CPPFLAGS += -DBERT_NO_BLAS
  BLAS_LIBS :=
else
  BLAS_LIBS := $(BLAS)
endif

# What the sources need. `override` appends even when you set CXXFLAGS on the command line. No -ffast-math: it deletes isnan() checks
# and reorders sums. -ffp-contract=off: the sources write every fused multiply-add themselves, so that all compilers give the same bytes.
override CXXFLAGS += -std=c++20 -ffp-contract=off -pthread -Wall -Wextra $(WERROR) -MMD -MP
LINK = $(CXX) $(CXXFLAGS) -o $@ $(filter %.o,$^) $(BLAS_LIBS) -ldl $(LDFLAGS)

LIB  := $(addprefix $(OUT)/,tensor.o autograd.o bert.o wordpiece.o)
TEST := $(patsubst %.cpp,$(OUT)/%.o,$(wildcard tests/*.cpp))
# The build folder remembers its flags, so that other flags build anew.
FLAGS := $(CXX) $(CXXFLAGS) $(CPPFLAGS) $(BLAS_LIBS)
$(shell mkdir -p $(OUT) && { echo '$(FLAGS)' | cmp -s - $(OUT)/flags || echo '$(FLAGS)' > $(OUT)/flags; })

# ./bert is the one of the default build folder; other folders keep their own.
bert: $(OUT)/bert
	@[ $(OUT) != build ] || { cp $(OUT)/bert bert.new && mv bert.new bert; }
$(OUT)/bert: $(OUT)/main.o $(LIB)
	$(LINK)
$(OUT)/run-tests: $(TEST) $(LIB)
	$(LINK)
$(OUT)/%.o: %.cpp $(OUT)/flags
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(CPPFLAGS) -I. -c -o $@ $<

test: bert $(OUT)/run-tests layers
	$(OUT)/run-tests

# Each drop-in set must link from the files on its line alone: a wrong include or call fails here. Then each program runs.
LAYERS := $(addprefix $(OUT)/layers-,tensors tokenizer embed finetune)
layers: $(LAYERS)
	@for p in $(LAYERS); do $$p > $$p.out || { cat $$p.out; echo "$$p failed"; exit 1; }; done
	@! grep wrong $(OUT)/layers-finetune.out
$(OUT)/layers-tensors: $(addprefix $(OUT)/,tests/layers/tensors.o tensor.o autograd.o)
	$(LINK)
$(OUT)/layers-tokenizer: $(addprefix $(OUT)/,tests/layers/tokenizer.o wordpiece.o)
	$(CXX) $(CXXFLAGS) -o $@ $(filter %.o,$^) $(LDFLAGS)
$(OUT)/layers-embed: $(OUT)/tests/layers/embed.o $(LIB)
	$(LINK)
$(OUT)/layers-finetune: $(OUT)/tests/layers/finetune.o $(LIB)
	$(LINK)

# Arbitrary bytes for every reader: clang's libFuzzer, ten minutes for each (SECONDS=600).
fuzz: fuzz-tokenizer fuzz-files fuzz-rows
fuzz-tokenizer:
	@mkdir -p build-fuzz
	clang++ -std=c++20 -O1 -g -I. -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Wno-ignored-optimization-argument \
	  -o build-fuzz/wordpiece tests/fuzz/wordpiece.cpp wordpiece.cpp
	for what in encode decode vocab json; do \
	  mkdir -p build-fuzz/$$what && FUZZ=$$what build-fuzz/wordpiece -max_total_time=$(or $(SECONDS),600) -timeout=60 -rss_limit_mb=4096 \
	    -verbosity=0 -print_final_stats=1 -artifact_prefix=build-fuzz/ build-fuzz/$$what tests/fuzz/$$what || exit 1; \
	done
fuzz-files:
	@mkdir -p build-fuzz
	clang++ -std=c++20 -O1 -g -I. -pthread -ffp-contract=off -DBERT_NO_BLAS -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  -Wno-ignored-optimization-argument -o build-fuzz/files tests/fuzz/fuzz_files.cpp tensor.cpp autograd.cpp -ldl
	for what in safetensors torch json; do \
	  mkdir -p build-fuzz/files-$$what && FUZZ=$$what build-fuzz/files -max_total_time=$(or $(SECONDS),600) -timeout=10 -rss_limit_mb=1024 \
	    -verbosity=0 -print_final_stats=1 -artifact_prefix=build-fuzz/ build-fuzz/files-$$what tests/golden/files || exit 1; \
	done
fuzz-rows: $(LIB)
	@mkdir -p build-fuzz/rows-corpus
	clang++ -std=c++20 -O1 -g -I. $(CPPFLAGS) -pthread -ffp-contract=off -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  -Wno-ignored-optimization-argument -o build-fuzz/rows tests/fuzz/fuzz_rows.cpp $^ $(BLAS_LIBS) -ldl
	build-fuzz/rows -max_total_time=$(or $(SECONDS),600) -timeout=10 -rss_limit_mb=1024 -verbosity=0 -print_final_stats=1 \
	  -artifact_prefix=build-fuzz/ build-fuzz/rows-corpus tests/fuzz/rows
# What must hold of any text: checked on ten million with the sanitizers, and on fewer for races.
random-texts:
	@mkdir -p build-fuzz
	$(CXX) -std=c++20 $(SANITIZE) -DRANDOM_TEXTS -I. -pthread -o build-fuzz/random-texts tests/fuzz/wordpiece.cpp wordpiece.cpp
	ASAN_OPTIONS=malloc_context_size=0 build-fuzz/random-texts $(or $(TEXTS),10000000)  # who allocated what would fill gigabytes
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread -DRANDOM_TEXTS -I. -pthread -o build-fuzz/random-texts-races tests/fuzz/wordpiece.cpp wordpiece.cpp
	build-fuzz/random-texts-races 100000

# Everything slow, each in a build folder of its own. About an hour on 2 cores, a third of it for the ten million texts.
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
check:
	$(MAKE) OUT=build WERROR=-Werror test
	build/run-tests --no-skip
	BERT_KERNELS=scalar build/run-tests
	BERT_KERNELS=avx2 build/run-tests
	for table in $$(build/bert info --json | grep -o '"kernels_usable":"[^"]*"' | cut -d'"' -f4); do \
	  BERT_KERNELS=$$table build/run-tests -tc='*bf16*,*int8*' || exit 1; done
	taskset -c 0 build/run-tests
	BERT_GEMM=openblas build/run-tests
	$(MAKE) OUT=build-clang CXX=clang++ WERROR=-Werror test
	$(MAKE) OUT=build-noblas BLAS=none WERROR=-Werror test
	LSAN_OPTIONS=suppressions=tests/opencl/leaks.txt:print_suppressions=0 $(MAKE) OUT=build-asan CXXFLAGS='$(SANITIZE)' test
	$(MAKE) OUT=build-tsan CXX=clang++ CXXFLAGS='-O1 -g -fsanitize=thread' build-tsan/run-tests build-tsan/bert
	build-tsan/run-tests -tc='*parallel*,pool*,*ahead*,gemm: large*,*threads*'
	tests/one_answer.sh build/bert build-clang/bert build-noblas/bert
	tests/kill_resume.sh build/bert $(or $(KILLS),50)
	$(MAKE) random-texts
	@echo "make check: all passed (make check-arm is apart: it needs a cross compiler)"

# The NEON kernels without such a machine: on a CPU that has no dot products of int8, and on one that has them.
ARM_CXX := aarch64-linux-gnu-g++
ARM_RUN := qemu-aarch64 -L /usr/aarch64-linux-gnu
check-arm:
	@command -v $(ARM_CXX) >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { echo "make check-arm needs a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu qemu-user)"; exit 1; }
	@mkdir -p build-arm/include && ln -sfn /usr/include/doctest build-arm/include/doctest  # of /usr/include that folder alone
	$(MAKE) OUT=build-arm CXX=$(ARM_CXX) CPPFLAGS='-isystem build-arm/include' BLAS=none WERROR=-Werror build-arm/run-tests
	BERT_KERNELS=neon $(ARM_RUN) -cpu cortex-a53 build-arm/run-tests -sf='*test_tensor.cpp,*test_autograd.cpp'
	BERT_KERNELS=neon_dot $(ARM_RUN) -cpu max build-arm/run-tests -sf='*test_tensor.cpp,*test_autograd.cpp'
	@echo "make check-arm: all passed"

demo: bert
	data/demo.sh ./bert demo

install: bert
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include/bert $(DESTDIR)$(PREFIX)/share/bert
	install -m 755 bert $(DESTDIR)$(PREFIX)/bin
	install -m 644 bert.h tensor.h $(DESTDIR)$(PREFIX)/include/bert
	install -m 644 tensor.cpp autograd.cpp bert.cpp wordpiece.cpp $(DESTDIR)$(PREFIX)/share/bert

clean:
	rm -rf build build-* bert demo

.PHONY: bert test check check-arm fuzz fuzz-tokenizer fuzz-files fuzz-rows random-texts demo layers install clean
.DELETE_ON_ERROR:
-include $(wildcard $(OUT)/*.d $(OUT)/tests/*.d $(OUT)/tests/layers/*.d)
