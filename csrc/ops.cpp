// The ops of lookbehind_fused/kernels/schema.py for CPU tensors: unpack, cut into chunks, run the chunks, add up sums.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/walk.h"
#include "numbers.h"
#include "tensor_list.h"

namespace lookbehind_fused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Find = ChunkFunction (*)(const Variant&);

// The best instruction set of this machine, or the one that the environment variable LOOKBEHIND_ISA asks for.
Find instruction_set() {
  const char* asked = std::getenv("LOOKBEHIND_ISA");
  const std::string isa = asked ? asked : "";
  if (isa == "baseline") return baseline::find;
#ifdef LOOKBEHIND_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (isa.empty() || isa == "avx512")) return avx512::find;
  if (has_avx2 && (isa.empty() || isa == "avx2")) return avx2::find;
#endif
  STD_TORCH_CHECK(isa.empty(), "LOOKBEHIND_ISA: expected baseline, avx2 or avx512, and one that this machine has, got ",
                  isa);
  return baseline::find;
}

const char* name_of(int32_t dtype) {
  return dtype == aoti_torch_dtype_float64()   ? "float64"
         : dtype == aoti_torch_dtype_float32() ? "float32"
         : dtype == aoti_torch_dtype_int64()   ? "int64"
         : dtype == aoti_torch_dtype_int32()   ? "int32"
                                               : "another dtype";
}

template <class T>
int32_t dtype_of_numbers() {
  if constexpr (std::is_same_v<T, double>) return aoti_torch_dtype_float64();
  if constexpr (std::is_same_v<T, float>) return aoti_torch_dtype_float32();
  if constexpr (std::is_same_v<T, int64_t>) return aoti_torch_dtype_int64();
  static_assert(std::is_same_v<T, double> || std::is_same_v<T, float> || sizeof(T) == 8 || std::is_same_v<T, int32_t>);
  return aoti_torch_dtype_int32();
}

Dtype dtype_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float64()) return Dtype::f64;
  if (dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), "params: expected float64, float32, bfloat16 or float16");
  return Dtype::f16;
}

Dtype dtype_of(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "dtype: expected float64, float32, bfloat16 or float16");
  return dtype == ScalarType::Double     ? Dtype::f64
         : dtype == ScalarType::Float    ? Dtype::f32
         : dtype == ScalarType::BFloat16 ? Dtype::bf16
                                         : Dtype::f16;
}

// The address of a contiguous tensor of at least ``needed`` numbers of type T.
template <class T>
T* numbers_of(const char* name, const Tensor& tensor, int64_t needed) {
  const TensorInfo info = info_of(tensor.get());
  const int32_t wanted = dtype_of_numbers<T>();
  STD_TORCH_CHECK(info.dtype == wanted, name, ": expected ", name_of(wanted), ", got ", name_of(info.dtype));
  STD_TORCH_CHECK(info.numel >= needed && (info.numel < 2 || tensor.is_contiguous()), name,
                  ": expected a contiguous tensor of at least ", needed, " elements, got ", info.numel);
  return static_cast<T*>(info.data);
}

// The elements of ``from`` in the memory order of ``like``, a dense tensor of the same sizes.
std::vector<char> in_memory_order(const TensorInfo& from, const Layout& like, int64_t width) {
  std::vector<char> copy(from.numel * width);
  std::vector<int64_t> index(from.dim, 0);
  const int64_t* strides = like.strides + like.dim - from.dim;
  int64_t source = 0, target = 0;
  for (int64_t i = 0; i < from.numel; ++i) {
    std::memcpy(copy.data() + target * width, static_cast<const char*>(from.data) + source * width, width);
    for (int64_t d = from.dim - 1; d >= 0; --d) {
      source += from.strides[d], target += strides[d];
      if (++index[d] < from.sizes[d]) break;
      source -= from.strides[d] * from.sizes[d], target -= strides[d] * from.sizes[d], index[d] = 0;
    }
  }
  return copy;
}

// The tensors of a call and its flat buffers, by address. Everything is checked here, before anything is written.
struct Work : Addresses {
  std::vector<Row> of_rows;
  int64_t buffer_size = 0;                // elements that every flat buffer has at least
  int64_t row_count = 0;                  // rows that ``steps`` has at least, and ``sums`` where there is one a tensor
  int64_t group_count = 0;                // rows that ``hyper`` has at least
  std::vector<std::vector<char>> copies;  // of gradients that are laid out in another way than their parameter

