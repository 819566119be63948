// SPDX-License-Identifier: Apache-2.0
// The `total` best positive scores of all rows together, in stages as topk.cuh has them, with one floor for all rows
// and one list. Where that runs over, the digits of the sieve are counted from products made again.
#include <optional>

#include "batch.cuh"

namespace gemma_ext::sae::cuda {
namespace {

KERNEL_BOUNDS(kThreads, 4)
void open_batch_kernel(BatchParams p) {
  const int64_t i = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  if (i < p.encode.encoder.N) p.first_nan[i] = static_cast<int>(p.encode.encoder.F);
  if (i < kDigitValues) p.sieve.bins[i] = 0;
  if (i > 0) return;
  *p.floor = kZeroOrder;
  *p.least = kNanOrder;
  *p.fresh_count = *p.lost = p.kept_count[0] = p.kept_count[1] = 0;
}

// What the NaNs of rows are, behind the last stage.
KERNEL_BOUNDS(kThreads, 4)
void add_nans_kernel(BatchParams p) {
  const int64_t n = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  const Encoder& e = p.encode.encoder;
  if (n >= e.N || *p.lost || p.first_nan[n] >= e.F) return;
  p.fresh[simt::atomic_add(p.fresh_count, 1)] = {__builtin_nanf(""), p.first_nan[n],
                                                 static_cast<int>(n)};
}

// One block, before the sieve of a stage, of which it looks at the list; again, with `pass` 1, before that of lost
// products.
KERNEL_BOUNDS(kThreads, 4)
void open_sieve_kernel(BatchParams p) {
  if (simt::thread_idx() > 0) return;
  const bool redo = p.pass == 1;
  if (!redo && *p.fresh_count > p.room) *p.lost = 1;
  if (redo != (*p.lost != 0)) return;
  *p.sieve.state = {0, 0, p.sieve.total, 0, 0};
  p.kept_count[p.stage % 2] = 0;
  *p.least = kNanOrder;
}

// f(entry, place) for the candidates of a stage, dealt to all blocks.
template <class F>
DEVICE void each_candidate(const BatchParams& p, F f) {
  const Encoder& e = p.encode.encoder;
  const int64_t first = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  const int64_t stride = int64_t{simt::grid_dim()} * kThreads;
  const auto give = [&](const Entry& entry) {
    const float score = e.scale ? entry.p * e.scale[entry.feature] : entry.p;
    f(entry, Place(order_of(score), e, entry.row, entry.feature));
  };
  if (p.stage == 0) {
    for (int64_t i = first; i < e.N * p.first_columns; i += stride) {
      const Entry entry{p.first[i], static_cast<int>(i % p.first_columns),
                        static_cast<int>(i / p.first_columns)};
      const float score = e.scale ? entry.p * e.scale[entry.feature] : entry.p;
      if (score > 0) give(entry);
    }
  } else {
    const Entry* kept = p.kept[(p.stage - 1) % 2];
    for (int64_t i = first; i < p.kept_count[(p.stage - 1) % 2]; i += stride) give(kept[i]);
  }
  for (int64_t i = first; i < *p.fresh_count; i += stride) give(p.fresh[i]);
}

KERNEL_BOUNDS(kThreads, 4)
void sieve_kernel(BatchParams p) {
  if (*p.lost) return;
  sieve_pass(p.sieve, p.pass, simt::shared<SieveShared>(),
             [&](auto f) { each_candidate(p, [&](const Entry&, const Place& at) { f(at); }); });
}

DEVICE void keep(const BatchParams& p, const Entry& entry, const Place& at) {
  const int to = simt::atomic_add(&p.kept_count[p.stage % 2], 1);
  p.kept[p.stage % 2][to] = entry;
  if (at.order != kNanOrder) simt::atomic_min(p.least, at.order);
}

KERNEL_BOUNDS(kThreads, 4)
void keep_kernel(BatchParams p) {
  if (*p.lost) return;
  const SieveState state = *p.sieve.state;
  each_candidate(p, [&](const Entry& entry, const Place& at) {
    if (p.sieve.takes(state, at)) keep(p, entry, at);
  });
}

// One block, behind that: what equals the least may still come, of a lower row.
KERNEL_BOUNDS(kThreads, 4)
void raise_floor_kernel(BatchParams p) {
  if (simt::thread_idx() > 0) return;
  if (*p.lost) {
    *p.floor = kNanOrder;
    return;
  }
  *p.fresh_count = 0;
  if (p.kept_count[p.stage % 2] == p.sieve.total) *p.floor = *p.least - 1;
}

// f(entry, place) for the products of 128 x 128 tiles that are positive, or a row's first NaN.
template <class T, class F>
DEVICE void each_product(const BatchParams& p, F f) {
  const Encoder& e = p.encode.encoder;
  const int row_blocks = static_cast<int>(ceil_div(e.N, kBlockRows));
  const int tiles = static_cast<int>(ceil_div(e.F, mma::kSide));
  for (int64_t item = simt::block_idx(); item < int64_t{row_blocks} * tiles;
       item += simt::grid_dim()) {
    const Raster at = raster<kRasterRows>(static_cast<int>(item), row_blocks, tiles);
    const int64_t first_row = int64_t{at.row_block} * kBlockRows;
    const int first_column = at.tile * mma::kSide;
    mma::Tile<T> tile;
    multiply_tile(
        tile, e, [&](int line) { return first_row + line < e.N ? first_row + line : int64_t{-1}; },
        first_column, simt::shared<T>());
    tile.each([&](int row, int column, float& x) {
      const int64_t n = first_row + row;
      const int feature = first_column + column;
      if (n >= e.N || feature >= e.F) return;
      const float own = e.bias ? x + e.bias[feature] : x;
      const uint32_t order = order_of(e.scale ? own * e.scale[feature] : own);
      if (order <= kZeroOrder || (order == kNanOrder && feature != p.first_nan[n])) return;
      f(Entry{own, feature, static_cast<int>(n)}, Place(order, e, n, feature));
    });
  }
}

template <class T>
constexpr int kRedoShared = mma::Tile<T>::kSharedBytes + static_cast<int>(sizeof(SieveShared));

template <class T>
KERNEL_BOUNDS(mma::kThreads, sizeof(T) == 2 ? 2 : 1)
void redo_sieve_kernel(BatchParams p) {
  if (!*p.lost) return;
  sieve_pass(p.sieve, p.pass, simt::shared<SieveShared>(mma::Tile<T>::kSharedBytes),
             [&](auto f) { each_product<T>(p, [&](const Entry&, const Place& at) { f(at); }); });
}

template <class T>
KERNEL_BOUNDS(mma::kThreads, sizeof(T) == 2 ? 2 : 1)
void redo_keep_kernel(BatchParams p) {
  if (!*p.lost) return;
  const SieveState state = *p.sieve.state;
  each_product<T>(p, [&](const Entry& entry, const Place& at) {
    if (p.sieve.takes(state, at)) keep(p, entry, at);
  });
}

KERNEL_BOUNDS(kThreads, 4)
void write_least_kernel(BatchParams p) {
  if (simt::thread_idx() == 0)
    *p.min_positive = *p.least == kNanOrder ? __builtin_huge_valf() : score_of(*p.least);
}

struct BatchMemory {
  BatchParams p{};
  TopKMemory aux;
  std::optional<OrderMemory> order;

