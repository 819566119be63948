// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace gemma_ext::host {

// Reads and writes past the page cache, which spare the processor a copy and the cache the weights
// of whole models. `file` is opened with O_DIRECT. Both do what they can of a beginning of the bytes
// and return how much that was: 0 where memory and file are not equally far from a page's start,
// the run is short, or the file system refuses. The rest takes the ordinary way, which names errors.

// Whole pages of memory around [to, to + bytes) are overwritten. Nothing is done where most of the
// bytes are in the page cache.
int64_t read_direct(int file, int64_t offset, char* to, int64_t bytes);

// `offset` begins a page. What does not fill a page at the end is left: a page that is partly
// written here and partly through the cache would lose one of the two.
int64_t write_direct(int file, int64_t offset, const char* from, int64_t bytes);

int64_t page_bytes();

}  // namespace gemma_ext::host
