// tensor.cpp -- what the engine stands on: memory, threads, random numbers, kernels, products of matrices, files of tensors.
//
//   Contents:   storage and the reuse pool, shapes and tensors, threads, random numbers, kernels scalar (the reference: read this
//               one), kernels SIMD, gemm, OpenCL, nearest rows, this machine, files
//   Threads:    everything may be called from any thread. Kernels never start threads; gemm and parallel_for do.
//   This file includes itself once for each instruction set, to compile the SIMD kernels' one text for all of them. BERT_ISA is set
//   during those passes, and all else is skipped.
//   Compile with -ffp-contract=off: a compiler that fuses a * b + c by itself changes the last bits of every result.
#ifndef BERT_ISA
#include "tensor.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <exception>
#include <filesystem>
#include <fstream>
#include <limits>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <thread>
#include <tuple>
#include <unordered_map>
#if defined(__linux__)
#include <sched.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifndef BERT_NO_BLAS
#include <cblas.h>
#endif

namespace bert {

// ==== storage and the reuse pool ==================================================================================
// A training step makes and frees the same few hundred tensors again and again. Blocks that come back are kept by size and lent out
// again, so that a steady step never enters the system: no page faults (a fresh page costs about as much as filling it thrice) and
// no fragments.
namespace {
struct Block {
  void* at = nullptr;
  size_t size = 0;
};

class Pool {
 public:
  // One pool, never destroyed: static tensors of a program may outlive any other order.
  static Pool& only() {
    static Pool* pool = new Pool;
    return *pool;
  }

  // A block of at least `bytes`, at most 2^62; null when the system has no more.
  Block take(size_t bytes) {
    const size_t size = size_class(bytes);
    std::lock_guard<std::mutex> hold(lock_);
    // Shapes that never come back would pile up: what is held stays within 5/4 of the most that was ever lent, and some.
    const size_t limit = std::max(use_.peak, use_.in_use + size) / 4 * 5 + (64 << 20);
    Block block = reuse(size, this_thread());
    if (!block.at && (size > kPrivate || use_.held + size > limit)) block = reuse(size, nullptr);
    if (!block.at) {
      while (use_.held + size > limit && release_largest()) {}
      block = {from_system(size), size};
      while (!block.at && release_largest()) block.at = from_system(size);
      if (!block.at) return block;
      use_.held += size;
    }
    use_.in_use += block.size;
    use_.peak = std::max(use_.peak, use_.in_use);
    return block;
  }
  void give(Block block) {
    if (!block.at) return;
    std::lock_guard<std::mutex> hold(lock_);
    use_.in_use -= block.size;
    idle_[block.size].push_back({block.at, this_thread()});  // the last to come is the first to go: it may still be in the cache
  }
  PoolUse use() {
    std::lock_guard<std::mutex> hold(lock_);
    return use_;
  }

 private:
  static constexpr size_t kHuge = 2 << 20;  // a huge page of x86-64 and of most aarch64 kernels
  // What another thread wrote last lies in that core's cache: taking it over costs more than filling it. Two threads that each put groups
  // of rows through a model would swap their blocks at every op, and be slower by a quarter; so each keeps its own, up to this size.
  static constexpr size_t kPrivate = 4 << 20;
  struct Idle {
    void* at;
    const void* owner;  // the thread that gave it back
  };
  static const void* this_thread() {
    static thread_local char mark;
    return &mark;
  }

  // Eight classes between two powers of two: at most an eighth is wasted.
  static size_t size_class(size_t bytes) {
    bytes = std::max<size_t>(bytes, 64);
    const size_t step = std::max<size_t>(std::bit_floor(bytes) / 8, 64);
    return (bytes + step - 1) / step * step;
  }
  // An idle block of this class, or one up to a quarter larger; with `owner` only one that this thread gave back.
  Block reuse(size_t size, const void* owner) {
    for (auto it = idle_.lower_bound(size); it != idle_.end() && it->first - size <= size / 4; ++it) {
      std::vector<Idle>& blocks = it->second;
      const auto found = std::find_if(blocks.rbegin(), blocks.rend(), [&](const Idle& b) { return !owner || b.owner == owner; });
      if (found == blocks.rend()) continue;
      const Block block{found->at, it->first};
      blocks.erase(std::next(found).base());
      return block;
    }
    return {};
  }
  bool release_largest() {
    while (!idle_.empty() && idle_.rbegin()->second.empty()) idle_.erase(std::prev(idle_.end()));
    if (idle_.empty()) return false;
    auto& [size, blocks] = *idle_.rbegin();
    size < kHuge ? std::free(blocks.back().at) : (void)munmap(blocks.back().at, size);
    blocks.pop_back();
    use_.held -= size;
    return true;
  }
  // Large blocks lie on a huge page's boundary and ask for huge pages: the panels of a large product then stay in the TLB.
  static void* from_system(size_t size) {
    if (size < kHuge) return std::aligned_alloc(64, size);
    char* const map = (char*)mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    const size_t before = (kHuge - (uintptr_t)map % kHuge) % kHuge;
    if (before) munmap(map, before);
    munmap(map + before + size, kHuge - before);
#if defined(MADV_HUGEPAGE)
    madvise(map + before, size, MADV_HUGEPAGE);
#endif
    return map + before;
  }

  std::mutex lock_;
  std::map<size_t, std::vector<Idle>> idle_;  // by size
  PoolUse use_{};
};
}  // namespace

PoolUse pool_use() { return Pool::only().use(); }

// ==== shapes and tensors ==========================================================================================
Shape::Shape(std::span<const int64_t> dims) {
  if (dims.size() > (size_t)kMaxRank) throw Error("shape: " + std::to_string(dims.size()) + " dimensions; there can be 4");
  int64_t size = 1;
  for (int64_t d : dims) {
    if (d < 0) throw Error("shape: a dimension of " + std::to_string(d));
    dims_[(size_t)rank_++] = d;
    if (__builtin_mul_overflow(size, std::max<int64_t>(d, 1), &size) || size > (int64_t)1 << 60)  // a size in bytes cannot wrap
      throw Error("shape: more than 2^60 elements, at dimension " + std::to_string(d));
  }
}
int64_t Shape::size() const {
  int64_t size = 1;
  for (int i = 0; i < rank_; i++) size *= dims_[(size_t)i];
  return size;
}
std::string to_string(const Shape& shape) {
  std::string out = "[";
  for (int i = 0; i < shape.rank(); i++) out += (i ? "," : "") + std::to_string(shape[i]);
  return out + "]";
}

// The i-th T of bytes that promise no alignment.
template <class T>
static T at(const char* bytes, int64_t i) {
  T v;
  std::memcpy(&v, bytes + (size_t)i * sizeof(T), sizeof v);
  return v;
}

struct Tensor::Gradient {
  Tensor sum;
  bool needed = false;
};
struct DeviceMatrix;  // see OpenCL
struct Tensor::Impl {
  enum Newest { host, both, device };
  Shape shape;
  float* data = nullptr;
  Block block;                        // empty for borrowed memory
  std::shared_ptr<const void> owner;  // of borrowed memory
  std::shared_ptr<const PackedWeights> packed;
  std::shared_ptr<const NarrowMatrix> narrow;
  std::shared_ptr<Gradient> gradient;   // made when it is first asked for
  std::shared_ptr<DeviceMatrix> there;  // its numbers on a device
  std::atomic<Newest> newest = host;    // where the newest ones are

  ~Impl() { Pool::only().give(block); }
};

Tensor::Impl& Tensor::impl() const {
  if (!impl_) throw Error("tensor: empty (made by Tensor()), where one with numbers is needed");
  return *impl_;
}

Tensor::Tensor(Shape shape) : impl_(std::make_shared<Impl>()) {
  const size_t bytes = (size_t)shape.size() * sizeof(float);
  impl_->shape = shape;
  impl_->block = Pool::only().take(bytes);
  impl_->data = (float*)impl_->block.at;
  if (!impl_->data)
    throw Error("out of memory: a tensor " + to_string(shape) + " needs " + std::to_string(bytes >> 20) + " MiB, and " +
                std::to_string(pool_use().in_use >> 20) + " MiB are in use");
}
Tensor::Tensor(Shape shape, float value) : Tensor(shape) {
  float* const x = impl_->data;
  parallel_ranges(shape.size(), 1 << 18, [&](int64_t begin, int64_t end) { std::fill(x + begin, x + end, value); });
}
Tensor::Tensor(Shape shape, std::span<const float> values) : Tensor(shape) {
  if ((int64_t)values.size() != shape.size())
    throw Error("tensor: " + std::to_string(values.size()) + " values for a shape " + to_string(shape));
  std::copy(values.begin(), values.end(), impl_->data);
}
Tensor Tensor::borrowed(Shape shape, const float* data, std::shared_ptr<const void> owner) {
  Tensor t;
  t.impl_ = std::make_shared<Impl>();
  t.impl_->shape = shape;
  t.impl_->data = const_cast<float*>(data);  // nothing writes to it: an optimiser's parameters are copies
  t.impl_->owner = std::move(owner);
  return t;
}

Tensor Tensor::narrow(NarrowMatrix matrix) {
  Tensor t;
  t.impl_ = std::make_shared<Impl>();
  t.impl_->shape = {matrix.n, matrix.k};
  t.impl_->narrow = std::make_shared<const NarrowMatrix>(std::move(matrix));
  return t;
}

const Shape& Tensor::shape() const { return impl().shape; }
float* Tensor::data() const {
  if (impl().narrow) throw Error("tensor " + to_string(impl_->shape) + ": held in " + name_of(impl_->narrow->precision) + ", not in f32");
  if (!impl_->data)
    throw Error("tensor " + to_string(impl_->shape) + ": its plain numbers are gone: packed for products, or only the gradient kept");
  if (impl_->newest != Impl::host) bring_home();  // whoever asks may write: what a device holds does not count any more
  return impl_->data;
}
float Tensor::item() const {
  if (size() != 1) throw Error("tensor " + to_string(shape()) + ": item() is for one element");
  return *data();
}

Tensor::Gradient& Tensor::own_gradient() const {
  if (!impl().gradient) impl_->gradient = std::make_shared<Gradient>();
  return *impl_->gradient;
}
bool Tensor::needs_grad() const { return impl_ && impl_->gradient && impl_->gradient->needed; }
void Tensor::set_needs_grad(bool needs) { own_gradient().needed = needs; }
bool Tensor::has_grad() const { return impl_ && impl_->gradient && impl_->gradient->sum; }
float* Tensor::grad() const {
  if (!own_gradient().sum) own_gradient().sum = Tensor(shape(), 0.f);
  return own_gradient().sum.data();
}
const Tensor& Tensor::grad_to_add(bool& add) const {
  add = (bool)own_gradient().sum;
  if (!add) own_gradient().sum = Tensor(shape());
  return own_gradient().sum;
}
void Tensor::add_grad(const Tensor& d, float factor) const {
  if (!(d.shape() == shape())) throw Error("add_grad: " + to_string(d.shape()) + " to the gradient of " + to_string(shape()));
  if (!has_grad() && factor == 1) return void(own_gradient().sum = d);
  float* const sum = grad();
  parallel_ranges(size(), 1 << 15, [&](int64_t i, int64_t end) { kernels().axpy(factor, d.data() + i, sum + i, end - i); });
}
Tensor Tensor::take_grad() const { return std::exchange(own_gradient().sum, {}); }
void Tensor::drop_grad() {
  if (has_grad()) own_gradient().sum = {};
}
Tensor Tensor::grad_only() const {
  Tensor t;
  if (!impl_) return t;
  own_gradient();
  t.impl_ = std::make_shared<Impl>();
  t.impl_->shape = shape(), t.impl_->gradient = impl_->gradient;
  return t;
}

void Tensor::pack(Precision precision) {
  if (packed()) return;
  if (shape().rank() != 2) throw Error("pack: weights are [out, in], this is " + to_string(shape()));
  const bool plain = !impl_->narrow && precision == Precision::f32;
  impl_->packed = impl_->narrow ? std::make_shared<const PackedWeights>(*impl_->narrow)
                                : std::make_shared<const PackedWeights>(data(), shape()[0], shape()[1], precision);
  if (plain) keep_on_device();
  impl_->narrow = nullptr;
  impl_->data = nullptr;
  impl_->owner = nullptr;
  Pool::only().give(std::exchange(impl_->block, {}));
}
const PackedWeights* Tensor::packed() const { return impl_ ? impl_->packed.get() : nullptr; }
const NarrowMatrix* Tensor::narrow() const { return impl_ ? impl_->narrow.get() : nullptr; }

const char* name_of(Precision precision) { return std::array{"f32", "bf16", "int8"}[(size_t)precision]; }

NarrowMatrix narrowed(const Tensor& w, Precision precision) {
  NarrowMatrix m{.precision = precision, .n = w.rows(), .k = w.cols(), .owner = {}, .scales = {}};
  const auto memory = std::make_shared<const Tensor>(Shape{(m.n * m.row_bytes() + 3) / 4});  // of the pool
  char* const bytes = (char*)memory->data();
  m.data = bytes, m.owner = memory;
  if (precision == Precision::int8) m.scales.resize((size_t)m.n);
  parallel_ranges(m.n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      if (char* const to = bytes + i * m.row_bytes(); precision == Precision::bf16)
        kernels().to_bf16(w.data() + i * m.k, to, m.k);
      else
        m.scales[(size_t)i] = kernels().to_int8(w.data() + i * m.k, 0, to, m.k);
  });
  return m;
}
static void widen_row(Precision precision, const char* from, float scale, int64_t k, float* to) {
  if (precision == Precision::bf16)
    kernels().from_bf16(from, to, k);
  else
    for (int64_t j = 0; j < k; j++) to[j] = (float)at<int8_t>(from, j) * scale;
}
void NarrowMatrix::widen(int64_t i, float* to) const {
  widen_row(precision, row(i), precision == Precision::int8 ? scales[(size_t)i] : 0, k, to);
}
void round_row(Precision precision, float* x, int64_t n, void* room) {
  if (precision == Precision::f32) return;
  float scale = 0;
  if (precision == Precision::bf16)
    kernels().to_bf16(x, room, n);
  else
    scale = kernels().to_int8(x, 0, room, n);
  widen_row(precision, (const char*)room, scale, n, x);
}

