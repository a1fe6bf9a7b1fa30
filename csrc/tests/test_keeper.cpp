// A process's pipe closes when the process is killed, while its keeper still holds the memory; the
// keeper ends with its process, with its object, and when its process calls execve.

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <system_error>
#include <vector>

#include "astra/keeper.hpp"

namespace {

constexpr std::size_t kBallast = std::size_t{64} << 20;
int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

std::string status(int pid, const std::string& name) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(name + ":", 0) == 0) return line.substr(name.size() + 2);
  }
  return "";
}

bool lives(int pid) {
  const std::string state = status(pid, "State");
  return !state.empty() && state.front() != 'Z';
}

bool ends(int pid) {
  for (int i = 0; i < 2000; ++i) {
    if (!lives(pid)) return true;
    usleep(5000);
  }
  return false;
}

void killed() {
  int ends_of_pipe[2];
  if (pipe(ends_of_pipe) != 0) return expect(false, "a pipe");
  const pid_t child = fork();
  if (child == 0) {
    std::vector<char> ballast(kBallast, 1);
    const astra::Keeper keeper;
    const int pid = keeper.pid();
    if (write(ends_of_pipe[1], &pid, sizeof pid) != sizeof pid) _exit(1);
    pause();
    _exit(ballast[1]);
  }
  close(ends_of_pipe[1]);
  int keeper = 0;
  expect(read(ends_of_pipe[0], &keeper, sizeof keeper) == sizeof keeper, "a keeper");
  for (int i = 0; i < 2000 && status(keeper, "Name") != "astra-keeper"; ++i) usleep(5000);
  kill(keeper, SIGSTOP);  // so that the memory stays for as long as we look
  kill(child, SIGKILL);
  pollfd end{ends_of_pipe[0], POLLIN, 0};
  expect(poll(&end, 1, 10000) == 1 && (end.revents & POLLHUP) != 0, "the pipe closes");
  waitpid(child, nullptr, 0);
  const std::string held = status(keeper, "VmRSS");
  expect(!held.empty() && std::stoul(held) >= kBallast / 1024, "the memory is still there");
  kill(keeper, SIGCONT);
  expect(ends(keeper), "the keeper ends after its process");
  close(ends_of_pipe[0]);
}

// A process that calls execve lives on as another program: only the pipe can tell.
void replaced() {
  int ends_of_pipe[2];
  if (pipe(ends_of_pipe) != 0) return expect(false, "a pipe");
  const pid_t child = fork();
  if (child == 0) {
    const std::vector<char> ballast(kBallast, 1);
    const auto* keeper = new astra::Keeper;  // never destroyed, as by execve
    const int pid = keeper->pid();
    if (write(ends_of_pipe[1], &pid, sizeof pid) != sizeof pid) _exit(1);
    execlp("sleep", "sleep", "60", static_cast<char*>(nullptr));
    _exit(ballast[1]);
  }
  close(ends_of_pipe[1]);
  int keeper = 0;
  expect(read(ends_of_pipe[0], &keeper, sizeof keeper) == sizeof keeper, "a keeper");
  expect(ends(keeper), "the keeper ends when its process is replaced");
  expect(lives(child), "the new program goes on");
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(ends_of_pipe[0]);
}

void let_go() {
  int pid = 0;
  {
    const astra::Keeper keeper;
    pid = keeper.pid();
    expect(lives(pid), "a keeper lives with its object");
    const pid_t child = fork();
    if (child == 0) {
      keeper.~Keeper();  // of a fork, whose keeper this is not
      _exit(0);
    }
    waitpid(child, nullptr, 0);
    expect(lives(pid), "a fork does not end it");
  }
  expect(!lives(pid), "a keeper ends with its object");
}

}  // namespace

int main() {
  try {
    let_go();
  } catch (const std::system_error& error) {
    std::printf("keeper: not here: %s\n", error.what());
    return 0;
  }
  killed();
  replaced();
  if (failures == 0) std::puts("keeper: all passed");
  return failures == 0 ? 0 : 1;
}
