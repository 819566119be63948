// SPDX-License-Identifier: Apache-2.0
// Products of the 8-bit codes of a head with a few rows:  acc[f, m] += sum_k code[f, k] x[m, k]
// A code is exact in 16 bits, so it is widened in registers on its way to mma.sync: memory and shared memory hold
// bytes. float rows are two bf16 halves, high + low, which leave 2^-18 of them. An output has one chain over k,
// whatever the tile's rows.
//
// The k of an instruction are four neighbours of a thread, so that a thread reads the codes of a feature as one word.
// A warp owns 16 features and all rows; a stage is 64 k.
#pragma once

#include "feature_tile.cuh"

namespace gemma_ext::depth_batching::cuda {

template <class T, int kR>
class CodeTile : public Fragments<kR> {
 public:
  using Type = T;
  using Left = int8_t;
  static constexpr int kFeatures = 128, kRows = kR;
  static constexpr int kThreads = kFeatures / 16 * simt::kWarpSize;
  static constexpr int kDepth = 64, kStages = 4;
  static constexpr int kCodes = kFeatures * kDepth;  // bytes of a stage
  static constexpr int kStage = kCodes + kRows * kDepth * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = kStages * kStage;
  static constexpr int kBlocks = kRows == 16 ? 4 : sizeof(T) == 2 ? 2 : 1;  // of a multiprocessor
  static_assert(kRows % 8 == 0 && kSharedBytes >= kFeatures * kRows * 4);

  // As FeatureTile; a(line, k) of codes is for multiples of 16.
  template <class A, class B>
  DEVICE void multiply(int depth, const A& a, const B& b, T* s_stages) {
    auto* s_bytes = reinterpret_cast<unsigned char*>(s_stages);
    staged<kStages>((depth + kDepth - 1) / kDepth,
                    [&](int step, int stage) {
                      unsigned char* s_codes = s_bytes + stage * kStage;
                      load<kFeatures, int8_t>(s_codes, step * kDepth, a);
                      load<kRows, T>(s_codes + kCodes, step * kDepth, b);
                    },
                    [&](int stage) {
                      const unsigned char* s_codes = s_bytes + stage * kStage;
                      NO_UNROLL
                      for (int k = 0; k < kDepth; k += mma::kInstruction)
                        product(s_codes, s_codes + kCodes, k);
                    });
  }

 private:
  static constexpr bool kSplit = std::is_same_v<T, float>;
  using Factor = std::conditional_t<kSplit, simt::bf16, T>;  // what is multiplied

  struct alignas(8) Pairs {
    uint32_t first, second;
  };
  struct alignas(16) Floats {
    float x, y, z, w;
  };

  // Chunks of 16 bytes are exchanged inside a line so that what a warp reads at once lies in distinct banks.
  template <class Element>
  DEVICE static int place(int line, int chunk) {
    constexpr int kLine = kDepth * static_cast<int>(sizeof(Element)) / 16;
    const int turn = sizeof(Element) == 1   ? line / 2 % 4
                     : sizeof(Element) == 2 ? line % 4 * 2
                                            : line % 2 * 4;
    return (line * kLine + (chunk ^ turn)) * 16;
  }

  template <int kLines, class Element, class Loader>
  DEVICE static void load(unsigned char* s_operand, int k0, const Loader& from) {
    constexpr int kChunk = 16 / sizeof(Element), kLine = kDepth / kChunk;
    UNROLL
    for (int i = 0; i < kLines * kLine; i += kThreads) {
      const int at = i + simt::thread_idx(), line = at / kLine, chunk = at % kLine;
      if (kLines * kLine % kThreads && at >= kLines * kLine) break;
      const Element* source = from(line, k0 + chunk * kChunk);
      simt::cp_async(s_operand + place<Element>(line, chunk), source, source ? 16 : 0);
    }
  }

  // Codes 2 half and 2 half + 1 of a word that has 128 added to each.
  DEVICE static uint32_t factors(uint32_t word, int half) {
    // 2^23 + byte is a float whose last bits are the byte's
    const auto code = [&](int at) {
      return simt::float_of(0x4b000000u | (word >> 8 * at & 0xffu)) - 8388736.0f;
    };
    return simt::pack<Factor>(code(2 * half), code(2 * half + 1));
  }

  DEVICE void product(const unsigned char* s_codes, const unsigned char* s_rows, int k) {
    const int line = simt::lane_idx() / 4, quad = simt::lane_idx() % 4;
    uint32_t a[4];
    UNROLL
    for (int r = 0; r < 2; ++r) {
      const int feature = simt::warp_idx() * 16 + r * 8 + line;
      const uint32_t word =
          *reinterpret_cast<const uint32_t*>(s_codes + place<int8_t>(feature, k / 16) + quad * 4) ^
          0x80808080u;
      a[r] = factors(word, 0);
      a[2 + r] = factors(word, 1);
    }
    UNROLL
    for (int j = 0; j < kRows / 8; ++j) {
      const int row = j * 8 + line;
      if constexpr (!kSplit) {
        const Pairs x = *reinterpret_cast<const Pairs*>(s_rows + place<T>(row, k / 8 + quad / 2) +
                                                        quad % 2 * 8);
        const uint32_t b[2] = {x.first, x.second};
        simt::mma_m16n8k16<T>(acc_[j], a, b);
      } else {
        const Floats x = *reinterpret_cast<const Floats*>(s_rows + place<T>(row, k / 4 + quad));
        uint32_t high[2], low[2];
        split(x.x, x.y, high[0], low[0]);
        split(x.z, x.w, high[1], low[1]);
        simt::mma_m16n8k16<simt::bf16>(acc_[j], a, low);
        simt::mma_m16n8k16<simt::bf16>(acc_[j], a, high);
      }
    }
  }

  using Fragments<kR>::acc_;
};

}  // namespace gemma_ext::depth_batching::cuda