// ==== threads =====================================================================================================
#if defined(__linux__)
// The cores that a container's quota allows: the least over this process's control group and its parents, which may be known here
// under the host's path or as the root. A large number where there is no quota.
static double cgroup_cores() {
  double least = 1e9;
  std::ifstream groups("/proc/self/cgroup");  // lines  hierarchy:controllers:path
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool v2 = controllers == ",,";
    if (!v2 && controllers.find(",cpu,") == std::string::npos) continue;
    for (std::string path = line.substr(second + 1);; path.resize(path.find_last_of('/'))) {
      if (path == "/") path = "";
      const std::string at = (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") + path;
      double quota = 0, period = 0;  // no quota: a file that is not there, "max", or -1
      if (v2)
        std::ifstream(at + "/cpu.max") >> quota >> period;
      else
        std::ifstream(at + "/cpu.cfs_quota_us") >> quota, std::ifstream(at + "/cpu.cfs_period_us") >> period;
      if (quota > 0 && period > 0) least = std::min(least, quota / period);
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}
#endif

int available_threads() {
  static const int cores = [] {
    int n = std::max(1, (int)std::thread::hardware_concurrency());
#if defined(__linux__)
    for (int most = 1024; most <= 1 << 20; most *= 4) {  // a mask too short for the machine is refused
      cpu_set_t* const set = CPU_ALLOC((size_t)most);
      const size_t bytes = CPU_ALLOC_SIZE((size_t)most);
      const bool known = set && sched_getaffinity(0, bytes, set) == 0;
      if (known) n = std::max(1, CPU_COUNT_S(bytes, set));
      CPU_FREE(set);
      if (known) break;
    }
    n = (int)std::max(1., std::min((double)n, std::ceil(cgroup_cores())));
#endif
    return n;
  }();
  return cores;
}

static thread_local int threads_wanted = 0;  // 0: all available
static thread_local bool inside_task = false;

UseThreads::UseThreads(int n) : before_(threads_wanted) {
  if (n < 0) throw Error("threads: " + std::to_string(n) + "; a number from 1, or 0 for all available");
  threads_wanted = n;
}
UseThreads::~UseThreads() { threads_wanted = before_; }
int threads() { return inside_task ? 1 : threads_wanted ? threads_wanted : available_threads(); }

// MXCSR and FPCR hold rounding, traps, and the flush-to-zero that libraries built with -ffast-math switch on for the whole thread.
DefaultFloatMode::DefaultFloatMode(bool flush_denormals) {
#if defined(__x86_64__)
  before_ = _mm_getcsr();
  _mm_setcsr(flush_denormals ? 0x1F80 | 0x8040 : 0x1F80);
#elif defined(__aarch64__)
  uint64_t mode, plain = flush_denormals ? 1 << 24 : 0;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  asm volatile("msr fpcr, %0" ::"r"(plain));
  before_ = (unsigned)mode;
#else
  before_ = 0;
#endif
}
DefaultFloatMode::~DefaultFloatMode() {
#if defined(__x86_64__)
  _mm_setcsr(before_);
#elif defined(__aarch64__)
  const uint64_t mode = before_;
  asm volatile("msr fpcr, %0" ::"r"(mode));
#endif
}

// One call of parallel_for_each. It lives on the caller's stack: whoever helps is counted, and the caller waits for these alone.
struct Job {
  void (*task)(void* context, int64_t i);
  void* context;
  int64_t n;
  int places;                    // for helpers, still free; guarded by Workers' lock
  std::atomic<int> helpers{0};   // at work
  std::atomic<int64_t> begun{0};      // tasks handed out
  std::atomic<int64_t> from_back{0};  // of these, to helpers
  std::exception_ptr error{};    // of the first task that threw; the rest are not begun
  std::mutex error_lock{};

  // The caller takes tasks from the front, helpers from the back: from one call to the next a core tends to meet the rows and columns
  // that lie in its cache.
  void work(bool helper) {
    const bool before = std::exchange(inside_task, true);
    for (int64_t front = 0; begun.fetch_add(1, std::memory_order_relaxed) < n;) try {
        task(context, helper ? n - 1 - from_back.fetch_add(1, std::memory_order_relaxed) : front++);
      } catch (...) {
        std::lock_guard<std::mutex> hold(error_lock);
        if (!error) error = std::current_exception();
        begun = n;
      }
    inside_task = before;
  }
};

// The process's threads beside its own, shared by all that call parallel_for_each. Not an OpenMP team: at the end of a parallel region
// a team waits for every member, also for one that was not given a core and has no task, and on a machine with other work that happens
// at each of a step's hundred regions. Here who comes too late is not waited for: the caller has done the work itself by then.
// Measured on two cores beside eight other busy processes, 100 steps of tiny: 113 and 45 s with a team, 5 to 15 s so.
class Workers {
 public:
  void run(Job& job) {
    hire(job.places);
    const int wake = job.places;
    {
      std::lock_guard<std::mutex> hold(lock_);
      jobs_.push_back(&job);
    }
    posted_.fetch_add(1, std::memory_order_release);
    for (int i = 0; i < wake; i++) posted_.notify_one();
    job.work(false);
    {
      std::lock_guard<std::mutex> hold(lock_);
      std::erase(jobs_, &job);  // nobody joins from here on
    }
    if (spin([&] { return job.helpers.load(std::memory_order_acquire) == 0; })) return;
    std::unique_lock<std::mutex> hold(lock_);
    done_.wait(hold, [&] { return job.helpers.load(std::memory_order_acquire) == 0; });
  }

 private:
  std::mutex lock_;
  std::condition_variable done_;
  std::atomic<uint32_t> posted_{0};  // counts the jobs: what sleeping helpers wait on
  std::vector<Job*> jobs_;           // that helpers may join
  int hired_ = 0;

  // Waits awake for about as long as a caller needs from one call to the next: falling asleep and being woken costs more.
  static constexpr int kSpinMicroseconds = 100;
  template <class Ready>
  static bool spin(Ready ready) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(kSpinMicroseconds);
    do {
      for (int i = 0; i < 16; i++) {
        if (ready()) return true;
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
    } while (std::chrono::steady_clock::now() < until);
    return false;
  }

  void hire(int wanted) {
    std::lock_guard<std::mutex> hold(lock_);
    for (; hired_ < wanted; hired_++) try {
        std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) { return; }  // the system gives no more threads: fewer do the same work
  }

  void help() {
    DefaultFloatMode mode;
    for (uint32_t seen = 0;;) {
      Job* job = nullptr;
      {
        std::lock_guard<std::mutex> hold(lock_);
        const auto open = std::find_if(jobs_.begin(), jobs_.end(), [](const Job* j) { return j->places > 0; });
        if (open != jobs_.end())
          job = *open, job->places--, job->helpers++;
        else
          seen = posted_.load(std::memory_order_acquire);
      }
      if (!job) {
        if (!spin([&] { return posted_.load(std::memory_order_acquire) != seen; })) posted_.wait(seen);
        continue;
      }
      job->work(true);
      if (job->helpers.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      { std::lock_guard<std::mutex> hold(lock_); }  // the caller either sees 0 or sleeps already
      done_.notify_all();
    }
  }
};

void parallel_for_each(int64_t n, void (*task)(void* context, int64_t i), void* context) {
  DefaultFloatMode mode;
  const int team = (int)std::min<int64_t>(n, threads());
  Job job{task, context, n, team - 1};
  if (team <= 1) {
    for (int64_t i = 0; i < n; i++) task(context, i);
    return;
  }
  static Workers& workers = *new Workers;  // never destroyed: its threads may outlive every static object
  workers.run(job);
  if (job.error) std::rethrow_exception(job.error);
}

// ==== random numbers ==============================================================================================
// Philox4x32-10's multipliers and the key's steps (Weyl sequences of the golden ratio and sqrt(3) - 1).
static constexpr uint32_t kPhilox0 = 0xD2511F53, kPhilox1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

std::array<uint32_t, 4> philox(const PhiloxKey& key, uint32_t block) {
  std::array<uint32_t, 4> c = {key.step, key.micro, key.op, block};
  uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
  for (int round = 0; round < 10; round++, k0 += kWeyl0, k1 += kWeyl1) {
    const uint64_t p0 = (uint64_t)kPhilox0 * c[0], p1 = (uint64_t)kPhilox1 * c[2];
    c = {(uint32_t)(p1 >> 32) ^ c[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c[3] ^ k1, (uint32_t)p0};
  }
  return c;
}

uint32_t Random::next() {
  if (!left_) bits_ = philox(key_, block_++), left_ = 4;
  return bits_[(size_t)(4 - left_--)];
}
int64_t Random::below(int64_t n) {
  if (n < 1) throw Error("random: a number below " + std::to_string(n));
  // Draws as many bits as n - 1 has, again until the number is below n: at most twice on average, and every number alike.
  const uint64_t last = (uint64_t)n - 1, mask = last ? ~uint64_t(0) >> std::countl_zero(last) : 0;
  for (;;) {
    uint64_t bits = next();
    if (mask >> 32) bits |= (uint64_t)next() << 32;
    if ((bits & mask) <= last) return (int64_t)(bits & mask);
  }
}
double Random::uniform() {
  const uint64_t low = next(), high = next();
  return (double)((high << 32 | low) >> 11) * 0x1p-53;
}
float Random::truncated_normal() {
  // Marsaglia's polar method, half of each pair; with our own logarithm, so that no libm shows in a model's first weights.
  for (;;) {
    const float u = (float)((int32_t)next() >> 8) * 0x1p-23f, v = (float)((int32_t)next() >> 8) * 0x1p-23f, s = u * u + v * v;
    if (s >= 1 || s == 0) continue;
    const float z = u * std::sqrt(-2 * log_f32(s) / s);
    if (std::fabs(z) <= 2) return z;
  }
}

// ==== kernels, scalar =============================================================================================
// The reference: read this one. The SIMD kernels below compute exactly the same, tests/test_tensor.cpp compares the bytes.

// Coefficients in ascending order, fitted for the least largest error; what the fit itself leaves is given.
static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;  // high: 16 bits, n * high is exact
static constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which then is in the low bits
static constexpr float kExpLow = -87.f, kExpHigh = 88.7228317f;  // the last whose exp is finite
static constexpr float kExp[] = {1.f, 1.f, 0.4999999404f, 0.1666652113f, 0.04166838899f, 0.008368719369f, 0.001381459413f};  // 3e-9
// log(1 + f) = f - f^2 / 2 + f^3 P(f), 1 + f from sqrt(1/2) to sqrt(2)                                                          7e-10
static constexpr float kLog[] = {0.3333331048f,  -0.2499998659f, 0.2000222653f,  -0.1666924953f, 0.1421865523f,
                                 -0.1238436997f, 0.1187301651f,  -0.1178969592f, 0.06915146858f};
// tanh(x) = x + x^3 P(x^2) below 0.625                                                                                          4e-9
static constexpr float kTanhSmall = 0.625f;
static constexpr float kTanh[] = {-0.3333328366f, 0.1333149076f, -0.05374349654f, 0.02065058798f, -0.005717044696f};
// Phi(-t), the normal distribution's left half, by t rounded to a multiple i of a step: a polynomial in what is left, its coefficients
// of degree d in kPhi[d][i]; 0 from 6.08 on (6e-10). Of the steps near 3/8 this one has constants that lie close to their floats.
static constexpr float kPhiStep = 0.392578125f, kPhiSteps = 1 / 0.392578125f, kPhiEnd = 15.5f * 0.392578125f;
static constexpr float kPhi[6][16] = {
    {0.5f, 0.34731555f, 0.21618098f, 0.119451262f, 0.0581712127f, 0.0248294398f, 0.00924967509f, 0.0029975716f, 0.000842939015f,
     0.00020527876f, 4.32245179e-05f, 7.85973407e-06f, 1.23291966e-06f, 1.66705405e-07f, 1.94157668e-08f, 1.94671168e-09f},
    {-0.398942262f, -0.369354874f, -0.293119848f, -0.199394971f, -0.116265468f, -0.0581105314f, -0.0248958245f, -0.00914251897f,
     -0.00287787989f, -0.000776510511f, -0.000179593233f, -3.56041674e-05f, -6.05034711e-06f, -8.81310541e-07f, -1.10039238e-07f,
     -1.17770647e-08f},
    {-1.04814649e-06f, 0.0724986196f, 0.11507076f, 0.117415994f, 0.0912872478f, 0.057033442f, 0.0293213297f, 0.0125621362f, 0.00451903231f,
     0.00137163862f, 0.000352440809f, 7.68438331e-05f, 1.42417321e-05f, 2.24655696e-06f, 3.01935756e-07f, 3.46019853e-08f},
    {0.0665092692f, 0.0520699136f, 0.0187368691f, -0.0128621086f, -0.0284045786f, -0.0276311897f, -0.0188725162f, -0.0099834539f,
     -0.00425143912f, -0.00148613821f, -0.000431326102f, -0.000104698338f, -2.13609255e-05f, -3.67610187e-06f, -5.35040726e-07f,
     -6.59920119e-08f},
    {-0.000140480231f, -0.017049985f, -0.022703642f, -0.0157143343f, -0.00411387719f, 0.00397482235f, 0.00618072273f, 0.00475791842f,
     0.00259455829f, 0.00109421439f, 0.00037019173f, 0.000102432408f, 2.34520612e-05f, 4.4769472e-06f, 7.16386126e-07f, 9.64646318e-08f},
    {-0.00957605802f, -0.00640149089f, 0.000754916226f, 0.00559830153f, 0.0055044014f, 0.00256073009f, -8.06127573e-05f, -0.00110946607f,
     -0.000982606434f, -0.000544956361f, -0.000223707364f, -7.20157332e-05f, -1.86909601e-05f, -3.97400436e-06f, -6.991703e-07f,
     -1.02491171e-07f},
};
static constexpr float kDensity = 0.398942280f;                           // 1 / sqrt(2 pi)
static constexpr float kGeluScale = -1.59576912f, kGeluCube = 0.044715f;  // -2 sqrt(2 / pi); the cubic term's factor

namespace {
template <size_t D>
float polynomial(const float (&c)[D], float x) {
  float y = c[D - 1];
  for (size_t i = D - 1; i-- > 0;) y = std::fma(y, x, c[i]);
  return y;
}
// Phi(-t) for t >= 0
float normal_tail(float t) {
  const float n = std::fma(t, kPhiSteps, kRounder), r = std::fma(n - kRounder, -kPhiStep, t);
  const uint32_t i = std::bit_cast<uint32_t>(n) & 15;
  float y = kPhi[5][i];
  for (int d = 4; d >= 0; d--) y = std::fma(y, r, kPhi[d][i]);
  return t < kPhiEnd ? y : t != t ? t : 0;
}
// The logistic function of 2 sqrt(2/pi) (x + 0.044715 x^3), which is (1 + tanh(half of that)) / 2 without its cancellation.
float gelu_gate(float x) {
  const float u = x * std::fma(kGeluCube * x, x, 1.f);
  return 1 / (1 + exp_f32(kGeluScale * u));
}
float activation(Activation act, float x) {
  // x Phi(x) = max(x, 0) - |x| Phi(-|x|): nothing cancels
  if (act == Activation::gelu) return (x < 0 ? 0 : x) - std::min(std::fabs(x), kPhiEnd) * normal_tail(std::fabs(x));
  if (act == Activation::gelu_tanh) return x * gelu_gate(x);
  if (act == Activation::tanh) return tanh_f32(x);
  if (act == Activation::relu) return x < 0 ? 0 : x;  // so, and NaN stays NaN
  return x;
}
float activation_slope(Activation act, float x) {
  if (act == Activation::gelu)  // Phi(x) + x phi(x)
    return std::fma(x, kDensity * exp_f32(-0.5f * x * x), normal_cdf_f32(x));
  if (act == Activation::gelu_tanh) {  // g + x g (1 - g) u',  u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
    const float g = gelu_gate(x), slope = -kGeluScale * std::fma(3 * kGeluCube * x, x, 1.f);
    return std::fma(x * g * (1 - g), slope, g);
  }
  if (act == Activation::tanh) {
    const float t = tanh_f32(x);
    return std::fma(-t, t, 1.f);
  }
  if (act == Activation::relu) return x <= 0 ? 0.f : 1.f;
  return 1;
}

// An AdamW update's numbers, each rounded to float once.
struct AdamWFactors {
  float keep1, take1, keep2, take2, eps, shrink, root, rate, decay;
  AdamWFactors(const AdamWSettings& s, float lr, float decay_, float correct1, float correct2)
      : keep1((float)s.beta1),
        take1((float)(1 - s.beta1)),
        keep2((float)s.beta2),
        take2((float)(1 - s.beta2)),
        eps((float)s.eps),
        shrink(s.google ? 1.f : (float)(1 - (double)lr * (double)decay_)),
        root(s.google ? 1.f : (float)(1 / std::sqrt((double)correct2))),
        rate(s.google ? lr : (float)((double)lr / (double)correct1)),
        decay(s.google ? decay_ : 0.f) {}
};
}  // namespace

float exp_f32(float x) {
  if (x != x) return x;
  if (x < kExpLow) return 0;
  if (x > kExpHigh) return std::numeric_limits<float>::infinity();
  // x = n ln 2 + r, |r| <= ln 2 / 2: exp(x) = 2^n exp(r), and 2^n is added to the exponent's bits
  const float t = std::fma(x, kLog2e, kRounder), n = t - kRounder;
  const float r = std::fma(n, -kLn2Low, std::fma(n, -kLn2High, x));
  return std::bit_cast<float>(std::bit_cast<uint32_t>(polynomial(kExp, r)) + (std::bit_cast<uint32_t>(t) << 23));
}
float log_f32(float x) {
  // x = 2^n (1 + f), 1 + f from sqrt(1/2) to sqrt(2)
  const int32_t bits = std::bit_cast<int32_t>(x), n = (bits - 0x3F3504F3) >> 23;
  const float f = std::bit_cast<float>(bits - (n << 23)) - 1, square = f * f;
  const float rest = std::fma(square * f, polynomial(kLog, f), (float)n * kLn2Low);
  return std::fma((float)n, kLn2High, std::fma(-0.5f, square, rest) + f);
}
float tanh_f32(float x) {
  const float t = std::fabs(x), square = x * x;
  if (t < kTanhSmall) return std::fma(square * x, polynomial(kTanh, square), x);
  return std::copysign(1 - 2 / (exp_f32(2 * t) + 1), x);
}
float normal_cdf_f32(float x) {
  const float tail = normal_tail(std::fabs(x));
  return x < 0 ? tail : 1 - tail;
}

// What differs between tables of one instruction set: the words' tiles and their rows, and what they need.
#define BERT_TABLE(name, f32, ...)                                                                                                      \
  {                                                                                                                                     \
    name, kRows, kCols, f32, __VA_ARGS__, column, pack, transpose, sum, add_sum, dot, squares, max, squares_about, exp_sum, add, axpy,  \
        scale, finish, to_bf16, from_bf16, interleave, round_pairs, to_int8, activate_grad, norm, norm_grad, softmax_grad, draws, drop, \
        adamw                                                                                                                           \
  }
using Halves = Kernels::Halves;
static void no_tiles() {}

// The upper half is added to the lower, four times.
template <class T>
static T sum_lanes(T (&lane)[16]) {
  for (int half = 8; half; half /= 2)
    for (int l = 0; l < half; l++) lane[l] += lane[l + half];
  return lane[0];
}

namespace scalar {
namespace {
// 16 lanes: element i goes into lane i mod 16, and at the end they are added.
struct Lanes {
  float lane[16] = {};
  float& operator[](int64_t i) { return lane[i & 15]; }
  float sum() { return sum_lanes(lane); }
};

constexpr int kRows = 4, kCols = 16;

void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, float* c, int64_t c_row, int rows, int cols,
          bool add) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++) {
      float acc = 0;
      for (int64_t k = 0; k < depth; k++) acc = std::fma(a[i * a_row + k * a_step], b[k * kCols + j], acc);
      c[i * c_row + j] = add ? c[i * c_row + j] + acc : acc;
    }
}
// Of 16 words at a time, each two bf16: the chain of the even k, in the lower halves, and that of the odd k.
void tile_bf16(int64_t depth, const float* a, int64_t a_row, int64_t, const float* b, float* c, int64_t c_row, int rows, int cols,
               bool add) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++) {
      float acc = add ? c[i * c_row + j] : 0;
      for (int64_t k = 0; k < depth;) {
        float even = 0, odd = 0;
        for (const int64_t end = k + 16; k < end; k++) {
          const uint32_t y = std::bit_cast<uint32_t>(b[k * kCols + j]);
          even = std::fma(a[i * a_row + 2 * k], std::bit_cast<float>(y << 16), even);
          odd = std::fma(a[i * a_row + 2 * k + 1], std::bit_cast<float>(y & 0xFFFF0000u), odd);
        }
        acc += even + odd;
      }
      c[i * c_row + j] = acc;
    }
}
// Of two words, each four int8; the sums are int32.
void tile_int8(int64_t depth, const float* a, int64_t a_row, int64_t, const float* b, float* c, int64_t c_row, int rows, int cols,
               bool add) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++) {
      int32_t acc = add ? std::bit_cast<int32_t>(c[i * c_row + j]) : 0;
      for (int64_t k = 0; k < depth; k++) {
        const uint32_t x = std::bit_cast<uint32_t>(a[i * a_row + k]), y = std::bit_cast<uint32_t>(b[k * kCols + j]);
        for (int bit = 0; bit < 32; bit += 8) acc += (int8_t)(x >> bit) * (int8_t)(y >> bit);
      }
      c[i * c_row + j] = std::bit_cast<float>(acc);
    }
}
void column(int64_t depth, const float* a, int64_t a_row, const float* b, float* c, int64_t c_row, int rows, bool add) {
  for (int i = 0; i < rows; i++) {
    float acc = 0;
    for (int64_t k = 0; k < depth; k++) acc = std::fma(a[i * a_row + k], b[k], acc);
    c[i * c_row] = add ? c[i * c_row] + acc : acc;
  }
}
void pack(int64_t depth, const float* b, int64_t b_step, int64_t b_col, float* panel, int cols) {
  for (int64_t k = 0; k < depth; k++)
    for (int j = 0; j < kCols; j++) panel[k * kCols + j] = j < cols ? b[k * b_step + j * b_col] : 0;
}
void transpose(const float* x, int64_t x_row, int64_t rows, int64_t cols, float* y, int64_t y_row) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) y[j * y_row + i] = x[i * x_row + j];
}
float sum(const float* x, int64_t n) {
  Lanes s;
  for (int64_t i = 0; i < n; i++) s[i] += x[i];
  return s.sum();
}
float add_sum(const float* a, const float* b, float* y, int64_t n) {
  Lanes s;
  for (int64_t i = 0; i < n; i++) s[i] += y[i] = a[i] + b[i];
  return s.sum();
}
float dot(const float* x, const float* y, int64_t n) {
  Lanes s;
  for (int64_t i = 0; i < n; i++) s[i] = std::fma(x[i], y[i], s[i]);
  return s.sum();
}
double squares(const float* x, int64_t n) {
  double lane[16] = {};
  for (int64_t i = 0; i < n; i++) lane[i & 15] += (double)x[i] * (double)x[i];  // the product is exact
  return sum_lanes(lane);
}
float max(const float* x, int64_t n) {
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
  return most + 0.f;  // of -0 and +0 the lanes may meet either first: give +0
}
float squares_about(const float* x, float mean, int64_t n) {
  Lanes s;
  for (int64_t i = 0; i < n; i++) s[i] = std::fma(x[i] - mean, x[i] - mean, s[i]);
  return s.sum();
}
float exp_sum(const float* x, float scale, float shift, float* y, int64_t n) {
  Lanes s;
  for (int64_t i = 0; i < n; i++) s[i] += y[i] = exp_f32(x[i] * scale - shift);
  return s.sum();
}
void add(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += x[i];
}
void axpy(float a, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = std::fma(a, x[i], y[i]);
}
void scale(float a, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = a * x[i];
}
void finish(Activation act, const Kernels::Int8Sums* sums, const float* bias, float* y, float* pre, int64_t stride, int64_t rows,
            int64_t n) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < n; i++) {
      float z = y[r * stride + i];
      if (sums)
        z = std::fma((float)(std::bit_cast<int32_t>(z) - sums->zeros[i]), sums->rows[r] * sums->columns[i], bias ? bias[i] : 0);
      else if (bias)
        z += bias[i];
      if (pre) pre[r * stride + i] = z;
      y[r * stride + i] = activation(act, z);
    }
}
uint16_t rounded(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), size = u & 0x7FFFFFFF;
  return (uint16_t)(size < 0x00800000   ? u >> 16 & 0x8000  // a denormal, or 0
                    : size > 0x7F800000 ? u >> 16 | 0x40    // NaN stays one
                                        : (u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
void to_bf16(const float* x, void* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint16_t half = rounded(x[i]);
    std::memcpy((char*)y + 2 * i, &half, 2);
  }
}
void from_bf16(const void* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = std::bit_cast<float>((uint32_t)at<uint16_t>((const char*)x, i) << 16);
}
void interleave(const void* even, const void* odd, void* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t low = even ? at<uint16_t>((const char*)even, i) : 0, high = odd ? at<uint16_t>((const char*)odd, i) : 0;
    const uint32_t word = low | high << 16;
    std::memcpy((char*)y + 4 * i, &word, 4);
  }
}
void round_pairs(const float* even, const float* odd, void* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t word = (even ? rounded(even[i]) : 0u) | (odd ? rounded(odd[i]) : 0u) << 16;
    std::memcpy((char*)y + 4 * i, &word, 4);
  }
}
float to_int8(const float* x, int zero, void* y, int64_t n) {
  int32_t most = 0;  // the bits of max |x|: as integers they have the order of the numbers, and NaN is above all
  for (int64_t i = 0; i < n; i++) most = std::max(most, std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF);
  const float max = std::bit_cast<float>(most), steps = max < 1e-30f ? 0 : 127 / max;
  for (int64_t i = 0; i < n; i++)  // adding the rounder leaves the integer in the low bits
    ((uint8_t*)y)[i] = (uint8_t)(std::bit_cast<int32_t>(x[i] * steps + kRounder) + zero);
  return max < 1e-30f ? 0 : max / 127;
}
void activate_grad(Activation act, const float* z, const float* dy, float* dz, int64_t n) {
  for (int64_t i = 0; i < n; i++) dz[i] = dy[i] * activation_slope(act, z[i]);
}
void norm(const float* x, float mean, float rstd, const float* gamma, const float* beta, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = std::fma((x[i] - mean) * rstd, gamma[i], beta[i]);
}
void norm_grad(const float* x, float mean, float rstd, const float* gamma, const float* dy, float* dx, float* dgamma, float* dbeta,
               int64_t n) {
  Lanes s, t;
  for (int64_t i = 0; i < n; i++) {
    const float g = dy[i] * gamma[i];
    s[i] += g, t[i] = std::fma(g, (x[i] - mean) * rstd, t[i]);
  }
  const float mean_g = s.sum() / (float)n, mean_gx = t.sum() / (float)n;
  for (int64_t i = 0; i < n; i++) {
    const float d = dy[i], xhat = (x[i] - mean) * rstd;
    if (dgamma) dgamma[i] = std::fma(d, xhat, dgamma[i]), dbeta[i] += d;
    dx[i] = rstd * std::fma(-xhat, mean_gx, d * gamma[i] - mean_g);
  }
}
void softmax_grad(const float* p, const float* dp, float delta, float scale, float* ds, int64_t n) {
  for (int64_t i = 0; i < n; i++) ds[i] = p[i] * (dp[i] - delta) * scale;
}
void draws(const PhiloxKey& key, uint32_t first, int64_t blocks, uint16_t* out) {
  for (int64_t b = 0; b < blocks; b++)
    for (uint32_t word : philox(key, first + (uint32_t)b)) *out++ = (uint16_t)word, *out++ = (uint16_t)(word >> 16);
}
void drop(const float* x, const uint16_t* draws, uint32_t threshold, float scale, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = draws[i] >= threshold ? x[i] * scale : 0;
}
void adamw(const AdamWSettings& s, float lr, float decay, float factor, float correct1, float correct2, const float* grad, float* p,
           float* m, float* v, int64_t n) {
  const AdamWFactors f(s, lr, decay, correct1, correct2);
  for (int64_t i = 0; i < n; i++) {
    const float g = grad[i] * factor, kept = p[i] * f.shrink;
    m[i] = std::fma(f.take1, g, f.keep1 * m[i]);
    v[i] = std::fma(f.take2 * g, g, f.keep2 * v[i]);
    const float update = m[i] / std::fma(std::sqrt(v[i]), f.root, f.eps);
    p[i] = std::fma(-f.rate, std::fma(f.decay, kept, update), kept);
  }
}
const Kernels table = BERT_TABLE("scalar", tile, tile_bf16, tile_int8, kRows, kRows, Halves::floats, 0, false, no_tiles, no_tiles);
}  // namespace
}  // namespace scalar

// ==== kernels, SIMD ===============================================================================================
// One text for all instruction sets, at the end of this section: this file includes itself with BERT_ISA, the bits of a vector, set.
// Every function there carries its instruction set as an attribute, TARGET, so that the rest of the program runs on any CPU.
#define INLINE TARGET __attribute__((always_inline))
#define OP INLINE static inline
#define BODY (int64_t i, auto w) INLINE  // of a lambda for chunks()
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)  // the numbers at these places of a, then b
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I4{__VA_ARGS__})
#endif
#define EACH UNROLL for (int q = 0; q < K; q++)
#define MAKE(T, part) \
  T r;                \
  EACH r.v[q] = part; \
  return r
#define FOR_EACH_ACTIVATION(f) /* in the enum's order */ \
  { f<Activation::none>, f<Activation::gelu>, f<Activation::gelu_tanh>, f<Activation::tanh>, f<Activation::relu> }
static constexpr int64_t kMostColumns = 32;  // of a tile, in any table
#if defined(__x86_64__)
#define BERT_ISA 256
#include "tensor.cpp"
#undef BERT_ISA
#define BERT_ISA 512
#include "tensor.cpp"
#undef BERT_ISA
#elif defined(__aarch64__)
#define BERT_ISA 128
#include "tensor.cpp"
#undef BERT_ISA
#endif

#if defined(__x86_64__)
// AMX for bf16 and int8 (cpuid 7, edx bits 22, 24 and 25): its registers are large, so that Linux wants to be asked, once a process.
static bool amx_allowed() {
#if defined(__linux__)
  constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = [] {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & needed) == needed && !syscall(SYS_arch_prctl, request, tile_data);
  }();
  return allowed;
#else
  return false;
#endif
}
#endif
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> tables = {&scalar::table};
#if defined(__x86_64__)
  __builtin_cpu_init();
  auto has = [&](bool instructions, const Kernels& table) { return instructions && (tables.push_back(&table), true); };
  has(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::table) &&
      has(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl"),
          avx512::table) &&
      has(__builtin_cpu_supports("avx512vnni"), avx512::table_vnni) && has(__builtin_cpu_supports("avx512bf16"), avx512::table_bf16);
  if (tables.back() == &avx512::table_bf16) {
    // VDPBF16PS takes two cycles on Intel's cores, the two f32 products in its place one.
    if (__builtin_cpu_is("intel")) std::swap(tables.back(), tables.end()[-2]);
    if (amx_allowed()) tables.push_back(&avx512::table_amx);
  }
#elif defined(__aarch64__)
  tables.push_back(&neon::table);
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) tables.push_back(&neon::table_dot);
#endif
#endif
  return tables;
}

#else  // BERT_ISA: what follows to the section's end is read once for each instruction set
// ---- what differs: a vector V of W floats, and the few operations that C++ has no operator for -------------------
#if BERT_ISA == 512
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#elif BERT_ISA == 256
#define TARGET __attribute__((target("avx2,fma")))
#else
#define TARGET
#endif

