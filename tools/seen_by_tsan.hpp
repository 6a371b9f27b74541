// Included before a source that is compiled for ThreadSanitizer, which passes over wide vectors,
// and over what loads, stores or streams under a mask: tells it what they access. Vectors come and
// go by memcpy, whose own calls it would take for those of a module that it does not watch. Of the
// intrinsics only those that bncpu/cpu uses. Masks there select the first lanes.
#pragma once

#include <cstddef>
#include <cstring>

extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);

#define BNCPU_READS(p, bytes) __tsan_read_range((void*)(p), (unsigned long)(bytes))
#define BNCPU_WRITES(p, bytes) __tsan_write_range((void*)(p), (unsigned long)(bytes))

inline void* bncpu_memcpy(void* to, const void* from, std::size_t bytes) {
    BNCPU_READS(from, bytes);
    BNCPU_WRITES(to, bytes);
    return __builtin_memcpy(to, from, bytes);
}
namespace std {
using ::bncpu_memcpy;
}
#define memcpy bncpu_memcpy

#if defined(__AVX2__)
#include <immintrin.h>

#define BNCPU_LANES(mask) __builtin_popcount((unsigned)(mask))

#if defined(__AVX512F__)
#define _mm512_mask_loadu_ps(rest, mask, p) \
    (BNCPU_READS(p, 4 * BNCPU_LANES(mask)), _mm512_mask_loadu_ps(rest, mask, p))
#define _mm512_mask_loadu_pd(rest, mask, p) \
    (BNCPU_READS(p, 8 * BNCPU_LANES(mask)), _mm512_mask_loadu_pd(rest, mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) \
    (BNCPU_WRITES(p, 4 * BNCPU_LANES(mask)), _mm512_mask_storeu_ps(p, mask, v))
#define _mm512_mask_storeu_pd(p, mask, v) \
    (BNCPU_WRITES(p, 8 * BNCPU_LANES(mask)), _mm512_mask_storeu_pd(p, mask, v))
#define _mm256_maskz_loadu_epi16(mask, p) \
    (BNCPU_READS(p, 2 * BNCPU_LANES(mask)), _mm256_maskz_loadu_epi16(mask, p))
#define _mm256_mask_storeu_epi16(p, mask, v) \
    (BNCPU_WRITES(p, 2 * BNCPU_LANES(mask)), _mm256_mask_storeu_epi16(p, mask, v))
#define _mm512_stream_si512(p, v) (BNCPU_WRITES(p, 64), _mm512_stream_si512(p, v))
#endif

#define BNCPU_LANES_PS(mask) BNCPU_LANES(_mm256_movemask_ps((__m256)(mask)))
#define BNCPU_LANES_PD(mask) BNCPU_LANES(_mm256_movemask_pd((__m256d)(mask)))
#define _mm256_maskload_ps(p, mask) \
    (BNCPU_READS(p, 4 * BNCPU_LANES_PS(mask)), _mm256_maskload_ps(p, mask))
#define _mm256_maskload_pd(p, mask) \
    (BNCPU_READS(p, 8 * BNCPU_LANES_PD(mask)), _mm256_maskload_pd(p, mask))
#define _mm256_maskstore_ps(p, mask, v) \
    (BNCPU_WRITES(p, 4 * BNCPU_LANES_PS(mask)), _mm256_maskstore_ps(p, mask, v))
#define _mm256_maskstore_pd(p, mask, v) \
    (BNCPU_WRITES(p, 8 * BNCPU_LANES_PD(mask)), _mm256_maskstore_pd(p, mask, v))
#define _mm256_stream_si256(p, v) (BNCPU_WRITES(p, 32), _mm256_stream_si256(p, v))
#endif
