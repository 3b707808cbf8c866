// A slice of working memory per worker, kept between calls by the calling thread (at most one fp32 row per worker).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace reweight_ops {
namespace {

class Scratch {
  public:
    /// Throws std::bad_alloc; allocated before the parallel region, which must not throw.
    Scratch(int workers, int64_t floats) : stride_((floats + kPadding + kAlign - 1) / kAlign * kAlign) {
        struct Buffer {
            std::unique_ptr<float, void (*)(void*)> data{nullptr, std::free};
            int64_t size = 0;
        };
        static thread_local Buffer buffer;
        const int64_t wanted = floats > 0 ? workers * stride_ : 0;
        if (buffer.size < wanted) {
            buffer.data.reset();
            buffer.size = 0;
            buffer.data.reset((float*)std::aligned_alloc(kAlign * sizeof(float), wanted * sizeof(float)));
            if (!buffer.data) throw std::bad_alloc();
            buffer.size = wanted;
        }
        data_ = buffer.data.get();
    }

    float* of(int worker) const { return data_ + worker * stride_; }

  private:
    static constexpr int64_t kAlign = 16;    // floats: one cache line
    static constexpr int64_t kPadding = 64;  // the last pair of vectors may reach over the end
    int64_t stride_;
    float* data_;
};

}  // namespace
}  // namespace reweight_ops
