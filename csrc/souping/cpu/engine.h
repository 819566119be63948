// SPDX-License-Identifier: Apache-2.0
// The CPU engine's calls, without torch.
#pragma once

#include "../../common/cpu/workers.h"
#include "../contract.h"

namespace gemma_ext::souping {

using gemma_ext::cpu::Workers;

namespace cpu {

void run(const Soup&, Workers&);
void run(const Merge&, Workers&);
void run(const Survey&, Workers&);
void run(const Sums&, Workers&);
void run(const GramRows&, Workers&);
void run(const Counts&, Workers&);
void run(const Apply&, Workers&);
void run(const Swarm&, Workers&);
void run(const GatherRows&, Workers&);

}  // namespace cpu
}  // namespace gemma_ext::souping
