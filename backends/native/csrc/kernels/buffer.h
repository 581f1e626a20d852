// Memory of a kernel for itself.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace attnrewrite::ISA {

constexpr int64_t kLine = 16;             // floats in a cache line
constexpr int64_t kMostKept = int64_t{8} << 20;  // floats

inline float* allocate(int64_t count) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>(count) * sizeof(float));
  if (memory == nullptr) std::abort();
  return static_cast<float*>(memory);
}

// What a thread keeps from call to call, up to 32 MiB: memory that is new to a process costs more than it is used for.
// Buffers die in the order opposite to that of their birth, so it is a stack.
struct Stack {
  float* data = nullptr;
  int64_t size = 0, used = 0, wanted = 0;

  ~Stack() { std::free(data); }

  // Grows while nobody is on it.
  void fit() {
    if (used > 0 || wanted <= size || wanted > kMostKept) return;
    std::free(data);
    data = allocate(size = wanted);
  }
};

// One for all kernels: a buffer may be made in a function of one file and freed in that of another.
inline thread_local Stack stack;

// Floats at the start of a cache line, not initialized.
class Buffer {
 public:
  float* data;

  explicit Buffer(int64_t count) : size_(count / kLine * kLine + kLine) {
    stack.fit();
    is_own_ = stack.used + size_ > stack.size;
    data = is_own_ ? allocate(size_) : stack.data + stack.used;
    stack.used += size_;
    if (stack.used > stack.wanted) stack.wanted = stack.used;
  }

  ~Buffer() {
    stack.used -= size_;
    if (is_own_) std::free(data);
  }

  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

 private:
  int64_t size_;
  bool is_own_;
};

}  // namespace attnrewrite::ISA
