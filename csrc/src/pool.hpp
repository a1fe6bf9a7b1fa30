// Threads that wait for work between calls, so that a call neither starts any nor allocates: those
// of GNU OpenMP where somebody has loaded it, else a pool's.

#pragma once

#include <cstddef>

namespace astra::detail {

// work(context, unit) for every unit below `units`, on at most `threads` threads, the caller among
// them. Which thread takes which unit is open. While another call has the pool's threads, the
// caller works alone. `work` must not throw.
void run_units(unsigned threads, std::size_t units, void (*work)(void* context, std::size_t unit),
               void* context);

}  // namespace astra::detail
