// SPDX-License-Identifier: Apache-2.0
// Host backend: mbarriers, TMA tiles, clusters. Transfers are agents of the scheduler.
#pragma once

#include "host_warp.h"

namespace gemma_ext::simt {

struct TensorMap {
  uint8_t* base = nullptr;
  int rank = 0;
  int element_bytes = 0;
  int64_t sizes[3] = {1, 1, 1};
  int64_t strides[2] = {0, 0};  // bytes
  int box[3] = {1, 1, 1};
  Swizzle swizzle = Swizzle::kNone;
  void (*add)(void* to, const void* from) = nullptr;

  int box_bytes() const { return box[0] * box[1] * box[2] * element_bytes; }
};

namespace host {

inline MbarrierState& mbarrier(const Mbarrier* bar, const char* op, const Where& where) {
  const auto found = machine->mbarriers.find(bar);
  if (found == machine->mbarriers.end()) {
    throw std::runtime_error(text(op, " at ", place(where), ": no mbarrier_init at this address"));
  }
  return found->second;
}

inline void end_phase_if_complete(const Mbarrier* bar, MbarrierState& state) {
  if (state.pending != 0 || state.bytes != 0) return;
  state.pending = state.count;
  ++state.phase;
  machine->wake(bar);
}

inline void arrive(const Mbarrier* bar, int bytes, const char* op, const Where& where) {
  MbarrierState& state = mbarrier(bar, op, where);
  if (state.pending == 0) fail(op, where, "more than the ", state.count, " arrivals of a phase");
  state.bytes += bytes;
  --state.pending;
  end_phase_if_complete(bar, state);
  machine->preempt();
}

// The same place in the shared memory of another block of the cluster.
template <class T>
T* mapped(T* p, int rank, const char* op, const Where& where) {
  const size_t offset = shared_offset(p, sizeof(T), 1, op, where);
  if (rank < 0 || rank >= machine->cluster) {
    fail(op, where, "rank ", rank, " in a cluster of ", machine->cluster);
  }
  return reinterpret_cast<T*>(machine->blocks[rank].shared + offset);
}

struct Tile {
  TensorMap map;
  int64_t at[3];

