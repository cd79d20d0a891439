// Attention of one new token per sequence over its prompt and its tail. Neighbouring sequences of
// one prompt share a tile of query rows, so the prompt's keys are loaded once for all of them.

#include "online_softmax.h"

namespace fastllm {
namespace {

// Rows of a cache [rows, K, D] as the keys of one head.
template <class T>
KeyRun<T> run_of(const DecodeAttentionForward& a, const void* keys, const void* values,
                 int64_t first_row, int64_t count, int64_t position, int64_t key_head) {
  const int64_t stride = a.key_heads * a.head_size;
  const int64_t offset = first_row * stride + key_head * a.head_size;
  return {static_cast<const T*>(keys) + offset, static_cast<const T*>(values) + offset, stride,
          count, position};
}

template <class T>
void decode(const DecodeAttentionForward& a, const DecodeTask& task) {
  const int64_t group = a.heads / a.key_heads;
  const int64_t end = task.first_row + task.rows;
  const int32_t prompt = a.group[task.first_row / group];
  const int64_t prompt_start = a.prefix_starts[prompt];
  const int64_t prompt_length = a.prefix_starts[prompt + 1] - prompt_start;
  auto offset = [&](int64_t row) {
    return (row / group * a.heads + task.key_head * group + row % group) * a.head_size;
  };

  QueryTile tile(a.head_size);
  for (int64_t row = task.first_row; row < end; ++row) {
    const int64_t position = prompt_length + a.tail_lengths[row / group] - 1;
    tile.add_row(static_cast<const T*>(a.q) + offset(row), position, a.scale);
  }
  attend(tile, 0, tile.rows,
         run_of<T>(a, a.prefix_k, a.prefix_v, prompt_start, prompt_length, 0, task.key_head),
         a.window);
  for (int64_t row = task.first_row; row < end;) {
    const int64_t sequence = row / group;
    const int64_t next = smaller(end, (sequence + 1) * group);
    const int64_t tail_start = a.tail_rows[sequence] * a.tail_capacity;
    attend(tile, static_cast<int>(row - task.first_row), static_cast<int>(next - task.first_row),
           run_of<T>(a, a.tail_k, a.tail_v, tail_start, a.tail_lengths[sequence], prompt_length,
                     task.key_head),
           a.window);
    row = next;
  }
  for (int row = 0; row < tile.rows; ++row) {
    tile.finish_row(row, static_cast<T*>(a.out) + offset(task.first_row + row));
  }
}

template <class T>
void forward(const DecodeAttentionForward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) decode<T>(a, a.tasks[i]);
}

}  // namespace

const DecodeAttentionKernels FASTLLM_ISA::decode_attention = {kRows, FASTLLM_FORMATS(forward)};

}  // namespace fastllm
