// SPDX-License-Identifier: Apache-2.0
#include "depth_batching/cuda/attention.cu"
#include "depth_batching/cuda/propagate.cu"
#include "depth_batching/cuda/rope.cu"
#include "depth_batching/cuda/route.cu"

#include "sae_data.h"

namespace depth_test {
namespace {

using namespace gemma_ext::depth_batching;
namespace cuda = gemma_ext::depth_batching::cuda;
using sae_test::Array;
using sae_test::Random;
using sae_test::Storage;
using sae_test::value_of;

template <class Call>
void run(const Call& call) {
  const Array<uint8_t> memory(cuda::workspace(call));
  EXPECT(cuda::run(call, memory.data(), nullptr) == 0);
}

// One request of a chunk and one of a single token, at two loops of three depths; a row that fills up and one that
// leads out of the tables.
template <class T>
struct Problem {
  static constexpr int64_t kLoops = 2, kDepths = 3, kPages = 40, kMaxPages = 20;
  int64_t n, q_heads, heads, width;
  Array<int32_t> tables, req, pos, loop, depth_of;
  Array<T> q, pool, out;

  Problem(int64_t chunk, int64_t q_heads, int64_t heads, int64_t width, Random& random)
      : n(chunk + 3),
        q_heads(q_heads),
        heads(heads),
        width(width),
        tables(2 * kMaxPages),
        req(n),
        pos(n),
        loop(n),
        depth_of(kLoops),
        q(random.numbers<T>(n * q_heads * width, -1, 1)),
        pool(random.numbers<T>(kDepths * kPages * 2 * heads * kPage * width, -1, 1)),
        out(n * q_heads * width) {
    for (int64_t i = 0; i < 2 * kMaxPages; ++i) tables[i] = static_cast<int32_t>(39 - i);
    depth_of[0] = 2;
    depth_of[1] = 0;
    for (int64_t i = 0; i < n; ++i) {
      req[i] = i < chunk ? 1 : i == chunk ? 0 : i == chunk + 1 ? -1 : 7;
      pos[i] = static_cast<int32_t>(i < chunk ? 255 + i : 19);  // over the border of a split
      loop[i] = i < chunk;
    }
  }
  Places places() const {
    return {tables.data(), 2, kMaxPages, req.data(), pos.data(), loop.data(), n, kLoops};
  }
  Pool pages() const { return {pool.data(), Storage<T>::kType, kDepths, kPages, heads, width}; }
  double key(int64_t i, int t, int half, int64_t head, int64_t d) const {
    const int32_t page = tables[req[i] * kMaxPages + t / kPage];
    return value_of(
        pool[page_at(pages(), depth_of[loop[i]], page, half, head) + t % kPage * width + d]);
  }
};

template <class T>
void attention_matches(int64_t chunk, int64_t q_heads, int64_t heads, int64_t width,
                       Random& random) {
  const Problem<T> p(chunk, q_heads, heads, width, random);
  Array<int32_t> window(2);
  window[0] = 0;
  window[1] = 30;
  const float scale = 0.5f, softcap = 3.0f;
  const int32_t sinks = 3;
  run(Attention{{p.q.data(), q_heads * width},
                q_heads,
                p.pages(),
                p.places(),
                p.depth_of.data(),
                window.data(),
                scale,
                softcap,
                sinks,
                p.out.data()});
  const int64_t group = q_heads / heads;
  for (int64_t i = 0; i < p.n; ++i) {
    for (int64_t h = 0; h < q_heads; ++h) {
      const T* out = &p.out[(i * q_heads + h) * width];
      if (p.req[i] != 0 && p.req[i] != 1) {
        for (int64_t d = 0; d < width; ++d)
          EXPECT(p.req[i] < 0 ? value_of(out[d]) == 0 : std::isnan(value_of(out[d])));
        continue;
      }
      const int last = p.pos[i], first = p.loop[i] == 1 ? last - 29 : 0;
      std::vector<double> sums(width);
      double total = 0;
      for (int t = 0; t <= last; ++t) {
        if (t >= sinks && t < first) continue;
        double score = 0;
        for (int64_t d = 0; d < width; ++d)
          score += value_of(p.q[(i * q_heads + h) * width + d]) * p.key(i, t, 0, h / group, d);
        const double weight = std::exp(softcap * std::tanh(score * scale / softcap));
        total += weight;
        for (int64_t d = 0; d < width; ++d) sums[d] += weight * p.key(i, t, 1, h / group, d);
      }
      for (int64_t d = 0; d < width; ++d)
        EXPECT(std::fabs(value_of(out[d]) - sums[d] / total) < (sizeof(T) == 2 ? 6e-3 : 1e-5));
    }
  }
}

// Keys of a whole split are NaN, and those of the split behind it are not.
template <class T>
void attention_keeps_nan(int64_t q_heads, int64_t heads, int64_t width, Random& random) {
  const Problem<T> p(3, q_heads, heads, width, random);
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t t = 0; t < kSplit; ++t)
      for (int64_t d = 0; d < width; ++d)
        p.pool[page_at(p.pages(), p.depth_of[1], p.tables[Problem<T>::kMaxPages + t / kPage], 0,
                       head) +
               t % kPage * width + d] = Storage<T>::of(std::nanf(""));
  run(Attention{{p.q.data(), q_heads * width},
                q_heads,
                p.pages(),
                p.places(),
                p.depth_of.data(),
                nullptr,
                0.5f,
                0.0f,
                0,
                p.out.data()});
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t d = 0; d < q_heads * width; ++d)
      EXPECT(std::isnan(value_of(p.out[i * q_heads * width + d])) == (p.req[i] == 1));
}

}  // namespace

