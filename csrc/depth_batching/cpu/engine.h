// SPDX-License-Identifier: Apache-2.0
// The CPU engine's calls on rows and pages, without torch.
#pragma once

#include "../../common/cpu/workers.h"
#include "../contract.h"

namespace gemma_ext::depth_batching {

using gemma_ext::cpu::Scratch;
using gemma_ext::cpu::Workers;

namespace cpu {

// A number that would lead out of the tensors, or null.
struct Wrong {
  const char* what = nullptr;
  int64_t at = 0, value = 0, begin = 0, end = 0;
};

Wrong find_wrong(const Compact&);
Wrong find_wrong(const RopeWrite&);
Wrong find_wrong(const Attention&);
Wrong find_wrong(const Copy&);

// Of calls that have nothing wrong.
void run(const Compact&, Workers&);
void run(const RopeWrite&, Workers&);
void run(const Attention&, Workers&);
void run(const Copy&, Workers&);

}  // namespace cpu
}  // namespace gemma_ext::depth_batching
