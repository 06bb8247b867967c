// The emulation of AMX itself: it computes as the manual has it, and faults where a processor does, or it would
// let kernels pass that crash there.

#include <immintrin.h>

#include "checks.h"

namespace test {
namespace {

struct Config {
  uint8_t bytes[64] = {1};
  void set_rows(int tile, uint8_t rows) { bytes[48 + tile] = rows; }
  void set_row_bytes(int tile, uint8_t n) { bytes[16 + 2 * tile] = n; }
};

// All eight tiles of sixteen rows of 64 bytes.
Config whole_tiles() {
  Config out;
  for (int i = 0; i < 8; ++i) {
    out.set_rows(i, 16);
    out.set_row_bytes(i, 64);
  }
  return out;
}

template <class F>
void expect_fault(const char* what, const F& f) {
  try {
    f();
  } catch (const std::logic_error&) {
    return;
  }
  expect(false, std::string("tiles: no fault where ") + what);
}

template <class Change>
void expect_no_config(const char* what, const Change& change) {
  expect_fault(what, [&] {
    Config config = whole_tiles();
    change(config);
    _tile_loadconfig(&config);
  });
}

void check_faults() {
  char memory[1024] = {};
  _tile_release();
  expect_fault("nothing is configured", [] { _tile_zero(0); });
  expect_fault("nothing is configured", [&] { _tile_loadd(0, memory, 64); });
  expect_no_config("the palette is 2", [](Config& c) { c.bytes[0] = 2; });
  expect_no_config("a reserved byte is set", [](Config& c) { c.bytes[5] = 1; });
  expect_no_config("a tile has 17 rows", [](Config& c) { c.set_rows(3, 17); });
  expect_no_config("a row has 68 bytes", [](Config& c) { c.set_row_bytes(3, 68); });
  expect_no_config("a ninth tile is named", [](Config& c) { c.set_rows(8, 1), c.set_row_bytes(8, 4); });
  expect_no_config("a tile has rows of no bytes", [](Config& c) { c.set_row_bytes(7, 0); });

  Config config = whole_tiles();
  config.set_rows(5, 0);
  config.set_row_bytes(5, 0);
  config.set_rows(6, 8);
  config.set_row_bytes(7, 32);
  _tile_loadconfig(&config);
  expect_fault("there is no tile 8", [] { _tile_zero(8); });
  expect_fault("the tile has no rows", [] { _tile_zero(5); });
  expect_fault("the tile has no rows", [&] { _tile_stored(5, memory, 64); });
  expect_fault("a tile is named twice", [] { _tile_dpbf16ps(0, 0, 1); });
  expect_fault("a tile is named twice", [] { _tile_dpbf16ps(0, 1, 1); });
  expect_fault("rows of A and C differ", [] { _tile_dpbf16ps(0, 6, 1); });
  expect_fault("columns of B and C differ", [] { _tile_dpbf16ps(0, 1, 7); });
  expect_fault("inputs of A and B differ", [] { _tile_dpbf16ps(0, 1, 6); });
  _tile_release();
  expect_fault("tiles were released", [] { _tile_zero(0); });
}

// C += A B of one tile each, and that shorter tiles read and write no more than their rows.
void check_product() {
  Config config = whole_tiles();
  for (int tile : {0, 1}) config.set_rows(tile, 5);
  _tile_loadconfig(&config);
  Random random(3);
  Numbers a(5 * 32, 2), b(16 * 32, 2), c(5 * 16, 4);
  for (Numbers* each : {&a, &b, &c})
    for (int64_t i = 0; i < each->size(); ++i) each->set(i, random.normal());
  const Numbers before = c;
  _tile_loadd(0, c.data(), 64);
  _tile_loadd(1, a.data(), 64);
  _tile_loadd(2, b.data(), 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c.data(), 64);
  for (int64_t m = 0; m < 5; ++m)
    for (int64_t n = 0; n < 16; ++n) {
      double expected = before.get(m * 16 + n), size = std::fabs(expected);
      for (int64_t k = 0; k < 32; ++k) {
        const double x = a.get(m * 32 + k) * b.get(k / 2 * 32 + 2 * n + k % 2);
        expected += x;
        size += std::fabs(x);
      }
      expect_close(c.get(m * 16 + n), expected, 16 * kFloatEps * size, "tiles: a product");
    }
  _tile_release();
}

}  // namespace

void check_tiles() {
  check_faults();
  check_product();
}

}  // namespace test
