// SPDX-License-Identifier: Apache-2.0
// Which elements count: by magnitude, by chance, by the place in a row.
#pragma once

#include "lanes.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

// Row of a cut's tensors that a part uses.
inline int64_t cut_row(const Cut& cut, int64_t part) { return cut.groups > 1 ? part : 0; }

// Elements above a cut's threshold 2, equal to it 1, below it and NaN 0: marks [streams, run.count].
void mark(const Table& t, const Cut& cut, const Run& run, uint8_t* marks, int64_t* equal,
          Scratch& s) {
  const int64_t streams = streams_of(cut, t.models);
  const int32_t* bits = cut.bits + cut_row(cut, run.part) * streams;
  alignas(64) uint32_t keys[kStep];
  in_steps(run, [&](int64_t at, int n) {
    const Inputs in(t, run.part, at, n, true, s);
    for (int m = 0; m < streams; ++m) {
      keys_of(in, t.models, cut.variance, m, n, keys);
      const uint32_t bound = uint32_t(bits[m]);
      uint8_t* __restrict mine = marks + m * run.count + (at - run.begin);
      int found = 0;
      for (int i = 0; i < n; ++i) {
        mine[i] = keys[i] == kNoKey ? 0 : (keys[i] >= bound) + (keys[i] > bound);
        found += keys[i] == bound;
      }
      equal[m] += found;
    }
  });
}

// Marks become 1 where the cut takes an element, else 0.
inline void resolve(const Cut& cut, const Run& run, const Marks& given, int models) {
  const int64_t streams = streams_of(cut, models), count = run.count;
  for (int m = 0; m < streams; ++m) {
    uint8_t* __restrict marks = given.marks + m * count;
    const int64_t ties = cut.ties[cut_row(cut, run.part) * streams + m] - given.before[m];
    if (ties <= 0 || ties >= given.equal[m]) {
      const uint8_t floor = ties <= 0 ? 2 : 1;
      for (int64_t i = 0; i < count; ++i) marks[i] = marks[i] >= floor;
      continue;
    }
    for (int64_t i = 0, rank = 0; i < count; ++i) {
      const bool equal = marks[i] == 1;
      marks[i] = equal ? rank < ties : marks[i] != 0;
      rank += equal;
    }
  }
}

void mask(const Table& t, const Mask& mask, const Run& run, const Marks& keep, const Marks& drop,
          const Kept& out, Scratch& s) {
  const Part& part = t.part[run.part];
  const int64_t count = run.count;
  uint32_t* words = scratch<uint32_t>(s, kWords, kWordRoom);
  if (keep.marks) resolve(mask.keep, run, keep, t.models);
  if (drop.marks) resolve(mask.drop, run, drop, t.models);
  for (int m = 0; m < t.models; ++m) {
    uint8_t* __restrict mine = out.kept + m * out.stride;
    const uint8_t* __restrict kept = keep.marks + (mask.keep.variance ? 0 : m) * count;
    const uint8_t* __restrict dropped = drop.marks + (mask.drop.variance ? 0 : m) * count;
    keep.marks ? memcpy(mine, kept, count) : memset(mine, 1, count);
    for (int64_t i = 0; drop.marks && i < count; ++i) mine[i] &= !dropped[i];
    if (!mask.density) continue;
    const uint32_t bound = reach(mask.density[run.part * t.models + m]);
    in_steps(run, [&](int64_t at, int n) {
      const uint32_t* __restrict drawn = random_words(part.key, t.model[run.part * t.models + m],
                                                      kDrop, part.offset + at, n, words);
      uint8_t* __restrict here = mine + (at - run.begin);
      for (int i = 0; i < n; ++i) here[i] &= draw(drawn[i]) < bound;
    });
  }
}

// Columns of a row from the largest key down, lowest column first among equals: three stable counting
// sorts of 11, 10 and 10 bits of the inverted key. NaN comes last.
inline const uint32_t* sort_row(const uint32_t* keys, int64_t c, uint32_t* order, uint32_t* spare) {
  constexpr int kShift[] = {0, 11, 21, 31}, kBins = 1 << 11;
  uint32_t count[kBins];
  const uint32_t* from = nullptr;
  uint32_t* to = order;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShift[pass];
    const uint32_t digits = (1u << (kShift[pass + 1] - shift)) - 1;
    // 0x7fffffff - key; of NaN 0x7fffffff, which no number reaches
    const auto digit = [&](int64_t column) {
      const uint32_t key = keys[column];
      return ((key == kNoKey ? 0x7fffffffu : 0x7ffffffeu - key) >> shift) & digits;
    };
    memset(count, 0, sizeof(count));
    for (int64_t i = 0; i < c; ++i) ++count[digit(i)];
    uint32_t first = 0;
    for (uint32_t b = 0; b <= digits; ++b) {
      const uint32_t here = count[b];
      count[b] = first;
      first += here;
    }
    for (int64_t i = 0; i < c; ++i) {
      const uint32_t column = from ? from[i] : uint32_t(i);
      to[count[digit(column)]++] = column;
    }
    from = to;
    to = to == order ? spare : order;
  }
  return from;
}

void mask_rows(const Table& t, const Mask& mask, const Run& run, const Kept& out, Scratch& s) {
  const Part& part = t.part[run.part];
  const int64_t c = part.width;
  uint32_t* keys = scratch<uint32_t>(s, kValues, 4 * c);
  uint32_t *order = keys + c, *spare = order + c;
  float* chance = reinterpret_cast<float*>(spare + c);
  float* inputs = scratch<float>(s, kInputs, 2 * kStep);
  uint32_t* words = scratch<uint32_t>(s, kWords, kWordRoom);
  for (int64_t row = run.begin; row < run.begin + run.count; row += c)
    for (int m = 0; m < t.models; ++m) {
      const RowChoice& choice = mask.rows[m];
      in_steps({run.part, row, c}, [&](int64_t at, int n) {
        const float* __restrict delta = delta_of(t, run.part, m, at, n, inputs);
        for (int i = 0; i < n; ++i) keys[at - row + i] = magnitude(delta[i]);
      });
      const uint32_t* places = sort_row(keys, c, order, spare);
      uint8_t* kept = out.kept + m * out.stride + (row - out.begin);
      float least = from_bits(kInfinite), most = 0;
      for (int64_t i = 0; choice.draw && mask.by_value && i < c; ++i) {
        const float size = keys[i] == kNoKey ? 0.0f : from_bits(keys[i]);
        least = size < least && keys[i] != kNoKey ? size : least;
        most = size > most ? size : most;
      }
      for (int64_t q = 0; q < c; ++q) {
        const uint32_t column = places[q];
        kept[column] = q >= choice.drop && q - choice.drop < choice.keep;
        if (!choice.draw) continue;
        const float size = keys[column] == kNoKey ? 0.0f : from_bits(keys[column]);
        chance[column] = mask.by_value
                             ? value_probability(choice.low, choice.spread, size, least, most)
                             : rank_probability(choice.low, choice.spread, c - 1 - q, c);
      }
      if (choice.draw)
        in_steps({run.part, row, c}, [&](int64_t at, int n) {
          const uint32_t* __restrict drawn = random_words(
              part.key, t.model[run.part * t.models + m], kDrop, part.offset + at, n, words);
          for (int i = 0; i < n; ++i)
            kept[at - row + i] &= uniform(drawn[i]) < chance[at - row + i];
        });
      if (!out.divide) continue;
      float* divide = out.divide + m * out.stride + (row - out.begin);
      for (int64_t i = 0; i < c; ++i) divide[i] = choice.draw ? chance[i] : 1.0f;
    }
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
