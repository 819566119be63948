// SPDX-License-Identifier: Apache-2.0
// Lists of what lies above a limit, from the tasks of a plan; a row's ascend by feature.
#pragma once

#include <vector>

#include "encode_cut.h"
#include "encode_plan.h"
#include "engine.h"

namespace gemma_ext::sae::cpu {

using gemma_ext::cpu::Scratch;

class AboveResult {
 public:
  AboveResult(const Encoder&, const Plan&);

  std::vector<Above>& tasks() { return tasks_; }
  Above& open(const EncodeTask&, int64_t t);
  // Only the `total` best count, all of which exceed `limit`.
  void choose(int64_t total, float limit, Workers&);
  // Entries of each row.
  void count(Workers&);
  const std::vector<int64_t>& counts() const { return counts_; }
  int64_t total() const;
  // Row behind row; returns the least positive score, or infinity.
  float fill(int64_t* offsets, const Entries&, Workers&) const;
  // Rows of `capacity`, as contract.h says.
  void fill_padded(int64_t capacity, const Entries&, Workers&) const;

 private:
  // visit(entry, score, order) for those of the rows of range i that count, but ties among the last of
  // the chosen
  template <class Visit>
  void each(int64_t range, Visit visit) const;
  template <class Place>
  float place(int64_t range, const Entries&, Place first) const;

  Plan plan_;
  const float* scale_;
  std::vector<Above> tasks_;
  std::vector<std::vector<uint8_t>> nan_listed_;  // of each task
  uint32_t least_ = 0;                            // order of the last that is chosen
  int64_t ties_ = 0;                              // how many of that order are
  std::vector<int64_t> counts_;                   // [N]
  std::vector<int64_t> allowed_;                  // [N] ties of each row that are chosen
};

}  // namespace gemma_ext::sae::cpu
