// SPDX-License-Identifier: Apache-2.0
// Sums over the tokens of each feature, and over all tokens.
#pragma once

#include "runs.cuh"

namespace gemma_ext::sae::cuda {

struct RunMemory {
  FeatureMemory features;
  float *parts, *masses;

  RunMemory(Arena& memory, const List& list, int64_t D, bool totals);
  RunParams params(const List&, int64_t D) const;
};

// From the entries by feature; without `place`, zeros where there are none. Sums of 16 bits are of the type of rows
// of 16 bits.
void add_sums(Launches&, RunParams, DType sums);

// along[f] = <S[f], W[f]> / |W[f]|^2 by the dots of the entries; 0 where W[f] is.
void add_along(Launches&, const RunParams&, const float* dots, float* along);

struct ColumnMemory {
  int64_t N, D, rows, shares;  // rows of a share
  float* parts;                // [shares, D]

  ColumnMemory(Arena& memory, int64_t N, int64_t D);
};

// to[d] = sum_n scale[n] rows[n, d].
void add_column_sums(Launches&, const ColumnMemory&, const Table& rows, const float* scale,
                     float* to);

}  // namespace gemma_ext::sae::cuda
