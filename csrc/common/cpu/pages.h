// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

namespace gemma_ext::cpu {

// Of a result that nobody has touched yet: asks for pages of 2 MiB where it has some. Writing 0.6 GB for the first
// time costs 0.21 s in pages of 4 KiB and 0.03 s in these (Zen 5).
void want_huge_pages(void* p, int64_t bytes);

}  // namespace gemma_ext::cpu