  // The parameters: a list of them, or where it is empty their addresses and layouts in ``table``.
  Work(const Tensor& table, const TensorList& tensors) {
    STD_TORCH_CHECK(
        table.dim() == 2 && table.size(1) >= kAddress && (tensors.empty() || table.size(0) == int64_t(tensors.size())),
        "table: expected a row of at least ", int(kAddress), " numbers for each of ", tensors.size(), " params");
    count = table.size(0);
    const int64_t width = table.size(1);
    const int64_t* numbers = numbers_of<int64_t>("table", table, width * count);
    STD_TORCH_CHECK(count == 0 || !tensors.empty() || (width >= kSizes && (width - kSizes) % 2 == 0),
                    "table: expected addresses and layouts, since there are no params");
    of_rows.reserve(count);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t* n = numbers + t * width;
      void* param = tensors.empty() ? reinterpret_cast<void*>(n[kAddress]) : tensors[t].data;
      of_rows.push_back({n[kRow], n[kStart], n[kSize], n[kGroup], param, nullptr, 0});
      STD_TORCH_CHECK(n[kRow] >= 0 && n[kStart] >= 0 && n[kSize] >= 0 && n[kGroup] >= 0,
                      "table: a negative number in row ", t);
      buffer_size = std::max(buffer_size, n[kStart] + n[kSize]);
      row_count = std::max(row_count, n[kRow] + 1);
      group_count = std::max(group_count, n[kGroup] + 1);
    }
    rows = of_rows.data();
    for (size_t t = 0; t < tensors.size(); ++t) {
      STD_TORCH_CHECK(tensors[t].dtype == tensors[0].dtype, "params: tensor ", t, " has another dtype than tensor 0");
      STD_TORCH_CHECK(tensors[t].numel == rows[t].size, "params: tensor ", t, " has ", tensors[t].numel,
                      " elements, expected ", rows[t].size);
    }
    if (!tensors.empty()) dtype = dtype_of(tensors[0].dtype);
  }

  Work(const Tensor& table, const TensorList& tensors, const TensorList& gradients) : Work(table, tensors) {
    STD_TORCH_CHECK(int64_t(gradients.size()) == count, "grads: expected ", count, ", one for each of params, got ",
                    gradients.size());
    if (count == 0) return;
    const int32_t wanted = tensors.empty() ? gradients[0].dtype : tensors[0].dtype;
    dtype = dtype_of(wanted);
    const int64_t width = table.size(1);
    const int64_t* numbers = numbers_of<int64_t>("table", table, 0);
    for (int64_t t = 0; t < count; ++t) {
      const TensorInfo& grad = gradients[t];
      const Layout like = tensors.empty() ? layout_in(numbers + t * width, width)
                                          : Layout{tensors[t].dim, tensors[t].sizes, tensors[t].strides};
      STD_TORCH_CHECK(grad.dtype == wanted, "grads: tensor ", t, " has another dtype than its parameter");
      STD_TORCH_CHECK(grad.numel == rows[t].size && same_sizes(grad, like), "grads: tensor ", t,
                      " has another shape than its parameter");
      rows[t].grad = grad.data;
      if (!same_strides(grad, like)) {
        copies.push_back(in_memory_order(grad, like, width_of(dtype)));
        rows[t].grad = copies.back().data();
      }
    }
  }

  // The address of a flat buffer, which is in the dtype that is computed in.
  void* buffer(const char* name, const Tensor& tensor) const {
    if (count == 0) return nullptr;
    if (dtype == Dtype::f64) return numbers_of<double>(name, tensor, buffer_size);
    return numbers_of<float>(name, tensor, buffer_size);
  }
  void* buffer(const char* name, const std::optional<Tensor>& tensor) const {
    return tensor ? buffer(name, *tensor) : nullptr;
  }
  void* buffer(const char* name, const TensorInfo& info) const {
    const int32_t wanted = dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    STD_TORCH_CHECK(count == 0 || info.dtype == wanted, name, ": expected ", name_of(wanted), ", got ",
                    name_of(info.dtype));
    STD_TORCH_CHECK(info.dim == 1 && info.numel >= buffer_size && (info.numel < 2 || info.strides[0] == 1), name,
                    ": expected a contiguous vector of at least ", buffer_size, " elements, got ", info.numel);
    return info.data;
  }
};

