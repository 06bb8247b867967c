// Whether this process may use AMX: an instruction on tiles ends it where the processor or the system does not
// allow it.

#pragma once

#include <cstdint>
#include <string>

namespace vtp_cpu {

// What is asked of a machine.
struct AmxMachine {
  struct Registers {
    uint32_t eax, ebx, ecx, edx;
  };
  Registers (*cpuid)(uint32_t leaf, uint32_t subleaf);
  uint64_t (*saved_state)();  // XGETBV of register 0: what the system saves of a thread
  bool (*ask_for_tiles)();    // of the system, for this process
};

// The one that this runs on.
const AmxMachine& this_machine();

// Whether the processor has AMX with bfloat16, whatever the system says.
bool has_amx(const AmxMachine& machine);

// Why this process may not use it, or an empty string. Asks the system for tiles if all else is there.
std::string amx_unsupported_reason(const AmxMachine& machine);

}  // namespace vtp_cpu
