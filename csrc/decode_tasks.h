// The division of decode_attention into tasks, for everybody who runs its kernels.

#pragma once

#include <vector>

#include "kernels.h"

namespace fastllm {

// Fills `tasks`, whose memory is used again, with runs of neighbouring sequences of one prompt
// (`group` [sequences] names it): as long as they can be, for a run's prompt is read once, but of
// at most `most_rows` query rows and no more than a thread's share of all of them.
void decode_tasks(std::vector<DecodeTask>& tasks, const int32_t* group, int64_t sequences,
                  int64_t heads, int64_t key_heads, int64_t threads, int64_t most_rows);

}  // namespace fastllm