// Where a pass notes that it is done; null where nobody asks.
int32_t* note_of(const std::optional<Tensor>& done) { return done ? numbers_of<int32_t>("done", *done, 1) : nullptr; }

// The threads of torch. Small work stays on one: where other programs use the cores, waiting for a second thread takes
// longer than the work. 166 k parameters in 80 tensors took 0.95 ms a step on two idle cores and 1.03 on one, but up to
// 21 ms on two busy ones. Beyond that a thread's share is that of torch's own elementwise kernels.
//
// Streaming: measured on two cores, the passes over 21 M parameters took 12 to 19 % less time with it, those over up to
// 8 M the same within 2 %.
struct Threads {
  static constexpr int64_t kShared = int64_t(1) << 19, kPerThread = 32768;
  static constexpr int64_t kStreamed = int64_t(1) << 23;
  static int64_t count() { return torch::stable::get_num_threads(); }
  template <class F>
  static void share(int64_t n, const F& f) {
    torch::stable::parallel_for(0, n, 1, f);
  }
};

// ---- numbers --------------------------------------------------------------------------------------------------------

// The rows of ``hyper``, one for each group.
struct Groups {
  const double* numbers;
  int64_t width;
  const double* operator[](int64_t group) const { return numbers + group * width; }
};

// With the numbers that all passes have, and ``of_rule`` more.
Groups groups_of(const Tensor& hyper, const Work& work, int64_t of_rule = 0) {
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(0) >= work.group_count && hyper.size(1) >= kOfRule + of_rule,
                  "hyper: expected at least ", work.group_count, " rows of ", kOfRule + of_rule, " numbers");
  return {numbers_of<double>("hyper", hyper, 0), hyper.size(1)};
}

SqNorms norms_of(const std::optional<Tensor>& sq_norms) {
  if (!sq_norms) return SqNorms(nullptr, 0);
  return SqNorms(numbers_of<double>("sq_norms", *sq_norms, 2 * sq_norms->size(0)), sq_norms->size(0));
}

// Whether an evaluation moves anything: under kSkips only with a gradient whose norms are finite.
bool moves(const SqNorms& norms, int64_t flags) {
  STD_TORCH_CHECK(norms.given || !(flags & kSkips),
                  "sq_norms: expected a tensor where non-finite gradients are skipped, got None");
  return !(flags & kSkips) || norms.finite();
}

// The constants of all tensors, each with the number of its own: tensors that follow each other share them where
// key(row) is the same. set(constants, row) computes them.
template <class T, class Key, class Set>
std::vector<Constants<T>> constants(const Work& work, const Key& key, const Set& set) {
  std::vector<Constants<T>> all;
  for (int64_t t = 0; t < work.count; ++t) {
    Row& row = work.rows[t];
    if (t == 0 || key(row) != key(work.rows[t - 1])) set(all.emplace_back(), row);
    row.numbers = int64_t(all.size()) - 1;
  }
  return all;
}

int64_t group_of(const Row& row) { return row.group; }

Rule rule_of(int64_t number, size_t states, int64_t flags) {
  STD_TORCH_CHECK(0 <= number && number < kRules, "rule: expected 0 to ", kRules - 1, ", got ", number);
  const Rule rule = Rule(number);
  const int wanted = extent_of(rule).buffers;
  STD_TORCH_CHECK(int64_t(states) == wanted, "state: expected ", wanted, " buffers for rule ", number, ", got ",
                  states);
  STD_TORCH_CHECK((wanted > 0 && !(flags & (kNesterov | kSkips))) || !(flags & kDerives),
                  "flags: the fast weights cannot be derived from the state of rule ", number,
                  " without momentum, with Nesterov's, or where steps may be skipped");
  return rule;
}

template <class Update, class T>
void store_rule(Constants<T>& c, const double* hyper, int64_t flags, int step) {
  static_assert(sizeof(Update) <= sizeof(c.rule));
  Update update;
  set_rule(update, hyper, flags, step);
  std::memcpy(c.rule, &update, sizeof(update));
}

// A rule's constants for a tensor's update number ``step``.
template <class T>
void set_constants(Constants<T>& c, Rule rule, const double* hyper, int64_t flags, int step) {
  switch (rule) {
    case Rule::none:
      return;
    case Rule::sgd:
      return store_rule<Sgd<T, 0>>(c, hyper, flags, step);
    case Rule::momentum:
      return store_rule<Sgd<T, 1>>(c, hyper, flags, step);
    case Rule::adam:
      return store_rule<Adam<T, 0>>(c, hyper, flags, step);
    case Rule::amsgrad:
      return store_rule<Adam<T, 1>>(c, hyper, flags, step);
  }
}

