// SPDX-License-Identifier: Apache-2.0
// Steering in three steps: what every direction reads of every token, which gates that opens, the increments.
#include "words.cuh"

namespace gemma_ext::sae::cuda {
namespace {

struct SteerParams {
  Steer call;
  float *code, *along;  // [entries, T] f and q of the tokens of the entry's request
  uint8_t* open;        // [B, T] of gates that a request has as a whole
};

DEVICE bool reads_code(int mode) { return mode >= kAblate && mode <= kScale; }
DEVICE bool reads_along(int mode) { return mode == kProject || mode == kCap; }

DEVICE bool is_direction(const Steer& c, int latent) {
  return static_cast<uint32_t>(latent) < static_cast<uint32_t>(c.R);
}

DEVICE bool fires(const SteerParams& p, int64_t b, int64_t t, int64_t e) {
  const Steer& c = p.call;
  return p.code[e * c.T + t] > c.amounts[3 * e + 2] && (!c.reads || c.reads[b * c.T + t]);
}

// Of x [B, T, D] as a table of tokens.
DEVICE Table tokens_of(const Steer& c) { return {c.x, c.D, c.type}; }

// A warp per token and entry of its request: a block per token.
template <int kV>
KERNEL_BOUNDS(kThreads, 4)
void read_codes_kernel(SteerParams p) {
  const Steer& c = p.call;
  for (int64_t n = simt::block_idx(); n < c.B * c.T; n += simt::grid_dim()) {
    const int64_t b = n / c.T, t = n % c.T;
    const bool gated = c.gates[2 * b] != kAlways;
    for (int64_t e = c.offsets[b] + simt::warp_idx(); e < c.offsets[b + 1]; e += kWarps) {
      const int latent = c.latents[e], mode = c.modes[e];
      const bool valid = is_direction(c, latent), code = valid && (gated || reads_code(mode));
      const bool along = valid && reads_along(mode);
      float sums[2] = {};
      const auto dot = [&](const Table& table, float& sum) {
        for (int64_t d = simt::lane_idx() * kV; d < c.D; d += simt::kWarpSize * kV) {
          float x[kV], w[kV];
          load_any(tokens_of(c), n, d, x);
          load_any(table, latent, d, w);
          UNROLL
          for (int i = 0; i < kV; ++i) sum += x[i] * w[i];
        }
        sum = warp_sum(sum);
      };
      if (code && c.encoder.data) dot(c.encoder, sums[0]);
      if (along) dot(c.decoder, sums[1]);
      if (simt::lane_idx() > 0) continue;
      const float* table = c.tables + 3 * int64_t{valid ? latent : 0};
      const float pre = sums[0] + table[0];
      const bool on = code && c.encoder.data && pre > table[1];
      p.code[e * c.T + t] = on ? pre : 0.0f;
      p.along[e * c.T + t] = along ? sums[1] / table[2] : 0.0f;
    }
  }
}

// A warp per request, 32 tokens at a time.
KERNEL_BOUNDS(kThreads, 4)
void open_gates_kernel(SteerParams p) {
  const Steer& c = p.call;
  const int64_t b = int64_t{simt::block_idx()} * kWarps + simt::warp_idx();
  if (b >= c.B) return;
  const int gate = c.gates[2 * b], window = c.gates[2 * b + 1], lane = simt::lane_idx();
  const int before = c.state[b];
  int since = before;  // as of the tokens so far
  bool some = false, readable = false;
  for (int64_t first = 0; first < c.T; first += simt::kWarpSize) {
    const int64_t t = first + lane;
    const bool reads = t < c.T && (!c.reads || c.reads[b * c.T + t]);
    bool fired = false;
    if (reads && gate > kOwn) {
      for (int64_t e = c.offsets[b]; e < c.offsets[b + 1]; ++e) fired |= fires(p, b, t, e);
    }
    const unsigned fires_at = simt::ballot(fired), reads_at = simt::ballot(reads);
    some |= fires_at != 0;
    readable |= reads_at != 0;
    const unsigned up_to = 0xffffffffu >> (31 - lane), mine = fires_at & up_to;
    int waited = since;
    if (mine) {  // the last that fired
      int last = 31;
      while (!(mine >> last & 1)) --last;
      waited = simt::popcount(reads_at & up_to & ~(0xffffffffu >> (31 - last)));
    } else if (since >= 0) {
      const int more = simt::popcount(reads_at & up_to);
      waited = since > kForever - more ? kForever : since + more;
    }
    const bool open = gate <= kOwn || (gate == kTogether && fired) ||
                      (gate == kCausal && waited >= 0 && waited < window);
    if (t < c.T) p.open[b * c.T + t] = open;
    since = simt::shfl(waited, simt::kWarpSize - 1);
  }
  int after = before;
  if (gate == kCausal) after = since;
  if (gate == kPrompt) {
    if (before == kUndecided && readable) after = some ? 0 : kNever;
    for (int64_t t = lane; t < c.T; t += simt::kWarpSize) p.open[b * c.T + t] = after >= 0;
  }
  if (lane == 0) c.state_after[b] = after;
}

// What entry e adds its direction with, 0: nothing.
DEVICE float increment(const SteerParams& p, int64_t b, int64_t t, int64_t e) {
  const Steer& c = p.call;
  const bool writes = !c.writes || c.writes[b * c.T + t];
  const bool open = p.open[b * c.T + t] && (c.gates[2 * b] != kOwn || fires(p, b, t, e));
  const float strength = c.amounts[3 * e], level = c.amounts[3 * e + 1];
  if (!writes || !open || strength == 0.0f) return 0.0f;
  const int latent = c.latents[e];
  if (!is_direction(c, latent)) return __builtin_nanf("");
  const float f = p.code[e * c.T + t], q = p.along[e * c.T + t], size = c.tables[3 * latent + 2];
  float u = 1.0f;
  switch (c.modes[e]) {
    case kAblate: u = -f; break;
    case kClamp: u = level - f; break;
    case kMinClamp: u = level - f > 0.0f ? level - f : 0.0f; break;
    case kScale: u = (level - 1.0f) * f; break;
    case kProject: u = (level - 1.0f) * q / size; break;
    case kCap: u = (level - q < 0.0f ? level - q : 0.0f) / size; break;
    default: break;
  }
  return strength * u;
}

constexpr int kSteered = 128;  // entries in shared memory

struct SteerShared {
  float amount[kSteered];
  int latent[kSteered];
};

// A block per token.
template <int kV>
KERNEL_BOUNDS(kMostThreads, 2)
void add_directions_kernel(SteerParams p) {
  SteerShared* s = simt::shared<SteerShared>();
  const Steer& c = p.call;
  const int threads = simt::block_dim();
  for (int64_t n = simt::block_idx(); n < c.B * c.T; n += simt::grid_dim()) {
    const int64_t b = n / c.T, t = n % c.T;
    for (int64_t first = 0; first < c.D; first += threads * kV) {
      const int64_t d = first + simt::thread_idx() * kV;
      float x[kV] = {};
      bool moved = false;
      if (d < c.D) load_any(tokens_of(c), n, d, x);
      for (int64_t from = c.offsets[b]; from < c.offsets[b + 1]; from += kSteered) {
        const int count = static_cast<int>(least(c.offsets[b + 1] - from, kSteered));
        simt::sync_block();
        for (int i = simt::thread_idx(); i < count; i += threads) {
          s->amount[i] = increment(p, b, t, from + i);
          s->latent[i] = is_direction(c, c.latents[from + i]) ? c.latents[from + i] : 0;
        }
        simt::sync_block();
        if (d >= c.D) continue;
        for (int i = 0; i < count; ++i) {
          const float amount = s->amount[i];
          if (amount == 0.0f) continue;
          moved = true;
          float direction[kV];
          load_any(c.decoder, s->latent[i], d, direction);
          UNROLL
          for (int j = 0; j < kV; ++j) x[j] += amount * direction[j];
        }
      }
      if (d >= c.D) continue;
      const int64_t at = n * c.D + d, size = c.type == DType::kFloat32 ? 4 : 2;
      UNROLL
      for (int j = 0; j < kV; ++j) {
        if (moved) {
          store_any(c.out, c.type, at + j, x[j]);
        } else if (size == 4) {
          static_cast<uint32_t*>(c.out)[at + j] = static_cast<const uint32_t*>(c.x)[at + j];
        } else {
          static_cast<uint16_t*>(c.out)[at + j] = static_cast<const uint16_t*>(c.x)[at + j];
        }
      }
    }
  }
}

SteerParams steer_params(Arena& memory, const Steer& c) {
  return {c, memory.take<float>(c.entries * c.T), memory.take<float>(c.entries * c.T),
          memory.take<uint8_t>(c.B * c.T)};
}

}  // namespace

int64_t workspace(const Steer& call) {
  Arena arena(nullptr);
  steer_params(arena, call);
  return arena.bytes();
}

Status run(const Steer& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  const SteerParams p = steer_params(arena, call);
  constexpr int kWide = 8;
  const bool wide = is_wide(call.x, call.D, call.type, call.D, kWide) &&
                    is_wide(call.decoder, call.D, kWide) && is_wide(call.encoder, call.D, kWide);
  by_width<simt::bf16>(wide, [&](auto v) {
    constexpr int kV = decltype(v)::value;
    launches.add(read_codes_kernel<kV>, taking_turns(call.B * call.T), kThreads, 0, p);
    launches.add(open_gates_kernel, ceil_div(call.B, kWarps), kThreads, 0, p);
    launches.add(add_directions_kernel<kV>, taking_turns(call.B * call.T),
                 row_shape(call.D, kV).threads, sizeof(SteerShared), p);
  });
  return launches.status();
}

}  // namespace gemma_ext::sae::cuda
