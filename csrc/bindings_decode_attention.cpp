// decode_attention as PyTorch sees it: argument checks, memory, and the division of the work into
// tasks.

#include "bindings_attention.h"
#include "decode_tasks.h"

namespace fastllm {

void decode_tasks(std::vector<DecodeTask>& tasks, const int32_t* group, int64_t sequences,
                  int64_t heads, int64_t key_heads, int64_t threads, int64_t most_rows) {
  const int64_t heads_each = heads / key_heads;
  const int64_t share = (sequences * heads + threads - 1) / threads;
  const int64_t most = std::max<int64_t>(1, std::min(share, most_rows) / heads_each);
  tasks.clear();
  for (int64_t begin = 0, end; begin < sequences; begin = end) {
    for (end = begin + 1; end < sequences && group[end] == group[begin];) ++end;
    for (int32_t head = 0; head < key_heads; ++head) {
      for (int64_t first = begin; first < end; first += most) {
        const int64_t count = std::min(most, end - first);
        tasks.push_back({static_cast<int32_t>(first), static_cast<int32_t>(count), head});
      }
    }
  }
}

namespace {

struct BlockTable {
  const int32_t* blocks;
  int64_t stride;
};

// The blocks of `rows` runs of tokens; what lies past a run's length is not looked at.
BlockTable check_blocks(const Check& check, const std::string& name, const Tensor& blocks,
                        const Tensor& lengths, int64_t rows, int64_t cache_blocks) {
  const std::string blocks_name = name + "_blocks", lengths_name = name + "_lengths";
  check.rank(blocks_name.c_str(), blocks, 2);
  const int64_t columns = blocks.size(1);
  check.shape(blocks_name.c_str(), blocks, ScalarType::Int, {rows, columns});
  check.require(columns < 2 || blocks.stride(1) == 1,
                blocks_name + " must have rows whose elements lie side by side");
  check_indices(check, lengths_name.c_str(), lengths, rows, 0, columns * kCacheBlock + 1);
  const BlockTable table = {data<int32_t>(blocks), blocks.stride(0)};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t used = (data<int32_t>(lengths)[row] + kCacheBlock - 1) / kCacheBlock;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t block = table.blocks[row * table.stride + i];
      if (block >= 0 && block < cache_blocks) continue;
      check.fail(blocks_name + " must lie in 0.." + std::to_string(cache_blocks - 1) + ", found " +
                 std::to_string(block) + " at [" + std::to_string(row) + ", " + std::to_string(i) +
                 "]");
    }
  }
  return table;
}

Tensor decode_attention_forward(Tensor q, Tensor keys, Tensor values, Tensor prefix_blocks,
                                Tensor prefix_lengths, Tensor group, Tensor tail_blocks,
                                Tensor tail_lengths, double scale, int64_t window) {
  const Check check("decode_attention_forward");
  const Format format = check.format("q", q);
  const ScalarType dtype = q.scalar_type();
  check.rank("q", q, 3);
  check.rank("keys", keys, 4);
  check.rank("prefix_lengths", prefix_lengths, 1);
  const int64_t sequences = q.size(0), heads = q.size(1), head_size = q.size(2);
  const int64_t blocks = keys.size(0), key_heads = keys.size(1), groups = prefix_lengths.size(0);
  const HeadRows q_rows = check_head_rows(check, "q", q, dtype, {sequences, heads, head_size});
  check_head_sizes(check, heads, key_heads, head_size);
  check.tensor("keys", keys, dtype, {blocks, key_heads, head_size, kCacheBlock});
  check.tensor("values", values, dtype, {blocks, key_heads, kCacheBlock, head_size});
  const BlockTable prefix =
      check_blocks(check, "prefix", prefix_blocks, prefix_lengths, groups, blocks);
  check_indices(check, "group", group, sequences, 0, groups);
  const BlockTable tail = check_blocks(check, "tail", tail_blocks, tail_lengths, sequences, blocks);

  const DecodeAttentionKernels& kernel = kernels().decode_attention;
  std::vector<DecodeTask> tasks;
  decode_tasks(tasks, data<int32_t>(group), sequences, heads, key_heads,
               torch::stable::get_num_threads(), kernel.query_rows_per_task);
  Tensor out = empty(q, dtype, {sequences, heads, head_size});
  const DecodeAttentionForward arguments = {
      q_rows,
      keys.const_data_ptr(),
      values.const_data_ptr(),
      prefix.blocks,
      prefix.stride,
      data<int32_t>(prefix_lengths),
      data<int32_t>(group),
      tail.blocks,
      tail.stride,
      data<int32_t>(tail_lengths),
      new_head_rows(out),
      tasks.data(),
      static_cast<int64_t>(tasks.size()),
      heads,
      key_heads,
      head_size,
      static_cast<float>(scale),
      window,
  };
  parallel_tasks(kernel.forward[format], arguments, tasks.size());
  return out;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("decode_attention_forward(Tensor q, Tensor keys, Tensor values, Tensor prefix_blocks,"
        " Tensor prefix_lengths, Tensor group, Tensor tail_blocks, Tensor tail_lengths,"
        " float scale, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("decode_attention_forward", TORCH_BOX(&fastllm::decode_attention_forward));
}
