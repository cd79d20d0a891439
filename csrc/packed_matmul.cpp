// Products of a few rows with matrices that were copied once into the order in which they are read:
// what one token of generation needs. With one row the time is that of reading the matrix, so
// several panels are read side by side and asked for ahead; with many rows each number read serves
// all of them.
//
// A row's result depends on neither the number of rows nor the division of the panels. Sums run over
// kPackedDepth words in order, and these sums are added in order: just as in matmul.cpp, so that
// sampling and training can agree to the last bit.

#include "kernels.h"
#include "simd.h"

namespace fastllm {
namespace {

constexpr int kVectors = kPackedPanel / kLanes;  // of a panel's row
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 28;  // vectors of sums that fit into the registers
#else
constexpr int kSums = 12;
#endif
constexpr int kMostRows = kSums / kVectors;  // of a tile
// Panels that are read side by side where there are few rows: sums enough to hide the latency of the
// arithmetic, and streams enough to keep the memory busy.
constexpr int kStreams = 4;
constexpr int64_t kAhead = 2048;  // bytes of a stream that few rows ask for ahead

FASTLLM_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Storage --------------------------------------------------------------------------------

// How a matrix is stored: `kNumbers` of its numbers at neighbouring depths are a word; `Row` is the
// words of a panel at one depth, as a kernel holds it.
struct Floats {
  static constexpr int kNumbers = 1;
  static constexpr int64_t kBytes = kPackedPanel * sizeof(float);
  Vec w[kVectors];

  FASTLLM_INLINE explicit Floats(const char* from) {
    for (int v = 0; v < kVectors; ++v) w[v] = load(reinterpret_cast<const float*>(from) + v * kLanes);
  }
  FASTLLM_INLINE Vec add(Vec sum, const float* x, int v) const { return sum + *x * w[v]; }
};

// Two bf16 numbers in a word, multiplied in fp32.
struct WidePairs {
  static constexpr int kNumbers = 2;
  static constexpr int64_t kBytes = kPackedPanel * sizeof(float);
  Vec first[kVectors], second[kVectors];

  FASTLLM_INLINE explicit WidePairs(const char* from) {
    for (int v = 0; v < kVectors; ++v) {
      const BitsVec words = load_bits<BitsVec>(from + v * kLanes * sizeof(float));
      first[v] = bit_cast<Vec>(words << 16);
      second[v] = bit_cast<Vec>(words & 0xffff0000u);
    }
  }
  FASTLLM_INLINE Vec add(Vec sum, const float* x, int v) const {
    return sum + x[0] * first[v] + x[1] * second[v];
  }
};

#if defined(__AVX512BF16__)
// The same multiplied in pairs; x is in pairs too.
struct DotPairs : Floats {
  using Floats::Floats;
  FASTLLM_INLINE Vec add(Vec sum, const float* x, int v) const {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(broadcast(*x)),
                                          bit_cast<__m512bh>(w[v])));
  }
};
#endif

// Numbers of 8 bits.
struct Bytes {
  static constexpr int kNumbers = 1;
  static constexpr int64_t kBytes = kPackedPanel;
  Vec w[kVectors];

  FASTLLM_INLINE explicit Bytes(const char* from) {
    typedef int8_t Small __attribute__((vector_size(kLanes)));
    for (int v = 0; v < kVectors; ++v) {
      const Small small = load_bits<Small>(from + v * kLanes);
#if defined(__AVX512F__)
      w[v] = bit_cast<Vec>(_mm512_maskz_cvtepi32_ps(
          0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bit_cast<__m128i>(small))));
#else
      w[v] = __builtin_convertvector(__builtin_convertvector(small, IntVec), Vec);
#endif
    }
  }
  FASTLLM_INLINE Vec add(Vec sum, const float* x, int v) const { return sum + *x * w[v]; }
};

// ---- Products -------------------------------------------------------------------------------

// A block of words of some panels, and the sums that it adds to.
struct Block {
  const char* weights;   // of the first panel
  int64_t panel_bytes;   // between panels
  const float* scales;   // of the first panel's columns, or null
  int64_t panel_scales;  // between panels
  int64_t words;
  const float* x;
  int64_t x_stride;
  float* sums;
  int64_t sums_stride;
  bool first;
  int64_t ahead;  // bytes from what is read to what is asked for; 0 for nothing more
};

