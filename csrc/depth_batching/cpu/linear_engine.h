// SPDX-License-Identifier: Apache-2.0
// The CPU engine's norms and linear layers, without torch.
#pragma once

#include "../linear.h"
#include "engine.h"

namespace gemma_ext::depth_batching::cpu {

Wrong find_wrong(const Gather&);
Wrong find_wrong(const Scatter&);
Wrong find_wrong(const Linear&);

void run(const Gather&, Workers&);
void run(const Scatter&, Workers&);
void run(const Linear&, Workers&);

}  // namespace gemma_ext::depth_batching::cpu
