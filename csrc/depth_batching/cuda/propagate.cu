// SPDX-License-Identifier: Apache-2.0
// State propagation, all layers and skipped loops together: norms of h; their products with W_k and W_v by the launches
// of linear layers; norm, rotation and the write into pages. Each needs whole rows of what the one before has made.
#include <algorithm>
#include <vector>

#include "linear_engine.h"
#include "propagate_engine.h"
#include "rope.cuh"
#include "rows.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

struct InputLayer {
  const void* norm;
  int64_t norm_stride, first;  // of its inputs
  DType norm_type;
};

struct InputParams {
  const void* h;
  int64_t h_stride, D, n;
  DType type;
  NormRule rule;
  InputLayer layers[kMostLayers];
  int count;
  void* x;         // [n, inputs, width]
  int64_t inputs;  // of all layers
  int64_t width;   // D up to whole words
};

// A block per row and input.
KERNEL_BOUNDS(kRowNormThreads, 4) void depth_propagate_norm_kernel(InputParams p) {
  const int64_t input = simt::block_idx() % p.inputs, row = simt::block_idx() / p.inputs;
  int at = 0;
  while (at + 1 < p.count && input >= p.layers[at + 1].first) ++at;
  const InputLayer& own = p.layers[at];
  // the first loop that can be skipped is 1
  const int64_t weight = own.norm_stride * (1 + input - own.first);
  const int64_t from = row * p.h_stride, to = (row * p.inputs + input) * p.width;
  const float inverse = inverse_rms(p.h, p.type, from, p.D, p.rule.eps, simt::shared<float>());
  for (int64_t i = simt::thread_idx(); i < p.width; i += kRowNormThreads) {
    const float y = i < p.D ? normed(element(p.h, p.type, from + i), inverse,
                                     element(own.norm, own.norm_type, weight + i), p.rule.plus_one)
                            : 0.0f;
    set_element(p.x, p.type, to + i, y);
  }
}

struct WriteLayer {
  int64_t column;  // of K in a row of y, V behind it
  int64_t step;    // of columns from loop to loop; 0: one result for all
  const int32_t* depth_of;
  const int32_t* rope_of;
  Norm k_norm;
};

struct WriteParams {
  RopeWrite write;
  const void* y;
  int64_t y_width;
  WriteLayer layers[kMostLayers];
  int count;
};
static_assert(sizeof(InputParams) < 4096 && sizeof(WriteParams) < 4096);  // parameters of a kernel

// A warp per layer, skipped loop, row and head of K.
template <class T>
KERNEL_BOUNDS(kRopeThreads, 8)
void depth_propagate_write_kernel(WriteParams p) {
  const Places& places = p.write.places;
  const int64_t heads = p.write.pool.heads, skipped = places.loops - 1;
  int64_t unit = int64_t{simt::block_idx()} * kRopeWarps + simt::warp_idx();
  if (unit >= p.count * skipped * places.n * heads) return;
  const int64_t head = unit % heads, i = unit / heads % places.n;
  unit /= heads * places.n;
  const int loop = static_cast<int>(unit % skipped) + 1, at = static_cast<int>(unit / skipped);
  if (!is_place(places, i) || places.loop[i] >= loop) return;
  const WriteLayer& own = p.layers[at];
  // of loops that share a depth the last one's stay
  for (int later = loop + 1; later < places.loops; ++later)
    if (own.depth_of[later] == own.depth_of[loop]) return;
  RopeWrite write = p.write;
  const T* k = static_cast<const T*>(p.y) + own.column + own.step * (loop - 1);
  write.k = {k, p.y_width};
  write.v = {k + heads * write.pool.width, p.y_width};
  write.depth_of = own.depth_of;
  write.rope_of = own.rope_of;
  write.k_norm = own.k_norm;
  if (at + 1 < p.count || loop + 1 < places.loops) write.marks = nullptr;
  rope_head<T>(write, i, loop, head, simt::shared<float>() + simt::warp_idx() * write.pool.width);
}

// Everything between the first and the last launch.
struct Plan {
  InputParams inputs{};
  WriteParams writes{};
  std::vector<Linear> products;  // kMostProjections at a time
  void* memory;                  // of one of them

  Plan(Arena& arena, const Propagate& call) {
    const int64_t n = call.places.n, loops = call.places.loops, size = size_of(call.pool.type);
    const int64_t word = 16 / size, kv = call.pool.heads * call.pool.width;
    inputs.h = call.h;
    inputs.h_stride = call.h_stride;
    inputs.D = call.D;
    inputs.n = n;
    inputs.type = call.pool.type;
    inputs.rule = {call.eps, call.plus_one};
    inputs.count = writes.count = call.count;
    inputs.width = ceil_div(call.D, word) * word;
    std::vector<Projection> all;
    for (int at = 0; at < call.count; ++at) {
      const DeeperLayer& layer = call.layers[at];
      const int64_t own = inputs_of(layer, loops), results = results_of(layer, loops);
      inputs.layers[at] = {layer.norm, layer.norm_stride, inputs.inputs, layer.norm_type};
      writes.layers[at] = {writes.y_width, results > 1 ? 2 * kv : 0, layer.depth_of, layer.rope_of,
                           layer.k_norm};
      for (int64_t r = 0; r < results; ++r) {
        for (const Projection* given : {&layer.k, &layer.v}) {
          all.push_back(at_loop(*given, r + 1, call.pool.type));
          all.back().x_at = (inputs.inputs + (own > 1 ? r : 0)) * inputs.width;
        }
      }
      inputs.inputs += own;
      writes.y_width += results * 2 * kv;
    }
    inputs.x = arena.take<uint8_t>(n * inputs.inputs * inputs.width * size);
    auto* y = arena.take<uint8_t>(n * writes.y_width * size);
    writes.y = y;
    writes.write = write_of(call);
    int64_t most = 0;
    for (size_t begin = 0; begin < all.size(); begin += kMostProjections) {
      Linear part{};
      part.x = inputs.x;
      part.x_stride = inputs.inputs * inputs.width;
      part.n = n;
      part.D = call.D;
      part.loops = 1;
      part.type = call.pool.type;
      part.scale = 1.0f;
      part.y = y + begin * kv * size;
      part.y_width = writes.y_width;
      while (part.count < kMostProjections && begin + part.count < all.size()) {
        part.projections[part.count] = all[begin + part.count];
        ++part.count;
      }
      most = std::max(most, workspace(part));
      products.push_back(part);
    }
    memory = arena.take<uint8_t>(most);
  }
};

}  // namespace

int64_t workspace(const Propagate& call) {
  Arena arena(nullptr);
  Plan plan(arena, call);
  return arena.bytes();
}

Status run(const Propagate& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  const Plan plan(arena, call);
  const Places& p = call.places;
  if (p.n == 0 || p.loops < 2 || call.count == 0) return launches.status();
  launches.add(depth_propagate_norm_kernel, p.n * plan.inputs.inputs, kRowNormThreads,
               kRowNormShared, plan.inputs);
  for (const Linear& product : plan.products)
    launches.check(static_cast<simt::Status>(run(product, plan.memory, stream)));
  const int64_t units = call.count * (p.loops - 1) * p.n * call.pool.heads;
  by_dtype(call.pool.type, [&](auto like) {
    launches.add(depth_propagate_write_kernel<decltype(like)>, ceil_div(units, kRopeWarps),
                 kRopeThreads, rope_shared_bytes(call.pool), plan.writes);
  });
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
