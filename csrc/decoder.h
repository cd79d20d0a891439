// One token for every running sequence: all layers and the draw, without a return to Python.

#pragma once

#include <stdint.h>

#include <vector>

#include "kernels.h"
#include "sampling.h"

namespace fastllm {

struct DecoderShape {
  int64_t hidden, heads, key_heads, head_size, inner, vocabulary;
  float eps, scale;     // of norms; of scores
  Format format;        // of hidden states, norms' weights and the cache: fp32 or bf16
  Format embedding_format;
  const void* embedding;  // [vocabulary, hidden]
  const void* norm;       // [hidden], the last one
  PackedMatrix head;
};

// A projection with its bias, or null.
struct Projection {
  PackedMatrix matrix;
  const float* bias;
};

struct DecoderLayer {
  Projection q, k, v, o, gate, up, down;
  const void *input_norm, *post_norm;  // [hidden]
  const void *q_norm, *k_norm;         // [head_size] or null
  int64_t window;                      // 0: none
  void *keys, *values;                 // blocks of the cache
};

// The state of the running sequences; see fastllm/generation/batch.py.
struct RunningRows {
  int64_t* token;
  int32_t *position, *tail_length, *count;
  const int32_t *group, *tail_blocks, *prefix_blocks, *prefix_length, *max_count;
  int64_t tail_stride, prefix_stride;
  SamplingRows sampling;
};

// Angles of rotary embeddings for every position [P, head_size / 2].
struct Rotary {
  const float *cos, *sin;
};

// What was drawn: [steps, rows] each.
struct Drawn {
  int64_t* token_ids;
  float *logprobs, *sampling_logprobs;
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, std::vector<DecoderLayer> layers);

  // Where the blocks of a layer's keys and values lie.
  void set_cache(int64_t layer, void* keys, void* values) {
    layers_[layer].keys = keys;
    layers_[layer].values = values;
  }

  // Draws up to `steps` tokens for rows [0, rows) and stops after a token with which a sequence
  // ends. Returns how many were drawn.
  int64_t run(const RunningRows& running, const Rotary& rotary, int64_t rows, int64_t steps,
              int64_t threads, const Drawn& drawn);

 private:
  struct Pass;
  struct Buffers {
    std::vector<char> memory;
    char *h, *x, *update, *q, *k, *v, *attended, *gate, *up;
    float* logits;
    int32_t* lengths;
  };

  void reserve(int64_t rows, int64_t threads);

  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  Buffers buffers_;
  std::vector<DecodeTask> tasks_;
  int64_t rows_ = 0, threads_ = 0;
};

}  // namespace fastllm
