// What the bindings of all ops share: checks of tensor arguments, and threads. Uses PyTorch's
// stable ABI only, so that one build serves every PyTorch from 2.10 on.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace fastllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- Argument checks ------------------------------------------------------------------------

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

template <class Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Checks the arguments of one op; errors name the op and the argument.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error(std::string(op_) + ": " + message);
  }

  void require(bool condition, const std::string& message) const {
    if (!condition) fail(message);
  }

  // The storage format of the op's main tensor.
  Format format(const char* name, const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float: return kFloat32;
      case ScalarType::BFloat16: return kBFloat16;
      case ScalarType::Half: return kFloat16;
      default:
        fail(std::string(name) + " must be float32, bfloat16 or float16, found " +
             dtype_name(tensor.scalar_type()));
    }
  }

  void rank(const char* name, const Tensor& tensor, int64_t dimensions) const {
    if (tensor.dim() != dimensions) {
      fail(std::string(name) + " must have " + std::to_string(dimensions) + " dimensions, found " +
           shape_name(tensor.sizes()));
    }
  }

  void shape(const char* name, const Tensor& tensor, ScalarType dtype,
             std::initializer_list<int64_t> shape) const {
    const auto sizes = tensor.sizes();
    const bool fits = tensor.scalar_type() == dtype && tensor.dim() == int64_t(shape.size()) &&
                      std::equal(shape.begin(), shape.end(), sizes.begin());
    if (!fits) {
      fail(std::string(name) + " must be " + dtype_name(dtype) + " " + shape_name(shape) +
           ", found " + dtype_name(tensor.scalar_type()) + " " + shape_name(sizes));
    }
    if (!tensor.is_cpu()) fail(std::string(name) + " must be on the CPU");
  }

  void tensor(const char* name, const Tensor& tensor, ScalarType dtype,
              std::initializer_list<int64_t> sizes) const {
    shape(name, tensor, dtype, sizes);
    if (!tensor.is_contiguous()) fail(std::string(name) + " must be contiguous");
  }

  // A matrix [rows, columns] whose rows may lie anywhere; their elements must lie side by side.
  Rows rows(const char* name, const Tensor& tensor, ScalarType dtype,
            std::initializer_list<int64_t> sizes) const {
    return {tensor.const_data_ptr(), row_stride(name, tensor, dtype, sizes)};
  }
  OutRows out_rows(const char* name, Tensor& tensor, ScalarType dtype,
                   std::initializer_list<int64_t> sizes) const {
    const int64_t stride = row_stride(name, tensor, dtype, sizes);
    // Two rows in one place would be written by two threads.
    if (tensor.size(0) > 1 && stride < tensor.size(1)) {
      fail(std::string(name) + " must not overlap itself, found a row stride of " +
           std::to_string(stride) + " for " + shape_name(tensor.sizes()));
    }
    return {tensor.mutable_data_ptr(), stride};
  }

 private:
  int64_t row_stride(const char* name, const Tensor& tensor, ScalarType dtype,
                     std::initializer_list<int64_t> sizes) const {
    shape(name, tensor, dtype, sizes);
    if (tensor.numel() > 0 && tensor.size(1) > 1 && tensor.stride(1) != 1) {
      fail(std::string(name) + " must have rows whose elements lie side by side, found a stride of " +
           std::to_string(tensor.stride(1)));
    }
    return tensor.stride(0);
  }

  const char* op_;
};

// ---- Tensors --------------------------------------------------------------------------------

inline Tensor like(const Tensor& tensor) { return torch::stable::empty_like(tensor); }

inline Tensor empty(const Tensor& device_of, ScalarType dtype,
                    std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(device_of, {shape.begin(), shape.size()}, dtype);
}

inline Tensor zeros(const Tensor& device_of, ScalarType dtype,
                    std::initializer_list<int64_t> shape) {
  return torch::stable::new_zeros(device_of, {shape.begin(), shape.size()}, dtype);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// ---- Threads --------------------------------------------------------------------------------

// A thread is worth waking for at least this much memory traffic: 3 to 10 microseconds of it.
constexpr int64_t kBytesPerThread = 128 * 1024;

// Runs a kernel on [0, count) of units that touch `bytes` each, in PyTorch's own threads.
template <class A>
void parallel(Kernel<A> kernel, const A& arguments, int64_t count, int64_t bytes) {
  if (count == 0) return;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes));
  if (count <= grain) return kernel(arguments, 0, count);
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// Runs a kernel on `count` tasks of unequal size: each thread takes the next one when it is free.
template <class A>
void parallel_tasks(Kernel<A> kernel, const A& arguments, int64_t count) {
  if (count == 0) return;
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1)) < count;) kernel(arguments, task, task + 1);
  });
}

}  // namespace fastllm
