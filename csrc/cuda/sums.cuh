// Sums over all chunks in an order that never changes: of a thread's elements, a warp's threads, a block's warps, a
// tensor's blocks, a call's tensors. The last block to finish adds up what the others have left.
#pragma once

#include "memory.cuh"

namespace lookbehind_fused {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// The sum over the block's threads, for thread 0.
template <int kTerms>
__device__ __forceinline__ void sum_over_block(double (&x)[kTerms]) {
  __shared__ double of_warps[kTerms][kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int t = 0; t < kTerms; ++t) {
    for (int apart = kWarp / 2; apart > 0; apart /= 2) x[t] += __shfl_down_sync(0xffffffff, x[t], apart);
    if (lane == 0) of_warps[t][warp] = x[t];
  }
  __syncthreads();
  for (int t = 0; t < kTerms; ++t) {
    x[t] = 0;
    for (int w = 0; threadIdx.x == 0 && w < kWarps; ++w) x[t] += of_warps[t][w];
  }
  __syncthreads();  // before of_warps is written again
}

// to = the sum of ``count`` rows of kTerms numbers.
template <int kTerms>
__device__ __forceinline__ void sum_rows(double* to, const double* rows, int32_t count) {
  double x[kTerms] = {};
  for (int32_t i = threadIdx.x; i < count; i += kThreads)
    for (int t = 0; t < kTerms; ++t) x[t] += rows[int64_t(i) * kTerms + t];
  sum_over_block(x);
  if (threadIdx.x == 0)
    for (int t = 0; t < kTerms; ++t) to[t] = x[t];
}

// Whether ``count`` - 1 other blocks have come here before; what their thread 0 had stored before is then visible, and
// the counter is as it was.
__device__ __forceinline__ bool is_last(int32_t* counter, int32_t count) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == count - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// a.out = the sums over all chunks of what the threads bring; under kPerTensor in each tensor's own row.
template <class P, int kLength, int kTerms>
__device__ __forceinline__ void add_up(const Arguments& a, const Chunk<P, kLength>& chunk, double (&x)[kTerms]) {
  sum_over_block(x);
  double* own = a.partials + int64_t(blockIdx.x) * kTerms;
  if (threadIdx.x == 0)
    for (int t = 0; t < kTerms; ++t) own[t] = x[t];
  const int32_t blocks = chunk.blocks();
  if (!is_last(a.counters + 1 + chunk.tensor, blocks)) return;
  const bool per_tensor = a.flags & kPerTensor;
  double* total = per_tensor ? a.out + chunk.row * kTerms : a.tensor_sums + int64_t(chunk.tensor) * kTerms;
  sum_rows<kTerms>(total, own - int64_t(chunk.number) * kTerms, blocks);
  if (!per_tensor && is_last(a.counters, a.tensors)) sum_rows<kTerms>(a.out, a.tensor_sums, a.tensors);
}

}  // namespace cuda
}  // namespace lookbehind_fused
