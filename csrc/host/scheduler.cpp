// SPDX-License-Identifier: Apache-2.0
// Requests and what they hold. Steps are in scheduler_step.cpp.
#include "host/scheduler.h"

#include <algorithm>
#include <stdexcept>

namespace gemma_ext::host {

namespace {

int pages_of(int tokens) { return (tokens + kPage - 1) / kPage; }

template <class Queue>
void remove(Queue& queue, Request* r) {
  const auto place = std::find(queue.begin(), queue.end(), r);
  if (place != queue.end()) queue.erase(place);
}

}  // namespace

Scheduler::Scheduler(Options options)
    : options_(std::move(options)),
      pages_(options_.pages, options_.salt),
      slots_(options_.slots),
      tables_(static_cast<size_t>(options_.requests) * options_.request_pages),
      resident_(options_.requests),
      limits_(options_.requests),
      exits_(options_.loops) {
  for (int i = options_.requests - 1; i >= 0; --i) free_rows_.push_back(i);
  const size_t rows = std::max({options_.width + options_.fill_rows + options_.prefill,
                                options_.requests, options_.drafts + 1});
  for (auto* list : {&plan_.slot, &plan_.pos, &plan_.row, &plan_.loop, &plan_.kind, &plan_.token,
                     &plan_.depth, &plan_.output, &plan_.end})
    list->resize(rows);
  plan_.id.resize(rows);
  plan_.seg.resize(options_.loops + 1);
}

int64_t Scheduler::submit(Submission s) {
  const int total = static_cast<int>(s.prompt.size()) + s.max_tokens;
  const int most = std::min(options_.pages, options_.request_pages);
  if (s.prompt.empty())
    throw std::invalid_argument("prompt: expected at least one token, got none");
  if (pages_of(total) > most)
    throw std::invalid_argument("prompt: expected at most " + std::to_string(most * kPage) +
                                " tokens of prompt and output, what the KV pool gives a request, "
                                "got " +
                                std::to_string(s.prompt.size()) + " + " +
                                std::to_string(s.max_tokens));
  if (s.min_loops < 1 || s.max_loops < s.min_loops || s.max_loops > options_.loops)
    throw std::invalid_argument(
        "max_loops: expected 1 <= min_loops <= max_loops <= " + std::to_string(options_.loops) +
        ", got " + std::to_string(s.min_loops) + " and " + std::to_string(s.max_loops));
  if (!s.depths.empty() && static_cast<int>(s.depths.size()) < s.max_tokens)
    throw std::invalid_argument("exit_depths: expected one for each of " +
                                std::to_string(s.max_tokens) + " tokens, got " +
                                std::to_string(s.depths.size()));
  for (const int depth : s.depths)
    if (depth < 1 || depth > options_.loops)
      throw std::invalid_argument("exit_depths: expected loops 1 to " +
                                  std::to_string(options_.loops) + ", got " +
                                  std::to_string(depth));
  auto r = std::make_unique<Request>();
  r->id = next_id_++;
  r->tokens = s.prompt;
  r->asked = std::move(s);
  waiting_.push_back(r.get());
  ++live_;
  const int64_t id = r->id;
  requests_.emplace(id, std::move(r));
  return id;
}

const Request* Scheduler::find(int64_t id) const {
  const auto found = requests_.find(id);
  return found == requests_.end() ? nullptr : found->second.get();
}

bool Scheduler::cancel(int64_t id) {
  const auto found = requests_.find(id);
  if (found == requests_.end()) return false;
  Request& r = *found->second;
  if (r.cancelled || r.state == State::kFilling) return false;
  ++counters_.cancelled;
  r.cancelled = true;
  if (!outstanding_) {
    release(r);
    bury();
  }
  return true;
}

std::vector<int> Scheduler::queues() const {
  std::vector<int> sizes;
  for (const auto* queue :
       {&waiting_, &prefill_, &ready_, &coda_, &stalled_, &offloaded_, &filling_})
    sizes.push_back(static_cast<int>(queue->size()));
  return sizes;
}

// Takes waiting requests in their order, as far as rows and pages go.
void Scheduler::admit() {
  if (!stalled_.empty() || !offloaded_.empty()) return;
  if (options_.mode == Mode::kStatic && active_ > 0) return;
  const int free_rows = static_cast<int>(free_rows_.size());
  if (active_ > 0 && free_rows < options_.min_rows) return;
  while (!waiting_.empty() && place(*waiting_.front())) waiting_.pop_front();
}

// Gives a waiting request its row and pages, those of its prefix that are published first.
bool Scheduler::place(Request& r) {
  if (r.row < 0 && free_rows_.empty()) return false;
  const bool reserve = options_.pressure == Pressure::kReserve;
  const int prompt = static_cast<int>(r.asked.prompt.size());
  const int size = static_cast<int>(r.tokens.size());
  const int target = r.outputs ? size - 1 : size;

  // where loops share places, a page holds what the last one left
  const bool fits = !options_.aligned || r.asked.max_loops == options_.loops;
  if (options_.publish != Publish::kNone && fits && !r.asked.score) {
    const int most = (r.outputs ? target : target - 1) / kPage;
    int page = -1;
    while (static_cast<int>(r.pages.size()) < most) {
      page = pages_.find(page, r.tokens.data() + r.pages.size() * kPage);
      if (page < 0) break;
      pages_.hold(page);
      r.pages.push_back(page);
    }
    if (options_.aligned)
      while (r.pages.size() * kPage % options_.prefill) {
        pages_.drop(r.pages.back());
        r.pages.pop_back();
      }
  }
  const int hits = static_cast<int>(r.pages.size());
  const int wanted = pages_of(reserve ? prompt + r.asked.max_tokens : target) - hits;
  // on demand: one page more, for what is drawn next
  const int spared = reserve   ? 0
                     : active_ ? 1 + static_cast<int>(options_.margin * options_.pages)
                               : 0;
  if (wanted + spared > pages_.available()) {
    while (!r.pages.empty()) {
      pages_.drop(r.pages.back());
      r.pages.pop_back();
    }
    return false;
  }
  if (r.row < 0) {
    r.row = free_rows_.back();
    free_rows_.pop_back();
    resident_[r.row] = &r;
    opened_.emplace_back(r.id, r.row);
  }
  ++active_;
  std::vector<int> shared;
  shared.swap(r.pages);
  for (const int page : shared) add_page(r, page);
  for (int i = 0; i < wanted; ++i) add_page(r, pages_.take());
  r.begin = std::max(hits * kPage, options_.prefix);
  for (int pos = hits * kPage; pos < r.begin; ++pos)
    pages_.marks(r.pages[pos / kPage])[pos % kPage] = options_.loops;
  r.target = target;
  if (!r.outputs) counters_.cached_tokens += std::max(hits * kPage - options_.prefix, 0);
  if (r.begin == target) {
    begin_token(r, true);
  } else {
    r.state = State::kPrefill;
    prefill_.push_back(&r);
  }
  return true;
}

int Scheduler::take_page() {
  int page;
  while ((page = pages_.take()) < 0 && !filling_.empty()) {
    Request& r = *filling_.back();  // nobody waits for what it fills
    for (size_t pos = 0; pos + 1 < r.tokens.size(); ++pos)
      counters_.dropped_fills +=
          pages_.marks(r.pages[pos / kPage])[pos % kPage] < r.asked.max_loops;
    publish(r);
    release(r);
  }
  return page;
}

void Scheduler::add_page(Request& r, int page) {
  tables_[static_cast<size_t>(r.row) * options_.request_pages + r.pages.size()] = page;
  r.pages.push_back(page);
  limits_[r.row] = static_cast<int32_t>(r.pages.size()) * kPage;
}

// The last token of the request becomes the one that runs; it is stalled where there is no page for
// it, so that what runs can always finish its loops.
bool Scheduler::begin_token(Request& r, bool resumed) {
  r.pos = static_cast<int>(r.tokens.size()) - 1;
  if (options_.device) {
    start(r, -1);
    return true;
  }
  if (r.pos / kPage >= static_cast<int>(r.pages.size())) {
    const int page = resumed || stalled_.empty() ? take_page() : -1;
    if (page < 0) {
      if (r.state != State::kStalled) stalled_.push_back(&r);
      r.state = State::kStalled;
      return false;
    }
    add_page(r, page);
  }
  r.slot = slots_.take();
  r.loop = 0;
  r.since = counters_.blocks;
  r.draining = static_cast<int>(r.deferred.size()) >= options_.backlog;
  r.state = State::kReady;
  if (resumed) {
    ready_.push_front(&r);
  } else {
    ready_.push_back(&r);
  }
  if (options_.drafts) hold_drafts(r);
  return true;
}

void Scheduler::retry_stalled() {
  std::vector<Request*> resumed;
  while (!stalled_.empty()) {
    Request& r = *stalled_.front();
    if (!begin_token(r, true)) break;
    stalled_.pop_front();
    if (r.state == State::kReady) resumed.push_back(&r);
  }
  std::copy(resumed.begin(), resumed.end(), ready_.begin());  // they went in one before the other
}

// Everything that could run waits for a page: the request with the least computed gives its own.
// True for a step to run, false where the queues have changed.
bool Scheduler::relieve() {
  Request* victim = stalled_.front();
  for (Request* r : stalled_)
    if (r->tokens.size() < victim->tokens.size() ||
        (r->tokens.size() == victim->tokens.size() && r->id > victim->id))
      victim = r;
  Request& r = *victim;
  if (options_.pressure == Pressure::kOffload) {
    begin_plan(Stage::kOffload);
    plan_.n = 1;
    plan_.id[0] = r.id;
    plan_.moved_pages.assign(r.pages.begin(), r.pages.end());
    for (const Deferred& item : r.deferred) plan_.moved_slots.push_back(item.slot);
    step_ = {&r};
    ++counters_.offloads;
    return true;
  }
  if (options_.pressure == Pressure::kRecompute) {
    remove(stalled_, &r);
    stop_row(r);
    if (options_.drafts) roll_back(r, r.asked.prompt.size() + r.told);
    give_memory(r);
    --active_;
    r.state = State::kWaiting;
    waiting_.push_front(&r);
    ++counters_.preemptions;
  } else {
    ended_.emplace_back(r.id, static_cast<int>(End::kMemory));
    release(r);
  }
  return false;
}

bool Scheduler::plan_restore() {
  if (offloaded_.empty() || !stalled_.empty()) return false;
  Request& r = *offloaded_.front();
  const int saved = static_cast<int>(r.saved_marks.size()) / kPage;
  const int spared = active_ ? static_cast<int>(options_.margin * options_.pages) : 0;
  if (saved + 1 + spared > pages_.available() && (active_ || saved > pages_.available()))
    return false;
  offloaded_.pop_front();
  ++active_;
  r.state = State::kRunning;
  begin_plan(Stage::kRestore);
  plan_.n = 1;
  plan_.id[0] = r.id;
  for (int i = 0; i < saved; ++i) add_page(r, pages_.take());
  plan_.moved_pages.assign(r.pages.begin(), r.pages.end());
  for (Deferred& item : r.deferred) plan_.moved_slots.push_back(item.slot = slots_.take());
  step_ = {&r};
  return true;
}

void Scheduler::report_moved() {
  Request& r = *step_.front();
  if (plan_.stage == Stage::kOffload) {
    end_plan(Stage::kOffload);
    if (!r.cancelled) {
      remove(stalled_, &r);
      for (const int page : r.pages)
        r.saved_marks.insert(r.saved_marks.end(), pages_.marks(page), pages_.marks(page) + kPage);
      std::vector<Deferred> kept = r.deferred;
      give_memory(r);
      r.deferred = std::move(kept);
      for (Deferred& item : r.deferred) item.slot = -1;
      --active_;
      r.state = State::kOffloaded;
      offloaded_.push_back(&r);
    }
  } else {
    end_plan(Stage::kRestore);
    for (size_t i = 0; i < r.pages.size(); ++i)
      std::copy_n(r.saved_marks.data() + i * kPage, kPage, pages_.marks(r.pages[i]));
    r.saved_marks.clear();
    if (r.cancelled) {
      // released with the step
    } else if (options_.device) {
      route(r);
    } else {
      begin_token(r, true);
    }
  }
  bury();
}

// Pages, last ones first so that a prefix outlives what continues it, and rows of the bank.
void Scheduler::give_memory(Request& r) {
  if (r.row >= 0) limits_[r.row] = 0;
  while (!r.pages.empty()) {
    pages_.drop(r.pages.back());
    r.pages.pop_back();
  }
  for (const Deferred& item : r.deferred)
    if (item.slot >= 0) slots_.give(item.slot);
  r.deferred.clear();
  for (const Deferred& item : r.checks) slots_.give(item.slot);
  r.checks.clear();
  prompt_slots_ -= static_cast<int>(r.slots.size());
  for (const int slot : r.slots) slots_.give(slot);
  r.slots.clear();
  if (r.slot >= 0) slots_.give(r.slot);
  r.slot = -1;
}

void Scheduler::leave_queues(Request& r) {
  for (auto* queue :
       {&waiting_, &prefill_, &ready_, &coda_, &scores_, &stalled_, &offloaded_, &filling_})
    remove(*queue, &r);
  remove(pass_, &r);
}

void Scheduler::release(Request& r) {
  leave_queues(r);
  stop_row(r);
  if (r.row >= 0 && r.state != State::kOffloaded && r.state != State::kWaiting) --active_;
  give_memory(r);
  if (r.row >= 0) {
    resident_[r.row] = nullptr;
    free_rows_.push_back(r.row);
    const std::pair<int64_t, int> opened{r.id, r.row};
    if (std::find(opened_.begin(), opened_.end(), opened) != opened_.end()) {
      opened_.erase(std::find(opened_.begin(), opened_.end(), opened));  // nobody knows of it yet
    } else {
      closed_.push_back(r.row);
    }
    r.row = -1;
  }
  --live_;
  dead_.push_back(r.id);
}

// The output is complete.
void Scheduler::end(Request& r) {
  ++counters_.finished;
  if (!r.deferred.empty()) {
    r.state = State::kFilling;
    filling_.push_back(&r);
    return;
  }
  publish(r);
  release(r);
}

// Pages whose every token has all loops.
void Scheduler::publish(Request& r) {
  if (options_.publish == Publish::kNone) return;
  const size_t tokens = options_.publish == Publish::kAll ? r.tokens.size() : r.asked.prompt.size();
  int parent = -1;
  for (size_t i = 0; i < std::min(r.pages.size(), tokens / kPage); ++i) {
    const uint8_t* marks = pages_.marks(r.pages[i]);
    if (std::any_of(marks, marks + kPage, [&](int mark) { return mark != options_.loops; })) return;
    parent = pages_.publish(r.pages[i], parent, r.tokens.data() + i * kPage);
  }
}

void Scheduler::bury() {
  for (const int64_t id : dead_) requests_.erase(id);
  dead_.clear();
}

void Scheduler::begin_plan(Stage stage) {
  plan_.stage = stage;
  plan_.n = 0;
  plan_.moved_pages.clear();
  plan_.moved_slots.clear();
  outstanding_ = stage != Stage::kIdle;
}

void Scheduler::end_plan(Stage stage) {
  if (!outstanding_ || plan_.stage != stage)
    throw std::logic_error("scheduler: expected a report of the step that was planned");
  outstanding_ = false;
  for (Request* r : step_)
    if (r->cancelled && std::find(dead_.begin(), dead_.end(), r->id) == dead_.end()) release(*r);
}

void Scheduler::check() const {
  std::vector<int> uses(pages_.count()), slots;
  int live = 0, rows = 0;
  for (const auto& [id, r] : requests_) {
    ++live;
    rows += r->row >= 0;
    for (const int page : r->pages) ++uses[page];
    for (const Deferred& item : r->deferred)
      if (item.slot >= 0) slots.push_back(item.slot);
    for (const Deferred& item : r->checks) slots.push_back(item.slot);
    slots.insert(slots.end(), r->slots.begin(), r->slots.end());
    if (r->slot >= 0) slots.push_back(r->slot);
    for (size_t i = 0; r->row >= 0 && i < r->pages.size(); ++i)
      if (tables_[static_cast<size_t>(r->row) * options_.request_pages + i] != r->pages[i])
        throw std::logic_error("scheduler: a block table differs from its request's pages");
  }
  pages_.check(uses);
  slots_.check(slots);
  if (live != live_ || rows + static_cast<int>(free_rows_.size()) != options_.requests)
    throw std::logic_error("scheduler: a request or a row of the block tables is lost");
}

}  // namespace gemma_ext::host
