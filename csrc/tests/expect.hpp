// What the tests have in common: a line for each expectation that does not hold.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <string_view>

inline int failures = 0;

inline void expect(bool ok, std::string_view what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %.*s\n", static_cast<int>(what.size()), what.data());
  if (++failures > 20) std::exit(1);
}
