// SPDX-License-Identifier: Apache-2.0
#include "kernels/launch.h"

#include "check.h"

CASE(launchers) {
  const std::vector<float> x(500, 1.0f);
  float sum = 0;
  EXPECT(launch_sum(x.data(), &sum, 500, nullptr) == simt::Status{});
  EXPECT(sum == 500.0f);
  const std::vector<simt::bf16> in = check::values<simt::bf16>(2 * kTileRows * kTileColumns);
  std::vector<simt::bf16> out(4 * in.size());
  EXPECT(launch_multicast(in.data(), out.data(), nullptr) == simt::Status{});
  for (size_t i = 0; i < out.size(); ++i) EXPECT(out[i].bits == in[i % in.size()].bits);
}
