// SPDX-License-Identifier: Apache-2.0
// One step of the scheduler: which rows run, and what follows from their reports.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <tuple>

#include "host/scheduler.h"

namespace gemma_ext::host {

namespace {
constexpr int kCurrentItem = -1, kPromptItem = -2;
}

const Plan& Scheduler::plan() {
  if (outstanding_) throw std::logic_error("scheduler: the last step was not reported");
  ++counters_.ticks;
  begin_plan(Stage::kIdle);
  do {
    if (options_.device) {
      retry_routed();
    } else {
      retry_stalled();
    }
    if (plan_restore()) break;
    admit();
    if (options_.device) {
      if (!plan_routed()) continue;
      break;
    }
    const bool work = block_work();
    const bool head = !coda_.empty() && !(waves() && pass_runs());
    if (!scores_.empty()) {
      plan_score();
    } else if (head && (static_cast<int>(coda_.size()) >= options_.min_coda || !work)) {
      plan_coda();
    } else if (work) {
      plan_block();
    } else if (!stalled_.empty()) {
      if (!relieve()) continue;
    }
    break;
  } while (true);
  bury();
  plan_.opened.swap(opened_);
  plan_.ended.swap(ended_);
  plan_.closed.swap(closed_);
  opened_.clear();
  ended_.clear();
  closed_.clear();
  return plan_;
}

bool Scheduler::block_work() const {
  return !ready_.empty() || !pass_.empty() || !prefill_.empty() || !filling_.empty();
}

// Whether this step may start prompts, and takes tokens, where both do not share steps.
bool Scheduler::starts_prompts() {
  if (options_.mixed || prefill_.empty()) return true;
  const bool tokens = !ready_.empty() || !pass_.empty();
  prompts_turn_ = !tokens || !prompts_turn_;
  return prompts_turn_;
}

void Scheduler::plan_block() {
  begin_plan(Stage::kBlock);
  rows_.clear();
  bool prompts = true, tokens = true, start = true;
  if (waves() && pass_runs()) {
    start = false;
  } else {
    prompts = starts_prompts();
    tokens = options_.mixed || !prompts || prefill_.empty();
    if (waves() && tokens) {
      while (!ready_.empty() && static_cast<int>(pass_.size()) < options_.width) {
        pass_.push_back(ready_.front());
        ready_.pop_front();
      }
    }
  }
  if (tokens) {
    counters_.most_ready = std::max<int64_t>(counters_.most_ready, ready_.size());
    int current = 0;
    for (Request* r : candidates()) {
      if (current == options_.width || room() == 0) break;
      current += add_current(*r);
    }
    ready_.erase(std::remove_if(ready_.begin(), ready_.end(),
                                [](Request* r) { return r->state == State::kRunning; }),
                 ready_.end());
    add_spare_fills();
  }
  if (prompts) add_prompts(start);
  lay_out();
}

std::vector<Request*> Scheduler::candidates() {
  if (waves()) return pass_;
  std::vector<Request*> found(ready_.begin(), ready_.end());
  if (options_.order == Order::kDeepest) {
    std::stable_sort(found.begin(), found.end(),
                     [](Request* a, Request* b) { return a->loop > b->loop; });
  } else if (options_.order == Order::kUniform && !found.empty()) {
    // one loop alone reads one loop's adapters; worth it where it fills the step, and the rest too
    const int loop = found.front()->loop;
    const auto same = [loop](Request* r) { return r->loop == loop; };
    const auto count = std::count_if(found.begin(), found.end(), same);
    const auto rest = static_cast<int64_t>(found.size()) - count;
    if (count >= options_.width && rest >= options_.width)
      found.erase(std::remove_if(found.begin(), found.end(), [&](Request* r) { return !same(r); }),
                  found.end());
  }
  return found;
}

// The token of the request with what it needs filled; whether the token itself is among the rows.
// Fills that do not fit run first, in the order of their positions, and hold it back.
bool Scheduler::add_current(Request& r) {
  if (r.draining) {
    add_fills(r, room(), false);
    return false;
  }
  if (exact() && r.loop > 0) {
    const auto due = std::count_if(r.deferred.begin(), r.deferred.end(),
                                   [&](const Deferred& item) { return item.loops == r.loop; });
    const bool fits = due < room();
    add_fills(r, room(), true);
    if (!fits) return false;
  }
  rows_.push_back({&r, r.slot, r.pos, r.loop, kCurrentItem});
  r.state = State::kRunning;
  counters_.most_wait = std::max(counters_.most_wait, counters_.blocks - r.since);
  return true;
}

// Unfilled tokens that may run their next loop: every earlier token has run it, or does in this
// step. `due`: only at the loop of the request's current token.
void Scheduler::add_fills(Request& r, int most, bool due) {
  int left = INT_MAX, taken = INT_MAX;  // least loops of earlier tokens that stay, that run
  for (int i = 0; i < static_cast<int>(r.deferred.size()) && most > 0; ++i) {
    Deferred& item = r.deferred[i];
    const bool may = !item.chosen && left > item.loops && taken >= item.loops;
    if (may && (!due || item.loops == r.loop)) {
      rows_.push_back({&r, item.slot, item.pos, item.loops, i});
      item.chosen = true;
      --most;
    }
    int& least = item.chosen ? taken : left;
    least = std::min(least, item.loops);
  }
}

// Rows of the width that no token took: of requests that run, in turn, then of those that ended.
void Scheduler::add_spare_fills() {
  const auto spare = [&] { return options_.width - static_cast<int>(rows_.size()); };
  if (options_.fills == Fills::kEager) {
    for (int i = 0; i < options_.requests && spare() > 0; ++i) {
      Request* r = resident_[(spare_turn_ + i) % options_.requests];
      if (r && r->state != State::kFilling && r->state != State::kStalled)
        add_fills(*r, spare(), false);
    }
    spare_turn_ = (spare_turn_ + 1) % options_.requests;
  }
  for (Request* r : filling_) {
    if (spare() <= 0) break;
    add_fills(*r, spare(), false);
  }
}

void Scheduler::add_prompts(bool start) {
  int budget = options_.prefill;
  for (Request* r : prefill_) {
    for (size_t i = 0; i < r->slots.size(); ++i)
      rows_.push_back({r, r->slots[i], r->begin + static_cast<int>(i), r->chunk_loop, kPromptItem});
    budget -= static_cast<int>(r->slots.size());
  }
  if (!start) return;
  for (Request* r : prefill_) {
    if (!r->slots.empty()) continue;
    int length = std::min(r->target - r->begin, budget);
    if (options_.aligned) {
      const int whole =
          std::min(r->target - r->begin, options_.prefill - r->begin % options_.prefill);
      if (whole > budget) return;
      length = whole;
    }
    if (length <= 0) return;
    r->chunk_loop = 0;
    prompt_slots_ += length;
    for (int i = 0; i < length; ++i) {
      r->slots.push_back(slots_.take());
      rows_.push_back({r, r->slots.back(), r->begin + i, 0, kPromptItem});
    }
    budget -= length;
  }
}

// Stable counting sort by loop into the plan.
void Scheduler::lay_out() {
  const int n = static_cast<int>(rows_.size());
  if (n == 0) throw std::logic_error("scheduler: work waits, but no row can run");
  std::fill(plan_.seg.begin(), plan_.seg.end(), 0);
  for (const Row& row : rows_) ++plan_.seg[row.loop + 1];
  int distinct = 0;
  for (int j = 0; j < options_.loops; ++j) {
    distinct += plan_.seg[j + 1] > 0;
    plan_.seg[j + 1] += plan_.seg[j];
  }
  std::vector<int> next(plan_.seg.begin(), plan_.seg.end() - 1);
  std::vector<Row> sorted(n);
  for (const Row& row : rows_) sorted[next[row.loop]++] = row;
  rows_.swap(sorted);
  if (options_.verify) verify_rows();
  step_.clear();
  plan_.n = n;
  for (int i = 0; i < n; ++i) {
    const Row& row = rows_[i];
    const Kind kind = row.item == kCurrentItem  ? Kind::kCurrent
                      : row.item == kPromptItem ? Kind::kPrompt
                                                : Kind::kFill;
    plan_.slot[i] = row.slot;
    plan_.pos[i] = row.pos;
    plan_.row[i] = row.request->row;
    plan_.loop[i] = row.loop;
    plan_.kind[i] = static_cast<int32_t>(kind);
    plan_.token[i] = row.request->tokens[row.pos];
    pages_.marks(row.request->pages[row.pos / kPage])[row.pos % kPage] = row.loop + 1;
    counters_.current_rows += kind == Kind::kCurrent;
    counters_.fill_rows += kind == Kind::kFill;
    counters_.prompt_rows += kind == Kind::kPrompt;
    if (step_.empty() || step_.back() != row.request) step_.push_back(row.request);
  }
  std::sort(step_.begin(), step_.end());
  step_.erase(std::unique(step_.begin(), step_.end()), step_.end());
  ++counters_.blocks;
  counters_.rows += n;
  counters_.distinct_loops += distinct;
  counters_.mixed_blocks += distinct > 1;
}

void Scheduler::verify_rows() const {
  if (options_.fills == Fills::kNone) return;
  const auto mark = [&](const Request& r, int pos) {
    return const_cast<Pages&>(pages_).marks(r.pages[pos / kPage])[pos % kPage];
  };
  std::vector<std::tuple<int64_t, int, int>> here;
  for (const Row& row : rows_) here.emplace_back(row.request->id, row.pos, row.loop);
  std::sort(here.begin(), here.end());
  if (std::adjacent_find(here.begin(), here.end()) != here.end())
    throw std::logic_error("scheduler: a row is in the step twice");
  for (const Row& row : rows_) {
    const Request& r = *row.request;
    if (mark(r, row.pos) != row.loop)
      throw std::logic_error("scheduler: a token runs a loop twice or skips one");
    for (int pos = 0; pos < row.pos; ++pos)
      if (mark(r, pos) <= row.loop &&
          !std::binary_search(here.begin(), here.end(), std::tuple{r.id, pos, row.loop}))
        throw std::logic_error("scheduler: request " + std::to_string(r.id) + " at position " +
                               std::to_string(row.pos) + " and loop " + std::to_string(row.loop) +
                               " reads position " + std::to_string(pos) + ", which has " +
                               std::to_string(mark(r, pos)) + " loops");
  }
}

void Scheduler::report_block(const uint8_t* exits) {
  end_plan(Stage::kBlock);
  for (const Row& row : rows_) {
    if (row.item < 0 || row.request->cancelled) continue;
    Deferred& item = row.request->deferred[row.item];
    ++item.loops;
    item.chosen = false;
  }
  for (Request* r : step_)
    if (!r->cancelled && !r->deferred.empty()) settle_fills(*r);
  Request* chunk = nullptr;
  for (int i = 0; i < plan_.n; ++i) {
    Request& r = *rows_[i].request;
    if (r.cancelled) continue;
    if (rows_[i].item == kCurrentItem) ran(r, exits && exits[i]);
    if (rows_[i].item == kPromptItem && &r != chunk) chunk_ran(*(chunk = &r));
  }
  bury();
}

// Tokens that have all the loops their request can reach leave the backlog.
void Scheduler::settle_fills(Request& r) {
  const auto full = [&](const Deferred& item) {
    if (item.loops < r.asked.max_loops) return false;
    if (options_.drafts) {
      add_check(r, item);
    } else {
      slots_.give(item.slot);
    }
    return true;
  };
  r.deferred.erase(std::remove_if(r.deferred.begin(), r.deferred.end(), full), r.deferred.end());
  if (options_.drafts) {
    if (r.draining) hold(r);
    return;
  }
  if (static_cast<int>(r.deferred.size()) <= options_.backlog / 2) r.draining = false;
  if (r.state != State::kFilling || !r.deferred.empty()) return;
  publish(r);
  release(r);
}

// The current token has run one loop more.
void Scheduler::ran(Request& r, bool signal) {
  const Submission& asked = r.asked;
  const int loops = ++r.loop;
  bool leaves = loops == asked.max_loops;
  if (options_.mode != Mode::kSequence && options_.mode != Mode::kStatic) {
    leaves |= asked.depths.empty() ? signal && loops >= asked.min_loops
                                   : loops >= asked.depths[r.outputs];
  }
  if (leaves) {
    r.depth = loops;
    r.left = true;
    r.state = State::kCoda;
    coda_.push_back(&r);
    if (waves()) pass_.erase(std::find(pass_.begin(), pass_.end(), &r));
    return;
  }
  r.state = State::kReady;
  r.since = counters_.blocks;
  if (!waves()) ready_.push_back(&r);
}

void Scheduler::chunk_ran(Request& r) {
  if (++r.chunk_loop < r.asked.max_loops) return;
  if (r.asked.score && !r.outputs) {
    prefill_.erase(std::find(prefill_.begin(), prefill_.end(), &r));
    scores_.push_back(&r);
  } else {
    chunk_done(r);
  }
}

void Scheduler::chunk_done(Request& r) {
  const int length = static_cast<int>(r.slots.size());
  const bool last = r.begin + length == r.target;
  const bool draws = last && !r.outputs && r.asked.max_tokens > 0;
  const int behind = r.slots.back();
  if (draws && !options_.device) {
    r.slot = r.slots.back();
    r.slots.pop_back();
  }
  for (const int slot : r.slots) slots_.give(slot);
  r.slots.clear();
  prompt_slots_ -= length;
  r.begin += length;
  if (!r.outputs) counters_.prompt_tokens += length;
  if (!last) return;
  const auto place = std::find(prefill_.begin(), prefill_.end(), &r);
  if (place != prefill_.end()) prefill_.erase(place);
  publish(r);
  if (draws && options_.device) {
    start(r, behind);
  } else if (draws) {
    r.pos = r.target - 1;
    r.depth = r.asked.max_loops;
    r.left = true;
    r.state = State::kCoda;
    coda_.push_back(&r);
  } else if (r.outputs) {
    begin_token(r, true);
  } else {
    ended_.emplace_back(r.id, static_cast<int>(End::kLength));
    end(r);
  }
}

void Scheduler::plan_score() {
  begin_plan(Stage::kScore);
  Request& r = *scores_.front();
  scores_.pop_front();
  step_ = {&r};
  const int prompt = static_cast<int>(r.asked.prompt.size());
  for (size_t i = 0; i < r.slots.size(); ++i) {
    const int pos = r.begin + static_cast<int>(i);
    if (pos + 1 == prompt) break;
    plan_.id[plan_.n] = r.id;
    plan_.slot[plan_.n] = r.slots[i];
    plan_.row[plan_.n] = r.row;
    plan_.pos[plan_.n] = pos;
    plan_.token[plan_.n++] = r.tokens[pos + 1];
  }
}

void Scheduler::report_score() {
  end_plan(Stage::kScore);
  Request& r = *step_.front();
  if (!r.cancelled) {
    prefill_.push_front(&r);
    chunk_done(r);
  }
  bury();
}

void Scheduler::add_reading(Request& r, int slot, int pos, int depth) {
  step_.push_back(&r);
  const int i = plan_.n++;
  plan_.id[i] = r.id;
  plan_.slot[i] = slot;
  plan_.row[i] = r.row;
  plan_.pos[i] = pos;
  plan_.depth[i] = depth;
  plan_.output[i] = r.outputs;
}

void Scheduler::plan_coda() {
  begin_plan(Stage::kCoda);
  step_.clear();
  while (!coda_.empty() && plan_.n < options_.width) {
    Request& r = *coda_.front();
    if (plan_.n + r.checks.size() + 1 > plan_.id.size()) break;
    coda_.pop_front();
    r.state = State::kRunning;
    for (const Deferred& item : r.checks) add_reading(r, item.slot, item.pos, r.asked.max_loops);
    if (r.left) add_reading(r, r.slot, r.pos, r.depth);
  }
  ++counters_.codas;
  counters_.coda_rows += plan_.n;
}

// A token that was read after `r.depth` loops joins the output; whether it ends it.
End Scheduler::take_token(Request& r, int32_t token) {
  if (r.outputs) counters_.exit_loops += r.depth;
  ++exits_[r.depth - 1];
  ++counters_.outputs;
  ++r.outputs;
  r.tokens.push_back(token);
  return end_of(r, token, r.outputs);
}

End Scheduler::end_of(const Request& r, int32_t token, int outputs) const {
  const auto& stops = r.asked.stops;
  if (std::find(stops.begin(), stops.end(), token) != stops.end()) return End::kStop;
  return outputs == r.asked.max_tokens ? End::kLength : End::kNo;
}

void Scheduler::report_coda(const int32_t* tokens) {
  end_plan(Stage::kCoda);
  if (options_.drafts) {
    std::fill_n(plan_.end.begin(), plan_.n, -1);
    for (int i = 0, last; i < plan_.n; i = last) {
      Request& r = *step_[i];
      for (last = i; last < plan_.n && step_[last] == &r;) ++last;
      if (!r.cancelled) read(r, i, last, tokens);
    }
    return bury();
  }
  for (int i = 0; i < plan_.n; ++i) {
    Request& r = *step_[i];
    plan_.end[i] = static_cast<int32_t>(End::kNo);
    if (r.cancelled) continue;
    const Submission& asked = r.asked;
    const End end = take_token(r, tokens[i]);
    plan_.end[i] = static_cast<int32_t>(end);
    const bool fills_end = options_.fill_on_finish && asked.max_loops == options_.loops;
    if (options_.fills == Fills::kWrite)
      pages_.marks(r.pages[r.pos / kPage])[r.pos % kPage] = options_.loops;
    if (exact() && r.depth < asked.max_loops && (end == End::kNo || fills_end)) {
      r.deferred.push_back({r.pos, r.slot, r.depth});
    } else {
      slots_.give(r.slot);
    }
    r.slot = -1;
    if (end != End::kNo) {
      if (!fills_end) {
        for (const Deferred& item : r.deferred) slots_.give(item.slot);
        r.deferred.clear();
      }
      this->end(r);
    } else {
      begin_token(r, false);
    }
  }
  bury();
}

}  // namespace gemma_ext::host
