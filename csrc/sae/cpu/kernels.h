// SPDX-License-Identifier: Apache-2.0
// What runs inside one task: the table of the kernels that every instruction set has, and the plain
// structs they take.
#pragma once

#include "../../common/cpu/matrix.h"
#include "../../common/cpu/scratch.h"
#include "../contract.h"
#include "encode_lists.h"

namespace gemma_ext::sae {

using gemma_ext::cpu::Matrix;
using gemma_ext::cpu::Scratch;

// Columns of a packed panel of the encoder.
constexpr int kTile = 256;

// What becomes of the pre-activations of some rows and features; null where it is not wanted.
struct EncodeTask {
  const Encoder* encoder;
  int64_t row0, rows, feature0, feature1;
  TopLists *top, *aux;  // of the task's rows
  GroupBest* groups;    // of all rows
  Above* above;
};

// How a storage type is multiplied.
struct Compute {
  int64_t bytes;       // of an element
  int64_t block_rows;  // that share a pass over a panel
};

struct Kernels {
  void (*encode)(const EncodeTask&, Scratch&);
  Compute (*compute)(DType);
};

// Parts of a Scratch: those of the kernels, then those of the tasks.
enum Slot { kPanel, kSpare, kBlock, kStrips, kSmall, kLists, kAuxLists, kRowState };

// Of the chosen instruction set.
const Kernels& kernels();

}  // namespace gemma_ext::sae
