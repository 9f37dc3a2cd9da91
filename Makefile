# make          builds ./bert                      make demo     trains and answers on data/ alone, a few minutes
# make test     builds and runs the tests          make check    everything slow: sanitizers, clang, scalar kernels, one thread
# make layers   links each drop-in set alone       make install PREFIX=/usr/local
#
# Yours to set:  make CXX=clang++ CXXFLAGS='-O3 -g' BLAS=none OUT=build-mine
CXXFLAGS ?= -O2 -g
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
override CXXFLAGS += -std=c++20 -ffp-contract=off -fopenmp -Wall -Wextra $(WERROR) -MMD -MP
LINK = $(CXX) $(CXXFLAGS) -o $@ $(filter %.o,$^) $(BLAS_LIBS) -ldl $(LDFLAGS)

LIB  := $(addprefix $(OUT)/,tensor.o autograd.o bert.o wordpiece.o)
TEST := $(patsubst %.cpp,$(OUT)/%.o,$(wildcard tests/*.cpp))
# The build folder remembers its flags, so that other flags build anew.
FLAGS := $(CXX) $(CXXFLAGS) $(CPPFLAGS) $(BLAS_LIBS)
$(shell mkdir -p $(OUT) && { echo '$(FLAGS)' | cmp -s - $(OUT)/flags || echo '$(FLAGS)' > $(OUT)/flags; })

bert: $(OUT)/bert
	@cp $(OUT)/bert bert.new && mv bert.new bert
$(OUT)/bert: $(OUT)/main.o $(LIB)
	$(LINK)
$(OUT)/run-tests: $(TEST) $(LIB)
	$(LINK)
$(OUT)/%.o: %.cpp $(OUT)/flags
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(CPPFLAGS) -I. -c -o $@ $<

test: bert $(OUT)/run-tests layers
	$(OUT)/run-tests

clean:
	rm -rf build build-* bert demo

.PHONY: bert test check demo layers install clean
.DELETE_ON_ERROR:
-include $(wildcard $(OUT)/*.d $(OUT)/tests/*.d $(OUT)/tests/layers/*.d)
