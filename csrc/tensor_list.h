// A Tensor[] argument as addresses, sizes and strides. std::vector<torch::stable::Tensor> would cost two allocations
// and an owner for each tensor: more than the work of a pass on a small one. The caller's tensors outlive the call.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

namespace lookbehind_fused {

struct TensorInfo {
  void* data;
  int64_t numel, dim;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t dtype;
};

using TensorList = std::vector<TensorInfo>;

inline TensorInfo info_of(AtenTensorHandle tensor) {
  TensorInfo info;
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &info.data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &info.numel));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &info.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &info.dtype));
  info.sizes = sizes, info.strides = strides;
  return info;
}

}  // namespace lookbehind_fused

// How TORCH_BOX takes a TensorList off the stack.
template <>
struct torch::stable::detail::ToImpl<lookbehind_fused::TensorList> {
  static lookbehind_fused::TensorList call(StableIValue value, uint64_t, bool) {
    const auto list = to<StableListHandle>(value);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    lookbehind_fused::TensorList tensors;
    tensors.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      const auto tensor = to<AtenTensorHandle>(item);
      tensors.push_back(lookbehind_fused::info_of(tensor));
      TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(tensor));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    return tensors;
  }
};
