// SPDX-License-Identifier: Apache-2.0
#include <stdlib.h>
#include <string.h>

#include "check.h"

int main(int argc, char** argv) {
  const char* name = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--list") == 0) {
      for (const check::Case& c : check::cases()) puts(c.name);
      return 0;
    }
    if (i + 1 < argc && strcmp(argv[i], "--case") == 0) name = argv[i + 1];
    if (i + 1 < argc && strcmp(argv[i], "--seed") == 0) {
      simt::host::options.seed = strtoull(argv[i + 1], nullptr, 10);
    }
  }
  for (const check::Case& c : check::cases()) {
    if (name == nullptr || strcmp(c.name, name) != 0) continue;
    try {
      c.run();
      return 0;
    } catch (const std::exception& error) {
      fprintf(stderr, "%s: %s\n", name, error.what());
      return 1;
    }
  }
  fprintf(stderr, "usage: %s --list | --case NAME [--seed S]\n", argv[0]);
  return 2;
}
