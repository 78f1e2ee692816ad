// The algebra of one element, written once for host and device: load once, compute in T, store once. Tiling, addresses
// and sums over elements stay outside. T is float, or double for double parameters. The definition of every formula is
// lookbehind_fused/kernels/reference.py; names are the same there.
//
// Products and sums are fused exactly where torch's own kernels fuse them (compile with -ffp-contract=off), so that SGD
// and Adam here give torch's bits on the same machine.
#pragma once

#ifdef __CUDACC__
#define LOOKBEHIND_INLINE __host__ __device__ __forceinline__
#else
#define LOOKBEHIND_INLINE inline __attribute__((always_inline))
#endif

namespace lookbehind_fused {

// a * b + c, rounded once where the hardware can. (LOOKBEHIND_FMA: g++ does not define __FMA__ after a target pragma.)
#ifdef __CUDA_ARCH__
LOOKBEHIND_INLINE float fused(float a, float b, float c) { return fmaf(a, b, c); }
LOOKBEHIND_INLINE double fused(double a, double b, double c) { return fma(a, b, c); }
LOOKBEHIND_INLINE float square_root(float x) { return sqrtf(x); }
LOOKBEHIND_INLINE double square_root(double x) { return sqrt(x); }
#else
#if defined(LOOKBEHIND_FMA) || defined(__FMA__) || defined(__aarch64__)
LOOKBEHIND_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LOOKBEHIND_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
LOOKBEHIND_INLINE float fused(float a, float b, float c) { return a * b + c; }
LOOKBEHIND_INLINE double fused(double a, double b, double c) { return a * b + c; }
#endif
LOOKBEHIND_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
LOOKBEHIND_INLINE double square_root(double x) { return __builtin_sqrt(x); }
#endif

// slow + alpha * (fast - slow) as torch.lerp computes it: alpha = 1 gives exactly fast.
template <class T>
LOOKBEHIND_INLINE T interpolated(T slow, T fast, T alpha) {
  const T difference = fast - slow;
  return alpha < T(0.5) ? fused(alpha, difference, slow) : fused(alpha - T(1), difference, fast);
}

// ---- base_optimizer(fast, g): w and the state move by the gradient g -----------------------------------------------
//
// A rule that can be derived has the second half of an update alone as well: derive() moves w by the state that the
// update before this one has left.

// The base optimizer has moved w already.
template <class T>
struct NoRule {
  static constexpr int kStates = 0;
  static constexpr bool kDerives = false;
  LOOKBEHIND_INLINE void operator()(T&, T, T*) const {}
};

// torch.optim.SGD with (kMomentum = 1) or without (0) a momentum buffer. At a tensor's first update keep = 0 and gain =
// 1: the momentum is the gradient itself. Nesterov's step is g + momentum * buffer (direct = 1, through = momentum),
// otherwise the buffer alone (direct = 0, through = 1).
template <class T, int kMomentum>
struct Sgd {
  static constexpr int kStates = kMomentum;
  static constexpr bool kDerives = kMomentum;  // but for Nesterov's step, which the gradient is a part of
  T lr, weight_decay, keep, gain, direct, through;
  LOOKBEHIND_INLINE void operator()(T& w, T g, T* state) const {
    g = fused(weight_decay, w, g);
    if constexpr (kMomentum) {
      state[0] = fused(gain, g, keep * state[0]);
      g = fused(through, state[0], direct * g);
    }
    w = fused(-lr, g, w);
  }
  LOOKBEHIND_INLINE void derive(T& w, const T* state) const { w = fused(-lr, state[0], w); }
};

// torch.optim.Adam and AdamW: state is exp_avg, exp_avg_sq and, with kAmsgrad = 1, max_exp_avg_sq. Bias corrections
// belong to one tensor's step count: step_size = lr / (1 - beta1^step), root = sqrt(1 - beta2^step), and those of the
// update before. Coupled decay adds coupled * w to the gradient, decoupled decay multiplies w by shrink.
template <class T, int kWithAmsgrad>
struct Adam {
  static constexpr int kStates = 2 + kWithAmsgrad;
  static constexpr bool kDerives = true;
  T step_size, root, rest1, beta2, rest2, eps, coupled, shrink, step_size_before, root_before;
  LOOKBEHIND_INLINE void operator()(T& w, T g, T* state) const {
    g = fused(coupled, w, g);
    state[0] = interpolated(state[0], g, rest1);
    state[1] = fused(rest2 * g, g, beta2 * state[1]);
    if constexpr (kWithAmsgrad) state[2] = state[2] > state[1] ? state[2] : state[1];
    move(w, state, step_size, root);
  }
  LOOKBEHIND_INLINE void derive(T& w, const T* state) const { move(w, state, step_size_before, root_before); }
  LOOKBEHIND_INLINE void move(T& w, const T* state, T by, T correction) const {
    w *= shrink;
    w -= by * state[0] / (square_root(state[1 + kWithAmsgrad]) / correction + eps);
  }
};

// ---- the other halves of a pass ------------------------------------------------------------------------------------

// ASAM's T_w = |w| + eta, or 1.
template <bool kAdapts, class T>
LOOKBEHIND_INLINE T scaling(T w, T eta) {
  return kAdapts ? (w < 0 ? -w : w) + eta : T(1);
}

// perturbed + factor * T^2 g, where factor = rho / (||T g|| + 1e-16).
template <bool kAdapts, class T>
LOOKBEHIND_INLINE T ascended(T w, T g, T factor, T eta) {
  const T t = scaling<kAdapts>(w, eta);
  return w + t * t * g * factor;
}

}  // namespace lookbehind_fused
