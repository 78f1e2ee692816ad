// The ops of lookbehind_fused/kernels/cuda.py: each checks what it is given and launches one kernel.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>

#include "launch.h"

// The tests compile this file with LOOKBEHIND_KEY = CPU and LOOKBEHIND_ON_CPU, for kernels that are executed without a
// GPU: then there are no devices to choose from and no streams.
#ifndef LOOKBEHIND_KEY
#define LOOKBEHIND_KEY CUDA
#endif

namespace lookbehind_fused {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef LOOKBEHIND_ON_CPU
struct Guard {
  explicit Guard(int32_t) {}
};
void* current_stream(int32_t) { return nullptr; }
#else
using Guard = torch::stable::accelerator::DeviceGuard;
// The stable header has a stream's handle from torch 2.13 on only; this function is in all of them. A torch without
// CUDA lacks it, and this library has to load there all the same.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get, "this PyTorch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}
#endif

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "another dtype";
  }
}

// One launch: everything that it is given is checked before it is on its way.
class Launch {
 public:
  Arguments arguments{};

  // ``elements``: how many every flat buffer has at least; ``row_count`` and ``group_count``: the rows of what has one
  // for each tensor, and of hyper.
  Launch(const Tensor& rows, const Tensor& chunks, ScalarType dtype, int64_t elements, int64_t row_count,
         int64_t group_count)
      : dtype_(dtype), elements_(elements), row_count_(row_count), group_count_(group_count), place_(rows) {
    STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == kColumns, "rows: expected ", kColumns,
                    " numbers for each tensor");
    STD_TORCH_CHECK(chunks.dim() == 2 && chunks.size(1) == 2, "chunks: expected 2 numbers for each block");
    tensors_ = rows.size(0), blocks_ = chunks.size(0);
    STD_TORCH_CHECK(tensors_ <= INT32_MAX && blocks_ <= INT32_MAX, "chunks: expected fewer than 2^31, got ", blocks_);
    arguments.rows = numbers<int64_t>("rows", rows, ScalarType::Long, kColumns * tensors_);
    arguments.chunks = numbers<int32_t>("chunks", chunks, ScalarType::Int, 2 * blocks_);
    arguments.tensors = int32_t(tensors_);
  }

  // The address of a contiguous tensor of at least ``least`` numbers, on the device of the tables; null for none.
  template <class T>
  T* numbers(const char* name, const OptionalTensor& tensor, ScalarType dtype, int64_t least) const {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": expected ", name_of(dtype), ", got ",
                    name_of(tensor->scalar_type()));
    STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() >= least, name,
                    ": expected a contiguous tensor of at least ", least, " elements, got ", tensor->numel());
    STD_TORCH_CHECK(tensor->is_cpu() == place_.is_cpu() && tensor->get_device_index() == place_.get_device_index(),
                    name, ": expected a tensor on the device of rows, got one on another");
    return static_cast<T*>(tensor->data_ptr());
  }

  // A flat buffer, read and written 16 bytes at a time.
  void* buffer(const char* name, const OptionalTensor& tensor) const {
    const ScalarType dtype = dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    void* address = numbers<void>(name, tensor, dtype, elements_);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(address) % 16 == 0, name, ": expected an address of 16 bytes");
    return address;
  }

  // Of few tensors a table of the host, whose contents go with the launch; otherwise one of the device.
  void set_grads(const Tensor& grads) {
    if (!grads.is_cpu() || tensors_ > kInlined) {
      arguments.grads = numbers<int64_t>("grads", grads, ScalarType::Long, tensors_);
      return;
    }
    STD_TORCH_CHECK(grads.scalar_type() == ScalarType::Long && grads.is_contiguous() && grads.numel() == tensors_,
                    "grads: expected an address for each of ", tensors_, " tensors, got ", grads.numel());
    std::memcpy(arguments.inlined, grads.data_ptr(), tensors_ * sizeof(int64_t));
  }

  void set_sq_norms(const OptionalTensor& sq_norms) {
    arguments.buckets = sq_norms ? sq_norms->size(0) : 0;
    arguments.sq_norms = numbers<double>("sq_norms", sq_norms, ScalarType::Double, 2 * arguments.buckets);
    STD_TORCH_CHECK(sq_norms || !(arguments.flags & kSkips), "sq_norms: expected a tensor, since skips is asked for");
  }

  // The numbers that all passes have, and ``of_rule`` more. After ``flags``, which say what they are for.
  void set_hyper(const Tensor& hyper, int64_t flags, int64_t of_rule = 0) {
    arguments.flags = flags;
    STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(0) >= group_count_ && hyper.size(1) >= kOfRule + of_rule,
                    "hyper: expected at least ", group_count_, " rows of ", kOfRule + of_rule, " numbers");
    arguments.hyper = numbers<double>("hyper", hyper, ScalarType::Double, 0);
    arguments.numbers = hyper.size(1);
  }

  void set_done(const OptionalTensor& done) { arguments.done = numbers<int32_t>("done", done, ScalarType::Int, 1); }

  void set_sums(const OptionalTensor& partials, const OptionalTensor& tensor_sums, const OptionalTensor& counters,
                const OptionalTensor& out, int64_t terms) {
    STD_TORCH_CHECK(partials && tensor_sums && counters && out,
                    "partials, tensor_sums, counters, out: expected tensors");
    const bool per_tensor = arguments.flags & kPerTensor;
    arguments.partials = numbers<double>("partials", partials, ScalarType::Double, terms * blocks_);
    arguments.tensor_sums = numbers<double>("tensor_sums", tensor_sums, ScalarType::Double, terms * tensors_);
    arguments.counters = numbers<int32_t>("counters", counters, ScalarType::Int, 1 + tensors_);
    arguments.out = numbers<double>("out", out, ScalarType::Double, terms * (per_tensor ? row_count_ : 1));
  }

  void run(const char* name, Pass pass, Rule rule = Rule::none) const {
    if (blocks_ == 0) return;
    const int32_t device = place_.get_device_index();
    const Guard guard(device);
    const char* error = launcher()(pass, rule, arguments, uint32_t(blocks_), current_stream(device));
    STD_TORCH_CHECK(!error, "kernel ", name, " of ", blocks_, " blocks: ", error);
  }

 private:
  decltype(&launch_f32) launcher() const {
    switch (dtype_) {
      case ScalarType::Double:
        return launch_f64;
      case ScalarType::Float:
        return launch_f32;
      case ScalarType::BFloat16:
        return launch_bf16;
      default:
        STD_TORCH_CHECK(dtype_ == ScalarType::Half, "dtype: expected float64, float32, bfloat16 or float16");
        return launch_f16;
    }
  }

  ScalarType dtype_;
  int64_t elements_, row_count_, group_count_, tensors_ = 0, blocks_ = 0;
  const Tensor& place_;
};

