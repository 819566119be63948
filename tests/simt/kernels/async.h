// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/simt/simt.h"

constexpr int kTileRows = 16, kTileColumns = 64, kTileBytes = kTileRows * kTileColumns * 2;

struct TilesParams {
  simt::TensorMap in;   // bf16, 128B swizzle, box 64 x 16
  simt::TensorMap out;  // bf16, no swizzle, box 64 x 16
  int tiles_x, tiles_y;
};

enum class Slip { kNone, kNoFullWait, kNoEmptyWait, kWrongBytes, kNoReadWait };

// out = in, tile by tile: warp 0 loads two stages ahead, warp 1 unswizzles and stores.
template <Slip kSlip>
DEVICE void copy_tiles(const TilesParams& p) {
  constexpr int kStages = 2;
  uint8_t* s = simt::shared<uint8_t>();
  simt::bf16* s_out = simt::shared<simt::bf16>(kStages * kTileBytes);
  simt::Mbarrier* s_full = simt::shared<simt::Mbarrier>((kStages + 1) * kTileBytes);
  simt::Mbarrier* s_empty = s_full + kStages;
  const int lane = simt::lane_idx(), tiles = p.tiles_x * p.tiles_y;
  if (simt::thread_idx() == 0) {
    for (int i = 0; i < kStages; ++i) {
      simt::mbarrier_init(s_full + i, 1);
      simt::mbarrier_init(s_empty + i, 32);
    }
    simt::fence_mbarrier_init();
  }
  simt::sync_block();
  if (simt::warp_idx() == 0) {
    if (!simt::elect_one()) return;
    for (int i = 0; i < tiles; ++i) {
      const int stage = i % kStages, phase = (i / kStages) % 2;
      if (kSlip != Slip::kNoEmptyWait) simt::mbarrier_wait(s_empty + stage, phase ^ 1);
      simt::mbarrier_arrive_expect_tx(s_full + stage,
                                      kSlip == Slip::kWrongBytes ? kTileBytes + 16 : kTileBytes);
      simt::tma_load(s + stage * kTileBytes, p.in, s_full + stage, (i % p.tiles_x) * kTileColumns,
                     (i / p.tiles_x) * kTileRows);
    }
    return;
  }
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % kStages, phase = (i / kStages) % 2;
    if (kSlip != Slip::kNoFullWait) simt::mbarrier_wait(s_full + stage, phase);
    for (int j = lane; j < kTileRows * kTileColumns; j += 32) {
      s_out[j] =
          *reinterpret_cast<const simt::bf16*>(s + stage * kTileBytes + simt::swizzle128(2 * j));
    }
    simt::mbarrier_arrive(s_empty + stage);
    simt::fence_proxy_async();
    simt::sync_warp();
    if (lane == 0) {
      simt::tma_store(p.out, s_out, (i % p.tiles_x) * kTileColumns, (i / p.tiles_x) * kTileRows);
      simt::bulk_commit();
      if (kSlip != Slip::kNoReadWait || i + 1 == tiles) simt::bulk_wait_read<0>();
    }
    simt::sync_warp();
  }
}
KERNEL void copy_tiles_kernel(const GRID_CONSTANT TilesParams p) { copy_tiles<Slip::kNone>(p); }
KERNEL void copy_without_full_kernel(const GRID_CONSTANT TilesParams p) {
  copy_tiles<Slip::kNoFullWait>(p);
}
KERNEL void copy_without_empty_kernel(const GRID_CONSTANT TilesParams p) {
  copy_tiles<Slip::kNoEmptyWait>(p);
}
KERNEL void copy_wrong_bytes_kernel(const GRID_CONSTANT TilesParams p) {
  copy_tiles<Slip::kWrongBytes>(p);
}
KERNEL void copy_without_read_wait_kernel(const GRID_CONSTANT TilesParams p) {
  copy_tiles<Slip::kNoReadWait>(p);
}

struct DumpParams {
  simt::TensorMap in;
  uint32_t* out;  // the tile as it lies in shared memory
  int x, y, z;
  int bytes;
};

