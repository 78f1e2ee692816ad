// The passes: a block of threads computes one chunk of one tensor. What differs from call to call and costs nothing on
// kernels that wait for memory is decided as they run: ASAM, clipping, which buffers there are. Compiled once for each
// dtype of parameters (kernels_*.cu).
#pragma once

#include "../numbers.h"
#include "memory.cuh"
#include "sums.cuh"

namespace lookbehind_fused {
namespace cuda {

// 64 registers: four blocks run on a multiprocessor, each thread with up to ten 16-byte loads under way. Adam in
// double would spill some of them: 128.
#define LOOKBEHIND_KERNEL __global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 2 : 4)

// How many runs of each array a thread reads before it uses the first, by how many arrays it keeps in registers. Twice
// as many runs of more than two arrays would be spilled by some kernel.
__device__ constexpr int runs_of(int arrays) { return arrays <= 2 ? 4 : arrays <= 5 ? 2 : 1; }

// ASAM or not, as the kernels decide it.
template <class T>
__device__ __forceinline__ T scaling(bool adapts, T w, T eta) {
  return adapts ? lookbehind_fused::scaling<true>(w, eta) : T(1);
}

// Says that this launch has taken place, if anybody asks; by one thread of each block.
__device__ __forceinline__ void note(const Arguments& a) {
  if (a.done && blockIdx.x == 0) *a.done = 1;
}

// The sums of squares of T g and of g over this thread's elements; those that it has at once are added up in T.
template <class T, int kRuns, class P>
__device__ __forceinline__ void sum_squares(double (&sums)[2], const Arguments& a, const Chunk<P, kSpan>& chunk,
                                            T eta) {
  const bool adapts = a.flags & kAdaptive;
  sums[0] = sums[1] = 0;
  walk<kRuns>(chunk, [&](auto runs, int i) {
    constexpr int N = runs.kElements;
    const Stored<decltype(runs), P> g(chunk.grad + i);
    T w[N] = {};
    if (adapts && a.perturbed) read(runs, w, chunk.in(a.perturbed, i));
    if (adapts && !a.perturbed) read(runs, w, chunk.param + i);
    T scaled = 0, plain = 0;
    for (int j = 0; j < N; ++j) {
      const T own = g[j], x = scaling(adapts, w[j], eta) * own;
      plain += own * own, scaled += x * x;
    }
    sums[0] += scaled, sums[1] += plain;
  });
}

template <class P>
LOOKBEHIND_KERNEL reduce_sq_norm(const __grid_constant__ Arguments a) {
  using T = typename Compute<P>::type;
  __shared__ Chunk<P, kSpan> chunk;
  __shared__ T eta;
  if (threadIdx.x == 0) {
    chunk = Chunk<P, kSpan>(a);
    if (a.flags & kAdaptive) eta = T(chunk.hyper[kEta]);
  }
  __syncthreads();
  double sums[2];
  sum_squares<T, runs_of(2)>(sums, a, chunk, eta);
  // The square of a finite float may not be one: where there is an infinite sum, this thread's terms in double.
  if constexpr (sizeof(T) < sizeof(double))
    if (isinf(sums[0]) || isinf(sums[1])) sum_squares<double, 1>(sums, a, chunk, eta);
  add_up(a, chunk, sums);
}

template <class T>
struct Ascent {
  T factor, eta;
  bool adapts, skips;  // skips: the gradient is not finite
  __device__ __forceinline__ Ascent(const Arguments& a, const SqNorms& norms, const double* hyper) {
    factor = T(ascent_factor(hyper, norms)), eta = T(hyper[kEta]);
    adapts = a.flags & kAdaptive, skips = a.flags & kSkips && !norms.finite();
  }
  Ascent() = default;
  __device__ __forceinline__ T operator()(T w, T g) const {
    if (skips) return w;
    return adapts ? ascended<true>(w, g, factor, eta) : ascended<false>(w, g, factor, eta);
  }
};

// Moves the perturbed weights; where there is ``slow``, keeps the weights there first.
template <class P>
LOOKBEHIND_KERNEL ascend(const __grid_constant__ Arguments a) {
  using T = typename Compute<P>::type;
  __shared__ Chunk<P> chunk;
  __shared__ Ascent<T> ascent;
  if (threadIdx.x == 0) {
    chunk = Chunk<P>(a);
    ascent = Ascent<T>(a, SqNorms(a.sq_norms, a.buckets), chunk.hyper);
    note(a);
  }
  __syncthreads();
  walk<runs_of(2)>(chunk, [&](auto runs, int i) {
    constexpr int N = runs.kElements;
    const Stored<decltype(runs), P> g(chunk.grad + i);
    T w[N];
    if (a.slow || !a.perturbed)
      read(runs, w, chunk.param + i);
    else
      read(runs, w, chunk.in(a.perturbed, i));
    if (a.slow) write(runs, chunk.in(a.slow, i), w);
    for (int j = 0; j < N; ++j) w[j] = ascent(w[j], g[j]);
    if (a.perturbed) write(runs, chunk.in(a.perturbed, i), w);
    write(runs, chunk.param + i, w);
  });
}

template <class T, class Update>
struct Descent {
  Update update;
  T scale, alpha;
  bool derives, skips;
  float step;  // how many updates the tensor has had after this one
  __device__ __forceinline__ Descent(const Arguments& a, const SqNorms& norms, int64_t row, const double* hyper) {
    derives = a.flags & kDerives, skips = a.flags & kSkips && !norms.finite();
    scale = T(gradient_scale(hyper, norms, a.flags)), alpha = T(hyper[kAlpha]);
    step = a.steps_from[row] + 1;
    set_rule(update, hyper, a.flags, int(step));
    if (skips) step -= 1;
  }
  Descent() = default;
  // Moves w and the state. Returns the fast weight before, which may have to be derived first. The numbers are read
  // from shared memory for every element: kept from one to the next, they would take registers from loads.
  __device__ __forceinline__ T operator()(T& w, T g, T* state) const {
    asm volatile("" ::: "memory");
    if constexpr (Update::kDerives)
      if (derives) update.derive(w, state);
    const T before = w;
    if (!skips) update(w, g * scale, state);
    return before;
  }
};

// The alignment sums of this thread's elements in double, of what their last descent has left: fast_k in the place of
// the perturbed weights. Where fast_1 is derived, the descent has written another state than it has read, as in every
// program.
template <class P, class Update>
__device__ __forceinline__ void align_again(double (&sums)[3], const Arguments& a, const Chunk<P>& chunk,
                                            const Descent<typename Compute<P>::type, Update>& descent) {
  using T = typename Compute<P>::type;
  constexpr int kStates = Update::kStates;
  double ab = 0, aa = 0, bb = 0;
  walk<1>(chunk, [&](auto runs, int i) {
    constexpr int N = runs.kElements;
    T fast_1[N], origin[N], w[N], state[kStates + 1][N];
    read(runs, fast_1, chunk.in(a.fast_from, i));
    copy(origin, fast_1);
    if (a.slow) read(runs, origin, chunk.in(static_cast<const void*>(a.slow), i));
    if (a.first) read(runs, fast_1, chunk.in(a.first, i));
    for (int s = 0; s < kStates; ++s) read(runs, state[s], chunk.in(a.state_from[s], i));
    if (a.perturbed)
      read(runs, w, chunk.in(a.perturbed, i));
    else
      read(runs, w, chunk.param + i);
    for (int j = 0; j < N; ++j) {
      T own[kStates + 1];
      for (int s = 0; s < kStates; ++s) own[s] = state[s][j];
      if constexpr (Update::kDerives)
        if (descent.derives) descent.update.derive(fast_1[j], own);
      const double to_first = fast_1[j] - origin[j], to_last = w[j] - origin[j];
      ab += to_first * to_last, aa += to_first * to_first, bb += to_last * to_last;
    }
  });
  sums[0] = ab, sums[1] = aa, sums[2] = bb;
}

// Every pass that descends: what happens to the moved fast weights is the only difference. ``slow`` is null where
// ``fast_from`` holds the slow weights, at inner step 1 and where the fast ones are derived.
template <class P, class Update, Pass kPass>
LOOKBEHIND_KERNEL descend(const __grid_constant__ Arguments a) {
  using T = typename Compute<P>::type;
  constexpr int kStates = Update::kStates;
  constexpr bool kAscends = kPass == Pass::descend_ascend, kAligns = kPass == Pass::descend_align;
  constexpr bool kHasOrigin = kAligns || kPass == Pass::descend_interpolate;
  __shared__ Chunk<P> chunk;
  __shared__ Descent<T, Update> descent;
  __shared__ Ascent<T> ascent;
  __shared__ bool undone;  // the step does not take place: its weights are the slow ones, its state stays
  if (threadIdx.x == 0) {
    chunk = Chunk<P>(a);
    const SqNorms norms(a.sq_norms, a.buckets);
    descent = Descent<T, Update>(a, norms, chunk.row, chunk.hyper);
    undone = kHasOrigin && descent.skips;
    if (chunk.number == 0 && !undone) a.steps[chunk.row] = descent.step;
    if (kAscends) ascent = Ascent<T>(a, norms, chunk.hyper);
    if (kHasOrigin) note(a);
  }
  __syncthreads();
  T ab = 0, aa = 0, bb = 0;
  constexpr int kArrays = 2 + kStates + kAscends + 2 * kHasOrigin + kAligns;  // w and its origin are kept side by side
  walk<runs_of(kArrays)>(chunk, [&](auto runs, int i) {
    constexpr int N = runs.kElements;
    const Stored<decltype(runs), P> g(chunk.grad + i);
    T w[N], state[kStates + 1][N], x[N], origin[N], first[N] = {};
    read(runs, w, chunk.in(a.fast_from, i));
    for (int s = 0; s < kStates; ++s) read(runs, state[s], chunk.in(a.state_from[s], i));
    if (kAscends && a.perturbed) read(runs, x, chunk.in(a.perturbed, i));
    if (kAscends && !a.perturbed) read(runs, x, chunk.param + i);
    if (kAligns && a.first) read(runs, first, chunk.in(a.first, i));
    if (kHasOrigin && a.slow)
      read(runs, origin, chunk.in(static_cast<const void*>(a.slow), i));
    else
      copy(origin, w);  // last, since it waits for w
    for (int j = 0; j < N; ++j) {
      T own[kStates + 1];
      for (int s = 0; s < kStates; ++s) own[s] = state[s][j];
      T fast_1 = descent(w[j], g[j], own);
      for (int s = 0; s < kStates; ++s) state[s][j] = own[s];
      if (kAscends) x[j] = ascent(x[j], g[j]);
      if (kAligns && a.first) fast_1 = first[j];
      if (kHasOrigin && undone) fast_1 = w[j] = origin[j];
      if (kPass == Pass::descend_interpolate) x[j] = interpolated(origin[j], w[j], descent.alpha);
      if (kAligns) {
        const T to_first = fast_1 - origin[j], to_last = w[j] - origin[j];
        x[j] = w[j], ab += to_first * to_last, aa += to_first * to_first, bb += to_last * to_last;
      }
    }
    for (int s = 0; s < kStates; ++s)
      if (!kHasOrigin || !undone) write(runs, chunk.in(a.state[s], i), state[s]);
    if (!kHasOrigin && a.fast) write(runs, chunk.in(a.fast, i), w);
    if ((kAscends || kAligns) && a.perturbed) write(runs, chunk.in(a.perturbed, i), x);
    if (kAscends || kHasOrigin) write(runs, chunk.param + i, x);
  });
  if constexpr (kAligns) {
    double sums[] = {double(ab), double(aa), double(bb)};
    if constexpr (sizeof(T) < sizeof(double))
      if (isinf(aa) || isinf(bb)) align_again(sums, a, chunk, descent);  // as in reduce_sq_norm
    add_up(a, chunk, sums);
  }
}

// New weights between slow and fast_k with alpha*.
template <class P>
LOOKBEHIND_KERNEL interpolate(const __grid_constant__ Arguments a) {
  using T = typename Compute<P>::type;
  __shared__ Chunk<P> chunk;
  __shared__ T alpha;
  if (threadIdx.x == 0) {
    chunk = Chunk<P>(a);
    const bool per_tensor = a.flags & kPerTensor;
    double sums[3] = {};
#pragma unroll 1
    for (int64_t i = per_tensor ? chunk.row : 0; i < (per_tensor ? chunk.row + 1 : a.buckets); ++i)
      for (int t = 0; t < 3; ++t) sums[t] += a.sums[3 * i + t];
    alpha = T(adaptive_alpha(sums[0], sums[1], sums[2]));
  }
  __syncthreads();
  walk<runs_of(2)>(chunk, [&](auto runs, int i) {
    constexpr int N = runs.kElements;
    T slow[N], fast[N];
    read(runs, slow, chunk.in(static_cast<const void*>(a.slow), i));
    if (a.perturbed)
      read(runs, fast, chunk.in(a.perturbed, i));
    else
      read(runs, fast, chunk.param + i);
    for (int j = 0; j < N; ++j) fast[j] = interpolated(slow[j], fast[j], alpha);
    write(runs, chunk.param + i, fast);
  });
}

// ---- which kernel, and its launch -----------------------------------------------------------------------------------

using Kernel = void (*)(Arguments);

template <class P, class Update>
Kernel find_descent(Pass pass) {
  switch (pass) {
    case Pass::descend:
      return descend<P, Update, Pass::descend>;
    case Pass::descend_ascend:
      return descend<P, Update, Pass::descend_ascend>;
    case Pass::descend_interpolate:
      return descend<P, Update, Pass::descend_interpolate>;
    default:
      return descend<P, Update, Pass::descend_align>;
  }
}

template <class P>
Kernel find(Pass pass, Rule rule) {
  using T = typename Compute<P>::type;
  if (pass == Pass::reduce_sq_norm) return reduce_sq_norm<P>;
  if (pass == Pass::ascend) return ascend<P>;
  if (pass == Pass::interpolate) return interpolate<P>;
  switch (rule) {
    case Rule::sgd:
      return find_descent<P, Sgd<T, 0>>(pass);
    case Rule::momentum:
      return find_descent<P, Sgd<T, 1>>(pass);
    case Rule::adam:
      return find_descent<P, Adam<T, 0>>(pass);
    case Rule::amsgrad:
      return find_descent<P, Adam<T, 1>>(pass);
    default:
      return find_descent<P, NoRule<T>>(pass);
  }
}

template <class P>
const char* launch(Pass pass, Rule rule, const Arguments& arguments, uint32_t blocks, void* stream) {
  void* given[] = {const_cast<Arguments*>(&arguments)};
  const void* kernel = reinterpret_cast<const void*>(find<P>(pass, rule));
  cudaFuncAttributes attributes;
  cudaError_t error =
      blocks ? cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), given, 0, static_cast<cudaStream_t>(stream))
             : cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace lookbehind_fused
