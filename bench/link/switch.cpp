// A switch in user space: N TUN devices, one access link each. See model.py for what a link is.
//
//     switch MBIT_PER_S DELAY_MS JITTER_MS LOSS ETHERNET SEED CONTROL_FD TUN_FD...
//
// A packet of device r is read, waits until the packets before it have left r's uplink, and takes
// its bits over the rate. At the switch it waits for its receiver's downlink and is handed over
// when its last bit has left there. All waiting is until a computed moment, so being late once
// delays no later packet, and an idle link saves nothing up. The last byte of the IPv4 destination
// names the receiver, from 1; anything else is dropped.
//
// A byte on CONTROL_FD is answered with one line of JSON about what crossed so far; its end is
// ours. With an 'x' every packet is lost from then on, those on their way included.

#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <queue>
#include <random>
#include <vector>

namespace {

constexpr double kNothing = 1e300;
constexpr double kWaking = 60e-6;  // a timer of a virtual machine is late by half of this
constexpr int kReadsInARow = 64;   // of one device, so that no sender keeps the others waiting
constexpr size_t kLargest = 2048;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Packet {
  double due;      // arrival of the first bit at the downlink, later: departure of the last
  uint64_t order;  // of two at one moment, the one read first
  size_t target;
  size_t size;
  double seconds;  // on a link
  uint8_t* data;
};

struct Later {
  bool operator()(const Packet& a, const Packet& b) const {
    return a.due != b.due ? a.due > b.due : a.order > b.order;
  }
};

using Queue = std::priority_queue<Packet, std::vector<Packet>, Later>;

struct Counts {
  uint64_t packets = 0, bytes = 0, lost = 0, dropped = 0;
  double late_sum = 0, late_max = 0;
};

class Switch {
 public:
  Switch(char** argv, std::vector<int> tuns)
      : seconds_per_byte_(8e-6 / std::atof(argv[1])),
        delay_(1e-3 * std::atof(argv[2])),
        jitter_(1e-3 * std::atof(argv[3])),
        loss_(std::atof(argv[4])),
        ethernet_(std::atof(argv[5])),
        control_(std::atoi(argv[7])),
        tuns_(std::move(tuns)),
        draws_(std::strtoull(argv[6], nullptr, 10)),
        uplinks_(tuns_.size(), 0.0),
        downlinks_(tuns_.size(), 0.0),
        latest_(tuns_.size() * tuns_.size(), 0.0),
        pending_(tuns_.size(), 0) {}

  void run() {
    std::vector<pollfd> ready;
    for (int tun : tuns_) ready.push_back({tun, POLLIN, 0});
    ready.push_back({control_, POLLIN, 0});
    while (true) {
      const double next = std::min(crossing_.empty() ? kNothing : crossing_.top().due,
                                   leaving_.empty() ? kNothing : leaving_.top().due);
      const double left = std::max(0.0, next - now() - (exact() ? kWaking : 0.0));
      timespec patience{static_cast<time_t>(left), static_cast<long>(1e9 * std::fmod(left, 1.0))};
      const int count =
          ppoll(ready.data(), ready.size(), next < kNothing ? &patience : nullptr, nullptr);
      if (count < 0 && errno != EINTR) return;
      if (count > 0) {
        for (size_t r = 0; r < tuns_.size(); ++r) {
          if (ready[r].revents & POLLIN) take_in(r);
          if (ready[r].revents & (POLLERR | POLLNVAL)) return;  // its namespace is gone
        }
        if (ready.back().revents != 0 && !answer()) return;
      }
      deliver(now());
    }
  }

 private:
  // Whether the next packet to leave is the last one for its receiver, which a rank waits for: then
  // the end of the wait is spent awake. Inside of a train nobody would notice.
  bool exact() const {
    return !leaving_.empty() && (crossing_.empty() || leaving_.top().due <= crossing_.top().due) &&
           pending_[leaving_.top().target] == 1;
  }

