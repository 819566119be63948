// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace gemma_ext {

// JSON object: version, commit, compiler, flags, isas, cuda_compiler, cuda_archs, processor,
// torch_seen, torch_target.
const char* build_record();

}  // namespace gemma_ext