#if BERT_ISA == 512
namespace avx512 {
namespace {
typedef __m512 V;
typedef __m512i BITS;
constexpr const char* kName = "avx512";
constexpr int kRows = 12, kCols = 32;  // 24 sums, 2 of b and one of a in 32 registers
OP V fused(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
OP __m128 fused(__m128 a, __m128 b, __m128 c) { return _mm_fmadd_ps(a, b, c); }
OP V root(V a) { return _mm512_maskz_sqrt_ps(0xFFFF, a); }  // maskz here and below: of the plain form g++ 12 warns in its header
OP V spread(float x) { return _mm512_set1_ps(x); }
OP V read(const float* p) { return _mm512_loadu_ps(p); }
OP V read(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }  // the first n, then 0
OP void write(float* p, V v) { _mm512_storeu_ps(p, v); }
OP void write(float* p, V v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
#define EVEN_PRODUCTS(a, b) _mm512_maskz_mul_epu32(0xFF, (__m512i)(a), (__m512i)(b))  // of lanes 0, 2, 4 ..., 64 bits each
OP V look_up(const float* table, __m512i i) { return _mm512_maskz_permutexvar_ps(0xFFFF, i, read(table)); }
#define PAIR_SUMS(a, b) _mm512_maskz_madd_epi16(0xFFFF, (__m512i)(a), (__m512i)(b))   // of 16-bit products, 32 bits each
// Instructions that not all these CPUs have are written out: a compiler would want their names in the attribute of all around them.
OP V dot_bf16(V a, V b, V sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
OP V dot_int8(V a, V b, V sum) {  // a without a sign
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#elif BERT_ISA == 256
namespace avx2 {
namespace {
typedef __m256 V;
typedef __m256i BITS;
constexpr const char* kName = "avx2";
constexpr int kRows = 6, kCols = 16;  // 12 sums, 2 of b and one of a in 16 registers
OP __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
OP V fused(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
OP __m128 fused(__m128 a, __m128 b, __m128 c) { return _mm_fmadd_ps(a, b, c); }
OP V root(V a) { return _mm256_sqrt_ps(a); }
OP V spread(float x) { return _mm256_set1_ps(x); }
OP V read(const float* p) { return _mm256_loadu_ps(p); }
OP V read(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
OP void write(float* p, V v) { _mm256_storeu_ps(p, v); }
OP void write(float* p, V v, int n) { _mm256_maskstore_ps(p, first(n), v); }
#define EVEN_PRODUCTS(a, b) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
OP V look_up(const float* table, __m256i i) {
  const V low = _mm256_permutevar8x32_ps(read(table), i), high = _mm256_permutevar8x32_ps(read(table + 8), i);
  return _mm256_blendv_ps(low, high, (V)_mm256_slli_epi32(i, 28));  // by bit 3
}
#define PAIR_SUMS(a, b) _mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#else
namespace neon {
namespace {
typedef float32x4_t V;
typedef int32x4_t BITS;
constexpr const char* kName = "neon";
constexpr int kRows = 6, kCols = 16;  // 24 sums, 4 of b and one of a in 32 registers
OP V fused(V a, V b, V c) { return vfmaq_f32(c, a, b); }
OP V root(V a) { return vsqrtq_f32(a); }
OP V spread(float x) { return vdupq_n_f32(x); }
OP V read(const float* p) { return vld1q_f32(p); }
OP V read(const float* p, int n) {
  float part[4] = {};
  std::memcpy(part, p, (size_t)n * sizeof(float));
  return vld1q_f32(part);
}
OP void write(float* p, V v) { vst1q_f32(p, v); }
OP void write(float* p, V v, int n) { std::memcpy(p, &v, (size_t)n * sizeof(float)); }
OP V look_up(const float* table, int32x4_t i) { return V{table[i[0] & 15], table[i[1] & 15], table[i[2] & 15], table[i[3] & 15]}; }
#define EVEN_PRODUCTS(a, b) vmull_u32(vmovn_u64((uint64x2_t)(a)), vmovn_u64((uint64x2_t)(b)))
// sdot, as a number: for these CPUs assemblers refuse its name, clang 14's always. Of a register v7 the symbol .Lv7 is 7.
OP V dot_int8(V a, V b, V sum) {
  asm(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n.set .Lv\\n,\\n\n.endr\n"
      ".inst 0x4E809400 | .L%2 << 16 | .L%1 << 5 | .L%0"
      : "+w"(sum)
      : "w"(a), "w"(b));
  return sum;
}
#endif

// ---- sixteen floats at a time: the lanes of the sums, whatever a vector's width ----------------------------------
constexpr int W = BERT_ISA / 32, K = 16 / W;
constexpr int kWideRows = BERT_ISA == 512 ? 6 : 2;  // of bf16's tile: two sums for each element
static_assert(kCols <= kMostColumns);
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint64_t L __attribute__((vector_size(4 * W)));
typedef int16_t S __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint8_t B __attribute__((vector_size(W)));
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

struct P {
  V v[K];
  P() = default;
  INLINE P(float x) { EACH v[q] = spread(x); }
};
struct Mask {
  I v[K];
};
struct Full {};  // all sixteen
struct Part {    // the first n, 0 < n < 16
  int n;
  OP int of(int n, int q) { return n <= q * W ? 0 : n >= q * W + W ? W : n - q * W; }
};

OP P operator+(const P& a, const P& b) { MAKE(P, a.v[q] + b.v[q]); }
OP P operator-(const P& a, const P& b) { MAKE(P, a.v[q] - b.v[q]); }
OP P operator*(const P& a, const P& b) { MAKE(P, a.v[q] * b.v[q]); }
OP P operator/(const P& a, const P& b) { MAKE(P, a.v[q] / b.v[q]); }
OP P operator-(const P& a) { MAKE(P, -a.v[q]); }
OP P fma(const P& a, const P& b, const P& c) { MAKE(P, fused(a.v[q], b.v[q], c.v[q])); }
OP P sqrt(const P& a) { MAKE(P, root(a.v[q])); }
OP P abs(const P& a) { MAKE(P, (V)((I)a.v[q] & 0x7FFFFFFF)); }
OP P with_sign(const P& a, const P& s) { MAKE(P, (V)((I)a.v[q] | ((I)s.v[q] & INT32_MIN))); }  // of an a that has none
OP Mask operator<(const P& a, const P& b) { MAKE(Mask, (I)(a.v[q] < b.v[q])); }
OP Mask operator>(const P& a, const P& b) { MAKE(Mask, (I)(a.v[q] > b.v[q])); }
OP Mask operator<=(const P& a, const P& b) { MAKE(Mask, (I)(a.v[q] <= b.v[q])); }
OP Mask operator==(const P& a, const P& b) { MAKE(Mask, (I)(a.v[q] == b.v[q])); }
OP P select(const Mask& m, const P& a, const P& b) { MAKE(P, m.v[q] ? a.v[q] : b.v[q]); }
OP P min(const P& a, const P& b) { return select(b < a, b, a); }
// Of each lane the table's element that the low four bits of n's name.
OP P lookup(const float (&table)[16], const P& n) { MAKE(P, look_up(table, (BITS)n.v[q])); }
// The bits of a plus the low bits of n moved to the exponent.
OP P add_exponent(const P& a, const P& n) { MAKE(P, (V)((U)a.v[q] + ((U)n.v[q] << 23))); }

OP P load(const float* p, Full) { MAKE(P, read(p + q * W)); }
OP P load(const float* p, Part w) { MAKE(P, read(p + q * W, Part::of(w.n, q))); }
OP void store(float* p, const P& x, Full) { EACH write(p + q * W, x.v[q]); }
OP void store(float* p, const P& x, Part w) { EACH write(p + q * W, x.v[q], Part::of(w.n, q)); }
struct Words {
  U v[K] = {};
};
OP Words load_halves(const uint16_t* p, Full) {  // 16 bits each, widened
  Words r;
  EACH {
    H half;
    std::memcpy(&half, p + q * W, sizeof half);
    r.v[q] = __builtin_convertvector(half, U);
  }
  return r;
}
OP Words load_halves(const uint16_t* p, Part w) {
  uint16_t part[16] = {};
  std::memcpy(part, p, (size_t)w.n * sizeof part[0]);
  return load_halves(part, Full());
}
constexpr int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
OP P keep(const P& x, const P&, Full) { return x; }
OP P keep(const P& x, const P& other, Part w) {  // `other` in the lanes that are not there
  P r;
  EACH {
    I lane;
    std::memcpy(&lane, kLane + q * W, sizeof lane);
    r.v[q] = lane < w.n ? x.v[q] : other.v[q];
  }
  return r;
}
// Calls f(i, Full) for every whole sixteen of n, then f(i, Part) for the rest.
template <class F>
OP void chunks(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, Full());
  if (i < n) f(i, Part{(int)(n - i)});
}
// The lanes' sum, and their maximum: the upper half to the lower, four times.
OP float lane_sum(const P& x) {
  F4 a[4];
  std::memcpy(a, &x, sizeof a);
  const F4 s = (a[0] + a[2]) + (a[1] + a[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
OP float lane_max(const P& x) {
  float lane[16], most = x.v[0][0];
  std::memcpy(lane, &x, sizeof lane);
  for (float l : lane) most = l > most ? l : most;
  return most;
}

// ---- functions, as in the scalar section -------------------------------------------------------------------------
template <size_t D>
OP P polynomial(const float (&c)[D], const P& x) {
  P y = c[D - 1];
  UNROLL for (int i = (int)D - 2; i >= 0; i--) y = fma(y, x, c[i]);
  return y;
}
OP P exp(const P& x) {
  const P t = fma(x, kLog2e, kRounder), n = t - kRounder, r = fma(n, -kLn2Low, fma(n, -kLn2High, x));
  P y = add_exponent(polynomial(kExp, r), t);
  y = select(x < kExpLow, 0.f, y);
  y = select(x > kExpHigh, std::numeric_limits<float>::infinity(), y);
  return select(x == x, y, x);
}
OP P tanh(const P& x) {
  const P t = abs(x), square = x * x, small = fma(square * x, polynomial(kTanh, square), x);
  return select(t < kTanhSmall, small, with_sign(P(1.f) - P(2.f) / (exp(P(2.f) * t) + 1.f), x));
}
OP P normal_tail(const P& t) {
  const P n = fma(t, kPhiSteps, kRounder), r = fma(n - kRounder, -kPhiStep, t);
  P y = lookup(kPhi[5], n);
  UNROLL for (int d = 4; d >= 0; d--) y = fma(y, r, lookup(kPhi[d], n));
  return select(t < kPhiEnd, y, select(t == t, 0.f, t));
}
OP P normal(const P& x) {
  const P tail = normal_tail(abs(x));
  return select(x < 0.f, tail, P(1.f) - tail);
}
OP P gelu_gate(const P& x) {
  const P u = x * fma(P(kGeluCube) * x, x, 1.f);
  return P(1.f) / (P(1.f) + exp(P(kGeluScale) * u));
}
template <Activation A>
OP P activation(const P& x) {
  if constexpr (A == Activation::gelu) return select(x < 0.f, 0.f, x) - min(abs(x), kPhiEnd) * normal_tail(abs(x));
  if constexpr (A == Activation::gelu_tanh) return x * gelu_gate(x);
  if constexpr (A == Activation::tanh) return tanh(x);
  if constexpr (A == Activation::relu) return select(x < 0.f, 0.f, x);
  return x;
}
template <Activation A>
OP P activation_slope(const P& x) {
  if constexpr (A == Activation::gelu) return fma(x, P(kDensity) * exp(P(-0.5f) * x * x), normal(x));
  if constexpr (A == Activation::gelu_tanh) {
    const P g = gelu_gate(x), slope = P(-kGeluScale) * fma(P(3 * kGeluCube) * x, x, 1.f);
    return fma(x * g * (P(1.f) - g), slope, g);
  }
  if constexpr (A == Activation::tanh) {
    const P t = tanh(x);
    return fma(-t, t, 1.f);
  }
  if constexpr (A == Activation::relu) return select(x <= 0.f, 0.f, 1.f);
  return 1.f;
}

// ---- the product's tile ------------------------------------------------------------------------------------------
// A word of 32 bits is a float or four int8; products(a, b, sum) adds all of two words' to a sum. b's may come in kParts, each with a
// word of a's.
struct Floats {
  static constexpr int kParts = 1;
  OP V part(V b, int) { return b; }
  OP V products(V a, V b, V sum) { return fused(a, b, sum); }
  OP V join(V block, V sum) { return block + sum; }
};
struct Int8 {
#if BERT_ISA > 128  // as int8_wide: nothing can saturate
  static constexpr int kParts = 2;
  OP V part(V b, int i) { return (V)(i ? (S)b >> 8 : (S)b << 8 >> 8); }
  OP V products(V a, V b, V sum) {
    sum = (V)((I)sum + (I)PAIR_SUMS(a, b));
    asm("" : "+v"(sum));  // or g++ adds the parts first, for which there are no registers
    return sum;
  }
#else
  static constexpr int kParts = 1;
  OP V part(V b, int) { return b; }
  OP V products(V a, V b, V sum) {
    const int8x16_t x = (int8x16_t)a, y = (int8x16_t)b;
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y))), high = vpaddlq_s16(vmull_high_s8(x, y));
    return (V)((I)sum + (I)vpaddq_s32(low, high));
  }
#endif
  OP V join(V block, V sum) { return (V)((I)block + (I)sum); }
};
#if BERT_ISA != 256
struct Int8Dot : Int8 {
  static constexpr int kParts = 1;
  OP V part(V b, int) { return b; }
  OP V products(V a, V b, V sum) { return dot_int8(a, b, sum); }
};
#endif

// R rows by kCols columns of sums live in registers over the whole depth; each step reads a row of b, and spreads R words of a.
// Of a there is a pointer to every third row: the two between are one and two distances on, which addresses can say.
template <class Words, int R, int N>
OP void multiply_step(const float* const (&row)[(R + 2) / 3], int64_t a_row, const float* b, V (&acc)[R][N]) {
  UNROLL for (int part = 0; part < Words::kParts; part++) {
    V from_b[N];
    UNROLL for (int j = 0; j < N; j++) from_b[j] = Words::part(read(b + j * W), part);
    UNROLL for (int r = 0; r < R; r++) {
      const V from_a = spread(row[r / 3][r % 3 * a_row + part]);
      UNROLL for (int j = 0; j < N; j++) acc[r][j] = Words::products(from_a, from_b[j], acc[r][j]);
    }
  }
}
template <class Words, int R, int N = kCols / W>
TARGET void tile_rows(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, float* c, int64_t c_row, int cols,
                      bool add) {
  V acc[R][N];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) acc[r][j] = spread(0);
  for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N * W; j += 16) __builtin_prefetch(c + r * c_row + j, 1);
  const float* row[(R + 2) / 3];
  UNROLL for (int r = 0; r < R; r += 3) row[r / 3] = a + r * a_row;
  int64_t k = 0;
  if (a_step == 1)
    // Four steps at a time, with no more instructions than needed: a busy hyper-thread takes half of the core's decoders. The next R
    // rows are fetched meanwhile, three cache lines each time: coming from memory they would cost a tenth of the time. (Of few columns the
    // rows themselves, a little ahead: one_panel_part.)
    for (const float* ahead = N == 1 ? a + 128 : a + R * a_row; k + 4 <= depth; k += 4) {
      if constexpr (R > 4) {
        const float* const line = ahead + (k & 12) / 4 * 3 * a_row + (k & ~(int64_t)15);
        UNROLL for (int i = 0; i < 3; i++) __builtin_prefetch(line + i * a_row);
      }
      if constexpr (R < kRows)  // few rows: then b comes from memory
        UNROLL for (int i = 0; i < 4 * kCols; i += 16) __builtin_prefetch(b + 32 * kCols + i);
      UNROLL for (int i = 0; i < 4; i++, b += kCols) {
        multiply_step<Words, R, N>(row, a_row, b, acc);
        UNROLL for (int r = 0; r < R; r += 3) row[r / 3] += Words::kParts;
      }
    }
  for (; k < depth; k++, b += kCols) {
    __builtin_prefetch(row[0] + R * a_row);
    multiply_step<Words, R, N>(row, a_row, b, acc);
    UNROLL for (int r = 0; r < R; r += 3) row[r / 3] += Words::kParts * a_step;
  }
  UNROLL for (int r = 0; r < R; r++) {
    float* const to = c + r * c_row;
    UNROLL for (int j = 0; j < N; j++) {
      const int n = cols - j * W;
      if (n >= W)
        write(to + j * W, add ? Words::join(read(to + j * W), acc[r][j]) : acc[r][j]);
      else if (n > 0)
        write(to + j * W, add ? Words::join(read(to + j * W, n), acc[r][j]) : acc[r][j], n);
    }
  }
}
template <class Words, int R = kRows>
TARGET void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, float* c, int64_t c_row, int rows, int cols,
                 bool add) {
  if constexpr (R == kRows && std::is_same_v<Words, Floats>)  // a few columns, as of one query against all that is searched
    if (rows == R && cols <= W) return tile_rows<Words, R, 1>(depth, a, a_row, a_step, b, c, c_row, cols, add);
  if (rows == R) return tile_rows<Words, R>(depth, a, a_row, a_step, b, c, c_row, cols, add);
  if constexpr (R > 1) tile<Words, R - 1>(depth, a, a_row, a_step, b, c, c_row, rows, cols, add);
}

// A word of b, two bf16, with its part of a. The products join the chains `even` and `odd`; of two words `second` is the one after.
struct Bf16 {
  static constexpr int kNumbers = 2;  // of a: floats
  OP void products(const float* a, V b, bool, V& even, V& odd) {
    even = fused(spread(a[0]), (V)((U)b << 16), even);
    odd = fused(spread(a[1]), (V)((U)b & (U{} + 0xFFFF0000u)), odd);
  }
};
#if BERT_ISA == 512
struct Bf16Dot {  // of words in pairs: the first holds even k, the second odd ones
  static constexpr int kNumbers = 1;
  OP void products(const float* a, V b, bool second, V& even, V& odd) {
    V& chain = second ? odd : even;
    chain = dot_bf16(spread(*a), b, chain);
  }
};
#endif
// R rows by kCols columns of sums and of both chains live in registers.
template <class Words, int R, int N = kCols / W>
TARGET void bf16_rows(int64_t depth, const float* a, int64_t a_row, const float* b, float* c, int64_t c_row, int cols, bool add) {
  V sum[R][N];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) {
    const float* const from = c + r * c_row + j * W;
    const int n = cols - j * W;
    __builtin_prefetch(from, 1);
    sum[r][j] = !add || n <= 0 ? spread(0) : n >= W ? read(from) : read(from, n);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    V even[R][N], odd[R][N];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) even[r][j] = odd[r][j] = spread(0);
    for (int i = 0; i < 8; i++) UNROLL for (int second = 0; second < 2; second++, a += Words::kNumbers, b += kCols) {
        if constexpr (R < kRows / 3) __builtin_prefetch(b + 32 * kCols), __builtin_prefetch(b + 32 * kCols + 16);  // as in tile_rows
        V from_b[N];
        UNROLL for (int j = 0; j < N; j++) from_b[j] = read(b + j * W);
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++)
            Words::products(a + r * a_row, from_b[j], second, even[r][j], odd[r][j]);
      }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] = sum[r][j] + (even[r][j] + odd[r][j]);
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) {
    float* const to = c + r * c_row + j * W;
    if (const int n = cols - j * W; n >= W)
      write(to, sum[r][j]);
    else if (n > 0)
      write(to, sum[r][j], n);
  }
}
template <class Words, int R>
TARGET void tile_bf16(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, float* c, int64_t c_row, int rows,
                      int cols, bool add) {
  if (rows == R) return bf16_rows<Words, R>(depth, a, a_row, b, c, c_row, cols, add);
  if constexpr (R > 1) tile_bf16<Words, R - 1>(depth, a, a_row, a_step, b, c, c_row, rows, cols, add);
}

#if BERT_ISA == 512
// AMX: eight registers of 16 rows of 16 words. Four hold 32 rows and columns of c, two 32 rows of a, two 16 words of a panel; one
// instruction multiplies 16 x 16 x 32 bf16 or 16 x 16 x 64 int8.
namespace amx {
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Shapes shapes;
void on() { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
void off() { asm volatile("tilerelease"); }
template <int To>
OP void load(const float* from, int64_t row) {
  asm volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(from), "r"(4 * row), "i"(To) : "memory");
}
template <int From>
OP void store(float* to, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(to), "r"(4 * row), "i"(From) : "memory");
}
template <bool IsBf16, int A, int B, int Sum>
OP void multiply() {
  if constexpr (IsBf16)
    asm volatile("tdpbf16ps %%tmm%c1, %%tmm%c0, %%tmm%c2" : : "i"(A), "i"(B), "i"(Sum));
  else
    asm volatile("tdpbssd %%tmm%c1, %%tmm%c0, %%tmm%c2" : : "i"(A), "i"(B), "i"(Sum));
}
// 16 rows of a, or 32, by 32 columns.
template <bool IsBf16, int Rows>
TARGET void multiply_rows(int64_t depth, const float* a, int64_t a_row, const float* b, float* c, int64_t c_row, bool add) {
  static_assert(kCols == 32);
  if (add) {
    load<0>(c, c_row), load<1>(c + 16, c_row);
    if constexpr (Rows == 32) load<2>(c + 16 * c_row, c_row), load<3>(c + 16 * c_row + 16, c_row);
  } else {
    asm volatile("tilezero %tmm0\ntilezero %tmm1\ntilezero %tmm2\ntilezero %tmm3");
  }
  for (int64_t k = 0; k < depth; k += 16, b += 16 * kCols) {
    load<4>(a + k, a_row), load<6>(b, kCols), load<7>(b + 16, kCols);
    multiply<IsBf16, 4, 6, 0>(), multiply<IsBf16, 4, 7, 1>();
    if constexpr (Rows == 32) load<5>(a + 16 * a_row + k, a_row), multiply<IsBf16, 5, 6, 2>(), multiply<IsBf16, 5, 7, 3>();
  }
  store<0>(c, c_row), store<1>(c + 16, c_row);
  if constexpr (Rows == 32) store<2>(c + 16 * c_row, c_row), store<3>(c + 16 * c_row + 16, c_row);
}
template <bool IsBf16>
void tile(int64_t depth, const float* a, int64_t a_row, int64_t, const float* b, float* c, int64_t c_row, int rows, int cols, bool add) {
  if (rows == 32 && cols == kCols) return multiply_rows<IsBf16, 32>(depth, a, a_row, b, c, c_row, add);
  alignas(64) float whole[32 * kCols];
  for (int i = 0; i < rows && add; i++) std::copy_n(c + i * c_row, cols, whole + i * kCols);
  (rows > 16 ? multiply_rows<IsBf16, 32> : multiply_rows<IsBf16, 16>)(depth, a, a_row, b, whole, kCols, add);
  for (int i = 0; i < rows; i++) std::copy_n(whole + i * kCols, cols, c + i * c_row);
}
}  // namespace amx
#endif

// to[i] holds the numbers at i of four rows, `apart` from each other.
OP void transpose(const float* rows, int64_t apart, F4 (&to)[4]) {
  F4 r[4];
  UNROLL for (int i = 0; i < 4; i++) std::memcpy(&r[i], rows + i * apart, sizeof(F4));
  const F4 p = SHUFFLE(r[0], r[1], 0, 4, 1, 5), q = SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const F4 s = SHUFFLE(r[2], r[3], 0, 4, 1, 5), t = SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  to[0] = SHUFFLE(p, s, 0, 1, 4, 5), to[1] = SHUFFLE(p, s, 2, 3, 6, 7);
  to[2] = SHUFFLE(q, t, 0, 1, 4, 5), to[3] = SHUFFLE(q, t, 2, 3, 6, 7);
}

TARGET void transpose(const float* x, int64_t x_row, int64_t rows, int64_t cols, float* y, int64_t y_row) {
  const int64_t whole_rows = rows / 4 * 4, whole_cols = cols / 4 * 4;
  for (int64_t j = 0; j < whole_cols; j += 4)
    for (int64_t i = 0; i < whole_rows; i += 4) {
      F4 out[4];
      transpose(x + i * x_row + j, x_row, out);
      UNROLL for (int q = 0; q < 4; q++) std::memcpy(y + (j + q) * y_row + i, &out[q], sizeof(F4));
    }
  scalar::transpose(x + whole_cols, x_row, whole_rows, cols - whole_cols, y + whole_cols * y_row, y_row);
  scalar::transpose(x + whole_rows * x_row, x_row, rows - whole_rows, cols, y + whole_rows, y_row);
}

// Rows are summed four at a time, each in a lane. They come from memory: what follows 384 bytes on is asked for.
template <int R>
TARGET void column_rows(int64_t depth, const float* a, int64_t a_row, const float* b, float* c, int64_t c_row, bool add) {
  F4 acc[R / 4] = {};
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) UNROLL for (int g = 0; g < R / 4; g++) {
      const float* const rows = a + g * 4 * a_row + k;
      if (k % 16 == 0) UNROLL for (int i = 0; i < 4; i++) __builtin_prefetch(rows + i * a_row + 96);
      F4 step[4];
      transpose(rows, a_row, step);
      UNROLL for (int i = 0; i < 4; i++) acc[g] = fused(step[i], F4{b[k + i], b[k + i], b[k + i], b[k + i]}, acc[g]);
    }
  UNROLL for (int r = 0; r < R; r++) {
    float sum = acc[r / 4][r % 4];
    for (int64_t i = k; i < depth; i++) sum = std::fma(a[r * a_row + i], b[i], sum);
    c[r * c_row] = add ? c[r * c_row] + sum : sum;
  }
}
TARGET void column(int64_t depth, const float* a, int64_t a_row, const float* b, float* c, int64_t c_row, int rows, bool add) {
  int r = 0;
  for (; r + 8 <= rows; r += 8) column_rows<8>(depth, a + r * a_row, a_row, b, c + r * c_row, c_row, add);
  for (; r + 4 <= rows; r += 4) column_rows<4>(depth, a + r * a_row, a_row, b, c + r * c_row, c_row, add);
  if (r < rows) scalar::column(depth, a + r * a_row, a_row, b, c + r * c_row, c_row, rows - r, add);
}

// Four columns of b of `depth` (a multiple of 4) numbers each, to four places in every row of the panel; the next four are asked for.
TARGET static void pack_four(int64_t depth, const float* b, int64_t b_col, float* panel) {
  for (int64_t k = 0; k < depth; k += 4, panel += 4 * kCols) {
    if (k % 16 == 0) UNROLL for (int i = 4; i < 8; i++) __builtin_prefetch(b + i * b_col + k);
    F4 out[4];
    transpose(b + k, b_col, out);
    UNROLL for (int i = 0; i < 4; i++) std::memcpy(panel + i * kCols, &out[i], sizeof(F4));
  }
}
TARGET void pack(int64_t depth, const float* b, int64_t b_step, int64_t b_col, float* panel, int cols) {
  if (b_col == 1 && cols == kCols) {
    for (int64_t k = 0; k < depth; k++) UNROLL for (int j = 0; j < kCols; j += W) write(panel + k * kCols + j, read(b + k * b_step + j));
    return;
  }
  // 256 k at a time: the part of the panel that is being filled stays in the first cache.
  for (int64_t k0 = 0; k0 < depth; k0 += 256) {
    const int64_t k1 = std::min(k0 + 256, depth), whole = b_step == 1 ? k0 + (k1 - k0) / 4 * 4 : k0;
    int j = 0;
    for (; j + 4 <= cols; j += 4) pack_four(whole - k0, b + k0 + j * b_col, b_col, panel + k0 * kCols + j);
    for (int64_t k = k0; k < k1; k++)
      for (int i = k < whole ? j : 0; i < kCols; i++) panel[k * kCols + i] = i < cols ? b[k * b_step + i * b_col] : 0;
  }
}

// ---- sums along a row, and what is done element by element -------------------------------------------------------
TARGET float sum(const float* x, int64_t n) {
  P s = 0.f;
  chunks(n, [&] BODY { s = s + load(x + i, w); });
  return lane_sum(s);
}
TARGET float add_sum(const float* a, const float* b, float* y, int64_t n) {
  P s = 0.f;
  chunks(n, [&] BODY {
    const P v = load(a + i, w) + load(b + i, w);
    store(y + i, v, w);
    s = s + v;
  });
  return lane_sum(s);
}
TARGET float dot(const float* x, const float* y, int64_t n) {
  P s = 0.f;
  chunks(n, [&] BODY { s = fma(load(x + i, w), load(y + i, w), s); });
  return lane_sum(s);
}
TARGET float max(const float* x, int64_t n) {
  const P least = -std::numeric_limits<float>::infinity();
  P most = least;
  chunks(n, [&] BODY {
    const P v = keep(load(x + i, w), least, w);
    most = select(v > most, v, most);
  });
  return lane_max(most) + 0.f;
}
TARGET float squares_about(const float* x, float mean, int64_t n) {
  P s = 0.f;
  chunks(n, [&] BODY {
    const P d = keep(load(x + i, w) - mean, 0.f, w);
    s = fma(d, d, s);
  });
  return lane_sum(s);
}
TARGET float exp_sum(const float* x, float scale, float shift, float* y, int64_t n) {
  P s = 0.f;
  chunks(n, [&] BODY {
    const P e = exp(load(x + i, w) * scale - shift);
    store(y + i, e, w);
    s = s + keep(e, 0.f, w);
  });
  return lane_sum(s);
}
TARGET double squares(const float* x, int64_t n) {
  typedef float Half __attribute__((vector_size(2 * W)));
  typedef double D __attribute__((vector_size(4 * W)));
  D sums[2 * K] = {};
  chunks(n, [&] BODY {
    __builtin_prefetch(x + i + 512);  // a gradient comes from memory: 40 % faster for knowing its stream so far ahead
    const P v = load(x + i, w);
    Half half[2 * K];
    std::memcpy(half, &v, sizeof half);
    UNROLL for (int h = 0; h < 2 * K; h++) {
      const D d = __builtin_convertvector(half[h], D);
      sums[h] += d * d;
    }
  });
  double lane[16];
  std::memcpy(lane, sums, sizeof lane);
  return sum_lanes(lane);
}
TARGET void add(const float* x, float* y, int64_t n) {
  chunks(n, [&] BODY { store(y + i, load(y + i, w) + load(x + i, w), w); });
}
TARGET void axpy(float a, const float* x, float* y, int64_t n) {
  chunks(n, [&] BODY { store(y + i, fma(a, load(x + i, w), load(y + i, w)), w); });
}
TARGET void scale(float a, const float* x, float* y, int64_t n) {
  chunks(n, [&] BODY { store(y + i, P(a) * load(x + i, w), w); });
}
OP P from_integers(const P& x) { MAKE(P, __builtin_convertvector((I)x.v[q], V)); }
OP P minus_integers(const P& x, const P& y) { MAKE(P, (V)((I)x.v[q] - (I)y.v[q])); }
template <Activation A>
TARGET void finish_as(const Kernels::Int8Sums* sums, const float* bias, float* y, float* pre, int64_t stride, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; r++, y += stride, pre = pre ? pre + stride : nullptr)
    chunks(n, [&] BODY {
      P z = load(y + i, w), b = 0.f;
      if (bias) b = load(bias + i, w);
      if (sums) {
        const P sum = from_integers(minus_integers(z, load((const float*)sums->zeros + i, w)));
        z = fma(sum, P(sums->rows[r]) * load(sums->columns + i, w), b);
      } else if (bias) {
        z = z + b;
      }
      if (pre) store(pre + i, z, w);
      store(y + i, activation<A>(z), w);
    });
}
void finish(Activation act, const Kernels::Int8Sums* sums, const float* bias, float* y, float* pre, int64_t stride, int64_t rows,
            int64_t n) {
  static constexpr decltype(&finish_as<Activation::none>) as[] = FOR_EACH_ACTIVATION(finish_as);
  as[(int)act](sums, bias, y, pre, stride, rows, n);
}
OP I larger(const I& a, const I& b) { return a > b ? a : b; }
// Writes the low 16 or 8 bits of each lane's integer, of 16 lanes or the first n.
template <class Narrow>
OP void write_low(char* to, const Words& x, Full) {
  EACH {
    const Narrow low = __builtin_convertvector(x.v[q], Narrow);
    std::memcpy(to + q * (int)sizeof low, &low, sizeof low);
  }
}
template <class Narrow>
OP void write_low(char* to, const Words& x, Part w) {
  char all[16 * sizeof(Narrow) / W];
  write_low<Narrow>(all, x, Full());
  std::memcpy(to, all, (size_t)w.n * sizeof(Narrow) / W);
}
OP Words rounded(const P& x) {  // to bf16, in the low halves
  Words r;
  EACH {
    const U u = (U)x.v[q], size = u & 0x7FFFFFFFu, up = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
    r.v[q] = size < 0x00800000u ? u >> 16 & 0x8000u : size > 0x7F800000u ? u >> 16 | 0x40u : up;
  }
  return r;
}
TARGET void to_bf16(const float* x, void* y, int64_t n) {
  chunks(n, [&] BODY { write_low<H>((char*)y + 2 * i, rounded(load(x + i, w)), w); });
}
TARGET void from_bf16(const void* x, float* y, int64_t n) {
  chunks(n, [&] BODY {
    const Words u = load_halves((const uint16_t*)x + i, w);
    P r;
    EACH r.v[q] = (V)(u.v[q] << 16);
    store(y + i, r, w);
  });
}
OP P side_by_side(const Words& low, const Words& high) { MAKE(P, (V)(low.v[q] | high.v[q] << 16)); }
TARGET void interleave(const void* even, const void* odd, void* y, int64_t n) {
  chunks(n, [&] BODY {
    auto half = [&](const void* x) INLINE { return x ? load_halves((const uint16_t*)x + i, w) : Words(); };
    store((float*)y + i, side_by_side(half(even), half(odd)), w);
  });
}
TARGET void round_pairs(const float* even, const float* odd, void* y, int64_t n) {
  chunks(n, [&] BODY {
    auto half = [&](const float* x) INLINE { return x ? rounded(load(x + i, w)) : Words(); };
    store((float*)y + i, side_by_side(half(even), half(odd)), w);
  });
}
TARGET float to_int8(const float* x, int zero, void* y, int64_t n) {
  Mask most = {};  // bits of |x|, as integers
  chunks(n, [&] BODY {
    const P v = load(x + i, w);
    EACH most.v[q] = larger((I)v.v[q] & 0x7FFFFFFF, most.v[q]);
  });
  typedef int32_t I4 __attribute__((vector_size(16)));
  I4 part[4];
  std::memcpy(part, &most, sizeof part);
  const I4 a = part[0] > part[1] ? part[0] : part[1], b = part[2] > part[3] ? part[2] : part[3], c = a > b ? a : b;
  const float max = std::bit_cast<float>(std::max(std::max(c[0], c[1]), std::max(c[2], c[3]))), steps = max < 1e-30f ? 0 : 127 / max;
  chunks(n, [&] BODY {
    const P rounded = load(x + i, w) * steps + kRounder;
    Words r;
    EACH r.v[q] = (U)rounded.v[q] + (uint32_t)zero;
    write_low<B>((char*)y + i, r, w);
  });
  return max < 1e-30f ? 0 : max / 127;
}
template <Activation A>
TARGET void activate_grad_as(const float* z, const float* dy, float* dz, int64_t n) {
  chunks(n, [&] BODY { store(dz + i, load(dy + i, w) * activation_slope<A>(load(z + i, w)), w); });
}
void activate_grad(Activation act, const float* z, const float* dy, float* dz, int64_t n) {
  static constexpr decltype(&activate_grad_as<Activation::none>) as[] = FOR_EACH_ACTIVATION(activate_grad_as);
  as[(int)act](z, dy, dz, n);
}
TARGET void norm(const float* x, float mean, float rstd, const float* gamma, const float* beta, float* y, int64_t n) {
  chunks(n, [&] BODY { store(y + i, fma((load(x + i, w) - mean) * rstd, load(gamma + i, w), load(beta + i, w)), w); });
}
TARGET void norm_grad(const float* x, float mean, float rstd, const float* gamma, const float* dy, float* dx, float* dgamma, float* dbeta,
                      int64_t n) {
  P s = 0.f, t = 0.f;
  chunks(n, [&] BODY {
    const P g = load(dy + i, w) * load(gamma + i, w);
    s = s + g;
    t = fma(g, keep((load(x + i, w) - mean) * rstd, 0.f, w), t);
  });
  const float mean_g = lane_sum(s) / (float)n, mean_gx = lane_sum(t) / (float)n;
  chunks(n, [&] BODY {
    const P d = load(dy + i, w), xhat = (load(x + i, w) - mean) * rstd;
    if (dgamma) {
      store(dgamma + i, fma(d, xhat, load(dgamma + i, w)), w);
      store(dbeta + i, load(dbeta + i, w) + d, w);
    }
    store(dx + i, P(rstd) * fma(-xhat, mean_gx, d * load(gamma + i, w) - mean_g), w);
  });
}
TARGET void softmax_grad(const float* p, const float* dp, float delta, float scale, float* ds, int64_t n) {
  chunks(n, [&] BODY { store(ds + i, load(p + i, w) * (load(dp + i, w) - delta) * scale, w); });
}

// The 64 bits of each lane's product: `high` and `low`.
OP void multiply(const U& a, uint32_t factor, U& high, U& low) {
  const U m = U{} + factor;
  const L even = (L)EVEN_PRODUCTS(a, m), odd = (L)EVEN_PRODUCTS((L)a >> 32, m);
  low = (U)((even & 0xFFFFFFFFu) | odd << 32);
  high = (U)(even >> 32 | (odd & ~(uint64_t)0xFFFFFFFFu));
}
TARGET void draws(const PhiloxKey& key, uint32_t first, int64_t blocks, uint16_t* out) {
  U lane;
  std::memcpy(&lane, kLane, sizeof lane);
  for (int64_t b = 0; b < blocks; b += W) {
    U c[4] = {U{} + key.step, U{} + key.micro, U{} + key.op, lane + (first + (uint32_t)b)};
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
    for (int round = 0; round < 10; round++, k0 += kWeyl0, k1 += kWeyl1) {
      U high0, low0, high1, low1;
      multiply(c[0], kPhilox0, high0, low0);
      multiply(c[2], kPhilox1, high1, low1);
      c[0] = high1 ^ c[1] ^ k0, c[1] = low1, c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
    }
    // A word's low half comes first: both CPUs here store it so.
    const int64_t count = std::min<int64_t>(W, blocks - b);
    for (int64_t j = 0; j < count; j++) {
      const uint32_t words[4] = {c[0][j], c[1][j], c[2][j], c[3][j]};
      std::memcpy(out + 8 * (b + j), words, sizeof words);
    }
  }
}
OP Mask operator>=(const Words& a, uint32_t b) { MAKE(Mask, (I)(a.v[q] >= U{} + b)); }
TARGET void drop(const float* x, const uint16_t* draws, uint32_t threshold, float scale, float* y, int64_t n) {
  chunks(n, [&] BODY { store(y + i, select(load_halves(draws + i, w) >= threshold, load(x + i, w) * scale, 0.f), w); });
}
TARGET void adamw(const AdamWSettings& s, float lr, float decay, float factor, float correct1, float correct2, const float* grad, float* p,
                  float* m, float* v, int64_t n) {
  const AdamWFactors f(s, lr, decay, correct1, correct2);
  chunks(n, [&] BODY {
    const P g = load(grad + i, w) * factor, kept = load(p + i, w) * f.shrink;
    const P m1 = fma(f.take1, g, P(f.keep1) * load(m + i, w)), v1 = fma(P(f.take2) * g, g, P(f.keep2) * load(v + i, w));
    store(m + i, m1, w);
    store(v + i, v1, w);
    store(p + i, fma(-f.rate, fma(f.decay, kept, m1 / fma(sqrt(v1), f.root, f.eps)), kept), w);
  });
}
#define WIDE tile_bf16<Bf16, kWideRows>
const Kernels table =
    BERT_TABLE(kName, tile<Floats>, WIDE, tile<Int8>, kWideRows, kRows, Halves::floats, 0, Int8::kParts == 2, no_tiles, no_tiles);
#if BERT_ISA == 512
constexpr int kDotRows = 4;
const Kernels table_vnni =
    BERT_TABLE("avx512_vnni", tile<Floats>, WIDE, tile<Int8Dot>, kWideRows, kRows, Halves::floats, 128, false, no_tiles, no_tiles);
const Kernels table_bf16 = BERT_TABLE("avx512_bf16", tile<Floats>, (tile_bf16<Bf16Dot, kDotRows>), tile<Int8Dot>, kDotRows, kRows,
                                      Halves::pairs, 128, false, no_tiles, no_tiles);
const Kernels table_amx =
    BERT_TABLE("avx512_amx", tile<Floats>, amx::tile<true>, amx::tile<false>, 32, 32, Halves::words, 0, false, amx::on, amx::off);
#elif BERT_ISA == 128
const Kernels table_dot =
    BERT_TABLE("neon_dot", tile<Floats>, WIDE, tile<Int8Dot>, kWideRows, kRows, Halves::floats, 0, false, no_tiles, no_tiles);
#endif
}  // namespace
}  // namespace avx512, avx2 or neon
#undef TARGET
#undef EVEN_PRODUCTS
#undef PAIR_SUMS
#undef WIDE
#endif  // BERT_ISA
#ifndef BERT_ISA

