// SPDX-License-Identifier: Apache-2.0
// What an engine takes to steer: B requests of T tokens, each with its own list of directions.
//   p = x . w + bias,  f = p where p > threshold, else 0,  q = x . d / |d|
//   x' = x + sum_s g_s strength_s u_s d_s, all of it read from x; one rounding
// Sums are float, over directions in the order of the list. A direction of strength 0, of a closed gate or with u = 0
// is not added: a token without any keeps its bits.
#pragma once

#include "lists.h"

namespace gemma_ext::sae {

enum SteerMode : int32_t {
  kAdd,       // u = 1
  kAblate,    // -f
  kClamp,     // level - f
  kMinClamp,  // max(level - f, 0)
  kScale,     // (level - 1) f
  kProject,   // (level - 1) q / |d|
  kCap,       // min(level - q, 0) / |d|
};

// A token fires where f > tau of an entry, and it may be read.
enum SteerGate : int32_t {
  kAlways,
  kOwn,       // the entry's own firing opens it, for this token
  kTogether,  // any entry's
  kCausal,    // a token fired that is fewer than `window` read tokens back
  kPrompt,    // a token of the first call fired that had tokens to read
};

// Of a request between calls: tokens since the last that fired.
constexpr int32_t kUndecided = -2, kNever = -1, kForever = 0x7fffffff;

struct Steer {
  const void* x;        // [B, T, D] contiguous
  DType type;           // of x and out
  Table decoder;        // [R, D]
  Table encoder;        // [R, D], or null where no mode and no gate reads f
  const float* tables;  // [R, 3]: bias, threshold, |d|
  int64_t B, T, D, R, entries;
  const int64_t* offsets;  // [B + 1]: entries of a request
  const int32_t* latents;  // [entries], rows of the tables
  const int32_t* modes;    // [entries], a SteerMode
  const float* amounts;    // [entries, 3]: strength, level, tau
  const int32_t* gates;    // [B, 2]: a SteerGate, window
  const int32_t* state;    // [B]
  const uint8_t* reads;    // [B, T], tokens that may fire; null: all
  const uint8_t* writes;   // [B, T], tokens that may change; null: all
  void* out;               // [B, T, D]
  int32_t* state_after;    // [B]; tokens since, counted up to kForever
};

}  // namespace gemma_ext::sae
