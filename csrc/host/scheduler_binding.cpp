// SPDX-License-Identifier: Apache-2.0
#include "host/scheduler_binding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>

#include "host/scheduler.h"

namespace py = pybind11;

namespace gemma_ext::host {

namespace {

template <class T>
using Input = py::array_t<T, py::array::c_style | py::array::forcecast>;

// The position of a name in the list that gives an enumeration its words.
template <class Enum>
Enum choice(const char* what, const std::string& name, std::initializer_list<const char*> words) {
  int index = 0;
  std::string all;
  for (const char* word : words) {
    if (name == word) return static_cast<Enum>(index);
    all += (index++ ? ", " : "") + std::string(word);
  }
  throw std::invalid_argument(std::string(what) + ": expected one of " + all + ", got '" + name +
                              "'");
}

// Memory of the scheduler as an array that keeps it alive.
template <class T>
py::array_t<T> view(const std::vector<T>& memory, std::vector<py::ssize_t> shape,
                    py::object owner) {
  return py::array_t<T>(std::move(shape), memory.data(), std::move(owner));
}

py::dict buffers(py::object self) {
  const auto& s = self.cast<const Scheduler&>();
  const Plan& p = s.current();
  const auto flat = [&](const auto& memory) {
    return view(memory, {static_cast<py::ssize_t>(memory.size())}, self);
  };
  py::dict found;
  found["slot"] = flat(p.slot);
  found["pos"] = flat(p.pos);
  found["row"] = flat(p.row);
  found["loop"] = flat(p.loop);
  found["kind"] = flat(p.kind);
  found["token"] = flat(p.token);
  found["depth"] = flat(p.depth);
  found["output"] = flat(p.output);
  found["end"] = flat(p.end);
  found["id"] = flat(p.id);
  found["seg_offsets"] = flat(p.seg);
  found["block_tables"] = view(s.tables(), {s.options().requests, s.options().request_pages}, self);
  found["fill_marks"] =
      view(self.cast<Scheduler&>().pages().all_marks(), {s.options().pages, kPage}, self);
  found["exits"] = flat(s.exits());
  found["limits"] = flat(s.limits());
  return found;
}

py::dict counters(const Scheduler& s) {
  const Counters& c = s.counters();
  py::dict found;
  const std::pair<const char*, int64_t> named[] = {{"ticks", c.ticks},
                                                   {"blocks", c.blocks},
                                                   {"codas", c.codas},
                                                   {"mixed_blocks", c.mixed_blocks},
                                                   {"rows", c.rows},
                                                   {"current_rows", c.current_rows},
                                                   {"fill_rows", c.fill_rows},
                                                   {"prompt_rows", c.prompt_rows},
                                                   {"coda_rows", c.coda_rows},
                                                   {"distinct_loops", c.distinct_loops},
                                                   {"outputs", c.outputs},
                                                   {"prompt_tokens", c.prompt_tokens},
                                                   {"exit_loops", c.exit_loops},
                                                   {"cached_tokens", c.cached_tokens},
                                                   {"preemptions", c.preemptions},
                                                   {"offloads", c.offloads},
                                                   {"most_wait", c.most_wait},
                                                   {"most_ready", c.most_ready},
                                                   {"finished", c.finished},
                                                   {"cancelled", c.cancelled},
                                                   {"dropped_fills", c.dropped_fills},
                                                   {"accepted", c.accepted},
                                                   {"rejected", c.rejected}};
  for (const auto& [name, value] : named) found[name] = value;
  return found;
}

const char* stage_name(Stage stage) {
  constexpr const char* names[] = {"idle", "block", "coda", "score", "offload", "restore", "tick"};
  return names[static_cast<int>(stage)];
}

}  // namespace

void bind_scheduler(py::module_& m) {
  m.attr("DEVICE_STOPS") = kDeviceStops;
  py::class_<Scheduler>(
      m, "Scheduler",
      "Which rows of which requests run next, at which loops: `plan`, run it, report it. No call "
      "waits for another thread; one thread at a time.")
      .def(py::init([](int loops, int width, int fill_rows, int requests, int slots, int pages,
                       int request_pages, int backlog, int prefill, bool mixed, bool aligned,
                       int min_coda, int min_rows, double margin, const std::string& mode,
                       const std::string& fills, const std::string& pressure,
                       const std::string& order, const std::string& publish, bool fill_on_finish,
                       bool verify, bool device, int ahead, int prefix, int drafts,
                       const std::string& salt) {
             Options o;
             o.loops = loops;
             o.width = width;
             o.fill_rows = fill_rows;
             o.requests = requests;
             o.slots = slots;
             o.pages = pages;
             o.request_pages = request_pages;
             o.backlog = backlog;
             o.prefill = prefill;
             o.mixed = mixed;
             o.aligned = aligned;
             o.min_coda = min_coda;
             o.min_rows = min_rows;
             o.margin = margin;
             const std::pair<const char*, int> counts[] = {
                 {"loops", loops},     {"width", width},    {"requests", requests},
                 {"slots", slots},     {"pages", pages},    {"request_pages", request_pages},
                 {"backlog", backlog}, {"prefill", prefill}};
             for (const auto& [name, value] : counts)
               if (value < 1)
                 throw std::invalid_argument(std::string(name) + ": expected at least 1, got " +
                                             std::to_string(value));
             if (loops > 255)
               throw std::invalid_argument("loops: expected at most 255, got " +
                                           std::to_string(loops));
             o.mode = choice<Mode>("mode", mode, {"cdb", "csb", "lockstep", "static"});
             o.fills = choice<Fills>("fills", fills, {"none", "write", "lazy", "eager"});
             o.pressure = choice<Pressure>("pressure", pressure,
                                           {"none", "reserve", "recompute", "offload"});
             o.order = choice<Order>("order", order, {"fifo", "deepest", "uniform"});
             o.publish = choice<Publish>("publish", publish, {"none", "prompt", "all"});
             o.fill_on_finish = fill_on_finish;
             o.verify = verify;
             o.device = device;
             o.ahead = ahead;
             o.prefix = prefix;
             o.drafts = drafts;
             o.salt = salt;
             return std::make_unique<Scheduler>(std::move(o));
           }),
           py::kw_only(), py::arg("loops"), py::arg("width"), py::arg("fill_rows"),
           py::arg("requests"), py::arg("slots"), py::arg("pages"), py::arg("request_pages"),
           py::arg("backlog"), py::arg("prefill"), py::arg("mixed"), py::arg("aligned"),
           py::arg("min_coda"), py::arg("min_rows"), py::arg("margin"), py::arg("mode"),
           py::arg("fills"), py::arg("pressure"), py::arg("order"), py::arg("publish"),
           py::arg("fill_on_finish"), py::arg("verify"), py::arg("device"), py::arg("ahead"),
           py::arg("prefix"), py::arg("drafts"), py::arg("salt"))
      .def(
          "submit",
          [](Scheduler& self, const Input<int32_t>& prompt, int max_tokens, int min_loops,
             int max_loops, bool score, std::vector<int32_t> stops,
             const std::vector<int>& depths) {
            Submission s;
            s.prompt.assign(prompt.data(), prompt.data() + prompt.size());
            s.max_tokens = max_tokens;
            s.min_loops = min_loops;
            s.max_loops = max_loops;
            s.score = score;
            s.stops = std::move(stops);
            s.depths = depths;
            return self.submit(std::move(s));
          },
          py::arg("prompt"), py::kw_only(), py::arg("max_tokens"), py::arg("min_loops"),
          py::arg("max_loops"), py::arg("score"), py::arg("stops"), py::arg("depths"))
      .def("cancel", &Scheduler::cancel, py::arg("id"))
      .def("has_work", &Scheduler::has_work)
      .def(
          "plan",
          [](Scheduler& self) {
            const Plan& plan = self.plan();
            return std::pair(stage_name(plan.stage), plan.n);
          },
          "The stage and its rows; the rest stands in `buffers`.")
      .def(
          "news",
          [](const Scheduler& self) {
            const Plan& plan = self.current();
            return py::make_tuple(plan.closed, plan.opened, plan.ended);
          },
          "Rows of the block tables that the plan found closed, opened as (request, row), and "
          "requests that ended without a token as (request, how).")
      .def("moved",
           [](const Scheduler& self) {
             const Plan& plan = self.current();
             return py::make_tuple(plan.id[0], plan.moved_pages, plan.moved_slots);
           })
      .def(
          "report_block",
          [](Scheduler& self, const std::optional<Input<uint8_t>>& exits) {
            if (exits && exits->size() != self.current().n)
              throw std::invalid_argument("exits: expected one for each row of the block");
            self.report_block(exits ? exits->data() : nullptr);
          },
          py::arg("exits"))
      .def(
          "report_coda",
          [](Scheduler& self, const Input<int32_t>& tokens) {
            if (tokens.size() != self.current().n)
              throw std::invalid_argument("tokens: expected one for each row of the coda");
            self.report_coda(tokens.data());
          },
          py::arg("tokens"))
      .def("report_score", &Scheduler::report_score)
      .def("report_moved", &Scheduler::report_moved)
      .def("report_launched", &Scheduler::report_launched,
           "A tick is under way; what it draws is reported later.")
      .def(
          "report_drawn",
          [](Scheduler& self, const Input<int64_t>& drawn, const std::array<int, 4>& ran) {
            if (drawn.ndim() != 2 || drawn.shape(1) != 4)
              throw std::invalid_argument("drawn: expected rows of request, token, depth, filled");
            std::vector<Drawn> tokens;
            const auto at = drawn.unchecked<2>();
            for (py::ssize_t i = 0; i < drawn.shape(0); ++i)
              tokens.push_back({at(i, 0), static_cast<int32_t>(at(i, 1)),
                                static_cast<int32_t>(at(i, 2)), static_cast<int32_t>(at(i, 3))});
            self.report_drawn(tokens, {ran[0], ran[1], ran[2], ran[3]});
          },
          py::arg("drawn"), py::arg("ran"),
          "drawn: int64 [n, 4] of request, token, depth and the positions with all loops; ran: "
          "rows, tokens, fills and loops of the block.")
      .def(
          "report_filled",
          [](Scheduler& self, const Input<int64_t>& ids) {
            self.report_filled({ids.data(), ids.data() + ids.size()});
          },
          py::arg("ids"), "Complete outputs whose owed loops have run on the device.")
      .def(
          "handed",
          [](Scheduler& self) {
            auto [stopped, started] = self.handed();
            py::list starts;
            for (const Start& s : started)
              starts.append(py::make_tuple(s.id, s.row, s.pos, s.slot));
            return py::make_tuple(stopped, starts);
          },
          "Rows that the device lets go, and requests that it takes over as (request, row, "
          "position, slot); each is told once.")
      .def("check", &Scheduler::check, "Raises RuntimeError where anything is lost or held twice.")
      .def("forget_prefixes", &Scheduler::forget_prefixes)
      .def("buffers", &buffers, "Arrays over the memory that every plan is written to.")
      .def("counters", &counters)
      .def("queues",
           [](const Scheduler& self) {
             const char* names[] = {"waiting", "prefill",   "ready",  "coda",
                                    "stalled", "offloaded", "filling"};
             py::dict found;
             const std::vector<int> sizes = self.queues();
             for (size_t i = 0; i < sizes.size(); ++i) found[names[i]] = sizes[i];
             return found;
           })
      .def_property_readonly("free_pages", [](Scheduler& self) { return self.pages().available(); })
      .def_property_readonly("published_pages",
                             [](Scheduler& self) { return self.pages().published(); })
      .def_property_readonly("free_slots", [](Scheduler& self) { return self.slots().available(); })
      .def(
          "tokens",
          [](const Scheduler& self, int64_t id) {
            const Request* r = self.find(id);
            return r ? py::cast(r->tokens) : py::none();
          },
          py::arg("id"), "Ids of prompt and output, None for a request that is gone.")
      .def(
          "page_keys",
          [](Scheduler& self, int64_t id) {
            std::vector<uint64_t> keys;
            if (const Request* r = self.find(id))
              for (const int page : r->pages) keys.push_back(self.pages().key(page));
            return keys;
          },
          py::arg("id"), "Hashes of a request's pages, 0 for one that is not published.");
}

}  // namespace gemma_ext::host