CASE(depth_attention_plain) {
  Random random(1);
  attention_matches<float>(2, 6, 2, 40, random);
  attention_matches<simt::bf16>(1, 9, 1, 24, random);
}

CASE(depth_attention_tiles) {
  Random random(2);
  attention_matches<simt::bf16>(6, 4, 2, 64, random);
  attention_matches<simt::bf16>(3, 12, 1, 80, random);
}

// Enough rows for four tiles of columns.
CASE(depth_attention_chunk) {
  Random random(3);
  attention_matches<simt::bf16>(60, 2, 1, 64, random);
}

CASE(depth_attention_nan) {
  Random random(8);
  attention_keeps_nan<float>(6, 2, 40, random);
  attention_keeps_nan<simt::bf16>(4, 2, 64, random);
}

CASE(depth_compact) {
  Random random(4);
  for (const int64_t n : {0, 1, 300}) {
    for (const int32_t loops : {1, 5}) {
      const Array<int32_t> loop(n), order(n), next(n), offsets(loops + 1), counts(3);
      const Array<uint8_t> leave(n), drop(n);
      for (int64_t i = 0; i < n; ++i) {
        loop[i] = random.between(-2, loops);
        leave[i] = random.between(0, 3) == 0;
        drop[i] = random.between(0, 5) == 0;
      }
      const Compact call{loop.data(), leave.data(),   drop.data(),  n, loops, order.data(),
                         next.data(), offsets.data(), counts.data()};
      run(call);
      int64_t at = 0;
      for (int kind = 0; kind < loops + 2; ++kind) {
        if (kind <= loops) EXPECT(offsets[kind] == at);
        for (int64_t i = 0; i < n; ++i) {
          if (kind_of(call, i) != kind) continue;
          EXPECT(order[at] == i && next[at] == (kind < loops ? kind : -1));
          ++at;
        }
        if (kind == loops - 1) EXPECT(counts[0] == at);
        if (kind == loops) EXPECT(counts[0] + counts[1] == at);
      }
      EXPECT(counts[0] + counts[1] + counts[2] == n);
    }
  }
}

