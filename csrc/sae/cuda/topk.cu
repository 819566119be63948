// SPDX-License-Identifier: Apache-2.0
#include "topk.cuh"

#include <cmath>

namespace gemma_ext::sae::cuda {
namespace {

KERNEL_BOUNDS(kThreads, 4)
void open_rows_kernel(TopKParams p) {
  const int64_t n = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  if (n == 0) *p.lost_count = 0;
  if (n >= p.encode.encoder.N) return;
  p.lost[n] = 0;
  for (int c = 0; c < p.contests; ++c) p.contest[c].pool.count[n] = p.contest[c].kept_count[n] = 0;
}

struct SelectRowsShared {
  SelectShared select;
  int lost;
};
constexpr int kRoomOffset = (sizeof(SelectRowsShared) + 15) / 16 * 16;

DEVICE SortRoom sort_room(const TopKParams& p, int shared_offset) {
  uint8_t* memory = p.rooms ? p.rooms + simt::block_idx() * SortRoom::bytes(p.sort_size)
                            : simt::shared<uint8_t>(shared_offset);
  return SortRoom::at(memory, p.sort_size);
}

DEVICE Source source_of(const TopKParams& p, const Contest& c, int64_t n, int stage) {
  Source from{};
  if (stage == 0) {
    from.dense = p.first + n * p.first_columns;
    from.dense_count = p.first_columns;
  } else {
    from.kept = c.kept[(stage - 1) % 2] + n * c.k;
    from.fresh = c.pool.fresh + n * c.pool.room;
    from.kept_count = c.kept_count[n];
    from.fresh_count = c.pool.count[n];
  }
  return from;
}

// A block per row: of what a stage brought the k best; after the last the result.
KERNEL_BOUNDS(kThreads, 4)
void select_rows_kernel(TopKParams p) {
  SelectRowsShared* s = simt::shared<SelectRowsShared>();
  for (int64_t n = simt::block_idx(); n < p.encode.encoder.N; n += simt::grid_dim()) {
    simt::sync_block();
    if (simt::thread_idx() == 0) {
      bool lost = p.lost[n] != 0;
      for (int c = 0; !lost && c < p.contests; ++c)
        lost = p.stage > 0 && p.contest[c].pool.count[n] > p.contest[c].pool.room;
      if (lost && !p.lost[n]) {
        p.lost[n] = 1;
        p.lost_rows[simt::atomic_add(p.lost_count, 1)] = static_cast<int>(n);
      }
      for (int c = 0; lost && c < p.contests; ++c) p.contest[c].pool.floor[n] = 0xffffffffu;
      s->lost = lost;
    }
    simt::sync_block();
    if (s->lost) continue;
    for (int i = 0; i < p.contests; ++i) {
      const Contest& c = p.contest[i];
      const Source from = source_of(p, c, n, p.stage);
      if (p.last) {
        write_best(from, c.order, c.k, sort_room(p, kRoomOffset), c.values + n * c.k,
                   c.indices + n * c.k, &s->select);
        continue;
      }
      const int kept = keep_best(from, c.order, c.k, c.kept[p.stage % 2] + n * c.k,
                                 &c.pool.floor[n], &s->select);
      if (simt::thread_idx() == 0) {
        c.kept_count[n] = kept;
        c.pool.count[n] = 0;
      }
    }
  }
}

// Behind the stages of the product, which the queues share.
struct RedoShared {
  SelectShared select;
  int token[kBlockRows];
};
template <class T>
constexpr int kRedoOffset = mma::Tile<T>::kSharedBytes;
template <class T>
constexpr int kRedoRoom = kRedoOffset<T> + (sizeof(RedoShared) + 15) / 16 * 16;

// 128 lost rows at a time by a block: all features in their order, a tile of 128 after the other, each row's list cut
// down before it could run over.
template <class T, class Visitor>
KERNEL_BOUNDS(mma::kThreads, sizeof(T) == 2 ? 2 : 1)
void redo_rows_kernel(TopKParams p) {
  const Encoder& e = p.encode.encoder;
  RedoShared* s = simt::shared<RedoShared>(kRedoOffset<T>);
  const int count = *p.lost_count, t = simt::thread_idx();
  for (int first = simt::block_idx() * kBlockRows; first < count;
       first += simt::grid_dim() * kBlockRows) {
    const int rows = lesser(count - first, kBlockRows);
    simt::sync_block();
    if (t < kBlockRows) {
      const int n = t < rows ? p.lost_rows[first + t] : -1;
      s->token[t] = n;
      for (int i = 0; n >= 0 && i < p.contests; ++i) {
        const Contest& c = p.contest[i];
        c.pool.floor[n] = 0;
        c.pool.count[n] = c.kept_count[n] = 0;
      }
    }
    simt::sync_block();
    int turn[kMostContests] = {};  // which of the kept lists holds
    for (int64_t column = 0; column < e.F; column += mma::kSide) {
      mma::Tile<T> tile;
      multiply_tile(
          tile, e, [&](int line) { return int64_t{s->token[line]}; }, static_cast<int>(column),
          simt::shared<T>());
      Visitor visitor(p, 0, static_cast<int>(column), simt::shared<uint8_t>(), simt::warp_idx(),
                      s->token);
      visit_tile(tile, static_cast<int>(column), visitor);
      simt::sync_block();
      const bool last = column + mma::kSide >= e.F;
      for (int i = 0; i < p.contests; ++i) {
        const Contest& c = p.contest[i];
        bool full = last;  // the same for all threads
        for (int r = 0; r < rows; ++r) full |= c.pool.count[s->token[r]] > c.pool.room - mma::kSide;
        simt::sync_block();  // all have read the counts
        if (!full) continue;
        for (int r = 0; r < rows; ++r) {
          const int64_t n = s->token[r];
          Source from{};
          from.kept = c.kept[turn[i]] + n * c.k;
          from.fresh = c.pool.fresh + n * c.pool.room;
          from.kept_count = c.kept_count[n];
          from.fresh_count = c.pool.count[n];
          if (last) {
            write_best(from, c.order, c.k, sort_room(p, kRedoRoom<T>), c.values + n * c.k,
                       c.indices + n * c.k, &s->select);
            continue;
          }
          const int kept = keep_best(from, c.order, c.k, c.kept[1 - turn[i]] + n * c.k,
                                     &c.pool.floor[n], &s->select);
          if (t == 0) {
            c.kept_count[n] = kept;
            c.pool.count[n] = 0;
          }
        }
        turn[i] = 1 - turn[i];
        simt::sync_block();
      }
    }
  }
}

// Room for what a stage brings: of exchangeable features growth k pass on average, with a variance of
// growth (growth + 1) k; eight deviations, and two tiles' for the redo.
int room_of(int64_t k) {
  const double growth = static_cast<double>(growth_of(k)) + 0.5;  // the last stage's at most
  const double spread = std::sqrt(growth * (growth + 1) * static_cast<double>(k));
  return static_cast<int>(growth * static_cast<double>(k) + 8 * spread) + 2 * mma::kSide;
}

constexpr int kRooms = 64;  // blocks that sort elsewhere

// f(visitor) with the one for the lists of `p`, in a pointer that leads nowhere.
template <class F>
void by_lists(const TopKParams& p, F f) {
  const bool main = !p.contest[0].order.mask, aux = p.contest[p.contests - 1].order.mask != nullptr;
  if (main && aux) {
    f(static_cast<FilterVisitor<true, true>*>(nullptr));
  } else if (main) {
    f(static_cast<FilterVisitor<true, false>*>(nullptr));
  } else {
    f(static_cast<FilterVisitor<false, true>*>(nullptr));
  }
}

int64_t longest(const TopKParams& p) { return most(p.contest[0].k, p.contest[p.contests - 1].k); }

}  // namespace

TopKMemory::TopKMemory(Arena& memory, const Encoder& e, const Wanted* wanted, int count) {
  if (count == 0 || e.N == 0) return;
  p.encode.encoder = e;
  p.contests = count;
  for (int i = 0; i < count; ++i) {
    const Wanted& w = wanted[i];
    Contest& c = p.contest[i];
    c.k = static_cast<int>(w.k);
    c.order = {e.scale, w.mask, w.by_magnitude};
    c.values = w.values;
    c.indices = w.indices;
  }
  p.first_columns = static_cast<int>(first_columns(e, longest(p)));
  p.first = memory.take<float>(e.N * p.first_columns);
  const bool all = p.first_columns == e.F;
  for (int i = 0; i < count; ++i) {
    Contest& c = p.contest[i];
    c.pool.room = room_of(longest(p));
    c.pool.floor = memory.take<uint32_t>(e.N);
    c.pool.count = memory.take<int>(e.N);
    c.pool.fresh = memory.take<Candidate>(all ? 0 : e.N * c.pool.room);
    for (Candidate*& kept : c.kept) kept = memory.take<Candidate>(all ? 0 : e.N * c.k);
    c.kept_count = memory.take<int>(e.N);
  }
  p.lost = memory.take<int>(e.N);
  p.lost_rows = memory.take<int>(e.N);
  p.lost_count = memory.take<int>(1);
  p.sort_size = SortRoom::size_for(longest(p));
  if (p.sort_size > kMostSorted)
    p.rooms = memory.take<uint8_t>(kRooms * SortRoom::bytes(p.sort_size));
}

int TopKMemory::room_bytes() const {
  return p.rooms ? 0 : static_cast<int>(SortRoom::bytes(p.sort_size));
}

void add_topk(Launches& launches, const TopKMemory& m) {
  TopKParams p = m.p;
  const Encoder& e = p.encode.encoder;
  if (p.contests == 0) return;
  launches.add(open_rows_kernel, ceil_div(e.N, kThreads), kThreads, 0, p);
  add_encode<FirstVisitor, 0>(launches, p, e, 0, p.first_columns);
  const auto select = [&](int stage, bool last) {
    p.stage = stage;
    p.last = last;
    const int64_t blocks = taking_turns(e.N);
    launches.add(select_rows_kernel, last && p.rooms ? least(blocks, kRooms) : blocks, kThreads,
                 kRoomOffset + (last ? m.room_bytes() : 0), p);
  };
  select(0, p.first_columns == e.F);
  if (p.first_columns == e.F) return;
  by_lists(p, [&](auto* nowhere) {
    using Visitor = std::remove_pointer_t<decltype(nowhere)>;
    int stage = 0;
    each_stage_behind(p.first_columns, e.F, growth_of(longest(p)), [&](int64_t from, int64_t to) {
      add_encode<Visitor, kQueueBytes>(launches, p, e, from, to);
      select(++stage, to == e.F);
    });
    by_dtype(e.dtype, [&](auto type) {
      using T = decltype(type);
      const int64_t units = ceil_div(e.N, kBlockRows);
      const int64_t blocks =
          least(least(units, simt::device().multiprocessors), p.rooms ? kRooms : units);
      launches.add(redo_rows_kernel<T, Visitor>, blocks, mma::kThreads,
                   kRedoRoom<T> + m.room_bytes(), p);
    });
  });
}

namespace {

TopKMemory memory_of(Arena& memory, const TopK& call) {
  const Wanted lists[] = {{call.k, nullptr, call.by_magnitude, call.values, call.indices},
                          wanted_aux(call.aux)};
  return TopKMemory(memory, call.encoder, lists, call.aux.mask ? 2 : 1);
}

}  // namespace

int64_t workspace(const TopK& call) {
  Arena arena(nullptr);
  memory_of(arena, call);
  return arena.bytes();
}

Status run(const TopK& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  add_topk(launches, memory_of(arena, call));
  return launches.status();
}

}  // namespace gemma_ext::sae::cuda