// ---- passes ---------------------------------------------------------------------------------------------------------

template <class T>
std::vector<double> run(const Variant& variant, const Work& work, const std::vector<Constants<T>>& numbers,
                        const std::vector<Piece>& pieces, int terms = 0) {
  static const Find find = instruction_set();
  return walk<T, Threads>(find(variant), work, numbers, pieces, terms);
}

// Call f with a float or, for double parameters, a double: the type that is computed in.
template <class F>
void with_compute_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::f64)
    f(double());
  else
    f(float());
}

// A bucket's own row of ``sq_norms``.
double* row_of(const Tensor& sq_norms, int64_t row) {
  STD_TORCH_CHECK(0 <= row && sq_norms.dim() == 2 && row < sq_norms.size(0) && sq_norms.size(1) == 2,
                  "row: expected one of sq_norms, got ", row);
  return numbers_of<double>("sq_norms", sq_norms, 2 * row + 2) + 2 * row;
}

// The sums of squares of T g and of g.
void sum_squares(const Work& work, const Groups& groups, int64_t flags, double* total) {
  const auto pieces = pieces_of(work.rows, work.count);
  total[0] = total[1] = 0;
  with_compute_type(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto numbers =
        constants<T>(work, group_of, [&](auto& c, const Row& row) { c.eta = T(groups[row.group][kEta]); });
    const Variant variant{Pass::reduce_sq_norm, work.dtype, Rule::none, bool(flags & kAdaptive), false};
    const auto sums = run<T>(variant, work, numbers, pieces, 2);
    for (size_t i = 0; i < sums.size(); ++i) total[i % 2] += sums[i];
  });
}

void reduce_sq_norm(TensorList params, TensorList grads, std::optional<Tensor> perturbed, Tensor table, Tensor hyper,
                    int64_t flags, Tensor sq_norms, int64_t row) {
  Work work(table, params, grads);
  work.perturbed = work.buffer("perturbed", perturbed);
  sum_squares(work, groups_of(hyper, work), flags, row_of(sq_norms, row));
}

void ascend(TensorList params, TensorList grads, std::optional<Tensor> perturbed, std::optional<Tensor> slow,
            Tensor table, Tensor sq_norms, int64_t row, Tensor hyper, int64_t flags, std::optional<Tensor> done) {
  Work work(table, params, grads);
  const Groups groups = groups_of(hyper, work);
  int32_t* note = note_of(done);
  work.slow = work.buffer("slow", slow);
  void* const unrounded = work.buffer("perturbed", perturbed);
  if (!slow) work.perturbed = unrounded;
  if (row >= 0) sum_squares(work, groups, flags, row_of(sq_norms, row));
  work.perturbed = unrounded;
  const SqNorms norms = norms_of(sq_norms);
  const bool ascends = moves(norms, flags);
  if (ascends || slow)
    with_compute_type(work.dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto numbers = constants<T>(work, group_of, [&](auto& c, const Row& row) {
        c.factor = T(ascent_factor(groups[row.group], norms)), c.eta = T(groups[row.group][kEta]);
      });
      const Pass pass = ascends ? Pass::ascend : Pass::keep;
      const Variant variant{pass, work.dtype, Rule::none, bool(flags & kAdaptive), false};
      run<T>(variant, work, numbers, pieces_of(work.rows, work.count));
    });
  if (note) *note = 1;
}

// What every pass that descends is given beside its weights.
struct Descent {
  const TensorList& state;
  const TensorList& state_from;
  const Tensor& steps;
  const std::optional<Tensor>& steps_from;
  const std::optional<Tensor>& sq_norms;
  const Tensor& hyper;
  int64_t rule, flags;
};

// Carry the state on as it is.
void pass_through(const Work& work) {
  const int64_t width = work.dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
  for (int s = 0; s < work.states; ++s)
    for (int64_t t = 0; work.state[s] != work.state_from[s] && t < work.count; ++t) {
      const int64_t start = work.rows[t].start * width;
      std::memcpy(offset(work.state[s], start), offset(work.state_from[s], start), work.rows[t].size * width);
    }
}