CASE(depth_rope_write) {
  Random random(5);
  const int64_t width = 20, half = 7, settings = 2, positions = 280;
  const Problem<float> p(5, 3, 1, width, random);
  const Array<float> k = random.numbers<float>(p.n * width), v = random.numbers<float>(p.n * width);
  const Array<float> rope = random.numbers<float>(settings * positions * 2 * half);
  const Array<float> weight = random.numbers<float>(2 * width);
  Array<int32_t> rope_of(2);
  rope_of[0] = 1;
  rope_of[1] = 0;
  const Array<uint8_t> marks(40 * kPage);
  memset(marks.data(), 0, 40 * kPage);
  RopeWrite call{};
  call.q = {p.q.data(), 3 * width};
  call.k = {k.data(), width};
  call.v = {v.data(), width};
  call.q_heads = 3;
  call.pool = p.pages();
  call.places = p.places();
  call.depth_of = p.depth_of.data();
  call.rope = rope.data();
  call.settings = settings;
  call.positions = positions;
  call.half = half;
  call.rope_of = rope_of.data();
  call.k_norm = {weight.data(), width};
  call.eps = 0.5f;
  call.plus_one = true;
  call.marks = marks.data();
  call.out = p.out.data();
  run(call);
  const auto near = [](double x, double y) { return std::fabs(x - y) < 1e-4 * (1 + std::fabs(y)); };
  for (int64_t i = 0; i < p.n; ++i) {
    const bool placed = p.req[i] == 0 || p.req[i] == 1;
    if (!placed) {
      EXPECT(p.req[i] < 0 ? p.out[i * 3 * width] == 0 : std::isnan(p.out[i * 3 * width]));
      continue;
    }
    const float* table = &rope[(rope_of[p.loop[i]] * positions + p.pos[i]) * 2 * half];
    const auto turned = [&](const std::vector<double>& x, int64_t d) {
      if (d >= 2 * half) return x[d];
      const double cos = table[d % half], sin = table[half + d % half];
      return d < half ? x[d] * cos - x[d + half] * sin : x[d] * cos + x[d - half] * sin;
    };
    for (int64_t h = 0; h < 3; ++h) {
      const float* q = &p.q[(i * 3 + h) * width];
      const std::vector<double> x(q, q + width);
      for (int64_t d = 0; d < width; ++d)
        EXPECT(near(p.out[(i * 3 + h) * width + d], turned(x, d)));
    }
    double square = 0;
    for (int64_t d = 0; d < width; ++d) square += k[i * width + d] * k[i * width + d];
    std::vector<double> x(width);
    for (int64_t d = 0; d < width; ++d)
      x[d] =
          k[i * width + d] / std::sqrt(square / width + 0.5) * (weight[p.loop[i] * width + d] + 1);
    for (int64_t d = 0; d < width; ++d) {
      EXPECT(near(p.key(i, p.pos[i], 0, 0, d), turned(x, d)));
      EXPECT(p.key(i, p.pos[i], 1, 0, d) == v[i * width + d]);
    }
    EXPECT(marks[p.tables[p.req[i] * 20 + p.pos[i] / kPage] * kPage + p.pos[i] % kPage] ==
           p.loop[i] + 1);
  }
}

CASE(depth_copy) {
  Random random(6);
  const Problem<simt::bf16> p(4, 2, 2, 24, random);
  for (int64_t i = 0; i < p.n; ++i) p.loop[i] = 0;
  Array<int32_t> depths(4);
  const int32_t given[] = {1, 2, 0, 0};  // of a second layer both loops share depth 0
  std::copy(given, given + 4, depths.data());
  const Array<uint8_t> marks(40 * kPage);
  memset(marks.data(), 0, 40 * kPage);
  run(Copy{p.pages(), p.places(), depths.data(), 2, marks.data()});
  p.depth_of[0] = 1;
  p.depth_of[1] = 2;
  for (int64_t i = 0; i < p.n - 2; ++i) {
    for (int half = 0; half < 2; ++half) {
      for (int64_t d = 0; d < 48; ++d) {
        p.loop[i] = 0;
        const double from = p.key(i, p.pos[i], half, d / 24, d % 24);
        p.loop[i] = 1;
        EXPECT(p.key(i, p.pos[i], half, d / 24, d % 24) == from);
      }
    }
  }
  int marked = 0;
  for (int64_t i = 0; i < 40 * kPage; ++i) marked += marks[i] == 2;
  EXPECT(marked == p.n - 2);
}