// sums (+)= x w for a tile of rows and panels.
template <class Storage, int rows, int panels>
void multiply(const Block& block) {
  constexpr int kColumns = panels * kVectors;
  constexpr int kCache = panels > 1 ? 3 : 2;  // of the prefetch: all caches, or all but the first
  Vec s[rows][kColumns];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kColumns; ++v) s[r][v] = Vec{};
  }
  const char* from = block.weights;
  const float* x = block.x;
  const int64_t panel_bytes = block.panel_bytes, x_stride = block.x_stride, ahead = block.ahead;
  for (int64_t d = 0; d < block.words; ++d, from += Storage::kBytes, x += Storage::kNumbers) {
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p) {
      const char* row = from + p * panel_bytes;
      for (int64_t line = 0; line < Storage::kBytes; line += 64) {
        __builtin_prefetch(row + ahead + line, 0, kCache);
      }
      const Storage w(row);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          s[r][p * kVectors + v] = w.add(s[r][p * kVectors + v], x + r * x_stride, v);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kColumns; ++v) {
      float* to = block.sums + r * block.sums_stride + v * kLanes;
      if (block.scales) {
        s[r][v] *= load(block.scales + v / kVectors * block.panel_scales + v % kVectors * kLanes);
      }
      if (!block.first) s[r][v] += load(to);
      store(to, s[r][v]);
    }
  }
}

using Multiply = void (*)(const Block&);

// The kernel of a tile, or null where its sums don't fit into the registers.
template <class Storage, int panels, int rows>
constexpr Multiply tile() {
  if constexpr (rows <= kMostRows && rows * panels * kVectors <= kSums) {
    return multiply<Storage, rows, panels>;
  } else {
    return nullptr;
  }
}

constexpr int kTiles = 14;  // the most rows of a tile, on any processor
static_assert(kMostRows <= kTiles, "a tile has at most kTiles rows");

template <class Storage, int panels>
constexpr Multiply kTilesOf[kTiles] = {
    tile<Storage, panels, 1>(),  tile<Storage, panels, 2>(),  tile<Storage, panels, 3>(),
    tile<Storage, panels, 4>(),  tile<Storage, panels, 5>(),  tile<Storage, panels, 6>(),
    tile<Storage, panels, 7>(),  tile<Storage, panels, 8>(),  tile<Storage, panels, 9>(),
    tile<Storage, panels, 10>(), tile<Storage, panels, 11>(), tile<Storage, panels, 12>(),
    tile<Storage, panels, 13>(), tile<Storage, panels, 14>(),
};

template <class T>
void write_row(const PackedProduct& p, const float* sums, int64_t row, int64_t column,
               int64_t columns) {
  T* out = static_cast<T*>(p.out) + row * p.out_stride + column;
  for_each_vector(columns, [&](int64_t i, auto lanes) {
    Vec sum = load(sums + i, lanes);
    if (p.bias) sum += load(p.bias + column + i, lanes);
    store(out + i, sum, lanes);
  });
}

// Rows in the form in which the kernel reads them.
struct Left {
  const float* x;
  int64_t stride;
};

// `panels` panels side by side, for all rows: the words of a block stay in the L1 cache meanwhile.
template <class Storage, int panels>
void multiply_panels(const PackedProduct& p, const Left& left, float* sums, int64_t first) {
  const PackedMatrix& m = *p.matrix;
  constexpr int64_t kMost = smaller(kMostRows, kSums / (panels * kVectors));
  constexpr int64_t kStride = panels * kPackedPanel;
  const int64_t tiles = (p.rows + kMost - 1) / kMost;
  for (int64_t b = 0; b < m.blocks; ++b) {
    const int64_t word = b * m.block_words;
    Block block = {
        static_cast<const char*>(m.data) + first * m.panel_bytes + word * Storage::kBytes,
        m.panel_bytes,
        m.scales ? m.scales + (first * m.blocks + b) * kPackedPanel : nullptr,
        m.blocks * kPackedPanel,
        smaller(m.block_words, m.words - word),
        nullptr,
        left.stride,
        nullptr,
        kStride,
        b == 0,
        0,
    };
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * p.rows / tiles, rows = (t + 1) * p.rows / tiles - row;
      block.x = left.x + row * left.stride + word * Storage::kNumbers;
      block.sums = sums + row * kStride;
      block.ahead = t > 0 ? 0 : panels > 1 ? kAhead : m.block_words * Storage::kBytes;
      kTilesOf<Storage, panels>[rows - 1](block);
    }
  }
  const int64_t column = first * kPackedPanel, columns = smaller(kStride, m.columns - column);
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.out_format == kBFloat16) {
      write_row<bf16>(p, sums + row * kStride, row, column, columns);
    } else {
      write_row<float>(p, sums + row * kStride, row, column, columns);
    }
  }
}

// The rows as fp32 numbers, copied where they are bf16.
Left widened(const PackedProduct& p, float* room) {
  if (p.x_format == kFloat32) return {static_cast<const float*>(p.x), p.x_stride};
  const int64_t depth = p.matrix->depth;
  for (int64_t r = 0; r < p.rows; ++r) {
    const bf16* x = static_cast<const bf16*>(p.x) + r * p.x_stride;
    for_each_vector(depth, [&](int64_t i, auto lanes) {
      store(room + r * depth + i, load(x + i, lanes), lanes);
    });
  }
  return {room, depth};
}

