// SPDX-License-Identifier: Apache-2.0
// The CPU engine's head, gates and shortlist, without torch.
#pragma once

#include "../head.h"
#include "engine.h"

namespace gemma_ext::depth_batching::cpu {

Wrong find_wrong(const HeadExit&);
Wrong find_wrong(const Noise&);
Wrong find_wrong(const Gate&);
Wrong find_wrong(const Shortlist&);

void run(const HeadExit&, Workers&);
void run(const Noise&, Workers&);
void run(const Gate&, Workers&);
void run(const Shortlist&, Workers&);

}  // namespace gemma_ext::depth_batching::cpu
