// One chunk: a run of elements of one tensor, and the functions that compute a pass over it. They are compiled once for
// each instruction set (chunk_*.cpp); ops.cpp chooses.
#pragma once

#include "../contract.h"

namespace lookbehind_fused {

enum class Dtype { f64, f32, bf16, f16 };
// Those of kernels.schema, and ``keep``: the first ascent of a step where nothing is to move.
enum class Pass {
  reduce_sq_norm,
  keep,
  ascend,
  descend,
  descend_ascend,
  descend_interpolate,
  descend_align,
  interpolate
};

// What decides which function computes a pass.
struct Variant {
  Pass pass;
  Dtype dtype;
  Rule rule;
  bool adapts;   // ASAM
  bool derives;  // fast_from are the slow weights, and the fast ones what the rule has made of them
};

// The numbers of a tensor, as the compute type's: a rule's constants are in the order of its members (rules.h).
template <class T>
struct Constants {
  T rule[10];
  T scale;   // of the gradient in a descent: unscaling, clipping, the sign
  T factor;  // rho / (||T g|| + 1e-16)
  T eta;
  T alpha;
};

// Pointers to a chunk's first element. ``param`` and ``grad`` have the parameter's dtype, all others the compute
// type's; those that a pass has no use for are null. ``*_from`` may equal what is written.
struct Chunk {
  int64_t size;
  bool streams;  // results that are not read in the pass go past the caches
  void* param;
  const void* grad;
  void* perturbed;  // null unless the parameters are bf16 or fp16, and at evaluation 0
  void* slow;
  void* fast;  // null also where the next descent derives it
  const void* fast_from;
  const void* first;
  void* state[kMaxStates];
  const void* state_from[kMaxStates];
  const void* constants;
  double* sums;  // what the chunk adds to the pass's sums: 2 of reduce_sq_norm, 3 of descend_align
};

using ChunkFunction = void (*)(const Chunk&);

namespace baseline {
ChunkFunction find(const Variant&);
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LOOKBEHIND_X86 1
namespace avx2 {
ChunkFunction find(const Variant&);
}
namespace avx512 {
ChunkFunction find(const Variant&);
}
#endif

}  // namespace lookbehind_fused