  // visit(byte offset in shared memory, address in global memory or null where out of bounds)
  template <class Visit>
  void visit(size_t shared_start, Visit visit) const {
    size_t offset = shared_start;
    for (int z = 0; z < map.box[2]; ++z) {
      for (int y = 0; y < map.box[1]; ++y) {
        for (int x = 0; x < map.box[0]; ++x, offset += map.element_bytes) {
          const int64_t i[3] = {at[0] + x, at[1] + y, at[2] + z};
          const auto inside = [&](int d) { return i[d] >= 0 && i[d] < map.sizes[d]; };
          uint8_t* global =
              map.base + i[0] * map.element_bytes + i[1] * map.strides[0] + i[2] * map.strides[1];
          visit(map.swizzle == Swizzle::k128B ? swizzle128(static_cast<int>(offset)) : offset,
                inside(0) && inside(1) && inside(2) ? global : nullptr);
        }
      }
    }
  }
};

inline size_t tile_offset(const Tile& tile, const void* p, const char* op, const Where& where) {
  if (tile.map.base == nullptr) fail(op, where, "the tensor map is empty");
  // 1024: the period of the 128B swizzle
  const size_t alignment = tile.map.swizzle == Swizzle::k128B ? 1024 : 128;
  return shared_offset(p, tile.map.box_bytes(), alignment, op, where);
}

inline void load_tile(const char* op, void* to, const Tile& tile, Mbarrier* bar, unsigned ranks,
                      const Where& where) {
  const size_t offset = tile_offset(tile, to, op, where);
  mapped(bar, 0, op, where);
  if (ranks == 0 || ranks >> machine->cluster != 0)
    fail(op, where, "no such blocks in the cluster");
  for (int rank = 0; rank < machine->cluster; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    Block& block = machine->blocks[rank];
    Mbarrier* signal = mapped(bar, rank, op, where);
    const auto check_alive = [&block, op, where] {
      if (block.live_warps() == 0) {
        throw std::runtime_error(text(op, " at ", place(where), ": block ", block.index,
                                      " has left the kernel before its data came"));
      }
    };
    check_alive();
    poison(block.shared + offset, tile.map.box_bytes());
    machine->later([=, &block] {
      check_alive();
      tile.visit(offset, [&](size_t at, const uint8_t* global) {
        if (global != nullptr) {
          memcpy(block.shared + at, global, tile.map.element_bytes);
        } else {
          memset(block.shared + at, 0, tile.map.element_bytes);
        }
      });
      MbarrierState& state = mbarrier(signal, op, where);
      state.bytes -= tile.map.box_bytes();
      end_phase_if_complete(signal, state);
    });
  }
}

// Reads shared memory at one moment and writes the tensor at a later one.
inline void store_tile(const char* op, const Tile& tile, const void* from, bool add,
                       const Where& where) {
  const size_t offset = tile_offset(tile, from, op, where);
  Fiber& me = self();
  const size_t group = me.bulk_commits;
  if (me.bulk_groups.size() == group) me.bulk_groups.emplace_back();
  ++me.bulk_groups[group].reads;
  ++me.bulk_groups[group].writes;
  machine->later([=, &me] {
    auto elements = std::make_shared<std::vector<std::pair<uint8_t*, uint64_t>>>();
    tile.visit(offset, [&](size_t at, uint8_t* global) {
      uint64_t bits = 0;
      memcpy(&bits, me.block->shared + at, tile.map.element_bytes);
      if (global != nullptr) elements->push_back({global, bits});
    });
    --me.bulk_groups[group].reads;
    machine->wake(&me.bulk_groups);
    machine->later([=, &me] {
      for (const auto& [global, bits] : *elements) {
        if (add) {
          tile.map.add(global, &bits);
        } else {
          memcpy(global, &bits, tile.map.element_bytes);
        }
      }
      --me.bulk_groups[group].writes;
      machine->wake(&me.bulk_groups);
    });
  });
}

inline void wait_bulk(const char* op, size_t pending, int BulkGroup::* what, const Where& where) {
  Fiber& me = self();
  for (size_t i = 0; i + pending < me.bulk_commits; ++i) {
    while (me.bulk_groups[i].*what > 0) machine->wait(&me.bulk_groups, op, where);
  }
}

template <class T>
void add_to(void* to, const void* from) {
  T a, b;
  memcpy(&a, to, sizeof(T));
  memcpy(&b, from, sizeof(T));
  if constexpr (std::is_same_v<T, float>) {
    a += b;
  } else {
    a = from_float<T>(to_float(a) + to_float(b));
  }
  memcpy(to, &a, sizeof(T));
}

}  // namespace host

// Strides in bytes, of every dimension but the first, which is contiguous.
template <class T, int kRank>
Status make_tensor_map(TensorMap* map, const T* base, const int64_t (&sizes)[kRank],
                       const int64_t (&strides)[kRank - 1], const int (&box)[kRank],
                       Swizzle swizzle) {
  static_assert(kRank == 2 || kRank == 3);
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(host::text("make_tensor_map: ", what));
  };
  *map = {};
  map->base = reinterpret_cast<uint8_t*>(const_cast<T*>(base));
  map->rank = kRank;
  map->element_bytes = sizeof(T);
  map->swizzle = swizzle;
  map->add = host::add_to<T>;
  require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the base is not a multiple of 16");
  for (int d = 0; d < kRank; ++d) {
    require(sizes[d] >= 1, "empty tensor");
    require(box[d] >= 1 && box[d] <= 256, "a box has 1 to 256 elements in each dimension");
    map->sizes[d] = sizes[d];
    map->box[d] = box[d];
    if (d == 0) continue;
    require(strides[d - 1] % 16 == 0, "a stride is not a multiple of 16");
    map->strides[d - 1] = strides[d - 1];
  }
  const int row = box[0] * map->element_bytes;
  require(row % 16 == 0, "a box row is not a multiple of 16 bytes");
  require(swizzle == Swizzle::kNone || row <= 128, "a box row is longer than the 128B swizzle");
  return 0;
}

