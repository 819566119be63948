// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

namespace gemma_ext::host {

constexpr int kPage = 16;  // tokens, as the kernels of paged attention have it

// Pages of the KV pool, shared by reference count. A page is used, or published and kept for the
// next request with the same prefix, or free. Published pages that nobody uses go first when pages
// run out, the longest unused first.
class Pages {
 public:
  // `salt` tells apart what the same tokens leave in the pool: revision of the model, policy.
  Pages(int count, const std::string& salt);

  int count() const { return static_cast<int>(pages_.size()); }
  int available() const { return static_cast<int>(free_.size() + unused_.size()); }
  int take();  // -1 where there is none
  void hold(int page);
  void drop(int page);

  // Deepest loop, counted from 1, whose keys and values of each token are in the page. [kPage]
  uint8_t* marks(int page) { return marks_.data() + static_cast<int64_t>(page) * kPage; }
  const std::vector<uint8_t>& all_marks() const { return marks_; }

  // The published page of the same 16 tokens behind the same prefix, -1 where there is none;
  // `parent` is the page before it, -1 for the first.
  int find(int parent, const int32_t* tokens) const;
  // Returns the published page of these tokens: `page`, or the one that was there before.
  int publish(int page, int parent, const int32_t* tokens);
  uint64_t key(int page) const { return pages_[page].hash; }  // 0 where not published
  int published() const { return static_cast<int>(table_.size()); }
  void forget();  // no unpublished use: pages in use stay with their users

  // Throws std::logic_error unless `uses[page]` is what the counts say.
  void check(const std::vector<int>& uses) const;

 private:
  using Tokens = std::array<int32_t, kPage>;
  struct Page {
    int users = 0;
    uint64_t hash = 0;
    int64_t node = 0, parent = 0;  // nodes are never used twice, pages are
    Tokens tokens{};
    std::list<int>::iterator place{};  // in unused_
  };
  uint64_t hash(int parent, const int32_t* tokens) const;
  void unpublish(int page);

  std::vector<Page> pages_;
  std::vector<uint8_t> marks_;
  std::vector<int> free_;
  std::list<int> unused_;  // published, without a user; the longest unused first
  std::unordered_multimap<uint64_t, int> table_;
  uint64_t root_;
  int64_t nodes_ = 0;
};

// Rows of the bank of hidden states.
class Slots {
 public:
  explicit Slots(int count);
  int count() const { return count_; }
  int available() const { return static_cast<int>(free_.size()); }
  int take();  // throws std::logic_error where there is none
  void give(int slot) { free_.push_back(slot); }
  void check(const std::vector<int>& used) const;

 private:
  int count_;
  std::vector<int> free_;
};

}  // namespace gemma_ext::host
