#include "kernels.cuh"

namespace lookbehind_fused {
namespace cuda {

const char* launch_bf16(Pass pass, Rule rule, const Arguments& arguments, uint32_t blocks, void* stream) {
  return launch<__nv_bfloat16>(pass, rule, arguments, blocks, stream);
}

}  // namespace cuda
}  // namespace lookbehind_fused
