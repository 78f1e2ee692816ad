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

Dtype dtype_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float64()) return Dtype::f64;
  if (dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), "params: expected float64, float32, bfloat16 or float16");
  return Dtype::f16;
}

// The address of a contiguous tensor of at least ``needed`` numbers of type T.
template <class T>
T* numbers_of(const char* name, const Tensor& tensor, int64_t needed) {
  static_assert(std::is_same_v<T, double> || std::is_same_v<T, float> || std::is_same_v<T, int64_t>);
  constexpr bool is_double = std::is_same_v<T, double>, is_float = std::is_same_v<T, float>;
  const TensorInfo info = info_of(tensor.get());
  const int32_t wanted = is_double  ? aoti_torch_dtype_float64()
                         : is_float ? aoti_torch_dtype_float32()
                                    : aoti_torch_dtype_int64();
  STD_TORCH_CHECK(info.dtype == wanted, name, ": expected ",
                  is_double  ? "float64"
                  : is_float ? "float32"
                             : "int64",
                  ", got another dtype");
  STD_TORCH_CHECK(info.numel >= needed && (info.numel < 2 || tensor.is_contiguous()), name,
                  ": expected a contiguous tensor of at least ", needed, " elements, got ", info.numel);
  return static_cast<T*>(info.data);
}

std::vector<void*> addresses(const TensorList& tensors) {
  std::vector<void*> all;
  all.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) all.push_back(tensor.data);
  return all;
}

// Sizes and strides of a tensor. Rows of ``table`` are padded in front with dimensions of one element.
struct Layout {
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
};

bool same_sizes(const TensorInfo& a, const Layout& b) {
  const int64_t padding = b.dim - a.dim;
  if (padding < 0) return false;
  for (int64_t d = 0; d < b.dim; ++d)
    if (b.sizes[d] != (d < padding ? 1 : a.sizes[d - padding])) return false;
  return true;
}

