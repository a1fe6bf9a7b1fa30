// Lets the sockets of a process close the moment that it dies, however much memory it holds.
//
// A killed process is first freed of its memory and only then of its files (Linux, do_exit: exit_mm
// before exit_files), about 0.1 s for each GiB, and for so long its peers wait for somebody who is
// gone. The memory is freed by the last task that uses it. A keeper is such a task: it shares the
// process's memory, but none of its files, signals or threads; it sleeps until the process has
// died or has called execve, and then its own end frees the memory.
//
// It costs a process id, two descriptors, 64 KiB, and no time. `ps` counts the shared memory twice.
// A fork that neither destroys its copy nor calls execve keeps the memory of a process that has
// called execve. Linux only.

#pragma once

#include <cstddef>

namespace astra {

class Keeper {
 public:
  // Throws std::system_error where the system has no pidfd_open or close_range (before Linux 5.9),
  // or grants no further task.
  Keeper();
  // Ends the keeper; in a fork of the process that made it, gives up the fork's share in it.
  ~Keeper();
  Keeper(const Keeper&) = delete;
  Keeper& operator=(const Keeper&) = delete;

  int pid() const { return pid_; }

 private:
  int owner_ = 0;  // the process that it keeps
  int pid_ = 0;
  int pipe_ = -1;  // its other end hangs up when the process calls execve
  void* stack_ = nullptr;
};

}  // namespace astra
