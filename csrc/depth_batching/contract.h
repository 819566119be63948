// SPDX-License-Identifier: Apache-2.0
// Rows at different loops of one recursive model: what an engine takes to route them and to read and write their
// K and V. Plain structs of pointers, with their shapes; memory is where the engine computes.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"

#if defined(__CUDACC__)
#define GEMMA_EXT_DEPTH_BOTH __host__ __device__
#else
#define GEMMA_EXT_DEPTH_BOTH
#endif

namespace gemma_ext::depth_batching {

constexpr int kPage = 16;       // tokens
constexpr int kMostLoops = 64;  // of a model

// Rows by the loop they run next, in their order: those that run on, that leave for the head, that are dropped.
struct Compact {
  const int32_t* loop;   // [n] that has run; -1: enters
  const uint8_t* leave;  // [n]
  const uint8_t* drop;   // [n], or null
  int64_t n;
  int32_t loops;
  int32_t* order;        // [n]
  int32_t* next_loop;    // [n], -1 behind those that run on
  int32_t* seg_offsets;  // [loops + 1]
  int32_t* counts;       // [3]
};

// Of a row: the loop it runs next, or loops: the head, or loops + 1: nowhere.
GEMMA_EXT_DEPTH_BOTH static inline int kind_of(const Compact& c, int64_t i) {
  const int32_t loop = c.loop[i];
  if (loop < -1 || loop >= c.loops || (c.drop && c.drop[i])) return c.loops + 1;
  if (loop >= 0 && (c.leave[i] || loop == c.loops - 1)) return c.loops;
  return loop + 1;
}

// Pages of K and V: [L, pages, 2, heads, 16, width].
struct Pool {
  void* data;
  DType type;
  int64_t depths, pages, heads, width;
};

// Element at which the tokens of one head begin in a page, `half` 0: K, 1: V.
GEMMA_EXT_DEPTH_BOTH static inline int64_t page_at(const Pool& p, int64_t depth, int64_t page,
                                                   int64_t half, int64_t head) {
  return (((depth * p.pages + page) * 2 + half) * p.heads + head) * kPage * p.width;
}

// Where rows stand.
struct Places {
  const int32_t* block_tables;  // [requests, max_pages]
  int64_t requests, max_pages;
  const int32_t* req;   // [n], -1: a row that fills the launch up
  const int32_t* pos;   // [n]
  const int32_t* loop;  // [n]
  int64_t n, loops;
};

// Whether a row's request, position and loop are ones.
GEMMA_EXT_DEPTH_BOTH static inline bool is_place(const Places& p, int64_t i) {
  return p.req[i] >= 0 && p.req[i] < p.requests && p.pos[i] >= 0 &&
         p.pos[i] < p.max_pages * kPage && p.loop[i] >= 0 && p.loop[i] < p.loops;
}

// Whether rows i - 1 and i read the same keys but for the last: rows of one chunk.
GEMMA_EXT_DEPTH_BOTH static inline bool follows(const Places& p, int64_t i) {
  return p.req[i] == p.req[i - 1] && p.loop[i] == p.loop[i - 1] && p.pos[i] == p.pos[i - 1] + 1;
}

struct Rows {
  const void* data;  // [n, heads, width]
  int64_t stride;    // of rows, in elements; heads lie one behind the other
};

// A weight per element, of every loop or of each.
struct Norm {
  const float* weight;  // [loops, width], or null: no norm
  int64_t stride;       // from loop to loop; 0: one for all
};

// q' = rotate(norm(q)); k the same and v into pages.
struct RopeWrite {
  Rows q, k, v;
  int64_t q_heads;
  Pool pool;
  Places places;
  const int32_t* depth_of;            // [loops]
  const float* rope;                  // [settings, positions, 2, half] cos and sin, or null
  int64_t settings, positions, half;  // element i turns with i + half
  const int32_t* rope_of;             // [loops], or null: setting 0
  Norm q_norm, k_norm;
  float eps;
  bool plus_one;
  uint8_t* marks;  // [pages, 16], or null
  void* out;       // [n, q_heads, width]
};

// Keys are cut at multiples of this many positions; the parts of a row are joined from left to right. So its bits
// depend neither on who computes a part nor on where the row's pages lie.
constexpr int kSplit = 256;

// softmax(softcap(scale q k)) v over the sinks and first .. pos
struct Attention {
  Rows q;
  int64_t q_heads;
  Pool pool;
  Places places;
  const int32_t* depth_of;  // [loops]
  const int32_t* window;    // [loops], or null; 0: all tokens
  float scale, softcap;     // 0: none
  int32_t sinks;            // first tokens, which rows see in front of any window
  void* out;                // [n, q_heads, width]
};

// Of a row's window.
GEMMA_EXT_DEPTH_BOTH static inline int32_t first_token(const Attention& a, int64_t i) {
  const int32_t reach = a.window ? a.window[a.places.loop[i]] : 0;
  return reach > 0 && reach <= a.places.pos[i] ? a.places.pos[i] + 1 - reach : 0;
}

// Depths of later loops take the K and V of a row's loop, unless an earlier loop shares them.
struct Copy {
  Pool pool;
  Places places;
  const int32_t* depths;  // [layers, loops]
  int64_t layers;
  uint8_t* marks;  // [pages, 16], or null
};

// Whether loop j of a layer is given what lies at loop `from` < j.
GEMMA_EXT_DEPTH_BOTH static inline bool is_copied(const int32_t* depths, int from, int j) {
  for (int earlier = 0; earlier <= from; ++earlier)
    if (depths[earlier] == depths[j]) return false;
  return true;
}

}  // namespace gemma_ext::depth_batching
