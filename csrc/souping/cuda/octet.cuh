// SPDX-License-Identifier: Apache-2.0
// Eight consecutive positions of a tensor, from a multiple of 8 on: what a thread takes at a time. Whole and
// aligned it is one 16-byte word, or two of float32.
#pragma once

#include "launches.h"

namespace gemma_ext::souping::cuda {

constexpr int kLanes = 8;

// Of its positions first .. first + 8 those from `from` to before `to` exist.
struct Octet {
  int64_t first;
  int from, to;

  DEVICE bool whole() const { return from == 0 && to == kLanes; }
  DEVICE bool has(int j) const { return j >= from && j < to; }
};

// Positions begin .. end, of which octet q is one.
DEVICE Octet octet_of(int64_t q, int64_t begin, int64_t end) {
  const int64_t first = q * kLanes;
  return {first, static_cast<int>(most(begin - first, 0)),
          static_cast<int>(least(end - first, kLanes))};
}

DEVICE int64_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// An array by positions of the whole tensor.
struct View {
  uintptr_t origin;  // of position 0, which may lie before the array
  DType type;
  bool there, aligned;  // at every multiple of 8

  DEVICE static View of(const Array& a, int64_t offset) {
    const uintptr_t origin =
        reinterpret_cast<uintptr_t>(a.data) - static_cast<uintptr_t>(offset * bytes_of(a.type));
    return {origin, a.type, a.data != nullptr, origin % 16 == 0};
  }
  DEVICE uintptr_t at(int64_t position) const {
    return origin + static_cast<uintptr_t>(position * bytes_of(type));
  }
};

struct alignas(16) Quad {
  uint32_t word[4];
};

// Eight words: of an octet the bits, two elements to a word or one of float32.
struct Bits {
  uint32_t word[kLanes];
};

DEVICE float element(const View& v, int64_t position) {
  if (v.type == DType::kFloat32) return *reinterpret_cast<const float*>(v.at(position));
  const uint16_t half = *reinterpret_cast<const uint16_t*>(v.at(position));
  return v.type == DType::kBFloat16 ? from_bits(uint32_t{half} << 16)
                                    : simt::to_float(simt::f16{half});
}

DEVICE Bits fetch_whole(const View& v, const Octet& o) {
  const Quad* from = reinterpret_cast<const Quad*>(v.at(o.first));
  Bits bits{};
  const Quad low = from[0];
  UNROLL
  for (int i = 0; i < 4; ++i) bits.word[i] = low.word[i];
  if (v.type == DType::kFloat32) {
    const Quad high = from[1];
    UNROLL
    for (int i = 0; i < 4; ++i) bits.word[4 + i] = high.word[i];
  }
  return bits;
}

DEVICE_CALL Bits fetch_ragged(const View v, const Octet o) {
  Bits bits{};
  if (v.type == DType::kFloat32) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      if (o.has(j)) bits.word[j] = *reinterpret_cast<const uint32_t*>(v.at(o.first + j));
    }
  } else {
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      if (!o.has(j)) continue;
      const uint32_t half = *reinterpret_cast<const uint16_t*>(v.at(o.first + j));
      bits.word[j / 2] |= half << (16 * (j % 2));
    }
  }
  return bits;
}

DEVICE Bits fetch(const View& v, const Octet& o) {
  return v.aligned && o.whole() ? fetch_whole(v, o) : fetch_ragged(v, o);
}

DEVICE void widen(const Bits& bits, DType type, float (&x)[kLanes]) {
  if (type == DType::kFloat32) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) x[j] = from_bits(bits.word[j]);
  } else if (type == DType::kBFloat16) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      const uint32_t both = bits.word[j / 2];
      x[j] = from_bits(j % 2 ? both & 0xffff0000u : both << 16);
    }
  } else {
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      const uint32_t both = bits.word[j / 2];
      x[j] = simt::to_float(simt::f16{static_cast<uint16_t>(j % 2 ? both >> 16 : both)});
    }
  }
}

DEVICE void load(const View& v, const Octet& o, float (&x)[kLanes]) {
  widen(fetch(v, o), v.type, x);
}

DEVICE void put(const View& v, const Octet& o, const Bits& bits) {
  if (v.aligned && o.whole()) {
    Quad* to = reinterpret_cast<Quad*>(v.at(o.first));
    to[0] = {bits.word[0], bits.word[1], bits.word[2], bits.word[3]};
    if (v.type == DType::kFloat32) to[1] = {bits.word[4], bits.word[5], bits.word[6], bits.word[7]};
    return;
  }
  UNROLL
  for (int j = 0; j < kLanes; ++j) {
    if (!o.has(j)) continue;
    if (v.type == DType::kFloat32) {
      *reinterpret_cast<uint32_t*>(v.at(o.first + j)) = bits.word[j];
    } else {
      *reinterpret_cast<uint16_t*>(v.at(o.first + j)) =
          static_cast<uint16_t>(bits.word[j / 2] >> (16 * (j % 2)));
    }
  }
}

// A word for each position.
DEVICE_CALL Bits random_words(uint64_t key, int64_t first, uint32_t model, Purpose purpose) {
  const uint64_t quad = static_cast<uint64_t>(first) / 4;
  Bits words;
  philox(key, quad, model, purpose, words.word);
  philox(key, quad + 1, model, purpose, words.word + 4);
  return words;
}

// Results rounded into the type of `out`.
template <class A>
DEVICE void store(const View& out, const Octet& o, const A (&y)[kLanes], Rounding rounding,
                  uint64_t key) {
  Bits bits{};
  if (out.type == DType::kFloat32) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) bits.word[j] = to_bits(round_float(static_cast<float>(y[j])));
    return put(out, o, bits);
  }
  const bool brain = out.type == DType::kBFloat16;
  if (rounding == Rounding::kStochastic) {
    const Bits words = random_words(key, o.first, 0, kRound);
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      const float x = static_cast<float>(y[j]);
      const uint32_t half =
          brain ? stochastic_bf16(x, words.word[j]) : stochastic_half(x, words.word[j]);
      bits.word[j / 2] |= half << (16 * (j % 2));
    }
  } else {
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      const float x = to_odd(y[j]);
      const uint32_t half = brain ? round_bf16(x) : round_half(x);
      bits.word[j / 2] |= half << (16 * (j % 2));
    }
  }
  put(out, o, bits);
}

}  // namespace gemma_ext::souping::cuda
