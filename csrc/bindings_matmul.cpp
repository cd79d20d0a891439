// The matrix product as PyTorch sees it: argument checks, and how it is divided into tasks.

#include "bindings.h"
#include "processor.h"

namespace fastllm {
namespace {

constexpr int64_t kTasksPerThread = 4;
// Blocks of rows: too short, and copying b costs more than it saves; too long, and a leaves the
// cache. Multiples of the rows of every instruction set's tile.
constexpr int64_t kRowsUnit = 42, kFewestRows = 2 * kRowsUnit, kMostRows = 12 * kRowsUnit;
// A small c over a great depth (the gradient of a weight) is computed in slices of the depth. How
// many must depend on the shape alone: it decides the order of the sums.
constexpr int64_t kSmallResult = 512 * 1024, kFewestDepth = 1024, kMostSlices = 8;

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

Matrix matrix(const Check& check, const char* name, const Tensor& tensor) {
  check.rank(name, tensor, 2);
  const Matrix m = {const_cast<void*>(tensor.const_data_ptr()), check.format(name, tensor),
                    tensor.stride(0), tensor.stride(1)};
  const bool dense = tensor.stride(1) == 1 || tensor.stride(0) == 1;
  check.require(dense || tensor.size(0) <= 1 || tensor.size(1) <= 1,
                std::string(name) + " must have neighbours in memory along one dimension");
  check.require(tensor.is_cpu(), std::string(name) + " must be on the CPU");
  return m;
}

// A single row or column has no stride that counts: one of the two is made 1.
void normalise(Matrix& m, int64_t rows, int64_t columns) {
  if (m.row_stride == 1 || m.column_stride == 1) return;
  if (columns <= 1) {
    m.column_stride = 1;
  } else if (rows <= 1) {
    m.row_stride = 1;
  }
}

// Two numbers of an operand whose depth lies along memory are read at once: an odd depth ends with
// half a pair.
bool multiplies_pairs(const Matmul& m) {
  static const bool fast = kernels().matmul.pairs && fast_bf16_pairs();
  const bool across = m.a.column_stride != 1 && m.b.column_stride == 1;
  return fast && m.a.format == kBFloat16 && m.b.format == kBFloat16 && (across || m.depth % 2 == 0);
}

void plan(Matmul& m, bool in_order) {
  const bool small = m.rows * m.columns <= kSmallResult;
  const bool sliced = !in_order && small && m.depth >= 2 * kFewestDepth;
  const int64_t slices = sliced ? std::min(m.depth / kFewestDepth, kMostSlices) : 1;
  m.depth_per_task = std::max<int64_t>(2, divided(m.depth, 2 * slices) * 2);
  const int64_t others = divided(m.columns, kMatmulBlock) * slices;
  const int64_t wanted = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t share = divided(m.rows, divided(wanted, others));
  m.rows_per_task = std::clamp(divided(share, kRowsUnit) * kRowsUnit, kFewestRows, kMostRows);
}

void matmul_(Tensor a, Tensor b, Tensor out, bool add, bool in_order) {
  const Check check("matmul_");
  Matmul m = {matrix(check, "a", a), matrix(check, "b", b), matrix(check, "out", out), 0, 0, 0,
              add, false, 0, 0, nullptr};
  m.rows = a.size(0), m.depth = a.size(1), m.columns = b.size(1);
  check.require(b.size(0) == m.depth, "b must have " + std::to_string(m.depth) + " rows, found " +
                                          shape_name(b.sizes()));
  check.require(out.size(0) == m.rows && out.size(1) == m.columns,
                "out must be " + shape_name(std::initializer_list<int64_t>{m.rows, m.columns}) +
                    ", found " + shape_name(out.sizes()));
  check.require(out.stride(1) == 1 || m.columns <= 1,
                "the rows of out must be contiguous");
  if (m.rows == 0 || m.columns == 0) return;
  normalise(m.a, m.rows, m.depth);
  normalise(m.b, m.depth, m.columns);
  m.pairs = multiplies_pairs(m);
  plan(m, in_order);
  const int64_t slices = std::max<int64_t>(1, divided(m.depth, m.depth_per_task));
  Tensor partial = empty(a, ScalarType::Float, {slices > 1 ? slices : 0, m.rows, m.columns});
  if (slices > 1) m.partial = static_cast<float*>(partial.mutable_data_ptr());
  const int64_t tasks =
      divided(m.rows, m.rows_per_task) * divided(m.columns, kMatmulBlock) * slices;
  parallel_tasks(kernels().matmul.product, m, tasks);
  if (slices > 1) {
    parallel(kernels().matmul.add_slices[m.c.format], m, m.rows, 4 * m.columns * (slices + 1));
  }
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("matmul_(Tensor a, Tensor b, Tensor(a!) out, bool add, bool in_order) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("matmul_", TORCH_BOX(&fastllm::matmul_)); }
