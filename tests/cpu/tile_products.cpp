// SPDX-License-Identifier: Apache-2.0
#include "tile_products.h"

#include "common/cpu/gemm.h"

namespace GEMMA_EXT_ISA {

namespace isa = gemma_ext::cpu::GEMMA_EXT_ISA;

const isa::bf16* bits(const uint16_t* p) { return reinterpret_cast<const isa::bf16*>(p); }

void multiply(const Product& p) {
  const isa::TileRegisters<isa::bf16> registers;
  isa::block_product<isa::bf16>(p.rows, int(p.slices), p.k, {bits(p.a), p.stride}, bits(p.b),
                                p.b_stride, p.c, p.ldc, p.accumulate);
}

void transpose(const uint16_t* from, int64_t rows, uint16_t* to) {
  isa::pack_transposed<isa::bf16, isa::bf16>(bits(from), rows, reinterpret_cast<isa::bf16*>(to));
}

}  // namespace GEMMA_EXT_ISA
