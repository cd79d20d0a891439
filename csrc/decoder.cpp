#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "decode_tasks.h"
#include "dispatch.h"
#include "packing.h"
#include "team.h"

namespace fastllm {
namespace {

constexpr int64_t kRowsOfLogits = 64;  // that are formed at a time
constexpr int64_t kMostHeadsOfKey = 256;

int64_t bytes_of(Format format) { return format == kFloat32 ? 4 : 2; }

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// One row of the embedding, rounded to the format of the hidden states.
void copy_row(void* to, Format to_format, const void* from, Format from_format, int64_t row,
              int64_t columns) {
  if (to_format == from_format) {
    const int64_t bytes = columns * bytes_of(to_format);
    std::memcpy(to, static_cast<const char*>(from) + row * bytes, bytes);
    return;
  }
  if (to_format == kFloat32) {
    const uint16_t* bits = static_cast<const uint16_t*>(from) + row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(static_cast<float*>(to) + i, &wide, sizeof(wide));
    }
    return;
  }
  const float* numbers = static_cast<const float*>(from) + row * columns;
  for (int64_t i = 0; i < columns; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    static_cast<uint16_t*>(to)[i] =
        static_cast<uint16_t>(numbers[i] == numbers[i] ? rounded : 0x7fc0);
  }
}

}  // namespace

// One member's way through the tokens of a call.
struct Decoder::Pass {
  const Decoder& decoder;
  const RunningRows& running;
  const Rotary& rotary;
  const int64_t rows;
  const Member& me;
  const Kernels& kernel;
  const DecoderShape& shape;
  // Where fewer rows run than there are threads, everybody forms the hidden states of all rows for
  // himself: that costs less than to wait for each other.
  const bool alone;
  char *h, *x;

  Pass(const Decoder& d, const RunningRows& r, const Rotary& angles, int64_t count,
       const Member& member)
      : decoder(d),
        running(r),
        rotary(angles),
        rows(count),
        me(member),
        kernel(kernels()),
        shape(d.shape_),
        alone(count < member.shares) {
    const int64_t own = alone ? me.first_share * rows * shape.hidden * size() : 0;
    h = d.buffers_.h + own;
    x = d.buffers_.x + own;
  }

  int64_t size() const { return bytes_of(shape.format); }
  int64_t begin_rows() const { return alone ? 0 : me.begin(rows); }
  int64_t end_rows() const { return alone ? rows : me.end(rows); }
  void meet_for_rows() const {
    if (!alone) me.meet();
  }

  void embed() const {
    for (int64_t row = begin_rows(); row < end_rows(); ++row) {
      copy_row(h + row * shape.hidden * size(), shape.format, shape.embedding,
               shape.embedding_format, running.token[row], shape.hidden);
    }
  }

  // x = norm(h), with h += update before.
  void normalise(const void* weight, const void* update) const {
    const int64_t begin = begin_rows(), end = end_rows(), stride = shape.hidden;
    float* rstd = scratch(rows);
    const RmsNormForward arguments = {
        {update ? update : h, stride}, {update ? h : nullptr, stride}, weight, {x, stride},
        {update ? h : nullptr, stride}, rstd, shape.hidden, shape.eps};
    kernel.rms_norm.forward[shape.format](arguments, begin, end);
    meet_for_rows();
  }

  void multiply(const PackedMatrix& m, const float* bias, const void* in, int64_t in_stride,
                int64_t first_row, int64_t count, void* out, Format out_format, int64_t begin,
                int64_t end) const {
    const PackedProduct product = {
        &m,
        static_cast<const char*>(in) + first_row * in_stride * size(),
        shape.format,
        in_stride,
        count,
        bias,
        out,
        out_format,
        m.columns,
    };
    packed_product(kernel.packed_matmul, m.packing, shape.format)(product, begin, end);
  }