// ==== gemm ========================================================================================================
static constexpr int64_t kPackedRows = 132;  // of a task whose weights are packed: they stay in the second cache
static constexpr int64_t kPackFirst = 1024;       // rows of op(a) from which on b is laid out in panels before the tasks are cut
static constexpr int64_t kPackFirstNarrow = 512;  // the same where it is rounded to bf16
static constexpr int64_t kDepth = 256;  // of a block of k: one chain of fused multiply-adds, whose sum is then added to C
static constexpr int64_t kWords = 192;  // of bf16 and int8 at a time: some rows of op(a) and C stay in the first cache
static constexpr int64_t kPanelWords = 3 << 16;  // 768 KiB of packed panels stay in the second cache

// A variable of the environment; null where it is not set, or empty.
static const char* setting(const char* name) {
  const char* const value = std::getenv(name);
  return value && *value ? value : nullptr;
}
const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const std::vector<const Kernels*> tables = usable_kernels();
    const char* const want = setting("BERT_KERNELS");
    if (!want) return tables.back();
    std::string names;
    for (const Kernels* t : tables) {
      if (!std::strcmp(want, t->name)) return t;
      names += (names.empty() ? "" : ", ") + std::string(t->name);
    }
    throw Error("BERT_KERNELS=" + std::string(want) + ": this CPU has " + names);
  }();
  return *chosen;
}

// Words of 32 bits that hold k numbers; of bf16 and int8 whole steps of 16.
static int64_t words_of(Precision precision, int64_t k) {
  return precision == Precision::f32 ? k : precision == Precision::bf16 ? (k + 31) / 32 * 16 : (k + 63) / 64 * 16;
}
// From one row of words to the next in memory: an odd number of cache lines spreads the rows over all sets of the first cache.
static int64_t distance_of(int64_t words) { return words | 16; }
// The words of a row of bf16, which hold k in order, as Halves::pairs are.
static void pair_up(float* row, int64_t words) {
  for (int64_t i = 0; i < words; i += 2) {
    const uint32_t first = std::bit_cast<uint32_t>(row[i]), second = std::bit_cast<uint32_t>(row[i + 1]);
    row[i] = std::bit_cast<float>(first << 16 | (second & 0xFFFF));
    row[i + 1] = std::bit_cast<float>((first & 0xFFFF0000u) | second >> 16);
  }
}
// The words of a row of int8 become two each, as int8_wide wants them; the last first, for there is no other room.
static void widen_bytes(float* row, int64_t words) {
  for (int64_t i = words; i-- > 0;) {
    const uint32_t x = std::bit_cast<uint32_t>(row[i]);
    auto pair = [](uint32_t low, uint32_t high) { return (uint32_t)(uint16_t)(int8_t)low | (uint32_t)(int8_t)high << 16; };
    row[2 * i] = std::bit_cast<float>(pair(x, x >> 16)), row[2 * i + 1] = std::bit_cast<float>(pair(x >> 8, x >> 24));
  }
}
// Asks for the cache lines of `rows` rows of `floats` numbers, `stride` apart; the part-th of `parts` shares of the rows.
static void fetch(const float* at, int64_t stride, int64_t rows, int64_t floats, int64_t part, int64_t parts) {
  for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; r++)
    for (int64_t f = 0; f < floats; f += 16) __builtin_prefetch(at + r * stride + f, 0, 2);
}
// Which k the halves of word i hold, lower and upper.
static std::pair<int64_t, int64_t> halves(const Kernels& t, int64_t i) {
  const int64_t first = i / 2 * 4 + i % 2;
  return t.halves == Halves::pairs ? std::pair(first + 2, first) : std::pair(2 * i, 2 * i + 1);
}
// Word i of columns first .. first + n of a matrix in bf16 whose rows are k.
static void copy_word(const Kernels& t, const NarrowMatrix& x, int64_t i, int64_t first, int64_t n, float* to) {
  auto row = [&](int64_t k) { return k < x.n ? x.row(k) + 2 * first : nullptr; };
  const auto [lower, upper] = halves(t, i);
  t.interleave(row(lower), row(upper), to, n);
}
// A matrix in f32 that is rounded to bf16 as it is laid out in panels: element (k, j) is at[k * step + j * col]; step or col is 1.
struct RoundedPanels {
  const Kernels& t;
  int64_t k, n;
  const float* at;
  int64_t step, col;
  int64_t words = words_of(Precision::bf16, k);

  // Words first..end of the panels of columns j0..j1; both begin where a tile does. to: panel j0.
  void pack(int64_t first, int64_t end, int64_t j0, int64_t j1, float* to) const {
    if (step == 1)  // along the memory in either case
      for (int64_t j = j0; j < j1; j += t.nr)
        for (int64_t i = first; i < end; i += 16) pack_tile(i, j, to + (j - j0) * words + i * t.nr);
    else
      for (int64_t i = first; i < end; i += 16)
        for (int64_t j = j0; j < j1; j += t.nr) pack_tile(i, j, to + (j - j0) * words + i * t.nr);
  }

 private:
  // Sixteen words of a panel, which hold 32 rows of k. What follows is asked for: rows lie pages apart, and no processor fetches so many
  // streams ahead by itself.
  void pack_tile(int64_t word, int64_t j, float* to) const {
    constexpr int64_t kRows = 32, kAhead = 64;
    alignas(64) float room[kRows * kMostColumns];
    const bool turned = step == 1;
    const int64_t first = 2 * word, rows = std::clamp<int64_t>(k - first, 0, kRows), cols = std::min<int64_t>(t.nr, n - j);
    const int64_t ahead = std::clamp<int64_t>(k - first - kAhead, 0, kRows), filled = turned ? t.nr : cols;
    const float* const from = at + first * step + j * col;
    if (ahead) fetch(from + kAhead * step, turned ? col : step, turned ? cols : ahead, turned ? ahead : cols, 0, 1);
    if (turned) t.pack(rows, from, 1, col, room, (int)cols);
    auto row = [&](int64_t i) { return i >= rows ? nullptr : turned ? room + i * t.nr : from + i * step; };
    for (int64_t i = 0; i < kRows / 2; i++, to += t.nr) {
      const auto [lower, upper] = halves(t, i);
      t.round_pairs(row(lower), row(upper), to, filled);
      std::fill(to + filled, to + t.nr, 0.f);
    }
  }
};

namespace {
struct Product {
  const Kernels& table;
  const Gemm& how;
  int64_t m, n, k;
  const float* a;
  int64_t lda;
  const float* b;  // null when packed; in bf16 rounded by each task, which then has all rows
  int64_t ldb;
  const float* panels;
  float* c;
  int64_t ldc;
  const PackedWeights* packed = nullptr;
  bool narrowed = false;              // a holds words: its rows were narrowed before the tasks were cut
  const float* row_scales = nullptr;  // int8: of rows that were
  const NarrowMatrix* bf16 = nullptr;  // op(a)'s matrix, in place of a

  Precision precision() const { return bf16 ? Precision::bf16 : packed ? packed->precision() : Precision::f32; }
  int64_t words() const { return words_of(precision(), k); }
  // Whether the tile of bf16 or int8 wants two words of a for each of b: floats, or int16.
  bool wide() const { return precision() == Precision::bf16 ? table.halves == Halves::floats : table.int8_wide; }
  int64_t a_room(int64_t words) const { return wide() ? 2 * words : words; }  // in a's copy
  RoundedPanels rounded() const { return {table, k, n, b, how.b_transposed ? 1 : ldb, how.b_transposed ? ldb : 1}; }
  int mr() const { return precision() == Precision::f32 ? table.mr : precision() == Precision::bf16 ? table.mr_bf16 : table.mr_int8; }
};

// `all` cut into pieces of at most `most`, as equal as multiples of `unit` allow.
int64_t even_piece(int64_t all, int64_t most, int64_t unit) {
  const int64_t pieces = (all + most - 1) / most;
  return pieces ? ((all + pieces - 1) / pieces + unit - 1) / unit * unit : unit;
}

// The epilogue of rows i0..i1 and columns j0..j1 of C, while they are in the first cache. row_scales: int8, of these rows.
void finish(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, const float* row_scales = nullptr) {
  const Epilogue& e = p.how.epilogue;
  const float* bias = e.bias ? e.bias + j0 : nullptr;
  float* const c = p.c + i0 * p.ldc + j0;
  const Kernels::Int8Sums sums{row_scales, row_scales ? p.packed->scales() + j0 : nullptr, row_scales ? p.packed->zeros() + j0 : nullptr};
  if (row_scales || bias || e.pre || e.activation != Activation::none)
    p.table.finish(e.activation, row_scales ? &sums : nullptr, bias, c, e.pre ? e.pre + i0 * p.ldc + j0 : nullptr, p.ldc, i1 - i0, j1 - j0);
}

// C where k is 0: zeros, or what is there.
void finish_empty(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  if (!p.how.add)
    for (int64_t i = i0; i < i1; i++) std::fill(p.c + i * p.ldc + j0, p.c + i * p.ldc + j1, 0.f);
  finish(p, i0, i1, j0, j1);
}

// Rows i0..i1 of a in the precision of b, each in words() words, or in twice as many where the tile wants them wide, whose end is zero; and
// of int8 their scales.
void narrow_rows(const Product& p, int64_t i0, int64_t i1, float* words, float* scales) {
  const bool bf16 = p.precision() == Precision::bf16;
  const int64_t room = p.a_room(p.words()), bytes = !bf16 ? p.k : p.wide() ? 4 * p.k : 2 * p.k;
  for (int64_t i = i0; i < i1; i++, words += distance_of(room)) {
    char* const to = (char*)words;
    if (!p.bf16 && i + 2 < i1)  // the row after the next is asked for
      fetch(p.a + (i + 2) * p.lda, p.lda, 1, p.k, 0, 1);
    if (p.bf16 && p.wide())
      p.table.from_bf16(p.bf16->row(i), words, p.k);
    else if (p.bf16)
      std::memcpy(to, p.bf16->row(i), (size_t)bytes);
    else if (bf16 && p.wide())
      p.table.round_pairs(nullptr, p.a + i * p.lda, to, p.k);  // as upper halves they are floats
    else if (bf16)
      p.table.to_bf16(p.a + i * p.lda, to, p.k);
    else
      scales[i - i0] = p.table.to_int8(p.a + i * p.lda, p.table.int8_zero, to, p.k);
    std::memset(to + bytes, bf16 ? 0 : p.table.int8_zero, (size_t)(4 * room - bytes));
    if (bf16 && p.table.halves == Halves::pairs) pair_up(words, p.words());
    if (!bf16 && p.wide()) widen_bytes(words, p.words());
  }
}

// Words k0.. of rows i0..i1 of op(a), which is a transposed matrix in bf16, as narrow_rows has them: `depth` words a row, `distance` apart;
// room: 16 words each.
void copy_transposed(const Product& p, int64_t k0, int64_t depth, int64_t i0, int64_t i1, float* to, int64_t distance, float* room) {
  const int64_t rows = i1 - i0, first = p.a_room(k0);
  for (int64_t at = 0; at < p.a_room(depth); at += 16) {
    for (int64_t i = 0; i < 16; i++)
      if (float* const row = room + i * rows; !p.wide())
        copy_word(p.table, *p.bf16, first + at + i, i0, rows, row);
      else if (first + at + i < p.k)
        p.table.from_bf16(p.bf16->row(first + at + i) + 2 * i0, row, rows);
      else
        std::fill_n(row, rows, 0.f);
    p.table.transpose(room, rows, 16, rows, to + at, distance);
  }
}

// This many floats, kept for the thread's next call.
float* scratch(int64_t needed) {
  static thread_local Tensor kept;
  if (!kept || kept.size() < needed) kept = {}, kept = Tensor({needed});
  return kept.data();
}

// Rows i0..i1 and columns j0..j1 of C by the own kernels, a panel of b at a time: it stays in the first cache while the rows pass.
void own_part(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Kernels& t = p.table;
  const bool a_transposed = p.how.a_transposed, b_transposed = p.how.b_transposed;
  const int64_t rows = i1 - i0, strips = (rows + t.mr - 1) / t.mr, all = (j1 - j0 + t.nr - 1) / t.nr * strips;
  // op(a) is read where it lies. A transposed one is copied first, a block of k at a time, or its columns would touch a page each; so is
  // one whose rows lie a multiple of 4 KiB apart, which all fall into one set of the first cache. An odd number of cache lines from row to
  // row spreads the copy over all sets.
  const bool spread = !a_transposed && p.lda % 1024 == 0;
  const int64_t a_stride = spread ? kDepth + 16 : (rows + 15) / 16 * 16 | 16;
  float* const panel = scratch(kDepth * t.nr + (a_transposed ? kDepth : spread ? rows : 0) * a_stride);
  float* const a_copy = panel + kDepth * t.nr;
  auto b_at = [&](int64_t k, int64_t j) { return p.b + (b_transposed ? j * p.ldb + k : k * p.ldb + j); };
  if (!p.k) finish_empty(p, i0, i1, j0, j1);
  for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, p.k - k0), next_k = k0 + kDepth;
    const float* a = a_transposed ? a_copy : p.a + i0 * p.lda + k0;
    int64_t a_row = p.lda, a_step = 1, done = 0;
    if (a_transposed) {
      for (int64_t k = 0; k < depth; k++) std::memcpy(a_copy + k * a_stride, p.a + (k0 + k) * p.lda + i0, (size_t)rows * sizeof(float));
      a_row = 1, a_step = a_stride;
    } else if (spread) {
      for (int64_t r = 0; r < rows; r++) std::memcpy(a_copy + r * a_stride, a + r * p.lda, (size_t)depth * sizeof(float));
      a = a_copy, a_row = a_stride;
    }
    for (int64_t j = j0; j < j1; j += t.nr) {
      const int cols = (int)std::min<int64_t>(t.nr, p.n - j);
      const float* const b = p.panels ? p.panels + j * p.k + k0 * t.nr : panel;
      if (!p.panels) t.pack(depth, b_at(k0, j), b_transposed ? 1 : p.ldb, b_transposed ? p.ldb : 1, panel, cols);
      for (int64_t s = 0; s < strips; s++, done++) {
        const int64_t r0 = s * rows / strips, r1 = (s + 1) * rows / strips;
        // What will be packed and copied next is asked for meanwhile, in small shares: waiting for it then took a sixth of the time.
        if (!p.panels && j + t.nr < j1)
          fetch(b_at(k0, j + t.nr), p.ldb, b_transposed ? t.nr : depth, b_transposed ? depth : t.nr, s, strips);
        if (a_transposed && next_k < p.k) fetch(p.a + next_k * p.lda + i0, p.lda, std::min(kDepth, p.k - next_k), rows, done, all);
        t.tile(depth, a + r0 * a_row, a_row, a_step, b, p.c + (i0 + r0) * p.ldc + j, p.ldc, (int)(r1 - r0), cols, p.how.add || k0);
      }
      if (next_k >= p.k) finish(p, i0, i1, j, j + cols);
    }
  }
}

// The same in bf16 or int8. op(a) is laid out in words first. A few rows of it stay in the first cache while the panels pass, which stay in
// the second cache: so many columns at a time, packed here where they are not. Of a transposed op(a), whose k are many, a block is copied
// at a time, and C stays in the second cache.
void words_part(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Kernels& t = p.table;
  const bool a_transposed = p.how.a_transposed;
  const int64_t rows = i1 - i0, words = p.words(), strip = 48 / p.mr() * p.mr();
  Kernels::Tile* const tile = p.precision() == Precision::bf16 ? t.tile_bf16 : t.tile_int8;
  const int64_t distance = distance_of(p.a_room(a_transposed ? kWords : words)), readable = p.narrowed ? 0 : rows + p.mr();
  const int64_t columns = std::max<int64_t>(1, kPanelWords / std::max<int64_t>(1, words) / t.nr) * t.nr;
  const int64_t own_panels = p.panels ? 0 : std::min(columns, (j1 - j0 + t.nr - 1) / t.nr * t.nr) * words;
  float* const copy = scratch(readable * distance + 16 * rows + own_panels);
  float *const room = copy + readable * distance, *const packed = room + 16 * rows;
  const float *a = p.narrowed ? p.a + i0 * distance : copy, *scales = p.row_scales ? p.row_scales + i0 : room;
  if (!p.narrowed && !a_transposed) narrow_rows(p, i0, i1, copy, room);
  if (!p.k) return finish_empty(p, i0, i1, j0, j1);
  auto multiply = [&](int64_t r0, int64_t r1, int64_t k0, int64_t first, int64_t end, const float* panels) {
    const DefaultFloatMode mode(p.precision() == Precision::bf16);
    const float* const from = a + (a_transposed ? 0 : p.a_room(k0));
    for (int64_t j = first; j < end; j += t.nr)
      for (int64_t r = r0; r < r1; r += p.mr())
        tile(std::min(kWords, words - k0), from + r * distance, distance, 1, panels + (j - first) * words + k0 * t.nr,
             p.c + (i0 + r) * p.ldc + j, p.ldc, (int)std::min<int64_t>(p.mr(), r1 - r), (int)std::min<int64_t>(t.nr, end - j),
             p.how.add || k0);
  };
  t.tiles_on();
  for (int64_t k0 = 0; k0 < words && a_transposed; k0 += kWords) {
    copy_transposed(p, k0, std::min(kWords, words - k0), i0, i1, copy, distance, room);
    for (int64_t r = 0; r < rows; r += strip) multiply(r, std::min(rows, r + strip), k0, j0, j1, p.panels + j0 * words);
  }
  if (a_transposed) finish(p, i0, i1, j0, j1);
  for (int64_t j = j0; j < j1 && !a_transposed; j += columns) {
    const int64_t end = std::min(j1, j + columns);
    if (!p.panels) p.rounded().pack(0, words, j, end, packed);
    const float* const panels = p.panels ? p.panels + j * words : packed;
    for (int64_t r = 0; r < rows; r += strip) {
      const int64_t r1 = std::min(rows, r + strip);
      for (int64_t k0 = 0; k0 < words; k0 += kWords) multiply(r, r1, k0, j, end, panels);
      finish(p, i0 + r, i0 + r1, j, end, p.precision() == Precision::int8 ? scales + r : nullptr);
    }
  }
  t.tiles_off();
}

static constexpr int kColumnRows = 8;  // of which a column's sums are made at once

// The same where b is one packed panel, as of one query against all that is searched: a comes from memory and is read once. Each row of a
// tile walks through rows of its own, from end to end: so many streams, which the processor fetches ahead by itself.
void one_panel_part(const Product& p, int64_t i0, int64_t i1, int64_t, int64_t) {
  const bool alone = p.n == 1;  // the panel's other columns are zeros
  Tensor column({alone ? p.k : 0});
  for (int64_t k = 0; k < column.size(); k++) column.data()[k] = p.panels[k * p.table.nr];
  const int64_t rows = i1 - i0, at_once = alone ? kColumnRows : p.table.mr, strips = (rows + at_once - 1) / at_once;
  for (int64_t s = 0; s < strips; s++)
    for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
      const int64_t depth = std::min(kDepth, p.k - k0), a_row = strips * p.lda, c_row = strips * p.ldc;
      const float* const a = p.a + (i0 + s) * p.lda + k0;
      float* const c = p.c + (i0 + s) * p.ldc;
      const int here = (int)((rows - s + strips - 1) / strips);
      if (alone)
        p.table.column(depth, a, a_row, column.data() + k0, c, c_row, here, p.how.add || k0);
      else
        p.table.tile(depth, a, a_row, 1, p.panels + k0 * p.table.nr, c, c_row, here, (int)p.n, p.how.add || k0);
    }
  finish(p, i0, i1, 0, p.n);
}
}  // namespace

#ifndef BERT_NO_BLAS
namespace {
// The program's own thread setting of OpenBLAS, put aside while we call it: the first of our products sets 1, the last one restores.
class OneBlasThread {
 public:
  OneBlasThread() {
    std::lock_guard<std::mutex> hold(lock);
    if (users++ == 0) before = openblas_get_num_threads(), openblas_set_num_threads(1);
  }
  ~OneBlasThread() {
    std::lock_guard<std::mutex> hold(lock);
    if (--users == 0) openblas_set_num_threads(before);
  }

 private:
  static inline std::mutex lock;
  static inline int users = 0, before = 1;
};

void blas_part(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Gemm& how = p.how;
  cblas_sgemm(CblasRowMajor, how.a_transposed ? CblasTrans : CblasNoTrans, how.b_transposed ? CblasTrans : CblasNoTrans, (int)(i1 - i0),
              (int)(j1 - j0), (int)p.k, 1, p.a + (how.a_transposed ? i0 : i0 * p.lda), (int)p.lda,
              p.b + (how.b_transposed ? j0 * p.ldb : j0), (int)p.ldb, how.add ? 1 : 0, p.c + i0 * p.ldc + j0, (int)p.ldc);
  finish(p, i0, i1, j0, j1);
}
}  // namespace

