// SPDX-License-Identifier: Apache-2.0
// A call's table on the device, its parts cut into chunks.
#pragma once

#include <vector>

#include "launches.h"

namespace gemma_ext::souping::cuda {

// Positions of a chunk where nothing asks for another number: 4 octets for each of 256 threads.
constexpr int64_t kChunk = 2 * kBlock;

// Device pointers in the table. A chunk holds the positions of one part between two multiples of `grain`.
struct Plan {
  Table table;
  int64_t grain;
  const int64_t* first;   // [T + 1] chunks before each part
  const int64_t* origin;  // [T] or null: part of the call that each was cut from
};

// Chunks [from, to) of a plan, in order.
struct Range {
  int64_t from, to;

  HOST_DEVICE int64_t size() const { return to - from; }
};

// Chunks before each part, [T + 1].
std::vector<int64_t> chunks_before(const Table&, int64_t grain);

// Parts next to each other whose results are computed in float64, or in float32.
struct Run {
  Range parts;
  bool wide;
};
std::vector<Run> runs_of(const Table&, bool wide);

// What lies on the host, one behind the other in the workspace. Without launches only the size is of use.
class Upload {
 public:
  Upload(Arena& arena, Launches* launches) : arena_(arena), launches_(launches) {}

  // Null stays null.
  template <class T>
  T* add(const T* from, int64_t count) {
    if (from == nullptr) return nullptr;
    T* to = arena_.take<T>(count);
    copy(reinterpret_cast<uintptr_t>(to), from, count * int64_t{sizeof(T)});
    return to;
  }
  template <class T>
  T* add(const std::vector<T>& from) {
    return add(from.data(), static_cast<int64_t>(from.size()));
  }
  Plan add(const Table&, int64_t grain, const std::vector<int64_t>& first,
           const std::vector<int64_t>* origin = nullptr);

  // After the last add; nothing else may have been taken from the arena since the first.
  void send() const;

 private:
  void copy(uintptr_t to, const void* from, int64_t bytes);

  Arena& arena_;
  Launches* launches_;
  uintptr_t begin_ = 0;
  std::vector<uint8_t> image_;
};

// A table whose parts are cut between rows, into at most `most` elements or one row each.
struct Split {
  std::vector<Part> part;
  std::vector<Array> source, base, extra, out;
  std::vector<uint32_t> model;
  std::vector<int64_t> origin;

  Split(const Table&, int64_t most);
  Table table(const Table& whole) const;
};

}  // namespace gemma_ext::souping::cuda
