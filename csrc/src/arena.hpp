// Memory that only grows, for one thread.

#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace astra::detail {

inline constexpr std::size_t kCacheLine = 64;

class Arena {
 public:
  // Aligned to a cache line. What was in it is lost.
  void* reserve(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(kCacheLine))));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const {
      ::operator delete(memory, std::align_val_t(kCacheLine));
    }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

}  // namespace astra::detail