// Of two tensors of the same sizes.
bool same_strides(const TensorInfo& a, const Layout& b) {
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d + b.dim - a.dim]) return false;
  return true;
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
  std::vector<std::vector<char>> copies;  // of gradients that are laid out in another way than their parameter

  // The parameters: a list of them, or where it is empty their addresses and layouts in ``table``.
  Work(const Tensor& table, const TensorList& tensors) {
    STD_TORCH_CHECK(
        table.dim() == 2 && table.size(1) >= 3 && (tensors.empty() || table.size(0) == int64_t(tensors.size())),
        "table: expected a row of at least 3 numbers for each of ", tensors.size(), " params");
    count = table.size(0);
    const int64_t width = table.size(1);
    const int64_t* numbers = numbers_of<int64_t>("table", table, width * count);
    of_rows.reserve(count);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t* row = numbers + t * width;
      of_rows.push_back({row[0], row[1], row[2]});
      STD_TORCH_CHECK(row[0] >= 0 && row[1] >= 0 && row[2] >= 0, "table: a negative number in row ", t);
      buffer_size = std::max(buffer_size, row[1] + row[2]);
      row_count = std::max(row_count, row[0] + 1);
    }
    rows = of_rows.data();
    params.reserve(count);
    if (count > 0 && tensors.empty()) {
      STD_TORCH_CHECK(width >= 4 && width % 2 == 0, "table: expected addresses and layouts, since there are no params");
      for (int64_t t = 0; t < count; ++t) params.push_back(reinterpret_cast<void*>(numbers[t * width + 3]));
    }
    for (size_t t = 0; t < tensors.size(); ++t) {
      STD_TORCH_CHECK(tensors[t].dtype == tensors[0].dtype, "params: tensor ", t, " has another dtype than tensor 0");
      STD_TORCH_CHECK(tensors[t].numel == rows[t].size, "params: tensor ", t, " has ", tensors[t].numel,
                      " elements, expected ", rows[t].size);
      params.push_back(tensors[t].data);
    }
    if (!tensors.empty()) dtype = dtype_of(tensors[0].dtype);
  }

  Work(const Tensor& table, const TensorList& tensors, const TensorList& gradients) : Work(table, tensors) {
    STD_TORCH_CHECK(int64_t(gradients.size()) == count, "grads: expected ", count, ", one for each of params, got ",
                    gradients.size());
    if (count == 0) return;
    const int32_t wanted = tensors.empty() ? gradients[0].dtype : tensors[0].dtype;
    dtype = dtype_of(wanted);
    const int64_t width = table.size(1), dim = (width - 4) / 2;
    const int64_t* layouts = numbers_of<int64_t>("table", table, 0) + 4;
    grads.reserve(count);
    for (int64_t t = 0; t < count; ++t) {
      const TensorInfo& grad = gradients[t];
      const Layout like = tensors.empty() ? Layout{dim, layouts + t * width, layouts + t * width + dim}
                                          : Layout{tensors[t].dim, tensors[t].sizes, tensors[t].strides};
      STD_TORCH_CHECK(grad.dtype == wanted, "grads: tensor ", t, " has another dtype than its parameter");
      STD_TORCH_CHECK(grad.numel == rows[t].size && same_sizes(grad, like), "grads: tensor ", t,
                      " has another shape than its parameter");
      if (same_strides(grad, like)) {
        grads.push_back(grad.data);
      } else {
        copies.push_back(in_memory_order(grad, like, width_of(dtype)));
        grads.push_back(copies.back().data());
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
  std::vector<void*> buffers(const char* name, const TensorList& tensors) const {
    for (const TensorInfo& info : tensors) {
      const bool fits = info.dtype == (dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
      STD_TORCH_CHECK(count == 0 || fits, name, ": expected ", dtype == Dtype::f64 ? "float64" : "float32",
                      ", got another dtype");
      STD_TORCH_CHECK(info.dim == 1 && info.numel >= buffer_size && (info.numel < 2 || info.strides[0] == 1), name,
                      ": expected a contiguous vector of at least ", buffer_size, " elements, got ", info.numel);
    }
    return addresses(tensors);
  }
};

// The threads of torch, and the share of a thread that torch's own elementwise kernels have.
//
// Streaming: measured on two cores, the passes over 21 M parameters took 12 to 19 % less time with it, those over up to
// 8 M the same within 2 %.
struct Threads {
  static constexpr int64_t kPerThread = 32768;
  static constexpr int64_t kStreamed = int64_t(1) << 23;
  static int64_t count() { return torch::stable::get_num_threads(); }
  template <class F>
  static void share(int64_t n, const F& f) {
    torch::stable::parallel_for(0, n, 1, f);
  }
};

// ---- numbers --------------------------------------------------------------------------------------------------------

// The numbers that all passes have, and ``of_rule`` more.
const double* hyper_of(const Tensor& hyper, int64_t of_rule = 0) {
  return numbers_of<double>("hyper", hyper, kOfRule + of_rule);
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

template <class T>
Constants<T> constants(double scale, double factor, double eta, double alpha) {
  Constants<T> c{};
  c.scale = T(scale), c.factor = T(factor), c.eta = T(eta), c.alpha = T(alpha);
  return c;
}

Rule rule_of(const std::string& name, size_t states) {
  STD_TORCH_CHECK(name == "sgd" || name == "adam" || name == "none", "rule: expected sgd, adam or none, got ", name);
  const size_t least = name == "adam" ? 2 : 0, most = name == "adam" ? 3 : name == "sgd" ? 1 : 0;
  STD_TORCH_CHECK(least <= states && states <= most, "state: expected ", least, " to ", most, " buffers for the rule ",
                  name, ", got ", states);
  if (name == "sgd") return states ? Rule::sgd_momentum : Rule::sgd;
  if (name == "adam") return states > 2 ? Rule::adam_amsgrad : Rule::adam;
  return Rule::none;
}

template <class Update, class T>
void store_rule(Constants<T>& c, const double* h, int64_t flags, int step) {
  static_assert(sizeof(Update) <= sizeof(c.rule));
  Update update;
  set_rule(update, h, flags, step);
  std::memcpy(c.rule, &update, sizeof(update));
}

// A rule's constants for a tensor's update number ``step``.
template <class T>
void set_constants(Constants<T>& c, Rule rule, const double* h, int64_t flags, int step) {
  switch (rule) {
    case Rule::none:
      return;
    case Rule::sgd:
      return store_rule<Sgd<T, 0>>(c, h, flags, step);
    case Rule::sgd_momentum:
      return store_rule<Sgd<T, 1>>(c, h, flags, step);
    case Rule::adam:
      return store_rule<Adam<T, 0>>(c, h, flags, step);
    case Rule::adam_amsgrad:
      return store_rule<Adam<T, 1>>(c, h, flags, step);
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
void sum_squares(const Work& work, const double* h, int64_t flags, double* total) {
  const auto pieces = pieces_of(work.rows, work.count);
  total[0] = total[1] = 0;
  with_compute_type(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Constants<T>> numbers(work.count, constants<T>(1, 0, h[kEta], 0));
    const Variant variant{Pass::reduce_sq_norm, work.dtype, Rule::none, bool(flags & kAdaptive), false};
    const auto sums = run<T>(variant, work, numbers, pieces, 2);
    for (size_t i = 0; i < sums.size(); ++i) total[i % 2] += sums[i];
  });
}

void reduce_sq_norm(TensorList params, TensorList grads, std::optional<Tensor> perturbed, Tensor table, Tensor hyper,
                    int64_t flags, Tensor sq_norms, int64_t row) {
  Work work(table, params, grads);
  work.perturbed = work.buffer("perturbed", perturbed);
  sum_squares(work, hyper_of(hyper), flags, row_of(sq_norms, row));
}

void ascend(TensorList params, TensorList grads, std::optional<Tensor> perturbed, std::optional<Tensor> slow,
            Tensor table, Tensor sq_norms, int64_t row, Tensor hyper, int64_t flags) {
  const double* h = hyper_of(hyper);
  Work work(table, params, grads);
  if (!slow) work.perturbed = work.buffer("perturbed", perturbed);
  if (row >= 0) sum_squares(work, h, flags, row_of(sq_norms, row));
  work.perturbed = work.buffer("perturbed", perturbed);
  work.slow = work.buffer("slow", slow);
  const SqNorms norms = norms_of(sq_norms);
  const bool ascends = moves(norms, flags);
  if (!ascends && !slow) return;
  with_compute_type(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Constants<T>> numbers(work.count, constants<T>(1, ascent_factor(h, norms), h[kEta], 0));
    const Variant variant{ascends ? Pass::ascend : Pass::keep, work.dtype, Rule::none, bool(flags & kAdaptive), false};
    run<T>(variant, work, numbers, pieces_of(work.rows, work.count));
  });
}

// What every pass that descends is given beside its weights.
struct Descent {
  const TensorList& state;
  const TensorList& state_from;
  const Tensor& steps;
  const std::optional<Tensor>& steps_from;
  const std::optional<Tensor>& sq_norms;
  const Tensor& hyper;
  const std::string& rule;
  int64_t flags;
};

// Carry the state on as it is.
void pass_through(const Work& work) {
  const int64_t width = work.dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
  for (size_t s = 0; s < work.state.size(); ++s)
    for (int64_t t = 0; work.state[s] != work.state_from[s] && t < work.count; ++t) {
      const int64_t start = work.rows[t].start * width;
      std::memcpy(offset(work.state[s], start), offset(work.state_from[s], start), work.rows[t].size * width);
    }
}

std::vector<double> run_descent(Pass pass, Work& work, const Descent& d, const std::vector<Piece>& pieces) {
  const Rule rule = rule_of(d.rule, d.state.size());
  const double* h = hyper_of(d.hyper, d.rule == "adam" ? 5 : d.rule == "sgd" ? 4 : 0);
  STD_TORCH_CHECK(d.state_from.empty() || d.state_from.size() == d.state.size(), "state_from: expected none or ",
                  d.state.size(), " buffers as state has, got ", d.state_from.size());
  const bool derivable = rule != Rule::none && rule != Rule::sgd && !(d.flags & kNesterov);
  STD_TORCH_CHECK((derivable && !(d.flags & kSkips)) || !(d.flags & kDerives),
                  "flags: the fast weights cannot be derived from the state of ", d.rule,
                  " without momentum, with Nesterov's, or where steps may be skipped");
  work.state = work.buffers("state", d.state);
  work.state_from = d.state_from.empty() ? work.state : work.buffers("state_from", d.state_from);
  float* steps = numbers_of<float>("steps", d.steps, work.row_count);
  const float* steps_from = d.steps_from ? numbers_of<float>("steps_from", *d.steps_from, work.row_count) : steps;
  const SqNorms norms = norms_of(d.sq_norms);
  const double scale = gradient_scale(h, norms, d.flags);
  const double factor = pass == Pass::descend_ascend ? ascent_factor(h, norms) : 0;
  const bool descends = moves(norms, d.flags);
  if (!descends) pass_through(work);
  std::vector<double> sums;
  with_compute_type(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    Constants<T> c = constants<T>(scale, factor, h[kEta], h[kAlpha]);
    std::vector<Constants<T>> numbers;
    numbers.reserve(work.count);
    float last = -1;
    for (int64_t t = 0; t < work.count; ++t) {
      const float step = steps_from[work.rows[t].row] + 1;
      if (step != last) set_constants(c, rule, h + kOfRule, d.flags, int(last = step));
      steps[work.rows[t].row] = descends ? step : step - 1;
      numbers.push_back(c);
    }
    Variant variant{pass, work.dtype, rule, bool(d.flags & kAdaptive), bool(d.flags & kDerives)};
    if (!descends) variant.rule = Rule::none;
    if (!descends && pass == Pass::descend_ascend) variant.pass = Pass::descend;
    sums = run<T>(variant, work, numbers, pieces, pass == Pass::descend_align ? 3 : 0);
  });
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
             std::optional<Tensor> sq_norms, Tensor hyper, std::string rule, int64_t flags) {
  Work work(table, params, grads);
  set_fast(work, fast, fast_from);
  const Descent d{state, state_from, steps, steps_from, sq_norms, hyper, rule, flags};
  run_descent(Pass::descend, work, d, pieces_of(work.rows, work.count));
}

void descend_ascend(TensorList params, TensorList grads, std::optional<Tensor> perturbed, std::optional<Tensor> fast,
                    std::optional<Tensor> fast_from, TensorList state, TensorList state_from, Tensor steps,
                    std::optional<Tensor> steps_from, Tensor table, Tensor sq_norms, int64_t row, Tensor hyper,
                    std::string rule, int64_t flags) {
  Work work(table, params, grads);
  work.perturbed = work.buffer("perturbed", perturbed);
  set_fast(work, fast, fast_from);
  if (row >= 0) sum_squares(work, hyper_of(hyper), flags, row_of(sq_norms, row));
  const std::optional<Tensor> norms = sq_norms;
  const Descent d{state, state_from, steps, steps_from, norms, hyper, rule, flags};
  run_descent(Pass::descend_ascend, work, d, pieces_of(work.rows, work.count));
}

void descend_interpolate(TensorList params, TensorList grads, Tensor slow, Tensor fast, TensorList state,
                         TensorList state_from, Tensor steps, std::optional<Tensor> steps_from, Tensor table,
                         std::optional<Tensor> sq_norms, Tensor hyper, std::string rule, int64_t flags) {
  Work work(table, params, grads);
  work.slow = work.buffer("slow", slow);
  work.fast_from = work.buffer("fast", fast);
  const Descent d{state, state_from, steps, steps_from, sq_norms, hyper, rule, flags};
  run_descent(Pass::descend_interpolate, work, d, pieces_of(work.rows, work.count));
}

void descend_align(TensorList params, TensorList grads, std::optional<Tensor> perturbed, Tensor slow, Tensor fast,
                   std::optional<Tensor> first, TensorList state, TensorList state_from, Tensor steps,
                   std::optional<Tensor> steps_from, Tensor table, std::optional<Tensor> sq_norms, Tensor hyper,
                   std::string rule, int64_t flags, Tensor sums) {
  Work work(table, params, grads);
  work.perturbed = work.buffer("perturbed", perturbed);
  work.slow = work.buffer("slow", slow);
  work.fast_from = work.buffer("fast", fast);
  work.first = first ? work.buffer("first", first) : work.fast_from;
  const Descent d{state, state_from, steps, steps_from, sq_norms, hyper, rule, flags};
  const auto pieces = pieces_of(work.rows, work.count);
  const auto terms = run_descent(Pass::descend_align, work, d, pieces);
  const bool per_tensor = flags & kPerTensor;
  double* total = numbers_of<double>("sums", sums, 3 * (per_tensor ? work.row_count : 1));
  for (int64_t t = 0; t < (per_tensor ? work.count : 1); ++t)
    std::fill_n(total + 3 * (per_tensor ? work.rows[t].row : 0), 3, 0.0);
  for (size_t i = 0; i < terms.size(); ++i)
    total[3 * (per_tensor ? work.rows[pieces[i / 3].tensor].row : 0) + i % 3] += terms[i];
}

void interpolate(TensorList params, std::optional<Tensor> perturbed, Tensor slow, Tensor table, Tensor sums,
                 int64_t flags) {
  STD_TORCH_CHECK(int64_t(params.size()) == table.size(0), "params: expected ", table.size(0),
                  " tensors, one for each row of table, got ", params.size());
  Work work(table, params);
  work.perturbed = work.buffer("perturbed", perturbed);
  work.slow = work.buffer("slow", slow);
  const double* s = numbers_of<double>("sums", sums, 3 * (flags & kPerTensor ? work.row_count : sums.size(0)));
  double total[3] = {0, 0, 0};
  for (int64_t i = 0; i < 3 * sums.size(0); ++i) total[i % 3] += s[i];
  with_compute_type(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Constants<T>> numbers;
    numbers.reserve(work.count);
    for (int64_t t = 0; t < work.count; ++t) {
      const double* own = flags & kPerTensor ? s + 3 * work.rows[t].row : total;
      numbers.push_back(constants<T>(1, 0, 0, adaptive_alpha(own[0], own[1], own[2])));
    }
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
