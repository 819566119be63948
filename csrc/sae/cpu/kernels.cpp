// SPDX-License-Identifier: Apache-2.0
// Sparse dictionaries on the CPU: everything that runs inside a task. Compiled once per instruction
// set; the namespace is the set's name.
#include "products_kernels.h"
