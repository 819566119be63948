// SPDX-License-Identifier: Apache-2.0
// Host backend: launch, indices, barriers, warp operations, atomics, scalar functions.
#pragma once

#include <math.h>

#include <type_traits>

#include "../dtype.h"
#include "host_fiber.h"

namespace gemma_ext::simt {

using Stream = void*;
using Status = int;

namespace host {

// Lanes named by `mask` meet in the same operation at the same place; the last to come runs
// `collective` for all of them, with each lane's `io` in warp.posted.
template <class Collective>
void meet(const char* op, unsigned mask, bool live_only, const Where& where, void* io,
          Collective collective) {
  Fiber& me = self();
  Warp& warp = *me.warp;
  const int lane = me.lane();
  if (!(mask >> lane & 1)) fail(op, where, text("lane ", lane, " is not in its own mask"));
  for (int l = 0; l < 32; ++l) {
    const Posted& p = warp.posted[l];
    if (mask >> l & 1 && warp.lanes[l]->exited && !live_only) {
      fail(op, where, text("the mask names lane ", l, ", which has left the kernel"));
    }
    const bool waits_for_me = p.here && (p.mask >> lane & 1), for_it = p.here && (mask >> l & 1);
    const bool same_place = strcmp(p.op, op) == 0 && p.where.line() == where.line() &&
                            p.where.column() == where.column() &&
                            strcmp(p.where.file_name(), where.file_name()) == 0;
    if (waits_for_me && for_it && !same_place) {
      fail(op, where, text("divergent warp: lane ", l, " is in ", p.op, " at ", place(p.where)));
    }
    if ((waits_for_me || for_it) && same_place && p.mask != mask) {
      fail(op, where,
           text("divergent warp: lane ", l, " names another mask, ", std::hex, p.mask,
                " instead of ", mask));
    }
  }
  Posted& mine = warp.posted[lane];
  mine = {true, op, mask, live_only, where, io};
  while (mine.here) {
    bool complete = true;
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) complete &= warp.posted[l].here || warp.lanes[l]->exited;
    }
    if (!complete) {
      machine->wait(&warp, op, where);
      continue;
    }
    collective(warp);
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1) || !warp.posted[l].here) continue;
      warp.posted[l].here = false;
      if (warp.lanes[l]->channel == &warp) machine->wake(*warp.lanes[l]);
    }
  }
}

template <class Io>
Io& io_of(Warp& warp, int lane) {
  return *static_cast<Io*>(warp.posted[lane].io);
}

// All lanes of the warp give a value and see all values; for operations that the PTX ISA marks
// .aligned, and for shuffles and votes with a mask.
template <class Value>
struct Exchange {
  Value mine;
  Value all[32];
};

template <class Value>
void exchange(const char* op, unsigned mask, const Where& where, Exchange<Value>& x) {
  meet(op, mask, false, where, &x, [mask](Warp& warp) {
    for (int to = 0; to < 32; ++to) {
      if (!(mask >> to & 1)) continue;
      for (int from = 0; from < 32; ++from) {
        if (mask >> from & 1) {
          io_of<Exchange<Value>>(warp, to).all[from] = io_of<Exchange<Value>>(warp, from).mine;
        }
      }
    }
  });
}

// Counts whole warps, as the .aligned barriers do: the lanes of a warp must come together.
// `warps` is how many are expected; 0 stands for all that are alive.
inline void warp_barrier(const char* op, Barrier& barrier, int warps, bool waits,
                         const Where& where) {
  uint64_t phase = 0;
  meet(op, kFullMask, true, where, &phase, [&](Warp& warp) {
    for (int l = 0; l < 32; ++l) {
      if (warp.posted[l].here) io_of<uint64_t>(warp, l) = barrier.phase;
    }
    machine->arrive(barrier, warps, op, where);
  });
  while (waits && barrier.phase == phase) machine->wait(&barrier, op, where);
}

