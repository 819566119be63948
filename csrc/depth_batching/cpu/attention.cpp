// SPDX-License-Identifier: Apache-2.0
// Rows and heads as tasks. How they are cut changes no bit of a result.
#include <string.h>

#include <algorithm>
#include <vector>

#include "engine.h"
#include "kernels.h"

namespace gemma_ext::depth_batching::cpu {
namespace {

constexpr int64_t kQueries = 32;  // of a task: their scores of a split are 32 KiB

int64_t part_floats(const AttendTask& t) {
  const Attention& a = *t.call;
  const int64_t width = (a.pool.width + kPad - 1) / kPad * kPad;
  return t.rows * (a.q_heads / a.pool.heads) * (kPartHead + width);
}

}  // namespace

void run(const RopeWrite& call, Workers& workers) {
  workers.run(call.places.n,
              [&](int64_t row, Scratch& s) { kernels().kv.rope_write(call, row, s); });
}

void run(const Attention& a, Workers& workers) {
  const Places& p = a.places;
  const int64_t row_bytes = a.q_heads * a.pool.width * size_of(a.pool.type);
  const int64_t most =
      std::max<int64_t>(1, kQueries * a.pool.heads / std::max<int64_t>(1, a.q_heads));
  std::vector<AttendTask> tasks;
  for (int64_t i = 0, rows; i < p.n; i += rows) {
    rows = 1;
    if (p.req[i] < 0) {
      memset(static_cast<char*>(a.out) + i * row_bytes, 0, row_bytes);
      continue;
    }
    while (i + rows < p.n && rows < most && follows(p, i + rows)) ++rows;
    for (int64_t head = 0; a.q_heads && head < a.pool.heads; ++head)
      tasks.push_back({&a, i, rows, head, a.sinks > 0 ? 0 : first_token(a, i) / kSplit,
                       p.pos[i + rows - 1] / kSplit + 1, nullptr});
  }
  // Few tasks are cut at the splits, so that all threads have some.
  constexpr int64_t kEach = 4;
  const bool cut = workers.threads() > 1 && int64_t(tasks.size()) < kEach * workers.threads();
  if (!cut) {
    // the longest first
    std::stable_sort(tasks.begin(), tasks.end(), [](const AttendTask& x, const AttendTask& y) {
      return (x.split1 - x.split0) * x.rows > (y.split1 - y.split0) * y.rows;
    });
    workers.run(tasks.size(), [&](int64_t t, Scratch& s) { kernels().kv.attend(tasks[t], s); });
    return;
  }
  int64_t floats = 0;
  for (const AttendTask& t : tasks) floats += (t.split1 - t.split0) * part_floats(t);
  std::vector<float> parts(floats);
  std::vector<AttendTask> pieces;
  float* next = parts.data();
  for (AttendTask& t : tasks) {
    t.parts = next;
    for (int64_t split = t.split0; split < t.split1; ++split, next += part_floats(t))
      pieces.push_back({&a, t.row0, t.rows, t.head, split, split + 1, next});
  }
  workers.run(pieces.size(), [&](int64_t t, Scratch& s) { kernels().kv.attend(pieces[t], s); });
  workers.run(tasks.size(), [&](int64_t t, Scratch&) { kernels().kv.join(tasks[t]); });
}

}  // namespace gemma_ext::depth_batching::cpu
