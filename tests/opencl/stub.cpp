// An OpenCL library that computes on the CPU by plain loops, knows only the engine's two kernels, and can be told to fail.
// tests/test_opencl.cpp builds it, with one of these or none:
//   -DEMPTY         no function is there           -DREFUSES          every call fails
//   -DNO_BUILD      kernels do not build           -DGARBAGE          kernels compute nothing
//   -DLAUNCHES=n    the device is lost after n kernels   -DBYTES=n    memory for so many bytes
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#ifndef LAUNCHES
#define LAUNCHES INT64_MAX
#endif
#ifndef BYTES
#define BYTES INT64_MAX
#endif
#ifdef EMPTY
extern "C" int nothing_of_use() { return 0; }
#elif defined(REFUSES)
#define REFUSE(name) \
  extern "C" int name() { return -30; }
#define REFUSE_ALL(a, b, c, d) REFUSE(a) REFUSE(b) REFUSE(c) REFUSE(d)
REFUSE_ALL(clGetPlatformIDs, clGetPlatformInfo, clGetDeviceIDs, clGetDeviceInfo)
REFUSE_ALL(clCreateContext, clCreateCommandQueue, clCreateBuffer, clReleaseMemObject)
REFUSE_ALL(clCreateProgramWithSource, clBuildProgram, clGetProgramBuildInfo, clCreateKernel)
REFUSE_ALL(clSetKernelArg, clEnqueueNDRangeKernel, clEnqueueReadBuffer, clEnqueueWriteBuffer)
REFUSE(clFinish)
#else
namespace {
using Handle = void*;
struct Buffer {
  size_t size;
  char* bytes;
};
struct Kernel {
  bool product;
  char args[16][8];
  template <class T>
  T arg(int i) const {
    T v;
    std::memcpy(&v, args[i], sizeof v);
    return v;
  }
  float* floats(int i) const { return (float*)arg<Buffer*>(i)->bytes; }
};
Kernel product{true, {}}, finish{false, {}};
int something;  // what handles of no interest point to
int64_t launches = 0, bytes = 0;

int give(const void* value, size_t size, size_t room, void* to, size_t* needed) {
  if (needed) *needed = size;
  if (to) std::memcpy(to, value, size < room ? size : room);
  return 0;
}
int give(const char* text, size_t room, void* to, size_t* needed) { return give(text, std::strlen(text) + 1, room, to, needed); }

void multiply(const Kernel& k) {
  const int m = k.arg<int>(0), n = k.arg<int>(1), depth = k.arg<int>(2), a_row = k.arg<int>(4), a_step = k.arg<int>(5),
            b_row = k.arg<int>(7), b_step = k.arg<int>(8);
  const float *a = k.floats(3), *b = k.floats(6);
  float* c = k.floats(9);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float sum = k.arg<int>(10) ? c[i * n + j] : 0;
      for (int64_t q = 0; q < depth; q++) sum += a[i * a_row + q * a_step] * b[q * b_row + j * b_step];
      c[i * n + j] = sum;
    }
}
void complete(const Kernel& k, int64_t rows) {
  const int n = k.arg<int>(0), act = k.arg<int>(6);
  float *c = k.floats(1), *bias = k.floats(2), *pre = k.floats(4);
  for (int64_t at = 0; at < rows * n; at++) {
    const float z = c[at] + (k.arg<int>(3) ? bias[at % n] : 0);
    if (k.arg<int>(5)) pre[at] = z;
    c[at] = act == 1 ? z * std::erfc(-z / std::sqrt(2.f)) / 2 : act == 4 ? std::fmax(z, 0.f) : z;
  }
}
}  // namespace

extern "C" {
int clGetPlatformIDs(uint32_t, Handle* to, uint32_t* count) { return *to = &something, *count = 1, 0; }
int clGetPlatformInfo(Handle, uint32_t, size_t room, void* to, size_t* needed) { return give("Stub", room, to, needed); }
int clGetDeviceIDs(Handle, uint64_t, uint32_t, Handle* to, uint32_t* count) { return *to = &something, *count = 1, 0; }
int clGetDeviceInfo(Handle, uint32_t what, size_t room, void* to, size_t* needed) {
  if (what == 0x102B || what == 0x102D) return give(what == 0x102B ? "Stub device" : "7", room, to, needed);
  const int64_t number = what == 0x1000 ? 4 : what == 0x101B ? 0 : what == 0x1004 ? 64 : 1 << 20;  // a GPU, groups of 64; 1 MiB of all else
  return give(&number, room, room, to, needed);
}
Handle clCreateContext(const intptr_t*, uint32_t, const Handle*, void*, void*, int32_t* code) { return *code = 0, &something; }
Handle clCreateCommandQueue(Handle, Handle, uint64_t, int32_t* code) { return *code = 0, &something; }
Handle clCreateBuffer(Handle, uint64_t, size_t size, void*, int32_t* code) {
  *code = bytes + (int64_t)size > BYTES ? -4 : 0;
  if (*code) return nullptr;
  bytes += (int64_t)size;
  return new Buffer{size, (char*)std::calloc(size, 1)};
}
int clReleaseMemObject(Handle h) {
  Buffer* b = (Buffer*)h;
  bytes -= (int64_t)b->size;
  std::free(b->bytes);
  delete b;
  return 0;
}
Handle clCreateProgramWithSource(Handle, uint32_t, const char* const*, const size_t*, int32_t* code) { return *code = 0, &something; }
int clBuildProgram(Handle, uint32_t, const Handle*, const char*, void*, void*) {
#ifdef NO_BUILD
  return -11;
#else
  return 0;
#endif
}
int clGetProgramBuildInfo(Handle, Handle, uint32_t, size_t room, void* to, size_t* needed) {
  return give("kernel.cl:7: error: no such thing\nand more", room, to, needed);
}
Handle clCreateKernel(Handle, const char* name, int32_t* code) { return *code = 0, std::strcmp(name, "product") ? &finish : &product; }
int clSetKernelArg(Handle kernel, uint32_t i, size_t size, const void* value) {
  std::memcpy(((Kernel*)kernel)->args[i], value, size);
  return 0;
}
int clEnqueueNDRangeKernel(Handle, Handle kernel, uint32_t, const size_t*, const size_t* global, const size_t*, uint32_t, const Handle*,
                           Handle*) {
  if (launches++ >= LAUNCHES) return -5;
#ifndef GARBAGE
  const Kernel& k = *(Kernel*)kernel;
  k.product ? multiply(k) : complete(k, (int64_t)global[1]);
#endif
  return 0;
}
int clEnqueueReadBuffer(Handle, Handle from, uint32_t, size_t at, size_t size, void* to, uint32_t, const Handle*, Handle*) {
  std::memcpy(to, ((Buffer*)from)->bytes + at, size);
  return 0;
}
int clEnqueueWriteBuffer(Handle, Handle to, uint32_t, size_t at, size_t size, const void* from, uint32_t, const Handle*, Handle*) {
  std::memcpy(((Buffer*)to)->bytes + at, from, size);
  return 0;
}
int clFinish(Handle) { return launches > LAUNCHES ? -36 : 0; }
}
#endif
