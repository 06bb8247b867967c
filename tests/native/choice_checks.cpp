// Which kernels are chosen, and what a machine has to say before AMX is.

#include <chrono>
#include <thread>

#include "amx_support.h"
#include "checks.h"
#include "trial.h"

namespace test {
namespace {

using vtp_cpu::AmxMachine;
using vtp_cpu::kPortableBFloat16;
using vtp_cpu::LinearTile;

// ------------------------------------------------------------------------------------------------------ trials

// Kernels that take so long for a layer, whose results are all zero.
template <int Microseconds>
void layer_of_zeros(const LinearTile& t) {
  std::this_thread::sleep_for(std::chrono::microseconds(Microseconds));
  for (int64_t i = 0; i < t.rows; ++i)
    std::memset(static_cast<float*>(t.out) + i * t.out_stride, 0, static_cast<size_t>(t.columns) * 4);
}

template <int Microseconds>
Kernels taking(const char* name) {
  Kernels out = kPortableBFloat16;
  out.name = name;
  out.linear = layer_of_zeros<Microseconds>;
  return out;
}

void one_wrong_number(const LinearTile& t) {
  kPortableBFloat16.linear(t);
  static_cast<float*>(t.out)[(t.rows - 1) * t.out_stride + t.columns - 1] += 0.01f;
}

void other_bits_at_times(const LinearTile& t) {
  static int calls = 0;
  kPortableBFloat16.linear(t);
  float& last = static_cast<float*>(t.out)[(t.rows - 1) * t.out_stride + t.columns - 1];
  if (++calls % 10 == 0) last = std::nextafter(last, 1e9f);
}

void attention_without_values(const vtp_cpu::AttentionRows& t) {
  for (int64_t i = t.first_row; i < t.last_row; ++i)
    std::memset(static_cast<float*>(t.out) + i * t.out_stride, 0, static_cast<size_t>(t.value_width) * 4);
}

void check_self_test() {
  Kernels wrong = kPortableBFloat16, unsteady = kPortableBFloat16, blind = kPortableBFloat16;
  wrong.linear = one_wrong_number;
  unsteady.linear = other_bits_at_times;
  blind.attention = attention_without_values;
  expect(!compute_the_same(wrong, kPortableBFloat16), "choice: one wrong number is not seen");
  expect(!compute_the_same(unsteady, kPortableBFloat16), "choice: bits that change are not seen");
  expect(!compute_the_same(blind, kPortableBFloat16), "choice: wrong attention is not seen");
  expect(compute_the_same(*current.bfloat16, kPortableBFloat16),
         std::string(current.bfloat16->name) + " fails the self-test");
}

void expect_choice(const std::vector<const Kernels*>& candidates, const Kernels& best, const char* why) {
  const vtp_cpu::Choice got = vtp_cpu::fastest(candidates);
  expect(got.kernels == &best, std::string("choice: got ") + got.kernels->name + ", expected " + best.name);
  expect(got.why.find(why) != std::string::npos, "choice: got \"" + got.why + "\", expected \"" + why + "\"");
}

void check_fastest() {
  const Kernels plain = taking<3000>("plain"), slow = taking<6000>("slow"), fast = taking<1000>("fast"),
                same = taking<3000>("same");
  Kernels wrong = taking<100>("wrong");
  wrong.linear = one_wrong_number;
  expect_choice({&plain, &slow}, plain, " as fast as slow in a trial");
  expect_choice({&plain, &fast, &slow}, fast, " as fast as plain, ");
  expect_choice({&plain, &same}, same, "x as fast as plain in a trial");
  expect_choice({&plain, &wrong}, plain, "wrong failed its self-test");
}

// --------------------------------------------------------------------------------------------------------- AMX

AmxMachine::Registers features, basic, palettes, palette, products;
uint64_t saved;
bool permitted, asked;

AmxMachine::Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  if (leaf == 1) return basic;
  if (leaf == 7 && subleaf == 0) return features;
  if (leaf == 0x1d) return subleaf == 0 ? palettes : palette;
  if (leaf == 0x1e && subleaf == 0) return products;
  return {};
}
uint64_t saved_state() { return saved; }
bool ask_for_tiles() {
  asked = true;
  return permitted;
}

// As an Intel Sapphire Rapids under Linux answers.
void set_good_machine() {
  features = {0, 0, 0, 1u << 22 | 1u << 24 | 1u << 25};
  basic = {0, 0, 1u << 27, 0};
  palettes = {1, 0, 0, 0};
  palette = {8192u | 1024u << 16, 64u | 8u << 16, 16, 0};
  products = {0, 16u | 64u << 8, 0, 0};
  saved = 0x600e7;
  permitted = true;
  asked = false;
}

template <class Change>
void expect_no_amx(const char* reason, const Change& change) {
  set_good_machine();
  change();
  const std::string got = vtp_cpu::amx_unsupported_reason({cpuid, saved_state, ask_for_tiles});
  expect(got == reason, "choice: AMX: got \"" + got + "\", expected \"" + reason + "\"");
}

void check_amx() {
  expect_no_amx("", [] {});
  expect(asked, "choice: the system was not asked for tiles");
  for (int bit : {22, 24})
    expect_no_amx("the processor has no AMX with bfloat16", [bit] { features.edx &= ~(1u << bit); });
  expect_no_amx("the system does not save tiles", [] { basic.ecx = 0; });
  for (int bit : {17, 18})
    expect_no_amx("the system does not save tiles", [bit] { saved &= ~(uint64_t{1} << bit); });
  expect(!asked, "choice: the system was asked for tiles that it does not save");
  expect_no_amx("the processor's tiles are smaller than expected", [] { palettes.eax = 0; });
  expect_no_amx("the processor's tiles are smaller than expected", [] { palette.ebx = 64u | 4u << 16; });
  expect_no_amx("the processor's tiles are smaller than expected", [] { palette.ebx = 32u | 8u << 16; });
  expect_no_amx("the processor's tiles are smaller than expected", [] { palette.ecx = 8; });
  expect_no_amx("the processor's tiles are smaller than expected", [] { products.ebx = 8u | 64u << 8; });
  expect_no_amx("the system does not permit tiles", [] { permitted = false; });
}

}  // namespace

void check_choice() {
  check_self_test();
  static bool once = false;  // the rest is about no instruction set
  if (once) return;
  once = true;
  check_fastest();
  check_amx();
}

}  // namespace test
