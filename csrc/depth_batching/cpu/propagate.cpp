// SPDX-License-Identifier: Apache-2.0
// State propagation: a layer's norm, products and write for the rows that skip a loop, and for no others.
#include <vector>

#include "linear_engine.h"
#include "propagate_engine.h"

namespace gemma_ext::depth_batching::cpu {
namespace {

// Rows of a call that have left before some loop, side by side.
struct Leavers {
  std::vector<int32_t> rows, req, pos, last;

  Leavers(const Places& p, int64_t loop) {
    for (int64_t i = 0; i < p.n; ++i) {
      if (p.req[i] < 0 || p.loop[i] >= loop) continue;
      rows.push_back(int32_t(i));
      req.push_back(p.req[i]);
      pos.push_back(p.pos[i]);
      last.push_back(p.loop[i]);
    }
  }
  int64_t count() const { return int64_t(rows.size()); }
};

class Layer {
 public:
  Layer(const Propagate& call, int at, Workers& workers)
      : call_(call), layer_(call.layers[at]), last_(at + 1 == call.count), workers_(workers) {}

  // Products of the norm of loop `first`, for this loop or for all up to the last.
  void run(const Leavers& rows, int64_t first, int64_t end) {
    const int64_t n = rows.count(), kv = call_.pool.heads * call_.pool.width;
    const int64_t size = size_of(call_.pool.type);
    std::vector<char> x(n * call_.D * size), y(n * 2 * kv * size);
    const char* norm = static_cast<const char*>(layer_.norm);
    const DType type = call_.pool.type;
    cpu::run(Gather{call_.h,
                    type,
                    call_.places.n,
                    call_.D,
                    n,
                    rows.rows.data(),
                    norm + first * layer_.norm_stride * size_of(layer_.norm_type),
                    layer_.norm_type,
                    {call_.eps, call_.plus_one},
                    x.data(),
                    type},
             workers_);
    const int32_t all[] = {0, int32_t(n)};
    Linear product{};
    product.x = x.data();
    product.x_stride = product.D = call_.D;
    product.n = n;
    product.loops = 1;
    product.type = type;
    product.projections[0] = at_loop(layer_.k, first, type);
    product.projections[1] = at_loop(layer_.v, first, type);
    product.count = 2;
    product.seg_offsets = all;
    product.scale = 1;
    product.y = y.data();
    product.y_width = 2 * kv;
    cpu::run(product, workers_);
    for (int64_t loop = first; loop < end; ++loop) write(rows, loop, y.data(), kv, size);
  }

 private:
  void write(const Leavers& rows, int64_t loop, char* y, int64_t kv, int64_t size) {
    const int64_t n = rows.count();
    std::vector<int32_t> req = rows.req;
    const std::vector<int32_t> loops(n, int32_t(loop));
    for (int64_t i = 0; i < n; ++i)
      if (rows.last[i] >= loop) req[i] = -1;
    RopeWrite write = write_of(call_);
    write.places.req = req.data();
    write.places.pos = rows.pos.data();
    write.places.loop = loops.data();
    write.places.n = n;
    write.q = write.k = {y, 2 * kv};
    write.v = {y + kv * size, 2 * kv};
    write.depth_of = layer_.depth_of;
    write.rope_of = layer_.rope_of;
    write.k_norm = layer_.k_norm;
    if (!last_) write.marks = nullptr;
    write.out = y;  // of no head
    cpu::run(write, workers_);
  }

  const Propagate& call_;
  const DeeperLayer& layer_;
  bool last_;
  Workers& workers_;
};

}  // namespace

void run(const Propagate& call, Workers& workers) {
  const int64_t loops = call.places.loops;
  for (int at = 0; at < call.count; ++at) {
    Layer layer(call, at, workers);
    const int64_t results = results_of(call.layers[at], loops);
    for (int64_t r = 0; loops > 1 && r < results; ++r) {
      const int64_t end = results > 1 ? r + 2 : loops;
      const Leavers rows(call.places, end - 1);
      if (rows.count()) layer.run(rows, r + 1, end);
    }
  }
}

}  // namespace gemma_ext::depth_batching::cpu
