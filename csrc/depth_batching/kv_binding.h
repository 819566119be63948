// SPDX-License-Identifier: Apache-2.0
// Routing, K and V, attention between tensors and an engine: checks, memory of the results, the calls.
//
// An engine, made per call from (op, tensor), has
//   here(t)                whether t lies where it computes
//   run(op, like, call)    a call of contract.h
#pragma once

#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "common/torch/tensors.h"
#include "contract.h"

namespace gemma_ext::depth_batching {

using Maybe = std::optional<Tensor>;

template <class Engine>
struct KvBinding {
  // A size of -1 fits any.
  static void check(const char* op, const char* name, const Tensor& t, ScalarType type,
                    std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name,
                    " on the device of the other tensors");
    bool fits = t.scalar_type() == type && t.dim() == int64_t(shape.size());
    int64_t d = 0;
    for (const int64_t size : shape) {
      fits = fits && (size < 0 || t.size(d) == size);
      ++d;
    }
    STD_TORCH_CHECK(fits, op, ": expected another shape or dtype of ", name);
  }

  static Tensor exact(const char* op, const char* name, const Tensor& t, ScalarType type,
                      std::initializer_list<int64_t> shape) {
    check(op, name, t, type, shape);
    return torch::stable::contiguous(t);
  }

  static const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

  static Pool pool(const char* op, const Tensor& t) {
    STD_TORCH_CHECK(Engine::here(t) && t.dim() == 6 && t.size(2) == 2 && t.size(4) == kPage &&
                        t.is_contiguous(),
                    op, ": expected kv_pool to be [L, pages, 2, n_kv, ", kPage,
                    ", hd], contiguous");
    return {t.data_ptr(), storage_type(op, "kv_pool", t), t.size(0), t.size(1), t.size(3),
            t.size(5)};
  }

  // The rows' places and the tensors that the pointers lead to.
  struct Placed {
    Tensor tables, req, pos, loop;
    Places places;

    Placed(const char* op, const Tensor& block_tables, const Tensor& row_req, const Tensor& row_pos,
           const Tensor& row_loop, int64_t loops)
        : tables(exact(op, "block_tables", block_tables, ScalarType::Int, {-1, -1})),
          req(exact(op, "row_req", row_req, ScalarType::Int, {-1})),
          pos(exact(op, "row_pos", row_pos, ScalarType::Int, {req.size(0)})),
          loop(exact(op, "row_loop", row_loop, ScalarType::Int, {req.size(0)})) {
      places = {ints(tables), tables.size(0), tables.size(1), ints(req),
                ints(pos),    ints(loop),     req.size(0),    loops};
      STD_TORCH_CHECK(places.n <= INT32_MAX && loops >= 1 && loops <= kMostLoops, op,
                      ": expected fewer than 2^31 rows and 1 to ", kMostLoops, " loops");
    }
  };

  // A layer's depths and the rows' places in a pool, in an Attention or a RopeWrite, and what its pointers lead to.
  struct Layer {
    Tensor depths;
    Placed placed;

    template <class Call>
    Layer(const char* op, const Tensor& kv_pool, const Tensor& block_tables, const Tensor& row_req,
          const Tensor& row_pos, const Tensor& row_loop, const Tensor& depth_of, Call& to)
        : depths(exact(op, "depth_of", depth_of, ScalarType::Int, {-1})),
          placed(op, block_tables, row_req, row_pos, row_loop, depths.size(0)) {
      to.pool = pool(op, kv_pool);
      to.places = placed.places;
      to.depth_of = ints(depths);
    }
  };

  static Tensor rows(const char* op, const char* name, const Tensor& t, const Pool& pool, int64_t n,
                     int64_t heads, Rows& to) {
    STD_TORCH_CHECK(Engine::here(t) && t.dim() == 3 && t.size(0) == n && t.size(2) == pool.width &&
                        (heads < 0 || t.size(1) == heads) && storage_type(op, name, t) == pool.type,
                    op, ": expected ", name, " to be [", n, ", heads, ", pool.width,
                    "] in the dtype of kv_pool");
    const bool whole = t.stride(2) == 1 && t.stride(1) == pool.width;
    const Tensor given = whole ? t : torch::stable::contiguous(t);
    to = {given.data_ptr(), given.stride(0)};
    return given;
  }

