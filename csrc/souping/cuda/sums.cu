// SPDX-License-Identifier: Apache-2.0
// Sums in float64: of blocks side by side, of spans side by side, then what is left in order.
#include "batches.h"
#include "sums.cuh"

namespace gemma_ext::souping::cuda {
namespace {

struct SumsParams {
  Plan plan;
  Range chunks, parts;
  MaskPlan mask;
  const int64_t* group;         // [T of the call]
  const int64_t* spans_before;  // [T + 1]
  double *state, *top;
  double* blocks;  // [chunks, Q] sums of those that are complete
  double* tails;   // [T, Q, kStrands] strands of the last block of a part where that is not
  double* spans;   // [spans, Q] of blocks, of spans that begin in a part
  int64_t groups;
  int quantities;
};

struct SumsShared {
  View views[2 * kMaxModels + 2];
  MaskShared mask;
  double upper[simt::kWarpSize];
  Word top[2];
  uint8_t kept[kBlock / kLanes];
  Word dealt;
};

// A thread's strand of one block: what it begins with, and where it goes.
struct Strand {
  const SumsParams& p;
  const Chunk& k;
  SumsShared* s;
  int64_t c, first;
  bool continues, closes;
  const double* state;  // [Q, kState] of the group

  DEVICE Strand(const SumsParams& p, const Chunk& k, SumsShared* s, int64_t c)
      : p(p), k(k), s(s), c(c) {
    const int64_t lane = simt::thread_idx();
    first = k.begin - k.begin % kStrands + lane;
    if (first < k.begin) first += kStrands;
    continues = k.begin % kBlock != 0;
    closes = k.end % kBlock == 0;
    state = p.state + p.group[k.number] * p.quantities * kState;
  }

  DEVICE double begin(int q) const {
    return continues ? state[q * kState + simt::thread_idx()] : 0.0;
  }
  // By the whole block.
  DEVICE void end(int q, double strand) const {
    if (!closes) {
      p.tails[(k.part * p.quantities + q) * kStrands + simt::thread_idx()] = strand;
      return;
    }
    const double sum = fold_block(strand, s->upper);
    if (simt::thread_idx() == 0) p.blocks[c * p.quantities + q] = sum;
  }
};

template <int kM>
DEVICE void gram_block(const Strand& strand) {
  const Chunk& k = strand.k;
  if constexpr (kM > 0) {
    GramStrand<kM> gram;
    UNROLL
    for (int q = 0; q < GramStrand<kM>::kSums; ++q) gram.sum[q] = 0;
    each_pair<kM>(k.models, [&](int q, int own, int, int) { gram.sum[own] = strand.begin(q); });
    gram.add(k, strand.first, k.end);
    each_pair<kM>(k.models, [&](int q, int own, int, int) { strand.end(q, gram.sum[own]); });
  } else {
    each_pair<0>(k.models, [&](int q, int, int i, int j) {
      strand.end(q, pair_strand(k, i, j, strand.first, k.end, strand.begin(q)));
    });
  }
}

DEVICE void dots_block(const Strand& strand) {
  const Chunk& k = strand.k;
  for (int m = 0; m < k.models; ++m) {
    double sum = strand.begin(m);
    UNROLL_BY(4)
    for (int64_t at = strand.first; at < k.end; at += kStrands) {
      const double base = k.based ? element(k.base(), at) : 0;
      sum = sum + delta_at(k, m, at, base) * element(k.extra(0), at);
    }
    strand.end(m, sum);
  }
}

DEVICE void norms_block(const Strand& strand) {
  const Chunk& k = strand.k;
  const SumsParams& p = strand.p;
  SumsShared* s = strand.s;
  open_mask(p.plan, p.mask, strand.c, k, &s->mask);
  double* tops = p.top + p.group[k.number] * k.models * 2;
  for (int m = 0; m < k.models; ++m) {
    simt::sync_block();
    if (simt::thread_idx() < 2) s->top[simt::thread_idx()] = 0;
    if (p.mask.any()) {
      each_octet(k, [&](const Octet& o) {
        s->kept[o.first / kLanes % (kBlock / kLanes)] =
            static_cast<uint8_t>(kept_of(p.plan, p.mask, s->mask, k, m, o));
      });
    }
    simt::sync_block();
    double sum[4], top = 0, kept_top = 0;
    UNROLL
    for (int q = 0; q < 4; ++q) sum[q] = strand.begin(4 * m + q);
    for (int64_t at = strand.first; at < k.end; at += kStrands) {
      const double d = delta_at(k, m, at, k.based ? element(k.base(), at) : 0);
      const double size = d == d ? fabs(d) : 0.0;
      const bool kept =
          !p.mask.any() || (s->kept[at / kLanes % (kBlock / kLanes)] >> at % kLanes & 1);
      const double more = kept ? size : 0.0;
      sum[0] = sum[0] + size;
      sum[1] = sum[1] + size * size;
      sum[2] = sum[2] + more;
      sum[3] = sum[3] + more * more;
      top = size > top ? size : top;
      kept_top = more > kept_top ? more : kept_top;
    }
    UNROLL
    for (int q = 0; q < 4; ++q) strand.end(4 * m + q, sum[q]);
    // numbers that are not negative are in the order of their bits
    simt::atomic_max(&s->top[0], Word{__builtin_bit_cast(uint64_t, top)});
    simt::atomic_max(&s->top[1], Word{__builtin_bit_cast(uint64_t, kept_top)});
    simt::sync_block();
    if (simt::thread_idx() < 2) {
      simt::atomic_max(reinterpret_cast<Word*>(tops) + 2 * m + simt::thread_idx(),
                       s->top[simt::thread_idx()]);
    }
  }
}

// kM as of each_pair, with kGram alone.
template <Sum kSum, int kM>
KERNEL_BOUNDS(kSumThreads, kM == 8 || kSum == Sum::kNorms ? 6 : 8)
void sum_blocks_kernel(const GRID_CONSTANT SumsParams p) {
  SumsShared* s = simt::shared<SumsShared>();
  each_chunk(p.chunks, p.mask.ticket, &s->dealt, [&](int64_t c) {
    const Chunk k = open_chunk(p.plan, c, s->views);
    const Strand strand(p, k, s, c);
    if constexpr (kSum == Sum::kGram) gram_block<kM>(strand);
    if constexpr (kSum == Sum::kDots) dots_block(strand);
    if constexpr (kSum == Sum::kNorms) norms_block(strand);
  });
}

// The positions of a part in one span, and the blocks that end in them.
struct SpanPiece {
  bool begins;
  int64_t first, blocks;  // chunks