bool has_openblas() { return true; }
static std::string openblas_name() { return openblas_get_config(); }
#else
namespace {
struct OneBlasThread {};
void blas_part(const Product&, int64_t, int64_t, int64_t, int64_t) {}
}  // namespace

bool has_openblas() { return false; }
static std::string openblas_name() { return "built without OpenBLAS"; }
#endif

// Without fused multiply-add the own kernels would compute each one in software: OpenBLAS does everything there, unless a table was
// asked for by name.
static bool blas_alone() {
  static const bool alone = has_openblas() && usable_kernels().size() == 1 && !setting("BERT_KERNELS");
  return alone;
}

// The table of shapes that OpenBLAS would be taken for is empty: measured at the products of tiny, mini, MiniLM and base (4096 tokens,
// forward and both backward, and the decoder over 30522 words) on an Emerald Rapids core, the own kernels take 0.2 to 0.3 of the time
// of OpenBLAS 0.3.21 as it is installed, which does not know this CPU, and 0.8 to 1.3 with OPENBLAS_CORETYPE=SkylakeX.
static Backend automatic_backend() {
  static const Backend chosen = [] {
    const char* const want = setting("BERT_GEMM");
    if (!want) return blas_alone() ? Backend::openblas : Backend::own;
    if (!std::strcmp(want, "own")) return Backend::own;
    if (std::strcmp(want, "openblas")) throw Error("BERT_GEMM=" + std::string(want) + ": it may be own or openblas");
    if (!has_openblas()) throw Error("BERT_GEMM=openblas: this program was built without OpenBLAS");
    return Backend::openblas;
  }();
  return chosen;
}

std::string backend_description() {
  const std::optional<DeviceInfo> device = device_in_use();
  return (device ? "OpenCL on " + device->name + ", driver " + device->driver + "; " : "") + std::string(kernels().name) + " kernels; " +
         openblas_name() +
         (automatic_backend() == Backend::openblas ? " for products"
          : has_openblas()                         ? " on request"
                                                   : "");
}

static void check_product(const Gemm& how, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc) {
  auto fail = [&](const std::string& what) {
    throw Error("gemm: m " + std::to_string(m) + ", n " + std::to_string(n) + ", k " + std::to_string(k) + ": " + what);
  };
  if (m < 0 || n < 0 || k < 0) fail("a negative size");
  if (lda < (how.a_transposed ? m : k) || ldb < (how.b_transposed ? k : n) || ldc < n)
    fail("rows overlap: lda " + std::to_string(lda) + ", ldb " + std::to_string(ldb) + ", ldc " + std::to_string(ldc));
}

// The rows and columns of C that make a task.
static std::pair<int64_t, int64_t> cut(const Product& p, bool blas, bool one_panel) {
  const bool narrow = p.precision() != Precision::f32, transposed = p.how.a_transposed, few = p.m <= kPackedRows;
  // A task's rows of op(a) and its part of C stay in a cache of 1 MiB. Where a panel must be packed for each task it wants more rows to
  // be worth it, where op(a) must be copied more columns, and where there are few rows, more tasks are made of the columns.
  const bool large = p.m * p.n >= 1 << 20, packed = p.panels && !transposed;
  const bool pack_here = !p.panels && !transposed && !blas && p.m <= 640;  // all rows in one task: no panel is packed twice
  const int64_t most_rows = blas               ? 512
                            : pack_here        ? p.m
                            : one_panel        ? 480
                            : narrow && packed ? std::clamp<int64_t>((1 << 17) / std::max<int64_t>(1, p.a_room(p.words())), 128, 512)
                            : narrow           ? 256
                            : packed           ? kPackedRows
                            : large            ? 640
                                               : 240;
  const int64_t rows_unit = one_panel && p.n == 1 ? kColumnRows : p.mr();
  const int64_t most_cols = blas               ? 768
                            : pack_here        ? std::clamp<int64_t>(p.n / threads(), 1, narrow ? 384 : 192)
                            : p.m < 64         ? 64
                            : packed && few    ? 96
                            : narrow && packed ? p.n
                            : narrow || packed ? 768
                            : transposed       ? 384
                                               : 192;
  // Few tasks are made as many as the threads can share evenly.
  const int64_t across = (p.n + most_cols - 1) / most_cols, unit = threads() / std::gcd<int64_t>(threads(), across);
  int64_t down = (p.m + most_rows - 1) / most_rows;
  if (unit > 1 && !pack_here && down * across < 4 * threads())
    down = std::max(1l, std::lround((double)p.m / (double)(most_rows * unit))) * unit;
  return {even_piece(p.m, (p.m + down - 1) / down, rows_unit), even_piece(p.n, most_cols, p.table.nr)};
}

// Cuts C into tasks and hands them out: an element's bytes do not depend on the cut.
static void run(const Product& p, Backend backend) {
  if (!p.m || !p.n) return;
  // Waking threads costs a few microseconds: products that take less stay here. (m + 8: weights must be read even for few rows.)
  UseThreads use((p.m + 8) * p.n * p.k < 1 << 21 ? 1 : threads_wanted);
  const bool narrow = p.precision() != Precision::f32, blas = p.k && !narrow && (backend == Backend::openblas || blas_alone());
  const bool one_panel = !blas && !narrow && p.panels && p.k && p.n <= p.table.nr;
  const auto [rows, cols] = cut(p, blas, one_panel);
  const int64_t across = (p.n + cols - 1) / cols, tasks = (p.m + rows - 1) / rows * across;
  auto part = [&, rows = rows, cols = cols](int64_t i) {
    const int64_t i0 = i / across * rows, j0 = i % across * cols;
    (blas        ? blas_part
     : one_panel ? one_panel_part
     : narrow    ? words_part
                 : own_part)(p, i0, std::min(p.m, i0 + rows), j0, std::min(p.n, j0 + cols));
  };
  [[maybe_unused]] std::optional<OneBlasThread> one;
  if (blas) {
    if (std::max({p.k, p.lda, p.ldb, p.ldc}) > INT32_MAX) throw Error("gemm: OpenBLAS counts with 32 bits, and a side is larger");
    one.emplace();
  }
  parallel_for(tasks, part);
}

void gemm(const Gemm& how, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc) {
  check_product(how, m, n, k, lda, ldb, ldc);
  if (how.backend == Backend::openblas && !has_openblas()) throw Error("gemm: built without OpenBLAS, which was asked for");
  const Backend backend = how.backend == Backend::automatic ? automatic_backend() : how.backend;
  Product p{kernels(), how, m, n, k, a, lda, b, ldb, nullptr, c, ldc};
  Tensor panels;
  if (backend == Backend::own && !how.a_transposed && m >= kPackFirst) {
    const int64_t nr = p.table.nr;
    panels = Tensor({(n + nr - 1) / nr, k * nr});
    parallel_for(panels.rows(), [&](int64_t j) {
      p.table.pack(k, how.b_transposed ? b + j * nr * ldb : b + j * nr, how.b_transposed ? 1 : ldb, how.b_transposed ? ldb : 1,
                   panels.data() + j * k * nr, (int)std::min(nr, n - j * nr));
    });
    p.panels = panels.data();
  }
  run(p, backend);
}

void gemm_here(const Gemm& how, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
               int64_t ldc) {
  check_product(how, m, n, k, lda, ldb, ldc);
  const Product p{kernels(), how, m, n, k, a, lda, b, ldb, nullptr, c, ldc};
  if (blas_alone()) {
    UseThreads here(1);
    return run(p, how.backend);
  }
  DefaultFloatMode mode;
  const int64_t rows = 240 / p.table.mr * p.table.mr;
  for (int64_t i = 0; i < m; i += rows) own_part(p, i, std::min(m, i + rows), 0, n);
}

// Panel j holds columns j nr .. of the transposed weights, all of k. For OpenBLAS they are copied as they are.
PackedWeights::PackedWeights(const float* w, int64_t n, int64_t k, Precision precision) : n_(n), k_(k), precision_(precision) {
  const Kernels& t = kernels();
  if (precision == Precision::bf16) {
    round_panels(w, false);
  } else if (precision == Precision::int8) {
    pack_rows([&](int64_t i, char* to) { scales_.data()[i] = t.to_int8(w + i * k, 0, to, k); });
  } else {
    const int64_t nr = t.nr, panels = (n + nr - 1) / nr;
    panels_ = Tensor({panels * nr, k});
    float* const to = panels_.data();
    if (blas_alone())
      std::copy_n(w, n * k, to);
    else
      parallel_for(panels, [&](int64_t j) { t.pack(k, w + j * nr * k, 1, k, to + j * nr * k, (int)std::min(nr, n - j * nr)); });
  }
}
PackedWeights::PackedWeights(const Tensor& w, bool transposed)
    : n_(transposed ? w.cols() : w.rows()), k_(transposed ? w.rows() : w.cols()), precision_(Precision::bf16) {
  round_panels(w.data(), transposed);
}
void PackedWeights::round_panels(const float* w, bool transposed) {
  const RoundedPanels from{kernels(), k_, n_, w, transposed ? n_ : 1, transposed ? 1 : k_};
  const int64_t nr = from.t.nr, panels = (n_ + nr - 1) / nr;
  panels_ = Tensor({panels * nr, from.words});
  float* const to = panels_.data();
  if (transposed)
    parallel_ranges(from.words, kDepth, [&](int64_t first, int64_t end) { from.pack(first, end, 0, n_, to); });
  else
    parallel_for(panels, [&](int64_t j) { from.pack(0, from.words, j * nr, std::min(n_, (j + 1) * nr), to + j * nr * from.words); });
}
PackedWeights::PackedWeights(const NarrowMatrix& w, bool transposed)
    : n_(transposed ? w.k : w.n), k_(transposed ? w.n : w.k), precision_(w.precision) {
  if (transposed)
    pack_columns(w);
  else
    pack_rows([&](int64_t i, char* to) {
      std::memcpy(to, w.row(i), (size_t)w.row_bytes());
      if (w.precision == Precision::int8) scales_.data()[i] = w.scales[(size_t)i];
    });
}
// narrow(i, to) writes row i's k numbers.
template <class Narrow>
void PackedWeights::pack_rows(Narrow&& narrow) {
  const Kernels& t = kernels();
  const int64_t nr = t.nr, panels = (n_ + nr - 1) / nr, words = words_of(precision_, k_);
  panels_ = Tensor({panels * nr, words});
  if (precision_ == Precision::int8) scales_ = Tensor({n_}), zeros_.resize((size_t)n_);
  parallel_for(panels, [&](int64_t j) {
    const int cols = (int)std::min(nr, n_ - j * nr);
    const Tensor rows({cols, words}, 0.f);
    for (int64_t i = 0; i < cols; i++) {
      char* const row = (char*)(rows.data() + i * words);
      narrow(j * nr + i, row);
      for (int64_t x = 0; x < k_ && !zeros_.empty(); x++) zeros_[(size_t)(j * nr + i)] += t.int8_zero * (int8_t)row[x];
      if (precision_ == Precision::bf16 && t.halves == Halves::pairs) pair_up((float*)row, words);
    }
    t.pack(words, rows.data(), 1, words, panels_.data() + j * nr * words, cols);
  });
}
// A panel's word holds two rows of w, side by side. Rows lie pages apart, which no processor fetches ahead by itself.
void PackedWeights::pack_columns(const NarrowMatrix& w) {
  constexpr int64_t kAhead = 32;  // rows
  if (precision_ != Precision::bf16) throw Error("pack: only bf16 is packed transposed");
  const Kernels& t = kernels();
  const int64_t nr = t.nr, words = words_of(precision_, k_);
  panels_ = Tensor({(n_ + nr - 1) / nr * nr, words});
  parallel_ranges(words, kDepth, [&](int64_t first, int64_t end) {
    for (int64_t j = 0; j < n_; j += nr) {
      float* to = panels_.data() + j * words + first * nr;
      const int64_t cols = std::min(nr, n_ - j);
      for (int64_t i = first; i < end; i++, to += nr) {
        for (const int64_t k : {2 * i + kAhead, 2 * i + kAhead + 1})
          if (k < w.n) __builtin_prefetch(w.row(k) + 2 * j, 0, 2);
        copy_word(t, w, i, j, cols, to);
        std::fill(to + cols, to + nr, 0.f);
      }
    }
  });
}
// Rows of op(a) that go to several tasks of columns each are narrowed once for all.
static Tensor narrow_first(Product& p) {
  const int64_t distance = distance_of(p.a_room(p.words())), rows = p.m + p.mr();
  Tensor words({rows, distance + 1});
  float* const scales = words.data() + rows * distance;
  parallel_ranges(p.m, std::max<int64_t>(16, (1 << 15) / (p.k + 1)),
                  [&](int64_t i, int64_t end) { narrow_rows(p, i, end, words.data() + i * distance, scales + i); });
  p.a = words.data(), p.lda = distance, p.narrowed = true;
  if (p.precision() == Precision::int8) p.row_scales = scales;
  return words;
}
static void check_narrow(const Gemm& how, int64_t m, int64_t n, int64_t k, const NarrowMatrix& a, int64_t ldb, int64_t ldc) {
  if (a.precision != Precision::bf16 || (how.a_transposed ? a.k : a.n) != m || (how.a_transposed ? a.n : a.k) != k)
    throw Error("gemm: a [" + std::to_string(a.n) + "," + std::to_string(a.k) + "] and b, [" + std::to_string(n) + "," + std::to_string(k) +
                "], do not multiply to " + std::to_string(m) + " rows, or a is not bf16");
  check_product(how, m, n, k, a.k, ldb, ldc);
}
void gemm(const Gemm& how, int64_t m, const NarrowMatrix& a, const PackedWeights& b, float* c, int64_t ldc) {
  const int64_t n = b.rows(), k = b.cols();
  if (b.precision() != Precision::bf16 || !how.b_transposed) throw Error("gemm: packed weights are bf16 and b_transposed here");
  check_narrow(how, m, n, k, a, k, ldc);
  Product p{kernels(), how, m, n, k, nullptr, a.k, nullptr, k, b.panels(), c, ldc, &b};
  p.bf16 = &a;
  run(p, Backend::own);
}
void gemm(const Gemm& how, int64_t m, const NarrowMatrix& a, const Tensor& b, float* c, int64_t ldc) {
  const int64_t n = how.b_transposed ? b.rows() : b.cols(), k = how.b_transposed ? b.cols() : b.rows();
  check_narrow(how, m, n, k, a, b.cols(), ldc);
  if (m >= kPackFirstNarrow || how.a_transposed) {
    Gemm packed = how;
    packed.b_transposed = true;
    return gemm(packed, m, a, PackedWeights(b, !how.b_transposed), c, ldc);
  }
  Product p{kernels(), how, m, n, k, nullptr, a.k, b.data(), b.cols(), nullptr, c, ldc};
  p.bf16 = &a;
  const Tensor words = narrow_first(p);
  run(p, Backend::own);
}
void gemm(int64_t m, const float* a, int64_t lda, const PackedWeights& w, float* c, int64_t ldc, const Epilogue& epilogue) {
  const Gemm how{.b_transposed = true, .epilogue = epilogue};
  const int64_t n = w.rows(), k = w.cols();
  check_product(how, m, n, k, lda, k, ldc);
  const bool plain = w.precision() == Precision::f32 && blas_alone();
  Product p{kernels(), how, m, n, k, a, lda, plain ? w.panels() : nullptr, k, plain ? nullptr : w.panels(), c, ldc, &w};
  Tensor words;
  if (p.precision() != Precision::f32 && m <= kPackedRows) words = narrow_first(p);
  run(p, Backend::own);
}

static bool multiply_on_device(const Gemm&, int64_t m, int64_t n, int64_t k, const Tensor& a, const Tensor& b, const Tensor& c,
                               const Tensor& bias, const Tensor& pre);
void gemm(const Gemm& how, const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, const Tensor& pre) {
  const int64_t m = how.a_transposed ? a.cols() : a.rows(), k = how.a_transposed ? a.rows() : a.cols();
  const int64_t n = how.b_transposed ? b.rows() : b.cols(), b_k = how.b_transposed ? b.cols() : b.rows();
  if (b_k != k || (b.packed() && (how.add || how.a_transposed)) || c.rows() != m || c.cols() != n || (bias && bias.size() != n) ||
      (pre && pre.size() != c.size()))
    throw Error("gemm: c " + to_string(c.shape()) + " is no product of " + to_string(a.shape()) + " and " + to_string(b.shape()));
  if (multiply_on_device(how, m, n, k, a, b, c, bias, pre)) return;
  Gemm here = how;
  here.epilogue.bias = bias ? bias.data() : nullptr, here.epilogue.pre = pre ? pre.data() : nullptr;
  if (b.packed())
    gemm(m, a.data(), a.cols(), *b.packed(), c.data(), n, here.epilogue);
  else
    gemm(here, m, n, k, a.data(), a.cols(), b.data(), b.cols(), c.data(), n);
}

