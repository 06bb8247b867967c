#include "amx_support.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vtp_cpu {
namespace {

AmxMachine::Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  AmxMachine::Registers r{};
#if defined(__x86_64__)
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
#else
  (void)leaf, (void)subleaf;
#endif
  return r;
}

uint64_t saved_state() {
  uint32_t low = 0, high = 0;
#if defined(__x86_64__)
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
#endif
  return uint64_t{high} << 32 | low;
}

bool ask_for_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool bit(uint64_t x, int i) { return x >> i & 1; }

}  // namespace

const AmxMachine& this_machine() {
  static const AmxMachine machine{cpuid, saved_state, ask_for_tiles};
  return machine;
}

bool has_amx(const AmxMachine& machine) {
  const uint32_t features = machine.cpuid(7, 0).edx;
  return bit(features, 22) && bit(features, 24);  // AMX-BF16, AMX-TILE
}

std::string amx_unsupported_reason(const AmxMachine& machine) {
  if (!has_amx(machine)) return "the processor has no AMX with bfloat16";
  // OSXSAVE, without which XGETBV is not allowed; TILECFG and TILEDATA.
  if (!bit(machine.cpuid(1, 0).ecx, 27) || !bit(machine.saved_state(), 17) || !bit(machine.saved_state(), 18))
    return "the system does not save tiles";
  // The kernels' tiles: palette 1, eight of 16 rows of 64 bytes, of products of 16 pairs.
  const AmxMachine::Registers tiles = machine.cpuid(0x1d, 1), products = machine.cpuid(0x1e, 0);
  const uint32_t most_pairs = products.ebx & 0xff, most_bytes = products.ebx >> 8 & 0xffff;
  if (machine.cpuid(0x1d, 0).eax < 1 || tiles.ebx >> 16 < 8 || (tiles.ebx & 0xffff) < 64 ||
      (tiles.ecx & 0xffff) < 16 || most_pairs < 16 || most_bytes < 64)
    return "the processor's tiles are smaller than expected";
  if (!machine.ask_for_tiles()) return "the system does not permit tiles";
  return "";
}

}  // namespace vtp_cpu
