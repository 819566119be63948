// SPDX-License-Identifier: Apache-2.0
// The CPU engine's calls, without torch. Rows of e and c may have any strides.
#pragma once

#include <functional>
#include <vector>

#include "../contract.h"
#include "../params.h"

namespace gemma_ext::cce {

// Deals tasks to torch's threads, one Scratch per thread. Every task writes memory of its own, so
// results do not depend on who ran it.
class Workers {
 public:
  using Range = std::function<void(int64_t, int64_t)>;
  using ParallelFor = std::function<void(int64_t, const Range&)>;

  Workers(int threads, ParallelFor parallel_for);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  void run(int64_t tasks, const std::function<void(int64_t, Scratch&)>& task);
  int threads() const { return static_cast<int>(scratch_.size()); }

 private:
  std::vector<Scratch> scratch_;
  ParallelFor parallel_for_;
};

namespace cpu {

// Nothing was computed where a label or the order is wrong.
struct Status {
  int64_t bad_label_at = -1, bad_label = 0, bad_order_at = -1;
  bool ok() const { return bad_label_at < 0 && bad_order_at < 0; }
};

Status run(const Forward&, Workers&);
Status run(const Backward&, Workers&);
Status run(const Fused&, Workers&);
Status run(const ColumnStats&, Workers&);

}  // namespace cpu
}  // namespace gemma_ext::cce
