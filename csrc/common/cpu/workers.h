// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include <functional>
#include <vector>

#include "scratch.h"

namespace gemma_ext::cpu {

// Deals tasks to the threads of `parallel_for`, one Scratch per thread. Every task writes memory of
// its own, so results do not depend on who ran it.
class Workers {
 public:
  using Range = std::function<void(int64_t, int64_t)>;
  using ParallelFor = std::function<void(int64_t, const Range&)>;

  Workers(int threads, ParallelFor parallel_for);

  void run(int64_t tasks, const std::function<void(int64_t, Scratch&)>& task);
  int threads() const { return static_cast<int>(scratch_.size()); }

 private:
  std::vector<Scratch> scratch_;
  ParallelFor parallel_for_;
};

}  // namespace gemma_ext::cpu
