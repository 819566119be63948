// SPDX-License-Identifier: Apache-2.0
// Sums in float64 in the order that contract.h fixes.
#pragma once

#include "stages.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

// Halves are added until one strand is left; the strands are 0 afterwards.
inline double close_block(double* strands) {
  for (int64_t half = kStrands / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) strands[i] = strands[i] + strands[i + half];
  const double sum = strands[0];
  memset(strands, 0, kStrands * sizeof(double));
  return sum;
}

// strands += a b of n elements, the first of which is of strand `first`.
inline void add_products(const double* __restrict a, const double* __restrict b, int first, int n,
                         double* __restrict strands) {
  int i = 0;
  for (; i < n && (first + i) % kStrands; ++i) {
    double& strand = strands[(first + i) % kStrands];
    strand = strand + a[i] * b[i];
  }
  for (; i + kStrands <= n; i += kStrands)
    for (int j = 0; j < kStrands; ++j) strands[j] = strands[j] + a[i + j] * b[i + j];
  for (int j = 0; i + j < n; ++j) strands[j] = strands[j] + a[i + j] * b[i + j];
}

inline void add_values(const double* __restrict a, int first, int n, double* __restrict strands) {
  int i = 0;
  for (; i < n && (first + i) % kStrands; ++i) {
    double& strand = strands[(first + i) % kStrands];
    strand = strand + a[i];
  }
  for (; i + kStrands <= n; i += kStrands)
    for (int j = 0; j < kStrands; ++j) strands[j] = strands[j] + a[i + j];
  for (int j = 0; i + j < n; ++j) strands[j] = strands[j] + a[i + j];
}

inline double largest(const double* __restrict x, int n, double least) {
  double top[8] = {least, least, least, least, least, least, least, least};
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) top[j] = x[i + j] > top[j] ? x[i + j] : top[j];
  for (; i < n; ++i) top[0] = x[i] > top[0] ? x[i] : top[0];
  for (int j = 1; j < 8; ++j) top[0] = top[j] > top[0] ? top[j] : top[0];
  return top[0];
}

// A run inside one block.
void add_step(const Table& t, Sum sum, const Run& run, const Kept& mask, int64_t at, int n,
              int first, double* strands, double* top, Scratch& s) {
  const Deltas<double> d(t, run.part, at, n, s);
  const int models = t.models;
  if (sum == Sum::kGram) {
    for (int i = 0; i < models; ++i)
      for (int j = i; j < models; ++j, strands += kStrands)
        add_products(d.at[i], d.at[j], first, n, strands);
    return;
  }
  double* __restrict more = scratch<double>(s, kValues, 2 * kStep);
  double* __restrict size = more + kStep;
  if (sum == Sum::kDots) {
    const float* along = widen(t.extra[run.part * t.extras], at, n, reinterpret_cast<float*>(size));
    for (int i = 0; i < n; ++i) more[i] = double(along[i]);
    for (int m = 0; m < models; ++m) add_products(d.at[m], more, first, n, strands + m * kStrands);
    return;
  }
  for (int m = 0; m < models; ++m, strands += 4 * kStrands, top += 2) {
    const double* __restrict delta = d.at[m];
    const uint8_t* __restrict kept =
        mask.kept ? mask.kept + m * mask.stride + (at - mask.begin) : nullptr;
    for (int i = 0; i < n; ++i) size[i] = delta[i] == delta[i] ? fabs(delta[i]) : 0.0;
    for (int i = 0; i < n; ++i) more[i] = !kept || kept[i] ? size[i] : 0.0;
    add_values(size, first, n, strands);
    add_products(size, size, first, n, strands + kStrands);
    add_values(more, first, n, strands + 2 * kStrands);
    add_products(more, more, first, n, strands + 3 * kStrands);
    top[0] = largest(size, n, top[0]);
    top[1] = largest(more, n, top[1]);
  }
}

void sums(const Table& t, Sum sum, const Run& run, const Kept& mask, const Partial& p, Scratch& s) {
  const int64_t quantities = sums_of(sum, t.models), offset = t.part[run.part].offset;
  for (int64_t at = run.begin, end = run.begin + run.count; at < end;) {
    const int64_t position = offset + at;
    const int n = int(least(least(kStep - position % kStep, kBlock - position % kBlock), end - at));
    add_step(t, sum, run, mask, at, n, int(position % kStrands), p.strands, p.top, s);
    at += n;
    if ((offset + at) % kBlock) continue;
    for (int64_t q = 0; q < quantities; ++q)
      p.span[q] = p.span[q] + close_block(p.strands + q * kStrands);
  }
}

void gram_rows(const GramRows& call, const Run& run, Scratch& s) {
  const Table& t = call.table;
  const int models = t.models;
  const int64_t width = t.part[run.part].width, count = sums_of(Sum::kGram, models);
  double* strands = scratch<double>(s, kOther, count * (kStrands + 2));
  double *span = strands + count * kStrands, *total = span + count;
  for (int64_t row = run.begin / width; row < (run.begin + run.count) / width; ++row) {
    memset(strands, 0, count * (kStrands + 2) * sizeof(double));
    for (int64_t done = 0; done < width;) {
      const int n = int(least(kStep, width - done));
      add_step(t, Sum::kGram, run, {}, row * width + done, n, 0, strands, nullptr, s);
      done += n;
      for (int64_t q = 0; q < count && done % kBlock == 0; ++q)
        span[q] = span[q] + close_block(strands + q * kStrands);
      for (int64_t q = 0; q < count && done % kSpan == 0; ++q) {
        total[q] = total[q] + span[q];
        span[q] = 0;
      }
    }
    double* out = call.out + (t.part[run.part].row + row) * models * models;
    for (int64_t i = 0, q = 0; i < models; ++i)
      for (int64_t j = i; j < models; ++j, ++q)
        out[i * models + j] = out[j * models + i] =
            one_nan(total[q] + (span[q] + close_block(strands + q * kStrands)));
  }
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