  // This member's panels of some projections of the same rows, as if they were one matrix.
  template <int count>
  void project(const Projection* const (&projections)[count], char* const (&outs)[count],
               const void* in, int64_t in_stride) const {
    int64_t all = 0;
    for (const Projection* p : projections) all += panels(p->matrix);
    const int64_t begin = me.begin(all), end = me.end(all);
    int64_t first = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t own = panels(projections[i]->matrix);
      const int64_t from = std::max<int64_t>(begin - first, 0);
      const int64_t to = std::min(end - first, own);
      if (from < to) {
        multiply(projections[i]->matrix, projections[i]->bias, in, in_stride, 0, rows, outs[i],
                 shape.format, from, to);
      }
      first += own;
    }
    me.meet();
  }

  static int64_t panels(const PackedMatrix& m) { return packed_panels(m.columns); }

  // ---- Attention ----------------------------------------------------------------------------

  void attend(const DecoderLayer& layer) const {
    const Buffers& b = decoder.buffers_;
    const int64_t queries = shape.heads * shape.head_size;
    const DecodeAttentionForward arguments = {
        {b.q, queries, shape.head_size},
        layer.keys,
        layer.values,
        running.prefix_blocks,
        running.prefix_stride,
        running.prefix_length,
        running.group,
        running.tail_blocks,
        running.tail_stride,
        b.lengths,
        {b.attended, queries, shape.head_size},
        decoder.tasks_.data(),
        static_cast<int64_t>(decoder.tasks_.size()),
        shape.heads,
        shape.key_heads,
        shape.head_size,
        shape.scale,
        layer.window,
    };
    const int64_t count = static_cast<int64_t>(decoder.tasks_.size());
    for (int64_t i = me.begin(count); i < me.end(count); ++i) {
      const DecodeTask& task = decoder.tasks_[i];
      prepare_heads(layer, task);
      for (int64_t row = task.first; row < task.first + task.sequences; ++row) {
        append(layer, task.key_head, row);
      }
      kernel.decode_attention.forward[shape.format](arguments, i, i + 1);
    }
    me.meet();
  }

  // Normalises and rotates the queries and the keys of a task.
  void prepare_heads(const DecoderLayer& layer, const DecodeTask& task) const {
    const Buffers& b = decoder.buffers_;
    const int64_t group = shape.heads / shape.key_heads, head = shape.head_size;
    const int64_t q_stride = shape.heads * head, k_stride = shape.key_heads * head;
    char* q = b.q + (task.first * q_stride + task.key_head * group * head) * size();
    char* k = b.k + (task.first * k_stride + task.key_head * head) * size();
    for (int64_t row = 0; layer.q_norm && row < task.sequences; ++row) {
      normalise_heads(q + row * q_stride * size(), layer.q_norm, group);
      normalise_heads(k + row * k_stride * size(), layer.k_norm, 1);
    }
    const RopeForward arguments = {
        {q, q_stride, head, q, q_stride, head, group},
        {k, k_stride, head, k, k_stride, head, 1},
        rotary.cos,
        rotary.sin,
        running.position + task.first,
        head,
        false,
    };
    kernel.rope.forward[shape.format](arguments, 0, task.sequences);
  }

  void normalise_heads(char* heads, const void* weight, int64_t count) const {
    float rstd[kMostHeadsOfKey];
    const RmsNormForward arguments = {
        {heads, shape.head_size}, {nullptr, 0}, weight, {heads, shape.head_size},
        {nullptr, 0}, rstd, shape.head_size, shape.eps};
    kernel.rms_norm.forward[shape.format](arguments, 0, count);
  }

  // Writes a sequence's new key and value into the cache.
  void append(const DecoderLayer& layer, int64_t key_head, int64_t row) const {
    const int64_t place = decoder.buffers_.lengths[row] - 1;
    const int64_t block =
        running.tail_blocks[row * running.tail_stride + place / kCacheBlock];
    const int64_t head = (block * shape.key_heads + key_head) * shape.head_size * kCacheBlock;
    const int64_t from = (row * shape.key_heads + key_head) * shape.head_size;
    if (shape.format == kFloat32) {
      append_head<uint32_t>(layer, head, place % kCacheBlock, from);
    } else {
      append_head<uint16_t>(layer, head, place % kCacheBlock, from);
    }
  }

  template <class Bits>
  void append_head(const DecoderLayer& layer, int64_t head, int64_t place, int64_t from) const {
    const Bits* k = reinterpret_cast<const Bits*>(decoder.buffers_.k) + from;
    const Bits* v = reinterpret_cast<const Bits*>(decoder.buffers_.v) + from;
    Bits* keys = static_cast<Bits*>(layer.keys) + head + place;
    for (int64_t i = 0; i < shape.head_size; ++i) keys[i * kCacheBlock] = k[i];
    std::memcpy(static_cast<Bits*>(layer.values) + head + place * shape.head_size, v,
                shape.head_size * sizeof(Bits));
  }

  // ---- MLP ----------------------------------------------------------------------------------

  // gate = silu(gate) up, column by column of both.
  void gate_and_up(const DecoderLayer& layer) const {
    const Buffers& b = decoder.buffers_;
    const int64_t count = panels(layer.gate.matrix);
    const int64_t begin = me.begin(count), end = me.end(count);
    if (begin < end) {
      multiply(layer.gate.matrix, layer.gate.bias, x, shape.hidden, 0, rows, b.gate, shape.format,
               begin, end);
      multiply(layer.up.matrix, layer.up.bias, x, shape.hidden, 0, rows, b.up, shape.format,
               begin, end);
      const int64_t first = begin * kPackedPanel;
      const int64_t columns = std::min(end * kPackedPanel, shape.inner) - first;
      const Rows gate = {b.gate + first * size(), shape.inner};
      const Rows up = {b.up + first * size(), shape.inner};
      const SwigluForward arguments = {
          gate, up, {b.gate + first * size(), shape.inner}, columns};
      kernel.swiglu.forward[shape.format](arguments, 0, rows * columns);
    }
    me.meet();
  }

  // ---- The whole token ----------------------------------------------------------------------

  void layers() const {
    const Buffers& b = decoder.buffers_;
    const void* update = nullptr;
    for (const DecoderLayer& layer : decoder.layers_) {
      normalise(layer.input_norm, update);
      project<3>({&layer.q, &layer.k, &layer.v}, {b.q, b.k, b.v}, x, shape.hidden);
      attend(layer);
      project<1>({&layer.o}, {b.update}, b.attended, shape.heads * shape.head_size);
      normalise(layer.post_norm, b.update);
      gate_and_up(layer);
      project<1>({&layer.down}, {b.update}, b.gate, shape.inner);
      update = b.update;
    }
    normalise(shape.norm, update);
  }

  // Draws a token for each row; whether a sequence ended.
  bool draw(const Drawn& to) const {
    bool ended = false;
    const int64_t count = panels(shape.head), vocabulary = shape.vocabulary;
    float* logits = decoder.buffers_.logits;
    for (int64_t first = 0; first < rows; first += kRowsOfLogits) {
      const int64_t some = std::min(kRowsOfLogits, rows - first);
      const int64_t begin = me.begin(count), end = me.end(count);
      if (begin < end) {
        multiply(shape.head, nullptr, x, shape.hidden, first, some, logits, kFloat32, begin, end);
      }
      me.meet();
      const int64_t begin_row = first + me.begin(some), end_row = first + me.end(some);
      sample_rows(running.sampling, logits - first * vocabulary, vocabulary, begin_row, end_row,
                  to.token_ids, to.logprobs, to.sampling_logprobs);
      for (int64_t row = begin_row; row < end_row; ++row) ended |= take(row, to.token_ids[row]);
      me.meet();
    }
    return ended;
  }

  // Moves a sequence on to its new token; whether it ends with it.
  bool take(int64_t row, int64_t token) const {
    const SamplingRows& s = running.sampling;
    running.token[row] = token;
    ++running.count[row];
    ++running.position[row];
    ++running.tail_length[row];
    ++decoder.buffers_.lengths[row];
    const int32_t* stops = s.stop_tokens + row * s.stop_stride;
    return running.count[row] >= running.max_count[row] ||
           std::find(stops, stops + s.stop_stride, token) != stops + s.stop_stride;
  }
};

