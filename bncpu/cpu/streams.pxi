# Copy, triad and read: the ceiling that benchmarks compare with.

cdef void stream(const real* a, const real* b, real* out, int64_t n, bint non_temporal,
                 int threads) noexcept nogil:
    cdef int64_t i, begin, size
    for i in prange((n + kStreamBlock - 1) // kStreamBlock, num_threads=threads,
                    use_threads_if=threads > 1, schedule="static"):
        begin = i * kStreamBlock
        size = min(kStreamBlock, n - begin)
        stream_block(a + begin, b if b == NULL else b + begin, out + begin, size, non_temporal)


def stream_copy(const real[::1] src, real[::1] dst, int num_threads, *, bint non_temporal=True):
    """Copy src to dst at the speed of memory."""
    with nogil:
        stream(&src[0], <const real*> NULL, &dst[0], src.shape[0], non_temporal, num_threads)


def stream_triad(const real[::1] a, const real[::1] b, real[::1] dst, int num_threads, *,
                 bint non_temporal=True):
    """Add a and b into dst at the speed of memory."""
    with nogil:
        stream(&a[0], &b[0], &dst[0], a.shape[0], non_temporal, num_threads)


def stream_read(const real[::1] a, int num_threads):
    """Read a at the speed of memory; returns its sum, so that nothing is optimised away."""
    cdef int64_t n = a.shape[0], i, begin
    cdef const real* first = &a[0]
    cdef double total = 0
    with nogil:
        for i in prange((n + kStreamBlock - 1) // kStreamBlock, num_threads=num_threads,
                        use_threads_if=num_threads > 1, schedule="static"):
            begin = i * kStreamBlock
            total += read_block(first + begin, min(kStreamBlock, n - begin))
    return total
