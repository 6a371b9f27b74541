// One SIMD vector type, the width of the level this file is compiled for. Every instruction-set
// conditional of the kernels is in this file, save for the conversions of 16-bit types in
// storage.hpp; the loops above them are written once.
//
// Arithmetic is the compiler's own vector extension, so +, - and * need no spelling per level. What
// the extension cannot say is spelled out: partial loads and stores, fused multiply-add, stores
// that bypass the cache. Compilers without the extension get an array of the same width.
//
// Everything is in an unnamed namespace: each level must keep its own copy of every function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define BNCPU_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define BNCPU_VECTOR_BYTES 32
#else
#define BNCPU_VECTOR_BYTES 16
#endif

// What is not standard C++ is behind these few names, here and in storage.hpp. Under Windows, Clang
// has the extensions without being GNU. With BNCPU_PLAIN_VECTORS any compiler takes the way of one
// that has none, so that it can be tested where there is no such compiler.
#if defined(__GNUC__) || defined(__clang__)
#define BNCPU_GNU 1
#if !defined(BNCPU_PLAIN_VECTORS)
#define BNCPU_VECTORS 1
#endif
#endif

// The instructions spelled out below, where vector types convert to the intrinsics' types.
#if defined(BNCPU_VECTORS) && defined(__AVX512F__)
#define BNCPU_AVX512 1
#elif defined(BNCPU_VECTORS) && defined(__AVX2__) && defined(__FMA__)
#define BNCPU_AVX2 1
#elif defined(BNCPU_VECTORS) && defined(__SSE2__)
#define BNCPU_SSE2 1
#elif defined(BNCPU_VECTORS) && defined(__aarch64__)
#define BNCPU_NEON 1
#endif

// For what a loop must take in whole: only then do its values stay in registers.
#if defined(BNCPU_GNU)
#define BNCPU_INLINE inline __attribute__((always_inline))
#define BNCPU_INLINE_LAMBDA __attribute__((always_inline))
#else
#define BNCPU_INLINE __forceinline
#define BNCPU_INLINE_LAMBDA
#endif

// The functions that hold the hot loops keep their names in the compiled module, and so do the slow
// ones beside them: one call for some thousand values costs nothing, and what became of each loop
// can be looked up.
#if defined(BNCPU_GNU)
#define BNCPU_HOT __attribute__((noinline))
#else
#define BNCPU_HOT __declspec(noinline)
#endif

namespace bncpu {
namespace {

#if defined(BNCPU_VECTORS)
template <class T>
struct Lanes {
    typedef T type __attribute__((vector_size(BNCPU_VECTOR_BYTES)));
};
#else
template <class T>
struct Lanes {
    struct type {
        T lane[BNCPU_VECTOR_BYTES / sizeof(T)];
        T& operator[](int i) { return lane[i]; }
        T operator[](int i) const { return lane[i]; }
    };
};
#endif

#if defined(BNCPU_VECTORS) && defined(__clang__) && defined(__x86_64__) && !defined(BNCPU_SANITIZED)
// A store past the caches. Clang knows the intrinsics' as ordinary stores with a mark, which is
// lost where it merges one with another or folds a conversion into it, and a line that is written
// both ways takes several times as long. (Its sanitizers know nothing of what assembly writes.)
#define BNCPU_CLANG_STREAM 1
template <class V>
BNCPU_INLINE void stream_whole(V v, void* p) {
    if constexpr (sizeof(V) == 8) {
        uint64_t word;
        std::memcpy(&word, &v, sizeof word);
        __asm__("movnti %1, %0" : "=m"(*(V*)p) : "r"(word));
    } else {
#if defined(__AVX__)
        __asm__("vmovntps %1, %0" : "=m"(*(V*)p) : "v"(v));
#else
        __asm__("movntps %1, %0" : "=m"(*(V*)p) : "x"(v));
#endif
    }
}
#endif

template <class T>
struct Vec {
    using type = typename Lanes<T>::type;
    static constexpr int lanes = BNCPU_VECTOR_BYTES / sizeof(T);
    type v;

