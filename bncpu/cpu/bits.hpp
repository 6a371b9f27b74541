// The mask: one bit per element, in the order of the elements in memory, the lowest bit of a byte
// first. A run of elements may begin and end within a byte that other threads write too.
#pragma once

#include <atomic>
#include <cstdint>

#include "simd.hpp"

namespace bncpu {
namespace {

// Writes the bits of one run, from bit `begin` of the mask on.
class BitWriter {
   public:
    BNCPU_INLINE BitWriter(uint8_t* mask, int64_t begin)
        : next(mask + begin / 8), first(begin % 8), used(first) {}

    // The next n bits (at most 32, or 64), which are the lowest of `bits`; those above are ignored.
    BNCPU_INLINE void put(uint64_t bits, int n) {
        if (n == 64) {
            put(bits, 32);
            bits >>= 32;
            n = 32;
        }
        word |= (bits & ((1ull << n) - 1)) << used;
        used += n;
        if (used >= 32) flush(4);
    }

    // To be called once, after the last bits.
    BNCPU_INLINE void finish() {
        flush(used / 8);
        if (used > 0) share((1u << used) - (1u << first));
    }

   private:
    uint8_t* next;
    int64_t first;  // bits of the next byte that belong to the run before
    int64_t used;
    uint64_t word = 0;

    BNCPU_INLINE void flush(int64_t bytes) {
        if (bytes == 0) return;
        if (first == 0 && bytes == 4) {
            store_four();
        } else {
            int64_t whole = 0;
            if (first > 0) {
                share(0xffu & ~((1u << first) - 1));
                whole = 1;
            }
            for (; whole < bytes; ++whole) next[whole] = (uint8_t)(word >> 8 * whole);
        }
        next += bytes;
        word >>= 8 * bytes;
        used -= 8 * bytes;
    }

    // The lowest four bytes, the lowest first.
    BNCPU_INLINE void store_four() {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        for (int i = 0; i < 4; ++i) next[i] = (uint8_t)(word >> 8 * i);
#else
        const uint32_t four = (uint32_t)word;
        std::memcpy(next, &four, sizeof four);
#endif
    }

    // Sets and clears the bits of the next byte that are `ours`, and leaves the others.
    BNCPU_INLINE void share(uint32_t ours) {
        auto* byte = reinterpret_cast<std::atomic<uint8_t>*>(next);
        byte->fetch_and((uint8_t)~(ours & ~word), std::memory_order_relaxed);
        byte->fetch_or((uint8_t)(ours & word), std::memory_order_relaxed);
        first = 0;
    }
};

// The first sizeof(Word) bytes, the lowest first.
template <class Word>
BNCPU_INLINE uint64_t read_word(const uint8_t* p) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    uint64_t word = 0;
    for (size_t i = 0; i < sizeof(Word); ++i) word |= (uint64_t)p[i] << 8 * i;
    return word;
#else
    Word word;
    std::memcpy(&word, p, sizeof word);
    return word;
#endif
}

// Bits [begin, begin + n) of the mask, n at most 16, or 32 or 64; what is above them is undefined.
// Touches no byte beyond them.
BNCPU_INLINE uint64_t read_bits(const uint8_t* mask, int64_t begin, int n) {
    const uint8_t* p = mask + begin / 8;
    const int shift = (int)(begin % 8);
    if (n >= 32) {
        const uint64_t word = n == 64 ? read_word<uint64_t>(p) : read_word<uint32_t>(p);
        return shift == 0 ? word : word >> shift | (uint64_t)p[n / 8] << (n - shift);
    }
    uint64_t word = p[0];
    if (shift + n > 8) word |= (uint64_t)p[1] << 8;
    if (shift + n > 16) word |= (uint64_t)p[2] << 16;
    return word >> shift;
}

// The bits of the next vectors of a row, gathered for a BitWriter, or read at once.
struct GatheredBits {
    uint64_t bits = 0;
    int count = 0;

    BNCPU_INLINE void put(uint32_t next, int n) {
        bits |= (uint64_t)next << count;
        count += n;
    }
};
struct BitsAhead {
    uint64_t bits;

    BNCPU_INLINE uint32_t take(int n) {
        const uint32_t next = (uint32_t)bits;
        bits >>= n;
        return next;
    }
};

}  // namespace
}  // namespace bncpu
