// Drawing tokens: for the C++ decoder, and as an op.

#include "bindings.h"
#include "sampling.h"

namespace fastllm {
namespace {

// Exponentials cost more than the traffic: a logit counts as this many bytes of work.
constexpr int64_t kBytesPerLogit = 16;

std::tuple<Tensor, Tensor, Tensor> sample(Tensor logits, Tensor temperature, Tensor top_p,
                                          Tensor min_p, Tensor repetition_penalty, Tensor top_k,
                                          Tensor key, Tensor count, Tensor min_count,
                                          Tensor stop_tokens, Tensor seen) {
  const Check check("sample");
  check.rank("logits", logits, 2);
  check.rank("stop_tokens", stop_tokens, 2);
  check.rank("seen", seen, 2);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1), stops = stop_tokens.size(1);
  check.require(vocabulary > 0, "logits must have at least one column");
  check.tensor("logits", logits, ScalarType::Float, {rows, vocabulary});
  check.tensor("temperature", temperature, ScalarType::Float, {rows});
  check.tensor("top_p", top_p, ScalarType::Float, {rows});
  check.tensor("min_p", min_p, ScalarType::Float, {rows});
  check.tensor("repetition_penalty", repetition_penalty, ScalarType::Float, {rows});
  check.tensor("top_k", top_k, ScalarType::Int, {rows});
  check.tensor("key", key, ScalarType::Long, {rows});
  check.tensor("count", count, ScalarType::Int, {rows});
  check.tensor("min_count", min_count, ScalarType::Int, {rows});
  check.tensor("stop_tokens", stop_tokens, ScalarType::Int, {rows, stops});
  const int64_t seen_columns = seen.size(1) == 0 ? 0 : vocabulary;
  check.tensor("seen", seen, ScalarType::Byte, {rows, seen_columns});
  Tensor tokens = empty(logits, ScalarType::Long, {rows});
  Tensor logprobs = empty(logits, ScalarType::Float, {rows});
  Tensor sampling_logprobs = like(logprobs);
  const DrawTokens arguments = {
      {
          data<float>(temperature),
          data<float>(top_p),
          data<float>(min_p),
          data<float>(repetition_penalty),
          data<int32_t>(top_k),
          data<int64_t>(key),
          data<int32_t>(count),
          data<int32_t>(min_count),
          data<int32_t>(stop_tokens),
          stops,
          const_cast<uint8_t*>(data<uint8_t>(seen)),
          seen_columns,
      },
      data<float>(logits),
      vocabulary,
      static_cast<int64_t*>(tokens.mutable_data_ptr()),
      static_cast<float*>(logprobs.mutable_data_ptr()),
      static_cast<float*>(sampling_logprobs.mutable_data_ptr()),
  };
  parallel(kernels().sampling.draw, arguments, rows, vocabulary * kBytesPerLogit);
  return {tokens, logprobs, sampling_logprobs};
}

}  // namespace

void sample_rows(const SamplingRows& rows, const float* logits, int64_t vocabulary, int64_t begin,
                 int64_t end, int64_t* tokens, float* logprobs, float* sampling_logprobs) {
  const DrawTokens arguments = {rows, logits, vocabulary, tokens, logprobs, sampling_logprobs};
  kernels().sampling.draw(arguments, begin, end);
  if (rows.seen_stride == 0) return;
  for (int64_t row = begin; row < end; ++row) rows.seen[row * rows.seen_stride + tokens[row]] = 1;
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("sample(Tensor logits, Tensor temperature, Tensor top_p, Tensor min_p,"
        " Tensor repetition_penalty, Tensor top_k, Tensor key, Tensor count, Tensor min_count,"
        " Tensor stop_tokens, Tensor seen) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("sample", TORCH_BOX(&fastllm::sample)); }