    static Vec all(T value) {
#if defined(BNCPU_VECTORS)
        return {value - type{}};  // not type{} + value, which would turn -0 into +0
#else
        Vec r;
        for (int i = 0; i < lanes; ++i) r.v[i] = value;
        return r;
#endif
    }

    static Vec load(const T* p) {
        Vec r;
        std::memcpy(&r.v, p, sizeof r.v);
        return r;
    }

    // The first n lanes from memory (0 < n < lanes), the others from `rest`. Reads nothing beyond
    // n.
    static Vec load(const T* p, int64_t n, Vec rest) {
#if defined(BNCPU_AVX512)
        if constexpr (sizeof(T) == 4)
            return {(type)_mm512_mask_loadu_ps((__m512)rest.v, (__mmask16)((1u << n) - 1), p)};
        else
            return {(type)_mm512_mask_loadu_pd((__m512d)rest.v, (__mmask8)((1u << n) - 1), p)};
#elif defined(BNCPU_AVX2)
        if constexpr (sizeof(T) == 4)
            return Vec{(type)_mm256_maskload_ps(p, lanes_before(n))}.first(n, rest);
        else
            return Vec{(type)_mm256_maskload_pd(p, lanes_before(n))}.first(n, rest);
#else
        for (int i = 0; i < lanes - 1; ++i)
            if (i < n) rest.v[i] = p[i];
        return rest;
#endif
    }

    void store(T* p) const { std::memcpy(p, &v, sizeof v); }

    void store(T* p, int64_t n) const {
#if defined(BNCPU_AVX512)
        if constexpr (sizeof(T) == 4)
            _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
        else
            _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif defined(BNCPU_AVX2)
        if constexpr (sizeof(T) == 4)
            _mm256_maskstore_ps(p, lanes_before(n), (__m256)v);
        else
            _mm256_maskstore_pd(p, lanes_before(n), (__m256d)v);
#else
        for (int i = 0; i < lanes - 1; ++i)
            if (i < n) p[i] = v[i];
#endif
    }

    // Past the caches, straight to memory; p is aligned to the vector. Needs store_fence() before
    // another thread may read. A plain store where the level has nothing better.
    void stream(T* p) const {
#if defined(BNCPU_CLANG_STREAM)
        stream_whole(v, p);
#elif defined(BNCPU_AVX512)
        _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(BNCPU_AVX2)
        _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(BNCPU_SSE2)
        _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
        store(p);
#endif
    }

    // The first n lanes of this (0 < n < lanes), the others of `rest`.
    Vec first(int64_t n, Vec rest) const {
#if defined(BNCPU_AVX512)
        if constexpr (sizeof(T) == 4)
            return {
                (type)_mm512_mask_mov_ps((__m512)rest.v, (__mmask16)((1u << n) - 1), (__m512)v)};
        else
            return {
                (type)_mm512_mask_mov_pd((__m512d)rest.v, (__mmask8)((1u << n) - 1), (__m512d)v)};
#elif defined(BNCPU_AVX2)
        if constexpr (sizeof(T) == 4)
            return {(type)_mm256_blendv_ps((__m256)rest.v, (__m256)v, (__m256)lanes_before(n))};
        else
            return {(type)_mm256_blendv_pd((__m256d)rest.v, (__m256d)v, (__m256d)lanes_before(n))};
#else
        for (int i = 0; i < lanes - 1; ++i)
            if (i < n) rest.v[i] = v[i];
        return rest;
#endif
    }

    // Sum of the lanes, in double, always in the same order.
    double sum() const { return wide().sum(); }

