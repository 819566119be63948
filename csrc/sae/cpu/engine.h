// SPDX-License-Identifier: Apache-2.0
// The CPU engine's calls, without torch. Rows may have any strides.
#pragma once

#include <functional>

#include "../../common/cpu/workers.h"
#include "../contract.h"

namespace gemma_ext::sae {

using gemma_ext::cpu::Workers;

namespace cpu {

void run(const TopK&, Workers&);
void run(const GroupMax&, Workers&);
void run(const BatchTopK&, Workers&);
void run(const Threshold&, Workers&);
// Into the memory that `allocate` gives for all entries, asked once.
void run(const Threshold&, const std::function<Entries(int64_t)>& allocate, Workers&);

}  // namespace cpu
}  // namespace gemma_ext::sae
