// SPDX-License-Identifier: Apache-2.0
#include "host/direct.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace gemma_ext::host {
namespace {

constexpr int64_t kLeast = 256 << 10;  // below it a copy costs less than a wait for the disk
constexpr long kCachestat = 451;       // of every architecture, since Linux 6.5

bool is_mostly_cached(int file, int64_t offset, int64_t bytes) {
  struct {
    uint64_t offset, bytes;
  } range{uint64_t(offset), uint64_t(bytes)};
  struct {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } found{};
  if (syscall(kCachestat, file, &range, &found, 0) != 0) return true;  // nobody knows: as if
  return 2 * int64_t(found.cached) * page_bytes() >= bytes;
}

bool is_fit(int file, int64_t offset, const char* memory, int64_t bytes) {
  const auto apart = int64_t(reinterpret_cast<uintptr_t>(memory)) - offset;
  return file >= 0 && bytes >= kLeast && apart % page_bytes() == 0;
}

// Calls move(done, left), pread or pwrite, until `bytes` have moved or it cannot go on.
template <typename Move>
int64_t move_pages(int64_t bytes, Move move) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t moved = move(done, bytes - done);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) break;
    done += moved;
    if (moved % page_bytes() != 0) break;  // the end of the file
  }
  return done;
}

}  // namespace

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

int64_t read_direct(int file, int64_t offset, char* to, int64_t bytes) {
  if (!is_fit(file, offset, to, bytes) || is_mostly_cached(file, offset, bytes)) return 0;
  const int64_t page = page_bytes(), before = offset % page;
  const int64_t span = (before + bytes + page - 1) / page * page;
  const int64_t moved = move_pages(span, [=](int64_t done, int64_t left) {
    return pread(file, to - before + done, left, offset - before + done);
  });
  return std::clamp<int64_t>(moved - before, 0, bytes);
}

int64_t write_direct(int file, int64_t offset, const char* from, int64_t bytes) {
  const int64_t whole = bytes / page_bytes() * page_bytes();
  if (offset % page_bytes() != 0 || !is_fit(file, offset, from, whole)) return 0;
  return move_pages(whole, [=](int64_t done, int64_t left) {
    return pwrite(file, from + done, left, offset + done);
  });
}

}  // namespace gemma_ext::host
