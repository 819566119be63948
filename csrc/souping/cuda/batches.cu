// SPDX-License-Identifier: Apache-2.0
#include "batches.h"

namespace gemma_ext::souping::cuda {

Batches::Batches(const Table& t, const Mask& mask, int64_t grain, bool in_order)
    : mask_(mask), table_(t), elements_(1, 0), rows_(1, 0) {
  if (mask.rows) {
    split_ = std::make_unique<Split>(t, kMarked);
    table_ = split_->table(t);
  }
  first_ = cuda::chunks_before(table_, grain);
  for (int64_t p = 0; p < table_.parts; ++p) {
    const Part& part = table_.part[p];
    elements_.push_back(elements_.back() + part.numel);
    rows_.push_back(rows_.back() + part.numel / part.width);
    if (part.numel > 0) longest_ = most(longest_, part.width);
    // results of another type are computed by another kernel
    const bool other =
        p > 0 && t.out && is_wide(false, table_.out[p]) != is_wide(false, table_.out[p - 1]);
    const bool begins = parts_.empty() || other || (in_order && part.offset % kBlock != 0) ||
                        (mask.rows && elements_[p + 1] - elements_[parts_.back().from] > kMarked);
    if (begins) parts_.push_back({p, p});
    parts_.back().to = p + 1;
  }
}

void Batches::add(Upload& upload, Plan& plan, MaskPlan& mask) {
  plan = upload.add(table_, plan.grain, first_, split_ ? &split_->origin : nullptr);
  if (mask_.rows) {
    mask.marked = upload.add(elements_);
    rows_before_ = upload.add(rows_);
    choices_ = upload.add(mask_.rows, table_.models);
    mask.rescale = mask_.rescale;
  }
}

void Batches::take(Arena& arena, MaskPlan& mask) {
  if (mask_.rows) {
    mask.stride = most(least(kMarked, elements_.back()), longest_);
    marks_ = arena.take<float>(table_.models * mask.stride);
    scratch_ = arena.take<uint32_t>(mark_scratch(longest_));
    mask.marks = marks_;
  } else {
    take_cuts(mask, mask_, table_.models, first_.back(), size(), arena);
  }
}

void Batches::start(const MaskPlan& mask, Launches& launches) const {
  start_cuts(mask, first_.back(), size(), launches);
}

MaskPlan Batches::begin(int64_t batch, const Plan& plan, const MaskPlan& mask,
                        Launches& launches) const {
  MaskPlan here = mask;
  if (here.ticket) here.ticket += batch;
  if (!mask_.rows) return here;
  const Range& parts = parts_[batch];
  here.first = elements_[parts.from];
  mark_rows({plan,
             {rows_[parts.from], rows_[parts.to]},
             rows_before_,
             mask.marked,
             choices_,
             marks_,
             scratch_,
             mask.stride,
             here.first,
             longest_,
             mask_.by_value},
            launches);
  return here;
}

}  // namespace gemma_ext::souping::cuda