std::vector<double> run_descent(Pass pass, Work& work, const Descent& d, const std::vector<Piece>& pieces) {
  const Rule rule = rule_of(d.rule, d.state.size(), d.flags);
  const Groups groups = groups_of(d.hyper, work, extent_of(rule).numbers);
  STD_TORCH_CHECK(d.state_from.empty() || d.state_from.size() == d.state.size(), "state_from: expected none or ",
                  d.state.size(), " buffers as state has, got ", d.state_from.size());
  work.states = int(d.state.size());
  for (int s = 0; s < work.states; ++s) {
    work.state[s] = work.buffer("state", d.state[s]);
    work.state_from[s] = d.state_from.empty() ? work.state[s] : work.buffer("state_from", d.state_from[s]);
  }
  float* steps = numbers_of<float>("steps", d.steps, work.row_count);
  const float* steps_from = d.steps_from ? numbers_of<float>("steps_from", *d.steps_from, work.row_count) : steps;
  const SqNorms norms = norms_of(d.sq_norms);
  const bool descends = moves(norms, d.flags), last = pass == Pass::descend_interpolate || pass == Pass::descend_align;
  if (!descends && last) {  // the step does not take place: its weights are the slow ones, its state stays
    work.fast_from = work.first = work.slow;
    work.states = 0;
  } else if (!descends) {
    pass_through(work);
  }
  std::vector<double> sums;
  with_compute_type(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto step_of = [=](const Row& row) { return steps_from[row.row] + 1; };
    const auto numbers = constants<T>(
        work, [=](const Row& row) { return std::pair(row.group, step_of(row)); },
        [&](auto& c, const Row& row) {
          const double* hyper = groups[row.group];
          c.scale = T(gradient_scale(hyper, norms, d.flags)), c.eta = T(hyper[kEta]), c.alpha = T(hyper[kAlpha]);
          if (pass == Pass::descend_ascend) c.factor = T(ascent_factor(hyper, norms));
          set_constants(c, rule, hyper, d.flags, int(step_of(row)));
        });
    Variant variant{pass, work.dtype, rule, bool(d.flags & kAdaptive), bool(d.flags & kDerives)};
    if (!descends) variant.rule = Rule::none;
    if (!descends && pass == Pass::descend_ascend) variant.pass = Pass::descend;
    sums = run<T>(variant, work, numbers, pieces, pass == Pass::descend_align ? 3 : 0);
  });
  for (int64_t t = 0; t < work.count && (descends || !last); ++t)
    steps[work.rows[t].row] = steps_from[work.rows[t].row] + descends;
  return sums;
}

// Where a pass that leaves fast weights reads and writes them.
void set_fast(Work& work, const std::optional<Tensor>& fast, const std::optional<Tensor>& fast_from) {
  STD_TORCH_CHECK(fast || fast_from, "fast_from: expected a buffer, since there is no fast");
  work.fast = work.buffer("fast", fast);
  work.fast_from = fast_from ? work.buffer("fast_from", fast_from) : work.fast;
}

void descend(TensorList params, TensorList grads, std::optional<Tensor> fast, std::optional<Tensor> fast_from,
             TensorList state, TensorList state_from, Tensor steps, std::optional<Tensor> steps_from, Tensor table,
             std::optional<Tensor> sq_norms, Tensor hyper, int64_t rule, int64_t flags) {
  Work work(table, params, grads);
  set_fast(work, fast, fast_from);
  const Descent d{state, state_from, steps, steps_from, sq_norms, hyper, rule, flags};
  run_descent(Pass::descend, work, d, pieces_of(work.rows, work.count));
}

void descend_ascend(TensorList params, TensorList grads, std::optional<Tensor> perturbed, std::optional<Tensor> fast,
                    std::optional<Tensor> fast_from, TensorList state, TensorList state_from, Tensor steps,
                    std::optional<Tensor> steps_from, Tensor table, Tensor sq_norms, int64_t row, Tensor hyper,
                    int64_t rule, int64_t flags) {
  Work work(table, params, grads);
  work.perturbed = work.buffer("perturbed", perturbed);
  set_fast(work, fast, fast_from);
  if (row >= 0) sum_squares(work, groups_of(hyper, work), flags, row_of(sq_norms, row));
  const std::optional<Tensor> norms = sq_norms;
  const Descent d{state, state_from, steps, steps_from, norms, hyper, rule, flags};
  run_descent(Pass::descend_ascend, work, d, pieces_of(work.rows, work.count));
}

