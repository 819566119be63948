// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <stdlib.h>
#include <string.h>
#if defined(GEMMA_EXT_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <string>

namespace gemma_ext::cpu {
namespace {

#define GEMMA_EXT_NAME(isa) #isa,
constexpr const char* kNames[] = {GEMMA_EXT_ISAS(GEMMA_EXT_NAME)};
#undef GEMMA_EXT_NAME
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

struct Support {
  bool runs, preferred;
};

#if defined(GEMMA_EXT_X86)
#define GEMMA_EXT_HAS(feature) (__builtin_cpu_supports(feature) != 0)

// clang 14 does not know F16C in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

Support support_avx2() {
  return {GEMMA_EXT_HAS("avx2") && GEMMA_EXT_HAS("fma") && has_f16c(), true};
}

Support support_avx512() {
  return {GEMMA_EXT_HAS("avx512f") && GEMMA_EXT_HAS("avx512bw") && GEMMA_EXT_HAS("avx512dq") &&
              GEMMA_EXT_HAS("avx512vl"),
          true};
}

// VDPBF16PS doubles the rate of fp32 on Zen 4 (226 against 113 GFLOP/s per core) and halves it on
// Emerald Rapids (80 against 165), so Intel converts to fp32 while packing.
Support support_avx512bf16() {
  return {support_avx512().runs && GEMMA_EXT_HAS("avx512bf16"), !__builtin_cpu_is("intel")};
}
#undef GEMMA_EXT_HAS

// Whether the system saves the states of XCR0 in `mask` for every thread.
bool saves_state(unsigned mask) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & mask) == mask;
}

// clang 14 does not know AMX in __builtin_cpu_supports. The tiles' data are a state of 8 KiB, which
// Linux saves only for processes that asked for it, with all of their threads.
Support support_amxbf16() {
  constexpr unsigned kTileConfig = 17, kTileData = 18, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a, b, c, d;
  const bool has = support_avx512().runs && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
                   (d & kAmxBf16) && (d & kAmxTile) &&
                   saves_state(1u << kTileConfig | 1u << kTileData);
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return {has && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0, true};
#else
  return {false, false};
#endif
}
#endif

#if defined(GEMMA_EXT_WITH_EMULATED_AMX)
Support support_amxemulated() { return {true, false}; }
#endif

Support support_baseline() { return {true, true}; }

int choose() {
#define GEMMA_EXT_SUPPORT(isa) support_##isa,
  constexpr Support (*kSupport[])() = {GEMMA_EXT_ISAS(GEMMA_EXT_SUPPORT)};
#undef GEMMA_EXT_SUPPORT
  const char* asked = getenv("GEMMA_EXT_CPU_ISA");
  if (asked && !*asked) asked = nullptr;
  for (int i = 0; i < kCount; ++i) {
    if (asked && strcmp(asked, kNames[i]) != 0) continue;
    const Support set = kSupport[i]();
    if (set.runs && (asked || set.preferred)) return i;
  }
  return -1;
}

std::string list_names() {
  std::string text = kNames[kCount - 1];
  for (int i = kCount - 2; i >= 0; --i) text += (i ? ", " : " or ") + std::string(kNames[i]);
  return text;
}

}  // namespace

int chosen_isa() {
  static const int chosen = choose();
  return chosen;
}

const char* isa_name(int isa) { return kNames[isa]; }

const char* isa_names() {
  static const std::string names = list_names();
  return names.c_str();
}

}  // namespace gemma_ext::cpu
