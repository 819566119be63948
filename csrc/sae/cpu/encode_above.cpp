// SPDX-License-Identifier: Apache-2.0
#include "encode_above.h"

#include <cmath>

namespace gemma_ext::sae::cpu {

AboveResult::AboveResult(const Encoder& e, const Plan& plan)
    : plan_(plan),
      scale_(e.scale),
      tasks_(plan.tasks()),
      nan_listed_(plan.tasks()),
      counts_(e.N),
      allowed_(e.N) {}

Above& AboveResult::open(const EncodeTask& task, int64_t t) {
  nan_listed_[t].resize(task.rows);
  tasks_[t].nan_listed = nan_listed_[t].data();
  tasks_[t].scale = scale_;
  return tasks_[t];
}

template <class Visit>
void AboveResult::each(int64_t range, Visit visit) const {
  std::vector<uint8_t> nan_seen(plan_.rows);
  for (int64_t t = range * plan_.parts; t < (range + 1) * plan_.parts; ++t)
    for (int64_t i = 0; i < tasks_[t].count; ++i) {
      const Above::Entry& e = tasks_[t].entries[i];
      const float score = score_of(e.p, e.feature, scale_, false);
      const uint32_t order = order_of(score);
      if (order < least_) continue;
      // the tasks of a row may each have listed a NaN
      if (std::isnan(score) && nan_seen[e.row - range * plan_.rows]++) continue;
      visit(e, score, order);
    }
}

void AboveResult::choose(int64_t total, float limit, Workers& workers) {
  least_ = order_of(limit) + 1;
  std::vector<std::vector<uint32_t>> found(plan_.ranges);
  workers.run(plan_.ranges, [&](int64_t range, Scratch&) {
    each(range, [&](const Above::Entry&, float, uint32_t order) { found[range].push_back(order); });
  });
  std::vector<uint32_t> orders;
  for (const auto& some : found) orders.insert(orders.end(), some.begin(), some.end());
  ties_ = int64_t(orders.size());
  if (ties_ <= total) return;
  if (total == 0) {
    least_ = UINT32_MAX;
    ties_ = 0;
    return;
  }
  const Cut cut = cut_after(orders, total);
  least_ = cut.order;
  ties_ = cut.ties;
}

void AboveResult::count(Workers& workers) {
  workers.run(plan_.ranges, [&](int64_t range, Scratch&) {
    each(range, [&](const Above::Entry& e, float, uint32_t order) {
      ++(order == least_ ? allowed_ : counts_)[e.row];
    });
  });
  int64_t left = ties_;
  for (int64_t row = 0; row < plan_.N; ++row) {
    allowed_[row] = std::min(allowed_[row], left);
    left -= allowed_[row];
    counts_[row] += allowed_[row];
  }
}

int64_t AboveResult::total() const {
  int64_t sum = 0;
  for (int64_t count : counts_) sum += count;
  return sum;
}

// first(row) is where a row begins, or negative where it is left out.
template <class Place>
float AboveResult::place(int64_t range, const Entries& to, Place first) const {
  const int64_t row0 = range * plan_.rows;
  const int64_t rows = std::min(plan_.rows, plan_.N - row0);
  std::vector<int64_t> next(rows), left(rows);
  for (int64_t r = 0; r < rows; ++r) {
    next[r] = first(row0 + r);
    left[r] = allowed_[row0 + r];
  }
  float least = INFINITY;
  each(range, [&](const Above::Entry& e, float score, uint32_t order) {
    const int64_t r = e.row - row0;
    if (next[r] < 0 || (order == least_ && left[r]-- <= 0)) return;
    to.values[next[r]] = e.p;
    to.indices[next[r]++] = e.feature;
    if (score > 0) least = std::min(least, score);
  });
  return least;
}

float AboveResult::fill(int64_t* offsets, const Entries& to, Workers& workers) const {
  offsets[0] = 0;
  for (int64_t row = 0; row < plan_.N; ++row) offsets[row + 1] = offsets[row] + counts_[row];
  std::vector<float> least(plan_.ranges);
  workers.run(plan_.ranges, [&](int64_t range, Scratch&) {
    least[range] = place(range, to, [&](int64_t row) { return offsets[row]; });
  });
  return least.empty() ? INFINITY : *std::min_element(least.begin(), least.end());
}

void AboveResult::fill_padded(int64_t capacity, const Entries& to, Workers& workers) const {
  workers.run(plan_.ranges, [&](int64_t range, Scratch&) {
    const int64_t row0 = range * plan_.rows, row1 = std::min(plan_.N, row0 + plan_.rows);
    for (int64_t row = row0; row < row1; ++row) {
      const bool fits = counts_[row] <= capacity;
      std::fill_n(to.values + row * capacity, capacity, fits ? 0.0f : NAN);
      std::fill_n(to.indices + row * capacity, capacity, 0);
    }
    place(range, to, [&](int64_t row) { return counts_[row] <= capacity ? row * capacity : -1; });
  });
}

}  // namespace gemma_ext::sae::cpu
