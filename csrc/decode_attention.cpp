// Attention of one new token per sequence over its prompt and its tail. Neighbouring sequences of
// one prompt share a tile of query rows, so the prompt's keys are loaded once for all of them.

#include "online_softmax.h"

namespace fastllm {
namespace {

template <class T, class Cell>
void decode(const DecodeAttentionForward& a, const DecodeTask& task) {
  const int64_t group = a.heads / a.key_heads;
  const int64_t first = task.first_row, end = first + task.rows;
  const int32_t prompt = a.group[first / group];
  const int64_t prompt_start = a.prefix_starts[prompt];
  const int64_t prompt_length = a.prefix_starts[prompt + 1] - prompt_start;
  auto head = [&](int64_t row) { return task.key_head * group + row % group; };

  QueryTile<Cell> tile(
      a.head_size, a.scale, task.rows,
      [&](int64_t r) { return at<T>(a.q, (first + r) / group, head(first + r)); },
      [&](int64_t r) { return prompt_length + a.tail_lengths[(first + r) / group] - 1; });
  attend(tile, 0, tile.rows,
         run_of<T>(a.prefix_k, a.prefix_v, prompt_start, prompt_length, task.key_head, 0),
         a.window);
  for (int64_t row = first; row < end;) {
    const int64_t sequence = row / group;
    const int64_t next = smaller(end, (sequence + 1) * group);
    const int64_t tail_start = a.tail_rows[sequence] * a.tail_capacity;
    attend(tile, static_cast<int>(row - first), static_cast<int>(next - first),
           run_of<T>(a.tail_k, a.tail_v, tail_start, a.tail_lengths[sequence], task.key_head,
                     prompt_length),
           a.window);
    row = next;
  }
  tile.finish([&](int r, const float* attention, float) {
    store_row(at<T>(a.out, (first + r) / group, head(first + r)), attention, a.head_size, 1.0f);
  });
}

template <class T, class Cell = float>
void forward(const DecodeAttentionForward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) decode<T, Cell>(a, a.tasks[i]);
}

}  // namespace

const DecodeAttentionKernels FASTLLM_ISA::decode_attention = {
    kRows,
    FASTLLM_FORMATS_AND_PAIRS(forward),
};

}  // namespace fastllm
