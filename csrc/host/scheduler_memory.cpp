// SPDX-License-Identifier: Apache-2.0
#include "host/scheduler_memory.h"

#include <algorithm>
#include <stdexcept>

#include "host/digest.h"

namespace gemma_ext::host {

Pages::Pages(int count, const std::string& salt)
    : pages_(count), marks_(static_cast<size_t>(count) * kPage), free_(count) {
  for (int i = 0; i < count; ++i) free_[i] = count - 1 - i;
  root_ = digest(salt.data(), salt.size(), 0);
}

int Pages::take() {
  if (free_.empty()) {
    if (unused_.empty()) return -1;
    const int page = unused_.front();
    unused_.pop_front();
    unpublish(page);
    free_.push_back(page);
  }
  const int page = free_.back();
  free_.pop_back();
  pages_[page].users = 1;
  std::fill_n(marks(page), kPage, uint8_t{0});
  return page;
}

void Pages::hold(int page) {
  if (pages_[page].users++ == 0) unused_.erase(pages_[page].place);
}

void Pages::drop(int page) {
  Page& p = pages_[page];
  if (p.users <= 0) throw std::logic_error("scheduler: a page was given back twice");
  if (--p.users) return;
  if (p.hash) {
    p.place = unused_.insert(unused_.end(), page);
  } else {
    free_.push_back(page);
  }
}

uint64_t Pages::hash(int parent, const int32_t* tokens) const {
  const uint64_t seed = parent < 0 ? root_ : pages_[parent].hash;
  return std::max<uint64_t>(1, digest(tokens, sizeof(Tokens), seed));
}

int Pages::find(int parent, const int32_t* tokens) const {
  const int64_t node = parent < 0 ? 0 : pages_[parent].node;
  auto [begin, end] = table_.equal_range(hash(parent, tokens));
  for (; begin != end; ++begin) {
    const Page& p = pages_[begin->second];
    if (p.parent == node && std::equal(p.tokens.begin(), p.tokens.end(), tokens))
      return begin->second;
  }
  return -1;
}

int Pages::publish(int page, int parent, const int32_t* tokens) {
  const int before = find(parent, tokens);
  if (before >= 0) return before;
  Page& p = pages_[page];
  if (p.hash) unpublish(page);  // behind a parent that is gone: nobody can find it there
  p.hash = hash(parent, tokens);
  p.node = ++nodes_;
  p.parent = parent < 0 ? 0 : pages_[parent].node;
  std::copy_n(tokens, kPage, p.tokens.begin());
  table_.emplace(p.hash, page);
  return page;
}

void Pages::unpublish(int page) {
  auto [begin, end] = table_.equal_range(pages_[page].hash);
  for (; begin != end; ++begin) {
    if (begin->second != page) continue;
    table_.erase(begin);
    break;
  }
  pages_[page].hash = 0;
}

void Pages::forget() {
  for (const int page : unused_) free_.push_back(page);
  unused_.clear();
  for (Page& p : pages_) p.hash = 0;
  table_.clear();
}

void Pages::check(const std::vector<int>& uses) const {
  size_t idle = 0;
  for (int i = 0; i < count(); ++i) {
    if (uses[i] != pages_[i].users)
      throw std::logic_error("scheduler: page " + std::to_string(i) + " has " +
                             std::to_string(uses[i]) + " users and counts " +
                             std::to_string(pages_[i].users));
    idle += uses[i] == 0;
  }
  if (idle != free_.size() + unused_.size())
    throw std::logic_error("scheduler: " + std::to_string(idle) + " pages are idle, but " +
                           std::to_string(available()) + " are listed");
  for (const int page : free_)
    if (pages_[page].hash)
      throw std::logic_error("scheduler: page " + std::to_string(page) + " is free and published");
  for (const auto& [key, page] : table_)
    if (pages_[page].hash != key)
      throw std::logic_error("scheduler: page " + std::to_string(page) +
                             " is listed for a prefix that it does not hold");
  const auto known =
      std::count_if(pages_.begin(), pages_.end(), [](const Page& p) { return p.hash != 0; });
  if (static_cast<size_t>(known) != table_.size())
    throw std::logic_error("scheduler: " + std::to_string(known) + " pages are published, but " +
                           std::to_string(table_.size()) + " are listed");
}

Slots::Slots(int count) : count_(count), free_(count) {
  for (int i = 0; i < count; ++i) free_[i] = count - 1 - i;
}

int Slots::take() {
  if (free_.empty()) throw std::logic_error("scheduler: the bank of hidden states is too small");
  const int slot = free_.back();
  free_.pop_back();
  return slot;
}

void Slots::check(const std::vector<int>& used) const {
  std::vector<bool> seen(count_);
  for (const auto* list : {&free_, &used}) {
    for (const int slot : *list) {
      if (seen[slot])
        throw std::logic_error("scheduler: slot " + std::to_string(slot) + " is held twice");
      seen[slot] = true;
    }
  }
  if (free_.size() + used.size() != static_cast<size_t>(count_))
    throw std::logic_error("scheduler: " + std::to_string(count_ - free_.size() - used.size()) +
                           " slots are lost");
}

}  // namespace gemma_ext::host
