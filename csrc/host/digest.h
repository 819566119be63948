// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma_ext::host {

// XXH64 of bytes [size]: tells a torn or altered file from a whole one at memory speed. It is no
// defence against somebody who means harm.
uint64_t digest(const void* bytes, size_t size, uint64_t seed);

}  // namespace gemma_ext::host
