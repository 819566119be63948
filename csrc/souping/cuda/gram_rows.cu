// SPDX-License-Identifier: Apache-2.0
// A Gram matrix of every row: two warps to a row.
#include "sums.cuh"

namespace gemma_ext::souping::cuda {
namespace {

struct GramRowsParams {
  Plan plan;
  int64_t rows;
  const int64_t* rows_before;  // [T + 1]
  double* out;                 // [R, M, M]
};

// Behind it span and total of every pair, thread 0's.
struct GramRowsShared {
  View views[2 * kMaxModels + 2];
  double upper[simt::kWarpSize];
};

template <int kM>
KERNEL_BOUNDS(kSumThreads, kM == 8 ? 6 : 12)
void gram_rows_kernel(GramRowsParams p) {
  GramRowsShared* s = simt::shared<GramRowsShared>();
  double* spans = simt::shared<double>(sizeof(GramRowsShared));
  const Table& t = p.plan.table;
  double* totals = spans + sums_of(Sum::kGram, t.models);
  for (int64_t row = simt::block_idx(); row < p.rows; row += simt::grid_dim()) {
    const int64_t at = last_not_above(p.rows_before, t.parts, row);
    const int64_t width = t.part[at].width, in_part = row - p.rows_before[at];
    Chunk k = open_part(p.plan, at, -in_part * width, s->views, [](const Chunk&) {});
    double* out = p.out + (t.part[at].row + in_part) * k.models * k.models;
    // the sum of a pair over the block, in order
    const auto take = [&](int q, int i, int j, double strand) {
      double sum = fold_block(strand, s->upper);
      if (simt::thread_idx() != 0) return;
      if (k.begin == 0) spans[q] = totals[q] = 0;
      if (k.end % kBlock == 0) {
        spans[q] = spans[q] + sum;
        sum = 0;
      }
      if (k.end % kSpan == 0) {
        totals[q] = totals[q] + spans[q];
        spans[q] = 0;
      }
      if (k.end < width) return;
      out[i * k.models + j] = out[j * k.models + i] = one_nan(totals[q] + (spans[q] + sum));
    };
    for (k.begin = 0; k.begin < width; k.begin += kBlock) {
      k.end = least(k.begin + kBlock, width);
      const int64_t first = k.begin + simt::thread_idx();
      if constexpr (kM > 0) {
        GramStrand<kM> gram;
        UNROLL
        for (int q = 0; q < GramStrand<kM>::kSums; ++q) gram.sum[q] = 0;
        gram.add(k, first, k.end);
        each_pair<kM>(k.models,
                      [&](int q, int own, int i, int j) { take(q, i, j, gram.sum[own]); });
      } else {
        each_pair<0>(k.models, [&](int q, int, int i, int j) {
          take(q, i, j, pair_strand(k, i, j, first, k.end, 0));
        });
      }
    }
  }
}

int64_t enqueue(const GramRows& call, void* memory, Launches* launches) {
  const Table& t = call.table;
  std::vector<int64_t> rows(1, 0);
  for (int64_t p = 0; p < t.parts; ++p)
    rows.push_back(rows.back() + t.part[p].numel / t.part[p].width);
  Arena arena(memory);
  Upload upload(arena, launches);
  GramRowsParams p{};
  p.plan = upload.add(t, kBlock, {});
  p.rows_before = upload.add(rows);
  p.rows = rows.back();
  p.out = call.out;
  if (!launches) return arena.bytes();
  upload.send();
  const int shared =
      static_cast<int>(sizeof(GramRowsShared) + 2 * sizeof(double) * sums_of(Sum::kGram, t.models));
  by_models(t.models, [&](auto most) {
    launches->add(gram_rows_kernel<most.value>, taking_turns(p.rows), kSumThreads, shared, p);
  });
  return arena.bytes();
}

}  // namespace

int64_t workspace(const GramRows& call) { return enqueue(call, nullptr, nullptr); }

Status run(const GramRows& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

}  // namespace gemma_ext::souping::cuda
