// SPDX-License-Identifier: Apache-2.0
#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gemma_ext::cpu {

void want_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(p) + bytes) / kHuge * kHuge;
  // a system that does not know them refuses, and nothing is lost
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

}  // namespace gemma_ext::cpu
