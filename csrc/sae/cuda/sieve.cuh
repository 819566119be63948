// SPDX-License-Identifier: Apache-2.0
// The `total` best of candidates that all blocks hold: a larger score, then the lower row, then the lower feature. Told
// apart by eleven bits at a time: each pass counts those that share the digits so far by their next one, and its last
// block to finish picks the digit at which `total` is reached.
#pragma once

#include "ordered.cuh"
#include "select.cuh"

namespace gemma_ext::sae::cuda {

constexpr int kDigit = 11, kDigitValues = 1 << kDigit;
constexpr int kOrderPasses = 3;

// An entry's place in the order: of scores, and of rows and features from the last to the first.
struct Place {
  uint32_t order;
  uint64_t behind;

  DEVICE Place(uint32_t order, const Encoder& e, int64_t n, int feature)
      : order(order), behind(static_cast<uint64_t>(e.N * e.F - 1 - (n * e.F + feature))) {}
};

struct SieveState {
  uint32_t order;  // digits so far
  uint64_t behind;
  int64_t wanted;   // of those that share them
  int done;         // all of them are
  unsigned blocks;  // that have finished the pass
};

struct Sieve {
  SieveState* state;
  int* bins;  // [kDigitValues]
  int64_t total;
  int behind_bits;  // of N F

  HOST_DEVICE int passes() const { return kOrderPasses + (behind_bits + kDigit - 1) / kDigit; }
  // Of the digit of a pass its lowest bit, in `order` or in `behind`.
  DEVICE int shift(int pass) const {
    if (pass < kOrderPasses) return pass == 0 ? 21 : pass == 1 ? 10 : 0;
    return (passes() - 1 - pass) * kDigit;
  }
  DEVICE static int bits(int pass) { return pass == kOrderPasses - 1 ? 10 : kDigit; }

  // Whether the place shares the digits before those of the pass.
  DEVICE bool shares(const SieveState& s, int pass, const Place& at) const {
    if (pass < kOrderPasses) {
      const int above = shift(pass) + bits(pass);
      return above >= 32 || (at.order ^ s.order) >> above == 0;
    }
    return at.order == s.order && (at.behind ^ s.behind) >> (shift(pass) + kDigit) == 0;
  }
  DEVICE int digit(int pass, const Place& at) const {
    const uint64_t from = pass < kOrderPasses ? at.order : at.behind;
    return static_cast<int>(from >> shift(pass) & ((1u << bits(pass)) - 1));
  }
  // Whether the place is among the best, once all passes are through.
  DEVICE bool takes(const SieveState& s, const Place& at) const {
    return at.order > s.order || (at.order == s.order && at.behind >= s.behind);
  }
};

struct SieveShared {
  int bins[kDigitValues];
  int warps[kWarps];
  bool last;
};

// A pass over candidates: count(f), by the block, calls f(place) for each of the block's.
template <class Count>
DEVICE void sieve_pass(const Sieve& sieve, int pass, SieveShared* s, const Count& count) {
  const int t = simt::thread_idx();
  const SieveState state = *sieve.state;
  if (state.done) return;
  for (int i = t; i < kDigitValues; i += kThreads) s->bins[i] = 0;
  simt::sync_block();
  count([&](const Place& at) {
    if (sieve.shares(state, pass, at)) simt::atomic_add(&s->bins[sieve.digit(pass, at)], 1);
  });
  simt::sync_block();
  for (int i = t; i < kDigitValues; i += kThreads) {
    if (s->bins[i]) simt::atomic_add(&sieve.bins[i], s->bins[i]);
  }
  simt::fence_device();
  simt::sync_block();
  if (t == 0) {
    const unsigned finished = simt::atomic_add(&sieve.state->blocks, 1u);
    s->last = finished + 1 == static_cast<unsigned>(simt::grid_dim());
  }
  simt::sync_block();
  if (!s->last) return;
  simt::fence_device();
  int64_t above = 0;
  constexpr int kEach = kDigitValues / kThreads;  // bins of a thread, from the top down
  int own[kEach], sum = 0;
  UNROLL
  for (int i = 0; i < kEach; ++i) {
    int* bin = sieve.bins + kDigitValues - 1 - (t * kEach + i);
    own[i] = simt::atomic_exchange(bin, 0);
    sum += own[i];
  }
  int total = 0;
  above = block_scan(sum, s->warps, total);
  if (pass == 0 && total <= state.wanted) {
    if (t == 0) *sieve.state = {0, 0, state.wanted, 1, 0};  // all of them
    return;
  }
  if (t == 0) sieve.state->blocks = 0;
  UNROLL
  for (int i = 0; i < kEach; ++i) {
    if (above < state.wanted && state.wanted <= above + own[i]) {
      const uint64_t digit = static_cast<uint64_t>(kDigitValues - 1 - (t * kEach + i));
      if (pass < kOrderPasses) {
        sieve.state->order = state.order | static_cast<uint32_t>(digit << sieve.shift(pass));
      } else {
        sieve.state->behind = state.behind | digit << sieve.shift(pass);
      }
      sieve.state->wanted = state.wanted - above;
      sieve.state->done = own[i] == state.wanted - above;
    }
    above += own[i];
  }
}

}  // namespace gemma_ext::sae::cuda
