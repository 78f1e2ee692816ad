// The numbers of a pass that all elements of a tensor share, in double, on the host and on the device, where one thread
// of a block computes them. The definition of every formula is lookbehind_fused/kernels/reference.py.
#pragma once

#include <math.h>
#include <stdint.h>

#include "contract.h"
#include "rules.h"

namespace lookbehind_fused {

constexpr double kNormEpsilon = 1e-16;
constexpr double kClipEpsilon = 1e-6;

// ||T g||^2 and ||g||^2: the sums over all buckets' rows of ``sq_norms``, which is null where a pass needs none.
struct SqNorms {
  bool given;
  double scaled = 0, plain = 0;
  LOOKBEHIND_INLINE SqNorms(const double* sq_norms, int64_t buckets) : given(sq_norms) {
#pragma unroll 1
    for (int64_t b = 0; b < (given ? buckets : 0); ++b) scaled += sq_norms[2 * b], plain += sq_norms[2 * b + 1];
  }
  LOOKBEHIND_INLINE bool finite() const { return scaled - scaled == 0 && plain - plain == 0; }
};

LOOKBEHIND_INLINE double ascent_factor(const double* hyper, const SqNorms& norms) {
  return hyper[kRho] / (square_root(norms.scaled) + kNormEpsilon);
}

// What a descent multiplies the gradient by: unscaling, clipping, and the sign of a gradient that is to be climbed.
LOOKBEHIND_INLINE double gradient_scale(const double* hyper, const SqNorms& norms, int64_t flags) {
  const double unscale = hyper[kUnscale], most = hyper[kMaxGradNorm];
  const double scale = flags & kMaximize ? -unscale : unscale;
  if (!norms.given) return scale;
  const double norm = (unscale < 0 ? -unscale : unscale) * square_root(norms.plain);
  const double clip = most / (norm + kClipEpsilon);
  return clip > 1.0 || most - most != 0 ? scale : scale * clip;  // NaN stays NaN
}

// (cos + 1) / 2; the cosine of a zero vector is 0.
LOOKBEHIND_INLINE double adaptive_alpha(double dot, double a, double b) {
  const double norms = square_root(a) * square_root(b);
  const double cosine = norms == 0 ? 0.0 : dot / norms;
  return ((cosine > 1.0 ? 1.0 : cosine < -1.0 ? -1.0 : cosine) + 1) / 2;  // NaN stays NaN
}

// base^exponent. The host's pow gives torch's bits; on a device, by squares, since a library's pow is slow.
LOOKBEHIND_INLINE double power(double base, int exponent) {
#ifndef __CUDA_ARCH__
  return pow(base, exponent);
#else
  double result = 1;
#pragma unroll 1
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
#endif
}

// ---- a rule's numbers at a tensor's update number ``step``; ``hyper`` is a row of hyper
// ------------------------------

template <class T>
LOOKBEHIND_INLINE void set_rule(NoRule<T>&, const double*, int64_t, int) {}

template <class T, int kMomentum>
LOOKBEHIND_INLINE void set_rule(Sgd<T, kMomentum>& rule, const double* hyper, int64_t flags, int step) {
  const double momentum = hyper[kSgdMomentum], dampening = hyper[kSgdDampening];
  rule.lr = T(hyper[kSgdLr]), rule.weight_decay = T(hyper[kSgdWeightDecay]);
  rule.keep = T(step == 1 ? 0 : momentum), rule.gain = T(step == 1 ? 1 : 1 - dampening);
  rule.direct = T(flags & kNesterov ? 1 : 0), rule.through = T(flags & kNesterov ? momentum : 1);
}

template <class T>
LOOKBEHIND_INLINE void set_corrections(T& step_size, T& root, const double* hyper, int step) {
  step_size = T(hyper[kAdamLr] / (1 - power(hyper[kAdamBeta1], step)));
  root = T(square_root(1 - power(hyper[kAdamBeta2], step)));
}

template <class T, int kWithAmsgrad>
LOOKBEHIND_INLINE void set_rule(Adam<T, kWithAmsgrad>& rule, const double* hyper, int64_t flags, int step) {
  const double beta1 = hyper[kAdamBeta1], beta2 = hyper[kAdamBeta2], weight_decay = hyper[kAdamWeightDecay];
  set_corrections(rule.step_size, rule.root, hyper, step);
  rule.step_size_before = rule.root_before = 0;
  if (flags & kDerives) set_corrections(rule.step_size_before, rule.root_before, hyper, step - 1);
  rule.rest1 = T(1 - beta1), rule.beta2 = T(beta2), rule.rest2 = T(1 - beta2), rule.eps = T(hyper[kAdamEps]);
  rule.coupled = T(flags & kDecoupled ? 0 : weight_decay);
  rule.shrink = T(flags & kDecoupled ? 1 - hyper[kAdamLr] * weight_decay : 1);
}

}  // namespace lookbehind_fused
