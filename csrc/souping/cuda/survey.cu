// SPDX-License-Identifier: Apache-2.0
// Histograms of magnitudes, for a radix select. Integers are added: any order gives the same.
#include "ties.cuh"

namespace gemma_ext::souping::cuda {
namespace {

struct SurveyParams {
  Plan plan;
  Range
      items;  // chunks times streams, the streams of a chunk side by side: its base is in L2 for all of them
  const int64_t* group;
  Word *coarse, *zeros, *odd, *fine;
  const int64_t *window, *prefix;
  int streams, cuts;
};

// Counters of 16 bits, so that the coarse histogram is 64 KiB and fits every card from sm_80 on.
constexpr int64_t kCoarseChunk = 15 * kBlock;  // below 2^16
constexpr int kCoarseThreads = 512, kCoarseWords = kCoarse / 2;

template <bool kVariance>
KERNEL_BOUNDS(kCoarseThreads, kVariance ? 1 : 2)
void survey_coarse_kernel(SurveyParams p) {
  unsigned* counts = simt::shared<unsigned>();
  View* views = simt::shared<View>(kCoarseWords * sizeof(unsigned));
  for (int w = simt::thread_idx(); w < kCoarseWords; w += kCoarseThreads) counts[w] = 0;
  for (int64_t i = p.items.from + simt::block_idx(); i < p.items.to; i += simt::grid_dim()) {
    const int stream = static_cast<int>(i % p.streams);
    const Chunk k = open_chunk(p.plan, i / p.streams, views);
    const int64_t to = p.group[k.number] * p.streams + stream;
    const Window w = checked_window(p.window ? p.window + 2 * to : nullptr);
    const uint32_t below = static_cast<uint32_t>(most(w.below, 0));
    const uint32_t above = static_cast<uint32_t>(w.above);
    Word *coarse = p.coarse + to * kCoarse, *odd = p.odd + to * kCoarse;
    unsigned zeros = 0;
    each_octet(k, [&](const Octet& o) {
      const Bits keys = keys_of(k, kVariance, stream, o);
      UNROLL
      for (int j = 0; j < kLanes; ++j) {
        if (!o.has(j) || keys.word[j] == kNoKey) continue;
        const uint32_t bin = keys.word[j] >> 16;
        if (p.odd && keys.word[j] << 16 && bin > w.below && bin < w.above)
          simt::atomic_add(&odd[bin], Word{1});
        if (keys.word[j] == 0) {
          ++zeros;
        } else {
          const uint32_t held = bin < below ? below : bin > above ? above : bin;
          simt::atomic_add(&counts[held >> 1], 1u << (16 * (held & 1)));
        }
      }
    });
    zeros = simt::reduce_add(zeros);
    if (simt::lane_idx() == 0 && zeros > 0) {
      simt::atomic_add(&p.zeros[to], Word{zeros});
      simt::atomic_add(&coarse[below], Word{zeros});
    }
    simt::sync_block();
    for (int w = simt::thread_idx(); w < kCoarseWords; w += kCoarseThreads) {
      const unsigned both = counts[w];
      if (both == 0) continue;
      counts[w] = 0;
      if (both & 0xffff) simt::atomic_add(&coarse[2 * w], Word{both & 0xffff});
      if (both >> 16) simt::atomic_add(&coarse[2 * w + 1], Word{both >> 16});
    }
  }
}

// Few keys lie in the bins asked for, but these may be of few values: each is counted in a table of the block,
// and in memory where another has its place.
constexpr int kPlaces = 1024;

struct FineShared {
  unsigned key[kPlaces];  // the cut, the key, and 1 more; 0 where free
  unsigned count[kPlaces];
  View views[2 * kMaxModels + 2];
};

template <bool kVariance>
KERNEL_BOUNDS(kThreads, 3)
void survey_fine_kernel(SurveyParams p) {
  FineShared* s = simt::shared<FineShared>();
  for (int i = simt::thread_idx(); i < kPlaces; i += kThreads) s->key[i] = s->count[i] = 0;
  for (int64_t i = p.items.from + simt::block_idx(); i < p.items.to; i += simt::grid_dim()) {
    const int stream = static_cast<int>(i % p.streams);
    const Chunk k = open_chunk(p.plan, i / p.streams, s->views);
    const int64_t first = (p.group[k.number] * p.streams + stream) * p.cuts;
    Word* fine = p.fine + first * kFine;
    each_octet(k, [&](const Octet& o) {
      const Bits keys = keys_of(k, kVariance, stream, o);
      for (int c = 0; c < p.cuts; ++c) {
        const uint32_t bin = static_cast<uint32_t>(p.prefix[first + c]);
        UNROLL
        for (int j = 0; j < kLanes; ++j) {
          if (!o.has(j) || keys.word[j] >> 16 != bin) continue;
          const unsigned at = static_cast<unsigned>(c) << 16 | (keys.word[j] & 0xffff);
          const unsigned place = at % kPlaces;
          const unsigned holds = simt::atomic_cas(&s->key[place], 0u, at + 1);
          if (holds == 0 || holds == at + 1) {
            simt::atomic_add(&s->count[place], 1u);
          } else {
            simt::atomic_add(&fine[at], Word{1});
          }
        }
      }
    });
    simt::sync_block();
    for (int place = simt::thread_idx(); place < kPlaces; place += kThreads) {
      if (s->key[place] == 0) continue;
      simt::atomic_add(&fine[s->key[place] - 1], Word{s->count[place]});
      s->key[place] = s->count[place] = 0;
    }
  }
}

int64_t enqueue(const Survey& call, void* memory, Launches* launches) {
  const int64_t grain = call.fine ? 4 * kChunk : kCoarseChunk;
  const std::vector<int64_t> first = chunks_before(call.table, grain);
  Arena arena(memory);
  Upload upload(arena, launches);
  SurveyParams p{};
  p.plan = upload.add(call.table, grain, first);
  p.group = upload.add(call.group, call.table.parts);
  if (!launches) return arena.bytes();
  upload.send();
  p.streams = streams_of(call.variance, call.table.models);
  p.items = {0, first.back() * p.streams};
  p.coarse = reinterpret_cast<Word*>(call.coarse);
  p.zeros = reinterpret_cast<Word*>(call.zeros);
  p.fine = reinterpret_cast<Word*>(call.fine);
  p.odd = reinterpret_cast<Word*>(call.odd);
  p.window = call.window;
  p.prefix = call.prefix;
  p.cuts = call.cuts;
  const int64_t grid = taking_turns(p.items.size());
  if (call.fine) {
    launches->add(call.variance ? survey_fine_kernel<true> : survey_fine_kernel<false>, grid,
                  kThreads, sizeof(FineShared), p);
  } else {
    const int shared = kCoarseWords * int{sizeof(unsigned)} + kViewBytes;
    launches->add(call.variance ? survey_coarse_kernel<true> : survey_coarse_kernel<false>, grid,
                  kCoarseThreads, shared, p);
  }
  return arena.bytes();
}

}  // namespace

int64_t workspace(const Survey& call) { return enqueue(call, nullptr, nullptr); }

Status run(const Survey& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

}  // namespace gemma_ext::souping::cuda