inline void named_barrier(const char* op, int id, int threads, bool waits, const Where& where) {
  if (id < 0 || id >= kBarriers) fail(op, where, text("barrier ", id, " is not in 0..15"));
  if (threads <= 0 || threads % 32 != 0) {
    fail(op, where, text("thread count ", threads, " is not a multiple of 32"));
  }
  warp_barrier(op, self().block->barriers[id], threads / 32, waits, where);
}

// Offset of [p, p + bytes) in the calling block's shared memory.
inline size_t shared_offset(const void* p, size_t bytes, size_t alignment, const char* op,
                            const Where& where) {
  const Block& block = *self().block;
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(block.shared);
  if (offset > block.shared_bytes || bytes > block.shared_bytes - offset) {
    fail(
        op, where,
        text("the address is outside the block's ", block.shared_bytes, " bytes of shared memory"));
  }
  if (offset % alignment != 0) {
    fail(op, where, text("shared address ", offset, " is not a multiple of ", alignment));
  }
  return offset;
}

}  // namespace host

template <class Params>
Status launch_cluster(void (*kernel)(Params), int grid, int block, int cluster, int shared_bytes,
                      Stream, const std::type_identity_t<Params>& params) {
  using host::text;
  if (block <= 0 || block > 1024 || block % 32 != 0) {
    throw std::runtime_error(text("launch: block of ", block, " threads is not 1..32 whole warps"));
  }
  if (cluster < 1 || cluster > 8 || grid <= 0 || grid % cluster != 0) {
    throw std::runtime_error(text("launch: grid of ", grid, " is not whole clusters of ", cluster));
  }
  if (shared_bytes < 0 || shared_bytes > 227 * 1024) {  // limit per block of sm_90
    throw std::runtime_error(text("launch: ", shared_bytes, " bytes of shared memory"));
  }
  host::Machine machine(host::options.seed, grid, block, cluster);
  std::vector<int> order(grid / cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[machine.random.below(static_cast<int>(i))]);
  }
  const std::function<void()> body = [&] { kernel(params); };
  struct Current {
    explicit Current(host::Machine* m) { host::machine = m; }
    ~Current() { host::machine = nullptr; }
  } current(&machine);
  for (int i : order) machine.run_cluster(i * cluster, shared_bytes, body);
  return 0;
}

inline const char* status_text(Status) { return "no error"; }

template <class Params>
Status launch(void (*kernel)(Params), int grid, int block, int shared_bytes, Stream stream,
              const std::type_identity_t<Params>& params) {
  return launch_cluster(kernel, grid, block, 1, shared_bytes, stream, params);
}

inline int thread_idx() { return host::self().thread; }
inline int block_idx() { return host::self().block->index; }
inline int block_dim() { return host::self(), host::machine->block_threads; }
inline int grid_dim() { return host::self(), host::machine->grid; }
inline int lane_idx() { return thread_idx() % kWarpSize; }
inline int warp_idx() { return thread_idx() / kWarpSize; }

template <class T>
T* shared(int byte_offset = 0) {
  return reinterpret_cast<T*>(host::self().block->shared + byte_offset);
}

inline void sync_block(Where where = Where::current()) {
  host::warp_barrier("sync_block", host::self().block->barriers[0], 0, true, where);
}
inline void barrier_sync(int id, int threads, Where where = Where::current()) {
  host::named_barrier("barrier_sync", id, threads, true, where);
}
inline void barrier_arrive(int id, int threads, Where where = Where::current()) {
  host::named_barrier("barrier_arrive", id, threads, false, where);
}
inline void sync_warp(unsigned mask = kFullMask, Where where = Where::current()) {
  host::meet("sync_warp", mask, false, where, nullptr, [](host::Warp&) {});
}
inline void fence_block() {}

namespace host {

template <class T>
T shuffle(const char* op, unsigned mask, T x, int from, const Where& where) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);
  Exchange<T> values{x, {}};
  exchange(op, mask, where, values);
  if (!(mask >> from & 1)) fail(op, where, text("reads lane ", from, ", which is not in the mask"));
  return values.all[from];
}

template <class T, class Op>
T reduce(const char* op, unsigned mask, T x, const Where& where, Op combine) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "redux.sync is for 32-bit integers");
  Exchange<T> values{x, {}};
  exchange(op, mask, where, values);
  bool first = true;
  T result{};
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    result = first ? values.all[l] : combine(result, values.all[l]);
    first = false;
  }
  return result;
}

