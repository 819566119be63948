// SPDX-License-Identifier: Apache-2.0
// A masked call as a few launches: one where no row is sorted.
#pragma once

#include <memory>

#include "mask.h"

namespace gemma_ext::souping::cuda {

// Marks of so many elements, or of one row, are made at a time: 24 MiB of three models.
constexpr int64_t kMarked = 1 << 21;

class Batches {
 public:
  // In order: of the parts of a batch only the first may begin inside of a block.
  Batches(const Table&, const Mask&, int64_t grain, bool in_order);

  const Table& table() const { return table_; }
  const std::vector<int64_t>& chunks_before() const { return first_; }
  int64_t size() const { return static_cast<int64_t>(parts_.size()); }
  Range parts(int64_t batch) const { return parts_[batch]; }
  Range chunks(int64_t batch) const {
    return {first_[parts_[batch].from], first_[parts_[batch].to]};
  }

  // In this order: what goes up, then the rest of the memory, then the launches.
  void add(Upload&, Plan&, MaskPlan&);
  void take(Arena&, MaskPlan&);
  void start(const MaskPlan&, Launches&) const;
  // Before a batch; its mask.
  MaskPlan begin(int64_t batch, const Plan&, const MaskPlan&, Launches&) const;

 private:
  const Mask& mask_;
  std::unique_ptr<Split> split_;
  Table table_;
  std::vector<int64_t> first_, elements_, rows_;  // before each part, [T + 1]
  std::vector<Range> parts_;
  int64_t longest_ = 0;  // row
  RowChoice* choices_ = nullptr;
  int64_t* rows_before_ = nullptr;
  float* marks_ = nullptr;
  uint32_t* scratch_ = nullptr;  // of rows that shared memory does not hold
};

// Of the rows [from, to) of a plan, one after the other in all parts.
struct MarkParams {
  Plan plan;
  Range rows;
  const int64_t* rows_before;  // [T]
  const int64_t* marked;       // [T] elements before each part
  const RowChoice* choices;    // [M]
  float* marks;                // [M, stride]
  uint32_t* scratch;
  int64_t stride, first, longest;
  bool by_value;
};
constexpr int64_t kMarkBlocks = 2;  // of a multiprocessor
int64_t mark_scratch(int64_t longest);
void mark_rows(const MarkParams&, Launches&);

}  // namespace gemma_ext::souping::cuda
