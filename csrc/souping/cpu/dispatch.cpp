// SPDX-License-Identifier: Apache-2.0
// The tables of all instruction sets, and the calls whose runs need nothing of each other.
#include "../../common/cpu/isa.h"
#include "work.h"

namespace gemma_ext::souping {

#define GEMMA_EXT_DECLARE(isa)   \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
#define GEMMA_EXT_ADDRESS(isa) &isa::kKernels,

GEMMA_EXT_ISAS(GEMMA_EXT_DECLARE)

const Kernels& kernels() {
  static const Kernels* const builds[] = {GEMMA_EXT_ISAS(GEMMA_EXT_ADDRESS)};
  return *builds[gemma_ext::cpu::chosen_isa()];
}

namespace cpu {
namespace {

// Elements of a task: enough to be worth dealing, and the sources of a masked run stay in L2 for its readings.
constexpr int64_t kRun = 1 << 16, kMaskedRun = 1 << 15, kRowRun = 1 << 14;
constexpr int64_t kRowsOfTask = 64;

// Results of a call that no cache will hold go past it, but not over sources that are in it already.
constexpr int64_t kStreamBytes = 16 << 20;

bool is_large(const Table& t) {
  int64_t bytes = 0;
  for (int64_t p = 0; p < t.parts; ++p) bytes += t.part[p].numel * size_of(t.out[p].type);
  return bytes >= kStreamBytes;
}

bool is_in_place(const Table& t, int64_t part) {
  const void* out = t.out[part].data;
  bool found = t.base[part].data == out;
  for (int m = 0; m < t.models; ++m) found |= t.source[part * t.models + m].data == out;
  return found;
}

// run(run, streamed, scratch) of every run.
template <class Task>
void each(const Table& t, int64_t grain, Workers& workers, Task task) {
  const Work work(t, grain);
  const bool large = is_large(t);
  workers.run(work.size(), [&](int64_t i, Scratch& s) {
    task(work[i], large && !is_in_place(t, work[i].part), s);
  });
}

}  // namespace

void run(const Soup& call, Workers& workers) {
  each(call.table, kRun, workers,
       [&](const Run& run, bool stream, Scratch& s) { kernels().soup(call, run, stream, s); });
}

void run(const Apply& call, Workers& workers) {
  each(call.table, kRowRun, workers,
       [&](const Run& run, bool, Scratch& s) { kernels().apply(call, run, s); });
}

void run(const Swarm& call, Workers& workers) {
  each(call.table, kRun, workers,
       [&](const Run& run, bool, Scratch& s) { kernels().swarm(call, run, s); });
}

void run(const Merge& call, Workers& workers) {
  const Table& t = call.table;
  const Work work(t, call.mask.rows ? kRowRun : kMaskedRun,
                  call.mask.rows ? Work::Cuts::kRows : Work::Cuts::kAnywhere);
  Masks masks(t, call.mask, work);
  const bool large = is_large(t);
  workers.run(work.size(), [&](int64_t i, Scratch& s) {
    const Kept kept = masks.fill(i, s);
    kernels().merge(call, work[i], kept, large && !is_in_place(t, work[i].part), s);
  });
  masks.count_down();
}

void run(const Counts& call, Workers& workers) {
  const Table& t = call.table;
  const Work work(t, call.mask.rows ? kRowRun : kMaskedRun,
                  call.mask.rows ? Work::Cuts::kRows : Work::Cuts::kAnywhere);
  Masks masks(t, call.mask, work);
  const int64_t numbers = call.count == Count::kOverlaps ? 2 * t.models : 1;
  workers.run(work.size(), [&](int64_t i, Scratch& s) {
    int64_t found[2 * kMaxModels] = {};
    kernels().count(call, work[i], masks.fill(i, s), found, s);
    for (int64_t k = 0; k < numbers; ++k)
      std::atomic_ref<int64_t>(call.out[work[i].part * numbers + k]).fetch_add(found[k]);
  });
  masks.count_down();
}

void run(const GramRows& call, Workers& workers) {
  const Work work(call.table, kRowRun, Work::Cuts::kRows);
  workers.run(work.size(), [&](int64_t i, Scratch& s) { kernels().gram_rows(call, work[i], s); });
}

void run(const GatherRows& call, Workers& workers) {
  workers.run(ceil_div(call.count, kRowsOfTask), [&](int64_t i, Scratch& s) {
    const int64_t first = i * kRowsOfTask;
    kernels().gather_rows(call, first, std::min(first + kRowsOfTask, call.count), s);
  });
}

}  // namespace cpu
}  // namespace gemma_ext::souping
