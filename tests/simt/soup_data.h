// SPDX-License-Identifier: Apache-2.0
// Models to merge at odd places, and each result one element at a time from element.h.
#pragma once

#include <algorithm>
#include <map>
#include <memory>

#include "check.h"
#include "souping/cuda/launches.h"

namespace soup_test {

using namespace gemma_ext::souping;
namespace cuda = gemma_ext::souping::cuda;
using gemma_ext::DType;

struct Shape {
  int64_t numel, offset = 0, width = 1;
};

struct Options {
  int models = 3;
  std::vector<Shape> parts = {{5000, 3}, {0}, {4096}, {77, 4096 * 63 + 11}, {9001, 8}};
  bool based = true, aligned = false, special = true;
  std::vector<DType> types = {DType::kBFloat16, DType::kFloat32, DType::kFloat16};
  int extras = 0;
  uint64_t seed = 1;
};

// Arrays in allocations of their own size, so that the address sanitizer sees their ends.
class Data {
 public:
  Options o;
  std::vector<Part> part;
  std::vector<Array> source, base, extra, out;
  std::vector<uint32_t> model;

  explicit Data(const Options& options) : o(options), random_(options.seed) {
    int64_t rows = 0;
    for (const Shape& s : o.parts) {
      part.push_back({s.numel, s.offset, s.width, rows, random_.next()});
      rows += s.numel / s.width;
      for (int m = 0; m < o.models; ++m) {
        source.push_back(array(s.numel, 0.02f));
        model.push_back(static_cast<uint32_t>(m + 2));
      }
      base.push_back(o.based ? array(s.numel, 0.02f) : Array{nullptr, DType::kFloat32});
      for (int x = 0; x < o.extras; ++x) extra.push_back(array(s.numel, 0.5f));
      out.push_back(array(s.numel, 1.0f));
    }
  }

  Table table() const {
    return {static_cast<int64_t>(part.size()),
            o.models,
            o.extras,
            part.data(),
            source.data(),
            base.data(),
            extra.data(),
            out.data(),
            model.data()};
  }
  int64_t parts() const { return static_cast<int64_t>(part.size()); }

  static float at(const Array& a, int64_t i) {
    if (a.type == DType::kFloat32) return static_cast<const float*>(a.data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(a.data)[i];
    return a.type == DType::kBFloat16 ? gemma_ext::bf16_to_float(bits)
                                      : gemma_ext::half_to_float(bits);
  }
  template <class A>
  A delta(int64_t p, int m, int64_t i) const {
    const A x = at(source[p * o.models + m], i);
    return o.based ? x - static_cast<A>(at(base[p], i)) : x;
  }
  uint32_t word(int64_t p, uint32_t model, Purpose purpose, int64_t i) const {
    uint32_t words[4];
    const int64_t position = part[p].offset + i;
    philox(part[p].key, static_cast<uint64_t>(position) / 4, model, purpose, words);
    return words[position % 4];
  }
  std::vector<double> numbers(int64_t count, double low = 0.1, double high = 1.0) {
    std::vector<double> x(count);
    for (double& y : x) y = low + (high - low) * random_.below(1000) / 1000;
    return x;
  }
  Array array(int64_t numel, float size) {
    const DType type = o.types[made_++ % o.types.size()];
    const int64_t bytes = gemma_ext::size_of(type);
    // 0 to 7 elements behind a multiple of 16 bytes
    const int64_t lead = o.aligned ? 0 : static_cast<int64_t>(made_ % 3 == 0 ? 0 : made_ % 8);
    uint8_t* p = nullptr;
    if (posix_memalign(reinterpret_cast<void**>(&p), 16,
                       std::max<int64_t>((lead + numel) * bytes, 1)))
      throw std::bad_alloc();
    held_.emplace_back(p, free);
    p += lead * bytes;
    for (int64_t i = 0; i < numel; ++i) put(p, type, i, value(size));
    return {p, type};
  }
  static void put(uint8_t* p, DType type, int64_t i, float x) {
    if (type == DType::kFloat32) {
      reinterpret_cast<float*>(p)[i] = x;
    } else {
      reinterpret_cast<uint16_t*>(p)[i] =
          type == DType::kBFloat16 ? gemma_ext::float_to_bf16(x) : gemma_ext::float_to_half(x);
    }
  }

 private:
  // A lattice with many equal deltas; here and there what is not a number.
  float value(float size) {
    const int pick = random_.below(4000);
    if (o.special && pick < 4)
      return std::vector<float>{NAN, INFINITY, -0.0f, 1e-40f}[static_cast<size_t>(pick)];
    return size * static_cast<float>(random_.below(129) - 64) / 64;
  }

  simt::host::Random random_;
  std::vector<std::unique_ptr<uint8_t, void (*)(void*)>> held_;
  uint64_t made_ = 0;
};

// Bits of a result in the type of `out`; `p` and `i` are for random rounding.
template <class A>
uint32_t rounded(const Data& d, int64_t p, int64_t i, A y, Rounding rounding) {
  const DType type = d.out[p].type;
  if (type == DType::kFloat32) return to_bits(round_float(static_cast<float>(y)));
  const bool brain = type == DType::kBFloat16;
  if (rounding == Rounding::kNearest) return brain ? round_bf16(to_odd(y)) : round_half(to_odd(y));
  const uint32_t word = d.word(p, 0, kRound, i);
  const float x = static_cast<float>(y);
  return brain ? stochastic_bf16(x, word) : stochastic_half(x, word);
}

inline uint32_t bits_at(const Array& a, int64_t i) {
  return a.type == DType::kFloat32 ? static_cast<const uint32_t*>(a.data)[i]
                                   : static_cast<const uint16_t*>(a.data)[i];
}

// f<A>(p, i): the result of an element in float32 or float64, as its type asks.
template <class F>
void expect_outs(const Data& d, bool wide, Rounding rounding, F f) {
  for (int64_t p = 0; p < d.parts(); ++p) {
    for (int64_t i = 0; i < d.part[p].numel; ++i) {
      const uint32_t want = is_wide(wide, d.out[p]) ? rounded(d, p, i, f(double{}, p, i), rounding)
                                                    : rounded(d, p, i, f(float{}, p, i), rounding);
      const uint32_t got = bits_at(d.out[p], i);
      if (got != want) {
        throw std::logic_error(simt::host::text("part ", p, " element ", i, ": expected ", std::hex,
                                                want, ", got ", got));
      }
    }
  }
}

template <class Call>
void run(const Call& call) {
  const int64_t bytes = cuda::workspace(call);
  std::unique_ptr<void, void (*)(void*)> memory(aligned_alloc(256, (bytes + 255) / 256 * 256 + 256),
                                                free);
  simt::host::poison(memory.get(), bytes);
  EXPECT(cuda::run(call, memory.get(), nullptr) == 0);
}

}  // namespace soup_test
