// SPDX-License-Identifier: Apache-2.0
// What the op binding calls: plain structs of device pointers, no torch and no CUDA header.
//
// Every call only enqueues kernels on `stream`: no allocation, no synchronisation, the same launches
// whatever the data, so it may be captured into a graph. Temporary memory is the caller's, as many bytes
// as the *_workspace function of the same struct says (pointers may still be null there). All results
// are the same bits in every run.
#pragma once

#include <stdint.h>

#include "../params.h"

namespace gemma_ext::cce::cuda {

using Stream = void*;  // cudaStream_t
using Status = int;    // cudaError_t

// Rows of e and c start at multiples of 16 bytes and hold whole multiples of 16 bytes.
struct Head {
  const void *e, *c;
  int e_stride, c_stride;  // elements between rows
  DType dtype;
  const void* targets;
  int64_t target_stride;
  bool wide_targets;          // int64, else int32
  const float* bias;          // [V] or null
  const float* class_weight;  // [V] or null
  const int64_t* order;       // [V] or null
  int64_t N, V, D;            // V < 2^31
  LogitMap map;
  int64_t ignore_index;
  bool allow_missing;  // a label outside [0, V) has no target here; otherwise its nll is NaN
};

// [N] each, at the rows of e; null where not wanted, but for nll and lse.
struct RowOutputs {
  float *nll, *lse, *mean, *class_sum;
  int64_t* argmax;
};

struct Forward {
  Head head;
  RowOutputs out;
  float* stats;        // [3 or, with out.mean, 4; tiles, N]: max, sum, slope, weighted; or null
  double* summary;     // [4]: kept fraction, dropped mass (mean, max), eps
  double eps;          // 0: keep all, kAutoEps: choose; looked at with stats only
  int64_t copy_bytes;  // bound on the copy of tiles of c in another order; at least one is held
  // Where set, room for [tiles, strip_rows, kTile] in the head's dtype: exp(s - max) ds/da T of compact rows,
  // zero behind the last; a 16-bit head in its own order on Hopper only.
  void* strips;
  int64_t strip_rows;
  void* workspace;
};

// [N] each, at the rows of e.
struct Upstream {
  const float *nll, *lse, *mean;  // of the forward; mean only with d_mean
  const float *d_nll, *d_lse;
  const float *d_mean, *d_class;  // or null
};

// Null where not wanted.
struct Gradients {
  void *de, *dc;  // contiguous [N, D] and [V, D] in the head's dtype
  float* dbias;   // [V]
};

struct Backward {
  Head head;
  Upstream up;
  const float* stats;     // of the forward
  const double* summary;  // of the forward; null keeps every strip
  const float* prob;      // [V] profile or null
  Gradients out;
  int64_t strip_bytes;  // bound on the memory for gradient strips; at least one tile's are held
  void* workspace;
};

// loss = sum_n nll_coef nll + lse2_coef lse^2 with its gradients, every strip kept.
struct Fused {
  Head head;
  const float *nll_coef, *lse2_coef;  // [N]
  float *loss, *nll, *lse;            // [1], [N], [N]
  Gradients out;
  int64_t strip_bytes;
  void* workspace;
};

// Over at most about max_rows rows spread evenly: how often p >= eps, and the sum of p, per column.
struct ColumnStats {
  Head head;
  const float* lse;  // [N]
  float eps;
  int64_t max_rows;
  float *count, *prob;  // [V]
  void* workspace;
};

constexpr double kAutoEps = -1;
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t tiles_of(int64_t vocab) { return ceil_div(vocab, kTile); }

int64_t forward_workspace(const Forward&);
int64_t backward_workspace(const Backward&);
int64_t fused_workspace(const Fused&);
int64_t column_stats_workspace(const ColumnStats&);

Status forward(const Forward&, Stream);
Status backward(const Backward&, Stream);
Status fused(const Fused&, Stream);
Status column_stats(const ColumnStats&, Stream);

const char* status_text(Status);

}  // namespace gemma_ext::cce::cuda
