// SPDX-License-Identifier: Apache-2.0
// Entries above their features' limits: what passes goes to its row's list while products are in registers, and each
// list is sorted. Lists of the length that is needed wait once, for how long they are; where a row was longer than
// there was room for, products are made again, straight to the whole list.
#include "ordered.cuh"
#include "topk.cuh"

namespace gemma_ext::sae::cuda {
namespace {

struct ThresholdParams {
  EncodeParams encode;
  const float* limit;
  bool inclusive;
  Candidate* fresh;  // [N, room]
  int room;
  int *count, *first_nan;  // [N] above, [N] the first NaN, or F
  int64_t* counts;         // [N] both
  int64_t capacity;        // of rows, or -1: by offsets
  const int64_t* offsets;
  float* values;
  int32_t* indices;
  uint8_t* rooms;  // to sort in, or null: in shared memory
  int sort_size;
  Entry* all;  // everything goes here, or null
  int* all_count;
  int* longest;  // [1]
};

class LimitVisitor {
 public:
  struct Eight : EightFeatures {
    float limit[kEight];
    DEVICE Eight(const LimitVisitor& v, const Columns& at)
        : EightFeatures(v.p_.encode.encoder, at) {
      UNROLL
      for (int i = 0; i < kEight; ++i)
        limit[i] = inside(v.p_.encode.encoder, i) ? v.p_.limit[feature(i)] : __builtin_huge_valf();
    }
  };
  struct Row {
    int local;
    int64_t n;
    DEVICE Row(const LimitVisitor& v, int row) : local(row), n(v.first_row_ + row) {}
  };

  DEVICE LimitVisitor(const ThresholdParams& p, int64_t first_row, int first_column,
                      uint8_t* shared, int warp)
      : p_(p), first_row_(first_row), first_column_(first_column), queue_(shared, warp) {}

  DEVICE void visit(const Eight& eight, const Row& row, const float (&x)[kEight]) {
    const Encoder& e = p_.encode.encoder;
    float p[kEight];
    bool some = false;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      p[i] = x[i] + eight.bias[i];
      some |= !(p[i] * eight.scale[i] < eight.limit[i]);
    }
    if (!simt::any(some)) return;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      const float score = p[i] * eight.scale[i];
      const bool inside = row.n < e.N && eight.inside(e, i);
      if (inside && score != score && eight.feature(i) < p_.first_nan[row.n])
        simt::atomic_min(&p_.first_nan[row.n], eight.feature(i));
      const bool hit = inside && (p_.inclusive ? score >= eight.limit[i] : score > eight.limit[i]);
      queue_.push(hit, 0, row.local, eight.column(i), p[i]);
    }
    if (queue_.is_full()) drain();
  }
  DEVICE void end() {
    if (!queue_.is_empty()) drain();
  }

 private:
  DEVICE void drain() {
    int begin = 0;
    if (p_.all) {
      if (simt::lane_idx() == 0) begin = simt::atomic_add(p_.all_count, queue_.count());
      begin = simt::shfl(begin, 0);
    }
    queue_.drain([&](int i, int, int row, int column, float x) {
      const int64_t n = first_row_ + row;
      const int feature = first_column_ + column;
      if (p_.all) {
        p_.all[begin + i] = {x, feature, static_cast<int>(n)};
        return;
      }
      const int at = simt::atomic_add(&p_.count[n], 1);
      if (at < p_.room) p_.fresh[n * p_.room + at] = {x, feature};
    });
  }

  const ThresholdParams& p_;
  int64_t first_row_;
  int first_column_;
  Queue queue_;
};

KERNEL_BOUNDS(kThreads, 4)
void open_counts_kernel(ThresholdParams p) {
  const int64_t n = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  if (n == 0) *p.longest = *p.all_count = 0;
  if (n >= p.encode.encoder.N) return;
  p.count[n] = 0;
  p.first_nan[n] = static_cast<int>(p.encode.encoder.F);
}

KERNEL_BOUNDS(kThreads, 4)
void close_counts_kernel(ThresholdParams p) {
  const int64_t n = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  if (n >= p.encode.encoder.N) return;
  if (p.count[n] > *p.longest) simt::atomic_max(p.longest, p.count[n]);
  p.counts[n] = p.count[n] + (p.first_nan[n] < p.encode.encoder.F);
}

// Of the whole list.
KERNEL_BOUNDS(kThreads, 4)
void add_nan_entries_kernel(ThresholdParams p) {
  const int64_t n = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  if (n >= p.encode.encoder.N || p.first_nan[n] >= p.encode.encoder.F) return;
  p.all[simt::atomic_add(p.all_count, 1)] = {__builtin_nanf(""), p.first_nan[n],
                                             static_cast<int>(n)};
}

