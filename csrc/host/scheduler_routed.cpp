// SPDX-License-Identifier: Apache-2.0
// Where the device routes tokens: prompts, memory and ends stay here, a tick or two behind.
//
// A request that the device has is in `ready_` while it has the page of its next token and in `stalled_` while it
// does not. The device stops it at `limits_`, so that nothing of a stalled request is under way.
#include <algorithm>
#include <stdexcept>

#include "host/scheduler.h"

namespace gemma_ext::host {

namespace {
int pages_of(int tokens) { return (tokens + kPage - 1) / kPage; }
}  // namespace

// Plans a prompt's loop, a tick, or what makes room. False where the queues have changed.
bool Scheduler::plan_routed() {
  if (!scores_.empty()) {
    plan_score();
  } else if (!prefill_.empty() && starts_prompts()) {
    begin_plan(Stage::kBlock);
    rows_.clear();
    add_prompts(true);
    lay_out();
  } else if (!ready_.empty() || !filling_.empty()) {
    for (Request* r : ready_) cover_ahead(*r);
    begin_plan(Stage::kTick);
    step_.clear();
    plan_.n = static_cast<int>(ready_.size());
  } else if (!stalled_.empty()) {
    return relieve();
  }
  return true;
}

// Whether the request has the page of its next token, taking it if it can.
bool Scheduler::cover(Request& r) {
  while (r.pages.size() * kPage < r.tokens.size()) {
    const int page = take_page();
    if (page < 0) return false;
    add_page(r, page);
  }
  return true;
}

// Pages for the tokens that the device may draw before the scheduler hears of them.
void Scheduler::cover_ahead(Request& r) {
  const int total = static_cast<int>(r.asked.prompt.size()) + r.asked.max_tokens;
  const int tokens = std::min(static_cast<int>(r.tokens.size()) + options_.ahead, total);
  while (stalled_.empty() && static_cast<int>(r.pages.size()) < pages_of(tokens) &&
         pages_.available() > 0)
    add_page(r, take_page());
}

void Scheduler::retry_routed() {
  while (!stalled_.empty() && cover(*stalled_.front())) {
    Request& r = *stalled_.front();
    stalled_.pop_front();
    r.state = State::kReady;
    ready_.push_back(&r);
  }
}

// The request's last token runs next; its row of the device goes on where it stands.
void Scheduler::route(Request& r) {
  r.pos = static_cast<int>(r.tokens.size()) - 1;
  const bool held = r.pages.size() * kPage >= r.tokens.size();  // the device does not stop at it
  const bool covered = held || (stalled_.empty() && cover(r));
  r.state = covered ? State::kReady : State::kStalled;
  (covered ? ready_ : stalled_).push_back(&r);
}

// The device takes the request over: its last token, or what the prompt left in `slot`.
void Scheduler::start(Request& r, int slot) {
  started_.push_back({r.id, r.row, static_cast<int>(r.tokens.size()) - 1, slot});
  route(r);
}

void Scheduler::stop_row(const Request& r) {
  if (!options_.device || r.row < 0) return;
  const auto same = [&](const Start& s) { return s.id == r.id; };
  started_.erase(std::remove_if(started_.begin(), started_.end(), same), started_.end());
  stopped_.push_back(r.row);
}

std::pair<std::vector<int>, std::vector<Start>> Scheduler::handed() {
  std::pair<std::vector<int>, std::vector<Start>> found;
  found.first.swap(stopped_);
  found.second.swap(started_);
  return found;
}

void Scheduler::report_launched() { end_plan(Stage::kTick); }

void Scheduler::report_drawn(const std::vector<Drawn>& drawn, const Ran& ran) {
  if (outstanding_) throw std::logic_error("scheduler: the last step was not reported");
  if (drawn.size() > plan_.end.size())
    throw std::invalid_argument("drawn: expected at most " + std::to_string(plan_.end.size()) +
                                " tokens, got " + std::to_string(drawn.size()));
  counters_.blocks += ran.rows > 0;
  counters_.rows += ran.rows;
  counters_.current_rows += ran.current;
  counters_.fill_rows += ran.fills;
  counters_.distinct_loops += ran.loops;
  counters_.mixed_blocks += ran.loops > 1;
  counters_.codas += !drawn.empty();
  for (size_t i = 0; i < drawn.size(); ++i) {
    plan_.end[i] = -1;
    const auto found = requests_.find(drawn[i].id);
    if (found == requests_.end()) continue;
    Request& r = *found->second;
    if (r.state != State::kReady && r.state != State::kStalled) continue;
    plan_.output[i] = r.outputs;
    ++counters_.coda_rows;
    r.depth = drawn[i].depth;
    const End end = take_token(r, drawn[i].token);
    plan_.end[i] = static_cast<int32_t>(end);
    if (end != End::kNo) {
      if (exact()) mark_filled(r, drawn[i].filled);
      if (owes_at_end(r, drawn[i].filled)) {
        leave_queues(r);
        r.state = State::kFilling;
        filling_.push_back(&r);
        ++counters_.finished;
      } else {
        this->end(r);
      }
      continue;
    }
    auto& queue = r.state == State::kReady ? ready_ : stalled_;
    queue.erase(std::find(queue.begin(), queue.end(), &r));
    route(r);
  }
  bury();
}

// The first positions of the request have all its loops.
void Scheduler::mark_filled(Request& r, int positions) {
  for (int pos = 0; pos < positions; ++pos) {
    uint8_t& mark = pages_.marks(r.pages[pos / kPage])[pos % kPage];
    mark = std::max<uint8_t>(mark, r.asked.max_loops);  // others may share the page
  }
}

// Whether the device fills what a complete output owes: where it knows itself that the output is complete.
bool Scheduler::owes_at_end(const Request& r, int filled) const {
  if (!options_.fill_on_finish || r.asked.max_loops < options_.loops) return false;
  const auto& stops = r.asked.stops;
  const auto known = stops.begin() + std::min<size_t>(stops.size(), kDeviceStops);
  const bool ends =
      r.outputs == r.asked.max_tokens || std::find(stops.begin(), known, r.tokens.back()) != known;
  return ends && filled + 1 < static_cast<int>(r.tokens.size());
}

void Scheduler::report_filled(const std::vector<int64_t>& ids) {
  for (const int64_t id : ids) {
    const auto found = requests_.find(id);
    if (found == requests_.end() || found->second->state != State::kFilling) continue;
    Request& r = *found->second;
    mark_filled(r, static_cast<int>(r.tokens.size()) - 1);
    publish(r);
    release(r);
  }
  bury();
}

}  // namespace gemma_ext::host
