// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

namespace gemma_ext::cpu {

// Of a result that nobody has touched yet: asks for pages of 2 MiB where the system has some. The first touch of pages
// of 4 KiB costs several times what is written.
void want_huge_pages(void* p, int64_t bytes);

}  // namespace gemma_ext::cpu
