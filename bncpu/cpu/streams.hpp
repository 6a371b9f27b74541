// Copy, triad and read at the speed of memory: what benchmarks hold the kernels against.
#pragma once

#include "rows.hpp"

namespace bncpu {
namespace {

constexpr int64_t kStreamBlock = 65536;  // elements that one thread takes at a time

template <class T>
void copy_block(const T* a, T* out, int64_t n, bool non_temporal) {
    map_row(non_temporal, out, n, [](int64_t, Vec<T> v) { return v; }, a);
    if (non_temporal) store_fence();
}

template <class T>
void triad_block(const T* a, const T* b, T* out, int64_t n, bool non_temporal) {
    map_row(non_temporal, out, n, [](int64_t, Vec<T> v, Vec<T> w) { return v + w; }, a, b);
    if (non_temporal) store_fence();
}

template <class T>
double read_block(const T* a, int64_t n) {
    Accumulators<T> total;
    fold_row(
        total, n, [](int64_t, auto& to, Vec<T> v) { to.first = to.first + v; },
        Row<T>{a, Vec<T>::all(0)});
    return total.first();
}

}  // namespace
}  // namespace bncpu
