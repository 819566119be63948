#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs nvcc and keeps what it prints, ptxas -v included, in <object>.ptxas; shows only the rest.
log=/dev/null last=
for word; do
  [ "$last" = -o ] && log=$word.ptxas
  last=$word
done
"$@" 2>"$log"
status=$?
grep -vE '^ptxas info +: [^(]|bytes stack frame' "$log" >&2
exit $status