    // The lanes as double.
    auto wide() const;

#if defined(BNCPU_AVX2)
   private:
    // All bits of the first n lanes.
    static __m256i lanes_before(int64_t n) {
        if constexpr (sizeof(T) == 4)
            return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n),
                                      _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        else
            return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    }
#endif
};

// As many doubles as a vector of T has lanes.
template <class T>
struct Wide {
    static constexpr int lanes = Vec<T>::lanes;
#if defined(BNCPU_VECTORS)
    typedef double type __attribute__((vector_size(lanes * sizeof(double))));
    type v = {};
#else
    double v[lanes] = {};
#endif

    double sum() const {
        double part[lanes];
        std::memcpy(part, &v, sizeof part);
        return tree<lanes>(part);
    }

   private:
    // The first n values, halves upon halves.
    template <int n>
    static double tree(const double* part) {
#if defined(BNCPU_VECTORS)
        if constexpr (n * sizeof(double) > 16) {
            typedef double half __attribute__((vector_size(n / 2 * sizeof(double))));
            half low, high;
            std::memcpy(&low, part, sizeof low);
            std::memcpy(&high, part + n / 2, sizeof high);
            low += high;
            return tree<n / 2>((const double*)&low);
        }
#endif
        double sums[n];
        std::memcpy(sums, part, sizeof sums);
        for (int width = n / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
        return sums[0];
    }
};

template <class T>
inline auto Vec<T>::wide() const {
    Wide<T> r;
#if defined(BNCPU_VECTORS)
    r.v = __builtin_convertvector(v, typename Wide<T>::type);
#else
    for (int i = 0; i < lanes; ++i) r.v[i] = (double)v[i];
#endif
    return r;
}

#if defined(BNCPU_VECTORS)
template <class T>
inline Vec<T> operator+(Vec<T> a, Vec<T> b) {
    return {a.v + b.v};
}
template <class T>
inline Vec<T> operator-(Vec<T> a, Vec<T> b) {
    return {a.v - b.v};
}
template <class T>
inline Vec<T> operator*(Vec<T> a, Vec<T> b) {
    return {a.v * b.v};
}
#else
template <class T>
inline Vec<T> operator+(Vec<T> a, Vec<T> b) {
    for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] += b.v[i];
    return a;
}
template <class T>
inline Vec<T> operator-(Vec<T> a, Vec<T> b) {
    for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] -= b.v[i];
    return a;
}
template <class T>
inline Vec<T> operator*(Vec<T> a, Vec<T> b) {
    for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] *= b.v[i];
    return a;
}
#endif

// The lanes as double, added up to as many as a vector of double has.
template <class T>
inline Vec<double> folded(Vec<T> v) {
    if constexpr (sizeof(T) == 8) {
        return {v.v};
    } else {
        const auto wide = v.wide();
        Vec<double> low, high;
        std::memcpy(&low.v, &wide.v, sizeof low.v);
        std::memcpy(&high.v, (const char*)&wide.v + sizeof low.v, sizeof high.v);
        return low + high;
    }
}

// a * b + c, rounded once where the level has the instruction.
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
    using type [[maybe_unused]] = typename Vec<T>::type;
#if defined(BNCPU_AVX512)
    if constexpr (sizeof(T) == 4)
        return {(type)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
    else
        return {(type)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v)};
