// SPDX-License-Identifier: Apache-2.0
// The CPU engine's products of sparse codes with rows, without torch.
#pragma once

#include <functional>

#include "../../common/cpu/workers.h"
#include "../lists.h"

namespace gemma_ext::sae {

using gemma_ext::cpu::Workers;

namespace cpu {

// What lies outside [0, end); nothing where `what` is null.
struct Wrong {
  const char* what = nullptr;
  int64_t at = 0, value = 0, end = 0;
};

Wrong find_wrong(const List&);

void run(const Decode&, Workers&);
void run(const DecodeBackward&, Workers&);
// Into the memory that `allocate` gives for the touched features, asked once.
void run(const DecodeBackward&, const std::function<TouchedRows(int64_t)>& allocate, Workers&);
void run(const Scatter&, Workers&);
void run(const Nested&, Workers&);
void run(const NestedBackward&, Workers&);

}  // namespace cpu
}  // namespace gemma_ext::sae