  static uint8_t* marks(const char* op, const Maybe& t, const Pool& pool) {
    if (!t) return nullptr;
    check(op, "fill_mark", *t, ScalarType::Byte, {pool.pages, kPage});
    STD_TORCH_CHECK(t->is_contiguous(), op, ": expected fill_mark to be contiguous");
    return static_cast<uint8_t*>(t->data_ptr());
  }

  using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Lists compact(const Tensor& loop, const Tensor& leave, const Maybe& drop, int64_t loops) {
    constexpr const char* op = "depth_compact";
    Engine engine(op, loop);
    const Tensor given = exact(op, "loop", loop, ScalarType::Int, {-1});
    const int64_t n = given.size(0);
    STD_TORCH_CHECK(n <= INT32_MAX && loops >= 1 && loops <= kMostLoops, op,
                    ": expected fewer than 2^31 rows and 1 to ", kMostLoops, " loops");
    const Tensor leaves = exact(op, "leave", leave, ScalarType::Bool, {n});
    Maybe dropped;
    if (drop) dropped = exact(op, "drop", *drop, ScalarType::Bool, {n});
    const auto made = [&](int64_t size) {
      return torch::stable::new_empty(given, {size}, ScalarType::Int);
    };
    const Tensor order = made(n), next_loop = made(n), offsets = made(loops + 1), counts = made(3);
    const auto writable = [](const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); };
    engine.run(op, given,
               Compact{ints(given), static_cast<const uint8_t*>(leaves.data_ptr()),
                       dropped ? static_cast<const uint8_t*>(dropped->data_ptr()) : nullptr, n,
                       int32_t(loops), writable(order), writable(next_loop), writable(offsets),
                       writable(counts)});
    return {order, next_loop, offsets, counts};
  }

  // A weight [1 or loops, width] as floats, kept alive by `held`.
  static Norm norm(const char* op, const char* name, const Maybe& weight, int64_t loops,
                   int64_t width, Maybe& held) {
    if (!weight) return {nullptr, 0};
    STD_TORCH_CHECK(Engine::here(*weight) && weight->dim() == 2 && weight->size(1) == width &&
                        (weight->size(0) == 1 || weight->size(0) == loops),
                    op, ": expected ", name, " to be [1 or ", loops, ", ", width, "]");
    held = torch::stable::contiguous(torch::stable::to(*weight, ScalarType::Float));
    return {floats(*held), weight->size(0) == 1 ? 0 : width};
  }

  // cos and sin as floats, kept alive by `held`, in a RopeWrite or a Propagate.
  template <class Call>
  static void angles(const char* op, const Maybe& rope, int64_t width, Maybe& held, Call& to) {
    if (!rope) return;
    STD_TORCH_CHECK(
        Engine::here(*rope) && rope->dim() == 4 && rope->size(2) == 2 && 2 * rope->size(3) <= width,
        op, ": expected rope to be [S, positions, 2, H] with 2 H up to ", width);
    held = torch::stable::contiguous(torch::stable::to(*rope, ScalarType::Float));
    to.rope = floats(*held);
    to.settings = held->size(0);
    to.positions = held->size(1);
    to.half = held->size(3);
  }

  static Tensor rope_write(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_pool,
                           const Tensor& block_tables, const Tensor& row_req, const Tensor& row_pos,
                           const Tensor& row_loop, const Tensor& depth_of, const Maybe& rope,
                           const Maybe& rope_of, const Maybe& q_norm, const Maybe& k_norm,
                           double eps, bool plus_one, const Maybe& fill_mark) {
    constexpr const char* op = "rope_kv_write";
    Engine engine(op, kv_pool);
    RopeWrite call{};
    const Layer layer(op, kv_pool, block_tables, row_req, row_pos, row_loop, depth_of, call);
    const int64_t n = call.places.n, loops = call.places.loops, width = call.pool.width;
    const Tensor queries = rows(op, "q", q, call.pool, n, -1, call.q);
    const Tensor keys = rows(op, "k", k, call.pool, n, call.pool.heads, call.k);
    const Tensor values = rows(op, "v", v, call.pool, n, call.pool.heads, call.v);
    call.q_heads = q.size(1);
    Maybe table, settings, q_weight, k_weight;
    angles(op, rope, width, table, call);
    if (rope_of) {
      settings = exact(op, "rope_of", *rope_of, ScalarType::Int, {loops});
      call.rope_of = ints(*settings);
    }
    call.q_norm = norm(op, "q_norm", q_norm, loops, width, q_weight);
    call.k_norm = norm(op, "k_norm", k_norm, loops, width, k_weight);
    call.eps = float(eps);
    call.plus_one = plus_one;
    call.marks = marks(op, fill_mark, call.pool);
    Tensor out = torch::stable::new_empty(kv_pool, {n, call.q_heads, width});
    call.out = out.mutable_data_ptr();
    engine.run(op, kv_pool, call);
    return out;
  }

  static Tensor attend(const Tensor& q, const Tensor& kv_pool, const Tensor& block_tables,
                       const Tensor& row_req, const Tensor& row_pos, const Tensor& row_loop,
                       const Tensor& depth_of, const Maybe& window, double scale, double softcap,
                       int64_t sinks) {
    constexpr const char* op = "paged_attn_mixed_depth";
    Engine engine(op, kv_pool);
    Attention call{};
    const Layer layer(op, kv_pool, block_tables, row_req, row_pos, row_loop, depth_of, call);
    const Tensor queries = rows(op, "q", q, call.pool, call.places.n, -1, call.q);
    call.q_heads = q.size(1);
    STD_TORCH_CHECK(call.pool.heads >= 1 && call.q_heads % call.pool.heads == 0, op,
                    ": expected heads of q in multiples of ", call.pool.heads, ", got ",
                    call.q_heads);
    Maybe windows;
    if (window) {
      windows = exact(op, "window", *window, ScalarType::Int, {call.places.loops});
      call.window = ints(*windows);
    }
    call.scale = float(scale);
    call.softcap = float(softcap);
    call.sinks = int32_t(std::clamp<int64_t>(sinks, 0, INT32_MAX));
    Tensor out = torch::stable::new_empty(kv_pool, {call.places.n, call.q_heads, call.pool.width});
    call.out = out.mutable_data_ptr();
    engine.run(op, kv_pool, call);
    return out;
  }

  static void copy(const Tensor& kv_pool, const Tensor& block_tables, const Tensor& row_req,
                   const Tensor& row_pos, const Tensor& row_loop, const Tensor& depths,
                   const Maybe& fill_mark) {
    constexpr const char* op = "kv_copy";
    Engine engine(op, kv_pool);
    Copy call{};
    call.pool = pool(op, kv_pool);
    const Tensor table = exact(op, "depths", depths, ScalarType::Int, {-1, -1});
    const Placed placed(op, block_tables, row_req, row_pos, row_loop, table.size(1));
    call.places = placed.places;
    call.depths = ints(table);
    call.layers = table.size(0);
    call.marks = marks(op, fill_mark, call.pool);
    engine.run(op, kv_pool, call);
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("depth_compact", TORCH_BOX(&KvBinding::compact));
    m.impl("rope_kv_write", TORCH_BOX(&KvBinding::rope_write));
    m.impl("paged_attn_mixed_depth", TORCH_BOX(&KvBinding::attend));
    m.impl("kv_copy", TORCH_BOX(&KvBinding::copy));
  }
};

}  // namespace gemma_ext::depth_batching
