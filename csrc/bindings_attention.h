// What the bindings of attention and decode_attention share: checks of heads and of index lists.

#pragma once

#include "bindings.h"
#include "processor.h"

namespace fastllm {

// Offsets [n + 1] of n lists that lie one after another and end at `total`.
inline void check_offsets(const Check& check, const char* name, const Tensor& offsets,
                          int64_t lists, int64_t total) {
  check.tensor(name, offsets, ScalarType::Int, {lists + 1});
  const int32_t* offset = data<int32_t>(offsets);
  bool fits = offset[0] == 0 && offset[lists] == total;
  for (int64_t i = 0; i < lists; ++i) fits = fits && offset[i] <= offset[i + 1];
  check.require(fits, std::string(name) + " must ascend from 0 to " + std::to_string(total));
}

// Indices in [low, high).
inline void check_indices(const Check& check, const char* name, const Tensor& indices,
                          int64_t count, int64_t low, int64_t high) {
  check.tensor(name, indices, ScalarType::Int, {count});
  const int32_t* index = data<int32_t>(indices);
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] >= low && index[i] < high) continue;
    check.fail(std::string(name) + " must lie in " + std::to_string(low) + ".." +
               std::to_string(high - 1) + ", found " + std::to_string(index[i]) + " at " +
               std::to_string(i));
  }
}

// Heads [rows, heads, size] that are read where they are.
inline HeadRows check_head_rows(const Check& check, const char* name, const Tensor& tensor,
                                ScalarType dtype, std::initializer_list<int64_t> shape) {
  check.shape(name, tensor, dtype, shape);
  if (tensor.size(2) > 1 && tensor.stride(2) != 1) {
    check.fail(std::string(name) +
               " must have heads whose elements lie side by side, found a stride of " +
               std::to_string(tensor.stride(2)));
  }
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

inline void check_head_sizes(const Check& check, int64_t heads, int64_t key_heads,
                             int64_t head_size) {
  check.require(head_size % 2 == 0 && head_size >= 2 && head_size <= kMaxHeadSize,
                "the head size must be even and at most " + std::to_string(kMaxHeadSize) +
                    ", found " + std::to_string(head_size));
  check.require(key_heads > 0 && heads % key_heads == 0,
                std::to_string(heads) + " query heads do not divide over " +
                    std::to_string(key_heads) + " key heads");
}

struct Shapes {
  int64_t queries, tokens, heads, key_heads, head_size;
};

struct Inputs {
  Shapes shapes;
  HeadRows q, k, v;
};

inline Inputs check_heads(const Check& check, const Tensor& q, const char* k_name, const Tensor& k,
                          const char* v_name, const Tensor& v) {
  check.rank("q", q, 3);
  check.rank(k_name, k, 3);
  const Shapes s = {q.size(0), k.size(0), q.size(1), k.size(1), q.size(2)};
  const ScalarType dtype = q.scalar_type();
  const Inputs inputs = {
      s,
      check_head_rows(check, "q", q, dtype, {s.queries, s.heads, s.head_size}),
      check_head_rows(check, k_name, k, dtype, {s.tokens, s.key_heads, s.head_size}),
      check_head_rows(check, v_name, v, dtype, {s.tokens, s.key_heads, s.head_size}),
  };
  check_head_sizes(check, s.heads, s.key_heads, s.head_size);
  return inputs;
}

// Heads of a new, contiguous tensor.
inline OutHeadRows new_head_rows(Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.size(1) * tensor.size(2), tensor.size(2)};
}

// Which of a table's kernels: bf16 is multiplied in pairs where that is fast.
template <class A, size_t count>
Kernel<A> kernel_for(Format format, const Kernel<A> (&table)[count]) {
  static const bool pairs = fast_bf16_pairs();
  return format == kBFloat16 && pairs && table[kBFloat16Pairs] ? table[kBFloat16Pairs]
                                                               : table[format];
}

}  // namespace fastllm
