# cython: language_level=3, freethreading_compatible=True
"""The highest instruction level that this processor and operating system run.

Compiled for the baseline of the architecture, so that it can be imported anywhere.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "detect.hpp" namespace "bncpu" nogil:
    cdef struct CpuWords:
        uint32_t leaf1_ecx, leaf7_ebx, extended_ecx
        uint64_t xcr0

    int x86_64_level(CpuWords cpu) noexcept
    CpuWords read_cpu() noexcept


def x86_64_level_of(uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t extended_ecx, uint64_t xcr0):
    """Return 1 to 4: the x86-64 level for these words of CPUID and of XGETBV."""
    return x86_64_level(CpuWords(leaf1_ecx, leaf7_ebx, extended_ecx, xcr0))


def cpu_words():
    """Return the words that x86_64_level_of takes, as this machine has them (zeros elsewhere)."""
    cdef CpuWords cpu = read_cpu()
    return cpu.leaf1_ecx, cpu.leaf7_ebx, cpu.extended_ecx, cpu.xcr0
