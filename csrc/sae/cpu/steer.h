// SPDX-License-Identifier: Apache-2.0
// The CPU engine's steering, without torch.
#pragma once

#include "../steer.h"
#include "products.h"

namespace gemma_ext::sae::cpu {

Wrong find_wrong(const Steer&);

void run(const Steer&, Workers&);

}  // namespace gemma_ext::sae::cpu
