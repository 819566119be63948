// SPDX-License-Identifier: Apache-2.0
// The instruction sets this library was built for, and the one this process runs.
#pragma once

// Fastest first. A family compiles its kernels once for each, into a namespace of that name inside
// its own, and indexes the table of their addresses by chosen_isa().
#if defined(GEMMA_EXT_X86)
#define GEMMA_EXT_X86_ISAS(X) X(amxbf16) X(avx512bf16) X(avx512) X(avx2)
#else
#define GEMMA_EXT_X86_ISAS(X)
#endif
#if defined(GEMMA_EXT_WITH_EMULATED_AMX)
#define GEMMA_EXT_EMULATED_ISAS(X) X(amxemulated)
#else
#define GEMMA_EXT_EMULATED_ISAS(X)
#endif
#define GEMMA_EXT_ISAS(X) GEMMA_EXT_EMULATED_ISAS(X) GEMMA_EXT_X86_ISAS(X) X(baseline)

namespace gemma_ext::cpu {

// Place in GEMMA_EXT_ISAS of the set that GEMMA_EXT_CPU_ISA names, or of the fastest for this
// processor; -1 if it names none that runs here. Found once.
int chosen_isa();

const char* isa_name(int isa);

// "baseline, avx2 or avx512", as an error lists them.
const char* isa_names();

}  // namespace gemma_ext::cpu