  DEVICE SpanPiece(const Plan& plan, int64_t t, int64_t span) {
    const Part& part = plan.table.part[t];
    const int64_t begin = most(span * kSpan, part.offset);
    const int64_t end = least((span + 1) * kSpan, part.offset + part.numel);
    begins = begin % kSpan == 0;
    first = plan.first[t] + begin / kBlock - part.offset / kBlock;
    blocks = end / kBlock - begin / kBlock;
  }
};

constexpr int kSettleThreads = 128, kSettleWarps = kSettleThreads / simt::kWarpSize;

// A thread to each sum of a span that begins in its part.
KERNEL void sum_spans_kernel(SumsParams p) {
  const int64_t begin = p.spans_before[p.parts.from] * p.quantities;
  const int64_t end = p.spans_before[p.parts.to] * p.quantities;
  const int64_t thread = int64_t{simt::block_idx()} * kSettleThreads + simt::thread_idx();
  for (int64_t i = begin + thread; i < end; i += int64_t{simt::grid_dim()} * kSettleThreads) {
    const int64_t span = i / p.quantities, q = i % p.quantities;
    const int64_t t = last_not_above(p.spans_before, p.plan.table.parts, span);
    const int64_t in_part = span - p.spans_before[t] + p.plan.table.part[t].offset / kSpan;
    const SpanPiece piece(p.plan, t, in_part);
    if (!piece.begins) continue;
    double sum = 0;
    UNROLL_BY(8)
    for (int64_t b = 0; b < piece.blocks; ++b)
      sum = sum + p.blocks[(piece.first + b) * p.quantities + q];
    p.spans[i] = sum;
  }
}

// A warp to each sum of a group.
KERNEL void settle_sums_kernel(SumsParams p) {
  const int64_t i = int64_t{simt::block_idx()} * kSettleWarps + simt::warp_idx();
  if (i >= p.groups * p.quantities) return;
  const int64_t group = i / p.quantities, q = i % p.quantities;
  const int lane = simt::lane_idx();
  double* state = p.state + i * kState;
  double lower = state[lane], upper = state[simt::kWarpSize + lane];
  double span = state[kStrands], total = state[kStrands + 1];
  for (int64_t t = p.parts.from; t < p.parts.to; ++t) {
    const Part& part = p.plan.table.part[t];
    if (part.numel == 0 || p.group[p.plan.origin ? p.plan.origin[t] : t] != group) continue;
    if (part.offset % kBlock == 0) span = span + fold(lower, upper);
    if (part.offset % kSpan == 0) {
      total = total + span;
      span = 0;
    }
    const int64_t spans = p.spans_before[t + 1] - p.spans_before[t];
    for (int64_t n = 0; n < spans; ++n) {
      if (n > 0) {
        total = total + span;
        span = 0;
      }
      const SpanPiece piece(p.plan, t, part.offset / kSpan + n);
      if (piece.begins) {
        span = p.spans[(p.spans_before[t] + n) * p.quantities + q];
      } else {
        for (int64_t b = 0; b < piece.blocks; ++b)
          span = span + p.blocks[(piece.first + b) * p.quantities + q];
      }
    }
    const bool open = (part.offset + part.numel) % kBlock != 0;
    const double* tail = p.tails + (t * p.quantities + q) * kStrands;
    lower = open ? tail[lane] : 0.0;
    upper = open ? tail[simt::kWarpSize + lane] : 0.0;
  }
  state[lane] = lower;
  state[simt::kWarpSize + lane] = upper;
  if (lane == 0) {
    state[kStrands] = span;
    state[kStrands + 1] = total;
  }
}

void add_blocks(Sum sum, Launches& launches, int64_t grid, const SumsParams& p) {
  const int shared = sizeof(SumsShared);
  if (sum == Sum::kNorms) {
    launches.add(sum_blocks_kernel<Sum::kNorms, 0>, grid, kSumThreads, shared, p);
  } else if (sum == Sum::kDots) {
    launches.add(sum_blocks_kernel<Sum::kDots, 0>, grid, kSumThreads, shared, p);
  } else {
    by_models(p.plan.table.models, [&](auto most) {
      launches.add(sum_blocks_kernel<Sum::kGram, most.value>, grid, kSumThreads, shared, p);
    });
  }
}

int64_t enqueue(const Sums& call, void* memory, Launches* launches) {
  const Table& t = call.table;
  int64_t groups = 0;
  for (int64_t i = 0; i < t.parts; ++i) groups = most(groups, call.group[i] + 1);
  Batches work(t, call.mask, kBlock, true);
  const std::vector<int64_t> spans = chunks_before(work.table(), kSpan);
  Arena arena(memory);
  Upload upload(arena, launches);
  SumsParams p{};
  p.plan.grain = kBlock;
  work.add(upload, p.plan, p.mask);
  p.mask.density = upload.add(call.mask.rows ? nullptr : call.mask.density, t.parts * t.models);
  p.group = upload.add(call.group, t.parts);
  p.spans_before = upload.add(spans);
  work.take(arena, p.mask);
  p.quantities = sums_of(call.sum, t.models);
  p.groups = groups;
  p.state = call.state;
  p.top = call.top;
  p.blocks = arena.take<double>(work.chunks_before().back() * p.quantities);
  p.tails = arena.take<double>(work.table().parts * p.quantities * kStrands);
  p.spans = arena.take<double>(spans.back() * p.quantities);
  if (!launches || p.quantities == 0) return arena.bytes();
  upload.send();
  const MaskPlan mask = p.mask;
  work.start(mask, *launches);
  for (int64_t b = 0; b < work.size(); ++b) {
    p.mask = work.begin(b, p.plan, mask, *launches);
    p.chunks = work.chunks(b);
    p.parts = work.parts(b);
    add_blocks(call.sum, *launches, taking_turns(p.chunks.size()), p);
    const int64_t sums = (spans[p.parts.to] - spans[p.parts.from]) * p.quantities;
    launches->add(sum_spans_kernel, taking_turns(ceil_div(sums, kSettleThreads)), kSettleThreads, 0,
                  p);
    launches->add(settle_sums_kernel, ceil_div(groups * p.quantities, kSettleWarps), kSettleThreads,
                  0, p);
  }
  return arena.bytes();
}

}  // namespace

int64_t workspace(const Sums& call) { return enqueue(call, nullptr, nullptr); }

Status run(const Sums& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

}  // namespace gemma_ext::souping::cuda
