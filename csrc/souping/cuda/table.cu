// SPDX-License-Identifier: Apache-2.0
#include "table.h"

#include <string.h>

namespace gemma_ext::souping::cuda {
namespace {

struct alignas(16) TableWord {
  uint32_t part[4];
};

constexpr int kTableWords = 254;  // with the rest all of the 4096 bytes that parameters may have

struct WriteParams {
  TableWord* to;
  int count;
  TableWord words[kTableWords];
};
static_assert(sizeof(WriteParams) <= 4096);

constexpr int kWriteThreads = 256;

KERNEL void write_table_kernel(const GRID_CONSTANT WriteParams p) {
  const int i = simt::thread_idx();
  if (i < p.count) p.to[i] = p.words[i];
}

Array moved(const Array& a, int64_t elements) {
  if (a.data == nullptr) return a;
  return {static_cast<const char*>(a.data) + elements * size_of(a.type), a.type};
}

}  // namespace

std::vector<int64_t> chunks_before(const Table& t, int64_t grain) {
  std::vector<int64_t> first(t.parts + 1, 0);
  for (int64_t p = 0; p < t.parts; ++p) {
    const int64_t begin = t.part[p].offset, end = begin + t.part[p].numel;
    first[p + 1] = first[p] + (end > begin ? ceil_div(end, grain) - begin / grain : 0);
  }
  return first;
}

std::vector<Run> runs_of(const Table& t, bool wide) {
  std::vector<Run> runs;
  for (int64_t p = 0; p < t.parts; ++p) {
    const bool here = is_wide(wide, t.out[p]);
    if (runs.empty() || runs.back().wide != here) runs.push_back({{p, p}, here});
    runs.back().parts.to = p + 1;
  }
  return runs;
}

void Upload::copy(uintptr_t to, const void* from, int64_t bytes) {
  if (!launches_ || bytes == 0) return;
  if (image_.empty()) begin_ = to;
  const int64_t at = static_cast<int64_t>(to - begin_);
  image_.resize(ceil_div(at + bytes, 16) * 16);
  memcpy(&image_[at], from, bytes);
}

Plan Upload::add(const Table& t, int64_t grain, const std::vector<int64_t>& first,
                 const std::vector<int64_t>* origin) {
  Plan plan{t, grain, add(first), origin ? add(*origin) : nullptr};
  plan.table.part = add(t.part, t.parts);
  plan.table.source = add(t.source, t.parts * t.models);
  plan.table.base = add(t.base, t.parts);
  plan.table.extra = add(t.extra, t.parts * t.extras);
  plan.table.out = add(t.out, t.parts);
  plan.table.model = add(t.model, t.parts * t.models);
  return plan;
}

// By parameters of kernels, which a graph keeps, or where that would be a millisecond of launches by a copy.
void Upload::send() const {
  const int64_t bytes = static_cast<int64_t>(image_.size()), most = 1 << 20;
  if (bytes > most) return launches_->copy_in(reinterpret_cast<void*>(begin_), &image_[0], bytes);
  constexpr int64_t kStep = int64_t{kTableWords} * sizeof(TableWord);
  for (int64_t at = 0; at < bytes; at += kStep) {
    WriteParams p{};
    p.to = reinterpret_cast<TableWord*>(begin_ + at);
    p.count = static_cast<int>(least(kStep, bytes - at) / int64_t{sizeof(TableWord)});
    memcpy(p.words, &image_[at], p.count * sizeof(TableWord));
    launches_->add(write_table_kernel, 1, kWriteThreads, 0, p);
  }
}

Split::Split(const Table& t, int64_t most_elements) {
  for (int64_t p = 0; p < t.parts; ++p) {
    const Part& whole = t.part[p];
    const int64_t step = most(most_elements / whole.width, 1) * whole.width;
    for (int64_t at = 0; at < whole.numel; at += step) {
      part.push_back({least(step, whole.numel - at), whole.offset + at, whole.width,
                      whole.row + at / whole.width, whole.key});
      for (int m = 0; m < t.models; ++m) {
        source.push_back(moved(t.source[p * t.models + m], at));
        model.push_back(t.model[p * t.models + m]);
      }
      base.push_back(moved(t.base[p], at));
      for (int x = 0; x < t.extras; ++x) extra.push_back(moved(t.extra[p * t.extras + x], at));
      if (t.out) out.push_back(moved(t.out[p], at));
      origin.push_back(p);
    }
  }
}

Table Split::table(const Table& whole) const {
  Table t = whole;
  t.parts = static_cast<int64_t>(part.size());
  t.part = part.data();
  t.source = source.data();
  t.base = base.data();
  t.extra = extra.data();
  t.out = whole.out ? out.data() : nullptr;
  t.model = model.data();
  return t;
}

}  // namespace gemma_ext::souping::cuda
