// SPDX-License-Identifier: Apache-2.0
// Merging between tensors and an engine: checks, memory, the calls, once for both.
//
// An engine, made per call from (op, like), has
//   here(t)              whether t lies where it computes
//   run(op, like, call)  a call of contract.h
#pragma once

#include <type_traits>

#include "common/torch/tensors.h"
#include "contract.h"

// Of a mask, in the order of its schema (ops.cpp): boxed functions take no struct.
#define GEMMA_EXT_MASK_ARGUMENTS                                                           \
  const Maybe &keep, const Maybe &keep_ties, bool keep_variance, const Maybe &drop,        \
      const Maybe &drop_ties, bool drop_variance, const Maybe &density, const Maybe &rows, \
      bool by_value
#define GEMMA_EXT_MASK_NAMES \
  keep, keep_ties, keep_variance, drop, drop_ties, drop_variance, density, rows, by_value

namespace gemma_ext::souping {

using torch::stable::new_empty;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;

template <class Engine>
struct Binding {
  static void check_here(const char* op, const char* name, const Tensor& t, int64_t numel) {
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name, " on the device of the sources");
    STD_TORCH_CHECK(t.numel() == numel, op, ": expected ", name, " to have ", numel,
                    " elements, got ", t.numel());
  }

  // A contiguous tensor of `type` on the host (or where the engine computes), its data as T.
  template <class T>
  static T* values(const char* op, const char* name, const Tensor& t, int64_t numel, bool here) {
    constexpr ScalarType type = std::is_same_v<T, double>    ? ScalarType::Double
                                : std::is_same_v<T, int32_t> ? ScalarType::Int
                                                             : ScalarType::Long;
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), op, ": expected ", name,
                    " to be contiguous and of its type");
    STD_TORCH_CHECK(t.numel() == numel, op, ": expected ", name, " to have ", numel,
                    " elements, got ", t.numel());
    STD_TORCH_CHECK(here ? Engine::here(t) : t.is_cpu(), op, ": expected ", name,
                    here ? " on the device of the sources" : " on the CPU");
    return static_cast<T*>(t.mutable_data_ptr());
  }
  static const double* numbers(const char* op, const char* name, const Tensor& t, int64_t numel) {
    return values<double>(op, name, t, numel, false);
  }
  static const double* numbers(const char* op, const char* name, const Maybe& t, int64_t numel) {
    return t ? numbers(op, name, *t, numel) : nullptr;
  }

  // The parts of a call, and the tensors that its pointers lead to.
  struct Parts {
    const char* op;
    int64_t count;  // T
    Table table{};
    std::vector<Part> part;
    std::vector<Array> source, base, extra, out;
    std::vector<uint32_t> model;
    Tensors kept;
    std::vector<std::pair<Tensor, Tensor>> written;  // from, to

    Parts(const char* op, int64_t count, const Tensors& sources, const Tensors& bases,
          const Tensors& extras, const Tensors& outs, const Ints& offsets, const Ints& keys,
          const Ints& models)
        : op(op), count(count) {
      const auto check_size = [&](const char* name, size_t size, bool optional) {
        STD_TORCH_CHECK((optional && size == 0) || int64_t(size) == count, op, ": expected ", count,
                        " ", name, ", got ", size);
      };
      check_size("bases", bases.size(), true);
      check_size("outs", outs.size(), true);
      check_size("offsets", offsets.size(), true);
      check_size("keys", keys.size(), true);
      STD_TORCH_CHECK(count == 0 || (sources.size() % count == 0 && extras.size() % count == 0), op,
                      ": expected as many sources in every part");
      const int64_t m = count ? int64_t(sources.size()) / count : 0;
      const int64_t x = count ? int64_t(extras.size()) / count : 0;
      STD_TORCH_CHECK(m <= kMaxModels && x <= kMaxModels, op, ": expected at most ", kMaxModels,
                      " models, got ", std::max(m, x));
      STD_TORCH_CHECK(models.empty() || models.size() == sources.size(), op,
                      ": expected models of all sources");
      kept.reserve(sources.size() + bases.size() + extras.size() + outs.size());
      int64_t rows = 0;
      for (int64_t p = 0; p < count; ++p) {
        const Tensor& like = m ? sources[p * m] : bases[p];
        const int64_t numel = like.numel(), dims = like.dim();
        const int64_t width = dims && like.size(dims - 1) ? like.size(dims - 1) : 1;
        const int64_t offset = offsets.empty() ? 0 : offsets[p];
        STD_TORCH_CHECK(offset >= 0, op, ": expected offsets not to be negative, got ", offset);
        part.push_back({numel, offset, width, rows, keys.empty() ? 0 : uint64_t(keys[p])});
        rows += numel / width;
        for (int64_t i = 0; i < m; ++i) {
          source.push_back(read("sources", sources[p * m + i], numel));
          model.push_back(models.empty() ? uint32_t(i) : uint32_t(models[p * m + i]));
        }
        if (m == 0) model.push_back(0);
        base.push_back(bases.empty() ? Array{} : read("bases", bases[p], numel));
        for (int64_t i = 0; i < x; ++i) extra.push_back(read("extras", extras[p * x + i], numel));
        if (!outs.empty()) out.push_back(write("outs", outs[p], numel));
      }
      table = {count,       int(m),       int(x),     part.data(), source.data(),
               base.data(), extra.data(), out.data(), model.data()};
    }

    int64_t rows() const {
      return count ? part.back().row + part.back().numel / part.back().width : 0;
    }
    int64_t models() const { return table.models; }

    Array read(const char* name, const Tensor& t, int64_t numel) {
      const DType type = storage_type(op, name, t);
      check_here(op, name, t, numel);
      kept.push_back(torch::stable::contiguous(t));
      return {kept.back().data_ptr(), type};
    }
    Array write(const char* name, const Tensor& t, int64_t numel) {
      const DType type = storage_type(op, name, t);
      check_here(op, name, t, numel);
      if (t.is_contiguous()) return {t.mutable_data_ptr(), type};
      written.emplace_back(torch::stable::contiguous(t), t);
      return {written.back().first.mutable_data_ptr(), type};
    }
    // After the call.
    void finish() {
      for (auto& [from, to] : written) torch::stable::copy_(to, from);
    }
  };

  static Rounding rounding(bool stochastic) {
    return stochastic ? Rounding::kStochastic : Rounding::kNearest;
  }

  struct PreparedMask {
    Mask mask{};
    std::vector<RowChoice> choices;

    PreparedMask(const Parts& p, GEMMA_EXT_MASK_ARGUMENTS, bool rescale) {
      mask.keep = cut(p, "keep", keep, keep_ties, keep_variance);
      mask.drop = cut(p, "drop", drop, drop_ties, drop_variance);
      mask.density = numbers(p.op, "density", density, p.count * p.models());
      mask.by_value = by_value;
      mask.rescale = rescale;
      const double* row = numbers(p.op, "rows", rows, p.models() * 5);
      for (int64_t i = 0; row && i < p.models(); ++i, row += 5)
        choices.push_back(
            {int64_t(row[0]), int64_t(row[1]), float(row[2]), float(row[3]), row[4] != 0});
      mask.rows = rows ? choices.data() : nullptr;
    }

    static Cut cut(const Parts& p, const char* name, const Maybe& bits, const Maybe& ties,
                   bool by_variance) {
      Cut cut{};
      if (!bits) return cut;
      STD_TORCH_CHECK(ties, p.op, ": expected ties with the cut ", name);
      const int64_t streams = by_variance ? 1 : p.models();
      cut.groups = bits->numel() == streams ? 1 : p.count;
      cut.bits = values<int32_t>(p.op, name, *bits, cut.groups * streams, true);
      cut.ties = values<int64_t>(p.op, name, *ties, cut.groups * streams, true);
      cut.variance = by_variance;
      return cut;
    }
  };

  static void soup(const Tensors& sources, const Tensors& bases, const Tensors& outs,
                   const Ints& offsets, const Ints& keys, const Tensor& weights,
                   const Tensor& scale, bool by_row, bool wide, bool stochastic) {
    const char* op = "soup_";
    if (outs.empty()) return;
    Engine engine(op, outs[0]);
    Parts p(op, outs.size(), sources, bases, {}, outs, offsets, keys, {});
    const int64_t count = by_row ? p.rows() : p.count;
    const Soup call{p.table,
                    numbers(op, "weights", weights, count * p.models()),
                    numbers(op, "scale", scale, count),
                    by_row,
                    wide,
                    rounding(stochastic)};
    engine.run(op, outs[0], call);
    p.finish();
  }

  static void merge(const Tensors& sources, const Tensors& bases, const Tensors& outs,
                    const Ints& offsets, const Ints& keys, const Ints& models, int64_t election,
                    bool weighted, int64_t zero, int64_t combine, GEMMA_EXT_MASK_ARGUMENTS,
                    bool rescale, const Tensor& weights, const Tensor& divide, const Maybe& alone,
                    const Tensor& scale, bool wide, bool stochastic) {
    const char* op = "soup_merge_";
    if (outs.empty()) return;
    Engine engine(op, outs[0]);
    Parts p(op, outs.size(), sources, bases, {}, outs, offsets, keys, models);
    const PreparedMask mask(p, GEMMA_EXT_MASK_NAMES, rescale);
    const int64_t count = p.count * p.models();
    const Merge call{p.table,
                     rule(op, election, weighted, zero, combine),
                     mask.mask,
                     numbers(op, "weights", weights, count),
                     numbers(op, "divide", divide, count),
                     numbers(op, "alone", alone, count),
                     numbers(op, "scale", scale, p.count),
                     wide,
                     rounding(stochastic)};
    engine.run(op, outs[0], call);
    p.finish();
  }

  static Rule rule(const char* op, int64_t election, bool weighted, int64_t zero, int64_t combine) {
    STD_TORCH_CHECK(
        election >= 0 && election <= 2 && combine >= 0 && combine <= 3 && zero >= -1 && zero <= 1,
        op, ": expected a known election, zero and combination");
    return {Election(election), weighted, int(zero), Combine(combine)};
  }

  // Groups of the parts, below the first size of what they lead into.
  static const int64_t* checked_groups(const Parts& p, const Ints& groups, const Tensor& into) {
    STD_TORCH_CHECK(int64_t(groups.size()) == p.count, p.op, ": expected ", p.count,
                    " groups, got ", groups.size());
    for (int64_t g : groups)
      STD_TORCH_CHECK(g >= 0 && g < into.size(0), p.op, ": expected groups below ", into.size(0),
                      ", got ", g);
    return groups.data();
  }

  static void survey(const Tensors& sources, const Tensors& bases, const Ints& groups,
                     bool variance, const Tensor& coarse, const Tensor& zeros, const Maybe& odd,
                     const Maybe& window, const Maybe& prefix, const Maybe& fine) {
    const char* op = "soup_survey_";
    if (sources.empty()) return;
    Engine engine(op, sources[0]);
    Parts p(op, groups.size(), sources, bases, {}, {}, {}, {}, {});
    const int64_t streams = variance ? 1 : p.models(), rows = coarse.size(0) * streams;
    Survey call{};
    call.table = p.table;
    call.group = checked_groups(p, groups, coarse);
    call.variance = variance;
    call.coarse = values<int64_t>(op, "coarse", coarse, rows * kCoarse, true);
    call.zeros = values<int64_t>(op, "zeros", zeros, rows, true);
    if (odd) call.odd = values<int64_t>(op, "odd", *odd, rows * kCoarse, true);
    if (window) call.window = values<int64_t>(op, "window", *window, rows * 2, true);
    if (prefix) {
      STD_TORCH_CHECK(fine && prefix->dim() == 3, op, ": expected prefix [G, S, C] and fine");
      call.cuts = int(prefix->size(2));
      call.prefix = values<int64_t>(op, "prefix", *prefix, rows * call.cuts, true);
      call.fine = values<int64_t>(op, "fine", *fine, rows * call.cuts * kFine, true);
    }
    engine.run(op, sources[0], call);
  }

  static void sums(const Tensors& sources, const Tensors& bases, const Tensors& extras,
                   const Ints& offsets, const Ints& keys, const Ints& models, const Ints& groups,
                   int64_t sum, GEMMA_EXT_MASK_ARGUMENTS, const Tensor& state, const Maybe& top) {
    const char* op = "soup_sums_";
    if (sources.empty()) return;
    Engine engine(op, sources[0]);
    Parts p(op, groups.size(), sources, bases, extras, {}, offsets, keys, models);
    const PreparedMask mask(p, GEMMA_EXT_MASK_NAMES, false);
    STD_TORCH_CHECK(sum >= 0 && sum <= 2, op, ": expected a known sum, got ", sum);
    const int64_t m = p.models();
    const int64_t quantities = sum == 0 ? m * (m + 1) / 2 : sum == 1 ? 4 * m : m;
    STD_TORCH_CHECK(sum != 2 || p.table.extras == 1, op, ": expected one extra tensor per part");
    STD_TORCH_CHECK(sum != 1 || top, op, ": expected top with norms");
    Sums call{};
    call.table = p.table;
    call.sum = Sum(sum);
    call.group = checked_groups(p, groups, state);
    call.mask = mask.mask;
    call.state = values<double>(op, "state", state, state.size(0) * quantities * kState, true);
    if (top) call.top = values<double>(op, "top", *top, state.size(0) * m * 2, true);
    engine.run(op, sources[0], call);
  }

  static Tensor gram_rows(const Tensors& sources, const Tensors& bases, int64_t models) {
    const char* op = "soup_gram_rows";
    STD_TORCH_CHECK(models > 0 && !sources.empty() && sources.size() % models == 0, op,
                    ": expected ", models, " sources per part");
    Engine engine(op, sources[0]);
    Parts p(op, int64_t(sources.size()) / models, sources, bases, {}, {}, {}, {}, {});
    Tensor out = new_empty(sources[0], {p.rows(), models, models}, ScalarType::Double);
    engine.run(op, sources[0], GramRows{p.table, static_cast<double*>(out.mutable_data_ptr())});
    return out;
  }

  static Tensor counts(const Tensors& sources, const Tensors& bases, const Ints& offsets,
                       const Ints& keys, const Ints& models, int64_t parts, int64_t count,
                       int64_t election, bool weighted, GEMMA_EXT_MASK_ARGUMENTS, bool rescale,
                       const Tensor& weights, const Tensor& divide) {
    const char* op = "soup_counts";
    STD_TORCH_CHECK(!sources.empty() && parts > 0, op, ": expected at least one source");
    STD_TORCH_CHECK(count == 0 || count == 1, op, ": expected a known count, got ", count);
    Engine engine(op, sources[0]);
    Parts p(op, parts, sources, bases, {}, {}, offsets, keys, models);
    const PreparedMask mask(p, GEMMA_EXT_MASK_NAMES, rescale);
    Tensor out = count == 0 ? torch::stable::new_zeros(sources[0], {p.count, p.models(), 2},
                                                       ScalarType::Long)
                            : torch::stable::new_zeros(sources[0], {p.count}, ScalarType::Long);
    const Counts call{p.table,
                      Count(count),
                      rule(op, election, weighted, 0, 0),
                      mask.mask,
                      numbers(op, "weights", weights, p.count * p.models()),
                      numbers(op, "divide", divide, p.count * p.models()),
                      static_cast<int64_t*>(out.mutable_data_ptr())};
    engine.run(op, sources[0], call);
    return out;
  }

  static void apply(const Tensors& sources, const Tensors& bases, const Tensors& extras,
                    const Tensors& outs, const Ints& offsets, const Ints& keys, const Ints& models,
                    int64_t element, const Tensor& given, int64_t votes, int64_t task,
                    bool stochastic) {
    const char* op = "soup_apply_";
    if (outs.empty()) return;
    Engine engine(op, outs[0]);
    Parts p(op, outs.size(), sources, bases, extras, outs, offsets, keys, models);
    const int64_t m = p.models();
    const int64_t columns[] = {m + 1, 2 * m + 1, 1, 2, m, m, m + 1};
    STD_TORCH_CHECK(element >= 0 && element <= 6 && m > 0, op,
                    ": expected a known rule and models");
    const Element kind = Element(element);
    STD_TORCH_CHECK((kind != Element::kConsensus && kind != Element::kNearswap) || !bases.empty(),
                    op, ": expected bases");
    STD_TORCH_CHECK(kind != Element::kFisher || p.table.extras == m, op,
                    ": expected one extra tensor per source");
    const Apply call{p.table,
                     kind,
                     numbers(op, "numbers", given, p.count * columns[element]),
                     int(columns[element]),
                     int(votes),
                     int(task),
                     rounding(stochastic)};
    engine.run(op, outs[0], call);
    p.finish();
  }

  static void swarm(const Tensors& xs, const Tensors& vs, const Tensors& pulls, const Ints& offsets,
                    const Ints& keys, const Tensor& given, bool stochastic) {
    const char* op = "soup_swarm_";
    if (xs.empty()) return;
    Engine engine(op, xs[0]);
    const int64_t count = xs.size();
    STD_TORCH_CHECK(int64_t(pulls.size()) == 3 * count && int64_t(vs.size()) == count, op,
                    ": expected a velocity and 3 pulls per particle");
    Tensors sources;
    for (int64_t i = 0; i < count; ++i) {
      sources.push_back(xs[i]);
      for (int k = 0; k < 3; ++k) sources.push_back(pulls[3 * i + k]);
    }
    Parts p(op, count, sources, {}, {}, xs, offsets, keys, {});
    std::vector<Array> velocity;
    for (int64_t i = 0; i < count; ++i) velocity.push_back(p.write("vs", vs[i], xs[i].numel()));
    const Swarm call{p.table, velocity.data(), numbers(op, "numbers", given, count * 5),
                     rounding(stochastic)};
    engine.run(op, xs[0], call);
    p.finish();
  }

  static void gather_rows(const Tensor& out, const Tensors& sources, const Tensor& rows) {
    const char* op = "soup_gather_rows_";
    Engine engine(op, out);
    STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && Engine::here(out), op,
                    ": expected out to be contiguous, [V, D]");
    const int64_t models = sources.size(), count = out.size(0), width = out.size(1);
    STD_TORCH_CHECK(models > 0 && models <= kMaxModels, op, ": expected 1 to ", kMaxModels,
                    " sources, got ", models);
    Tensors kept;
    std::vector<Array> source;
    Ints limit;
    for (const Tensor& t : sources) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width && Engine::here(t), op,
                      ": expected sources to be [V_m, ", width, "] on the device of out");
      kept.push_back(torch::stable::contiguous(t));
      source.push_back({kept.back().data_ptr(), storage_type(op, "sources", t)});
      limit.push_back(t.size(0));
    }
    const GatherRows call{source.data(), values<int64_t>(op, "rows", rows, count * models, true),
                          limit.data(),  {out.mutable_data_ptr(), storage_type(op, "out", out)},
                          int(models),   count,
                          width};
    for (int64_t i = 0; rows.is_cpu() && i < count * models; ++i)
      STD_TORCH_CHECK(call.rows[i] < limit[i % models], op, ": expected rows of source ",
                      i % models, " below ", limit[i % models], ", got ", call.rows[i]);
    if (count && width) engine.run(op, out, call);
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("soup_", TORCH_BOX(&Binding::soup));
    m.impl("soup_merge_", TORCH_BOX(&Binding::merge));
    m.impl("soup_survey_", TORCH_BOX(&Binding::survey));
    m.impl("soup_sums_", TORCH_BOX(&Binding::sums));
    m.impl("soup_gram_rows", TORCH_BOX(&Binding::gram_rows));
    m.impl("soup_counts", TORCH_BOX(&Binding::counts));
    m.impl("soup_apply_", TORCH_BOX(&Binding::apply));
    m.impl("soup_swarm_", TORCH_BOX(&Binding::swarm));
    m.impl("soup_gather_rows_", TORCH_BOX(&Binding::gather_rows));
  }
};

}  // namespace gemma_ext::souping
