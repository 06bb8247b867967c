// The AVX-512 and AMX intrinsics that csrc/cpu uses, in plain C++, so that its kernels can be tested on any
// machine. In the compiler's include path before its own <immintrin.h>. What a real instruction does with
// NaN, denormal numbers and rounding is done here too, and where one of AMX faults, std::logic_error is thrown.
// One that is missing is a compile error: add it.

#pragma once

#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>

typedef float __m512 __attribute__((vector_size(64)));
typedef uint32_t __m512i __attribute__((vector_size(64)));  // as 32-bit integers: there are no others
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));

namespace emulated {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class F>
inline __m512 each(const F& f) {
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = f(i);
  return out;
}

// The bf16 instructions do not read MXCSR: a denormal number counts as zero, in and out.
inline float flushed(float x) {
  return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x;
}
inline float widened(uint16_t x) { return flushed(bits<float>(static_cast<uint32_t>(x) << 16)); }

inline uint16_t narrowed(float x) {  // to nearest, ties to even; a NaN becomes quiet
  const uint32_t b = bits<uint32_t>(flushed(x));
  return static_cast<uint16_t>(x != x ? (b >> 16) | 0x40 : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

}  // namespace emulated

inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 out;
  memcpy(&out, p, 64);
  return out;
}
inline void _mm512_storeu_ps(void* p, __m512 v) { memcpy(p, &v, 64); }
inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i out;
  memcpy(&out, p, 64);
  return out;
}

inline __m512 _mm512_set1_ps(float x) {
  return emulated::each([x](int) { return x; });
}
inline __m512i _mm512_set1_epi32(int x) { return __m512i{} + static_cast<uint32_t>(x); }

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated::each([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
// If either is a NaN the second argument comes out.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_abs_ps(__m512 a) {
  return emulated::each([&](int i) { return __builtin_fabsf(a[i]); });
}

inline __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : a << n; }

// Halves are added to one another until one number is left, as GCC and Clang do.
inline float _mm512_reduce_add_ps(__m512 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] + a[i + half];
  return a[0];
}
inline float _mm512_reduce_max_ps(__m512 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
}

inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  __m256bh out;
  for (int i = 0; i < 16; ++i) out[i] = emulated::narrowed(a[i]);
  return out;
}
// Two fused steps, the odd elements first, each rounded to nearest.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return emulated::each([&](int i) {
    using emulated::flushed;
    using emulated::widened;
    const float odd = __builtin_fmaf(widened(a[2 * i + 1]), widened(b[2 * i + 1]), flushed(sum[i]));
    return flushed(__builtin_fmaf(widened(a[2 * i]), widened(b[2 * i]), flushed(odd)));
  });
}

// ------------------------------------------------------------------------------------------------------ AMX

namespace emulated {

// Palette 1, the only one there is: CPUID leaves 0x1D and 0x1E.
constexpr int kTiles = 8, kMostRows = 16, kMostRowBytes = 64, kMostPairs = 16;

struct Tile {
  uint16_t row_bytes = 0;
  uint8_t rows = 0;
  unsigned char data[kMostRows][kMostRowBytes] = {};
};

// A thread's tiles, in their initial state until they are configured.
struct TileState {
  bool configured = false;
  Tile tiles[kTiles];
};
inline thread_local TileState tile_state;

inline void fault_unless(bool good, const char* instruction, const char* why) {
  if (!good) throw std::logic_error(std::string(instruction) + " faults: " + why);
}

// A tile that an instruction names.
inline Tile& tile(int index, const char* instruction) {
  fault_unless(tile_state.configured, instruction, "tiles are not configured");
  fault_unless(index >= 0 && index < kTiles, instruction, "there is no such tile");
  Tile& out = tile_state.tiles[index];
  fault_unless(out.rows > 0 && out.row_bytes > 0, instruction, "the tile has no rows");
  return out;
}

}  // namespace emulated

