// SPDX-License-Identifier: Apache-2.0
// The CPU engine's calls, without torch. Rows of e and c may have any strides.
#pragma once

#include "../../common/cpu/workers.h"
#include "../divergence.h"

namespace gemma_ext::cce {

using gemma_ext::cpu::Workers;

namespace cpu {

// Nothing was computed where a label is wrong.
struct Status {
  int64_t bad_label_at = -1, bad_label = 0;
  bool ok() const { return bad_label_at < 0; }
};

Status run(const Forward&, Workers&);
Status run(const Backward&, Workers&);
Status run(const Fused&, Workers&);
Status run(const Scale&, Workers&);
Status run(const DivergenceForward&, Workers&);
Status run(const DivergenceBackward&, Workers&);

}  // namespace cpu
}  // namespace gemma_ext::cce
