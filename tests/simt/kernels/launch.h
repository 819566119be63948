// SPDX-License-Identifier: Apache-2.0
// Launchers as a library would write them: the same text for both backends.
#pragma once

#include "async.h"
#include "execution.h"

simt::Status launch_sum(const float* x, float* sum, int n, simt::Stream stream) {
  return simt::launch(sum_kernel, 3, 128, 4 * sizeof(float), stream, {x, sum, n});
}

simt::Status launch_multicast(const simt::bf16* in, simt::bf16* out, simt::Stream stream) {
  ClusterParams p;
  p.out = out;
  const simt::Status status = simt::make_tensor_map<simt::bf16, 2>(
      &p.in, in, {kTileColumns, 2 * kTileRows}, {kTileColumns * 2}, {kTileColumns, 8},
      simt::Swizzle::k128B);
  if (status != simt::Status{}) return status;
  return simt::launch_cluster(multicast_kernel, 4, 64, 2, kTileBytes + 2 * sizeof(simt::Mbarrier),
                              stream, p);
}
