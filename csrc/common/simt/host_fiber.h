// SPDX-License-Identifier: Apache-2.0
// Host backend: every thread of a cluster is a fiber; a seeded scheduler decides which runs next and
// when asynchronous copies land. A failed check throws std::runtime_error out of launch.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "host_switch.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gemma_ext::simt {

using Where = std::source_location;

namespace host {

// Signalling NaN as fp32; as a pair of bf16 both halves are NaN too.
constexpr uint32_t kPoison = 0x7fa17fa1;
constexpr int kBarriers = 16;
constexpr size_t kStackBytes = 256 << 10;  // a few KiB of registers, with room for redzones

struct Options {
  uint64_t seed = 0;
  int multiprocessors = 4;
  bool hopper = true;  // what device() says; everything runs either way
};
inline Options options;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline std::string place(const Where& where) {
  const std::string file = where.file_name();
  return text(file.substr(file.find_last_of('/') + 1), ":", where.line());
}

inline void poison(void* p, size_t bytes) {
  uint8_t* to = static_cast<uint8_t*>(p);
  for (; bytes >= 4; bytes -= 4, to += 4) memcpy(to, &kPoison, 4);
  memcpy(to, &kPoison, bytes);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }

 private:
  uint64_t state_;
};

// visit(lane) for each bit of the mask
template <class Visit>
void for_lanes(unsigned mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(__builtin_ctz(mask));
}

struct Block;
struct Warp;

struct Copy {
  void* to;
  const void* from;
  int bytes;     // the rest up to 16 is zero
  size_t group;  // its place among the commits
};

// Bulk stores of one commit group that still have to read shared memory or to write.
struct BulkGroup {
  int reads = 0;
  int writes = 0;
};

struct Fiber {
  Context context;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;
  bool exited = false;
  uint64_t priority = 0;
  const void* channel = nullptr;  // what it waits for; null when runnable
  const char* op = "";
  Where where;
  std::vector<Copy> copies;  // under way, in order
  size_t copy_commits = 0;
  std::vector<BulkGroup> bulk_groups;  // by commit; the last one may still be open
  size_t bulk_commits = 0;

  int lane() const { return thread % 32; }
};

// Lanes of a warp on their way through the same operation at the same place.
struct Meeting {
  const char* op = "";
  unsigned mask = 0;
  bool live_only = false;
  Where where;
  unsigned here = 0;  // the lanes that have come
  void* io[32];
};

// One wgmma of one warp: its 16 rows of the product.
struct Wgmma {
  const Block* block;
  int first_row, n;
  uint64_t a, b;  // descriptors
  Major major_a, major_b;
  float (*convert)(uint16_t);
  bool accumulate;
  uint64_t group;
  float* d[32];
  bool was_read;
  std::vector<double> product;  // [n / 8, 16, 8]
};

struct Warp {
  Fiber* lanes[32];
  Meeting meetings[32];  // by the lane that came first
  unsigned open = 0;     // the meetings that are not over
  unsigned waiting = 0;  // the lanes in one of them
  unsigned exited = 0;
  std::deque<std::shared_ptr<Wgmma>> wgmmas;       // in flight, in order
  std::map<float*, std::vector<float>> in_flight;  // accumulators, poisoned where they belong
  uint64_t wgmma_group = 0;
  bool wgmma_fenced = false;

  bool alive() const { return ~exited != 0; }
};

// A barrier that counts warps: all live ones of its scope, or a number given by the arrivals.
struct Barrier {
  int expected = 0;  // 0: all warps of the scope that are alive
  int arrived = 0;
  uint64_t phase = 0;
};

struct Block {
  int index = 0;
  int rank = 0;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];

  int live_warps() const {
    return static_cast<int>(
        std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return w.alive(); }));
  }
};

struct MbarrierState {
  int count = 0;
  int pending = 0;
  int64_t bytes = 0;  // of transactions still expected
  uint64_t phase = 0;
};

