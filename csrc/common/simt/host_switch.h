// SPDX-License-Identifier: Apache-2.0
// Host backend: from one stack to another, without the system call of swapcontext.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) || defined(__aarch64__)
#define SIMT_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace gemma_ext::simt::host {

#if defined(SIMT_OWN_SWITCH)

struct Context {
  void** sp = nullptr;  // points to the frame pointer and the address to go on from
};

inline void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
  void** end = reinterpret_cast<void**>(static_cast<uint8_t*>(stack) + bytes);
#if defined(__x86_64__)
  *(end - 3) = nullptr;  // the return address, where unwinding ends: as a call leaves the stack
  context.sp = end - 5;
#else
  context.sp = end - 2;
#endif
  context.sp[0] = nullptr;
  context.sp[1] = reinterpret_cast<void*>(entry);
}

// Not inlined. The compiler saves what is named as clobbered; the frame pointer cannot be, and is saved
// with the address. Registers that no call preserves are named too: a caller that sees this body takes
// those it does not touch for preserved (-fipa-ra).
__attribute__((noinline, no_sanitize("address", "undefined"))) inline void switch_to(
    Context& from, const Context& to) {
  void*** save = &from.sp;
  void** sp = to.sp;
#if defined(__x86_64__)
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n"  // the red zone
      "leaq 1f(%%rip), %%rax\n"
      "pushq %%rax\n"
      "pushq %%rbp\n"
      "movq %%rsp, (%0)\n"
      "movq %1, %%rsp\n"
      "popq %%rbp\n"
      "popq %%rax\n"
      "jmpq *%%rax\n"
      "1:\n"
      "leaq 128(%%rsp), %%rsp\n"
      : "+D"(save), "+S"(sp)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
        "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
#else
  register void*** x0 asm("x0") = save;
  register void** x1 asm("x1") = sp;
  asm volatile(
      "adr x9, 1f\n"
      "stp x29, x9, [sp, #-16]!\n"
      "mov x9, sp\n"
      "str x9, [%0]\n"
      "mov sp, %1\n"
      "ldp x29, x9, [sp], #16\n"
      "mov x30, xzr\n"
      "ret x9\n"
      "1:\n"
      : "+r"(x0), "+r"(x1)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
        "x16", "x17", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30",
        "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13",
        "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26",
        "v27", "v28", "v29", "v30", "v31", "cc", "memory");
#endif
}

#else

struct Context {
  ucontext_t context;
};

inline void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace gemma_ext::simt::host
