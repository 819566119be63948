// SPDX-License-Identifier: Apache-2.0
// Which elements count: by magnitude, by chance, by the place in a row.
#pragma once

#include "lanes.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

// Row of a cut's tensors that a part uses.
inline int64_t cut_row(const Cut& cut, int64_t part) { return cut.groups > 1 ? part : 0; }

void count_ties(const Table& t, const Cut& cut, const Run& run, int64_t* ties, Scratch& s) {
  const int64_t streams = streams_of(cut, t.models);
  const int32_t* bits = cut.bits + cut_row(cut, run.part) * streams;
  alignas(64) uint32_t keys[kStep];
  in_steps(run, [&](int64_t at, int n) {
    const Inputs in(t, run.part, at, n, true, s);
    for (int m = 0; m < streams; ++m) {
      keys_of(in, t.models, cut.variance, m, n, keys);
      const uint32_t bound = uint32_t(bits[m]);
      int equal = 0;
      for (int i = 0; i < n; ++i) equal += keys[i] == bound;
      ties[m] += equal;
    }
  });
}

// taken[i] = whether a cut takes key i; `rank` equals come before.
inline void take(const uint32_t* __restrict keys, int n, uint32_t bits, int64_t rank, int64_t ties,
                 uint8_t* __restrict taken) {
  if (rank + n <= ties || rank >= ties) {  // all equals of the step, or none
    const uint32_t floor = rank >= ties ? bits + 1 : bits;
    for (int i = 0; i < n; ++i) taken[i] = (keys[i] >= floor) & (keys[i] != kNoKey);
    return;
  }
  for (int i = 0; i < n; ++i) {
    taken[i] = in_cut(keys[i], bits, rank, ties);
    rank += keys[i] == bits;
  }
}

struct CutState {
  const Cut& cut;
  int64_t rank[kMaxModels], row, streams;

  CutState(const Cut& c, int models, int64_t part, const int64_t* before)
      : cut(c), row(cut_row(c, part)), streams(streams_of(c, models)) {
    for (int m = 0; c.bits && m < streams; ++m) rank[m] = before[m];
  }

  // Whether model m's elements of a step are taken; its keys are in `keys`.
  void step(int m, const uint32_t* keys, int n, uint8_t* taken) {
    const uint32_t bits = uint32_t(cut.bits[row * streams + m]);
    take(keys, n, bits, rank[m], cut.ties[row * streams + m], taken);
    int equal = 0;
    for (int i = 0; i < n; ++i) equal += keys[i] == bits;
    rank[m] += equal;
  }
};

void mask(const Table& t, const Mask& mask, const Run& run, const int64_t* keep_before,
          const int64_t* drop_before, const Kept& out, Scratch& s) {
  const Part& part = t.part[run.part];
  uint32_t* words = scratch<uint32_t>(s, kWords, kWordRoom + kStep);
  uint32_t* keys = words + kWordRoom;
  uint8_t *taken = scratch<uint8_t>(s, kOther, 2 * kStep), *dropped = taken + kStep;
  memset(taken, 1, kStep);
  memset(dropped, 0, kStep);
  CutState keep(mask.keep, t.models, run.part, keep_before);
  CutState drop(mask.drop, t.models, run.part, drop_before);
  in_steps(run, [&](int64_t at, int n) {
    const Inputs in(t, run.part, at, n, true, s);
    for (int m = 0; m < t.models; ++m) {
      uint8_t* __restrict mine = out.kept + (at - out.begin) + m * out.stride;
      CutState* const states[] = {&keep, &drop};
      for (CutState* state : states) {
        if (!state->cut.bits || (state->cut.variance && m > 0)) continue;
        keys_of(in, t.models, state->cut.variance, m, n, keys);
        state->step(m, keys, n, state == &keep ? taken : dropped);
      }
      for (int i = 0; i < n; ++i) mine[i] = taken[i] & !dropped[i];
      if (!mask.density) continue;
      const uint32_t bound = reach(mask.density[run.part * t.models + m]);
      const uint32_t* __restrict drawn = random_words(part.key, t.model[run.part * t.models + m],
                                                      kDrop, part.offset + at, n, words);
      for (int i = 0; i < n; ++i) mine[i] &= draw(drawn[i]) < bound;
    }
  });
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
