// What the kernels of one instruction set offer to the rest of the library: for each op a struct of
// arguments and a table of functions, one per storage format. Pointers and sizes only; shapes are
// checked and memory is allocated before a kernel sees them (bindings_*.cpp).
//
// A kernel works on the range [begin, end) of the unit that its comment names, so that the caller
// may divide the work over threads. Units do not depend on each other, and no unit's result
// depends on how the range was divided.

#pragma once

#include <stdint.h>

namespace fastllm {

enum Format { kFloat32, kBFloat16, kFloat16, kFormats };

// Memory of the calling thread for at least `numbers` numbers, aligned to 64 bytes. The next call
// of the same thread may give the same memory.
float* scratch(int64_t numbers);

template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

// ---- matmul: tasks --------------------------------------------------------------------------

// A matrix in memory: element (i, j) is data[i * row_stride + j * column_stride].
struct Matrix {
  void* data;
  Format format;
  int64_t row_stride, column_stride;
};

// Columns of c in a task.
constexpr int kMatmulBlock = 512;

// c [rows, columns] = a [rows, depth] b [depth, columns], or c += a b. A task is a block of c, over
// all of the depth or, with partial sums, over a slice of it. With R blocks of rows and B blocks of
// columns, task i is row block i % R, column block i / R % B, slice i / R / B.
struct Matmul {
  Matrix a, b, c;  // one stride of a and of b is 1, and the column stride of c
  int64_t rows, columns, depth;
  bool add;
  bool pairs;  // a and b are bf16, to be multiplied two by two
  int64_t rows_per_task, depth_per_task;  // the depth even for pairs
  float* partial;  // [slices, rows, columns], or null where there is one slice
};

struct MatmulKernels {
  bool pairs;  // whether there is an instruction for pairs of bf16
  Kernel<Matmul> product;               // tasks
  Kernel<Matmul> add_slices[kFormats];  // rows of c, by its format
};

// ---- packed_matmul: panels ------------------------------------------------------------------

constexpr int64_t kPackedPanel = 32;         // columns that are stored together
constexpr int64_t kPackedDepth = 256;        // words that are summed before they join the sum
constexpr int64_t kPackedInt8Depth = 128;    // numbers of 8 bits that share a scale

enum Packing { kPackedFloat32, kPackedBFloat16, kPackedInt8, kPackings };

// A matrix [depth, columns] in panels [words, kPackedPanel], zeros beyond the columns. A word is a
// number or, in bf16, two numbers of neighbouring depths.
struct PackedMatrix {
  void* data;
  float* scales;  // int8: [panels, blocks, kPackedPanel]
  Packing packing;
  int64_t columns, depth, words;
  int64_t block_words, blocks;
  int64_t panel_bytes;
};

// out [rows, columns] = x [rows, depth] matrix + bias.
struct PackedProduct {
  const PackedMatrix* matrix;
  const void* x;
  Format x_format;  // fp32 or bf16; bf16 for products in pairs, with an even stride
  int64_t x_stride, rows;
  const float* bias;  // [columns] or null
  void* out;
  Format out_format;  // fp32 or bf16
  int64_t out_stride;
};

struct PackMatrix {
  Matrix from;  // [columns, depth], the depth along memory
  PackedMatrix matrix;
};

struct PackedMatmulKernels {
  Kernel<PackedProduct> product[kPackings];
  Kernel<PackedProduct> pairs;  // bf16 multiplied two by two; null without an instruction for it
  Kernel<PackMatrix> pack[kFormats];
};

// ---- Rows in memory -------------------------------------------------------------------------

// A matrix that is read in place: the elements of a row lie side by side, and the rows `stride`
// elements apart. They may be slices of wider rows, or all the same row (stride 0).
struct Rows {
  const void* data;
  int64_t stride;
};

// A matrix that is written.
struct OutRows {
  void* data;
  int64_t stride;
};

// ---- rms_norm: rows -------------------------------------------------------------------------

struct RmsNormForward {
  Rows x;              // [N, C]
  Rows residual;       // [N, C]; no data without a residual
  const void* weight;  // [C]
  OutRows y;           // [N, C]
  OutRows h;           // [N, C], x + residual; no data without a residual
  float* rstd;         // [N]
  int64_t columns;     // C
  float eps;
};

struct RmsNormBackward {
  Rows dy;             // [N, C]
  Rows dh;             // [N, C]; no data where no gradient reaches h
  Rows h;              // [N, C]
  const void* weight;  // [C]
  const float* rstd;   // [N]
  OutRows dx;          // [N, C]
  float* dweight;      // [blocks, C], zero; one row for each block of rows; or null
  int64_t rows, columns;
  int64_t block;  // rows per block: the unit of backward
};

struct RmsNormKernels {
  Kernel<RmsNormForward> forward[kFormats];
  Kernel<RmsNormBackward> backward[kFormats];
};

// ---- rope: tokens ---------------------------------------------------------------------------

// Heads of tokens [T, H, D]: element (t, h, i) is data[t * token_stride + h * head_stride + i].
struct Heads {
  const void* in;
  int64_t token_stride, head_stride;
  void* out;  // may be `in`
  int64_t out_token_stride, out_head_stride;
  int64_t count;  // H
};

struct RopeForward {
  Heads q, k;
  const float* cos;          // [P, D/2]
  const float* sin;          // [P, D/2]
  const int32_t* positions;  // [T]
  int64_t head_size;
  bool inverse;
};

struct RopeKernels {
  Kernel<RopeForward> forward[kFormats];
};

// ---- swiglu: elements, row by row -----------------------------------------------------------

struct SwigluForward {
  Rows gate, up;  // [N, F]
  OutRows out;    // [N, F]
  int64_t columns;
};

struct SwigluBackward {
  Rows dout, gate, up;  // [N, F]
  OutRows dgate, dup;   // [N, F]; either may be where an input is
  int64_t columns;
};

struct SwigluKernels {
  Kernel<SwigluForward> forward[kFormats];
  Kernel<SwigluBackward> backward[kFormats];
};

// ---- attention ------------------------------------------------------------------------------

constexpr int kMaxHeadSize = 256;

// Heads of rows [N, H, D] that are read in place: number i of a head is
// data[row * row_stride + head * head_stride + i].
struct HeadRows {
  const void* data;
  int64_t row_stride, head_stride;
};

// Heads of rows that are written.
struct OutHeadRows {
  void* data;
  int64_t row_stride, head_stride;
};

// The packed, prefix-shared layout: see fastllm/layout.py.
struct Layout {
  int64_t segments;                // S
  const int32_t* starts;           // [S + 1] first packed row of each segment
  const int32_t* prefix;           // [S] the segment that a segment continues, or -1
  const int32_t* positions;        // [T]
  const int32_t* query_rows;       // [N] packed rows that have a query
  const int32_t* query_starts;     // [S + 1] first query of each segment
  const int32_t* children_starts;  // [S + 1] (backward only)
  const int32_t* children;         // [E] segments that continue a segment (backward only)
};

// One key head, and of a segment a block of query rows, a block of keys, or the whole family: a
// root segment with its children. With G = H / K, query row r of a segment is head r % G of the
// key head's group, at the segment's query r / G.
struct AttentionTask {
  int32_t segment;
  int32_t key_head;
  int32_t first_row;  // of the block, counted from the segment's first
};

struct AttentionForward {
  HeadRows q;       // [N, H, D]
  HeadRows k, v;    // [T, K, D]
  OutHeadRows out;  // [N, H, D]
  float* lse;       // [N, H]
  Layout layout;
  const AttentionTask* tasks;
  int64_t heads, key_heads, head_size;
  float scale;
  int64_t window;  // 0: none
};

struct AttentionBackward {
  HeadRows q;          // [N, H, D]
  HeadRows k, v;       // [T, K, D]
  HeadRows dout, out;  // [N, H, D]
  const float* lse;    // [N, H]
  float* delta;        // [N, H], the sums of dout * out over a head; backward_keys reads them
  OutHeadRows dq;      // [N, H, D]
  OutHeadRows dk, dv;  // [T, K, D]
  Layout layout;
  const AttentionTask* tasks;
  int64_t heads, key_heads, head_size;
  float scale;
  int64_t window;
};

// After the formats: bf16 multiplied in pairs. Null where there is no instruction for it; where
// there is one it may be slow (processor.h).
constexpr int kBFloat16Pairs = kFormats;

struct AttentionKernels {
  int64_t query_rows_per_task, keys_per_task;
  Kernel<AttentionForward> forward[kFormats + 1];  // tasks: blocks of query rows
  // All gradients at once; or, where families do not divide well over the threads, in two parts
  // that together cost 7/5 of that, the queries first. The numbers are the same.
  Kernel<AttentionBackward> backward[kFormats + 1];          // tasks: families
  Kernel<AttentionBackward> backward_queries[kFormats + 1];  // tasks: blocks of query rows; dq
  Kernel<AttentionBackward> backward_keys[kFormats + 1];     // tasks: blocks of keys; dk and dv
};

// ---- decode_attention -----------------------------------------------------------------------

// Tokens of a block of the KV cache. A block of keys is [K, D, kCacheBlock], so that the keys of a
// head are the lanes of vectors; a block of values is [K, kCacheBlock, D].
constexpr int kCacheBlock = 64;

// One key head, and sequences [first, first + sequences) of one prompt.
struct DecodeTask {
  int32_t first, sequences;
  int32_t key_head;
};

struct DecodeAttentionForward {
  HeadRows q;                     // [B, H, D]
  const void *keys, *values;      // [N, K, D, kCacheBlock], [N, K, kCacheBlock, D]
  const int32_t* prefix_blocks;   // [G, ?], the blocks of each prompt
  int64_t prefix_stride;          // numbers between its rows
  const int32_t* prefix_lengths;  // [G]
  const int32_t* group;           // [B], the prompt of each sequence
  const int32_t* tail_blocks;     // [B, ?], the blocks of each sequence's own tokens
  int64_t tail_stride;
  const int32_t* tail_lengths;    // [B], the new token included
  OutHeadRows out;                // [B, H, D]
  const DecodeTask* tasks;
  int64_t task_count;  // what follows a task is asked for ahead
  int64_t heads, key_heads, head_size;
  float scale;
  int64_t window;  // 0: none
};

struct DecodeAttentionKernels {
  int64_t query_rows_per_task;                       // sequences * H / K, at most if it can be
  Kernel<DecodeAttentionForward> forward[kFormats];  // tasks
};

// ---- linear_logprob: rows -------------------------------------------------------------------

struct LinearLogprobForward {
  const void* logits;      // [N, V]
  const int64_t* targets;  // [N]
  float* logp;             // [N]
  float* entropy;          // [N]
  float* lse;              // [N]
  int64_t vocabulary;
  float temperature, softcap;
};

struct LinearLogprobBackward {
  void* logits;  // [N, V], overwritten with its gradient
  const int64_t* targets;
  const float* lse;
  const float* entropy;
  const float* dlogp;
  const float* dentropy;
  int64_t vocabulary;
  float temperature, softcap;
};

struct LinearLogprobKernels {
  Kernel<LinearLogprobForward> forward[kFormats];
  Kernel<LinearLogprobBackward> backward[kFormats];
};

// ---- sampling: rows -------------------------------------------------------------------------

// How each of B rows draws its next token; the meaning is that of fastllm/generation/sampling.py.
struct SamplingRows {
  const float *temperature, *top_p, *min_p, *repetition_penalty;  // [B]
  const int32_t* top_k;        // [B]
  const int64_t* key;          // [B] streams of random numbers
  const int32_t* count;        // [B] tokens drawn so far
  const int32_t* min_count;    // [B] with fewer, no stop token is drawn
  const int32_t* stop_tokens;  // [B, stop_stride], -1 where there is none
  int64_t stop_stride;
  uint8_t* seen;  // [B, seen_stride] the tokens that the repetition penalty is for
  int64_t seen_stride;  // 0: no row has a penalty
};

struct DrawTokens {
  SamplingRows rows;
  const float* logits;  // [B, V]
  int64_t vocabulary;
  int64_t* tokens;           // [B]
  float* logprobs;           // [B]
  float* sampling_logprobs;  // [B]
};

struct SamplingKernels {
  Kernel<DrawTokens> draw;  // reads `seen`, never writes it
};

// ---- pairwise_loss: blocks of kPairBlock pairs ----------------------------------------------

constexpr int64_t kPairBlock = 4096;

struct PairwiseLossForward {
  const void* chosen;    // [P]
  const void* rejected;  // [P]
  const void* margin;    // [P] or null
  double* sums;          // one per block
  float* dchosen;        // [P]
  float* drejected;      // [P]
  int64_t pairs;         // P
  float centering;
};

struct PairwiseLossKernels {
  Kernel<PairwiseLossForward> forward[kFormats];
};

// ---- optimizer: blocks of kOptimizerBlock elements ------------------------------------------

constexpr int64_t kOptimizerBlock = 1 << 15;

// One tensor of the list that an optimizer step goes over.
struct SquareSum {
  const float* gradient;  // [count]
  int64_t count;
  double* sums;  // one per block
};

struct AdamW {
  float* parameter;       // [count]
  const float* gradient;  // [count]
  float* mean;            // [count], of the gradients
  float* square;          // [count], mean of their squares
  int64_t count;
  float gradient_scale;  // clipping: what the gradient counts for
  float mean_share;       // 1 - beta1: of the gradient in its mean
  float beta2, square_share;  // 1 - beta2
  float decay;            // learning rate * weight decay
  float step_size;        // learning rate / (1 - beta1^t)
  float root_correction;  // 1 / sqrt(1 - beta2^t)
  float eps;
};

struct OptimizerKernels {
  Kernel<SquareSum> square_sum;
  Kernel<AdamW> adamw;
};

// ---- One table per op and instruction set ---------------------------------------------------

#define FASTLLM_DECLARE_KERNELS(isa)                    \
  namespace isa {                                       \
  extern const MatmulKernels matmul;                    \
  extern const PackedMatmulKernels packed_matmul;       \
  extern const RmsNormKernels rms_norm;                 \
  extern const RopeKernels rope;                        \
  extern const SwigluKernels swiglu;                    \
  extern const AttentionKernels attention;              \
  extern const DecodeAttentionKernels decode_attention; \
  extern const LinearLogprobKernels linear_logprob;     \
  extern const SamplingKernels sampling;                \
  extern const PairwiseLossKernels pairwise_loss;       \
  extern const OptimizerKernels optimizer;              \
  }

FASTLLM_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
FASTLLM_DECLARE_KERNELS(avx2)
FASTLLM_DECLARE_KERNELS(avx512)
FASTLLM_DECLARE_KERNELS(avx512_bf16)
#endif

// The three instances of a kernel template, in the order of Format.
#define FASTLLM_FORMATS(kernel) {kernel<float>, kernel<bf16>, kernel<fp16>}
// The same with a last one that multiplies bf16 in pairs.
#if defined(__AVX512BF16__)
#define FASTLLM_FORMATS_AND_PAIRS(kernel) \
  {kernel<float>, kernel<bf16>, kernel<fp16>, kernel<bf16, Pair>}
#else
#define FASTLLM_FORMATS_AND_PAIRS(kernel) {kernel<float>, kernel<bf16>, kernel<fp16>, nullptr}
#endif

}  // namespace fastllm
