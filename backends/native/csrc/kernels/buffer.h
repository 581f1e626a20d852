// Memory of a kernel for itself.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace attnrewrite::ISA {

// Floats at the start of a cache line, not initialized.
struct Buffer {
  float* data;

  explicit Buffer(int64_t count)
      : data(static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(float) + 64) / 64 * 64))) {
    if (data == nullptr) std::abort();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace attnrewrite::ISA
