// A Tensor[] argument as addresses, sizes and strides: torch::stable::Tensor would cost two allocations for each
// tensor, more than the work of a pass on a small one.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "contract.h"

namespace lookbehind_fused {

struct TensorInfo {
  void* data;
  int64_t numel, dim;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t dtype;
};

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

// Sizes and strides of a tensor. Rows of ``table`` are padded in front with dimensions of one element.
struct Layout {
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
};

inline bool same_sizes(const TensorInfo& a, const Layout& b) {
  const int64_t padding = b.dim - a.dim;
  if (padding < 0) return false;
  for (int64_t d = 0; d < b.dim; ++d)
    if (b.sizes[d] != (d < padding ? 1 : a.sizes[d - padding])) return false;
  return true;
}

// Of two tensors of the same sizes.
inline bool same_strides(const TensorInfo& a, const Layout& b) {
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d + b.dim - a.dim]) return false;
  return true;
}

// That of a tensor by its row of ``table``, which has so many columns.
inline Layout layout_in(const int64_t* row, int64_t columns) {
  const int64_t dim = (columns - kSizes) / 2;
  return {dim, row + kSizes, row + kSizes + dim};
}

// Holds its tensors until the op returns: a negated or conjugate view comes as a copy that nobody else holds. Copies of
// the list are one list, since TORCH_BOX hands on copies.
class TensorList {
 public:
  explicit TensorList(size_t size) : held_(std::make_shared<Held>()) {
    held_->infos.reserve(size), held_->tensors.reserve(size);
  }
  void hold(AtenTensorHandle tensor) {
    held_->tensors.push_back(tensor);
    held_->infos.push_back(info_of(tensor));
  }
  size_t size() const { return held_->infos.size(); }
  bool empty() const { return held_->infos.empty(); }
  const TensorInfo& operator[](size_t i) const { return held_->infos[i]; }

 private:
  struct Held {
    std::vector<TensorInfo> infos;
    std::vector<AtenTensorHandle> tensors;
    ~Held() {
      for (AtenTensorHandle tensor : tensors) aoti_torch_delete_tensor_object(tensor);
    }
  };
  std::shared_ptr<Held> held_;
};

}  // namespace lookbehind_fused

// How TORCH_BOX takes a TensorList off the stack.
template <>
struct torch::stable::detail::ToImpl<lookbehind_fused::TensorList> {
  static lookbehind_fused::TensorList call(StableIValue value, uint64_t, bool) {
    const auto list = to<StableListHandle>(value);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    lookbehind_fused::TensorList tensors(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      tensors.hold(to<AtenTensorHandle>(item));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    return tensors;
  }
};