template <int kRank>
DEVICE void dump(const DumpParams& p) {
  uint32_t* s = simt::shared<uint32_t>();
  simt::Mbarrier* s_bar = simt::shared<simt::Mbarrier>(p.bytes);
  if (simt::thread_idx() == 0) {
    simt::mbarrier_init(s_bar, 1);
    simt::fence_mbarrier_init();
    simt::mbarrier_arrive_expect_tx(s_bar, p.bytes);
    if (kRank == 2) {
      simt::tma_load(s, p.in, s_bar, p.x, p.y);
    } else {
      simt::tma_load(s, p.in, s_bar, p.x, p.y, p.z);
    }
  }
  simt::sync_block();
  simt::mbarrier_wait(s_bar, 0);
  for (int i = simt::thread_idx(); i < p.bytes / 4; i += simt::block_dim()) p.out[i] = s[i];
}
KERNEL void dump_2d_kernel(const GRID_CONSTANT DumpParams p) { dump<2>(p); }
KERNEL void dump_3d_kernel(const GRID_CONSTANT DumpParams p) { dump<3>(p); }

struct AddParams {
  simt::TensorMap out;  // fp32, no swizzle, box 32 x 4
};

// Adds 100 * row + column + block to the tile.
KERNEL void add_tile_kernel(const GRID_CONSTANT AddParams p) {
  float* s = simt::shared<float>();
  for (int i = 0; i < 4; ++i) {
    s[32 * i + simt::lane_idx()] =
        static_cast<float>(100 * i + simt::lane_idx() + simt::block_idx());
  }
  simt::fence_proxy_async();
  simt::sync_warp();
  if (simt::elect_one()) {
    simt::tma_reduce_add(p.out, s, 0, 2);
    simt::bulk_commit();
    simt::bulk_wait<0>();
  }
}

struct ClusterParams {
  simt::TensorMap in;  // bf16, 128B swizzle, box 64 x 8: half a tile
  simt::bf16* out;     // [grid, 2, 16, 64]: two rounds
};

// Each of two blocks loads half of the tile and sends it to both, twice into the same place.
template <bool kSyncAtExit>
DEVICE void multicast(const ClusterParams& p) {
  uint8_t* s = simt::shared<uint8_t>();
  simt::Mbarrier* s_full = simt::shared<simt::Mbarrier>(kTileBytes);
  simt::Mbarrier* s_empty = s_full + 1;
  const int rank = simt::cluster_rank(), t = simt::thread_idx();
  if (t == 0) {
    simt::mbarrier_init(s_full, 1);
    simt::mbarrier_init(s_empty, simt::cluster_size());
    simt::fence_mbarrier_init();
  }
  simt::cluster_sync();
  for (int round = 0; round < 2; ++round) {
    if (t == 0) {
      simt::mbarrier_wait(s_empty, round ^ 1);
      simt::mbarrier_arrive_expect_tx(s_full, kTileBytes);
      simt::tma_load_multicast(s + rank * kTileBytes / 2, p.in, s_full, 3, 0,
                               kTileRows * round + 8 * rank);
    }
    simt::mbarrier_wait(s_full, round);
    for (int i = t; i < kTileRows * kTileColumns; i += simt::block_dim()) {
      p.out[(2 * simt::block_idx() + round) * kTileRows * kTileColumns + i] =
          *reinterpret_cast<const simt::bf16*>(s + simt::swizzle128(2 * i));
    }
    simt::sync_block();
    if (t < 2) simt::mbarrier_arrive_remote(s_empty, t);
  }
  if (kSyncAtExit) simt::cluster_sync();
}
KERNEL void multicast_kernel(const GRID_CONSTANT ClusterParams p) { multicast<true>(p); }
KERNEL void multicast_without_exit_sync_kernel(const GRID_CONSTANT ClusterParams p) {
  multicast<false>(p);
}

struct PeerParams {
  int* out;  // [grid]
};

KERNEL void peer_kernel(PeerParams p) {
  int* s = simt::shared<int>();
  if (simt::thread_idx() == 0) *s = 10 + simt::block_idx();
  simt::cluster_sync();
  if (simt::thread_idx() == 0) {
    const int next = (simt::cluster_rank() + 1) % simt::cluster_size();
    p.out[simt::block_idx()] = *simt::map_shared(s, next);
  }
  simt::cluster_sync();
}

KERNEL void mbarrier_without_init_kernel(PeerParams) {
  simt::mbarrier_wait(simt::shared<simt::Mbarrier>(), 1);
}
KERNEL void mbarrier_overflow_kernel(PeerParams) {
  simt::Mbarrier* s_bar = simt::shared<simt::Mbarrier>();
  if (simt::lane_idx() == 0) simt::mbarrier_init(s_bar, 33);
  simt::sync_warp();
  simt::mbarrier_arrive_expect_tx(s_bar, 16);
  simt::mbarrier_arrive(s_bar);
}
