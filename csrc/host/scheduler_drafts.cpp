// SPDX-License-Identifier: Apache-2.0
// Exits as drafts: a token that was read early is told once the loops that it skipped have run and give the same one.
//
// Owed loops are run as for keys and values, at the latest when `drafts` tokens wait for it; the head then reads those
// states (`checks`) in the order of positions, before the token that runs. Where it reads another token, that one
// takes the draft's place and everything behind it is forgotten. A draw depends on its position alone, so what is told
// is what a model that runs every loop of every token draws, at any temperature.
#include <algorithm>

#include "host/scheduler.h"

namespace gemma_ext::host {

// A state that has all loops waits for the head.
void Scheduler::add_check(Request& r, const Deferred& item) {
  r.checks.push_back(item);
  r.checks.back().chosen = false;
}

// The token of the request waits until its drafts are checked.
void Scheduler::hold(Request& r) {
  if (r.state != State::kReady) return;
  r.draining = true;
  if (!r.deferred.empty()) return;
  ready_.erase(std::find(ready_.begin(), ready_.end(), &r));
  r.left = false;
  r.state = State::kCoda;
  coda_.push_back(&r);
}

// A draft that would end the output, or is one too many, is checked before anything runs behind it.
void Scheduler::hold_drafts(Request& r) {
  const int drafts = r.outputs - r.told;
  if (drafts == 0) return;
  if (drafts >= options_.drafts || end_of(r, r.tokens.back(), r.outputs) != End::kNo) hold(r);
}

// Forgets the tokens from `size` on, and what has been run of them.
void Scheduler::roll_back(Request& r, size_t size) {
  const auto later = [&](const Deferred& item) {
    if (item.pos + 1 < static_cast<int>(size)) return false;
    slots_.give(item.slot);
    return true;
  };
  for (auto* items : {&r.deferred, &r.checks})
    items->erase(std::remove_if(items->begin(), items->end(), later), items->end());
  for (size_t pos = size; pos < r.pages.size() * kPage; ++pos)
    pages_.marks(r.pages[pos / kPage])[pos % kPage] = 0;
  if (r.slot >= 0) slots_.give(r.slot);
  r.slot = -1;
  r.outputs -= static_cast<int>(r.tokens.size() - size);
  r.tokens.resize(size);
  r.drafted.resize(r.outputs - r.told);
  leave_queues(r);
}

// The next output that is sure.
End Scheduler::tell(Request& r, int row, int depth) {
  const int32_t token = r.tokens[r.asked.prompt.size() + r.told];
  if (r.told) counters_.exit_loops += depth;
  ++exits_[depth - 1];
  ++counters_.outputs;
  plan_.depth[row] = depth;
  plan_.output[row] = r.told++;
  const End how = end_of(r, token, r.told);
  plan_.end[row] = static_cast<int32_t>(how);
  return how;
}

// What the head read in rows [row, last) of the request: its checks, and its token if that has left.
void Scheduler::read(Request& r, int row, int last, const int32_t* tokens) {
  const int most = r.asked.max_loops;
  for (const int checks = last - (r.left ? 1 : 0); row < checks; ++row) {
    const size_t at = plan_.pos[row] + 1;
    const bool same = r.tokens[at] == tokens[row];
    const int depth = same ? r.drafted.front() : most;
    slots_.give(r.checks.front().slot);
    r.checks.erase(r.checks.begin());
    if (!same) {
      ++counters_.rejected;
      roll_back(r, at);
      r.tokens.push_back(tokens[row]);
      ++r.outputs;
    } else {
      ++counters_.accepted;
      r.drafted.pop_front();
    }
    if (tell(r, row, depth) != End::kNo) return end(r);
    if (!same) {
      begin_token(r, false);
      return;
    }
  }
  if (!r.left) {
    r.draining = false;
    r.state = State::kReady;
    ready_.push_back(&r);
    return;
  }
  r.tokens.push_back(tokens[row]);
  ++r.outputs;
  if (r.depth == most) {
    slots_.give(r.slot);
    r.slot = -1;
    if (tell(r, row, most) != End::kNo) return end(r);
    begin_token(r, false);
    return;
  }
  r.drafted.push_back(r.depth);
  r.deferred.push_back({r.pos, r.slot, r.depth});
  r.slot = -1;
  begin_token(r, false);
}

}  // namespace gemma_ext::host
