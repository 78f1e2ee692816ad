// The op that finds gradients' addresses for backends that hand them to a GPU: Python's access to a tensor's strides,
// dtype and address takes longer than all else that a launch needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "tensor_list.h"

namespace lookbehind_fused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t* numbers_of(const char* name, const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous() && tensor.numel() == numel,
      name, ": expected ", numel, " contiguous int64 on the CPU");
  return static_cast<int64_t*>(tensor.data_ptr());
}

// Writes the addresses and returns how many have changed; -1, and nothing is written, if a gradient has another dtype,
// is laid out in another way than ``table`` says of its parameter, or is a negated view.
int64_t locate(TensorList grads, ScalarType dtype, Tensor table, Tensor addresses) {
  const int64_t count = int64_t(grads.size()), columns = table.size(1);
  STD_TORCH_CHECK(table.size(0) == count && columns >= kSizes && (columns - kSizes) % 2 == 0,
                  "table: expected layouts of ", count, " tensors");
  const int64_t* rows = numbers_of("table", table, count * columns);
  int64_t *at = numbers_of("addresses", addresses, count), changed = 0;
  for (int64_t t = 0; t < count; ++t) {
    const Layout like = layout_in(rows + t * columns, columns);
    if (grads[t].dtype != int32_t(dtype) || !same_sizes(grads[t], like) || !same_strides(grads[t], like)) return -1;
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t address = reinterpret_cast<int64_t>(grads[t].data);
    changed += at[t] != address;
    at[t] = address;
  }
  return changed;
}

// Negated views, whose memory has the other sign. Without this the dispatcher would hand on copies that nobody keeps.
int64_t locate_negated(TensorList, ScalarType, Tensor, Tensor) { return -1; }

}  // namespace
}  // namespace lookbehind_fused

STABLE_TORCH_LIBRARY_IMPL(lookbehind_fused, CompositeExplicitAutograd, m) {
  m.impl("locate", TORCH_BOX(&lookbehind_fused::locate));
}
STABLE_TORCH_LIBRARY_IMPL(lookbehind_fused, Negative, m) {
  m.impl("locate", TORCH_BOX(&lookbehind_fused::locate_negated));
}
