// SPDX-License-Identifier: Apache-2.0
// The CPU engine's state propagation, without torch.
#pragma once

#include "../propagate.h"
#include "engine.h"

namespace gemma_ext::depth_batching::cpu {

Wrong find_wrong(const Propagate&);
void run(const Propagate&, Workers&);

}  // namespace gemma_ext::depth_batching::cpu