// A block per row.
KERNEL_BOUNDS(kThreads, 4)
void write_rows_kernel(ThresholdParams p) {
  uint8_t* memory = p.rooms ? p.rooms + simt::block_idx() * SortRoom::bytes(p.sort_size)
                            : simt::shared<uint8_t>();
  SortRoom room = SortRoom::at(memory, p.sort_size);
  for (int64_t n = simt::block_idx(); n < p.encode.encoder.N; n += simt::grid_dim()) {
    const int64_t total = p.counts[n], begin = p.capacity < 0 ? p.offsets[n] : n * p.capacity;
    const int64_t end = p.capacity < 0 ? begin + total : begin + p.capacity;
    const bool fits = p.capacity < 0 || total <= p.capacity;
    const int listed = fits ? p.count[n] : 0, count = fits ? static_cast<int>(total) : 0;
    room.size = 1;
    while (room.size < count) room.size *= 2;
    simt::sync_block();
    for (int i = simt::thread_idx(); i < room.size; i += kThreads) {
      const Candidate c =
          i < listed ? p.fresh[n * p.room + i] : Candidate{__builtin_nanf(""), p.first_nan[n]};
      room.rank[i] = i < count ? uint64_t{0xffffffffu} - static_cast<uint32_t>(c.feature) : 0;
      room.p[i] = c.p;
    }
    simt::sync_block();
    sort(room);
    for (int64_t i = begin + simt::thread_idx(); i < end; i += kThreads) {
      const bool there = i - begin < count;
      p.values[i] = there ? room.p[i - begin] : fits ? 0.0f : __builtin_nanf("");
      p.indices[i] = there ? feature_of(room.rank[i - begin]) : 0;
    }
  }
}

constexpr int kRowRoom = 512;  // of a row of a list of the length that is needed
constexpr int kSortBlocks = 64;

struct ThresholdMemory {
  ThresholdParams p{};
  TopKMemory aux;

  ThresholdMemory(Arena& memory, const Threshold& call)
      : aux(aux_memory(memory, call.encoder, call.aux)) {
    const Encoder& e = call.encoder;
    p.encode.encoder = e;
    p.limit = call.limit;
    p.inclusive = call.inclusive;
    p.room = static_cast<int>(call.capacity < 0 ? least(e.F, kRowRoom) : call.capacity);
    p.fresh = memory.take<Candidate>(e.N * p.room);
    p.count = memory.take<int>(e.N);
    p.first_nan = memory.take<int>(e.N);
    p.all_count = memory.take<int>(1);
    p.longest = memory.take<int>(1);
    p.counts = call.counts;
    p.capacity = call.capacity;
    p.offsets = call.offsets;
    p.values = call.values;
    p.indices = call.indices;
    p.sort_size = SortRoom::size_for(p.room + 1);
    if (p.sort_size > kMostSorted)
      p.rooms = memory.take<uint8_t>(kSortBlocks * SortRoom::bytes(p.sort_size));
  }
};

void add_rows(Launches& launches, const ThresholdParams& p) {
  const int64_t blocks = taking_turns(p.encode.encoder.N);
  launches.add(write_rows_kernel, p.rooms ? least(blocks, kSortBlocks) : blocks, kThreads,
               p.rooms ? 0 : static_cast<int>(SortRoom::bytes(p.sort_size)), p);
}

ThresholdParams begin_threshold(Launches& launches, const ThresholdMemory& m) {
  const ThresholdParams& p = m.p;
  const Encoder& e = p.encode.encoder;
  add_topk(launches, m.aux);
  launches.add(open_counts_kernel, most(ceil_div(e.N, kThreads), 1), kThreads, 0, p);
  add_encode<LimitVisitor, kQueueBytes>(launches, p, e, 0, e.F);
  launches.add(close_counts_kernel, ceil_div(e.N, kThreads), kThreads, 0, p);
  return p;
}

}  // namespace

int64_t workspace(const Threshold& call) {
  Arena arena(nullptr);
  ThresholdMemory(arena, call);
  return arena.bytes();
}

Status run(const Threshold& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  add_rows(launches, begin_threshold(launches, ThresholdMemory(arena, call)));
  return launches.status();
}

Status run(const Threshold& call, void* memory, Stream stream, const AllocateEntries& allocate,
           const AllocateBytes& more) {
  Launches launches(stream);
  Arena arena(memory);
  ThresholdParams p = begin_threshold(launches, ThresholdMemory(arena, call));
  const Encoder& e = call.encoder;
  add_scan(launches, ScanParams<int64_t>{call.counts, call.offsets, e.N});
  int64_t nnz = 0;
  int longest = 0;
  launches.copy_out(&nnz, call.offsets + e.N, sizeof(nnz));
  launches.copy_out(&longest, p.longest, sizeof(longest));
  if (launches.status() != 0) return launches.status();
  const Entries entries = allocate(nnz);
  p.values = entries.values;
  p.indices = entries.indices;
  if (longest <= p.room) {
    add_rows(launches, p);
    return launches.status();
  }
  Arena size(nullptr);
  OrderMemory(size, nnz, e.F, e.N);
  size.take<Entry>(nnz);
  Arena whole(more(size.bytes()));
  const OrderMemory order(whole, nnz, e.F, e.N);
  p.all = whole.take<Entry>(nnz);
  add_encode<LimitVisitor, kQueueBytes>(launches, p, e, 0, e.F);
  launches.add(add_nan_entries_kernel, ceil_div(e.N, kThreads), kThreads, 0, p);
  add_order(launches, order,
            {p.all, p.all_count, nnz, e.N, entries.values, entries.indices, call.offsets});
  return launches.status();
}

}  // namespace gemma_ext::sae::cuda
