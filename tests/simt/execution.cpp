// SPDX-License-Identifier: Apache-2.0
#include "kernels/execution.h"

#include <math.h>

#include <memory>
#include <set>

#include "check.h"

using check::expect_error;
using check::failures;

namespace {

template <class Kernel>
bool sums(Kernel kernel) {
  const int n = 1000;
  std::vector<float> x(n);
  float expected = 0, sum = 0;
  for (int i = 0; i < n; ++i) expected += x[i] = check::small_value(i);
  simt::launch(kernel, 3, 128, 4 * sizeof(float), nullptr, {x.data(), &sum, n});
  return sum == expected;
}

template <class Kernel>
bool queues(Kernel kernel) {
  const int rounds = 4;
  std::vector<int> out(rounds * 32, -1);
  simt::launch(kernel, 1, 64, 32 * sizeof(int), nullptr, {out.data(), rounds});
  for (int i = 0; i < rounds * 32; ++i) {
    if (out[i] != 1000 * (i / 32) + 31 - i % 32) return false;
  }
  return true;
}

template <class Kernel>
std::vector<int> run(Kernel kernel, int threads, int size, int shared_bytes = 0) {
  std::vector<int> out(size, 0);
  simt::launch(kernel, 1, threads, shared_bytes, nullptr, {out.data()});
  return out;
}

}  // namespace

CASE(sum) {
  EXPECT(failures(9, [] { return sums(sum_kernel); }) == 0);
}
CASE(sum_without_barrier) {
  EXPECT(failures(9, [] { return sums(sum_without_barrier_kernel); }) > 0);
}
CASE(queue) {
  EXPECT(failures(9, [] { return queues(queue_kernel); }) == 0);
}
CASE(queue_without_empty) {
  EXPECT(failures(9, [] { return queues(queue_without_empty_kernel); }) > 0);
}

CASE(warp_ops) {
  const int n = 64;
  const std::vector<int> out = run(warp_ops_kernel, n, 12 * n);
  std::set<int> leaders;
  for (int t = 0; t < n; ++t) {
    const int lane = t % 32, base = 100 + t - lane, first = lane < 16 ? t - lane : t - lane + 16;
    EXPECT(out[0 * n + t] == base + 5);
    EXPECT(out[1 * n + t] == base + (lane + 1) % 32);
    EXPECT(out[2 * n + t] == base + (lane < 3 ? lane : lane - 3));
    EXPECT(out[3 * n + t] == base + (lane > 28 ? lane : lane + 3));
    EXPECT(out[4 * n + t] == base + (lane ^ 1));
    EXPECT(static_cast<unsigned>(out[5 * n + t]) == 0x49249249u);
    EXPECT(static_cast<unsigned>(out[6 * n + t]) == (lane < 16 ? 0x5555u : 0x55550000u));
    EXPECT(out[7 * n + t] == 3);
    EXPECT(out[8 * n + t] == 32 * (t - lane) + 496);
    EXPECT(out[9 * n + t] == first - 40);
    EXPECT(out[10 * n + t] == first + 15 - 40);
    EXPECT(out[11 * n + t] == 0 || out[11 * n + t] == 3);
    if (out[11 * n + t] == 3) leaders.insert(t);
  }
  EXPECT(leaders.size() == 2 && *leaders.begin() < 32 && *leaders.rbegin() >= 32);
}

CASE(block_order_follows_the_seed) {
  std::set<std::vector<int>> orders;
  failures(6, [&] {
    int next = 0;
    std::vector<int> order(8, -1);
    simt::launch(order_kernel, 8, 32, 0, nullptr, {&next, order.data()});
    orders.insert(order);
    EXPECT(std::set<int>(order.begin(), order.end()).size() == 8);
    return true;
  });
  EXPECT(orders.size() > 1);
}

CASE(poison) {
  const std::vector<int> out = run(poison_kernel, 64, 64, 256);
  for (int word : out) {
    simt::bf16 half{static_cast<uint16_t>(word)};
    EXPECT(word == 0x7fa17fa1 && isnan(simt::to_float(half)));
  }
}

CASE(early_return) {
  const std::vector<int> out = run(early_return_kernel, 96, 40);
  for (int x : out) EXPECT(x == 1);
}

CASE(divergent_shuffle) {
  expect_error([] { run(divergent_shuffle_kernel, 32, 32); }, {"divergent", "shfl", "execution.h"});
}
CASE(divergent_mask) {
  expect_error([] { run(divergent_mask_kernel, 32, 32); }, {"divergent"});
}
CASE(divergent_barrier) {
  expect_error([] { run(divergent_barrier_kernel, 64, 1); }, {"divergent", "sync_block"});
}
CASE(exited_lane) {
  expect_error([] { run(exited_lane_kernel, 32, 32); }, {"lane 3", "has left the kernel"});
}
CASE(deadlock) {
  expect_error([] { run(deadlock_kernel, 64, 1); },
               {"deadlock", "threads 0-31", "threads 32-63", "barrier_sync at execution.h:"});
}
CASE(wrong_count) {
  expect_error([] { run(wrong_count_kernel, 64, 1); }, {"thread count", "disagrees"});
}
CASE(launch_bounds) {
  expect_error([] { run(out_of_bounds_kernel, 48, 48); }, {"whole warps"});
  expect_error([] { run(out_of_bounds_kernel, 32, 32, 1 << 20); }, {"shared memory"});
}
CASE(call_outside_a_kernel) {
  expect_error([] { simt::sync_block(); }, {"outside a kernel"});
}
CASE(asan_global) { run(out_of_bounds_kernel, 64, 63); }
CASE(asan_shared) { run(shared_out_of_bounds_kernel, 64, 64, 63 * 4); }
