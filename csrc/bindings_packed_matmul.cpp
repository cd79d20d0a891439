// packed_matmul as PyTorch sees it: packing a matrix once, and products with it.

#include "bindings.h"
#include "memory.h"
#include "packing.h"

namespace fastllm {
namespace {

using Two = std::tuple<Tensor, Tensor>;

Packing packing_of(const Check& check, int64_t packing) {
  check.require(packing >= 0 && packing < kPackings,
                "packing must be 0 (fp32), 1 (bf16) or 2 (int8), found " + std::to_string(packing));
  return static_cast<Packing>(packing);
}

// A matrix in tensors that were made by pack_matrix.
PackedMatrix in_tensors(const Check& check, Tensor& panels, Tensor& scales, int64_t packing,
                        int64_t columns, int64_t depth) {
  const PackedMatrix m = packed_matrix(packing_of(check, packing), columns, depth,
                                       panels.mutable_data_ptr(),
                                       static_cast<float*>(scales.mutable_data_ptr()));
  const int64_t count = packed_panels(columns);
  const int64_t scaled = m.scales ? count * m.blocks * kPackedPanel : 0;
  check.tensor("panels", panels, ScalarType::Byte, {count * m.panel_bytes});
  check.tensor("scales", scales, ScalarType::Float, {scaled});
  return m;
}

Two pack_matrix(Tensor weight, int64_t packing) {
  const Check check("pack_matrix");
  const Format format = check.format("weight", weight);
  check.rank("weight", weight, 2);
  const int64_t columns = weight.size(0), depth = weight.size(1);
  const Rows rows = check.rows("weight", weight, weight.scalar_type(), {columns, depth});
  const int64_t count = packed_panels(columns);
  PackedMatrix m = packed_matrix(packing_of(check, packing), columns, depth, nullptr, nullptr);
  Tensor panels = empty(weight, ScalarType::Byte, {count * m.panel_bytes});
  Tensor scales = empty(weight, ScalarType::Float,
                        {packing == kPackedInt8 ? count * m.blocks * kPackedPanel : 0});
  prefer_large_pages(panels.mutable_data_ptr(), panels.numel());
  m = in_tensors(check, panels, scales, packing, columns, depth);
  const PackMatrix arguments = {{const_cast<void*>(rows.data), format, rows.stride, 1}, m};
  parallel(kernels().packed_matmul.pack[format], arguments, count, 2 * m.panel_bytes);
  return {panels, scales};
}

Tensor packed_matmul(Tensor x, Tensor panels, Tensor scales, int64_t packing, int64_t columns,
                     std::optional<Tensor> bias, bool wide) {
  const Check check("packed_matmul");
  const Format format = check.format("x", x);
  check.require(format != kFloat16, "x must be float32 or bfloat16, found float16");
  check.rank("x", x, 2);
  const int64_t rows = x.size(0), depth = x.size(1);
  const Rows in = check.rows("x", x, x.scalar_type(), {rows, depth});
  const PackedMatrix m = in_tensors(check, panels, scales, packing, columns, depth);
  check.require(packing != kPackedBFloat16 || (depth % 2 == 0 && in.stride % 2 == 0),
                "x must have an even number of columns for a bfloat16 matrix");
  if (bias) check.tensor("bias", *bias, ScalarType::Float, {columns});
  const ScalarType dtype = wide ? ScalarType::Float : x.scalar_type();
  Tensor out = empty(x, dtype, {rows, columns});
  const PackedProduct arguments = {
      &m,
      in.data,
      format,
      in.stride,
      rows,
      bias ? data<float>(*bias) : nullptr,
      out.mutable_data_ptr(),
      wide ? kFloat32 : format,
      columns,
  };
  if (rows > 0) {
    parallel(packed_product(kernels().packed_matmul, m.packing, format), arguments,
             packed_panels(columns), m.panel_bytes);
  }
  return out;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("pack_matrix(Tensor weight, int packing) -> (Tensor, Tensor)");
  m.def("packed_matmul(Tensor x, Tensor panels, Tensor scales, int packing, int columns,"
        " Tensor? bias, bool wide) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("pack_matrix", TORCH_BOX(&fastllm::pack_matrix));
  m.impl("packed_matmul", TORCH_BOX(&fastllm::packed_matmul));
}