void reduce_sq_norm(Tensor rows, Tensor chunks, ScalarType dtype, int64_t elements, int64_t row_count,
                    int64_t group_count, Tensor grads, OptionalTensor perturbed, Tensor hyper, int64_t flags,
                    Tensor partials, Tensor tensor_sums, Tensor counters, Tensor out) {
  Launch launch(rows, chunks, dtype, elements, row_count, group_count);
  launch.set_grads(grads);
  launch.set_hyper(hyper, flags & ~kPerTensor);
  launch.arguments.perturbed = launch.buffer("perturbed", perturbed);
  launch.set_sums(partials, tensor_sums, counters, out, 2);
  launch.run("reduce_sq_norm", Pass::reduce_sq_norm);
}

void ascend(Tensor rows, Tensor chunks, ScalarType dtype, int64_t elements, int64_t row_count, int64_t group_count,
            Tensor grads, OptionalTensor perturbed, OptionalTensor slow, Tensor sq_norms, Tensor hyper, int64_t flags,
            OptionalTensor done) {
  Launch launch(rows, chunks, dtype, elements, row_count, group_count);
  launch.set_grads(grads);
  launch.set_hyper(hyper, flags);
  launch.set_sq_norms(sq_norms);
  launch.arguments.perturbed = launch.buffer("perturbed", perturbed);
  launch.arguments.slow = launch.buffer("slow", slow);
  launch.set_done(done);
  launch.run("ascend", Pass::ascend);
}

