// SPDX-License-Identifier: Apache-2.0
// The tile instructions as Intel's manual defines them, the products made of them against float64, and,
// where the processor has AMX, the emulation against the processor: the same bits.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <random>
#include <vector>

#include "common/cpu/gemm.h"
#include "common/cpu/isa.h"
#include "tile_products.h"

namespace amx = gemma_ext::cpu::amxemulated::amx;
using gemma_ext::bf16_to_float;
using gemma_ext::bits_of;
using gemma_ext::float_of;
using gemma_ext::float_to_bf16;

#define CHECK(condition)                                     \
  do {                                                       \
    if (!(condition)) {                                      \
      printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                               \
    }                                                        \
  } while (0)

amx::Config shape(int d_rows, int d_bytes, int a_bytes) {
  amx::Config config;
  config.rows[0] = config.rows[1] = d_rows;
  config.bytes[0] = config.bytes[2] = d_bytes;
  config.bytes[1] = a_bytes;
  config.rows[2] = a_bytes / 4;
  return config;
}

// d + a0 b0 + a1 b1 by one instruction.
float dot(float d, float a0, float b0, float a1, float b1) {
  const amx::Config config = shape(1, 4, 4);
  const uint16_t a[] = {float_to_bf16(a0), float_to_bf16(a1)};
  const uint16_t b[] = {float_to_bf16(b0), float_to_bf16(b1)};
  amx::configure(&config);
  amx::load(0, &d, 4);
  amx::load(1, a, 4);
  amx::load(2, b, 4);
  amx::dot(0, 1, 2);
  amx::store(0, &d, 4);
  amx::release();
  return d;
}

template <class Body>
bool faults(Body body) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    freopen("/dev/null", "w", stderr);
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status);
}

void test_one_product() {
  CHECK(dot(1, 2, 3, 4, 5) == 27);
  CHECK(dot(0, 0x1p-100f, 0x1p-26f, 0, 0) == 0x1p-126f);
  CHECK(dot(0, 0x1p-100f, 0x1p-27f, 0, 0) == 0);  // a denormal product
  CHECK(dot(0, 0x1p-127f, 0x1p30f, 0, 0) == 0);   // a denormal factor
  CHECK(dot(0x1p-127f, 1, 1, 0, 0) == 1);
  CHECK(dot(0x1p-127f, 0, 0, 0, 0) == 0);          // a denormal sum
  CHECK(dot(0x1p24f, 1, 1, 0, 0) == 0x1p24f);      // ties to even
  CHECK(dot(0x1p24f, 1, 1, 1, 1) == 0x1p24f + 2);  // both products are added first
  CHECK(dot(0x1p24f + 2, 1, 1, 0, 0) == 0x1p24f + 4);
  CHECK(isnan(dot(0, INFINITY, 0, 1, 1)));
}

void test_faults() {
  CHECK(!faults([] { dot(1, 1, 1, 1, 1); }));
  CHECK(faults([] { amx::zero(0); }));  // released above
  CHECK(faults([] {
    const amx::Config config = shape(17, 64, 64);
    amx::configure(&config);
  }));
  CHECK(faults([] {
    amx::Config config = shape(16, 64, 64);
    config.rows[3] = 4;
    amx::configure(&config);
  }));
  CHECK(faults([] {
    const amx::Config config = shape(16, 64, 64);
    amx::configure(&config);
    amx::zero(3);
  }));
  CHECK(faults([] {
    amx::Config config = shape(16, 64, 64);
    config.rows[2] = 8;
    amx::configure(&config);
    amx::dot(0, 1, 2);
  }));
}

struct Data {
  std::vector<uint16_t> a, b;
  std::vector<float> c;
};

// Every product of one shape: C between guards, and A and B with what lies behind k.
void test_products(int64_t rows, int64_t slices, int64_t k, bool accumulate, bool hardware) {
  std::mt19937 random(uint32_t(rows * 1009 + slices * 31 + k));
  std::normal_distribution<float> normal;
  const auto value = [&] { return float_to_bf16(normal(random) * ldexpf(1, int(random() % 5))); };
  const int64_t steps = (k + 31) / 32 * 32, stride = 256 + 32, ldc = slices * 32 + 3;
  Data data{std::vector<uint16_t>(rows * stride), std::vector<uint16_t>(slices * steps * 32),
            std::vector<float>(rows * ldc)};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < stride; ++i)
      data.a[r * stride + i] = i < k ? value() : i < steps ? 0 : 0x7fc0;
  for (int64_t s = 0; s < slices; ++s)
    for (int64_t i = 0; i < steps; ++i)
      for (int64_t n = 0; n < 32; ++n)
        data.b[s * steps * 32 + i / 2 * 64 + n * 2 + i % 2] = i < k ? value() : 0;
  for (float& x : data.c) x = normal(random);
  std::vector<float> out = data.c;
  Product p{rows,   slices,     k,          data.a.data(), data.b.data(),
            stride, steps * 32, out.data(), ldc,           accumulate};
  amxemulated::multiply(p);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < ldc; ++n) {
      const float before = data.c[r * ldc + n], got = out[r * ldc + n];
      if (n >= slices * 32) {
        CHECK(bits_of(got) == bits_of(before));
        continue;
      }
      double sum = accumulate ? before : 0, size = fabs(sum);
      for (int64_t i = 0; i < k; ++i) {
        const double term =
            double(bf16_to_float(data.a[r * stride + i])) *
            bf16_to_float(data.b[n / 32 * steps * 32 + i / 2 * 64 + n % 32 * 2 + i % 2]);
        sum += term;
        size += fabs(term);
      }
      CHECK(fabs(got - sum) <= 0x1p-23 * (2 + double(k) / 32) * size);
    }
  if (!hardware) return;
  std::vector<float> real = data.c;
  p.c = real.data();
  amxbf16::multiply(p);
  CHECK(memcmp(real.data(), out.data(), out.size() * sizeof(float)) == 0);
}

void test_transposition(int64_t rows) {
  std::vector<uint16_t> from(rows * 256), to((rows + 255) / 256 * 65536, 1);
  for (size_t i = 0; i < from.size(); ++i) from[i] = uint16_t(i * 40503);
  amxemulated::transpose(from.data(), rows, to.data());
  for (int64_t n = 0; n < (rows + 31) / 32 * 32; ++n)
    for (int64_t v = 0; v < 256; ++v)
      CHECK(to[n / 256 * 65536 + v * 256 + n % 256] == (n < rows ? from[n * 256 + v] : 0));
}

int main() {
  const int isa = gemma_ext::cpu::chosen_isa();
  const bool hardware = isa >= 0 && !strcmp(gemma_ext::cpu::isa_name(isa), "amxbf16");
  test_one_product();
  test_faults();
  for (int64_t rows : {1, 15, 16, 17, 31, 32, 33, 48, 49, 100, 256})
    for (int64_t k : {1, 2, 31, 32, 33, 255, 256})
      for (int64_t slices : {1, 2, 8}) test_products(rows, slices, k, (rows + k) % 2, hardware);
  for (int64_t rows : {1, 2, 31, 32, 33, 255, 256, 257, 600}) test_transposition(rows);
  puts(hardware ? "the processor agrees" : "no AMX here");
}
