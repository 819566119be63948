// SPDX-License-Identifier: Apache-2.0
// Steering: where a gate looks back over tokens, which tokens fire, then the gates, then the tokens.
#include "steer.h"

#include <algorithm>
#include <vector>

#include "products_table.h"

namespace gemma_ext::sae::cpu {
namespace {

constexpr int64_t kTokens = 8;  // of a task

bool looks_back(const Steer& call, int64_t b) {
  const int32_t gate = call.gates[2 * b];
  return gate == kCausal || gate == kPrompt;
}

// Of a request: which tokens are open, and the state after the last. Tokens that are not read do not count.
void open_gates(const Steer& call, int64_t b, const uint8_t* fires, uint8_t* open) {
  const uint8_t* reads = call.reads ? call.reads + b * call.T : nullptr;
  int32_t since = call.state[b];
  const int32_t gate = call.gates[2 * b], window = call.gates[2 * b + 1];
  if (gate == kPrompt && since == kUndecided) {
    const bool any_read =
        reads ? std::any_of(reads, reads + call.T, [](uint8_t r) { return r; }) : call.T > 0;
    const bool fired = std::any_of(fires, fires + call.T, [](uint8_t f) { return f; });
    if (any_read) since = fired ? 0 : kNever;
  }
  for (int64_t t = 0; t < call.T; ++t) {
    if (gate == kCausal && (!reads || reads[t])) {
      if (fires[t])
        since = 0;
      else if (since >= 0 && since < kForever)
        ++since;
    }
    open[t] = since >= 0 && since < (gate == kCausal ? window : kForever);
  }
  call.state_after[b] = since;
}

}  // namespace

Wrong find_wrong(const Steer& call) {
  for (int64_t b = 0; b <= call.B; ++b) {
    const int64_t least = b ? call.offsets[b - 1] : 0, at = call.offsets[b];
    if (at < least || at > call.entries || (b == 0 && at != 0))
      return {"ascending offsets", b, at, call.entries + 1};
  }
  for (int64_t e = 0; e < call.entries; ++e) {
    if (call.latents[e] < 0 || call.latents[e] >= call.R)
      return {"latents", e, call.latents[e], call.R};
    if (call.modes[e] < kAdd || call.modes[e] > kCap) return {"modes", e, call.modes[e], kCap + 1};
  }
  for (int64_t b = 0; b < call.B; ++b) {
    const int32_t gate = call.gates[2 * b];
    if (gate < kAlways || gate > kPrompt) return {"gates", b, gate, kPrompt + 1};
    if (call.encoder.data) continue;
    if (gate != kAlways) return {"gates of a call without an encoder", b, gate, kAlways + 1};
    for (int64_t e = call.offsets[b]; e < call.offsets[b + 1]; ++e)
      if (call.modes[e] >= kAblate && call.modes[e] <= kScale)
        return {"modes of a call without an encoder", e, call.modes[e], kAdd + 1};
  }
  return {};
}

void run(const Steer& call, Workers& workers) {
  const int64_t tokens = call.B * call.T;
  const int64_t tasks = (tokens + kTokens - 1) / kTokens;
  std::vector<uint8_t> open(tokens, 1);
  bool any = false;
  for (int64_t b = 0; b < call.B; ++b) {
    call.state_after[b] = call.state[b];
    any |= looks_back(call, b);
  }
  if (any) {
    std::vector<uint8_t> fires(tokens);
    workers.run(tasks, [&](int64_t i, Scratch& s) {
      for (int64_t at = i * kTokens; at < std::min(tokens, (i + 1) * kTokens); ++at)
        if (looks_back(call, at / call.T))
          fires[at] = product_kernels().fires(call, at / call.T, at % call.T, s);
    });
    for (int64_t b = 0; b < call.B; ++b)
      if (looks_back(call, b))
        open_gates(call, b, fires.data() + b * call.T, open.data() + b * call.T);
  }
  workers.run(tasks, [&](int64_t i, Scratch& s) {
    for (int64_t at = i * kTokens; at < std::min(tokens, (i + 1) * kTokens); ++at)
      product_kernels().steer(call, at / call.T, at % call.T, open[at], s);
  });
}

}  // namespace gemma_ext::sae::cpu
