// SPDX-License-Identifier: Apache-2.0
// What tasks over tiles of the vocabulary share: packed rows, sums of tiles, lists of the best.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../../common/cpu/workers.h"
#include "kernels.h"
#include "packed_rows.h"

namespace gemma_ext::depth_batching::cpu {

using gemma_ext::cpu::Workers;

inline int64_t tiles_of(int64_t vocabulary) { return (vocabulary + kTile - 1) / kTile; }

// Results do not depend on their number: what a task keeps is chosen, not summed.
inline int64_t tasks_of(int64_t tiles, const Workers& workers) {
  return std::min<int64_t>(tiles, 4 * workers.threads());
}

inline PackedRows pack_rows(const Head& head, Workers& workers) {
  PackedRows x(head.n, head.D, kernels().head.packed_size(head.type));
  workers.run(head.n,
              [&](int64_t row, Scratch& s) { kernels().head.pack(head, row, x.rows(), s); });
  return x;
}

struct Sums {
  std::vector<float> memory;
  TileSums planes{};

  Sums(int64_t plane, int count) : memory(plane * count) {
    float* const at = memory.data();
    planes = {at, at + plane, at + 2 * plane, count > 3 ? at + 3 * plane : nullptr};
  }
};

// A larger value first, equal ones by the lower id.
inline bool comes_before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The best `wanted` of every row and task.
class Lists {
 public:
  Lists(int64_t tasks, int64_t n, int64_t wanted)
      : n_(n), wanted_(wanted), memory_(tasks * n * 2 * wanted), lists_(wanted ? tasks * n : 0) {
    constexpr float kLeast = -std::numeric_limits<float>::infinity();
    for (size_t i = 0; i < lists_.size(); ++i)
      lists_[i] = {memory_.data() + i * 2 * wanted, 0, wanted, kLeast, false};
  }

  BestList* of(int64_t task) { return wanted_ ? lists_.data() + task * n_ : nullptr; }

  // Of all tasks, in order.
  std::vector<Candidate> best(int64_t row) const {
    std::vector<Candidate> all;
    for (size_t i = row; i < lists_.size(); i += n_)
      all.insert(all.end(), lists_[i].at, lists_[i].at + lists_[i].count);
    const size_t count = std::min<size_t>(all.size(), wanted_);
    std::partial_sort(all.begin(), all.begin() + count, all.end(), comes_before);
    all.resize(count);
    return all;
  }

 private:
  int64_t n_, wanted_;
  std::vector<Candidate> memory_;
  std::vector<BestList> lists_;
};

}  // namespace gemma_ext::depth_batching::cpu
