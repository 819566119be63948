// SPDX-License-Identifier: Apache-2.0
// The block product of bfloat16 in one instruction set, callable from code that lacks it.
#pragma once

#include <stdint.h>

struct Product {
  int64_t rows, slices, k;
  const uint16_t *a, *b;  // [rows, stride], [slices][whole steps of k / 2, 32, 2]
  int64_t stride, b_stride;
  float* c;  // [rows, ldc]
  int64_t ldc;
  bool accumulate;
};

#define DECLARE_TILE_PRODUCTS(isa)                          \
  namespace isa {                                           \
  void multiply(const Product&);                            \
  void transpose(const uint16_t*, int64_t rows, uint16_t*); \
  }

DECLARE_TILE_PRODUCTS(amxemulated)
DECLARE_TILE_PRODUCTS(amxbf16)
