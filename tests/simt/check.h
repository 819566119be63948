// SPDX-License-Identifier: Apache-2.0
// Cases of the host checker, run as `simt_tests --case NAME --seed S`.
#pragma once

#include <stdio.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/simt/simt.h"

namespace check {

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};
#define CASE(name)                                            \
  static void case_##name();                                  \
  static check::Register register_##name(#name, case_##name); \
  static void case_##name()

#define EXPECT(condition)                                                                        \
  do {                                                                                           \
    if (!(condition)) {                                                                          \
      throw std::logic_error(std::string("line ") + std::to_string(__LINE__) + ": " #condition); \
    }                                                                                            \
  } while (0)

// The launch must be refused, with every one of the words in its message.
template <class Run>
void expect_error(Run run, const std::vector<std::string>& words) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    const std::string message = error.what();
    for (const std::string& word : words) {
      if (message.find(word) == std::string::npos) {
        throw std::logic_error("'" + word + "' is not in: " + message);
      }
    }
    return;
  }
  throw std::logic_error("nothing was reported");
}

// In how many of `seeds` schedules the run gives false or is refused.
template <class Run>
int failures(int seeds, Run run) {
  const uint64_t seed = simt::host::options.seed;
  int failed = 0;
  for (int i = 0; i < seeds; ++i) {
    simt::host::options.seed = seed * seeds + i;
    try {
      failed += !run();
    } catch (const std::runtime_error&) {
      ++failed;
    }
  }
  simt::host::options.seed = seed;
  return failed;
}

// Small integers in [-8, 8): products and sums of these are exact in fp32, bf16 and fp16 alike.
inline float small_value(int i) {
  return static_cast<float>(static_cast<int>((static_cast<unsigned>(i) * 2654435761u) >> 28) - 8);
}

template <class T>
std::vector<T> values(int n, int salt = 0) {
  std::vector<T> x(n);
  for (int i = 0; i < n; ++i) x[i] = simt::from_float<T>(small_value(i + 7919 * salt));
  return x;
}

}  // namespace check
