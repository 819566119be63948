// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../../common/cpu/workers.h"

namespace gemma_ext::depth_batching::cpu {

using gemma_ext::cpu::Scratch;
using gemma_ext::cpu::Workers;

// Products, or elements that are read, which take a thread about as long as waking another does.
constexpr int64_t kWorthWaking = int64_t{1} << 17;

// Tasks of so much work together, on this thread where it is little.
template <class Task>
void deal(Workers& workers, int64_t work, int64_t tasks, const Task& task) {
  if (work >= kWorthWaking) return workers.run(tasks, task);
  Scratch s;
  for (int64_t t = 0; t < tasks; ++t) task(t, s);
}

}  // namespace gemma_ext::depth_batching::cpu
