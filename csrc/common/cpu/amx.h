// SPDX-License-Identifier: Apache-2.0
// The tile instructions of AMX: eight registers of at most 16 rows x 64 bytes, whose shapes a
// configuration says, and D += A . B on bfloat16 pairs. In a build for tests plain C++ executes them.
//
// Numbers of registers are literals: the intrinsics of gcc paste them into the instruction's text.
#pragma once

#include <stdint.h>

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace gemma_ext::cpu::GEMMA_EXT_ISA::amx {

constexpr int kRows = 16, kBytes = 64;

// What LDTILECFG reads; rows and bytes per row of each register, 0 where it is not used.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

}  // namespace gemma_ext::cpu::GEMMA_EXT_ISA::amx

#if defined(GEMMA_EXT_EMULATED_AMX)
#include "amx_emulated.h"
#else

// gcc 12 does not tell the optimiser that LDTILECFG reads all of its operand, nor that TILELOADD reads
// memory at all: stores before either must be complete.
#define GEMMA_EXT_TILE_FENCE(address) __asm__ volatile("" ::"r"(address) : "memory")

#define GEMMA_EXT_TILE_CONFIGURE(config) \
  do {                                   \
    GEMMA_EXT_TILE_FENCE(config);        \
    _tile_loadconfig(config);            \
  } while (0)
#define GEMMA_EXT_TILE_RELEASE() _tile_release()
#define GEMMA_EXT_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define GEMMA_EXT_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define GEMMA_EXT_TILE_ZERO(tile) _tile_zero(tile)
#define GEMMA_EXT_TILE_DOT(d, a, b) _tile_dpbf16ps(d, a, b)

#endif
