// A CUDA runtime without a GPU: a launch is handed to a function that executes the kernel on the CPU. Linked with the
// objects that nvcc has made of csrc/cuda, it takes libcudart's place (tests/kernels/cuda_cases.py).
#include <cuda_runtime_api.h>

#include <map>
#include <string>

// Runs a kernel of this name; ``arguments`` points to each argument. 0 if it has ended well.
using Execute = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments);

namespace {
Execute execute = nullptr;
std::string message = "no error";
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> of_host_functions;
  return of_host_functions;
}
}  // namespace

extern "C" {
__attribute__((visibility("default"))) void set_executor(Execute function) { execute = function; }
__attribute__((visibility("default"))) void set_message(const char* text) { message = text; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  names()[host_function] = name;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  const auto found = names().find(function);
  if (!execute || found == names().end()) return cudaErrorInvalidDeviceFunction;
  const unsigned grids[] = {grid.x, grid.y, grid.z}, blocks[] = {block.x, block.y, block.z};
  return execute(found->second.c_str(), grids, blocks, arguments) ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* function) {
  return names().count(function) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? message.c_str() : "not a kernel of this library";
}

// What a launch with <<<>>> would call; there is none.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
}