#elif defined(BNCPU_AVX2)
    if constexpr (sizeof(T) == 4)
        return {(type)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
    else
        return {(type)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
#elif defined(BNCPU_NEON)
    if constexpr (sizeof(T) == 4)
        return {(type)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
    else
        return {(type)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
#else
    return a * b + c;
#endif
}

// ---- Gates: what passes where a value is positive
// ------------------------------------------------

// The lesser lanes replaced: floor > v ? floor : v, so that NaN stays NaN.
template <class T>
inline Vec<T> at_least(Vec<T> floor, Vec<T> v) {
#if defined(BNCPU_VECTORS)
    return {floor.v > v.v ? floor.v : v.v};
#else
    for (int i = 0; i < Vec<T>::lanes; ++i) v.v[i] = floor.v[i] > v.v[i] ? floor.v[i] : v.v[i];
    return v;
#endif
}

// v where `sign` is above the limit or NaN, 0 elsewhere.
template <class T>
inline Vec<T> where_above(Vec<T> sign, Vec<T> limit, Vec<T> v) {
#if defined(BNCPU_VECTORS)
    return {sign.v <= limit.v ? Vec<T>::all(0).v : v.v};
#else
    for (int i = 0; i < Vec<T>::lanes; ++i) v.v[i] = sign.v[i] <= limit.v[i] ? (T)0 : v.v[i];
    return v;
#endif
}

// One bit per lane, the first lane's the lowest: whether `sign` is above the limit or NaN.
template <class T>
inline uint32_t bits_above(Vec<T> sign, Vec<T> limit) {
#if defined(BNCPU_AVX512)
    if constexpr (sizeof(T) == 4)
        return _mm512_cmp_ps_mask((__m512)sign.v, (__m512)limit.v, _CMP_NLE_UQ);
    else
        return _mm512_cmp_pd_mask((__m512d)sign.v, (__m512d)limit.v, _CMP_NLE_UQ);
#elif defined(BNCPU_AVX2)
    if constexpr (sizeof(T) == 4)
        return (uint32_t)_mm256_movemask_ps(
            _mm256_cmp_ps((__m256)sign.v, (__m256)limit.v, _CMP_NLE_UQ));
    else
        return (uint32_t)_mm256_movemask_pd(
            _mm256_cmp_pd((__m256d)sign.v, (__m256d)limit.v, _CMP_NLE_UQ));
#elif defined(BNCPU_SSE2)
    if constexpr (sizeof(T) == 4)
        return (uint32_t)_mm_movemask_ps(_mm_cmpnle_ps((__m128)sign.v, (__m128)limit.v));
    else
        return (uint32_t)_mm_movemask_pd(_mm_cmpnle_pd((__m128d)sign.v, (__m128d)limit.v));
#else
    uint32_t bits = 0;
    for (int i = 0; i < Vec<T>::lanes; ++i) bits |= (uint32_t)!(sign.v[i] <= limit.v[i]) << i;
    return bits;
#endif
}

// v where the lane's bit is set, 0 elsewhere.
template <class T>
inline Vec<T> where_set(uint32_t bits, Vec<T> v) {
#if defined(BNCPU_AVX512)
    if constexpr (sizeof(T) == 4)
        return {(typename Vec<T>::type)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v.v)};
    else
        return {(typename Vec<T>::type)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)v.v)};
#elif defined(BNCPU_VECTORS)
    using word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    typedef word words __attribute__((vector_size(BNCPU_VECTOR_BYTES)));
    words lane;
    for (int i = 0; i < Vec<T>::lanes; ++i) lane[i] = (word)1 << i;
    return {(((word)bits + words{}) & lane) != 0 ? v.v : Vec<T>::all(0).v};
#else
    for (int i = 0; i < Vec<T>::lanes; ++i)
        if (!(bits >> i & 1)) v.v[i] = 0;
    return v;
#endif
}

// Asks for the cache line of p, which need not be valid: into L1, or no nearer than L2.
inline void prefetch(const void* p) {
#if defined(BNCPU_GNU)
    __builtin_prefetch(p, 0, 3);
#elif defined(_M_X64)
    _mm_prefetch((const char*)p, _MM_HINT_T0);
#endif
}
inline void prefetch_l2(const void* p) {
#if defined(BNCPU_GNU)
    __builtin_prefetch(p, 0, 2);
#elif defined(_M_X64)
    _mm_prefetch((const char*)p, _MM_HINT_T1);
#endif
}

// Orders streamed stores before whatever this thread publishes next.
inline void store_fence() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_sfence();
#endif
}

}  // namespace
}  // namespace bncpu