inline void mbarrier_init(Mbarrier* bar, int count, Where where = Where::current()) {
  host::shared_offset(bar, 8, 8, "mbarrier_init", where);
  if (count < 1) host::fail("mbarrier_init", where, "the count is not positive");
  host::machine->mbarriers[bar] = {count, count, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(Mbarrier* bar, Where where = Where::current()) {
  host::mapped(bar, 0, "mbarrier_arrive", where);
  host::arrive(bar, 0, "mbarrier_arrive", where);
}
inline void mbarrier_arrive_expect_tx(Mbarrier* bar, int bytes, Where where = Where::current()) {
  host::mapped(bar, 0, "mbarrier_arrive_expect_tx", where);
  host::arrive(bar, bytes, "mbarrier_arrive_expect_tx", where);
}
inline void mbarrier_arrive_remote(Mbarrier* bar, int rank, Where where = Where::current()) {
  Mbarrier* remote = host::mapped(bar, rank, "mbarrier_arrive_remote", where);
  const host::Block& block = host::machine->blocks[rank];
  if (block.live_warps() == 0) {
    host::fail("mbarrier_arrive_remote", where, "block ", block.index, " has left the kernel");
  }
  host::arrive(remote, 0, "mbarrier_arrive_remote", where);
}

// Returns when the phase of this parity is over; a fresh barrier is in phase 0, so that a wait for
// parity 1 returns at once.
inline void mbarrier_wait(Mbarrier* bar, int parity, Where where = Where::current()) {
  host::mapped(bar, 0, "mbarrier_wait", where);
  host::MbarrierState& state = host::mbarrier(bar, "mbarrier_wait", where);
  host::machine->preempt();
  while ((state.phase & 1) == static_cast<unsigned>(parity)) {
    host::machine->wait(bar, "mbarrier_wait", where);
  }
}

inline void tma_load(void* to, const TensorMap& map, Mbarrier* bar, int x, int y,
                     Where where = Where::current()) {
  host::load_tile("tma_load", to, {map, {x, y, 0}}, bar, 1u << host::self().block->rank, where);
}
inline void tma_load(void* to, const TensorMap& map, Mbarrier* bar, int x, int y, int z,
                     Where where = Where::current()) {
  host::load_tile("tma_load", to, {map, {x, y, z}}, bar, 1u << host::self().block->rank, where);
}
inline void tma_load_multicast(void* to, const TensorMap& map, Mbarrier* bar, uint16_t ranks, int x,
                               int y, Where where = Where::current()) {
  host::load_tile("tma_load_multicast", to, {map, {x, y, 0}}, bar, ranks, where);
}
inline void tma_load_multicast(void* to, const TensorMap& map, Mbarrier* bar, uint16_t ranks, int x,
                               int y, int z, Where where = Where::current()) {
  host::load_tile("tma_load_multicast", to, {map, {x, y, z}}, bar, ranks, where);
}
inline void tma_store(const TensorMap& map, const void* from, int x, int y,
                      Where where = Where::current()) {
  host::store_tile("tma_store", {map, {x, y, 0}}, from, false, where);
}
inline void tma_store(const TensorMap& map, const void* from, int x, int y, int z,
                      Where where = Where::current()) {
  host::store_tile("tma_store", {map, {x, y, z}}, from, false, where);
}
inline void tma_reduce_add(const TensorMap& map, const void* from, int x, int y,
                           Where where = Where::current()) {
  host::store_tile("tma_reduce_add", {map, {x, y, 0}}, from, true, where);
}
inline void tma_reduce_add(const TensorMap& map, const void* from, int x, int y, int z,
                           Where where = Where::current()) {
  host::store_tile("tma_reduce_add", {map, {x, y, z}}, from, true, where);
}

inline void bulk_commit() {
  host::Fiber& me = host::self();
  me.bulk_groups.resize(++me.bulk_commits);  // a group may be empty
}
// Returns when at most kPending of the caller's committed groups have not written yet, or, for
// bulk_wait_read, have not read shared memory yet.
template <int kPending>
void bulk_wait(Where where = Where::current()) {
  host::wait_bulk("bulk_wait", kPending, &host::BulkGroup::writes, where);
}
template <int kPending>
void bulk_wait_read(Where where = Where::current()) {
  host::wait_bulk("bulk_wait_read", kPending, &host::BulkGroup::reads, where);
}

// Does nothing: ordinary stores are seen by the asynchronous proxy at once, so a missing fence
// stays hidden.
inline void fence_proxy_async() {}

inline int cluster_rank() { return host::self().block->rank; }
inline int cluster_size() { return host::self(), host::machine->cluster; }
inline void cluster_sync(Where where = Where::current()) {
  host::warp_barrier("cluster_sync", host::machine->cluster_barrier, 0, true, where);
}
template <class T>
T* map_shared(T* p, int rank, Where where = Where::current()) {
  return host::mapped(p, rank, "map_shared", where);
}

}  // namespace gemma_ext::simt
