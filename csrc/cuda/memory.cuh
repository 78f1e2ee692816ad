// Where the elements of a block's chunk are, and how threads read and write them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace lookbehind_fused {
namespace cuda {

constexpr int kThreads = 256;

// The type that is computed in, and that of the flat buffers.
template <class P>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }

__device__ __forceinline__ void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void round_to(float& to, float x) { to = x; }
__device__ __forceinline__ void round_to(double& to, double x) { to = x; }

// What is read or written in one access of so many bytes.
template <int kBytes>
struct Access;
template <>
struct Access<16> {
  using type = uint4;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<4> {
  using type = unsigned int;
};
template <>
struct Access<2> {
  using type = unsigned short;
};

// The elements that a thread has at once: kWide consecutive ones in one access, and kRuns such runs, each beside those
// that the block's other threads have.
template <int kWide_, int kRuns_>
struct Runs {
  static constexpr int kWide = kWide_, kRuns = kRuns_, kElements = kWide * kRuns, kApart = kThreads * kWide;
};

// A thread's elements, the first of which is at ``from``, as they are stored until each is used: widening one waits for
// its load.
template <class R, class P>
struct Stored {
  using Bits = typename Access<sizeof(P) * R::kWide>::type;
  Bits runs[R::kRuns];
  __device__ __forceinline__ explicit Stored(const P* from) {
    __builtin_assume(__isGlobal(from));
#pragma unroll
    for (int run = 0; run < R::kRuns; ++run) runs[run] = *reinterpret_cast<const Bits*>(from + run * R::kApart);
  }
  __device__ __forceinline__ typename Compute<P>::type operator[](int j) const {
    P elements[R::kWide];
    memcpy(elements, &runs[j / R::kWide], sizeof(elements));
    return widened(elements[j % R::kWide]);
  }
};

// The same as the compute type.
template <class R, class P, class T>
__device__ __forceinline__ void read(R, T (&to)[R::kElements], const P* from) {
  const Stored<R, P> stored(from);
  for (int j = 0; j < R::kElements; ++j) to[j] = stored[j];
}

template <class R, class P, class T>
__device__ __forceinline__ void write(R, P* to, const T (&from)[R::kElements]) {
  using Bits = typename Access<sizeof(P) * R::kWide>::type;
#pragma unroll
  for (int run = 0; run < R::kRuns; ++run) {
    P elements[R::kWide];
    for (int j = 0; j < R::kWide; ++j) round_to(elements[j], from[run * R::kWide + j]);
    Bits bits;
    memcpy(&bits, elements, sizeof(bits));
    __stwb(reinterpret_cast<Bits*>(to + run * R::kApart), bits);  // the default, but never taken apart
  }
}

template <int N, class T>
__device__ __forceinline__ void copy(T (&to)[N], const T (&from)[N]) {
  for (int j = 0; j < N; ++j) to[j] = from[j];
}

// The elements of this block, kLength or what is left of the tensor. In shared memory it leaves registers to loads.
template <class P, int kLength = kChunk>
struct Chunk {
  using T = typename Compute<P>::type;
  static constexpr int kWide = 16 / sizeof(T);  // consecutive elements of a thread where a chunk is walked in vectors
  static constexpr int kBlock = kThreads * kWide;
  int32_t tensor, number;  // which tensor's, and which of the tensor's
  int64_t row, size;       // of the tensor
  const double* hyper;     // its group's
  int64_t start;           // of the chunk in the flat buffers
  P* param;                // the chunk's first element
  const P* grad;
  int wide, count;  // elements that are walked in vectors, and all

  Chunk() = default;
  __device__ __forceinline__ explicit Chunk(const Arguments& a) {
    tensor = a.chunks[2 * int64_t(blockIdx.x)], number = a.chunks[2 * int64_t(blockIdx.x) + 1];
    const int64_t* of_tensor = a.rows + kColumns * int64_t(tensor);
    const int64_t begin = int64_t(number) * kLength, address = of_tensor[kAddress];
    const int64_t gradient = a.grads ? a.grads[tensor] : tensor < kInlined ? a.inlined[tensor] : 0;
    row = of_tensor[kRow], size = of_tensor[kSize], start = of_tensor[kStart] + begin;
    hyper = a.hyper + of_tensor[kGroup] * a.numbers;
    param = reinterpret_cast<P*>(address) + begin, grad = reinterpret_cast<const P*>(gradient) + begin;
    count = size - begin < kLength ? int(size - begin) : kLength;
    wide = ((address | gradient | start * int64_t(sizeof(T))) & 15) == 0 ? count / kBlock * kBlock : 0;
  }

  // The number of blocks that the tensor has.
  __device__ __forceinline__ int32_t blocks() const {
    return size > kLength ? int32_t((size + kLength - 1) / kLength) : 1;
  }

  // The chunk's element i in a flat buffer.
  __device__ __forceinline__ T* in(void* buffer, int i) const { return static_cast<T*>(buffer) + (start + i); }
  __device__ __forceinline__ const T* in(const void* buffer, int i) const {
    return static_cast<const T*>(buffer) + (start + i);
  }
};

// Call f(Runs, i) for all of this thread's elements, from element i of the chunk on: vectors as far as addresses and
// size allow, kRuns of them at once while there are as many, then one element at a time. For all that the compiler
// knows, a store may be to where a later load is from: only what f reads before it writes is under way at once.
template <int kRuns, class P, int kLength, class F>
__device__ __forceinline__ void walk(const Chunk<P, kLength>& chunk, const F& f) {
  constexpr int kWide = Chunk<P>::kWide, kBlock = Chunk<P>::kBlock;
  int i = threadIdx.x * kWide;
#pragma unroll 1
  for (; kRuns > 1 && i < chunk.wide - (kRuns - 1) * kBlock; i += kRuns * kBlock) f(Runs<kWide, kRuns>(), i);
#pragma unroll 1
  for (; i < chunk.wide; i += kBlock) f(Runs<kWide, 1>(), i);
#pragma unroll 1
  for (i = chunk.wide + threadIdx.x; i < chunk.count; i += kThreads) f(Runs<1, 1>(), i);
}

}  // namespace cuda
}  // namespace lookbehind_fused