// ==== OpenCL ======================================================================================================
// Products on any OpenCL 1.2 device. A product is one trip: the sides that are not there yet are sent, the kernels run, and the result
// stays there until Tensor::data() asks for it. One lock is held meanwhile. The kernels sum as gemm promises of the own ones: no choice
// that a search makes shows in the bytes, and where a device computes float and fma as IEEE 754 says (most do), they are the CPU's bytes.
namespace {
using Handle = void*;  // any object of OpenCL

// What is used of the interface, as its specification (Khronos, version 1.2) has it: result, name, arguments.
#define BERT_OPENCL(CALL)                                                                                                        \
  CALL(int32_t, clGetPlatformIDs, (uint32_t, Handle*, uint32_t*))                                                                \
  CALL(int32_t, clGetPlatformInfo, (Handle, uint32_t, size_t, void*, size_t*))                                                   \
  CALL(int32_t, clGetDeviceIDs, (Handle, uint64_t, uint32_t, Handle*, uint32_t*))                                                \
  CALL(int32_t, clGetDeviceInfo, (Handle, uint32_t, size_t, void*, size_t*))                                                     \
  CALL(Handle, clCreateContext, (const intptr_t*, uint32_t, const Handle*, void*, void*, int32_t*))                              \
  CALL(Handle, clCreateCommandQueue, (Handle, Handle, uint64_t, int32_t*))                                                       \
  CALL(Handle, clCreateBuffer, (Handle, uint64_t, size_t, void*, int32_t*))                                                      \
  CALL(int32_t, clReleaseMemObject, (Handle))                                                                                    \
  CALL(Handle, clCreateProgramWithSource, (Handle, uint32_t, const char* const*, const size_t*, int32_t*))                       \
  CALL(int32_t, clBuildProgram, (Handle, uint32_t, const Handle*, const char*, void*, void*))                                    \
  CALL(int32_t, clGetProgramBuildInfo, (Handle, Handle, uint32_t, size_t, void*, size_t*))                                       \
  CALL(Handle, clCreateKernel, (Handle, const char*, int32_t*))                                                                  \
  CALL(int32_t, clSetKernelArg, (Handle, uint32_t, size_t, const void*))                                                         \
  CALL(int32_t, clEnqueueNDRangeKernel,                                                                                          \
       (Handle, Handle, uint32_t, const size_t*, const size_t*, const size_t*, uint32_t, const Handle*, Handle*))                \
  CALL(int32_t, clEnqueueReadBuffer, (Handle, Handle, uint32_t, size_t, size_t, void*, uint32_t, const Handle*, Handle*))        \
  CALL(int32_t, clEnqueueWriteBuffer, (Handle, Handle, uint32_t, size_t, size_t, const void*, uint32_t, const Handle*, Handle*)) \
  CALL(int32_t, clFinish, (Handle))
struct OpenCL {
#define CALL(result, name, arguments) result(*name) arguments;
  BERT_OPENCL(CALL)
#undef CALL
};
const OpenCL& opencl() {
  static const OpenCL calls = [] {
    OpenCL cl;
    void* const library = dlopen("libOpenCL.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
      throw Error("opencl: " + std::string(dlerror()) +
                  "; install OpenCL (Debian: ocl-icd-libopencl1 and the device's driver), or --device cpu");
#define CALL(result, name, arguments)                          \
  if (!(cl.name = (result(*) arguments)dlsym(library, #name))) \
    throw Error("opencl: libOpenCL.so.1 has no " #name ": it is damaged or older than OpenCL 1.2; install another, or --device cpu");
    BERT_OPENCL(CALL)
#undef CALL
    return cl;
  }();
  return calls;
}

// Throws what `code`, a call's result, means.
void opencl_check(const std::string& device, const char* call, int32_t code) {
  if (!code) return;
  const char* const why = code == -4 || code == -5 || code == -6 || code == -61
                              ? "out of device memory, or the device is lost; smaller batches"
                          : code == -9 || code == -14 || code == -36 ? "the device is lost; start again"
                          : code == -1001 ? "no driver is installed; a GPU's maker has one, for CPUs Debian has pocl-opencl-icd"
                                          : "the driver is broken; install another";
  throw Error("opencl" + (device.empty() ? "" : " " + device) + ": " + call + " says " + std::to_string(code) + ": " + why +
              ", or --device cpu");
}

std::string opencl_text(auto&& info) {  // info(size, to, &size needed)
  size_t size = 0;
  if (info(0, nullptr, &size) || size > 1 << 20) return "";
  std::string text(size, '\0');
  if (size && info(size, text.data(), nullptr)) return "";
  return text.substr(0, text.find('\0'));
}
struct Found {
  Handle platform, device;
  uint64_t type;
  DeviceInfo info;
};
template <class T>
T opencl_number(Handle device, uint32_t what) {
  T value{};
  opencl_check("", "clGetDeviceInfo", opencl().clGetDeviceInfo(device, what, sizeof value, &value, nullptr));
  return value;
}
// GPUs first, else as the drivers list them.
std::vector<Found> find_devices() {
  const OpenCL& cl = opencl();
  Handle platforms[64] = {}, devices[64] = {};
  uint32_t count = 0, in_it = 0;
  opencl_check("", "clGetPlatformIDs", cl.clGetPlatformIDs(64, platforms, &count));
  std::vector<Found> found;
  for (Handle platform : std::span(platforms, std::min(count, 64u))) {
    auto text = [&](uint32_t what) { return opencl_text([&](auto... to) { return cl.clGetPlatformInfo(platform, what, to...); }); };
    const int32_t code = cl.clGetDeviceIDs(platform, 0xFFFFFFFF, 64, devices, &in_it);
    if (code == -1) continue;  // no device of this driver's here
    opencl_check(text(0x0902), "clGetDeviceIDs", code);
    for (Handle device : std::span(devices, std::min(in_it, 64u))) {
      auto of = [&](uint32_t what) { return opencl_text([&](auto... to) { return cl.clGetDeviceInfo(device, what, to...); }); };
      const auto type = opencl_number<uint64_t>(device, 0x1000);
      const auto memory = opencl_number<int64_t>(device, 0x101F);
      found.push_back({platform, device, type, {of(0x102B), text(0x0902), of(0x102D), memory, opencl_number<uint32_t>(device, 0x1002)}});
    }
  }
  if (found.empty()) throw Error("opencl: there is no device; --device cpu computes here");
  std::stable_sort(found.begin(), found.end(), [](const Found& a, const Found& b) { return (a.type & 4) > (b.type & 4); });
  return found;
}
// opencl, opencl:1, opencl:NAME
size_t find_device(const std::vector<Found>& all, const std::string& which) {
  const std::string name = which.size() > 7 ? which.substr(7) : "0";
  std::string list;
  std::vector<size_t> hits;
  for (size_t i = 0; i < all.size(); i++) {
    list += (i ? ", " : "") + std::to_string(i) + " (" + all[i].info.name + ")";
    if (strcasestr(all[i].info.name.c_str(), name.c_str())) hits.push_back(i);
  }
  if (const auto number = parse_number<size_t>(name)) hits.assign(*number < all.size(), *number);
  if (hits.size() == 1) return hits[0];
  throw Error(which + (hits.empty() ? ": there is no such device" : ": several devices are named so") + "; here are " + list);
}

// How a product is cut: work-groups of rows x cols work-items, each with wm rows of wn vectors of v numbers; `depth` k at a time are in
// the group's memory. Those of long vectors are for CPUs.
struct Cut {
  int v, wm, wn, cols, rows, depth;
  int64_t local_bytes() const { return 4 * depth * (rows * wm + v + cols * wn * v + v); }
};
constexpr Cut kCuts[] = {{4, 4, 1, 16, 16, 16}, {4, 8, 2, 16, 16, 8},  {4, 8, 2, 8, 8, 16},   {4, 4, 2, 8, 16, 16}, {4, 8, 1, 16, 8, 16},
                         {4, 4, 1, 8, 8, 16},   {16, 8, 2, 4, 16, 64}, {16, 8, 2, 1, 16, 64}, {8, 6, 2, 4, 16, 64}};
const char* const kDeviceText = R"(
#pragma OPENCL FP_CONTRACT OFF
#define TM (ROWS * WM)
#define TN (COLS * WN * V)
#if HALF
#define B_AT(i) vload_half(i, b)
#else
#define B_AT(i) b[i]
#endif
#if V > 4
#define UNROLL  // PoCL's registers spill
#else
#define UNROLL _Pragma("unroll")  // or a GPU's would not be registers
#endif
#define EACH UNROLL for (int i = 0; i < WM; i++) UNROLL for (int j = 0; j < WN; j++)
// c [m,n] = a b, or c += a b: element (i, q) of a is a[i * a_row + q * a_step], (q, j) of b is b[q * b_row + j * b_step]; one step is 1.
__kernel __attribute__((reqd_work_group_size(COLS, ROWS, 1)))
void product(int m, int n, int k, __global const float* a, int a_row, int a_step, __global const B_TYPE* b, int b_row, int b_step,
             __global float* c, int add) {
  __local float as[DEPTH * (TM + V)], bs[DEPTH * (TN + V)];
  const int x = get_local_id(0), y = get_local_id(1), me = y * COLS + x;
  const int i0 = get_group_id(1) * TM, j0 = get_group_id(0) * TN;
  VEC acc[WM][WN], sum[WM][WN];
  EACH {
    const int row = i0 + i * ROWS + y, col = j0 + (j * COLS + x) * V;
    float part[V];
    UNROLL for (int e = 0; e < V; e++) part[e] = add && row < m && col + e < n ? c[(size_t)row * n + col + e] : 0;
    sum[i][j] = LOAD(0, part), acc[i][j] = 0;
  }
  for (int k0 = 0; k0 < k; k0 += DEPTH) {
    for (int t = me; t < TM * DEPTH; t += ROWS * COLS) {  // neighbours read neighbours
      const int i = a_step == 1 ? t / DEPTH : t % TM, q = a_step == 1 ? t % DEPTH : t / TM;
      as[q * (TM + V) + i] = i0 + i < m && k0 + q < k ? a[(size_t)(i0 + i) * a_row + (size_t)(k0 + q) * a_step] : 0;
    }
    for (int t = me; t < TN * DEPTH; t += ROWS * COLS) {
      const int j = b_row == 1 ? t / DEPTH : t % TN, q = b_row == 1 ? t % DEPTH : t / TN;
      bs[q * (TN + V) + j] = j0 + j < n && k0 + q < k ? B_AT((size_t)(k0 + q) * b_row + (size_t)(j0 + j) * b_step) : 0;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int q = 0; q < DEPTH; q++) {
      VEC bv[WN];
      UNROLL for (int j = 0; j < WN; j++) bv[j] = LOAD(0, bs + q * (TN + V) + (j * COLS + x) * V);
      EACH acc[i][j] = fma((VEC)as[q * (TM + V) + i * ROWS + y], bv[j], acc[i][j]);
    }
    if ((k0 + DEPTH) % K_BLOCK == 0 || k0 + DEPTH >= k) EACH sum[i][j] += acc[i][j], acc[i][j] = 0;
    barrier(CLK_LOCAL_MEM_FENCE);
  }
  EACH {
    const int row = i0 + i * ROWS + y, col = j0 + (j * COLS + x) * V;
    float part[V];
    STORE(sum[i][j], 0, part);
    UNROLL for (int e = 0; e < V; e++) if (row < m && col + e < n) c[(size_t)row * n + col + e] = part[e];
  }
}
// normal_tail of tensor.cpp
float tail_(float t) {
  const float n = fma(t, kPhiSteps, kRounder), r = fma(n - kRounder, -kPhiStep, t);
  const uint i = as_uint(n) & 15;
  float y = as_float(kPhi[80 + i]);
  for (int d = 4; d >= 0; d--) y = fma(y, r, as_float(kPhi[16 * d + i]));
  return t < kPhiEnd ? y : t != t ? t : 0;
}
// z = c + bias; pre = z; c = act(z). What there is none of is c itself.
__kernel void finish(int n, __global float* c, __global const float* bias, int biased, __global float* pre, int kept, int act) {
  const size_t j = get_global_id(0), at = get_global_id(1) * n + j;
  if (j >= n) return;
  const float z = biased ? c[at] + bias[j] : c[at], t = fabs(z);
  if (kept) pre[at] = z;
  float y = z;
  if (act == 1) y = (z < 0 ? 0 : z) - (kPhiEnd < t ? kPhiEnd : t) * tail_(t);
  if (act == 4) y = z < 0 ? 0 : z;
  c[at] = y;
}
)";
static_assert((int)Activation::gelu == 1 && (int)Activation::relu == 4);

// The text with the scalar kernels' numbers in front, to the last bit.
std::string device_text() {
  auto bits = [](float x) { return std::to_string(std::bit_cast<uint32_t>(x)) + "u"; };
  std::string text = "#define K_BLOCK " + std::to_string(kDepth) + "\n__constant uint kPhi[] = {";
  for (const float x : std::span(kPhi[0], 96)) text += bits(x) + ",";
  text += "};\n";
#define NUMBER(x) std::string("#define " #x " as_float(") + bits(x) + ")\n"
  return text + NUMBER(kRounder) + NUMBER(kPhiStep) + NUMBER(kPhiSteps) + NUMBER(kPhiEnd) + kDeviceText;
#undef NUMBER
}
}  // namespace

static uint16_t to_half(float x);
class Device;
// Numbers on a device, in f32 or f16. The memory goes back to the device's idle one.
struct DeviceMatrix {
  Device& device;
  Handle memory;
  size_t bytes;
  bool half;
  ~DeviceMatrix();
};

class Device {
 public:
  using Matrix = std::shared_ptr<DeviceMatrix>;
  const Found found;
  const DeviceOptions options;
  Device(const Found& f, const DeviceOptions& o) : found(f), options(o) {
    int32_t code = 0;
    const intptr_t properties[] = {0x1084, (intptr_t)found.platform, 0};
    context_ = opencl().clCreateContext(properties, 1, &found.device, nullptr, nullptr, &code);
    check("clCreateContext", code);
    queue_ = opencl().clCreateCommandQueue(context_, found.device, 0, &code);
    check("clCreateCommandQueue", code);
    try {
      choose();
    } catch (...) {
      for (const auto& [size, block] : idle_) opencl().clReleaseMemObject(block);
      throw;
    }
  }

  static inline std::mutex lock;  // held by whoever computes on a device, sends or fetches
  static inline std::atomic<Device*> in_use = nullptr;
  // A product is a device's by its form alone, so that what is computed where does not depend on the day. Its
  // activations are GELU and ReLU. b that is packed must have been packed for this device.
  bool takes(const Gemm& how, int64_t m, int64_t n, int64_t k, const Tensor& b) const {
    return std::max({m, n, k}) < 1 << 30 && (double)m * (double)n * (double)k >= std::max(1., (double)options.least) &&
           how.epilogue.activation != Activation::tanh && how.epilogue.activation != Activation::gelu_tanh &&
           (!b.packed() || (b.impl().there && &b.impl().there->device == this));
  }
  void multiply(const Gemm& how, int64_t m, int64_t n, int64_t k, const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias,
                const Tensor& pre);
  static void bring_home(Tensor::Impl& tensor);
  Matrix keep(const Tensor& t, bool half);
  double speed();

 private:
  friend DeviceMatrix;
  struct Compiled {
    Cut cut;
    Handle product, finish;
  };
  void check(const char* call, int32_t code) const { opencl_check(found.info.name, call, code); }
  Matrix room(int64_t size, bool half);
  void launch(Handle kernel, std::array<size_t, 2> groups, std::array<size_t, 2> local, const auto&... arguments) const;
  void test();
  Compiled build(const Cut& cut) const;
  void choose();

  Handle context_, queue_;
  Compiled compiled_{};
  std::mutex idle_lock_;
  std::multimap<size_t, Handle> idle_;
  size_t held_ = 0;  // bytes, idle ones too
};
DeviceMatrix::~DeviceMatrix() {
  std::lock_guard<std::mutex> hold(device.idle_lock_);
  device.idle_.emplace(bytes, memory);
}

// Memory for so many numbers: an idle block up to a quarter larger, or a new one.
Device::Matrix Device::room(int64_t size, bool half) {
  const size_t bytes = ((size_t)size * (half ? 2 : 4) + 4095) / 4096 * 4096;
  std::lock_guard<std::mutex> hold(idle_lock_);
  if (const auto idle = idle_.lower_bound(bytes); idle != idle_.end() && idle->first <= bytes + bytes / 4) {
    const auto node = idle_.extract(idle);
    return Matrix(new DeviceMatrix{*this, node.mapped(), node.key(), half});
  }
  Handle memory = nullptr;
  for (int32_t attempt = 0, code = 0; attempt < 2; attempt++) {
    // Drivers promise more than there is, and fail later.
    if (attempt || held_ + bytes > (size_t)found.info.memory / 8 * 7) {
      for (const auto& [idle, block] : idle_) opencl().clReleaseMemObject(block), held_ -= idle;
      idle_.clear();
    }
    if (memory = opencl().clCreateBuffer(context_, 1, bytes, nullptr, &code); !code) break;
    if (attempt)
      throw Error("opencl " + found.info.name + ": out of device memory: " + std::to_string(bytes >> 10) + " KiB are needed, and " +
                  std::to_string(held_ >> 10) + " KiB are in use; smaller batches, or --device cpu");
  }
  held_ += bytes;
  return Matrix(new DeviceMatrix{*this, memory, bytes, half});
}
// The newest numbers are in the tensor's own memory, and no copy on a device stands for them.
void Device::bring_home(Tensor::Impl& i) {
  if (i.newest == Tensor::Impl::device)
    i.there->device.check("clEnqueueReadBuffer",
                          opencl().clEnqueueReadBuffer(i.there->device.queue_, i.there->memory, 1, 0,
                                                       (size_t)i.shape.size() * sizeof(float), i.data, 0, nullptr, nullptr));
  i.newest = Tensor::Impl::host, i.there = nullptr;
}
// The tensor's numbers here; sent where they are not.
Device::Matrix Device::keep(const Tensor& t, bool half) {
  Tensor::Impl& i = t.impl();
  if (i.there && (&i.there->device != this || i.there->half != half)) bring_home(i);
  if (i.there) return i.there;
  const Matrix to = room(t.size(), half);
  std::vector<uint16_t> halves(half ? (size_t)t.size() : 0);
  for (size_t e = 0; e < halves.size(); e++)
    if (((halves[e] = to_half(i.data[e])) & 0x7FFF) >= 0x7C00)
      throw Error("opencl: " + format_number(i.data[e]) + " among the weights is too large for f16; take f32");
  check("clEnqueueWriteBuffer", opencl().clEnqueueWriteBuffer(queue_, to->memory, 1, 0, (size_t)t.size() * (half ? 2 : 4),
                                                              half ? (const void*)halves.data() : i.data, 0, nullptr, nullptr));
  i.there = to, i.newest = Tensor::Impl::both;
  return to;
}
void Device::launch(Handle kernel, std::array<size_t, 2> groups, std::array<size_t, 2> local, const auto&... arguments) const {
  uint32_t index = 0;
  (check("clSetKernelArg", opencl().clSetKernelArg(kernel, index++, sizeof arguments, &arguments)), ...);
  const std::array<size_t, 2> global = {groups[0] * local[0], groups[1] * local[1]};
  check("clEnqueueNDRangeKernel",
        opencl().clEnqueueNDRangeKernel(queue_, kernel, 2, nullptr, global.data(), local.data(), 0, nullptr, nullptr));
}
void Device::multiply(const Gemm& how, int64_t m, int64_t n, int64_t k, const Tensor& a, const Tensor& b, const Tensor& c,
                      const Tensor& bias, const Tensor& pre) {
  std::lock_guard hold(lock);
  const Matrix left = keep(a, false), right = keep(b, options.half), out = how.add ? keep(c, false) : room(m * n, false);
  const Matrix z = pre ? room(m * n, false) : out, added = bias ? keep(bias, false) : out;
  const int32_t rows = (int32_t)m, cols = (int32_t)n, depth = (int32_t)k, lda = (int32_t)a.cols(), ldb = (int32_t)b.cols();
  const Cut& cut = compiled_.cut;
  const size_t high = (size_t)(cut.rows * cut.wm), wide = (size_t)(cut.cols * cut.wn * cut.v);
  launch(compiled_.product, {((size_t)n + wide - 1) / wide, ((size_t)m + high - 1) / high}, {(size_t)cut.cols, (size_t)cut.rows}, rows,
         cols, depth, left->memory, how.a_transposed ? 1 : lda, how.a_transposed ? lda : 1, right->memory, how.b_transposed ? 1 : ldb,
         how.b_transposed ? ldb : 1, out->memory, (int32_t)how.add);
  if (bias || pre || how.epilogue.activation != Activation::none)
    launch(compiled_.finish, {((size_t)n + 63) / 64, (size_t)m}, {64, 1}, cols, out->memory, added->memory, (int32_t)(bool)bias, z->memory,
           (int32_t)(bool)pre, (int32_t)how.epilogue.activation);
  check("clFinish", opencl().clFinish(queue_));  // so that what fails is named where it failed
  c.impl().there = out, c.impl().newest = Tensor::Impl::device;
  if (pre) pre.impl().there = z, pre.impl().newest = Tensor::Impl::device;
}

// Small products of each form against the CPU's: there are drivers that compute wrong.
void Device::test() {
  Random random({1, 0, 0, 0});
  auto numbers = [&](Shape shape) {
    const Tensor t(shape);
    for (int64_t i = 0; i < t.size(); i++) t.data()[i] = (float)(2 * random.uniform() - 1);
    return t;
  };
  const int64_t m = 75, n = 131, k = 300;
  for (const bool a_transposed : {false, true})
    for (const bool b_transposed : {false, true}) {
      Gemm how{.a_transposed = a_transposed, .b_transposed = b_transposed, .add = a_transposed, .backend = Backend::own, .epilogue = {}};
      how.epilogue.activation = b_transposed ? Activation::gelu : Activation::none;
      const Tensor a = numbers(a_transposed ? Shape{k, m} : Shape{m, k}), b = numbers(b_transposed ? Shape{n, k} : Shape{k, n});
      const Tensor bias = numbers({n}), c = numbers({m, n}), pre({m, n}, 0.f), want({m, n}, std::span(c.data(), (size_t)(m * n))),
                   want_pre({m, n});
      multiply(how, m, n, k, a, b, c, bias, pre);
      how.epilogue.bias = bias.data(), how.epilogue.pre = want_pre.data();
      gemm(how, m, n, k, a.data(), a.cols(), b.data(), b.cols(), want.data(), n);
      for (const auto& [got, right] : {std::pair(c.data(), want.data()), {pre.data(), want_pre.data()}})
        for (int64_t i = 0; i < m * n; i++)
          if (!(std::fabs(got[i] - right[i]) <= (options.half ? 0.05f : 1e-4f)))
            throw Error("opencl " + found.info.name + ": computes wrong: " + format_number(got[i]) + " in a small product, where " +
                        format_number(right[i]) + " is right; take another driver, or --device cpu");
    }
}
// The speed in GFLOP/s where the sides are there already: of a product that is larger where the device is fast.
double Device::speed() {
  std::chrono::duration<double> took{0};
  for (const int64_t m : {128, 128, 2048, 2048}) {
    if (m > 128 && took.count() > 1e-3) return 2e-9 * 128 * 1024 * 1024 / took.count();
    const Tensor a({m, 1024}, 0.5f), b({1024, 1024}, 0.25f), c({m, 1024});
    {
      std::lock_guard<std::mutex> hold(lock);
      keep(a, false), keep(b, options.half);
    }
    const auto begin = std::chrono::steady_clock::now();
    multiply({.b_transposed = true}, m, 1024, 1024, a, b, c, {}, {});
    took = std::chrono::steady_clock::now() - begin;
  }
  return 2e-9 * 2048 * 1024 * 1024 / took.count();
}
Device::Compiled Device::build(const Cut& cut) const {
  const OpenCL& cl = opencl();
  const std::string text = device_text();
  const char* const source = text.c_str();
  int32_t code = 0;
  const Handle program = cl.clCreateProgramWithSource(context_, 1, &source, nullptr, &code);
  check("clCreateProgramWithSource", code);
  const std::string v = std::to_string(cut.v);
  std::string flags = "-cl-std=CL1.2 -D VEC=float" + v + " -D LOAD=vload" + v + " -D STORE=vstore" + v + " -D V=" + v;
  if (opencl_number<uint64_t>(found.device, 0x101B) & 1 << 7) flags += " -cl-fp32-correctly-rounded-divide-sqrt";
  flags += options.half ? " -D HALF=1 -D B_TYPE=half" : " -D HALF=0 -D B_TYPE=float";
  for (const auto& [name, value] : {std::pair("WM", cut.wm), {"WN", cut.wn}, {"COLS", cut.cols}, {"ROWS", cut.rows}, {"DEPTH", cut.depth}})
    flags += std::string(" -D ") + name + "=" + std::to_string(value);
  if (const int32_t failed = cl.clBuildProgram(program, 1, &found.device, flags.c_str(), nullptr, nullptr)) {
    std::string log =
        opencl_text([&](auto... to) { return cl.clGetProgramBuildInfo(program, found.device, 0x1183, to...); }).substr(0, 300);
    for (char& c : log) c = (unsigned char)c < ' ' ? ' ' : c;
    throw Error("opencl " + found.info.name + ": the kernels do not build (" + std::to_string(failed) + "): " + log +
                "; take another driver, or --device cpu");
  }
  Compiled made{cut, nullptr, nullptr};
  for (const auto& [name, kernel] : {std::pair("product", &made.product), {"finish", &made.finish}})
    *kernel = cl.clCreateKernel(program, name, &code), check("clCreateKernel", code);
  return made;
}

// The cut that the cache names for this device, driver and text; else the fastest, which is noted there.
void Device::choose() {
  const std::string device = found.info.name + "\t" + found.info.platform + "\t" + found.info.driver + "\n";
  const std::string path = options.cache + "/opencl-" + std::to_string(std::hash<std::string>()(device + device_text()));
  size_t number = 0;
  try {
    if (!options.cache.empty() && std::ifstream(path) >> number && number < std::size(kCuts)) {
      compiled_ = build(kCuts[number]);
      return test();
    }
  } catch (const Error&) {}  // all are tried
  double best = 0;
  std::string trouble = "opencl " + found.info.name + ": its work-groups are too small; --device cpu computes here";
  std::optional<Compiled> fastest;
  for (size_t i = std::size(kCuts); i-- > 0;) {
    const Cut& cut = kCuts[i];
    if ((cut.v > 4) != ((found.type & 2) > 0) || (uint64_t)(cut.rows * cut.cols) > opencl_number<size_t>(found.device, 0x1004) ||
        cut.local_bytes() > opencl_number<int64_t>(found.device, 0x1023))
      continue;
    try {
      compiled_ = build(cut);
      test();
      if (const double now = speed(); now > best) best = now, fastest = compiled_, number = i;
    } catch (const Error& e) { trouble = e.what(); }
  }
  if (!fastest) throw Error(trouble);
  compiled_ = *fastest;
  if (options.cache.empty()) return;
  try {
    std::filesystem::create_directories(options.cache);
    write_file(path, std::to_string(number) + "\t" + device);
  } catch (const std::exception&) {}  // the next start searches again
}

static bool multiply_on_device(const Gemm& how, int64_t m, int64_t n, int64_t k, const Tensor& a, const Tensor& b, const Tensor& c,
                               const Tensor& bias, const Tensor& pre) {
  Device* const d = Device::in_use.load();
  if (!d || !d->takes(how, m, n, k, b)) return false;
  d->multiply(how, m, n, k, a, b, c, bias, pre);
  return true;
}
void Tensor::bring_home() const {
  std::lock_guard<std::mutex> hold(Device::lock);
  Device::bring_home(*impl_);
}
void Tensor::keep_on_device() const {
  std::lock_guard<std::mutex> hold(Device::lock);
  if (Device* const d = Device::in_use.load()) d->keep(*this, d->options.half);
}

std::vector<DeviceInfo> opencl_devices() {
  std::vector<DeviceInfo> all;
  for (const Found& f : find_devices()) all.push_back(f.info);
  return all;
}
void use_device(const std::string& which, const DeviceOptions& options) {
  static std::mutex opening;
  static auto& open = *new std::vector<Device*>;  // never destroyed: tensors of a program may outlive any other order
  std::lock_guard<std::mutex> hold(opening);
  if (which == "cpu") return Device::in_use.store(nullptr);
  if (which != "opencl" && !which.starts_with("opencl:"))
    throw Error("device " + which + ": it may be cpu, opencl, opencl:NUMBER or opencl:NAME");
  const std::vector<Found> all = find_devices();
  const Found& found = all[find_device(all, which)];
  auto it = std::find_if(open.begin(), open.end(), [&](const Device* d) {
    return d->found.device == found.device && d->options.half == options.half && d->options.least == options.least;
  });
  if (it == open.end()) it = open.insert(it, new Device(found, options));
  Device::in_use.store(*it);
}
std::optional<DeviceInfo> device_in_use() {
  const Device* const d = Device::in_use.load();
  return d ? std::optional(d->found.info) : std::nullopt;
}
double device_peak() {
  Device* const d = Device::in_use.load();
  return d ? d->speed() : 0;
}

// ==== nearest rows ================================================================================================
static bool better(const Match& x, const Match& y) {
  return x.score != y.score ? x.score > y.score : std::tie(x.a, x.b) < std::tie(y.a, y.b);
}

namespace {
// The best of what it is offered, at most `top`: a heap whose root is the worst that is kept. All orders of offers end the same.
class Best {
 public:
  explicit Best(int64_t top, float floor = -std::numeric_limits<float>::infinity()) : top_((size_t)top), floor_(floor) {}
  float floor() const { return floor_; }  // less than this is not wanted
  void offer(const Match& m) {
    if (kept_.size() == top_) {
      if (!better(m, kept_.front())) return;
      std::pop_heap(kept_.begin(), kept_.end(), better), kept_.pop_back();
    }
    kept_.push_back(m), std::push_heap(kept_.begin(), kept_.end(), better);
    if (kept_.size() == top_) floor_ = std::max(floor_, kept_.front().score);
  }
  std::vector<Match> sorted() && {
    std::sort_heap(kept_.begin(), kept_.end(), better);
    return std::move(kept_);
  }

 private:
  size_t top_;
  float floor_;
  std::vector<Match> kept_;
};
}  // namespace

static constexpr int64_t kQueries = 256;  // scored at once

// Offers each query q all products with the rows of vectors; with `later` only with the rows after the query's own number, first + q.
static void score_rows(const float* queries, std::span<Best> best, int64_t first, const Tensor& vectors, bool later) {
  const int64_t Q = (int64_t)best.size(), D = vectors.cols(), n = vectors.rows();
  const PackedWeights packed(queries, Q, D);
  const int64_t block = std::clamp<int64_t>((1 << 20) / Q, 1024, 65536);  // their products stay in the cache
  const Tensor products({std::min(block, n) * Q});
  float* const scores = products.data();
  for (int64_t row0 = later ? first + 1 : 0; row0 < n; row0 += block) {
    const int64_t rows = std::min(block, n - row0);
    gemm(rows, vectors.data() + row0 * D, D, packed, scores, Q, {});
    parallel_ranges(Q, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t q = begin; q < end; q++)
          if (const float score = scores[r * Q + q]; score >= best[(size_t)q].floor() && (!later || row0 + r > first + q))
            best[(size_t)q].offer({score, first + q, row0 + r});
    });
  }
}

std::vector<std::vector<Match>> nearest_rows(const Tensor& queries, const Tensor& vectors, int64_t top) {
  if (queries.cols() != vectors.cols() || top < 1)
    throw Error("search: queries " + to_string(queries.shape()) + ", vectors " + to_string(vectors.shape()) + ", the best " +
                std::to_string(top));
  std::vector<std::vector<Match>> out;
  for (int64_t q = 0; q < queries.rows(); q += kQueries) {
    std::vector<Best> best((size_t)std::min(kQueries, queries.rows() - q), Best(top));
    score_rows(queries.data() + q * queries.cols(), best, q, vectors, false);
    for (Best& b : best) out.push_back(std::move(b).sorted());
  }
  return out;
}

std::vector<Match> nearest_pairs(const Tensor& vectors, int64_t top) {
  if (top < 1) throw Error("search: the best " + std::to_string(top) + " pairs");
  Best all(top);
  for (int64_t a = 0; a < vectors.rows(); a += kQueries) {
    std::vector<Best> best((size_t)std::min(kQueries, vectors.rows() - a), Best(top, all.floor()));
    score_rows(vectors.data() + a * vectors.cols(), best, a, vectors, true);
    for (Best& b : best)
      for (const Match& m : std::move(b).sorted()) all.offer(m);
  }
  return std::move(all).sorted();
}

// ==== this machine ================================================================================================
std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) return line.substr(std::min(line.find(':') + 2, line.size()));
  return "";
}

double peak_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return (double)std::strtoll(line.c_str() + 6, nullptr, 10) / 1024;
  return 0;
}

// ==== files =======================================================================================================
std::string format_number(double v) {
  if (v != v) return "nan";  // printf would show its sign
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, v, std::chars_format::general, 9).ptr};
}

std::string json_object(const std::vector<std::pair<std::string, std::string>>& members) {
  std::string out;
  for (const auto& [name, value] : members) out += (out.empty() ? "" : ",") + json_quote(name) + ":" + value;
  return "{" + out + "}";
}

// What the system said, and what to do about it.
static std::string reason(int error) {
  const char* cure = error == ENOSPC || error == EDQUOT                    ? "; no space left: free some, or write elsewhere"
                     : error == EFBIG                                      ? "; raise the limit on the size of a file (ulimit -f)"
                     : error == ENOENT || error == ENOTDIR                 ? "; is its folder there?"
                     : error == EACCES || error == EPERM || error == EROFS ? "; choose a place that you may write to"
                                                                           : "";
  return std::string(": ") + std::strerror(error) + cure;
}

static std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  if (path_.empty()) throw Error("cannot write a file without a name");
  struct stat s;
  if (stat(path_.c_str(), &s) == 0) {
    if (S_ISDIR(s.st_mode)) throw Error(path_ + ": cannot write: this is a folder; give the name of a file");
    if (!S_ISREG(s.st_mode)) throw Error(path_ + ": cannot write: not a plain file");  // a rename would put a file in a device's place
    std::error_code failed;
    const std::string real = std::filesystem::canonical(path_, failed).string();  // a link stays a link
    if (!failed) path_ = real;
  }
  static std::atomic<unsigned> count{0};
  do {  // a name that is taken was left by a killed process of our number
    temporary_ = path_ + ".tmp-" + std::to_string(getpid()) + "-" + std::to_string(count++);
    file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (file_ < 0 && (errno == EEXIST || errno == EINTR));
  if (file_ < 0) throw Error(path_ + ": cannot write" + reason(errno));
}

AtomicFile::~AtomicFile() { discard(); }

void AtomicFile::discard() {
  if (file_ < 0) return;
  ::close(file_);
  ::unlink(temporary_.c_str());
  file_ = -1;
}

void AtomicFile::fail(int error) {
  discard();
  throw Error(path_ + ": cannot write" + reason(error));
}

void AtomicFile::write(std::string_view bytes) {
  static constexpr size_t kBuffer = 1 << 18;
  if (file_ < 0) throw Error(path_ + ": cannot write: the file was committed, or has failed, before");
  if (buffer_.size() + bytes.size() > kBuffer) write_out(buffer_), buffer_.clear();
  bytes.size() > kBuffer ? write_out(bytes) : (void)buffer_.append(bytes);
}

void AtomicFile::write_out(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(file_, bytes.data(), bytes.size());
    if (n > 0)
      bytes.remove_prefix((size_t)n);
    else if (n == 0 || errno != EINTR)
      fail(n ? errno : EIO);
  }
}

// After a power cut there is the old file or the new one: the bytes are on the disk before the name is, and then the name is too.
void AtomicFile::commit() {
  write({});  // throws after a failure
  write_out(buffer_), buffer_.clear();
  if (::fsync(file_) != 0 && errno != EINVAL) fail(errno);  // EINVAL: a file system that cannot sync
  const int closed = ::close(std::exchange(file_, -1)) == 0 ? 0 : errno;
  const int failed = closed && closed != EINTR ? closed : ::rename(temporary_.c_str(), path_.c_str()) == 0 ? 0 : errno;
  if (failed) {
    ::unlink(temporary_.c_str());
    fail(failed);
  }
  const int folder = ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return;  // a folder that may be written but not read
  const int synced = ::fsync(folder) == 0 || errno == EINVAL ? 0 : errno;
  ::close(folder);
  if (synced) throw Error(path_ + ": written, but its folder cannot be synced" + reason(synced));
}

