#include "astra/keeper.hpp"

#include <cerrno>
#include <new>
#include <system_error>

#ifdef __linux__
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace astra {

#if defined(__linux__) && defined(SYS_pidfd_open) && defined(SYS_close_range)

namespace {

constexpr std::size_t kStack = 65536;

// The flag of waitpid for tasks without a signal at their end; the header's constant is unsigned.
constexpr int kCloned = static_cast<int>(__WCLONE);

// What a keeper waits for, at the bottom of its stack.
struct Waits {
  int death;     // the process's pidfd
  int replaced;  // the read end of a pipe whose other end the process closes when it calls execve
};

// All that a keeper does. It runs with the thread-local memory of the thread that made it, which
// may be gone by now, so it must use nothing of it: system calls that cannot fail, and so write no
// errno, and no return.
__attribute__((no_sanitize("address", "undefined"))) int keep(void* given) {
  const auto& waits = *static_cast<const Waits*>(given);
  const long low = waits.death < waits.replaced ? waits.death : waits.replaced;
  const long high = waits.death < waits.replaced ? waits.replaced : waits.death;
  if (low > 0) syscall(SYS_close_range, 0L, low - 1, 0L);
  if (high > low + 1) syscall(SYS_close_range, low + 1, high - 1, 0L);
  syscall(SYS_close_range, high + 1, ~0U, 0L);
  syscall(SYS_prctl, PR_SET_NAME, "astra-keeper", 0L, 0L, 0L);
  pollfd ends[2] = {{waits.death, POLLIN, 0}, {waits.replaced, 0, 0}};
  while (syscall(SYS_ppoll, ends, 2L, nullptr, nullptr, 0L) < 1) {
  }
  // After execve nobody may ever wait for this task: what is left of it should not look alive.
  syscall(SYS_prctl, PR_SET_NAME, "astra-released", 0L, 0L, 0L);
  for (;;) syscall(SYS_exit, 0L);
}

[[noreturn]] void fail(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

}  // namespace

Keeper::Keeper() : owner_(getpid()) {
  // Those of the program that this process was before execve.
  while (waitpid(-1, nullptr, kCloned | WNOHANG) > 0) {
  }
  const auto death = static_cast<int>(syscall(SYS_pidfd_open, owner_, 0));
  if (death < 0) fail(errno, "keeper: pidfd_open");
  // Whether the call is known at all: no descriptor is that high.
  if (syscall(SYS_close_range, ~0U, ~0U, 0L) != 0) {
    const int error = errno;
    close(death);
    fail(error, "keeper: close_range");
  }
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    const int error = errno;
    close(death);
    fail(error, "keeper: pipe2");
  }
  stack_ =
      mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  if (stack_ == MAP_FAILED) {
    close(death);
    close(ends[0]);
    close(ends[1]);
    fail(ENOMEM, "keeper: mmap");
  }
  pipe_ = ends[1];
  auto* bottom = new (stack_) Waits{death, ends[0]};
  // A signal handler of the process must never run in its keeper, which inherits this mask.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  // No signal at its end: to the process it is no child that `wait` would find.
  pid_ = clone(keep, static_cast<char*>(stack_) + kStack, CLONE_VM, bottom);
  const int error = errno;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  close(death);
  close(ends[0]);
  if (pid_ < 0) {
    close(pipe_);
    munmap(stack_, kStack);
    fail(error, "keeper: clone");
  }
}

Keeper::~Keeper() {
  close(pipe_);
  if (getpid() != owner_) return;
  kill(pid_, SIGKILL);
  while (waitpid(pid_, nullptr, kCloned) < 0 && errno == EINTR) {
  }
  munmap(stack_, kStack);
}

#else

Keeper::Keeper() {
  throw std::system_error(ENOSYS, std::generic_category(), "keeper: needs Linux 5.9");
}
Keeper::~Keeper() = default;

#endif

}  // namespace astra
