// SPDX-License-Identifier: Apache-2.0
// A whole call as one list of runs, and the order among equals of a cut along it.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "engine.h"
#include "kernels.h"

namespace gemma_ext::souping::cpu {

// Runs of all parts in order, at most `grain` elements each: cut at multiples of `grain` of the tensor's positions,
// or between rows.
class Work {
 public:
  enum class Cuts { kAnywhere, kPositions, kRows };

  Work(const Table& t, int64_t grain, Cuts cuts = Cuts::kAnywhere) {
    for (int64_t p = 0; p < t.parts; ++p) {
      const Part& part = t.part[p];
      first_.push_back(int64_t(runs_.size()));
      const int64_t step =
          cuts == Cuts::kRows ? std::max(grain / part.width, int64_t{1}) * part.width : grain;
      const int64_t lead = cuts == Cuts::kPositions ? part.offset % step : 0;
      for (int64_t at = 0; at < part.numel;) {
        const int64_t count = std::min(step - (at == 0 ? lead : 0), part.numel - at);
        runs_.push_back({p, at, count});
        at += count;
      }
    }
    first_.push_back(int64_t(runs_.size()));
  }

  int64_t size() const { return int64_t(runs_.size()); }
  const Run& operator[](int64_t task) const { return runs_[task]; }
  // First task of a part; of T the end.
  int64_t first(int64_t part) const { return first_[part]; }

 private:
  std::vector<Run> runs_;
  std::vector<int64_t> first_;
};

// Elements equal to a cut's threshold before each run. Tasks are dealt in order, so the one before is done or runs.
class Ties {
 public:
  Ties(const Table& t, const Cut& cut, const Work& work)
      : table_(t), cut_(cut), work_(work), streams_(cut.bits ? streams_of(cut, t.models) : 0) {
    if (!cut.bits) return;
    counts_ = needs_counts();
    if (!counts_) return;
    before_ = std::make_unique<std::atomic<int64_t>[]>((work.size() + 1) * streams_);
    for (int64_t i = 0; i < (work.size() + 1) * streams_; ++i) before_[i] = i < streams_ ? 0 : -1;
  }

  int64_t streams() const { return streams_; }

  // Marks of task's run, of which `equal` are at the threshold and `before` in earlier runs; `room` is [streams,
  // run.count]. Every task asks once.
  Marks mark(int64_t task, uint8_t* room, int64_t* before, int64_t* equal, Scratch& s) {
    if (!cut_.bits) return {};
    std::fill_n(equal, streams_, 0);
    std::fill_n(before, streams_, 0);
    kernels().mark(table_, cut_, work_[task], room, equal, s);
    const bool fresh = cut_.groups > 1 && work_[task].begin == 0;
    for (int64_t m = 0; counts_ && m < streams_; ++m) {
      std::atomic<int64_t>& mine = before_[task * streams_ + m];
      int64_t found = mine.load(std::memory_order_acquire);
      for (; found < 0; found = mine.load(std::memory_order_acquire)) std::this_thread::yield();
      before[m] = fresh ? 0 : found;
      before_[(task + 1) * streams_ + m].store(before[m] + equal[m], std::memory_order_release);
    }
    return {room, before, equal};
  }

  // After all tasks.
  void count_down() {
    for (int64_t p = 0; counts_ && p < table_.parts; ++p) {
      const int64_t last = work_.first(p + 1);
      if (last == work_.first(p) || (cut_.groups == 1 && last != work_.size())) continue;
      const int64_t row = cut_.groups > 1 ? p : 0;
      for (int64_t m = 0; m < streams_; ++m) {
        int64_t& ties = cut_.ties[row * streams_ + m];
        ties = std::max(ties - before_[last * streams_ + m].load(), int64_t{0});
      }
    }
  }

 private:
  // Whether any cut takes some of its equals, and not simply all: nobody counts that many down.
  bool needs_counts() const {
    for (int64_t i = 0; i < cut_.groups * streams_; ++i)
      if (cut_.ties[i] > 0 && cut_.ties[i] < INT64_MAX / 2) return true;
    return false;
  }

  const Table& table_;
  const Cut& cut_;
  const Work& work_;
  int64_t streams_;
  bool counts_ = false;
  std::unique_ptr<std::atomic<int64_t>[]> before_;
};

// Whole vectors are read, of what follows too.
constexpr int64_t kPadding = 64;

// The mask of every run of a list.
class Masks {
 public:
  Masks(const Table& t, const Mask& mask, const Work& work)
      : table_(t), mask_(mask), work_(work), keep_(t, mask.keep, work), drop_(t, mask.drop, work) {}

  bool any() const { return mask_.rows || mask_.keep.bits || mask_.drop.bits || mask_.density; }

  // Of the task's run, or of all rows that it touches.
  Kept fill(int64_t task, Scratch& s) {
    if (!any()) return {};
    Run run = work_[task];
    const int64_t width = table_.part[run.part].width;
    if (mask_.rows) {
      const int64_t first = run.begin / width * width;
      run = {run.part, first, ceil_div(run.begin + run.count, width) * width - first};
    }
    const int64_t count = table_.models * run.count;
    const Kept kept{static_cast<uint8_t*>(s.part(kKept, count + kPadding)),
                    mask_.rows && mask_.rescale
                        ? static_cast<float*>(s.part(kDivide, (count + kPadding) * 4))
                        : nullptr,
                    run.begin, run.count};
    if (mask_.rows) {
      kernels().mask_rows(table_, mask_, run, kept, s);
      return kept;
    }
    int64_t counts[4][kMaxModels];
    uint8_t* room =
        static_cast<uint8_t*>(s.part(kOther, (keep_.streams() + drop_.streams()) * run.count));
    const Marks keep = keep_.mark(task, room, counts[0], counts[1], s);
    const Marks drop =
        drop_.mark(task, room + keep_.streams() * run.count, counts[2], counts[3], s);
    kernels().mask(table_, mask_, run, keep, drop, kept, s);
    return kept;
  }

  void count_down() {
    keep_.count_down();
    drop_.count_down();
  }

 private:
  const Table& table_;
  const Mask& mask_;
  const Work& work_;
  Ties keep_, drop_;
};

}  // namespace gemma_ext::souping::cpu