void write_file(const std::string& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

// ---- safetensors: 8 bytes little-endian n, n bytes of JSON {"name":{"dtype","shape","data_offsets":[begin,end]}}, the data -----------
static_assert(std::endian::native == std::endian::little, "the format is little-endian, and so is every mapped tensor");
static constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit
static constexpr size_t kMaxValues = 500'000;        // in the header: some 60,000 tensors. A value takes 88 bytes here and may take 2 there

static uint64_t dtype_size(std::string_view name) {  // in bytes; 0: unknown. The types below a byte (F4, F6) are not read
  static constexpr std::pair<std::string_view, uint64_t> sizes[] = {
      {"BOOL", 1},        {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1}, {"F8_E4M3FNUZ", 1},
      {"F8_E5M2FNUZ", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},     {"BF16", 2},    {"I32", 4},     {"U32", 4},
      {"F32", 4},         {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8}};
  for (const auto& [known, size] : sizes)
    if (known == name) return size;
  return 0;
}

// A name for a message: one line of a terminal, whatever the file holds.
static std::string shown(const std::string& name) {
  std::string quoted = json_quote(name.substr(0, 200));
  const bool plain = !name.empty() && name.size() <= 200 && quoted.size() == name.size() + 2;
  return plain ? name : name.size() <= 200 ? quoted : quoted + "...";
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size() && i < 16; i++) out += (i ? "," : "") + std::to_string(shape[i]);
  return out + (shape.size() > 16 ? ",...]" : "]");
}

// Json keeps a key that stands twice; a file that says two things is refused.
static void no_key_twice(const Json& object, const std::string& where) {
  std::vector<std::string_view> keys;
  for (const auto& [key, v] : object.members()) keys.push_back(key);
  std::sort(keys.begin(), keys.end());
  const auto twice = std::adjacent_find(keys.begin(), keys.end());
  if (twice != keys.end()) throw Error(where + ": " + shown(std::string(*twice)) + ": stands twice in the header");
}

static std::vector<int64_t> counts(const Json& list, const std::string& where) {
  std::vector<int64_t> out;
  for (const Json& v : list.items(where)) {
    out.push_back(v.as_int(where));
    if (out.back() < 0) throw Error(where + ": " + std::to_string(out.back()) + " is negative");
  }
  return out;
}

// One tensor of the header, its bytes checked against the `size` bytes of data. Nothing is subtracted before it is compared.
static SafeTensors::Entry read_entry(const std::string& name, const Json& v, uint64_t size, const std::string& where) {
  if (!v.is(Json::object)) throw Error(where + ": not an object");
  no_key_twice(v, where);
  const Json *dtype = v.find("dtype"), *shape = v.find("shape"), *offsets = v.find("data_offsets");
  for (const auto& [key, found] : {std::pair("dtype", dtype), {"shape", shape}, {"data_offsets", offsets}})
    if (!found) throw Error(where + ": " + key + " is missing");
  SafeTensors::Entry e{name, dtype->as_string(where + ": dtype"), counts(*shape, where + ": shape"), {}, 0, 0};
  uint64_t bytes = dtype_size(e.dtype);
  if (!bytes) throw Error(where + ": unknown dtype " + shown(e.dtype));
  bool empty = false;
  for (int64_t d : e.shape) {  // a 0 does not hide that the others are too large
    empty |= d == 0;
    if (__builtin_mul_overflow(bytes, (uint64_t)std::max<int64_t>(d, 1), &bytes) || bytes >> 62)
      throw Error(where + ": shape " + shape_text(e.shape) + " is too large");
  }
  if (empty) bytes = 0;
  const std::vector<int64_t> place = counts(*offsets, where + ": data_offsets");
  if (place.size() != 2) throw Error(where + ": data_offsets needs two numbers, has " + std::to_string(place.size()));
  e.begin = (uint64_t)place[0], e.end = (uint64_t)place[1];
  if (e.begin > e.end) throw Error(where + ": data_offsets " + shape_text(place) + " are reversed");
  if (e.end > size)
    throw Error(where + ": ends at " + std::to_string(e.end) + ", the file has " + std::to_string(size) +
                " bytes of data; is it cut short?");
  if (e.end - e.begin != bytes)
    throw Error(where + ": shape " + shape_text(e.shape) + " of " + e.dtype + " needs " + std::to_string(bytes) +
                " bytes, data_offsets give " + std::to_string(e.end - e.begin));
  return e;
}

namespace {
struct Unmap {  // also the mark of what is a mapped file
  size_t size;
  void operator()(const void* at) const {
    if (at) munmap(const_cast<void*>(at), size);
  }
};

void give_back_pages(const std::shared_ptr<const void>& owner, const void* data, size_t bytes) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;  // whole pages of this data alone
  if (std::get_deleter<Unmap>(owner) && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}
}  // namespace

Mapped map_file(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // O_NONBLOCK: a pipe without a writer would wait
  if (file < 0) throw Error(path + ": cannot open: " + std::strerror(errno));
  struct stat s;
  const int failed = fstat(file, &s) == 0 ? 0 : errno;
  const size_t size = !failed && S_ISREG(s.st_mode) ? (size_t)s.st_size : 0;
  void* const at = size ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0) : nullptr;  // no bytes cannot be mapped
  const int unmapped = at == MAP_FAILED ? errno : 0;
  ::close(file);
  if (failed) throw Error(path + ": cannot open: " + std::strerror(failed));
  if (S_ISDIR(s.st_mode)) throw Error(path + ": this is a folder, where a file is needed");
  if (!S_ISREG(s.st_mode)) throw Error(path + ": not a plain file");
  if (unmapped) throw Error(path + ": cannot map " + std::to_string(size) + " bytes: " + std::strerror(unmapped));
  const std::shared_ptr<const void> owner(at, Unmap{size});
  const std::string_view bytes{static_cast<const char*>(at), size};
  if (bytes.starts_with("version https://git-lfs"))
    throw Error(path + ": a Git LFS pointer stands here in place of the file; fetch the file itself: git lfs pull");
  return {bytes, owner};
}

SafeTensors SafeTensors::open(const std::string& path) {
  const Mapped file = map_file(path);
  return parse(file.bytes, path, file.owner);
}

SafeTensors SafeTensors::parse(std::string_view bytes, const std::string& where, std::shared_ptr<const void> owner) {
  if (bytes.size() < 8) throw Error(where + ": " + std::to_string(bytes.size()) + " bytes are too short for a safetensors file");
  uint64_t n;
  std::memcpy(&n, bytes.data(), 8);
  bytes.remove_prefix(8);
  if (n > bytes.size())
    throw Error(where + ": a header of " + std::to_string(n) + " bytes, but " + std::to_string(bytes.size()) +
                " follow; cut short, or no safetensors file?");
  if (n > kMaxHeader)
    throw Error(where + ": a header of " + std::to_string(n) + " bytes is over the format's limit of " + std::to_string(kMaxHeader));
  SafeTensors file;
  file.where_ = where, file.owner_ = std::move(owner), file.data_ = bytes.substr((size_t)n);
  const Json header = Json::parse(bytes.substr(0, (size_t)n), where + ": header", kMaxValues);
  if (!header.is(Json::object)) throw Error(where + ": the header is not an object");
  no_key_twice(header, where);
  for (const auto& [name, v] : header.members()) {
    const std::string here = where + ": " + shown(name);
    if (name != "__metadata__") {
      file.entries_.push_back(read_entry(name, v, file.data_.size(), here));
      continue;
    }
    if (!v.is(Json::object)) throw Error(here + ": not an object");
    no_key_twice(v, here);
    for (const auto& [key, text] : v.members()) file.metadata_.emplace_back(key, text.as_string(here + ": " + shown(key)));
  }
  std::vector<Entry>& all = file.entries_;  // every byte of the data belongs to one tensor
  std::sort(all.begin(), all.end(),
            [](const Entry& a, const Entry& b) { return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name); });
  uint64_t at = 0;
  for (size_t i = 0; i < all.size(); at = all[i++].end) {
    const std::string here = where + ": " + shown(all[i].name);
    if (all[i].begin < at) throw Error(here + ": overlaps " + shown(all[i - 1].name));
    if (all[i].begin > at)
      throw Error(here + ": starts at " + std::to_string(all[i].begin) + ", the tensors before it end at " + std::to_string(at));
  }
  if (at != file.data_.size()) throw Error(where + ": " + std::to_string(file.data_.size() - at) + " bytes after the last tensor");
  return file;
}

const SafeTensors::Entry* SafeTensors::find(std::string_view name) const {
  for (const Entry& e : entries_)
    if (e.name == name) return &e;
  return nullptr;
}

static float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7FFFu;
  if (rest < 0x0400)
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>((float)rest * 0x1p-24f));           // a subnormal there is normal here
  return std::bit_cast<float>(sign | ((rest << 13) + (rest < 0x7C00 ? 112u << 23 : 224u << 23)));  // exponents of bias 15 to 127; inf, NaN
}

static void widen(const std::string& dtype, const char* in, float* out, int64_t begin, int64_t end) {
  if (dtype == "F16")
    for (int64_t i = begin; i < end; i++) out[i] = from_half(at<uint16_t>(in, i));
  else if (dtype == "BF16")
    for (int64_t i = begin; i < end; i++) out[i] = std::bit_cast<float>((uint32_t)at<uint16_t>(in, i) << 16);
  else if (dtype == "F64")
    for (int64_t i = begin; i < end; i++) out[i] = (float)at<double>(in, i);
  else if (begin < end)
    std::memcpy(out + begin, in + (size_t)begin * sizeof(float), (size_t)(end - begin) * sizeof(float));
}

// An exponent of all ones, infinity or NaN, carries into the sign bit. Sixteen at a time, so that compilers take whole vectors.
static bool all_finite(const float* x, int64_t n) {
  auto carry = [](float v) { return (std::bit_cast<uint32_t>(v) & 0x7F800000u) + 0x00800000u; };
  uint32_t carried[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int lane = 0; lane < 16; lane++) carried[lane] |= carry(x[i + lane]);
  for (; i < n; i++) carried[0] |= carry(x[i]);
  for (int lane = 1; lane < 16; lane++) carried[0] |= carried[lane];
  return !(carried[0] >> 31);
}

// The elements of a tensor with strides, one after another.
static std::string gathered(const SafeTensors::Entry& e, const char* from) {
  const size_t size = dtype_size(e.dtype);
  int64_t n = 1;
  for (const int64_t d : e.shape) n *= d;
  std::string out((size_t)n * size, '\0');
  for (int64_t i = 0; i < n; i++) {
    int64_t place = 0, rest = i;
    for (size_t k = e.shape.size(); k-- > 0; rest /= e.shape[k]) place += rest % e.shape[k] * e.strides[k];
    std::memcpy(out.data() + (size_t)i * size, from + (size_t)place * size, size);
  }
  return out;
}

Tensor SafeTensors::load(const Entry& e) const {
  static constexpr int64_t kPiece = 1 << 16;  // elements of a task
  const std::string here = where_ + ": " + shown(e.name);
  if (e.dtype != "F32" && e.dtype != "F16" && e.dtype != "BF16" && e.dtype != "F64")
    throw Error(here + ": dtype " + e.dtype + " where a float is needed (F32, F16, BF16 or F64)");
  const std::vector<int64_t>& d = e.shape;
  if (d.size() > Shape::kMaxRank) throw Error(here + ": shape " + shape_text(d) + " has more than four dimensions");
  const Shape shape{std::span<const int64_t>(d)};
  const std::string rows = e.strides.empty() ? "" : gathered(e, data_.data() + e.begin);
  const char* bytes = e.strides.empty() ? data_.data() + e.begin : rows.data();
  const bool view = e.dtype == "F32" && e.strides.empty() && reinterpret_cast<uintptr_t>(bytes) % alignof(float) == 0;
  const Tensor t = view ? Tensor::borrowed(shape, reinterpret_cast<const float*>(bytes), owner_) : Tensor(shape);
  float* x = t.data();
  std::atomic<bool> finite = true;
  parallel_ranges(shape.size(), kPiece, [&](int64_t begin, int64_t end) {
    if (!view) widen(e.dtype, bytes, x, begin, end);
    if (!all_finite(x + begin, end - begin)) finite = false;
  });
  for (int64_t i = 0; !finite && i < shape.size(); i++)
    if (!all_finite(x + i, 1))
      throw Error(here + ": element " + std::to_string(i) + " of " + shape_text(d) + " is " +
                  format_number(e.dtype == "F64" ? at<double>(bytes, i) : x[i]) +
                  (e.dtype == "F64" ? " (in f32 " + format_number(x[i]) + ")" : "") +
                  "; damaged, or saved after a training that diverged?");
  return t;
}

NarrowMatrix SafeTensors::narrow(const Entry& e, const Entry* scales) const {
  const std::string here = where_ + ": " + shown(e.name);
  const bool bf16 = e.dtype == "BF16";
  if ((!bf16 && e.dtype != "I8") || e.shape.size() != 2 || !e.strides.empty())
    throw Error(here + ": " + e.dtype + " " + shape_text(e.shape) + ", where a matrix of BF16 or I8 is needed");
  NarrowMatrix m{.precision = bf16 ? Precision::bf16 : Precision::int8,
                 .n = e.shape[0],
                 .k = e.shape[1],
                 .data = data_.data() + e.begin,
                 .owner = owner_,
                 .scales = {}};
  if (bf16)
    for (int64_t i = 0; i < m.n * m.k; i++)
      if (const uint16_t x = at<uint16_t>(m.data, i); (x & 0x7F80) == 0x7F80)
        throw Error(here + ": element " + std::to_string(i) + " of " + shape_text(e.shape) + " is not finite; damaged?");
  if (bf16) return m;
  if (!scales || scales->shape != std::vector{m.n})
    throw Error(here + ": int8 " + (scales ? "with scales of shape " + shape_text(scales->shape) : "without its scales") + "; " +
                shown(e.name) + "_scale [" + std::to_string(m.n) + "] is needed beside it");
  const Tensor t = load(*scales);
  m.scales.assign(t.data(), t.data() + m.n);
  return m;
}

void SafeTensors::give_back(const Entry& e) const { give_back_pages(owner_, data_.data() + e.begin, e.end - e.begin); }
void Tensor::give_back() const {
  if (const NarrowMatrix* const m = narrow())
    give_back_pages(m->owner, m->data, (size_t)(m->n * m->row_bytes()));
  else
    give_back_pages(impl().owner, impl_->data, (size_t)size() * sizeof(float));
}

// ---- zip: the archive that torch.save writes, its entries stored as they are ----------------------------------------------------------
// Where a number stands in a file's bytes; the caller has checked that it is there.
template <class T>
static uint64_t field(std::string_view bytes, size_t offset) {
  return at<T>(bytes.data() + offset, 0);
}

// CRC-32 (ISO 3309, as in zip), eight bytes at a time: table[k][b] is the CRC of byte b with k zero bytes behind it.
static uint32_t crc32(std::string_view bytes) {
  static const auto table = [] {
    std::array<std::array<uint32_t, 256>, 8> t{};
    for (uint32_t b = 0; b < 256; b++) {
      t[0][b] = b;
      for (int bit = 0; bit < 8; bit++) t[0][b] = t[0][b] >> 1 ^ (t[0][b] & 1 ? 0xEDB88320u : 0);
    }
    for (size_t k = 1; k < 8; k++)
      for (size_t b = 0; b < 256; b++) t[k][b] = t[k - 1][b] >> 8 ^ t[0][t[k - 1][b] & 255];
    return t;
  }();
  uint32_t crc = ~0u;
  for (; bytes.size() >= 8; bytes.remove_prefix(8)) {
    const uint64_t x = field<uint64_t>(bytes, 0) ^ crc;
    crc = 0;
    for (size_t k = 0; k < 8; k++) crc ^= table[7 - k][x >> 8 * k & 255];
  }
  for (const char c : bytes) crc = crc >> 8 ^ table[0][(crc ^ (uint8_t)c) & 255];
  return ~crc;
}

struct ZipEntry {
  std::string_view name, bytes;
  uint32_t crc;
};

// One entry of the central directory, taken off its front; its bytes must lie within the file.
static ZipEntry read_zip_entry(std::string_view file, std::string_view& directory, const std::string& where) {
  if (directory.size() < 46 || !directory.starts_with("PK\1\2")) throw Error(where + ": the zip archive's directory is damaged");
  const uint64_t name_size = field<uint16_t>(directory, 28), extra_size = field<uint16_t>(directory, 30),
                 whole = 46 + name_size + extra_size + field<uint16_t>(directory, 32);
  if (whole > directory.size()) throw Error(where + ": the zip archive's directory is damaged");
  const std::string_view name = directory.substr(46, name_size);
  const std::string here = where + ": " + shown(std::string(name));
  uint64_t unpacked = field<uint32_t>(directory, 24), packed = field<uint32_t>(directory, 20), header = field<uint32_t>(directory, 42);
  for (std::string_view extra = directory.substr(46 + name_size, extra_size); extra.size() >= 4;) {
    std::string_view part = extra.substr(4, field<uint16_t>(extra, 2));
    if (field<uint16_t>(extra, 0) == 1)  // zip64: what does not fit 32 bits, in this order
      for (uint64_t* v : {&unpacked, &packed, &header})
        if (*v == 0xFFFFFFFF && part.size() >= 8) *v = field<uint64_t>(part, 0), part.remove_prefix(8);
    extra.remove_prefix(std::min(extra.size(), 4 + (size_t)field<uint16_t>(extra, 2)));
  }
  if (field<uint16_t>(directory, 8) & 1) throw Error(here + ": encrypted");
  if (field<uint16_t>(directory, 10)) throw Error(here + ": compressed, which torch.save does not do; store it, or save the model again");
  if (packed != unpacked)
    throw Error(here + ": stored, but " + std::to_string(packed) + " bytes should become " + std::to_string(unpacked));
  if (header > file.size() || file.size() - header < 30) throw Error(here + ": lies past the end of the file");
  const std::string_view local = file.substr(header);
  const uint64_t skip = 30 + field<uint16_t>(local, 26) + field<uint16_t>(local, 28);
  if (!local.starts_with("PK\3\4") || field<uint16_t>(local, 26) != name_size || local.substr(30, name_size) != name)
    throw Error(here + ": the zip archive's directory and the entry do not agree");
  if (skip > local.size() || packed > local.size() - skip)
    throw Error(here + ": " + std::to_string(packed) + " bytes reach past the end of the file; is it cut short?");
  const ZipEntry entry{name, local.substr(skip, packed), (uint32_t)field<uint32_t>(directory, 16)};
  directory.remove_prefix(whole);
  return entry;
}

static std::map<std::string_view, ZipEntry> read_zip(std::string_view file, const std::string& where) {
  static constexpr size_t kEnd = 22, kEnd64 = 56, kLocator = 20, kMaxEntries = 100'000;
  size_t end = file.rfind("PK\5\6");
  if (end != file.npos && file.size() - end < kEnd) end = file.rfind("PK\5\6", end - 1);  // in a comment
  if (end == file.npos || file.size() - end < kEnd) throw Error(where + ": a zip archive without its directory; is it cut short?");
  uint64_t size = field<uint32_t>(file, end + 12), from = field<uint32_t>(file, end + 16);
  if (end >= kLocator && file.substr(end - kLocator).starts_with("PK\6\7")) {
    const uint64_t end64 = field<uint64_t>(file, end - kLocator + 8);
    if (end64 > file.size() || file.size() - end64 < kEnd64 || !file.substr(end64).starts_with("PK\6\6"))
      throw Error(where + ": the zip archive's directory is damaged");
    size = field<uint64_t>(file, end64 + 40), from = field<uint64_t>(file, end64 + 48);
  }
  if (from > file.size() || size > file.size() - from) throw Error(where + ": the zip archive's directory lies past the end of the file");
  std::map<std::string_view, ZipEntry> entries;
  uint64_t bytes = 0;
  for (std::string_view directory = file.substr(from, size); !directory.empty();) {
    const ZipEntry entry = read_zip_entry(file, directory, where);
    if (!entries.emplace(entry.name, entry).second) throw Error(where + ": " + shown(std::string(entry.name)) + ": twice in the archive");
    bytes += entry.bytes.size();
    if (bytes > file.size()) throw Error(where + ": " + shown(std::string(entry.name)) + ": the archive's entries overlap");
    if (entries.size() > kMaxEntries) throw Error(where + ": more than " + std::to_string(kMaxEntries) + " entries in the archive");
  }
  return entries;
}

// ---- pickle: a program for a small stack machine, and Python's runs whatever it names -------------------------------------------------
// This one knows the opcodes and the names that a dict of tensors needs and builds plain values from them; anything else is refused by
// name where it stands. Values hold numbers of other values, so that neither depth nor a cycle can hurt, and they are as few as the
// program's steps, which are limited.
class Pickle {
 public:
  enum Kind : uint8_t { other, integer, text, global, tuple, list, dict, storage, tensor };
  struct Value {
    Kind kind = other;
    int64_t number = 0;          // of an integer; 1 for True; of a storage or tensor the tuple that it is built from
    std::string_view text = {};  // of a text; of a global what it builds; an integer's bytes
    std::vector<uint32_t> items = {};
  };
  Pickle(std::string_view bytes, std::string where) : bytes_(bytes), where_(std::move(where)) {}

  const Value& run() {  // one program, from where the last one ended to its STOP: what it leaves
    stack_.clear(), marks_.clear(), memo_.clear();
    for (;;) {
      op_at_ = at_;
      if (steps_++ == kMaxSteps) fail("more than " + std::to_string(kMaxSteps) + " steps");
      const uint8_t op = number<uint8_t>();
      if (op == '.') return values_[pop()];
      step(op);
    }
  }
  const Value& operator[](uint32_t i) const { return values_[i]; }
  const std::deque<Value>& values() const { return values_; }
  std::string_view rest() const { return bytes_.substr(at_); }

 private:
  static constexpr size_t kMaxSteps = 300'000;  // a tensor takes some 30
  std::string_view bytes_;
  std::string where_;
  size_t at_ = 0, op_at_ = 0, steps_ = 0;
  std::deque<Value> values_;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;
  std::unordered_map<uint32_t, uint32_t> memo_;

  [[noreturn]] void fail(const std::string& what) const { throw Error(where_ + ": " + what + " at byte " + std::to_string(op_at_)); }
  std::string_view take(uint64_t n) {
    if (n > bytes_.size() - at_) fail("the pickle ends inside what begins");
    return bytes_.substr(std::exchange(at_, at_ + n), n);
  }
  template <class T>
  T number() {
    return at<T>(take(sizeof(T)).data(), 0);
  }
  std::string_view line() {
    const std::string_view found = take(std::min(bytes_.find('\n', at_), bytes_.size()) - at_);
    return take(1), found;
  }
  void push(Kind kind, int64_t number = 0, std::string_view text = {}, std::vector<uint32_t> items = {}) {
    stack_.push_back((uint32_t)values_.size()), values_.push_back({kind, number, text, std::move(items)});
  }
  uint32_t pop() {
    if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) fail("stack underflow");
    const uint32_t i = stack_.back();
    return stack_.pop_back(), i;
  }
  uint32_t pop(Kind wanted, const char* name) {
    const uint32_t i = pop();
    if (values_[i].kind != wanted) fail(std::string("not a ") + name);
    return i;
  }
  uint32_t top() { return stack_.push_back(pop()), stack_.back(); }
  std::vector<uint32_t> pop_items(size_t n) {
    if (stack_.size() < n || (!marks_.empty() && stack_.size() - n < marks_.back())) fail("stack underflow");
    std::vector<uint32_t> items(stack_.end() - (ptrdiff_t)n, stack_.end());
    stack_.resize(stack_.size() - n);
    return items;
  }
  std::vector<uint32_t> pop_to_mark() {
    if (marks_.empty()) fail("stack underflow");
    std::vector<uint32_t> items = pop_items(stack_.size() - marks_.back());
    return marks_.pop_back(), items;
  }
  void add(const std::vector<uint32_t>& items, Kind kind) {  // to the list or dict on top
    Value& v = values_[top()];
    if (v.kind != kind || (kind == dict && items.size() % 2)) fail(kind == dict ? "not a dict, or a key without value" : "not a list");
    v.items.insert(v.items.end(), items.begin(), items.end());
  }
  void recall(uint32_t name) {
    const auto found = memo_.find(name);
    if (found == memo_.end()) fail("memo " + std::to_string(name) + " unknown");
    stack_.push_back(found->second);
  }

  // What a program may name: what builds tensors, and torch's storages (whether their type can be read is asked where one is used).
  void name(std::string_view module, std::string_view what) {
    static const std::pair<std::string_view, std::string_view> builders[] = {
        {"collections", "OrderedDict"}, {"torch._utils", "_rebuild_tensor_v2"}, {"torch._utils", "_rebuild_parameter"}};
    const bool builder = std::find(std::begin(builders), std::end(builders), std::pair(module, what)) != std::end(builders);
    if (!builder && !(module == "torch" && what.ends_with("Storage")))
      fail("forbidden global " + shown(std::string(module) + "." + std::string(what)) +
           ": only tensors are read here, and nothing is run;");
    push(global, 0, what);
  }
  void global_of(std::string_view module) { name(module, line()); }
  void stack_global(const std::vector<uint32_t>& two) { name(values_[two[0]].text, values_[two[1]].text); }
  void call() {
    const uint32_t arguments = pop(tuple, "tuple of arguments");
    const std::string_view what = values_[pop(global, "builder")].text;
    const std::vector<uint32_t>& items = values_[arguments].items;
    if (what == "OrderedDict" && items.empty())
      push(dict);
    else if (what == "_rebuild_tensor_v2")
      push(tensor, arguments);
    else if (what == "_rebuild_parameter" && !items.empty())
      stack_.push_back(items[0]);
    else
      fail("a call of " + shown(std::string(what)) + " that builds no tensor");
  }

  struct Opcode {
    uint8_t code;
    void (*run)(Pickle&);
  };
  void step(uint8_t code) {
    static constexpr Opcode opcodes[] = {
        {0x80, [](Pickle& p) { p.take(1); }},  // PROTO
        {0x95, [](Pickle& p) { p.take(8); }},  // FRAME
        {'(', [](Pickle& p) { p.marks_.push_back(p.stack_.size()); }},
        {')', [](Pickle& p) { p.push(tuple); }},
        {']', [](Pickle& p) { p.push(list); }},
        {'}', [](Pickle& p) { p.push(dict); }},
        {'N', [](Pickle& p) { p.push(other); }},
        {0x88, [](Pickle& p) { p.push(other, 1); }},  // True
        {0x89, [](Pickle& p) { p.push(other, 0); }},  // False
        {'G', [](Pickle& p) { p.take(8), p.push(other); }},
        {'K', [](Pickle& p) { p.push(integer, p.number<uint8_t>()); }},
        {'M', [](Pickle& p) { p.push(integer, p.number<uint16_t>()); }},
        {'J', [](Pickle& p) { p.push(integer, p.number<int32_t>()); }},
        {0x8A, [](Pickle& p) { p.long_integer(p.take(p.number<uint8_t>())); }},
        {'U', [](Pickle& p) { p.push(text, 0, p.take(p.number<uint8_t>())); }},
        {0x8C, [](Pickle& p) { p.push(text, 0, p.take(p.number<uint8_t>())); }},
        {'T', [](Pickle& p) { p.push(text, 0, p.take(p.number<uint32_t>())); }},
        {'X', [](Pickle& p) { p.push(text, 0, p.take(p.number<uint32_t>())); }},
        {0x8D, [](Pickle& p) { p.push(text, 0, p.take(p.number<uint64_t>())); }},
        {'q', [](Pickle& p) { p.memo_[p.number<uint8_t>()] = p.top(); }},
        {'r', [](Pickle& p) { p.memo_[p.number<uint32_t>()] = p.top(); }},
        {0x94, [](Pickle& p) { p.memo_.emplace((uint32_t)p.memo_.size(), p.top()); }},
        {'h', [](Pickle& p) { p.recall(p.number<uint8_t>()); }},
        {'j', [](Pickle& p) { p.recall(p.number<uint32_t>()); }},
        {'t', [](Pickle& p) { p.push(tuple, 0, {}, p.pop_to_mark()); }},
        {0x85, [](Pickle& p) { p.push(tuple, 0, {}, p.pop_items(1)); }},
        {0x86, [](Pickle& p) { p.push(tuple, 0, {}, p.pop_items(2)); }},
        {0x87, [](Pickle& p) { p.push(tuple, 0, {}, p.pop_items(3)); }},
        {'a', [](Pickle& p) { p.add(p.pop_items(1), list); }},
        {'e', [](Pickle& p) { p.add(p.pop_to_mark(), list); }},
        {'s', [](Pickle& p) { p.add(p.pop_items(2), dict); }},
        {'u', [](Pickle& p) { p.add(p.pop_to_mark(), dict); }},
        {'c', [](Pickle& p) { p.global_of(p.line()); }},
        {0x93, [](Pickle& p) { p.stack_global(p.pop_items(2)); }},
        {'Q', [](Pickle& p) { p.push(storage, p.pop(tuple, "tuple")); }},  // what must be in it is asked where it is used
        {'R', [](Pickle& p) { p.call(); }},
        {'b', [](Pickle& p) { p.pop(), p.top(); }},  // attributes (state_dict's _metadata): not needed
    };
    for (const Opcode& op : opcodes)
      if (op.code == code) return op.run(*this);
    char hex[8];
    std::snprintf(hex, sizeof hex, "0x%02x", code);
    fail(std::string("unknown opcode ") + hex);
  }
  void long_integer(std::string_view bytes) {  // little-endian, two's complement, of any length; the number of those that fit
    uint64_t v = !bytes.empty() && (signed char)bytes.back() < 0 ? ~uint64_t(0) : 0;
    if (bytes.size() <= sizeof v) std::memcpy(&v, bytes.data(), bytes.size());
    push(bytes.size() <= sizeof v ? integer : other, (int64_t)v, bytes);
  }
};