// Runs one cluster at a time.
class Machine {
 public:
  Machine(uint64_t seed, int grid, int block, int cluster)
      : grid(grid),
        block_threads(block),
        cluster(cluster),
        random(seed * 2 + 1),
        elected_lane(random.below(32)),
        fiber_mode_(seed % 3),
        agent_mode_((seed + seed / 3) % 3) {}

  void run_cluster(int first_block, size_t shared_bytes, const std::function<void()>& body) {
    make_blocks(first_block, shared_bytes);
    body_ = &body;
    for (Fiber& f : fibers_) start(f);
    while (!error_ && step()) {
    }
    const bool stuck = !error_ && live_ != 0;
    const std::string report = stuck ? deadlock() : "";
    if (!stuck && !error_) {
      while (!agents_.empty()) run_agent();
    }
    free_blocks();
    if (error_) std::rethrow_exception(error_);
    if (stuck) throw std::runtime_error(report);
  }

  void yield() {
    self->priority = random.next();
    set_runnable(*self);
    give_way();
  }

  // A chance for others to run where the hardware could let them.
  void preempt() {
    if (random.below(4) == 0) yield();
  }

  void wait(const void* channel, const char* op, const Where& where) {
    self->channel = channel;
    self->op = op;
    self->where = where;
    give_way();
  }

  void wake(const void* channel) {
    for (Fiber& f : fibers_) {
      if (f.channel == channel) wake(f);
    }
  }

  void wake(Fiber& f) {
    if (f.channel == nullptr) return;
    f.channel = nullptr;
    set_runnable(f);
  }

  void later(std::function<void()> agent) { agents_.push_back(std::move(agent)); }
  bool copy_at_issue() { return agent_mode_ == 0 || (agent_mode_ == 2 && random.below(2) == 0); }

  int live_warps() const {
    int n = 0;
    for (const Block& b : blocks) n += b.live_warps();
    return n;
  }

  void arrive(Barrier& barrier, int expected, const char* op, const Where& where) {
    if (barrier.arrived > 0 && barrier.expected != expected) {
      const auto count = [](int warps) { return warps ? text(warps * 32) : "all"; };
      throw std::runtime_error(text(op, " at ", place(where), ": thread count ", count(expected),
                                    " disagrees with ", count(barrier.expected),
                                    " of an earlier arrival at the same barrier"));
    }
    barrier.expected = expected;
    ++barrier.arrived;
    release_if_complete(barrier);
  }

  void release_if_complete(Barrier& barrier) {
    const int live = &barrier == &cluster_barrier ? live_warps() : self->block->live_warps();
    if (barrier.arrived == 0 || barrier.arrived < (barrier.expected ? barrier.expected : live)) {
      return;
    }
    barrier.arrived = 0;
    ++barrier.phase;
    wake(&barrier);
  }

  const int grid;
  const int block_threads;
  const int cluster;
  Random random;
  const int elected_lane;
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  std::map<const void*, MbarrierState> mbarriers;
  Fiber* self = nullptr;

 private:
  void make_blocks(int first_block, size_t shared_bytes);
  void free_blocks();
  void start(Fiber& f);
  static void entry();
  void leave();

  bool step() {
    if (live_ == 0) return false;
    const bool agent_turn =
        agent_mode_ == 0 || runnable_.empty() || (agent_mode_ == 2 && random.below(8) == 0);
    if (!agents_.empty() && agent_turn) {
      run_agent();
      return true;
    }
    if (runnable_.empty()) return false;
    resume(next_fiber());
    return true;
  }

  // Agents throw only out of run_cluster's own checks: they run on the scheduler's stack.
  void run_agent() {
    const size_t i = random.below(static_cast<int>(agents_.size()));
    std::function<void()> agent = std::move(agents_[i]);
    agents_.erase(agents_.begin() + i);
    try {
      agent();
    } catch (...) {
      error_ = std::current_exception();
      agents_.clear();
    }
  }

