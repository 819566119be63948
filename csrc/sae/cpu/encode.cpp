// SPDX-License-Identifier: Apache-2.0
// Encoders on the CPU: tasks of rows and features, then what they found as one result.
#include <atomic>
#include <cmath>

#include "encode_above.h"
#include "encode_top.h"

namespace gemma_ext::sae::cpu {
namespace {

TopResult second_list(const Encoder& e, const Aux& aux) {
  return {e, aux.mask ? aux.k : 0, false, aux.mask, aux.values, aux.indices};
}

// Runs the tasks of `plan`; `attach` says what else than the two lists task t keeps.
template <class Attach>
void encode(const Encoder& e, const Plan& plan, TopResult& top, TopResult& aux, Attach attach,
            Workers& workers) {
  for (TopResult* each : {&top, &aux}) each->plan(plan);
  workers.run(plan.tasks(), [&](int64_t t, Scratch& s) {
    EncodeTask task = plan.task(e, t);
    attach(task, t);
    TopLists first, second;
    if (top.wanted()) {
      first = top.open(task, kLists, s);
      task.top = &first;
    }
    if (aux.wanted()) {
      second = aux.open(task, kAuxLists, s);
      task.aux = &second;
    }
    kernels().encode(task, s);
    if (top.wanted()) top.close(task, t, first);
    if (aux.wanted()) aux.close(task, t, second);
  });
  for (TopResult* each : {&top, &aux})
    if (each->wanted()) each->merge(workers);
}

}  // namespace

void run(const TopK& c, Workers& workers) {
  const Encoder& e = c.encoder;
  TopResult top(e, c.k, c.by_magnitude, nullptr, c.values, c.indices);
  TopResult aux = second_list(e, c.aux);
  const Plan plan(e, top.row_bytes() + aux.row_bytes(), workers.threads());
  encode(e, plan, top, aux, [](EncodeTask&, int64_t) {}, workers);
}

void run(const GroupMax& c, Workers& workers) {
  const Encoder& e = c.encoder;
  const int64_t size = c.encoder.F / c.groups, plane = e.N * c.groups;
  const Plan plan(e, c.groups * 8, workers.threads());
  std::vector<float> values(plan.parts > 1 ? plan.parts * plane : 0);
  std::vector<int32_t> indices(values.size());
  std::vector<GroupBest> best;
  for (int64_t part = 0; part < plan.parts; ++part)
    best.push_back({plan.parts > 1 ? values.data() + part * plane : c.values,
                    plan.parts > 1 ? indices.data() + part * plane : c.indices, c.groups, size});
  for (const GroupBest& each : best) std::fill_n(each.indices, plane, -1);
  TopResult none = second_list(e, {}), neither = second_list(e, {});
  encode(
      e, plan, none, neither,
      [&](EncodeTask& task, int64_t t) { task.groups = &best[t % plan.parts]; }, workers);
  if (plan.parts == 1) return;
  for (int64_t i = 0; i < plane; ++i) {
    c.indices[i] = -1;
    for (const GroupBest& each : best) {
      if (each.indices[i] < 0) continue;
      if (c.indices[i] >= 0 &&
          rank_of(each.values[i], each.indices[i]) <= rank_of(c.values[i], c.indices[i]))
        continue;
      c.values[i] = each.values[i];
      c.indices[i] = each.indices[i];
    }
  }
}

void run(const BatchTopK& c, Workers& workers) {
  const Encoder& e = c.encoder;
  TopResult none = second_list(e, {}), aux = second_list(e, c.aux);
  const Plan plan(e, 64 + aux.row_bytes(), workers.threads());
  Spans spans(c.total);
  AboveResult above(e, plan);
  for (Above& each : above.tasks()) each.spans = &spans;
  encode(
      e, plan, none, aux,
      [&](EncodeTask& task, int64_t t) { task.above = c.total ? &above.open(task, t) : nullptr; },
      workers);
  above.choose(c.total, spans.limit(), workers);
  above.count(workers);
  *c.min_positive = above.fill(c.offsets, {c.values, c.indices}, workers);
  const int64_t nnz = c.offsets[e.N];
  std::fill(c.values + nnz, c.values + c.total, 0.0f);
  std::fill(c.indices + nnz, c.indices + c.total, 0);
}

namespace {

void find(const Threshold& c, AboveResult& above, const Plan& plan, TopResult& aux,
          Workers& workers) {
  TopResult none = second_list(c.encoder, {});
  for (Above& each : above.tasks()) {
    each.limits = c.limit;
    each.inclusive = c.inclusive;
  }
  encode(
      c.encoder, plan, none, aux,
      [&](EncodeTask& task, int64_t t) { task.above = &above.open(task, t); }, workers);
  above.count(workers);
  std::copy(above.counts().begin(), above.counts().end(), c.counts);
}

}  // namespace

void run(const Threshold& c, Workers& workers) {
  TopResult aux = second_list(c.encoder, c.aux);
  const Plan plan(c.encoder, 64 + aux.row_bytes(), workers.threads());
  AboveResult above(c.encoder, plan);
  find(c, above, plan, aux, workers);
  above.fill_padded(c.capacity, {c.values, c.indices}, workers);
}

void run(const Threshold& c, const std::function<Entries(int64_t)>& allocate, Workers& workers) {
  TopResult aux = second_list(c.encoder, c.aux);
  const Plan plan(c.encoder, 64 + aux.row_bytes(), workers.threads());
  AboveResult above(c.encoder, plan);
  find(c, above, plan, aux, workers);
  above.fill(c.offsets, allocate(above.total()), workers);
}

}  // namespace gemma_ext::sae::cpu
