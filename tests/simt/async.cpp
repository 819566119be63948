// SPDX-License-Identifier: Apache-2.0
#include "kernels/async.h"

#include "check.h"

using check::expect_error;
using check::failures;
using simt::bf16;
using simt::Swizzle;

namespace {

bool copies(void (*kernel)(TilesParams)) {
  // two tiles of columns and three of rows, both ragged; the output's rows are padded
  const int rows = 37, columns = 104, padded = 112;
  const std::vector<bf16> in = check::values<bf16>(rows * columns);
  std::vector<bf16> out(rows * padded, bf16{0x7777});
  TilesParams p;
  p.tiles_x = 2;
  p.tiles_y = 3;
  simt::make_tensor_map<bf16, 2>(&p.in, in.data(), {columns, rows}, {columns * 2},
                                 {kTileColumns, kTileRows}, Swizzle::k128B);
  simt::make_tensor_map<bf16, 2>(&p.out, out.data(), {columns, rows}, {padded * 2},
                                 {kTileColumns, kTileRows}, Swizzle::kNone);
  simt::launch(kernel, 1, 64, 3 * kTileBytes + 4 * sizeof(simt::Mbarrier), nullptr, p);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < padded; ++c) {
      if (out[padded * r + c].bits != (c < columns ? in[columns * r + c].bits : 0x7777))
        return false;
    }
  }
  return true;
}

bool multicasts(void (*kernel)(ClusterParams)) {
  const int tile = kTileRows * kTileColumns;
  const std::vector<bf16> in = check::values<bf16>(2 * tile);
  std::vector<bf16> out(4 * 2 * tile);
  ClusterParams p;
  p.out = out.data();
  simt::make_tensor_map<bf16, 2>(&p.in, in.data(), {kTileColumns, 2 * kTileRows},
                                 {kTileColumns * 2}, {kTileColumns, 8}, Swizzle::k128B);
  simt::launch_cluster(kernel, 4, 64, 2, kTileBytes + 2 * sizeof(simt::Mbarrier), nullptr, p);
  for (int i = 0; i < 4 * 2 * tile; ++i) {
    if (out[i].bits != in[i % (2 * tile)].bits) return false;
  }
  return true;
}

}  // namespace

CASE(copy_tiles) {
  EXPECT(failures(9, [] { return copies(copy_tiles_kernel); }) == 0);
}
CASE(copy_without_full) {
  EXPECT(failures(9, [] { return copies(copy_without_full_kernel); }) > 0);
}
CASE(copy_without_empty) {
  EXPECT(failures(9, [] { return copies(copy_without_empty_kernel); }) > 0);
}
CASE(copy_without_read_wait) {
  EXPECT(failures(9, [] { return copies(copy_without_read_wait_kernel); }) > 0);
}
CASE(copy_wrong_bytes) {
  expect_error(
      [] { copies(copy_wrong_bytes_kernel); },
      {"deadlock", "mbarrier_wait at async.h", "0 arrivals and 16 bytes", "threads 32-63"});
}

// 16-byte chunk c of row r lies at chunk c ^ (r % 8); what is outside the tensor is zero.
CASE(tma_swizzle) {
  const int rows = 12, columns = 72;
  const std::vector<uint16_t> raw = [] {
    std::vector<uint16_t> x(12 * 72);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i + 1);
    return x;
  }();
  std::vector<uint16_t> out(kTileRows * kTileColumns);
  DumpParams p = {};
  p.out = reinterpret_cast<uint32_t*>(out.data());
  p.x = 16;
  p.y = -2;
  p.bytes = kTileBytes;
  simt::make_tensor_map<bf16, 2>(&p.in, reinterpret_cast<const bf16*>(raw.data()), {columns, rows},
                                 {columns * 2}, {kTileColumns, kTileRows}, Swizzle::k128B);
  simt::launch(dump_2d_kernel, 1, 32, kTileBytes + 8, nullptr, p);
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < kTileColumns; ++c) {
      const int y = r - 2, x = c + 16;
      const uint16_t value = y >= 0 && y < rows && x < columns ? raw[columns * y + x] : 0;
      EXPECT(out[64 * r + ((c / 8) ^ (r % 8)) * 8 + c % 8] == value);
    }
  }
}

CASE(tma_3d) {
  const int64_t sizes[3] = {20, 5, 3};
  std::vector<float> in(20 * 5 * 3), out(8 * 4 * 2);
  for (size_t i = 0; i < in.size(); ++i) in[i] = i + 1.0f;
  DumpParams p = {};
  p.out = reinterpret_cast<uint32_t*>(out.data());
  p.x = 16;
  p.y = 2;
  p.z = 1;
  p.bytes = 8 * 4 * 2 * 4;
  simt::make_tensor_map<float, 3>(&p.in, in.data(), sizes, {80, 400}, {8, 4, 2}, Swizzle::kNone);
  simt::launch(dump_3d_kernel, 1, 32, p.bytes + 8, nullptr, p);
  for (int i = 0; i < 64; ++i) {
    const int x = 16 + i % 8, y = 2 + (i / 8) % 4, z = 1 + i / 32;
    EXPECT(out[i] == (x < 20 && y < 5 && z < 3 ? in[x + 20 * y + 100 * z] : 0.0f));
  }
}

CASE(tma_reduce_add) {
  std::vector<float> out(5 * 28, 0.5f);  // the box ends outside, at row 5 and column 28
  AddParams p;
  simt::make_tensor_map<float, 2>(&p.out, out.data(), {28, 5}, {112}, {32, 4}, Swizzle::kNone);
  simt::launch(add_tile_kernel, 3, 32, 512, nullptr, p);
  for (int i = 0; i < 5 * 28; ++i) {
    const int row = i / 28 - 2, column = i % 28;
    EXPECT(out[i] == (row < 0 ? 0.5f : 0.5f + 3 * (100 * row + column) + 3));
  }
}

CASE(tma_misaligned) {
  std::vector<float> out(32 * 4);
  AddParams p;
  const auto map = [&](int64_t stride, int box, Swizzle swizzle) {
    simt::make_tensor_map<float, 2>(&p.out, out.data(), {32, 4}, {stride}, {box, 4}, swizzle);
  };
  expect_error([&] { map(120, 32, Swizzle::kNone); }, {"stride"});
  expect_error([&] { map(128, 64, Swizzle::k128B); }, {"128B swizzle"});
}

CASE(multicast) {
  EXPECT(failures(9, [] { return multicasts(multicast_kernel); }) == 0);
}
CASE(multicast_without_exit_sync) {
  EXPECT(failures(9, [] { return multicasts(multicast_without_exit_sync_kernel); }) > 0);
}

CASE(peer_memory) {
  std::vector<int> out(8);
  simt::launch_cluster(peer_kernel, 8, 32, 4, 4, nullptr, {out.data()});
  for (int i = 0; i < 8; ++i) EXPECT(out[i] == 10 + i / 4 * 4 + (i + 1) % 4);
}

CASE(mbarrier_without_init) {
  expect_error([] { simt::launch(mbarrier_without_init_kernel, 1, 32, 8, nullptr, {}); },
               {"mbarrier_wait", "no mbarrier_init"});
}
CASE(mbarrier_overflow) {
  expect_error([] { simt::launch(mbarrier_overflow_kernel, 1, 32, 8, nullptr, {}); },
               {"more than the 33 arrivals"});
}
