// Copy, triad and read at the speed of memory: what benchmarks hold the kernels against.
#pragma once

#include "rows.hpp"

namespace bncpu {
namespace {

constexpr int64_t kStreamBlock = 65536;  // elements that one thread takes at a time

// out = a, or a + b.
template <class T>
struct Stream {
    T* out;
    const T *a, *b;

    Nothing coefficients_at(int64_t) const { return {}; }
    bool same_until(int64_t) const { return true; }
    Nothing same_coefficients() const { return {}; }
    Nothing bits_of(int64_t, int) const { return {}; }
    void keep(Nothing) {}
    template <class Load>
    Vec<T> value(Nothing, Nothing, int64_t, int, Load load_at) const {
        const Vec<T> none = Vec<T>::all(0);
        return b == nullptr ? load_at(a, none) : load_at(a, none) + load_at(b, none);
    }
    void finish() {}
};

template <class T>
void stream_block(const T* a, const T* b, T* out, int64_t n, bool non_temporal) {
    map_rows<1, T>(non_temporal, [=](int) { return Stream<T>{out, a, b}; }, n);
    if (non_temporal) store_fence();
}

template <class T>
double read_block(const T* a, int64_t n) {
    Accumulators<T> total;
    fold_row(
        total, n, [](int64_t, int, auto& to, Vec<T> v) { to.first = to.first + v; },
        Row<T>{a, Vec<T>::all(0)});
    return total.first().sum();
}

}  // namespace
}  // namespace bncpu
