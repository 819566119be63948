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

inline bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

// The lane comes to an operation and waits for the others. Returns the meeting to the lane that
// shall act for all, null to the others once that is done.
inline Meeting* join(const char* op, unsigned mask, bool live_only, const Where& where, void* io) {
  Fiber& me = self();
  Warp& warp = *me.warp;
  const int lane = me.lane();
  if (!(mask >> lane & 1)) fail(op, where, "lane ", lane, " is not in its own mask");
  if (const unsigned left = live_only ? 0 : mask & warp.exited; left != 0) {
    fail(op, where, "the mask names lane ", __builtin_ctz(left), ", which has left the kernel");
  }
  Meeting* mine = nullptr;
  for (unsigned open = warp.open; open != 0; open &= open - 1) {
    const int l = __builtin_ctz(open);
    Meeting& m = warp.meetings[l];
    const bool waits_for_me = m.mask >> lane & 1, for_it = (m.here & mask) != 0;
    if (!waits_for_me && !for_it) continue;
    const bool same_place = m.where.line() == where.line() && m.where.column() == where.column() &&
                            same(m.op, op) && same(m.where.file_name(), where.file_name());
    if (waits_for_me && for_it && !same_place) {
      fail(op, where, "divergent warp: lane ", l, " is in ", m.op, " at ", place(m.where));
    }
    if (same_place && m.mask != mask) {
      fail(op, where, "divergent warp: lane ", l, " names another mask, ", std::hex, m.mask,
           " instead of ", mask);
    }
    if (same_place) mine = &m;
  }
  const unsigned bit = 1u << lane;
  if (mine == nullptr) {
    mine = &warp.meetings[lane];
    mine->op = op;
    mine->mask = mask;
    mine->live_only = live_only;
    mine->where = where;
    mine->here = 0;
    warp.open |= bit;
  }
  mine->here |= bit;
  mine->io[lane] = io;
  warp.waiting |= bit;
  while (warp.waiting & bit) {
    if ((mask & ~(mine->here | warp.exited)) == 0) return mine;
    machine->wait(&warp, op, where);
  }
  return nullptr;
}

inline void end(Meeting& m) {
  Warp& warp = *self().warp;
  warp.open &= ~(1u << (&m - warp.meetings));
  warp.waiting &= ~m.here;
  for (unsigned here = m.here; here != 0; here &= here - 1) {
    machine->wake(*warp.lanes[__builtin_ctz(here)]);
  }
}

// Lanes named by `mask` meet in the same operation at the same place; the last to come runs
// `collective` for all of them, with the lanes that are here and each one's `io` in the meeting.
template <class Collective>
void meet(const char* op, unsigned mask, bool live_only, const Where& where, void* io,
          Collective collective) {
  Meeting* m = join(op, mask, live_only, where, io);
  if (m == nullptr) return;
  collective(*m);
  end(*m);
}

template <class Io>
Io& io_of(const Meeting& m, int lane) {
  return *static_cast<Io*>(m.io[lane]);
}

// Counts whole warps, as the .aligned barriers do: the lanes of a warp must come together.
// `warps` is how many are expected; 0 stands for all that are alive.
inline void warp_barrier(const char* op, Barrier& barrier, int warps, bool waits,
                         const Where& where) {
  uint64_t phase = 0;
  meet(op, kFullMask, true, where, &phase, [&](const Meeting& m) {
    for_lanes(m.here, [&](int l) { io_of<uint64_t>(m, l) = barrier.phase; });
    machine->arrive(barrier, warps, op, where);
  });
  while (waits && barrier.phase == phase) machine->wait(&barrier, op, where);
}

inline void named_barrier(const char* op, int id, int threads, bool waits, const Where& where) {
  if (id < 0 || id >= kBarriers) fail(op, where, "barrier ", id, " is not in 0..15");
  if (threads <= 0 || threads % 32 != 0) {
    fail(op, where, "thread count ", threads, " is not a multiple of 32");
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
    fail(op, where, "the address is outside the block's ", block.shared_bytes,
         " bytes of shared memory");
  }
  if (offset % alignment != 0) {
    fail(op, where, "shared address ", offset, " is not a multiple of ", alignment);
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

inline Device device() { return {host::options.multiprocessors, host::options.hopper}; }

inline const char* status_text(Status) { return "no error"; }

template <class Params>
Status launch(void (*kernel)(Params), int grid, int block, int shared_bytes, Stream stream,
              const std::type_identity_t<Params>& params) {
  return launch_cluster(kernel, grid, block, 1, shared_bytes, stream, params);
}

inline Status copy_in(void* to, const void* from, int64_t bytes, Stream) {
  memcpy(to, from, bytes);
  return 0;
}

inline Status copy_out(void* to, const void* from, int64_t bytes, Stream) {
  memcpy(to, from, bytes);
  return 0;
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
  host::meet("sync_warp", mask, false, where, nullptr, [](const host::Meeting&) {});
}
inline void fence_block() {}
inline void fence_device() {}

namespace host {

template <class T>
T shuffle(const char* op, unsigned mask, T x, int from, const Where& where) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);
  if (!(mask >> from & 1)) fail(op, where, "reads lane ", from, ", which is not in the mask");
  struct Io {
    T x;
    int from;
    T result;
  } io{x, from, {}};
  meet(op, mask, false, where, &io, [](const Meeting& m) {
    for_lanes(m.mask, [&](int l) {
      Io& lane = io_of<Io>(m, l);
      lane.result = io_of<Io>(m, lane.from).x;
    });
  });
  return io.result;
}

template <class T, class Op>
T reduce(const char* op, unsigned mask, T x, const Where& where, Op combine) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "redux.sync is for 32-bit integers");
  meet(op, mask, false, where, &x, [&](const Meeting& m) {
    const int first = __builtin_ctz(m.mask);
    T result = io_of<T>(m, first);
    for_lanes(m.mask & (m.mask - 1), [&](int l) { result = combine(result, io_of<T>(m, l)); });
    for_lanes(m.mask, [&](int l) { io_of<T>(m, l) = result; });
  });
  return x;
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
  unsigned votes = predicate;
  host::meet("ballot", mask, false, where, &votes, [](const host::Meeting& m) {
    unsigned result = 0;
    host::for_lanes(m.mask, [&](int l) { result |= host::io_of<unsigned>(m, l) << l; });
    host::for_lanes(m.mask, [&](int l) { host::io_of<unsigned>(m, l) = result; });
  });
  return votes;
}
inline int popcount(unsigned x) { return __builtin_popcount(x); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
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
  host::meet("elect_one", kFullMask, false, where, nullptr, [](const host::Meeting&) {});
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
