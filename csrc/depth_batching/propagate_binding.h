// SPDX-License-Identifier: Apache-2.0
// State propagation between tensors and an engine.
#pragma once

#include "kv_binding.h"
#include "linear_binding.h"
#include "propagate.h"

namespace gemma_ext::depth_batching {

template <class Engine>
struct PropagateBinding {
  using Kv = KvBinding<Engine>;
  using Linears = LinearBinding<Engine>;
  using Tensors = std::vector<Tensor>;

  // Of every layer a norm [1 or B, D], W_k and W_v, and what goes with them, empty where absent.
  static void propagate(const Tensor& h, const Tensor& kv_pool, const Tensor& block_tables,
                        const Tensor& row_req, const Tensor& row_pos, const Tensor& row_loop,
                        const Tensors& norms, const Tensors& weights, const Tensors& biases,
                        const Tensors& a, const Tensors& b, const Tensors& depth_of,
                        const Tensors& rope_of, const Tensors& k_norms, const Maybe& rope,
                        double eps, bool plus_one, const Maybe& fill_mark) {
    constexpr const char* op = "kv_propagate";
    Engine engine(op, kv_pool);
    const size_t layers = norms.size();
    STD_TORCH_CHECK(
        layers > 0 && weights.size() == 2 * layers && biases.size() == 2 * layers &&
            a.size() == 2 * layers && b.size() == 2 * layers && depth_of.size() == layers &&
            rope_of.size() == layers && k_norms.size() == layers,
        op, ": expected for every norm two projections, depth_of, rope_of and a norm of k");
    Propagate call{};
    call.pool = Kv::pool(op, kv_pool);
    const int64_t loops = depth_of[0].numel(), width = call.pool.width;
    const typename Kv::Placed placed(op, block_tables, row_req, row_pos, row_loop, loops);
    call.places = placed.places;
    STD_TORCH_CHECK(h.dim() == 2 && storage_type(op, "h", h) == call.pool.type, op,
                    ": expected h to be [n, D] in the dtype of kv_pool");
    call.D = h.size(1);
    Linears::check(op, "h", h, call.places.n, call.D);
    const Tensor given = torch::stable::contiguous(h);
    call.h = given.data_ptr();
    call.h_stride = call.D;
    Maybe table;
    Kv::angles(op, rope, width, table, call);
    call.eps = float(eps);
    call.plus_one = plus_one;
    uint8_t* marks = Kv::marks(op, fill_mark, call.pool);
    for (size_t first = 0; first < layers; first += kMostLayers) {
      const size_t end = first + kMostLayers < layers ? first + kMostLayers : layers;
      Tensors kept;
      call.count = int(end - first);
      for (size_t at = first; at < end; ++at) {
        DeeperLayer& to = call.layers[at - first];
        to = {};
        const Tensor& norm = norms[at];
        STD_TORCH_CHECK(Engine::here(norm) && norm.dim() == 2 && norm.size(1) == call.D &&
                            (norm.size(0) == 1 || norm.size(0) == loops),
                        op, ": expected a norm to be [1 or ", loops, ", ", call.D, "]");
        kept.push_back(torch::stable::contiguous(norm));
        to.norm = kept.back().data_ptr();
        to.norm_stride = norm.size(0) == 1 ? 0 : call.D;
        to.norm_type = storage_type(op, "a norm", norm);
        const auto projection = [&](size_t p) {
          const Projection made = Linears::projection(op, weights[p], biases[p], a[p], b[p], call.D,
                                                      loops, call.pool.type, kept);
          STD_TORCH_CHECK(made.features == call.pool.heads * width, op,
                          ": expected projections to n_kv * hd");
          return made;
        };
        to.k = projection(2 * at);
        to.v = projection(2 * at + 1);
        const auto list = [&](const char* name, const Tensor& t) {
          kept.push_back(Kv::exact(op, name, t, ScalarType::Int, {loops}));
          return Kv::ints(kept.back());
        };
        to.depth_of = list("depth_of", depth_of[at]);
        if (rope_of[at].numel() > 0) to.rope_of = list("rope_of", rope_of[at]);
        if (k_norms[at].numel() > 0) {
          Maybe held;
          to.k_norm = Kv::norm(op, "k_norm", k_norms[at], loops, width, held);
          kept.push_back(*held);
        }
      }
      call.marks = end == layers ? marks : nullptr;
      engine.run(op, kv_pool, call);
    }
  }

  template <class Library>
  static void define_in(Library& m) {
    m.def(
        "kv_propagate(Tensor h, Tensor(a!) kv_pool, Tensor block_tables, Tensor row_req, "
        "Tensor row_pos, Tensor row_loop, Tensor[] norms, Tensor[] weights, Tensor[] biases, "
        "Tensor[] a, Tensor[] b, Tensor[] depth_of, Tensor[] rope_of, Tensor[] k_norms, "
        "Tensor? rope, float eps, bool plus_one, Tensor(b!)? fill_mark) -> ()");
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("kv_propagate", TORCH_BOX(&PropagateBinding::propagate));
  }
};

}  // namespace gemma_ext::depth_batching