  BatchMemory(Arena& memory, const BatchTopK& call)
      : aux(aux_memory(memory, call.encoder, call.aux)) {
    const Encoder& e = call.encoder;
    const int64_t each = e.N ? ceil_div(call.total, e.N) : 0;
    p.encode.encoder = e;
    p.first_columns = static_cast<int>(first_columns(e, each));
    // half as much again as exchangeable features bring on average
    p.room = static_cast<int>(least(5 * call.total + (int64_t{1} << 14), INT32_MAX / 2));
    if (p.first_columns == e.F) p.room = 0;
    p.first = memory.take<float>(e.N * p.first_columns);
    for (Entry*& kept : p.kept) kept = memory.take<Entry>(call.total);
    p.fresh = memory.take<Entry>(p.room + e.N);
    p.kept_count = memory.take<int>(2);
    p.fresh_count = memory.take<int>(1);
    p.floor = memory.take<uint32_t>(1);
    p.least = memory.take<uint32_t>(1);
    p.lost = memory.take<int>(1);
    p.first_nan = memory.take<int>(e.N);
    p.min_positive = call.min_positive;
    p.sieve = {memory.take<SieveState>(1), memory.take<int>(kDigitValues), call.total,
               bits_of(e.N * e.F)};
    order.emplace(memory, call.total, e.F, e.N);
  }
};

}  // namespace

int64_t workspace(const BatchTopK& call) {
  Arena arena(nullptr);
  BatchMemory(arena, call);
  return arena.bytes();
}

Status run(const BatchTopK& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  const BatchMemory m(arena, call);
  BatchParams p = m.p;
  const Encoder& e = call.encoder;
  add_topk(launches, m.aux);
  launches.add(open_batch_kernel, ceil_div(most(e.N, kDigitValues), kThreads), kThreads, 0, p);
  const auto add_one = [&](void (*kernel)(BatchParams)) {
    launches.add(kernel, 1, kThreads, 0, p);
  };
  const int64_t dense = e.N * p.first_columns, listed = call.total + p.room;
  const auto select = [&](bool last) {
    const int64_t blocks =
        taking_turns(ceil_div(p.stage == 0 ? dense : listed, 4 * int64_t{kThreads}));
    p.pass = 0;
    add_one(open_sieve_kernel);
    if (last) launches.add(add_nans_kernel, ceil_div(e.N, kThreads), kThreads, 0, p);
    for (; p.pass < p.sieve.passes(); ++p.pass)
      launches.add(sieve_kernel, blocks, kThreads, sizeof(SieveShared), p);
    launches.add(keep_kernel, blocks, kThreads, 0, p);
    if (!last) add_one(raise_floor_kernel);
  };
  if (call.total > 0) {
    add_encode<BatchFirstVisitor, 0>(launches, p, e, 0, p.first_columns);
    select(p.first_columns == e.F);
    each_stage_behind(p.first_columns, e.F, growth_of(ceil_div(call.total, e.N)),
                      [&](int64_t from, int64_t to) {
                        add_encode<BatchVisitor, kQueueBytes>(launches, p, e, from, to);
                        ++p.stage;
                        select(to == e.F);
                      });
    p.pass = 1;
    add_one(open_sieve_kernel);
    by_dtype(e.dtype, [&](auto type) {
      using T = decltype(type);
      const int64_t blocks =
          taking_turns(ceil_div(e.N, kBlockRows) * ceil_div(e.F, int64_t{mma::kSide}));
      for (p.pass = 0; p.pass < p.sieve.passes(); ++p.pass)
        launches.add(redo_sieve_kernel<T>, blocks, mma::kThreads, kRedoShared<T>, p);
      launches.add(redo_keep_kernel<T>, blocks, mma::kThreads, kRedoShared<T>, p);
    });
  }
  add_one(write_least_kernel);
  add_order(launches, *m.order,
            {p.kept[p.stage % 2], p.kept_count + p.stage % 2, call.total, e.N, call.values,
             call.indices, call.offsets});
  return launches.status();
}

}  // namespace gemma_ext::sae::cuda