Decoder::Decoder(const DecoderShape& shape, std::vector<DecoderLayer> layers)
    : shape_(shape), layers_(std::move(layers)) {}

// Memory for the intermediate results, which only grows.
void Decoder::reserve(int64_t rows, int64_t threads) {
  if (rows <= rows_ && threads <= threads_) return;
  rows_ = std::max(rows, rows_);
  threads_ = std::max(threads, threads_);
  const int64_t size = bytes_of(shape_.format);
  const int64_t copies = std::max(rows_, threads_ * std::min(rows_, threads_));
  const int64_t queries = shape_.heads * shape_.head_size;
  const int64_t keys = shape_.key_heads * shape_.head_size;
  const int64_t sizes[] = {
      copies * shape_.hidden * size,  copies * shape_.hidden * size, rows_ * shape_.hidden * size,
      rows_ * queries * size,         rows_ * keys * size,           rows_ * keys * size,
      rows_ * queries * size,         rows_ * shape_.inner * size,   rows_ * shape_.inner * size,
      std::min(rows_, kRowsOfLogits) * shape_.vocabulary * 4,        rows_ * 4,
  };
  int64_t all = 64;
  for (int64_t bytes : sizes) all += aligned(bytes);
  buffers_.memory.resize(all);
  char* next = buffers_.memory.data();
  next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64;
  char* places[sizeof(sizes) / sizeof(sizes[0])];
  for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
    places[i] = next;
    next += aligned(sizes[i]);
  }
  Buffers& b = buffers_;
  b.h = places[0], b.x = places[1], b.update = places[2];
  b.q = places[3], b.k = places[4], b.v = places[5];
  b.attended = places[6], b.gate = places[7], b.up = places[8];
  b.logits = reinterpret_cast<float*>(places[9]);
  b.lengths = reinterpret_cast<int32_t*>(places[10]);
}

int64_t Decoder::run(const RunningRows& running, const Rotary& rotary, int64_t rows, int64_t steps,
                     int64_t threads, const Drawn& drawn) {
  if (rows == 0 || steps == 0) return 0;
  reserve(rows, threads);
  decode_tasks(tasks_, running.group, rows, shape_.heads, shape_.key_heads, threads,
               kernels().decode_attention.query_rows_per_task);
  for (int64_t row = 0; row < rows; ++row) {
    buffers_.lengths[row] = running.tail_length[row] + 1;
  }
  std::atomic<bool> ended{false};
  std::atomic<int64_t> done{0};
  run_team(threads, [&](const Member& me) {
    const Pass pass(*this, running, rotary, rows, me);
    for (int64_t step = 0; step < steps; ++step) {
      pass.embed();
      pass.layers();
      const int64_t at = step * rows;
      if (pass.draw({drawn.token_ids + at, drawn.logprobs + at, drawn.sampling_logprobs + at})) {
        ended = true;
      }
      me.meet();
      if (me.leads()) done = step + 1;
      if (ended) break;
    }
  });
  return done;
}

}  // namespace fastllm