inline void _tile_loadconfig(const void* memory) {
  using emulated::fault_unless;
  unsigned char bytes[64];
  memcpy(bytes, memory, 64);
  const char* const name = "ldtilecfg";
  emulated::TileState state;
  fault_unless(bytes[0] <= 1, name, "there is no such palette");
  state.configured = bytes[0] == 1;
  fault_unless(bytes[1] == 0, name, "no tile is half loaded");  // start_row: the hardware's own
  for (int i = 2; i < 16; ++i) fault_unless(bytes[i] == 0, name, "a reserved byte is not zero");
  for (int i = 0; i < 16 && state.configured; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    const uint8_t rows = bytes[48 + i];
    fault_unless(i < emulated::kTiles || (row_bytes == 0 && rows == 0), name, "there is no such tile");
    fault_unless(row_bytes <= emulated::kMostRowBytes, name, "rows are too long");
    fault_unless(rows <= emulated::kMostRows, name, "there are too many rows");
    fault_unless((row_bytes == 0) == (rows == 0), name, "a tile has rows without bytes, or bytes without rows");
    if (i < emulated::kTiles) state.tiles[i].row_bytes = row_bytes, state.tiles[i].rows = rows;
  }
  emulated::tile_state = state;  // of which all tiles are zero
}

inline void _tile_release() { emulated::tile_state = emulated::TileState{}; }

inline void _tile_zero(int index) {
  emulated::Tile& t = emulated::tile(index, "tilezero");
  memset(t.data, 0, sizeof(t.data));
}

// Rows and bytes beyond the configured ones become zeros, and their memory is not read.
inline void _tile_loadd(int index, const void* memory, int64_t stride) {
  emulated::Tile& t = emulated::tile(index, "tileloadd");
  memset(t.data, 0, sizeof(t.data));
  for (int i = 0; i < t.rows; ++i)
    memcpy(t.data[i], static_cast<const char*>(memory) + i * stride, t.row_bytes);
}

inline void _tile_stored(int index, void* memory, int64_t stride) {
  const emulated::Tile& t = emulated::tile(index, "tilestored");
  for (int i = 0; i < t.rows; ++i) memcpy(static_cast<char*>(memory) + i * stride, t.data[i], t.row_bytes);
}

// Of each sum the products of even inputs and of odd ones are summed by fused steps each, then both together,
// and that is added; denormal numbers count as zero, in and out.
inline void _tile_dpbf16ps(int sum, int left, int right) {
  using emulated::fault_unless;
  using emulated::flushed;
  using emulated::widened;
  const char* const name = "tdpbf16ps";
  emulated::Tile& c = emulated::tile(sum, name);
  const emulated::Tile &a = emulated::tile(left, name), &b = emulated::tile(right, name);
  fault_unless(sum != left && sum != right && left != right, name, "a tile is named twice");
  fault_unless(c.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, name,
               "rows are not of four bytes");
  fault_unless(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes / 4 == b.rows, name,
               "the tiles do not fit");
  fault_unless(b.rows <= emulated::kMostPairs, name, "there are too many inputs");
  using Wide = float[2][16];  // of a row of pairs the even elements, then the odd ones
  Wide right_rows[16];
  for (int k = 0; k < b.rows; ++k)
    for (int n = 0; n < 32; ++n) {
      uint16_t x;
      memcpy(&x, b.data[k] + 2 * n, 2);
      right_rows[k][n % 2][n / 2] = widened(x);
    }
  for (int m = 0; m < c.rows; ++m) {
    Wide parts = {};
    for (int k = 0; k < b.rows; ++k)
      for (int odd : {0, 1}) {
        uint16_t x;
        memcpy(&x, a.data[m] + 4 * k + 2 * odd, 2);
        const float left_one = widened(x);
        for (int n = 0; n < 16; ++n)
          parts[odd][n] = flushed(__builtin_fmaf(left_one, right_rows[k][odd][n], parts[odd][n]));
      }
    float row[16];
    memcpy(row, c.data[m], 64);
    for (int n = 0; n < 16; ++n) row[n] = flushed(flushed(row[n]) + flushed(parts[0][n] + parts[1][n]));
    memset(c.data[m], 0, 64);
    memcpy(c.data[m], row, c.row_bytes);
  }
}
