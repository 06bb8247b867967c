// The kernels for AMX with bfloat16 (Intel Sapphire Rapids and later): products in tiles, all else as AVX-512
// with dot products of bfloat16 has it.
//
// One instruction multiplies sixteen rows of A, 32 inputs of each, by 32 inputs of a panel, and takes 52
// cycles, of which another can start every sixteen: four sums at once, of two tiles of A and two panels, keep
// it busy. They and what they are made of are the eight tiles that there are.

#include "bfloat16_activations.h"
#include "kernels_impl.h"

namespace vtp_cpu {
namespace {

constexpr int64_t kTileRows = 16;   // of A, and of C
constexpr int64_t kTileBytes = 64;  // of a row: 32 inputs, or 16 sums
constexpr int64_t kTileSize = kTileRows * kTileBytes;

// Inputs between two visits to a tile of results: of two panels 32 KB, for a first-level cache of 48 KB, with
// rows of A passing by.
constexpr int64_t kTileChunk = 512;

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

// Not on the stack: GCC 12 takes the instruction to read eight bytes of it, and leaves the others unwritten.
alignas(64) constexpr TileConfig kTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void configure_tiles() { _tile_loadconfig(&kTiles); }
void release_tiles() { _tile_release(); }

// What was written is in memory: GCC 12 does not know that a tile is loaded from there.
inline void before_tile_loads() { __asm__ volatile("" ::: "memory"); }

// Sixteen rows of A from some input on, `stride` bytes apart.
struct TileOfRows {
  const char* at;
  int64_t stride;
};

inline void prefetch(TileOfRows rows, int64_t byte) {
  for (int64_t i = 0; i < kTileRows; ++i) __builtin_prefetch(rows.at + i * rows.stride + byte);
}

// A block of C, of one or two tiles of rows and one or two panels.
struct Block {
  TileOfRows a[2], next[2];  // next: of the block behind this one, or null
  const char* b;             // the first panel, of `b_stride` bytes
  int64_t b_stride, inputs;  // inputs: a multiple of kTileInputs
  const float* add;          // what the sums start from, or null: zeros
  int64_t add_stride;
  float* c;
  int64_t c_stride;  // of floats, as add_stride
};

template <bool TwoRows, bool TwoPanels>
inline void multiply_block(const Block& t) {
  const int64_t add_stride = t.add_stride * 4, c_stride = t.c_stride * 4;
  before_tile_loads();
  if (t.add) {
    _tile_loadd(0, t.add, add_stride);
    if constexpr (TwoPanels) _tile_loadd(1, t.add + kPanel, add_stride);
    if constexpr (TwoRows) _tile_loadd(2, t.add + kTileRows * t.add_stride, add_stride);
    if constexpr (TwoRows && TwoPanels)
      _tile_loadd(3, t.add + kTileRows * t.add_stride + kPanel, add_stride);
  } else {
    _tile_zero(0);
    if constexpr (TwoPanels) _tile_zero(1);
    if constexpr (TwoRows) _tile_zero(2);
    if constexpr (TwoRows && TwoPanels) _tile_zero(3);
  }
  const char* b = t.b;
  for (int64_t byte = 0; byte < t.inputs * 2; byte += kTileBytes, b += kTileSize) {
    _tile_loadd(4, t.a[0].at + byte, t.a[0].stride);
    _tile_loadd(6, b, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    if (t.next[0].at) prefetch(t.next[0], byte);
    if constexpr (TwoPanels) {
      _tile_loadd(7, b + t.b_stride, kTileBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TwoRows) {
      _tile_loadd(5, t.a[1].at + byte, t.a[1].stride);
      _tile_dpbf16ps(2, 5, 6);
      if (t.next[1].at) prefetch(t.next[1], byte);
      if constexpr (TwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, t.c, c_stride);
  if constexpr (TwoPanels) _tile_stored(1, t.c + kPanel, c_stride);
  if constexpr (TwoRows) _tile_stored(2, t.c + kTileRows * t.c_stride, c_stride);
  if constexpr (TwoRows && TwoPanels) _tile_stored(3, t.c + kTileRows * t.c_stride + kPanel, c_stride);
}

inline void multiply_block(const Block& t, bool two_rows, bool two_panels) {
  if (two_rows)
    (two_panels ? multiply_block<true, true> : multiply_block<true, false>)(t);
  else
    (two_panels ? multiply_block<false, true> : multiply_block<false, false>)(t);
}

// Rows of A, a chunk of inputs of them, in tiles. The last tile may have fewer rows: it is a copy, behind which
// lies whatever; of what comes of that nobody reads anything.
class RowTiles {
 public:
  RowTiles(const char* a, int64_t stride, int64_t rows) : a_(a), stride_(stride), rows_(rows) {}

  void start_chunk(int64_t first, int64_t inputs) {
    at_ = a_ + first * 2;
    const int64_t whole = rows_ / kTileRows * kTileRows;
    for (int64_t i = whole; i < rows_; ++i)
      memcpy(last_ + (i - whole) * kLastStride, at_ + i * stride_, static_cast<size_t>(inputs * 2));
  }
  int64_t count() const { return divide_up(rows_, kTileRows); }
  TileOfRows operator[](int64_t i) const {
    if (i >= count()) return {nullptr, 0};
    if ((i + 1) * kTileRows > rows_) return {last_, kLastStride};
    return {at_ + i * kTileRows * stride_, stride_};
  }

 private:
  static constexpr int64_t kLastStride = kTileChunk * 2 + kCacheLine;
  const char *a_, *at_ = nullptr;
  int64_t stride_, rows_;
  alignas(64) char last_[kTileRows * kLastStride];
};

// The block of a layer's results that starts with this row and column: its bias, residual and place.
inline LinearTile block_of(const LinearTile& t, int64_t row, int64_t column, float* sums) {
  LinearTile out = t;
  const int64_t rows = 2 * kTileRows, columns = 2 * kPanel;
  out.rows = t.rows - row < rows ? t.rows - row : rows;
  out.columns = t.columns - column < columns ? t.columns - column : columns;
  if (t.bias) out.bias = t.bias + column;
  if (t.residual) out.residual = t.residual + row * t.residual_stride + column;
  const int64_t written = t.nonlinearity == Nonlinearity::kSwiGlu ? column / 2 : column;
  out.out = static_cast<char*>(t.out) + (row * t.out_stride + written) * (t.out_float ? 4 : 2);
  if (column + columns < t.columns) out.padding = 0;
  out.scratch = sums;
  return out;
}

// Chunks of inputs outside, two panels, two tiles of rows inside: of what a tile reads, A's chunk stays in the
// second-level cache, the panels' in the first. What comes behind the product is done block by block, while it
// is in the first-level cache.
void linear_in_tiles(const LinearTile& t) {
  const int64_t inputs = round_up(t.inputs, kTileInputs), panel = panel_bytes(Dtype::kBFloat16, t.inputs);
  const int64_t chunk = round_up(divide_up(inputs, divide_up(inputs, kTileChunk)), kTileInputs);
  const int64_t columns = round_up(t.columns, kPanel);
  RowTiles rows(static_cast<const char*>(t.a), t.a_stride * 2, t.rows);
  alignas(64) float sums[2 * kTileRows * 2 * kPanel];
  for (int64_t k = 0; k < inputs; k += chunk) {
    const int64_t size = inputs - k < chunk ? inputs - k : chunk;
    const bool last = k + size == inputs;
    const char* weight = static_cast<const char*>(t.weight) + k * kPanel * 2;
    rows.start_chunk(k, size);
    for (int64_t column = 0; column < columns; column += 2 * kPanel) {
      const bool two_panels = column + kPanel < columns;
      const char* from = weight + column / kPanel * panel;
      const char* next = column + 2 * kPanel < columns ? from + 2 * panel
                         : last                        ? nullptr
                                                       : weight + size * kPanel * 2;
      Upcoming upcoming(next, panel, size * kPanel * 2, divide_up(rows.count(), 2));
      for (int64_t i = 0; i < rows.count(); i += 2) {
        float* partial = t.scratch + i * kTileRows * columns + column;
        Block block = {{rows[i], rows[i + 1]}, {rows[i + 2], rows[i + 3]}, from, panel, size, nullptr, 0, sums, 0};
        if (k > 0) {
          block.add = partial;
          block.add_stride = columns;
        }
        block.c_stride = two_panels ? 2 * kPanel : kPanel;
        if (!last) {
          block.c = partial;
          block.c_stride = columns;
        }
        multiply_block(block, rows[i + 1].at != nullptr, two_panels);
        if (last) finish<BFloat16>(block_of(t, i * kTileRows, column, sums));
        upcoming.fetch();
      }
    }
  }
}

// Activations by activations: rows of A have room, and finite numbers, for whole tiles, rows of C room.
struct TileDot {
  using Activation = BFloat16;
  static constexpr int64_t kStep = 2, kInputs = kTileInputs, kQueries = 2 * kTileRows;
};

template <>
void multiply<TileDot>(const BFloat16* a, int64_t a_stride, int64_t rows, const char* b, int64_t b_stride,
                       int64_t columns, int64_t inputs, float* c, int64_t c_stride) {
  const char* at = reinterpret_cast<const char*>(a);
  const int64_t stride = a_stride * 2, tile = kTileRows * stride;
  for (int64_t column = 0; column < columns; column += 2 * kPanel, b += 2 * b_stride)
    for (int64_t i = 0; i < rows; i += 2 * kTileRows) {
      const char* from = at + i * stride;
      const Block block = {{{from, stride}, {from + tile, stride}},
                           {},
                           b,
                           b_stride,
                           round_up(inputs, kTileInputs),
                           nullptr,
                           0,
                           c + i * c_stride + column,
                           c_stride};
      multiply_block(block, i + kTileRows < rows, column + kPanel < columns);
    }
}

}  // namespace

const Kernels kAmxBf16BFloat16 = {"amx_bf16",
                                  sizeof(BFloat16),
                                  kTileRows,
                                  kTileInputs,
                                  configure_tiles,
                                  release_tiles,
                                  linear_in_tiles,
                                  norm<BFloat16>,
                                  attention<TileDot>,
                                  patches<BFloat16>,
                                  attention_scratch<TileDot>,
                                  fold,
                                  unfold};
}  // namespace vtp_cpu