// The four passes that descend; each has those of the optional buffers that it reads or writes.
template <Pass kPass>
void descend(Tensor rows, Tensor chunks, ScalarType dtype, int64_t elements, int64_t row_count, int64_t group_count,
             Tensor grads, OptionalTensor perturbed, OptionalTensor slow, OptionalTensor fast, Tensor fast_from,
             OptionalTensor first, OptionalTensor s0, OptionalTensor s1, OptionalTensor s2, OptionalTensor f0,
             OptionalTensor f1, OptionalTensor f2, Tensor steps, Tensor steps_from, OptionalTensor sq_norms,
             Tensor hyper, int64_t number, int64_t flags, OptionalTensor partials, OptionalTensor tensor_sums,
             OptionalTensor counters, OptionalTensor out, OptionalTensor done) {
  STD_TORCH_CHECK(0 <= number && number < kRules, "rule: expected 0 to ", kRules - 1, ", got ", number);
  const Rule rule = Rule(number);
  const int states = extent_of(rule).buffers;
  const bool derivable = states > 0 && !(flags & kNesterov);
  STD_TORCH_CHECK(derivable || !(flags & kDerives), "flags: the fast weights cannot be derived from this rule's state");
  Launch launch(rows, chunks, dtype, elements, row_count, group_count);
  Arguments& a = launch.arguments;
  launch.set_grads(grads);
  launch.set_hyper(hyper, flags, extent_of(rule).numbers);
  launch.set_sq_norms(sq_norms);
  a.perturbed = launch.buffer("perturbed", perturbed), a.slow = launch.buffer("slow", slow);
  a.fast = launch.buffer("fast", fast), a.fast_from = launch.buffer("fast_from", fast_from);
  a.first = launch.buffer("first", first);
  const OptionalTensor* to[] = {&s0, &s1, &s2};
  const OptionalTensor* from[] = {&f0, &f1, &f2};
  for (int s = 0; s < states; ++s) {
    STD_TORCH_CHECK(*to[s] && *from[s], "state: expected ", states, " buffers, got ", s);
    a.state[s] = launch.buffer("state", *to[s]), a.state_from[s] = launch.buffer("state_from", *from[s]);
  }
  a.steps = launch.numbers<float>("steps", steps, ScalarType::Float, row_count);
  a.steps_from = launch.numbers<float>("steps_from", steps_from, ScalarType::Float, row_count);
  STD_TORCH_CHECK(kPass != Pass::descend_ascend || sq_norms, "sq_norms: expected a tensor");
  launch.set_done(done);
  if (kPass == Pass::descend_align) launch.set_sums(partials, tensor_sums, counters, out, 3);
  constexpr const char* kNames[] = {"descend", "descend_ascend", "descend_interpolate", "descend_align"};
  launch.run(kNames[int(kPass) - int(Pass::descend)], kPass, rule);
}

void interpolate(Tensor rows, Tensor chunks, ScalarType dtype, int64_t elements, int64_t row_count, int64_t group_count,
                 OptionalTensor perturbed, Tensor slow, Tensor sums, int64_t flags) {
  Launch launch(rows, chunks, dtype, elements, row_count, group_count);
  launch.arguments.flags = flags;
  launch.arguments.perturbed = launch.buffer("perturbed", perturbed);
  launch.arguments.slow = launch.buffer("slow", slow);
  launch.arguments.buckets = sums.size(0);
  const int64_t least = flags & kPerTensor ? row_count : sums.size(0);
  launch.arguments.sums = launch.numbers<double>("sums", sums, ScalarType::Double, 3 * least);
  launch.run("interpolate", Pass::interpolate);
}

// Whether there is code for the GPU of this number.
bool serves(int64_t device) {
  const Guard guard{int32_t(device)};
  return !launch_f32(Pass::ascend, Rule::none, {}, 0, nullptr);
}

}  // namespace
}  // namespace cuda
}  // namespace lookbehind_fused

STABLE_TORCH_LIBRARY_IMPL(lookbehind_fused_cuda, CompositeExplicitAutograd, m) {
  m.impl("serves", TORCH_BOX(&lookbehind_fused::cuda::serves));
}

#define LOOKBEHIND_IMPL(key) STABLE_TORCH_LIBRARY_IMPL(lookbehind_fused_cuda, key, m)
LOOKBEHIND_IMPL(LOOKBEHIND_KEY) {
  using lookbehind_fused::Pass;
  namespace cuda = lookbehind_fused::cuda;
  m.impl("reduce_sq_norm", TORCH_BOX(&cuda::reduce_sq_norm));
  m.impl("ascend", TORCH_BOX(&cuda::ascend));
  m.impl("descend", TORCH_BOX(&cuda::descend<Pass::descend>));
  m.impl("descend_ascend", TORCH_BOX(&cuda::descend<Pass::descend_ascend>));
  m.impl("descend_interpolate", TORCH_BOX(&cuda::descend<Pass::descend_interpolate>));
  m.impl("descend_align", TORCH_BOX(&cuda::descend<Pass::descend_align>));
  m.impl("interpolate", TORCH_BOX(&cuda::interpolate));
}