  // Uniform choice, or strict random priorities per warp or per thread: these let one party run as
  // far ahead of the others as the barriers allow.
  Fiber& next_fiber() {
    uint64_t *begin = runnable_.data(), *end = begin + runnable_.size();
    if (fiber_mode_ == 0) {
      std::swap(begin[random.below(static_cast<int>(end - begin))], end[-1]);
    } else {
      std::pop_heap(begin, end);
    }
    Fiber& f = fibers_[runnable_.back() & kIndex];
    runnable_.pop_back();
    return f;
  }

  void set_runnable(Fiber& f) {
    const uint64_t low = kIndex << 16 | kIndex, index = &f - fibers_.data();
    runnable_.push_back((f.priority & ~low) | (random.next() & low & ~kIndex) | index);
    uint64_t* begin = runnable_.data();
    if (fiber_mode_ != 0) std::push_heap(begin, begin + runnable_.size());
  }

  void resume(Fiber& f) {
    self = &f;
#if defined(SIMT_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f.stack, kStackBytes);
#endif
    switch_to(scheduler_, f.context);
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    self = nullptr;
  }

  // Gives way to another thread, or to the scheduler where that has more to do than to choose one.
  void give_way() {
    Fiber& f = *self;
    const bool direct = !error_ && agents_.empty() && !runnable_.empty();
    Fiber* next = direct ? &next_fiber() : nullptr;
    if (next == &f) return;
    self = next;
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(f.exited ? nullptr : &f.fake_stack,
                                   next ? next->stack : scheduler_stack_,
                                   next ? kStackBytes : scheduler_stack_bytes_);
#endif
    switch_to(f.context, next ? next->context : scheduler_);
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
  }

  std::string deadlock() const;

  const std::function<void()>* body_ = nullptr;
  const uint64_t fiber_mode_;
  const uint64_t agent_mode_;  // 0: at once, 1: only when every thread waits, 2: at random
  std::vector<Fiber> fibers_;
  // Of each: its priority, chance among equals, its index. A heap unless the choice is uniform.
  static constexpr uint64_t kIndex = 0xffff;
  std::vector<uint64_t> runnable_;
  std::vector<std::function<void()>> agents_;
  int live_ = 0;
  std::exception_ptr error_;
  Context scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

inline Machine* machine = nullptr;
inline std::vector<void*> spare_stacks;

inline Fiber& self() {
  if (machine == nullptr || machine->self == nullptr) {
    throw std::runtime_error("simt function called outside a kernel");
  }
  return *machine->self;
}

// Not inlined, its parts by value: the address sanitizer makes callers pay for what lies in memory.
template <class... Parts>
[[noreturn]] __attribute__((noinline)) void fail(const char* op, const Where& where,
                                                 Parts... parts) {
  throw std::runtime_error(text(op, " at ", place(where), ", block ", self().block->index,
                                " thread ", self().thread, ": ", parts...));
}

inline void Machine::make_blocks(int first_block, size_t shared_bytes) {
  blocks = std::vector<Block>(cluster);
  fibers_ = std::vector<Fiber>(static_cast<size_t>(cluster) * block_threads);
  cluster_barrier = {};
  mbarriers.clear();
  live_ = static_cast<int>(fibers_.size());
  for (int rank = 0; rank < cluster; ++rank) {
    Block& b = blocks[rank];
    b.index = first_block + rank;
    b.rank = rank;
    b.shared_bytes = shared_bytes;
    void* p = nullptr;
    if (posix_memalign(&p, 1024, shared_bytes) != 0) throw std::bad_alloc();
    b.shared = static_cast<uint8_t*>(p);
    poison(p, shared_bytes);
    b.warps = std::vector<Warp>(block_threads / 32);
    for (int t = 0; t < block_threads; ++t) {
      Fiber& f = fibers_[static_cast<size_t>(rank) * block_threads + t];
      f.block = &b;
      f.warp = &b.warps[t / 32];
      f.thread = t;
      f.warp->lanes[t % 32] = &f;
    }
  }
  for (Block& b : blocks) {
    for (Warp& w : b.warps) {
      const uint64_t priority = random.next();
      for (Fiber* f : w.lanes) f->priority = fiber_mode_ == 1 ? priority : random.next();
    }
  }
}

inline void Machine::free_blocks() {
  for (Fiber& f : fibers_) {
#if defined(SIMT_ASAN)
    // of a thread that has left only the frames of its entry remain
    const size_t used = f.exited ? size_t{4096} : kStackBytes;
    __asan_unpoison_memory_region(static_cast<uint8_t*>(f.stack) + kStackBytes - used, used);
#endif
    spare_stacks.push_back(f.stack);
  }
  for (Block& b : blocks) {
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(b.shared, b.shared_bytes);
#endif
    free(b.shared);
  }
  runnable_.clear();
  agents_.clear();
}

inline void Machine::start(Fiber& f) {
  if (spare_stacks.empty()) {
    const size_t guard = 4096;
    void* p = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, guard, PROT_NONE);
    spare_stacks.push_back(static_cast<uint8_t*>(p) + guard);
  }
  f.stack = spare_stacks.back();
  spare_stacks.pop_back();
  prepare(f.context, f.stack, kStackBytes, &Machine::entry);
  set_runnable(f);
}

