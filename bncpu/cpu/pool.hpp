// Memory of large arrays that are no more, kept for the next ones of their size: a fresh page costs
// a fault and is cleared by the system, which takes as long as normalising what will stand in it.
// An allocator of its own for NumPy (NEP 49), for the large results alone.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "numpy/arrayobject.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bncpu {
namespace {

class Pool {
   public:
    // What is kept at most, in bytes; what is beyond is freed at once, the oldest first.
    void set_limit(size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex);
        limit_ = bytes;
        while (kept_ > limit_) drop_oldest();
    }
    size_t limit() const { return limit_; }
    size_t kept() const { return kept_; }

    // Kept memory of just this size, else new memory; nullptr if there is none.
    void* allocate(size_t bytes) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            for (int i = count - 1; i >= 0; --i)
                if (block[i].bytes == bytes) return remove(i);
        }
        void* memory = std::malloc(bytes);
        if (memory != nullptr) ask_for_huge_pages(memory, bytes);
        return memory;
    }

    void release(void* memory, size_t bytes) {
        if (memory == nullptr) return;
        {
            const std::lock_guard<std::mutex> lock(mutex);
            if (bytes <= limit_) {
                while (count == kBlocks || kept_ + bytes > limit_) drop_oldest();
                block[count++] = {memory, bytes};
                kept_ += bytes;
                return;
            }
        }
        std::free(memory);
    }

   private:
    static constexpr int kBlocks = 8;
    struct Block {
        void* memory;
        size_t bytes;
    };
    std::mutex mutex;
    Block block[kBlocks];  // the oldest first
    int count = 0;
    size_t kept_ = 0, limit_ = 0;

    void* remove(int i) {
        void* memory = block[i].memory;
        kept_ -= block[i].bytes;
        std::memmove(block + i, block + i + 1, (size_t)(--count - i) * sizeof(Block));
        return memory;
    }
    void drop_oldest() { std::free(remove(0)); }

    // As NumPy asks for its own large arrays: fewer faults, and fewer misses of the TLB.
    static void ask_for_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        constexpr size_t kPage = 4096;
        const size_t head = (kPage - (size_t)memory % kPage) % kPage;
        if (bytes > head) madvise((char*)memory + head, bytes - head, MADV_HUGEPAGE);
#else
        (void)memory, (void)bytes;
#endif
    }
};

// One for the process, never destroyed: arrays may outlive everything else.
inline Pool& pool() {
    static Pool* const one = new Pool();
    return *one;
}

// What NumPy calls. An array that is resized leaves its size behind, as it would anywhere.
inline void* pool_malloc(void*, size_t bytes) { return pool().allocate(bytes); }
inline void* pool_calloc(void*, size_t n, size_t size) { return std::calloc(n, size); }
inline void* pool_realloc(void*, void* memory, size_t bytes) { return std::realloc(memory, bytes); }
inline void pool_free(void*, void* memory, size_t bytes) { pool().release(memory, bytes); }

PyDataMem_Handler pool_handler = {
    "bncpu_pool", 1, {nullptr, pool_malloc, pool_calloc, pool_realloc, pool_free}};

}  // namespace
}  // namespace bncpu