  void take_in(size_t source) {
    for (int i = 0; i < kReadsInARow; ++i) {
      uint8_t* data = buffer();
      const ssize_t size = read(tuns_[source], data, kLargest);
      if (size <= 0) {
        free_.push_back(data);
        return;
      }
      const size_t target = size >= 20 && data[0] >> 4 == 4 ? data[19] - size_t{1} : tuns_.size();
      if (target >= tuns_.size() || target == source) {
        ++counts_.dropped;
        free_.push_back(data);
        continue;
      }
      const double seconds = seconds_per_byte_ * (static_cast<double>(size) + ethernet_);
      const double start = std::max(now(), uplinks_[source]);
      uplinks_[source] = start + seconds;
      if (loss_ > 0 && uniform_(draws_) < loss_) {
        ++counts_.lost;
        free_.push_back(data);
        continue;
      }
      double& latest = latest_[source * tuns_.size() + target];
      const double late = jitter_ > 0 ? jitter_ * uniform_(draws_) : 0.0;
      latest = std::max(latest, start + delay_ + late);  // packets do not overtake each other
      ++pending_[target];
      crossing_.push({latest, order_++, target, static_cast<size_t>(size), seconds, data});
    }
  }

  void deliver(double moment) {
    while (!crossing_.empty() && crossing_.top().due <= moment) {
      Packet packet = crossing_.top();
      crossing_.pop();
      double& busy = downlinks_[packet.target];
      busy = packet.due = std::max(busy, packet.due) + packet.seconds;
      leaving_.push(packet);
    }
    while (!leaving_.empty() && leaving_.top().due <= moment) {
      const Packet packet = leaving_.top();
      leaving_.pop();
      --pending_[packet.target];
      const double late = moment - packet.due;
      counts_.late_sum += late;
      counts_.late_max = std::max(counts_.late_max, late);
      ++counts_.packets;
      counts_.bytes += packet.size;
      if (write(tuns_[packet.target], packet.data, packet.size) < 0) ++counts_.dropped;
      free_.push_back(packet.data);
    }
  }

  bool answer() {
    uint8_t asked;
    if (read(control_, &asked, 1) != 1) return false;
    if (asked == 'x') cut();
    rusage used;
    getrusage(RUSAGE_SELF, &used);
    const double cpu = static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                       1e-6 * static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    const double mean =
        counts_.packets ? counts_.late_sum / static_cast<double>(counts_.packets) : 0.0;
    return dprintf(control_,
                   "{\"packets\": %llu, \"bytes\": %llu, \"lost\": %llu, \"dropped\": %llu, "
                   "\"late_mean\": %.9f, \"late_max\": %.9f, \"cpu\": %.6f, \"clock\": %.6f}\n",
                   static_cast<unsigned long long>(counts_.packets),
                   static_cast<unsigned long long>(counts_.bytes),
                   static_cast<unsigned long long>(counts_.lost),
                   static_cast<unsigned long long>(counts_.dropped), mean, counts_.late_max, cpu,
                   now()) > 0;
  }

  void cut() {
    loss_ = 1.0;
    for (Queue* queue : {&crossing_, &leaving_}) {
      for (; !queue->empty(); queue->pop()) {
        ++counts_.lost;
        free_.push_back(queue->top().data);
      }
    }
    std::fill(pending_.begin(), pending_.end(), size_t{0});
  }

  uint8_t* buffer() {
    if (free_.empty()) return new uint8_t[kLargest];
    uint8_t* data = free_.back();
    free_.pop_back();
    return data;
  }

  const double seconds_per_byte_, delay_, jitter_;
  double loss_;
  const double ethernet_;
  const int control_;
  const std::vector<int> tuns_;
  std::mt19937_64 draws_;
  std::uniform_real_distribution<double> uniform_{0.0, 1.0};
  std::vector<double> uplinks_, downlinks_;  // busy until
  std::vector<double> latest_;               // arrival of a pair's last packet
  std::vector<size_t> pending_;              // packets by receiver, on their way
  Queue crossing_, leaving_;
  uint64_t order_ = 0;
  std::vector<uint8_t*> free_;
  Counts counts_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 9) {
    std::fprintf(stderr,
                 "usage: switch MBIT_PER_S DELAY_MS JITTER_MS LOSS ETHERNET SEED CONTROL_FD "
                 "TUN_FD...\n");
    return 2;
  }
  std::vector<int> tuns;
  for (int i = 8; i < argc; ++i) tuns.push_back(std::atoi(argv[i]));
  prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0);  // 50 us by default
  const sched_param ahead{1};
  sched_setscheduler(0, SCHED_FIFO, &ahead);  // where allowed, ahead of the ranks that compute
  Switch(argv, tuns).run();
  return 0;
}
