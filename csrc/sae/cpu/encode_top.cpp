// SPDX-License-Identifier: Apache-2.0
#include "encode_top.h"

#include <cmath>

namespace gemma_ext::sae::cpu {
namespace {

struct Ranked {
  uint64_t rank;
  float p;
};

// The k best of `found`, best first; `none` behind them.
void write_best(std::vector<Ranked>& found, int64_t k, int32_t none, float* values,
                int32_t* indices) {
  const auto better = [](const Ranked& a, const Ranked& b) { return a.rank > b.rank; };
  const int64_t kept = std::min<int64_t>(k, found.size());
  if (kept < int64_t(found.size()))
    std::nth_element(found.begin(), found.begin() + kept, found.end(), better);
  std::sort(found.begin(), found.begin() + kept, better);
  for (int64_t i = 0; i < kept; ++i) {
    values[i] = found[i].p;
    indices[i] = int32_t(0xffffffffu - uint32_t(found[i].rank));
  }
  std::fill(values + kept, values + k, 0.0f);
  std::fill(indices + kept, indices + k, none);
}

}  // namespace

TopResult::TopResult(const Encoder& e, int64_t k, bool by_magnitude, const uint8_t* mask,
                     float* values, int32_t* indices)
    : N_(e.N),
      k_(k),
      // a quarter survives a shrink; whole vectors are appended
      capacity_(std::min(e.F, 4 * k + 64) + 16),
      scale_(e.scale),
      mask_(mask),
      by_magnitude_(by_magnitude),
      values_(values),
      indices_(indices) {}

int64_t TopResult::row_bytes() const {
  return wanted() ? capacity_ * sizeof(TopLists::Entry) + 2 * sizeof(float) + 1 : 0;
}

void TopResult::plan(const Plan& plan) {
  parts_ = plan.parts;
  if (parts_ == 1) return;
  part_values_.resize(parts_ * N_ * k_);
  part_indices_.resize(parts_ * N_ * k_);
}

TopLists TopResult::open(const EncodeTask& task, Slot slot, Scratch& s) const {
  char* at = static_cast<char*>(s.part(slot, task.rows * row_bytes()));
  TopLists lists{};
  lists.entries = reinterpret_cast<TopLists::Entry*>(at);
  lists.count = reinterpret_cast<int32_t*>(lists.entries + task.rows * capacity_);
  lists.limit = reinterpret_cast<float*>(lists.count + task.rows);
  lists.closed = reinterpret_cast<uint8_t*>(lists.limit + task.rows);
  lists.k = k_;
  lists.capacity = capacity_;
  lists.scale = scale_;
  lists.mask = mask_;
  lists.by_magnitude = by_magnitude_;
  std::fill_n(lists.count, task.rows, 0);
  std::fill_n(lists.limit, task.rows, NAN);
  std::fill_n(lists.closed, task.rows, uint8_t{0});
  return lists;
}

void TopResult::close(const EncodeTask& task, int64_t t, TopLists& lists) {
  std::vector<Ranked> found;
  for (int64_t r = 0; r < task.rows; ++r) {
    shrink(lists, r);
    found.clear();
    const TopLists::Entry* entries = lists.entries + r * capacity_;
    for (int64_t i = 0; i < lists.count[r]; ++i) {
      const auto [p, feature] = entries[i];
      found.push_back({rank_of(score_of(p, feature, scale_, by_magnitude_), feature), p});
    }
    const int64_t at = (task.row0 + r) * k_, part = t % parts_ * N_ * k_;
    if (parts_ == 1)
      write_best(found, k_, 0, values_ + at, indices_ + at);
    else
      write_best(found, k_, -1, part_values_.data() + part + at, part_indices_.data() + part + at);
  }
}

void TopResult::merge(Workers& workers) {
  if (parts_ == 1) return;
  constexpr int64_t kRows = 64;
  workers.run(ceil_div(N_, kRows), [&](int64_t t, Scratch&) {
    std::vector<Ranked> found;
    for (int64_t row = t * kRows; row < std::min(N_, (t + 1) * kRows); ++row) {
      found.clear();
      for (int64_t part = 0; part < parts_; ++part)
        for (int64_t i = 0; i < k_; ++i) {
          const int64_t at = (part * N_ + row) * k_ + i;
          const int32_t feature = part_indices_[at];
          if (feature < 0) break;
          const float p = part_values_[at];
          found.push_back({rank_of(score_of(p, feature, scale_, by_magnitude_), feature), p});
        }
      write_best(found, k_, 0, values_ + row * k_, indices_ + row * k_);
    }
  });
}

}  // namespace gemma_ext::sae::cpu
