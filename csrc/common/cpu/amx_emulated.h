// SPDX-License-Identifier: Apache-2.0
// The tile instructions in plain C++, as Intel's manual defines them: what would fault aborts, TDPBF16PS
// rounds to nearest even and takes and gives no denormals.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../dtype.h"

namespace gemma_ext::cpu::GEMMA_EXT_ISA::amx {

struct Machine {
  bool configured = false;
  Config config;
  uint8_t tile[8][kRows][kBytes];
};

inline thread_local Machine machine;

inline void fault(const char* what) {
  fprintf(stderr, "AMX: %s\n", what);
  abort();
}

inline void check_tile(int t) {
  if (!machine.configured) fault("#UD, no configuration is loaded");
  if (t < 0 || t > 7 || machine.config.rows[t] == 0) fault("#UD, the tile is not configured");
}

inline void configure(const Config* config) {
  if (config->palette != 1 || config->start_row) fault("#GP, palette 1 from row 0 expected");
  for (int t = 0; t < 16; ++t) {
    const int rows = config->rows[t], bytes = config->bytes[t];
    if (rows > kRows || bytes > kBytes || (rows == 0) != (bytes == 0) || (t > 7 && rows))
      fault("#GP, the shape of a tile");
  }
  for (uint8_t byte : config->reserved)
    if (byte) fault("#GP, reserved bytes are set");
  machine.config = *config;
  machine.configured = true;
  memset(machine.tile, 0, sizeof(machine.tile));
}

inline void release() { machine.configured = false; }

inline void zero(int t) {
  check_tile(t);
  memset(machine.tile[t], 0, sizeof(machine.tile[t]));
}

inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < machine.config.rows[t]; ++r)
    memcpy(machine.tile[t][r], static_cast<const char*>(from) + r * stride,
           machine.config.bytes[t]);
}

inline void store(int t, void* to, int64_t stride) {
  check_tile(t);
  for (int r = 0; r < machine.config.rows[t]; ++r)
    memcpy(static_cast<char*>(to) + r * stride, machine.tile[t][r], machine.config.bytes[t]);
}

inline float flushed(float x) {
  const uint32_t bits = bits_of(x);
  return bits & 0x7f800000u ? x : float_of(bits & 0x80000000u);
}

inline void dot(int d, int a, int b) {
  check_tile(d);
  check_tile(a);
  check_tile(b);
  const Config& c = machine.config;
  if (d == a || d == b || a == b) fault("#UD, a tile twice");
  if (c.rows[d] != c.rows[a] || c.bytes[d] != c.bytes[b] || c.bytes[a] / 4 != c.rows[b] ||
      c.bytes[a] % 4 || c.bytes[b] % 4)
    fault("#UD, shapes of a product");
  const int columns = c.bytes[d] / 4, pairs = c.bytes[a] / 4;
  for (int m = 0; m < c.rows[d]; ++m) {
    float even[16] = {}, odd[16] = {}, sum[16];
    uint16_t left[32], right[32];
    memcpy(left, machine.tile[a][m], kBytes);
    for (int k = 0; k < pairs; ++k) {
      memcpy(right, machine.tile[b][k], kBytes);
      const float x = flushed(bf16_to_float(left[2 * k]));
      const float y = flushed(bf16_to_float(left[2 * k + 1]));
      for (int n = 0; n < columns; ++n) {
        const float u = flushed(bf16_to_float(right[2 * n]));
        const float v = flushed(bf16_to_float(right[2 * n + 1]));
        even[n] = flushed(__builtin_fmaf(x, u, even[n]));
        odd[n] = flushed(__builtin_fmaf(y, v, odd[n]));
      }
    }
    memcpy(sum, machine.tile[d][m], kBytes);
    for (int n = 0; n < columns; ++n) sum[n] = flushed(flushed(sum[n]) + flushed(even[n] + odd[n]));
    memcpy(machine.tile[d][m], sum, kBytes);
  }
}

}  // namespace gemma_ext::cpu::GEMMA_EXT_ISA::amx

#define GEMMA_EXT_TILE_FENCE(address) (void)(address)
#define GEMMA_EXT_TILE_CONFIGURE(config) amx::configure(config)
#define GEMMA_EXT_TILE_RELEASE() amx::release()
#define GEMMA_EXT_TILE_LOAD(tile, from, stride) amx::load(tile, from, stride)
#define GEMMA_EXT_TILE_STORE(tile, to, stride) amx::store(tile, to, stride)
#define GEMMA_EXT_TILE_ZERO(tile) amx::zero(tile)
#define GEMMA_EXT_TILE_DOT(d, a, b) amx::dot(d, a, b)