// ---- pytorch_model.bin: a pickled dict of tensors over storages -----------------------------------------------------------------------
// The storages by their keys, and why one that is asked for may be missing.
struct TorchStorages {
  std::map<std::string_view, std::string_view> bytes;
  std::string problem = "missing";
};

static std::string_view storage_dtype(std::string_view type) {
  static constexpr std::pair<std::string_view, std::string_view> types[] = {
      {"FloatStorage", "F32"}, {"HalfStorage", "F16"},  {"BFloat16Storage", "BF16"}, {"DoubleStorage", "F64"}, {"LongStorage", "I64"},
      {"IntStorage", "I32"},   {"ShortStorage", "I16"}, {"CharStorage", "I8"},       {"ByteStorage", "U8"},    {"BoolStorage", "BOOL"}};
  for (const auto& [name, dtype] : types)
    if (name == type) return dtype;
  return {};
}

// ('storage', type, key, where it was, elements): its type, key and number of elements. Views of storages (torch before 0.4) are not read.
struct StorageName {
  std::string_view dtype, key;
  uint64_t elements;
};
static StorageName storage_name(const Pickle& p, const Pickle::Value& v, const std::string& where) {
  const std::vector<uint32_t> none, &id = v.kind == Pickle::storage ? p[(uint32_t)v.number].items : none;
  const Pickle::Kind wanted[] = {Pickle::text, Pickle::global, Pickle::text, Pickle::text, Pickle::integer, Pickle::other};
  bool good = id.size() == 5 || id.size() == 6;
  for (size_t i = 0; good && i < id.size(); i++) good = p[id[i]].kind == wanted[i];
  if (!good || p[id[0]].text != "storage") throw Error(where + ": its storage's name (the persistent id) is not understood");
  const std::string_view dtype = storage_dtype(p[id[1]].text);
  if (dtype.empty()) throw Error(where + ": dtype " + shown(std::string(p[id[1]].text)) + " is not supported");
  if (p[id[4]].number < 0) throw Error(where + ": a storage of a negative size");
  return {dtype, p[id[2]].text, (uint64_t)p[id[4]].number};
}

static std::vector<int64_t> counts(const Pickle& p, const Pickle::Value& v, const std::string& where, const char* what) {
  if (v.kind != Pickle::tuple || v.items.size() > 64) throw Error(where + ": the " + what + "s are no tuple of a few numbers");
  std::vector<int64_t> out;
  for (const uint32_t i : v.items) {
    if (p[i].kind != Pickle::integer) throw Error(where + ": " + what + ": not an integer");
    if (p[i].number < 0) throw Error(where + ": negative " + what + " " + std::to_string(p[i].number));
    out.push_back(p[i].number);
  }
  return out;
}

// One tensor: _rebuild_tensor_v2(storage, offset, shape, strides, ...), checked against the storage's bytes.
static SafeTensors::Entry torch_entry(const Pickle& p, const Pickle::Value& v, std::string_view file, const TorchStorages& storages,
                                      const std::string& name, const std::string& where) {
  if (v.kind != Pickle::tensor) throw Error(where + ": not a tensor");
  const std::vector<uint32_t>& how = p[(uint32_t)v.number].items;
  if (how.size() < 4) throw Error(where + ": a tensor without storage, offset, shape and strides");
  const StorageName id = storage_name(p, p[how[0]], where);
  const std::string key = "storage " + shown(std::string(id.key));
  const auto found = storages.bytes.find(id.key);
  if (found == storages.bytes.end()) throw Error(where + ": " + key + ": " + storages.problem);
  const uint64_t size = dtype_size(id.dtype), there = found->second.size() / size;
  if (there != id.elements || found->second.size() % size)
    throw Error(where + ": " + key + " has " + std::to_string(found->second.size()) + " bytes, " + std::to_string(id.elements) + " of " +
                std::string(id.dtype) + " are expected");
  const Pickle::Value& offset = p[how[1]];
  if (offset.kind != Pickle::integer || offset.number < 0) throw Error(where + ": offset is not a number of at least 0");
  SafeTensors::Entry e{name, std::string(id.dtype), counts(p, p[how[2]], where, "dimension"), counts(p, p[how[3]], where, "stride"), 0, 0};
  if (e.shape.size() != e.strides.size()) throw Error(where + ": shape and strides differ in rank");
  uint64_t elements = 1, last = (uint64_t)offset.number, step = 0;
  bool wrapped = false, in_order = true;
  for (size_t k = e.shape.size(); k-- > 0;) {
    const auto d = (uint64_t)e.shape[k], stride = (uint64_t)e.strides[k];
    in_order &= d <= 1 || stride == elements;
    wrapped |= __builtin_mul_overflow(d ? d - 1 : 0, stride, &step) || __builtin_add_overflow(last, step, &last);
    wrapped |= __builtin_mul_overflow(elements, std::max<uint64_t>(d, 1), &elements);  // a 0 does not hide that the others are too large
  }
  if (wrapped || elements > there) throw Error(where + ": shape " + shape_text(e.shape) + " is too large for " + key);
  const bool empty = std::find(e.shape.begin(), e.shape.end(), 0) != e.shape.end();
  if (!empty && last >= there)
    throw Error(where + ": needs " + std::to_string(last + 1) + " elements, " + key + " has " + std::to_string(there));
  if (in_order || empty) e.strides.clear();
  e.begin = (uint64_t)(found->second.data() - file.data()) + (empty ? 0 : (uint64_t)offset.number * size);
  e.end = empty ? e.begin : e.begin + (last - (uint64_t)offset.number + 1) * size;
  return e;
}

static std::vector<SafeTensors::Entry> torch_entries(const Pickle& p, const Pickle::Value& root, std::string_view file,
                                                     const TorchStorages& storages, const std::string& where) {
  if (root.kind != Pickle::dict) throw Error(where + ": not a dict of tensors");
  std::vector<SafeTensors::Entry> entries;
  std::set<std::string_view> names;
  uint64_t bytes = 0;
  for (size_t i = 0; i + 1 < root.items.size(); i += 2) {
    const Pickle::Value& key = p[root.items[i]];
    if (key.kind != Pickle::text) throw Error(where + ": a key that is not a string");
    const std::string name(key.text), here = where + ": " + shown(name);
    if (!names.insert(key.text).second) throw Error(here + ": stands twice in the file");
    entries.push_back(torch_entry(p, p[root.items[i + 1]], file, storages, name, here));
    // Tensors may share a storage (tied ones do); a small storage under a thousand names would fill the memory.
    uint64_t size = dtype_size(entries.back().dtype);
    for (const int64_t d : entries.back().shape) size *= (uint64_t)d;
    bytes += size;
    if (bytes / 4 > file.size()) throw Error(here + ": the tensors share storages so often that they are many times the file");
  }
  return entries;
}

// The legacy format: five pickles (magic number, version, the writer's machine, the object, the storages' keys), then each storage's
// number of elements and its bytes.
static std::vector<SafeTensors::Entry> read_legacy(std::string_view file, const std::string& where) {
  static constexpr std::string_view kMagic = "\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
  Pickle p(file, where);
  if (p.run().text != kMagic) throw Error(where + ": not a torch file: its first value is not torch's magic number");
  if (p.run().number != 1001) throw Error(where + ": a torch format of another version than 1001");
  const Pickle::Value& machine = p.run();
  for (size_t i = 0; i + 1 < machine.items.size(); i += 2)
    if (p[machine.items[i]].text == "little_endian" && p[machine.items[i + 1]].number != 1)
      throw Error(where + ": byte order big is not supported");
  const Pickle::Value &root = p.run(), &keys = p.run();
  std::map<std::string_view, std::string_view> dtypes;
  for (const Pickle::Value& v : p.values())
    if (const auto* id = v.kind == Pickle::storage ? &p[(uint32_t)v.number].items : nullptr; id && id->size() > 2)
      dtypes.emplace(p[(*id)[2]].text, storage_dtype(p[(*id)[1]].text));  // whether it makes sense is asked for its tensor, by name
  TorchStorages storages;
  std::string_view rest = p.rest();
  for (const uint32_t i : keys.items) {
    const auto known = dtypes.find(p[i].text);
    const uint64_t size = known == dtypes.end() ? 0 : dtype_size(known->second), most = size ? file.size() / size : 0;
    const uint64_t count = rest.size() < 8 ? ~uint64_t(0) : field<uint64_t>(rest, 0);
    if (!size || count > most || count * size > rest.size() - 8) {
      storages.problem = !size                                    ? "missing"
                         : (int64_t)count < 0 && rest.size() >= 8 ? "a negative number of elements"
                                                                  : "past the end of the file; is it cut short?";
      break;  // where the next one begins is not known; what needs it says so
    }
    storages.bytes.emplace(p[i].text, rest.substr(8, count * size));
    rest.remove_prefix(8 + count * size);
  }
  std::vector<SafeTensors::Entry> entries = torch_entries(p, root, file, storages, where);
  if (storages.problem != "missing") throw Error(where + ": a storage: " + storages.problem);
  return entries;
}

static std::vector<SafeTensors::Entry> read_torch_zip(std::string_view file, const std::string& where) {
  const std::map<std::string_view, ZipEntry> zip = read_zip(file, where);
  const auto root = std::find_if(zip.begin(), zip.end(), [](const auto& e) {  // archive/data.pkl
    return e.first.substr(std::min(e.first.find('/'), e.first.size() - 1) + 1) == "data.pkl";
  });
  if (root == zip.end()) throw Error(where + ": no data.pkl inside; not a file of torch.save");
  const std::string folder(root->first.substr(0, root->first.find('/') + 1));
  TorchStorages storages;
  std::vector<const ZipEntry*> used = {&root->second};
  for (const auto& [name, entry] : zip) {
    if (name == folder + "byteorder" && entry.bytes != "little")
      throw Error(where + ": byte order " + shown(std::string(entry.bytes.substr(0, 20))) + " is not supported");
    if (name.starts_with(folder + "data/")) storages.bytes.emplace(name.substr(folder.size() + 5), entry.bytes), used.push_back(&entry);
  }
  Pickle p(root->second.bytes, where + ": data.pkl");
  const Pickle::Value& object = p.run();
  std::vector<SafeTensors::Entry> entries = torch_entries(p, object, file, storages, where);
  parallel_for((int64_t)used.size(), [&](int64_t i) {
    if (crc32(used[(size_t)i]->bytes) != used[(size_t)i]->crc)
      throw Error(where + ": " + shown(std::string(used[(size_t)i]->name)) +
                  ": its CRC does not match; the file is damaged, take another copy");
  });
  return entries;
}

SafeTensors SafeTensors::open_torch(const std::string& path) {
  const Mapped file = map_file(path);
  return parse_torch(file.bytes, path, file.owner);
}

SafeTensors SafeTensors::parse_torch(std::string_view bytes, const std::string& where, std::shared_ptr<const void> owner) {
  const bool zip = bytes.starts_with("PK\3\4");
  if (!zip && !bytes.starts_with("\x80\2")) throw Error(where + ": neither a zip archive nor a pickle, so no pytorch_model.bin");
  SafeTensors file;
  file.where_ = where, file.owner_ = std::move(owner), file.data_ = bytes;
  file.entries_ = zip ? read_torch_zip(bytes, where) : read_legacy(bytes, where);
  return file;
}

// ---- checkpoints: a model's weights in one file or several ----------------------------------------------------------------------------
static bool is_there(const std::string& path) {
  struct stat s;
  return stat(path.c_str(), &s) == 0;
}

// The shards that an index names: {"weight_map": {tensor: file, ...}}. Both must say the same.
static std::vector<SafeTensors> open_shards(const std::string& folder, const std::string& index, SafeTensors (*open)(const std::string&)) {
  const std::string path = folder + "/" + index;
  const Json json = Json::parse(map_file(path).bytes, path, kMaxValues);
  const Json* map = json.find("weight_map");
  if (!map || !map->is(Json::object)) throw Error(path + ": weight_map: missing, or not an object");
  no_key_twice(*map, path);
  std::map<std::string, std::set<std::string_view>> named;  // shard: its tensors
  for (const auto& [name, shard] : map->members()) named[shard.as_string(path + ": " + shown(name))].insert(name);
  std::vector<SafeTensors> shards;
  for (const auto& [shard, names] : named) {
    if (shard.empty() || shard.find('/') != shard.npos || shard.starts_with("."))
      throw Error(path + ": " + shown(shard) + ": a shard must be a file of the same folder");
    shards.push_back(open(folder + "/" + shard));
    for (const SafeTensors::Entry& e : shards.back().entries())
      if (!names.count(e.name)) throw Error(shards.back().where() + ": " + shown(e.name) + ": not in " + index + " for this shard");
    std::set<std::string_view> there;
    for (const SafeTensors::Entry& e : shards.back().entries()) there.insert(e.name);
    for (const std::string_view name : names)
      if (!there.count(name)) throw Error(shards.back().where() + ": " + shown(std::string(name)) + ": missing, but in " + index);
  }
  return shards;
}

struct CheckpointName {
  const char* file;
  SafeTensors (*open)(const std::string&);
};
static constexpr CheckpointName checkpoint_names[] = {{"model.safetensors", SafeTensors::open},
                                                      {"model.safetensors.index.json", SafeTensors::open},
                                                      {"pytorch_model.bin", SafeTensors::open_torch},
                                                      {"pytorch_model.bin.index.json", SafeTensors::open_torch}};

bool has_checkpoint(const std::string& folder) {
  return std::any_of(std::begin(checkpoint_names), std::end(checkpoint_names),
                     [&](const auto& c) { return is_there(folder + "/" + c.file); });
}

std::vector<SafeTensors> open_checkpoint(const std::string& folder) {
  for (const auto& [name, open] : checkpoint_names) {
    const std::string path = folder + "/" + name;
    if (!is_there(path)) continue;
    if (path.ends_with(".json")) return open_shards(folder, name, open);
    return {open(path)};
  }
  throw Error(folder + ": no weights here: model.safetensors or pytorch_model.bin is wanted");
}

static uint16_t to_half(float x) {  // rounded to nearest even; 0x7C00 and above: too large
  const float a = std::fabs(x);
  const uint32_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000, bits = std::bit_cast<uint32_t>(a);
  if (a < 0x1p-14f)
    return (uint16_t)(sign | (std::bit_cast<uint32_t>(a + 0.5f) & 0xFFFF));  // subnormal there: a multiple of 2^-24, an ulp of 0.5
  return (uint16_t)(sign | std::min<uint32_t>((bits - (112u << 23) + 0xFFF + (bits >> 13 & 1)) >> 13, 0x7C00));
}
static uint16_t to_bfloat(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The numbers as `dtype` says, a piece at a time.
static void write_numbers(AtomicFile& file, const NamedTensor& t, const std::string& dtype, const std::string& where) {
  const int64_t n = t.shape.size();
  if (t.narrow) return file.write({t.narrow->data, (size_t)(t.narrow->n * t.narrow->row_bytes())});
  if (dtype == "F32" && n) return file.write({reinterpret_cast<const char*>(t.data), (size_t)n * sizeof(float)});
  const bool half = dtype == "F16";
  const uint16_t infinity = half ? 0x7C00 : 0x7F80;
  std::vector<uint16_t> piece;
  for (int64_t i = 0; i < n;) {
    piece.clear();
    for (; i < n && piece.size() < 1 << 16; i++) {
      piece.push_back(half ? to_half(t.data[i]) : to_bfloat(t.data[i]));
      if ((piece.back() & 0x7FFF) >= infinity)
        throw Error(where + ": " + shown(t.name) + ": element " + std::to_string(i) + " is " + format_number(t.data[i]) +
                    ", too large for " + dtype + "; " + (half ? "bf16 or f32 hold it" : "f32 holds it"));
    }
    file.write({reinterpret_cast<const char*>(piece.data()), piece.size() * sizeof(uint16_t)});
  }
}

void save_safetensors(const std::string& path, std::vector<NamedTensor> tensors,
                      const std::vector<std::pair<std::string, std::string>>& metadata, const std::string& dtype) {
  if (dtype != "F32" && dtype != "F16" && dtype != "BF16") throw Error(path + ": " + dtype + " is not written; F32, F16 and BF16 are");
  const DefaultFloatMode mode;
  auto dtype_of = [&](const NamedTensor& t) { return !t.narrow ? dtype : t.narrow->precision == Precision::bf16 ? "BF16" : "I8"; };
  std::sort(tensors.begin(), tensors.end(), [&](const NamedTensor& a, const NamedTensor& b) {  // larger types first: all lie aligned
    const uint64_t size_a = dtype_size(dtype_of(a)), size_b = dtype_size(dtype_of(b));
    return size_a != size_b ? size_a > size_b : a.name < b.name;
  });
  std::string header = "{";
  for (const auto& [key, text] : metadata)
    header += (header.size() > 1 ? "," : "\"__metadata__\":{") + json_quote(key) + ":" + json_quote(text);
  if (!metadata.empty()) header += "}";
  uint64_t end = 0;
  for (size_t i = 0; i < tensors.size(); i++) {
    const auto& [name, shape, data, narrow] = tensors[i];
    const std::string type = dtype_of(tensors[i]);
    auto same_name = [&](const NamedTensor& t) { return t.name == tensors[i].name; };
    if (name == "__metadata__" || std::any_of(tensors.begin(), tensors.begin() + (int64_t)i, same_name))
      throw Error(path + ": " + shown(name) + ": this name can stand only once");
    const uint64_t begin = end;
    end += (uint64_t)shape.size() * dtype_size(type);
    header += (header.size() > 1 ? "," : "") + json_quote(name) + ":{\"dtype\":\"" + type + "\",\"shape\":" + to_string(shape) +
              ",\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
  const uint64_t n = header.size();
  AtomicFile file(path);
  file.write({reinterpret_cast<const char*>(&n), sizeof n});
  file.write(header);
  for (const NamedTensor& t : tensors) write_numbers(file, t, dtype, path);
  file.commit();
}

// ---- NumPy's arrays, folders of one writer, files of vectors ---------------------------------------------------------
std::string npy_header(int64_t rows, int64_t columns) {
  std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " + std::to_string(columns) + "), }";
  text.resize((text.size() + 1 + 10 + 63) / 64 * 64 - 11, ' ');  // all of it a multiple of 64 bytes
  text += '\n';
  return std::string("\x93NUMPY\x01\x00", 8) + (char)(text.size() & 255) + (char)(text.size() >> 8) + text;
}

// Whether the open file still stands under its name: another process may have removed it before the lock was had.
static bool bears_name(int file, const std::string& path) {
  struct stat mine, named;
  return fstat(file, &mine) == 0 && stat(path.c_str(), &named) == 0 && mine.st_ino == named.st_ino;
}

FolderLock::FolderLock(const std::string& folder) : folder_(folder), path_(folder + "/.lock") {
  std::error_code code;
  made_ = std::filesystem::create_directories(folder, code);
  if (code) throw Error(folder + ": cannot make the folder: " + code.message() + "; give another one");
  for (;;) {
    file_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file_ < 0) throw Error(folder + ": cannot write here: " + std::strerror(errno) + "; give a folder that may be written");
    if (flock(file_, LOCK_EX | LOCK_NB)) {
      char holder[256] = "";
      const ssize_t n = pread(file_, holder, sizeof holder - 1, 0);
      ::close(file_);
      throw Error(folder + ": another run is writing here (" + (n > 0 ? std::string(holder, (size_t)n) : "unknown") +
                  "); wait for it, or take another --output");
    }
    if (bears_name(file_, path_)) break;
    ::close(file_);
  }
  char host[128] = "";
  gethostname(host, sizeof host - 1);
  const std::string who = std::string(host) + " pid " + std::to_string(getpid());
  if (ftruncate(file_, 0) || pwrite(file_, who.data(), who.size(), 0) < 0) {
    // only the message for others suffers; the lock itself holds
  }
  std::error_code ignored;  // half-written files of a run that was killed: the folder is ours now
  for (std::filesystem::directory_iterator entry(folder, ignored), end; !ignored && entry != end; entry.increment(ignored))
    if (entry->path().filename().string().find(".tmp-") != std::string::npos) unlink(entry->path().c_str());
}
FolderLock::~FolderLock() {
  unlink(path_.c_str());
  ::close(file_);
  if (made_) rmdir(folder_.c_str());  // only where nothing was written to it
}

struct VectorIndex::Header {
  char magic[8] = {'b', 'e', 'r', 't', 'v', 'e', 'c', 's'};
  uint64_t version = 1;
  Key key;
  int64_t count;
  uint64_t none = 0;
};

// Whether the file is one for this key; a file that is no index at all is left alone.
bool VectorIndex::read_header(int file, const std::string& path, Header& header) const {
  static_assert(sizeof(Header) == 64);
  struct stat s {};
  const Header ours{.key = key_, .count = 0};
  if (fstat(file, &s) || (s.st_size && (pread(file, &header, sizeof header, 0) != (ssize_t)sizeof header ||
                                        std::memcmp(header.magic, ours.magic, sizeof ours.magic))))
    throw Error(path + ": there is something else than an index of vectors; give another name");
  return s.st_size && header.version == ours.version && header.key == key_ && header.count >= 0 && header.count <= key_.lines &&
         (uint64_t)s.st_size >= sizeof header + (uint64_t)(header.count * key_.dimension) * sizeof(float);
}

VectorIndex::VectorIndex(const std::string& path, const Key& key) : path_(path), key_(key) {
  Header header{.key = key, .count = 0};
  if (const int whole = ::open(path.c_str(), O_RDONLY | O_CLOEXEC); whole >= 0) {
    const std::shared_ptr<const int> closed(new int(whole), [](const int* file) { ::close(*file), delete file; });
    stale_ = !read_header(whole, path, header) || header.count != key.lines;
    if (!stale_) map(whole);
  }
  if (vectors_) return;
  const std::string part = path + ".part";
  const int file = ::open(part.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (file < 0) throw Error(path + ": cannot write: " + std::strerror(errno) + "; give --index a place that may be written");
  part_ = {new int(file), [](const int* f) { ::close(*f), delete f; }};
  if (flock(file, LOCK_EX | LOCK_NB) || !bears_name(file, part))
    throw Error(path + ": another process is making it; wait for it, or give another --index");
  if (read_header(file, part, header)) {
    count_ = header.count;
    return;
  }
  header = {.key = key, .count = 0};
  if (ftruncate(file, 0)) throw Error(part + ": cannot write: " + std::strerror(errno));
  write(&header, sizeof header, 0);
}

void VectorIndex::write(const void* bytes, size_t size, int64_t at) {
  for (size_t done = 0; done < size;) {
    const ssize_t n = pwrite(*part_, static_cast<const char*>(bytes) + done, size - done, at + (int64_t)done);
    if (n < 0 && errno != EINTR) throw Error(path_ + ".part: cannot write: " + std::strerror(errno) + "; it can go on from here later");
    done += (size_t)std::max<ssize_t>(n, 0);
  }
}

void VectorIndex::append(std::span<const float> vectors) {
  const int64_t lines = (int64_t)vectors.size() / key_.dimension, row = key_.dimension * (int64_t)sizeof(float);
  if (!part_ || lines * key_.dimension != (int64_t)vectors.size() || count_ + lines > key_.lines)
    throw Error(path_ + ": " + std::to_string(vectors.size()) + " numbers do not fit after " + std::to_string(count_) + " vectors");
  write(vectors.data(), vectors.size_bytes(), (int64_t)sizeof(Header) + count_ * row);
  if (fdatasync(*part_)) throw Error(path_ + ".part: cannot write: " + std::strerror(errno));
  count_ += lines;
  const Header header{.key = key_, .count = count_};  // after the vectors that it counts
  write(&header, sizeof header, 0);
  if (count_ < key_.lines) return;
  if (fdatasync(*part_) || rename((path_ + ".part").c_str(), path_.c_str())) throw Error(path_ + ": cannot write: " + std::strerror(errno));
  map(*part_), part_ = {};
}

void VectorIndex::map(int file) {
  const size_t size = sizeof(Header) + (size_t)(key_.lines * key_.dimension) * sizeof(float);
  void* const at = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  if (at == MAP_FAILED) throw Error(path_ + ": cannot map " + std::to_string(size) + " bytes: " + std::strerror(errno));
  const std::shared_ptr<const void> owner(at, [size](const void* p) { munmap(const_cast<void*>(p), size); });
  count_ = key_.lines;
  vectors_ =
      Tensor::borrowed({key_.lines, key_.dimension}, reinterpret_cast<const float*>(static_cast<const char*>(at) + sizeof(Header)), owner);
}

}  // namespace bert
#endif  // BERT_ISA
