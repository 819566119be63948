// SPDX-License-Identifier: Apache-2.0
// Splits, then what joins them. Long launches are cut by rows, so that parts stay small.
#include "attend_mma.cuh"
#include "attend_plain.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

constexpr int kJoinThreads = 128, kJoinWarps = kJoinThreads / simt::kWarpSize;

// A warp per row and head; parts from left to right.
template <class T>
KERNEL_BOUNDS(kJoinThreads, 8)
void attend_join_kernel(AttendParams p) {
  const Attention& a = p.call;
  const Places& places = a.places;
  const int64_t unit = int64_t{simt::block_idx()} * kJoinWarps + simt::warp_idx();
  if (unit >= p.rows * a.q_heads) return;
  const int64_t row = p.row0 + unit / a.q_heads, head = unit % a.q_heads;
  const int width = static_cast<int>(a.pool.width), lane = simt::lane_idx();
  T* out = static_cast<T*>(a.out) + (row * a.q_heads + head) * width;
  bool valid = is_row(a, row);
  const int first = valid ? first_token(a, row) : 0, last = valid ? places.pos[row] : -1;
  const int begin = a.sinks > 0 ? 0 : first;
  bool outside = false;
  for (int page = begin / kPage + lane; page * kPage <= last; page += simt::kWarpSize) {
    const int32_t id = places.block_tables[places.req[row] * places.max_pages + page];
    outside |= id < 0 || id >= a.pool.pages;
  }
  valid = valid && !simt::any(outside);
  const float* parts = part_of(p, row, head, 0);
  for (int d = lane; d < width; d += simt::kWarpSize) {
    float most = kNothing, total = 0, sum = 0;
    for (int split = begin / kSplit; valid && split * kSplit <= last; ++split) {
      if (split * kSplit >= a.sinks && (split + 1) * kSplit <= first) continue;
      const float* part = parts + split * (kPartHead + a.pool.width);
      const float part_most = part[0], part_total = part[1];
      if (part_total == 0.0f) continue;
      const float top = part_most > most ? part_most : most;
      const float left = total == 0.0f ? 0.0f : simt::exp2_approx(most - top);
      const float right = simt::exp2_approx(part_most - top);
      sum = sum * left + part[kPartHead + d] * right;
      total = total * left + part_total * right;
      most = top;
    }
    const float nothing = places.req[row] == -1 ? 0.0f : __builtin_nanf("");
    out[d] = narrow<T>(valid ? sum / total : nothing);
  }
}

int splits_of(const Attention& a) {
  return static_cast<int>(ceil_div(a.places.max_pages * kPage, kSplit));
}

// Rows of a launch: their parts take 64 MiB at most.
int64_t rows_of(const Attention& a) {
  constexpr int64_t kBytes = int64_t{64} << 20;
  const int64_t row = a.q_heads * splits_of(a) * (kPartHead + a.pool.width) * sizeof(float);
  const int64_t rows = row > 0 && row < kBytes ? kBytes / row : 1;
  return rows < a.places.n ? rows : a.places.n;
}

// Rows at which a launch is likely to hold chunks, whose columns fill more tiles.
constexpr int64_t kChunks = 256;

template <class T, int kWidth>
void add_mma(Launches& launches, int64_t grid, const AttendParams& p, bool chunks) {
  if (chunks)
    launches.add(attend_mma_kernel<T, kWidth, 4>, grid, kMmaThreads,
                 sizeof(MmaShared<T, kWidth, 4>), p);
  else
    launches.add(attend_mma_kernel<T, kWidth, 1>, grid, kMmaThreads,
                 sizeof(MmaShared<T, kWidth, 1>), p);
}

template <class T>
void add_splits(Launches& launches, int64_t grid, const AttendParams& p) {
  const Attention& a = p.call;
  if constexpr (!std::is_same_v<T, float>) {
    const bool chunks = a.places.n >= kChunks;
    if (reinterpret_cast<uintptr_t>(a.pool.data) % 16 == 0) {
      switch (a.pool.width) {
        case 64: return add_mma<T, 64>(launches, grid, p, chunks);
        case 80: return add_mma<T, 80>(launches, grid, p, chunks);
        case 96: return add_mma<T, 96>(launches, grid, p, chunks);
        case 128: return add_mma<T, 128>(launches, grid, p, chunks);
        case 256: return add_mma<T, 256>(launches, grid, p, chunks);
        default: break;
      }
    }
  }
  launches.add(attend_plain_kernel<T>, grid, kPlainThreads, plain_shared(a.pool.width), p);
}

}  // namespace

int64_t workspace(const Attention& a) {
  return rows_of(a) * a.q_heads * splits_of(a) * (kPartHead + a.pool.width) * sizeof(float);
}

Status run(const Attention& a, void* memory, Stream stream) {
  Launches launches(stream);
  const int64_t each = rows_of(a), heads = a.pool.heads;
  if (a.q_heads == 0) return launches.status();
  by_dtype(a.pool.type, [&](auto like) {
    using T = decltype(like);
    for (int64_t row0 = 0; row0 < a.places.n; row0 += each) {
      const int64_t rows = a.places.n - row0 < each ? a.places.n - row0 : each;
      const AttendParams p{a, row0, rows, splits_of(a), static_cast<float*>(memory)};
      add_splits<T>(launches, rows * heads * ceil_div(a.q_heads / heads, kHeads) * p.splits, p);
      launches.add(attend_join_kernel<T>, ceil_div(rows * a.q_heads, kJoinWarps), kJoinThreads, 0,
                   p);
    }
  });
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