// A layer without and one with adapters and a norm of k; rows that have left at loop 0 skip loop 1.
CASE(depth_propagate) {
  Random random(7);
  constexpr int64_t D = 20, heads = 2, width = 12, kv = heads * width, rank = 4;
  const Problem<float> p(5, 2, heads, width, random);
  for (int64_t i = 0; i < p.n; ++i) p.loop[i] = i == 2;
  const Array<float> h = random.numbers<float>(p.n * D), norm = random.numbers<float>(2 * D);
  const Array<float> k_norm = random.numbers<float>(width), bias = random.numbers<float>(kv);
  const Array<int32_t> depths(4);
  const int32_t given[] = {2, 0, 2, 1};
  std::copy(given, given + 4, depths.data());
  std::vector<Array<float>> weights, a, b;
  Propagate call{};
  call.h = h.data();
  call.h_stride = call.D = D;
  call.count = 2;
  call.pool = p.pages();
  call.places = p.places();
  call.eps = 0.5f;
  for (int at = 0; at < 2; ++at) {
    DeeperLayer& layer = call.layers[at];
    layer.norm = norm.data() + (at ? 0 : D);
    layer.norm_stride = at ? D : 0;
    layer.depth_of = depths.data() + 2 * at;
    if (at) layer.k_norm = {k_norm.data(), 0};
    for (Projection* to : {&layer.k, &layer.v}) {
      weights.push_back(random.numbers<float>(kv * D));
      a.push_back(random.numbers<float>(2 * rank * D, -1, 1));
      b.push_back(random.numbers<float>(2 * kv * rank, -1, 1));
      *to = {weights.back().data(),
             at ? nullptr : bias.data(),
             nullptr,
             nullptr,
             kv,
             0,
             D,
             D,
             rank,
             0};
      if (!at) continue;
      to->a = a.back().data();
      to->b = b.back().data();
      to->rank = rank;
    }
  }
  const Array<uint8_t> marks(40 * kPage);
  memset(marks.data(), 0, 40 * kPage);
  call.marks = marks.data();
  const std::vector<float> before(p.pool.data(), p.pool.data() + p.pool.size());
  run(call);
  std::vector<bool> written(before.size());
  for (int64_t i = 0; i < p.n; ++i) {
    if (p.req[i] < 0 || p.req[i] > 1 || p.loop[i] == 1) continue;
    const int32_t page = p.tables[p.req[i] * 20 + p.pos[i] / kPage], offset = p.pos[i] % kPage;
    EXPECT(marks[page * kPage + offset] == 2);
    double square = 0;
    for (int64_t d = 0; d < D; ++d) square += h[i * D + d] * h[i * D + d];
    std::vector<double> x(D), low(rank), y(width);
    for (int64_t d = 0; d < D; ++d) x[d] = h[i * D + d] / std::sqrt(square / D + 0.5) * norm[D + d];
    for (int at = 0; at < 2; ++at) {
      for (int64_t head = 0; head < 2 * heads; ++head) {
        const int64_t which = 2 * at + head / heads, row0 = head % heads * width;
        const auto sum = [&](const float* row) {
          double total = 0;
          for (int64_t d = 0; d < D; ++d) total += row[d] * x[d];
          return total;
        };
        for (int64_t r = 0; r < rank; ++r) low[r] = sum(&a[which][(rank + r) * D]);
        square = 0;
        for (int64_t d = 0; d < width; ++d) {
          y[d] = sum(&weights[which][(row0 + d) * D]) + (at ? 0 : bias[row0 + d]);
          for (int64_t r = 0; at && r < rank; ++r)
            y[d] += b[which][(kv + row0 + d) * rank + r] * low[r];
          square += y[d] * y[d];
        }
        const double size = std::sqrt(square / width + 0.5);
        const int64_t to =
            page_at(p.pages(), depths[2 * at + 1], page, head / heads, head % heads) +
            offset * width;
        for (int64_t d = 0; d < width; ++d) {
          const double want = at && head < heads ? y[d] / size * k_norm[d] : y[d];
          EXPECT(std::fabs(p.pool[to + d] - want) < 2e-3);
          written[to + d] = true;
        }
      }
    }
  }
  for (size_t e = 0; e < before.size(); ++e)
    EXPECT(written[e] || std::memcmp(&before[e], &p.pool[e], sizeof(float)) == 0);
}

}  // namespace depth_test
