// decode_attention as PyTorch sees it: argument checks, memory, and the division of the work into
// tasks.

#include "bindings_attention.h"

namespace fastllm {
namespace {

// Runs of neighbouring sequences with the same prompt, cut into blocks of query rows. A block is at
// most a thread's share of all rows, so that one large group keeps every thread busy.
std::vector<DecodeTask> decode_tasks(const int32_t* group, const Shapes& s, int64_t most_rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t heads = s.heads / s.key_heads;
  const int64_t share = (s.queries * s.heads + threads - 1) / threads;
  const int64_t block = std::clamp<int64_t>(share, heads, std::max(heads, most_rows));
  std::vector<DecodeTask> tasks;
  for (int64_t begin = 0, end; begin < s.queries; begin = end) {
    for (end = begin + 1; end < s.queries && group[end] == group[begin];) ++end;
    for (int32_t head = 0; head < s.key_heads; ++head) {
      for (int64_t row = begin * heads; row < end * heads; row += std::min(block, most_rows)) {
        const int64_t rows = std::min({block, most_rows, end * heads - row});
        tasks.push_back({static_cast<int32_t>(row), static_cast<int32_t>(rows), head});
      }
    }
  }
  return tasks;
}

Tensor decode_attention_forward(Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor prefix_starts,
                                Tensor group, Tensor tail_k, Tensor tail_v, Tensor tail_rows,
                                Tensor tail_lengths, double scale, int64_t window) {
  const Check check("decode_attention_forward");
  const Format format = check.format("q", q);
  const ScalarType dtype = q.scalar_type();
  check.rank("prefix_starts", prefix_starts, 1);
  check.rank("tail_k", tail_k, 4);
  const int64_t groups = prefix_starts.size(0) - 1;
  const int64_t tails = tail_k.size(0), capacity = tail_k.size(1);
  const Inputs inputs = check_heads(check, q, "prefix_k", prefix_k, "prefix_v", prefix_v);
  const Shapes& s = inputs.shapes;
  check.tensor("tail_k", tail_k, dtype, {tails, capacity, s.key_heads, s.head_size});
  check.tensor("tail_v", tail_v, dtype, {tails, capacity, s.key_heads, s.head_size});
  check_offsets(check, "prefix_starts", prefix_starts, groups, s.tokens);
  check_indices(check, "group", group, s.queries, 0, groups);
  check_indices(check, "tail_rows", tail_rows, s.queries, 0, tails);
  check_indices(check, "tail_lengths", tail_lengths, s.queries, 0, capacity + 1);

  const DecodeAttentionKernels& kernel = kernels().decode_attention;
  const auto tasks = decode_tasks(data<int32_t>(group), s, kernel.query_rows_per_task);
  Tensor out = empty(q, dtype, {s.queries, s.heads, s.head_size});
  auto tail_rows_of = [&](const Tensor& tail) {
    return HeadRows{tail.const_data_ptr(), s.key_heads * s.head_size, s.head_size};
  };
  const DecodeAttentionForward arguments = {
      inputs.q,
      inputs.k,
      inputs.v,
      data<int32_t>(prefix_starts),
      data<int32_t>(group),
      tail_rows_of(tail_k),
      tail_rows_of(tail_v),
      data<int32_t>(tail_rows),
      data<int32_t>(tail_lengths),
      new_head_rows(out),
      tasks.data(),
      s.heads,
      s.key_heads,
      s.head_size,
      capacity,
      static_cast<float>(scale),
      window,
  };
  parallel_tasks(kernel_for(format, kernel.forward), arguments, tasks.size());
  return out;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("decode_attention_forward(Tensor q, Tensor prefix_k, Tensor prefix_v,"
        " Tensor prefix_starts, Tensor group, Tensor tail_k, Tensor tail_v, Tensor tail_rows,"
        " Tensor tail_lengths, float scale, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("decode_attention_forward", TORCH_BOX(&fastllm::decode_attention_forward));
}