void descend_interpolate(TensorList params, TensorList grads, Tensor slow, Tensor fast, TensorList state,
                         TensorList state_from, Tensor steps, std::optional<Tensor> steps_from, Tensor table,
                         std::optional<Tensor> sq_norms, Tensor hyper, int64_t rule, int64_t flags,
                         std::optional<Tensor> done) {
  Work work(table, params, grads);
  int32_t* note = note_of(done);
  work.slow = work.buffer("slow", slow);
  work.fast_from = work.buffer("fast", fast);
  const Descent d{state, state_from, steps, steps_from, sq_norms, hyper, rule, flags};
  run_descent(Pass::descend_interpolate, work, d, pieces_of(work.rows, work.count));
  if (note) *note = 1;
}

void descend_align(TensorList params, TensorList grads, std::optional<Tensor> perturbed, Tensor slow, Tensor fast,
                   std::optional<Tensor> first, TensorList state, TensorList state_from, Tensor steps,
                   std::optional<Tensor> steps_from, Tensor table, std::optional<Tensor> sq_norms, Tensor hyper,
                   int64_t rule, int64_t flags, Tensor sums, std::optional<Tensor> done) {
  Work work(table, params, grads);
  const bool per_tensor = flags & kPerTensor;
  double* total = numbers_of<double>("sums", sums, 3 * (per_tensor ? work.row_count : 1));
  int32_t* note = note_of(done);
  work.perturbed = work.buffer("perturbed", perturbed);
  work.slow = work.buffer("slow", slow);
  work.fast_from = work.buffer("fast", fast);
  work.first = first ? work.buffer("first", first) : work.fast_from;
  const Descent d{state, state_from, steps, steps_from, sq_norms, hyper, rule, flags};
  const auto pieces = pieces_of(work.rows, work.count);
  const auto terms = run_descent(Pass::descend_align, work, d, pieces);
  for (int64_t t = 0; t < (per_tensor ? work.count : 1); ++t)
    std::fill_n(total + 3 * (per_tensor ? work.rows[t].row : 0), 3, 0.0);
  for (size_t i = 0; i < terms.size(); ++i)
    total[3 * (per_tensor ? work.rows[pieces[i / 3].tensor].row : 0) + i % 3] += terms[i];
  if (note) *note = 1;
}

void interpolate(TensorList params, std::optional<Tensor> perturbed, Tensor slow, Tensor table, Tensor sums,
                 int64_t flags, std::optional<ScalarType> dtype) {
  Work work(table, params);
  STD_TORCH_CHECK(dtype || !params.empty() || work.count == 0, "dtype: expected one, since there are no params");
  if (dtype && params.empty()) work.dtype = dtype_of(*dtype);
  work.perturbed = work.buffer("perturbed", perturbed);
  work.slow = work.buffer("slow", slow);
  const double* s = numbers_of<double>("sums", sums, 3 * (flags & kPerTensor ? work.row_count : sums.size(0)));
  double total[3] = {0, 0, 0};
  for (int64_t i = 0; i < 3 * sums.size(0); ++i) total[i % 3] += s[i];
  with_compute_type(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool per_tensor = flags & kPerTensor;
    const auto numbers = constants<T>(
        work, [=](const Row& row) { return per_tensor ? row.row : 0; },
        [&](auto& c, const Row& row) {
          const double* own = per_tensor ? s + 3 * row.row : total;
          c.alpha = T(adaptive_alpha(own[0], own[1], own[2]));
        });
    const Variant variant{Pass::interpolate, work.dtype, Rule::none, false, false};
    run<T>(variant, work, numbers, pieces_of(work.rows, work.count));
  });
}

}  // namespace
}  // namespace lookbehind_fused

STABLE_TORCH_LIBRARY_IMPL(lookbehind_fused, CPU, m) {
  m.impl("reduce_sq_norm", TORCH_BOX(&lookbehind_fused::reduce_sq_norm));
  m.impl("ascend", TORCH_BOX(&lookbehind_fused::ascend));
  m.impl("descend", TORCH_BOX(&lookbehind_fused::descend));
  m.impl("descend_ascend", TORCH_BOX(&lookbehind_fused::descend_ascend));
  m.impl("descend_interpolate", TORCH_BOX(&lookbehind_fused::descend_interpolate));
  m.impl("descend_align", TORCH_BOX(&lookbehind_fused::descend_align));
  m.impl("interpolate", TORCH_BOX(&lookbehind_fused::interpolate));
}