inline void Machine::entry() {
  Machine& m = *machine;
#if defined(SIMT_ASAN)
  const void* from = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &from, &bytes);
  if (m.scheduler_stack_ == nullptr) {  // it starts the first thread itself
    m.scheduler_stack_ = from;
    m.scheduler_stack_bytes_ = bytes;
  }
#endif
  try {
    (*m.body_)();
    m.leave();
  } catch (...) {
    m.error_ = std::current_exception();
  }
  m.self->exited = true;
  --m.live_;
  m.give_way();
}

inline void Machine::leave() {
  Fiber& f = *self;
  Warp& w = *f.warp;
  for_lanes(w.open, [&](int first) {
    const Meeting& m = w.meetings[first];
    if (!(m.mask >> f.lane() & 1)) return;
    if (!m.live_only) {
      fail(m.op, m.where, "lane ", first, " waits for lane ", f.lane(),
           ", which has left the kernel");
    }
    // these look again whether all lanes that are left have come
    for_lanes(m.here, [&](int lane) { wake(*w.lanes[lane]); });
  });
  const auto reads = [](const BulkGroup& group) { return group.reads > 0; };
  if (std::any_of(f.bulk_groups.begin(), f.bulk_groups.end(), reads)) {
    fail("exit", {}, "a bulk store of the thread still reads shared memory");
  }
  if (!w.wgmmas.empty()) fail("exit", {}, "a wgmma of the warp is in flight");
  f.exited = true;
  w.exited |= 1u << f.lane();
  if (w.alive()) return;
  for (Barrier& b : f.block->barriers) release_if_complete(b);
  release_if_complete(cluster_barrier);
#if defined(SIMT_ASAN)
  if (f.block->live_warps() == 0)
    __asan_poison_memory_region(f.block->shared, f.block->shared_bytes);
#endif
}

inline std::string Machine::deadlock() const {
  std::map<std::string, std::vector<int>> groups;
  for (const Fiber& f : fibers_) {
    if (f.exited) continue;
    std::string key = text("block ", f.block->index, " waits in ", f.op, " at ", place(f.where));
    const auto barrier = mbarriers.find(f.channel);
    if (barrier != mbarriers.end()) {
      key += text(" (phase ", barrier->second.phase, " lacks ", barrier->second.pending,
                  " arrivals and ", barrier->second.bytes, " bytes)");
    }
    groups[key].push_back(f.thread);
  }
  std::string out = "deadlock:";
  for (const auto& [key, threads] : groups) {
    out += text("\n  ", key, ": threads");
    for (size_t i = 0; i < threads.size();) {
      size_t j = i;
      while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) ++j;
      out += text(" ", threads[i]);
      if (j > i) out += text("-", threads[j]);
      i = j + 1;
    }
  }
  return out;
}

}  // namespace host
}  // namespace gemma_ext::simt
