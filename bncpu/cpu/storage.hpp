// How values stand in memory, and how they come from there into vectors and go back: float and
// double as they are, the two 16-bit types as floats. Loads widen exactly; stores round to nearest,
// ties to even, and overflow to infinity.
//
// The conversions are instructions where the level has them and arithmetic on the bits elsewhere;
// their conditionals are the only ones outside simd.hpp.
#pragma once

#include <type_traits>

#include "simd.hpp"

namespace bncpu {
namespace {

struct Half {  // IEEE 754 binary16
    uint16_t bits;
};
struct BFloat16 {  // the upper half of a float
    uint16_t bits;
};

template <class S>
constexpr bool kIsHalf = std::is_same_v<S, Half> || std::is_same_v<S, BFloat16>;

// What values of a storage type are computed in.
template <class S>
using Arithmetic = std::conditional_t<kIsHalf<S>, float, S>;
template <class S>
using VecOf = Vec<Arithmetic<S>>;

// The largest positive value that is stored as zero.
template <class S>
constexpr Arithmetic<S> kStoredAsZero = 0;
template <>
constexpr float kStoredAsZero<Half> = 0x1p-25f;
template <>
constexpr float kStoredAsZero<BFloat16> = 0x1p-134f;

// ---- One vector of 16-bit values
// -----------------------------------------------------------------

#if defined(BNCPU_VECTORS)
typedef uint16_t PackedBits __attribute__((vector_size(BNCPU_VECTOR_BYTES / 2)));
typedef uint32_t Bits __attribute__((vector_size(BNCPU_VECTOR_BYTES)));
#else
struct PackedBits {
    uint16_t lane[BNCPU_VECTOR_BYTES / 4];
    uint16_t& operator[](int i) { return lane[i]; }
    uint16_t operator[](int i) const { return lane[i]; }
};
#endif

template <class To, class From>
inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// The conversions as arithmetic on the bits, for a uint32_t and its float or a vector of each.
template <class F, class U>
inline F half_to_float(U half) {
    const U none = half ^ half, sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
    const U normal = magnitude + ((127u - 15u) << 23);
    const U special = normal + ((127u - 15u) << 23);
    // A subnormal's bits count multiples of 2^-24, as do the last bits of 2^-14 + value.
    const U smallest = none + (113u << 23);
    const U subnormal = bits_of<U>(bits_of<F>(magnitude + smallest) - bits_of<F>(smallest));
    const U finite = magnitude < (0x0400u << 13) ? subnormal : normal;
    return bits_of<F>((magnitude < (0x7c00u << 13) ? finite : special) | sign);
}

template <class F, class U>
inline U half_from_float(F value) {
    const U all = bits_of<U>(value), none = all ^ all;
    const U sign = (all >> 16) & 0x8000u, magnitude = all & 0x7fffffffu;
    // The addition of 1/2 leaves multiples of 2^-24 in the last bits, rounded as it rounds.
    const U point = none + (126u << 23);
    const U subnormal = bits_of<U>(bits_of<F>(magnitude) + bits_of<F>(point)) - point;
    const U odd = (magnitude >> 13) & 1u;
    const U normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
    const U special = magnitude > (none + 0x7f800000u) ? none + 0x7e00u : none + 0x7c00u;
    const U finite = magnitude < (none + 0x38800000u) ? subnormal : normal;
    return (magnitude < (none + 0x47800000u) ? finite : special) | sign;
}

template <class F, class U>
inline U bfloat16_from_float(F value) {
    const U all = bits_of<U>(value);
    const U rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
    const U quiet = (all >> 16) | 0x40u;
    return value != value ? quiet : rounded;
}

// The bits of each value in a lane of 32, and back. Spelled out where GCC takes three shuffles for
// one, as GCC 12 does.
#if defined(BNCPU_VECTORS)
inline Bits spread_bits(PackedBits packed) {
#if defined(BNCPU_AVX512)
    return (Bits)_mm512_maskz_cvtepu16_epi32((__mmask16)0xffff, (__m256i)packed);
#else
    return __builtin_convertvector(packed, Bits);
#endif
}
inline PackedBits pack_bits(Bits bits) {
#if defined(BNCPU_AVX512)
    return (PackedBits)_mm512_maskz_cvtepi32_epi16((__mmask16)0xffff, (__m512i)bits);
#elif defined(BNCPU_AVX2)
    const __m256i halves = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
    return (PackedBits)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#else
    return __builtin_convertvector(bits, PackedBits);
#endif
}
#endif

inline Vec<float> widen(Half, PackedBits packed) {
#if defined(BNCPU_AVX512)
    // All lanes selected, because GCC warns of the unselected lanes of the plain form.
    return {(Vec<float>::type)_mm512_maskz_cvtph_ps((__mmask16)0xffff, (__m256i)packed)};
#elif defined(BNCPU_AVX2) && defined(__F16C__)
    return {(Vec<float>::type)_mm256_cvtph_ps((__m128i)packed)};
#elif defined(BNCPU_NEON)
    return {(Vec<float>::type)vcvt_f32_f16((float16x4_t)packed)};
#elif defined(BNCPU_VECTORS)
    return {half_to_float<Vec<float>::type>(spread_bits(packed))};
#else
    Vec<float> r;
    for (int i = 0; i < Vec<float>::lanes; ++i) r.v[i] = half_to_float<float>((uint32_t)packed[i]);
    return r;
#endif
}

inline Vec<float> widen(BFloat16, PackedBits packed) {
#if defined(BNCPU_VECTORS)
    return {bits_of<Vec<float>::type>(spread_bits(packed) << 16)};
#else
    Vec<float> r;
    for (int i = 0; i < Vec<float>::lanes; ++i) r.v[i] = bits_of<float>((uint32_t)packed[i] << 16);
    return r;
#endif
}

inline PackedBits narrow(Half, Vec<float> v) {
#if defined(BNCPU_AVX512)
    return (PackedBits)_mm512_maskz_cvtps_ph((__mmask16)0xffff, (__m512)v.v,
                                             _MM_FROUND_TO_NEAREST_INT);
#elif defined(BNCPU_AVX2) && defined(__F16C__)
    return (PackedBits)_mm256_cvtps_ph((__m256)v.v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(BNCPU_NEON)
    return (PackedBits)vcvt_f16_f32((float32x4_t)v.v);
#elif defined(BNCPU_VECTORS)
    return pack_bits(half_from_float<Vec<float>::type, Bits>(v.v));
#else
    PackedBits r;
    for (int i = 0; i < Vec<float>::lanes; ++i)
        r[i] = (uint16_t)half_from_float<float, uint32_t>(v.v[i]);
    return r;
#endif
}

inline PackedBits narrow(BFloat16, Vec<float> v) {
#if defined(BNCPU_VECTORS)
    return pack_bits(bfloat16_from_float<Vec<float>::type, Bits>(v.v));
#else
    PackedBits r;
    for (int i = 0; i < Vec<float>::lanes; ++i)
        r[i] = (uint16_t)bfloat16_from_float<float, uint32_t>(v.v[i]);
    return r;
#endif
}

// One value, for loops that need not be fast.
inline double value_of(double value) { return value; }
inline double value_of(float value) { return value; }
inline double value_of(Half value) { return half_to_float<float>((uint32_t)value.bits); }
inline double value_of(BFloat16 value) { return bits_of<float>((uint32_t)value.bits << 16); }

// ---- Loads and stores of any storage type
// --------------------------------------------------------

template <class S>
inline VecOf<S> load(const S* p) {
    if constexpr (kIsHalf<S>) {
        PackedBits packed;
        std::memcpy(&packed, p, sizeof packed);
        return widen(S{}, packed);
    } else {
        return Vec<S>::load(p);
    }
}

// The first n lanes from memory (0 < n < lanes), the others from `rest`.
template <class S>
inline VecOf<S> load(const S* p, int64_t n, VecOf<S> rest) {
    if constexpr (kIsHalf<S>) {
#if defined(BNCPU_AVX512)
        const auto packed = (PackedBits)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
        PackedBits packed = {};
        for (int i = 0; i < VecOf<S>::lanes - 1; ++i)
            if (i < n) packed[i] = p[i].bits;
#endif
        return widen(S{}, packed).first(n, rest);
    } else {
        return Vec<S>::load(p, n, rest);
    }
}

template <class S>
inline void store(VecOf<S> v, S* p) {
    if constexpr (kIsHalf<S>) {
        const PackedBits packed = narrow(S{}, v);
        std::memcpy(p, &packed, sizeof packed);
    } else {
        v.store(p);
    }
}

template <class S>
inline void store(VecOf<S> v, S* p, int64_t n) {
    if constexpr (kIsHalf<S>) {
        const PackedBits packed = narrow(S{}, v);
#if defined(BNCPU_AVX512)
        _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)packed);
#else
        for (int i = 0; i < VecOf<S>::lanes - 1; ++i)
            if (i < n) p[i].bits = packed[i];
#endif
    } else {
        v.store(p, n);
    }
}

constexpr int64_t kLineBytes = 64;  // of a cache

// Bytes that `stream` writes, and to which its address must be aligned.
template <class S>
constexpr int64_t kStreamBytes = Vec<Arithmetic<S>>::lanes * (int64_t)sizeof(S);

template <class S>
inline void stream(VecOf<S> v, S* p) {
    if constexpr (kIsHalf<S>) {
        const PackedBits packed = narrow(S{}, v);
#if defined(BNCPU_CLANG_STREAM)
        stream_whole(packed, p);
#elif defined(BNCPU_AVX512)
        _mm256_stream_si256((__m256i*)p, (__m256i)packed);
#elif defined(BNCPU_AVX2)
        _mm_stream_si128((__m128i*)p, (__m128i)packed);
#elif defined(BNCPU_SSE2)
        _mm_stream_si64((long long*)p, bits_of<long long>(packed));
#else
        std::memcpy(p, &packed, sizeof packed);
#endif
    } else {
        v.stream(p);
    }
}

}  // namespace
}  // namespace bncpu
