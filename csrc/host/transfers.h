// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <thread>
#include <vector>

namespace gemma_ext::host {

// What a transfer gives when it is over: the digest of its bytes where one was asked for, else 0;
// or the std::system_error that ended it.
using Transfer = std::shared_future<uint64_t>;

// Positional reads and writes by a few threads, begun in the order in which they were asked for.
// Memory and files stay the caller's, who keeps them until the transfer is over.
class Transfers {
 public:
  explicit Transfers(int threads);
  ~Transfers() { close(); }
  Transfers(const Transfers&) = delete;
  Transfers& operator=(const Transfers&) = delete;

  // What has begun ends, the rest never begins. Memory and files may go away afterwards.
  void close();

  // `direct`: the same file opened with O_DIRECT, or -1. Then whole pages of memory around
  // [to, to + bytes) may be overwritten.
  Transfer read(int file, int64_t offset, void* to, int64_t bytes, int direct = -1);
  // the digest is that of the bytes, seeded with `seed`
  Transfer write(int file, int64_t offset, const void* from, int64_t bytes, uint64_t seed,
                 int direct = -1);
  // inside the kernel, without bytes moved where the file system shares extents
  Transfer copy(int from, int64_t from_offset, int to, int64_t to_offset, int64_t bytes);
  // from memory, which is dropped afterwards if it is mapped
  Transfer fetch(const void* from, void* to, int64_t bytes, bool mapped);
  Transfer check(int file, int64_t offset, int64_t bytes, uint64_t seed);

 private:
  Transfer add(std::function<uint64_t()> job);
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::packaged_task<uint64_t()>> jobs_;
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

// Pages of a mapped file leave this process; they come back when they are read again. Other memory
// would lose its contents.
void drop_mapped(const void* mapped, int64_t bytes);

// Sets the length of a file and reserves its disk blocks, so that a full disk shows before the
// first write; where a file system cannot reserve, the length alone is set.
void reserve(int file, int64_t bytes);

}  // namespace gemma_ext::host
