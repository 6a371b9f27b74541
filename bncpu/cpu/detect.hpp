// Which x86-64 levels (System V psABI: v1 to v4) the processor has and the operating system saves
// the registers for. Written out rather than left to the compiler's built-in, which knows the
// levels only since GCC 12 and Clang 17 and not at all under MSVC.
#pragma once

#include <cstdint>

#if defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bncpu {

struct CpuWords {
    uint32_t leaf1_ecx, leaf7_ebx, extended_ecx;
    uint64_t xcr0;  // register states that the operating system saves
};

// 1 to 4, a pure function of what CPUID and XGETBV say.
inline int x86_64_level(CpuWords cpu) {
    // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; LAHF-SAHF
    const uint32_t v2_leaf1 = 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23;
    const uint32_t v2_extended = 1u << 0;
    // FMA, MOVBE, OSXSAVE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT
    const uint32_t v3_leaf1 = 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29;
    const uint32_t v3_leaf7 = 1u << 3 | 1u << 5 | 1u << 8;
    const uint32_t v3_extended = 1u << 5;
    // AVX512F, DQ, CD, BW, VL
    const uint32_t v4_leaf7 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
    const uint64_t ymm_state = 0x6, zmm_state = 0xe6;

    const auto has = [](uint64_t word, uint64_t bits) { return (word & bits) == bits; };
    if (!has(cpu.leaf1_ecx, v2_leaf1) || !has(cpu.extended_ecx, v2_extended)) return 1;
    if (!has(cpu.leaf1_ecx, v3_leaf1) || !has(cpu.leaf7_ebx, v3_leaf7) ||
        !has(cpu.extended_ecx, v3_extended) || !has(cpu.xcr0, ymm_state))
        return 2;
    if (!has(cpu.leaf7_ebx, v4_leaf7) || !has(cpu.xcr0, zmm_state)) return 3;
    return 4;
}

inline CpuWords read_cpu() {
    CpuWords cpu = {0, 0, 0, 0};
#if defined(_MSC_VER) && defined(_M_X64)
    int r[4];
    __cpuidex(r, 0, 0);
    const int leaves = r[0];
    __cpuidex(r, 1, 0);
    cpu.leaf1_ecx = (uint32_t)r[2];
    if (leaves >= 7) {
        __cpuidex(r, 7, 0);
        cpu.leaf7_ebx = (uint32_t)r[1];
    }
    __cpuidex(r, (int)0x80000001, 0);
    cpu.extended_ecx = (uint32_t)r[2];
    if (cpu.leaf1_ecx >> 27 & 1) cpu.xcr0 = _xgetbv(0);
#elif defined(__x86_64__)
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) cpu.leaf1_ecx = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) cpu.leaf7_ebx = b;
    if (__get_cpuid(0x80000001u, &a, &b, &c, &d)) cpu.extended_ecx = c;
    if (cpu.leaf1_ecx >> 27 & 1) {  // OSXSAVE: XGETBV may be executed
        __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
        cpu.xcr0 = (uint64_t)d << 32 | a;
    }
#endif
    return cpu;
}

}  // namespace bncpu