template <class T, class Op>
T atomic(T* p, Op next) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    throw std::runtime_error("atomic: misaligned address");
  }
  machine->preempt();
  const T old = *p;
  *p = next(old);
  return old;
}

}  // namespace host

template <class T>
T shfl(T x, int from, unsigned mask = kFullMask, Where where = Where::current()) {
  return host::shuffle("shfl", mask, x, from & 31, where);
}
template <class T>
T shfl_xor(T x, int lane_mask, unsigned mask = kFullMask, Where where = Where::current()) {
  return host::shuffle("shfl_xor", mask, x, (lane_idx() ^ lane_mask) & 31, where);
}
template <class T>
T shfl_up(T x, int delta, unsigned mask = kFullMask, Where where = Where::current()) {
  const int lane = lane_idx();
  return host::shuffle("shfl_up", mask, x, lane < delta ? lane : lane - delta, where);
}
template <class T>
T shfl_down(T x, int delta, unsigned mask = kFullMask, Where where = Where::current()) {
  const int lane = lane_idx();
  return host::shuffle("shfl_down", mask, x, lane + delta > 31 ? lane : lane + delta, where);
}

inline unsigned ballot(bool predicate, unsigned mask = kFullMask, Where where = Where::current()) {
  host::Exchange<int> votes{predicate, {}};
  host::exchange("ballot", mask, where, votes);
  unsigned result = 0;
  for (int l = 0; l < 32; ++l) result |= static_cast<unsigned>(votes.all[l]) << l;
  return result & mask;
}
inline int popcount(unsigned x) { return __builtin_popcount(x); }
inline bool any(bool predicate, unsigned mask = kFullMask, Where where = Where::current()) {
  return ballot(predicate, mask, where) != 0;
}
inline bool all(bool predicate, unsigned mask = kFullMask, Where where = Where::current()) {
  return ballot(predicate, mask, where) == mask;
}

template <class T>
T reduce_add(T x, unsigned mask = kFullMask, Where where = Where::current()) {
  return host::reduce("reduce_add", mask, x, where,
                      [](T a, T b) { return static_cast<T>(unsigned(a) + unsigned(b)); });
}
template <class T>
T reduce_min(T x, unsigned mask = kFullMask, Where where = Where::current()) {
  return host::reduce("reduce_min", mask, x, where, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T reduce_max(T x, unsigned mask = kFullMask, Where where = Where::current()) {
  return host::reduce("reduce_max", mask, x, where, [](T a, T b) { return a < b ? b : a; });
}

// The leader is some lane of the full warp, the same at every call: the seed picks it.
inline bool elect_one(Where where = Where::current()) {
  host::meet("elect_one", kFullMask, false, where, nullptr, [](host::Warp&) {});
  return lane_idx() == host::machine->elected_lane;
}

template <class T>
T atomic_add(T* p, T x) {
  return host::atomic(p, [x](T old) { return static_cast<T>(old + x); });
}
template <class T>
T atomic_min(T* p, T x) {
  return host::atomic(p, [x](T old) { return x < old ? x : old; });
}
template <class T>
T atomic_max(T* p, T x) {
  return host::atomic(p, [x](T old) { return old < x ? x : old; });
}
template <class T>
T atomic_exchange(T* p, T x) {
  return host::atomic(p, [x](T) { return x; });
}
template <class T>
T atomic_cas(T* p, T expected, T x) {
  return host::atomic(p, [=](T old) { return old == expected ? x : old; });
}

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float tanh_approx(float x) { return tanhf(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float rsqrt_approx(float x) { return 1.0f / sqrtf(x); }

inline float to_float(bf16 x) { return bf16_to_float(x.bits); }
inline float to_float(f16 x) { return half_to_float(x.bits); }
template <class T>
T from_float(float x) {
  return {std::is_same_v<T, bf16> ? float_to_bf16(x) : float_to_half(x)};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace gemma_ext::simt