template <class Storage, bool in_pairs>
void product(const PackedProduct& p, int64_t begin, int64_t end) {
  const int64_t wide = p.rows * p.matrix->depth;
  float* sums = scratch(p.rows * kStreams * kPackedPanel + (in_pairs ? 0 : wide));
  float* room = sums + p.rows * kStreams * kPackedPanel;
  const Left left = in_pairs ? Left{static_cast<const float*>(p.x), p.x_stride / 2}
                             : widened(p, room);
  int64_t first = begin;
  if constexpr (kStreams * kVectors <= kSums) {
    for (; kStreams * kVectors * p.rows <= kSums && first + kStreams <= end; first += kStreams) {
      multiply_panels<Storage, kStreams>(p, left, sums, first);
    }
  }
  if constexpr (2 * kVectors <= kSums) {
    for (; 2 * kVectors * p.rows <= kSums && first + 2 <= end; first += 2) {
      multiply_panels<Storage, 2>(p, left, sums, first);
    }
  }
  for (; first < end; ++first) multiply_panels<Storage, 1>(p, left, sums, first);
}

// ---- Packing --------------------------------------------------------------------------------

template <class A, class B>
constexpr bool kIs = false;
template <class A>
constexpr bool kIs<A, A> = true;

// Number (column, d) of a matrix that is stored by columns of the product, 0 beyond it.
template <class T>
FASTLLM_INLINE float number(const PackMatrix& p, int64_t column, int64_t d) {
  const Matrix& from = p.from;
  if (column >= p.matrix.columns || d >= p.matrix.depth) return 0;
  const T* at = static_cast<const T*>(from.data) + column * from.row_stride + d;
  if constexpr (kIs<T, float>) {
    return *at;
  } else if constexpr (kIs<T, bf16>) {
    return bit_cast<float>(static_cast<uint32_t>(at->bits) << 16);
  } else {
    return load(at, SomeLanes{1})[0];
  }
}

template <class T>
void pack_floats(const PackMatrix& p, int64_t panel) {
  const PackedMatrix& m = p.matrix;
  float* to = reinterpret_cast<float*>(static_cast<char*>(m.data) + panel * m.panel_bytes);
  for (int64_t d = 0; d < m.depth; ++d) {
    for (int64_t c = 0; c < kPackedPanel; ++c) {
      *to++ = number<T>(p, panel * kPackedPanel + c, d);
    }
  }
}

// Rounded to nearest even; NaN stays NaN.
FASTLLM_INLINE uint32_t bf16_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

template <class T>
void pack_pairs(const PackMatrix& p, int64_t panel) {
  const PackedMatrix& m = p.matrix;
  uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<char*>(m.data) + panel * m.panel_bytes);
  for (int64_t d = 0; d < m.depth; d += 2) {
    for (int64_t c = 0; c < kPackedPanel; ++c) {
      const int64_t column = panel * kPackedPanel + c;
      *to++ = bf16_bits(number<T>(p, column, d)) | bf16_bits(number<T>(p, column, d + 1)) << 16;
    }
  }
}

// The largest number of a block becomes 127.
template <class T>
void pack_bytes(const PackMatrix& p, int64_t panel) {
  const PackedMatrix& m = p.matrix;
  int8_t* to = static_cast<int8_t*>(m.data) + panel * m.panel_bytes;
  for (int64_t b = 0; b < m.blocks; ++b) {
    const int64_t first = b * m.block_words, last = smaller(first + m.block_words, m.depth);
    for (int64_t c = 0; c < kPackedPanel; ++c) {
      const int64_t column = panel * kPackedPanel + c;
      float most = 0;
      for (int64_t d = first; d < last; ++d) {
        const float size = __builtin_fabsf(number<T>(p, column, d));
        most = size > most ? size : most;
      }
      const_cast<float*>(m.scales)[(panel * m.blocks + b) * kPackedPanel + c] = most / 127;
      const float factor = most > 0 ? 127 / most : 0;
      for (int64_t d = first; d < last; ++d) {
        to[d * kPackedPanel + c] =
            static_cast<int8_t>(number<T>(p, column, d) * factor + kRounder - kRounder);
      }
    }
  }
}

template <class T>
void pack(const PackMatrix& p, int64_t begin, int64_t end) {
  using PackPanel = void (*)(const PackMatrix&, int64_t);
  constexpr PackPanel kPack[kPackings] = {pack_floats<T>, pack_pairs<T>, pack_bytes<T>};
  for (int64_t panel = begin; panel < end; ++panel) kPack[p.matrix.packing](p, panel);
}

#if defined(__AVX512BF16__)
constexpr Kernel<PackedProduct> kPairs = product<DotPairs, true>;
#else
constexpr Kernel<PackedProduct> kPairs = nullptr;
#endif

}  // namespace

const PackedMatmulKernels FASTLLM_ISA::packed_matmul = {
    {product<Floats, false>, product<WidePairs, false>, product<Bytes, false>},
    kPairs,
    FASTLLM_FORMATS(pack),
};

}  // namespace fastllm
