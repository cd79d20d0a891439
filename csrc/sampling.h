// Drawing the next token of rows of logits.

#pragma once

#include "kernels.h"

namespace fastllm {

// Draws a token for each of the rows [begin, end) of logits [B, vocabulary], in the calling thread;
// no row's result depends on the others. Marks the token in `seen`, and leaves the rest of the
// rows' state (count) to the caller. Uses the thread's scratch().
//
// `logprobs` are log_softmax(logits / temperature), at temperature 1 when greedy; not finite where
// the logits are not. `sampling_logprobs` are under the distribution that was drawn from; 0 when
// greedy.
void sample_rows(const SamplingRows& rows, const float* logits, int64_t vocabulary, int64_t begin,
                 int64_t end, int64_t* tokens, float* logprobs, float* sampling_logprobs);

}  // namespace fastllm
