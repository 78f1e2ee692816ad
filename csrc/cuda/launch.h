// What a kernel is given, and how it is launched: all that ops.cpp, which is compiled with torch's headers, and the
// kernels, which are not, have in common.
#pragma once

#include <stdint.h>

#include "../cpu/chunk.h"

namespace lookbehind_fused {
namespace cuda {

constexpr int kChunk = 4096;            // elements of a block of threads,
constexpr int kSpan = 8 * kChunk;       // and of one that writes none: it has as much to do
constexpr int kColumns = kAddress + 1;  // of ``table``, that kernels are given
// Addresses in device memory; null where a pass has no use for them. lookbehind_fused/kernels/device.py says what the
// tables hold. Flat buffers are in the type that is computed in.
struct Arguments {
  const int64_t* rows;    // of each tensor: the columns of ``table`` up to the address
  const int32_t* chunks;  // of each block: its tensor and its number within that tensor
  const int64_t*
      grads;  // of each tensor: its gradient's address; null where ``inlined`` has them, or where there are none
  void* perturbed;
  void* slow;
  void* fast;
  const void* fast_from;
  const void* first;
  void* state[kMaxStates];
  const void* state_from[kMaxStates];
  float* steps;
  const float* steps_from;
  const double* sq_norms;
  int64_t buckets;  // rows of sq_norms, or of sums
  const double* hyper;
  int64_t numbers;  // columns of hyper, which has a row for each group
  const double* sums;
  double* partials;     // room for a sum of each block,
  double* tensor_sums;  // and for one of each tensor
  int32_t* counters;    // 1 + tensors, zero before and after a launch
  int32_t tensors;
  double* out;    // the sums
  int32_t* done;  // where a launch is noted
  int64_t flags;
  int64_t inlined[kInlined];
};
static_assert(sizeof(Arguments) <= 4096, "what a launch takes on every GPU");

// Launch a pass on ``stream`` (a cudaStream_t) with ``blocks`` blocks; of none, look whether there is code for the
// current device. Returns null, or CUDA's message if it does not take the launch.
const char* launch_f64(Pass pass, Rule rule, const Arguments& arguments, uint32_t blocks, void* stream);
const char* launch_f32(Pass pass, Rule rule, const Arguments& arguments, uint32_t blocks, void* stream);
const char* launch_bf16(Pass pass, Rule rule, const Arguments& arguments, uint32_t blocks, void* stream);
const char* launch_f16(Pass pass, Rule rule, const Arguments& arguments, uint32_t blocks, void* stream);

}  // namespace cuda
}  // namespace lookbehind_fused
