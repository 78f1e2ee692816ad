// The numbers that Python and these sources have to agree about, and the only place where they stand in C++ and CUDA.
// Python's are in lookbehind_fused/kernels/contract.py, which says what they mean; when the library is loaded the two
// are compared, entry by entry (contract.cpp).
#pragma once

#include <stdint.h>

namespace lookbehind_fused {

enum Flag : int64_t {
  kAdaptive = 1,
  kPerTensor = 2,
  kMaximize = 4,
  kNesterov = 8,
  kDecoupled = 16,
  kDerives = 32,
  kSkips = 64
};

enum class Rule { none, sgd, momentum, adam, amsgrad };

// Where the numbers of a pass stand in a row of ``hyper``,
enum Hyper { kRho, kEta, kAlpha, kMaxGradNorm, kUnscale, kOfRule };
// and where a rule's own do.
enum OfSgd { kSgdLr = kOfRule, kSgdMomentum, kSgdDampening, kSgdWeightDecay, kSgdEnd };
enum OfAdam { kAdamLr = kOfRule, kAdamBeta1, kAdamBeta2, kAdamEps, kAdamWeightDecay, kAdamEnd };

// The columns of ``table``; kSizes is the first of the sizes, and as many strides follow them.
enum Column { kRow, kStart, kSize, kGroup, kAddress, kSizes };

constexpr int kInlined = 440;  // gradients whose addresses go with a launch of the CUDA backend

// How many buffers a rule's state has, and how many numbers of its own.
struct Extent {
  int buffers, numbers;
};
constexpr int kRules = 5;
constexpr Extent kExtents[kRules] = {
    {0, 0}, {0, kSgdEnd - kOfRule}, {1, kSgdEnd - kOfRule}, {2, kAdamEnd - kOfRule}, {3, kAdamEnd - kOfRule}};
constexpr int kMaxStates = 3;

inline const Extent& extent_of(Rule rule) { return kExtents[int(rule)]; }

}  // namespace lookbehind_fused
