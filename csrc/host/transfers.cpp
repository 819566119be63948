// SPDX-License-Identifier: Apache-2.0
#include "host/transfers.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>

#include "host/digest.h"
#include "host/direct.h"

namespace gemma_ext::host {
namespace {

constexpr int64_t kBounce = 1 << 20;  // bytes at a time where a copy passes through this process

[[noreturn]] void fail(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

// Calls move(done, left), a system call of the read family, until `bytes` have moved.
template <typename Move>
void move_all(int64_t bytes, const char* what, Move move) {
  for (int64_t done = 0; done < bytes;) {
    const ssize_t moved = move(done, bytes - done);
    if (moved > 0) {
      done += moved;
    } else if (moved == 0) {
      fail(EIO, "the file ends early");
    } else if (errno != EINTR) {
      fail(errno, what);
    }
  }
}

void read_all(int file, int64_t offset, char* to, int64_t bytes) {
  move_all(bytes, "read",
           [=](int64_t done, int64_t left) { return pread(file, to + done, left, offset + done); });
}

void write_all(int file, int64_t offset, const char* from, int64_t bytes) {
  if (bytes == 0) return;
  move_all(bytes, "write", [=](int64_t done, int64_t left) {
    return pwrite(file, from + done, left, offset + done);
  });
  // the disk begins now rather than at the last moment; a hint, whose failure is harmless
  sync_file_range(file, offset, bytes, SYNC_FILE_RANGE_WRITE);
}

// Bytes copied inside the kernel; fewer than asked for where the file systems cannot go on.
int64_t copy_in_kernel(int from, int64_t from_offset, int to, int64_t to_offset, int64_t bytes) {
  off64_t in = from_offset, out = to_offset;
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t moved = copy_file_range(from, &in, to, &out, bytes - done, 0);
    if (moved > 0) {
      done += moved;
    } else if (moved == 0 || errno != EINTR) {
      break;  // reading and writing meets the same cause and names it
    }
  }
  return done;
}

void copy_all(int from, int64_t from_offset, int to, int64_t to_offset, int64_t bytes) {
  int64_t done = copy_in_kernel(from, from_offset, to, to_offset, bytes);
  if (done == bytes) return;
  const auto bounce = std::make_unique<char[]>(kBounce);
  for (; done < bytes; done += kBounce) {
    const int64_t size = std::min(kBounce, bytes - done);
    read_all(from, from_offset + done, bounce.get(), size);
    write_all(to, to_offset + done, bounce.get(), size);
  }
}

}  // namespace

Transfers::Transfers(int threads) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

void Transfers::close() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    jobs_.clear();
  }
  changed_.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

void Transfers::work() {
  for (;;) {
    std::packaged_task<uint64_t()> job;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return closing_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
  }
}

Transfer Transfers::add(std::function<uint64_t()> job) {
  std::packaged_task<uint64_t()> task(std::move(job));
  Transfer transfer = task.get_future().share();
  {
    const std::lock_guard lock(mutex_);
    if (!closing_) jobs_.push_back(std::move(task));  // else waiting for it raises
  }
  changed_.notify_one();
  return transfer;
}

Transfer Transfers::read(int file, int64_t offset, void* to, int64_t bytes, int direct) {
  return add([=] {
    const auto into = static_cast<char*>(to);
    const int64_t done = read_direct(direct, offset, into, bytes);
    read_all(file, offset + done, into + done, bytes - done);
    return uint64_t{0};
  });
}

Transfer Transfers::write(int file, int64_t offset, const void* from, int64_t bytes, uint64_t seed,
                          int direct) {
  return add([=] {
    const uint64_t value = digest(from, bytes, seed);
    const auto out = static_cast<const char*>(from);
    const int64_t page = page_bytes();
    const int64_t head = std::min(bytes, (page - offset % page) % page);
    const int64_t done = head + write_direct(direct, offset + head, out + head, bytes - head);
    if (done > head) {
      write_all(file, offset, out, head);
      write_all(file, offset + done, out + done, bytes - done);
    } else {
      write_all(file, offset, out, bytes);
    }
    return value;
  });
}

Transfer Transfers::copy(int from, int64_t from_offset, int to, int64_t to_offset, int64_t bytes) {
  return add([=] {
    copy_all(from, from_offset, to, to_offset, bytes);
    return uint64_t{0};
  });
}

Transfer Transfers::fetch(const void* from, void* to, int64_t bytes, bool mapped) {
  return add([=] {
    std::memcpy(to, from, bytes);
    if (mapped) drop_mapped(from, bytes);
    return uint64_t{0};
  });
}

Transfer Transfers::check(int file, int64_t offset, int64_t bytes, uint64_t seed) {
  return add([=] {
    const auto buffer = std::make_unique_for_overwrite<char[]>(bytes);
    read_all(file, offset, buffer.get(), bytes);
    return digest(buffer.get(), bytes, seed);
  });
}

void drop_mapped(const void* mapped, int64_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(mapped) / page * page;
  const auto last = reinterpret_cast<uintptr_t>(mapped) + bytes;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

void reserve(int file, int64_t bytes) {
  if (bytes == 0) return;
  int result;
  do {
    result = fallocate(file, 0, 0, bytes);
  } while (result != 0 && errno == EINTR);
  if (result != 0 && errno != EOPNOTSUPP && errno != ENOSYS) fail(errno, "reserve");
  if (ftruncate(file, bytes) != 0) fail(errno, "reserve");
}

}  // namespace gemma_ext::host
