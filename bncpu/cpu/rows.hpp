// The inner loops over one row of contiguous values: fold (sums) and map (results), each written
// once over any number of input rows. What is summed or mapped comes in as a function on vectors.
#pragma once

#include "simd.hpp"

namespace bncpu {
namespace {

// Independent accumulators: enough to hide the latency of an addition.
constexpr int kAccumulators = 4;

// A row to read, and what the lanes beyond its end stand for (so that they add nothing to a sum).
template <class T>
struct Row {
    const T* data;
    Vec<T> beyond;
};

// Two running sums, four times over. They leave in double, added in a fixed order.
template <class T>
struct Accumulators {
    struct Pair {
        Vec<T> first = Vec<T>::all(0), second = Vec<T>::all(0);
    };
    Pair pair[kAccumulators];

    double first() const {
        return ((pair[0].first + pair[1].first) + (pair[2].first + pair[3].first)).sum();
    }
    double second() const {
        return ((pair[0].second + pair[1].second) + (pair[2].second + pair[3].second)).sum();
    }
};

// Every vector of the rows is taken in by f(i, pair, vectors...), whose first lane is element i, in
// a fixed order.
template <class T, class F, class... Rest>
inline void fold_row(Accumulators<T>& to, int64_t n, F f, Row<T> row, Rest... rest) {
    constexpr int64_t L = Vec<T>::lanes;
    int64_t i = 0;
    for (; i + kAccumulators * L <= n; i += kAccumulators * L)
        for (int j = 0; j < kAccumulators; ++j)
            f(i + j * L, to.pair[j], Vec<T>::load(row.data + i + j * L),
              Vec<T>::load(rest.data + i + j * L)...);
    for (; i + L <= n; i += L)
        f(i, to.pair[0], Vec<T>::load(row.data + i), Vec<T>::load(rest.data + i)...);
    if (i < n)
        f(i, to.pair[1], Vec<T>::load(row.data + i, n - i, row.beyond),
          Vec<T>::load(rest.data + i, n - i, rest.beyond)...);
}

// f(i, load) for every vector of a row of n, where load(p, beyond) reads that vector of any row p.
template <class T, class F>
inline void by_vectors(int64_t n, F f) {
    constexpr int64_t L = Vec<T>::lanes;
    int64_t i = 0;
    for (; i + L <= n; i += L) f(i, [i](const T* p, Vec<T>) { return Vec<T>::load(p + i); });
    if (i < n)
        f(i, [i, n](const T* p, Vec<T> beyond) { return Vec<T>::load(p + i, n - i, beyond); });
}

// out[i] = f(i, in[i]...), f on vectors whose first lane is element i. With `stream` the result
// goes past the caches: the head of the row up to the first aligned vector, and its tail, are
// ordinary stores.
template <class T, class F, class... In>
inline void map_row(bool stream, T* out, int64_t n, F f, const In*... in) {
    constexpr int64_t L = Vec<T>::lanes;
    const Vec<T> none = Vec<T>::all(0);
    int64_t i = 0;
    if (stream) {
        const int64_t head = (int64_t)(-(uintptr_t)out % sizeof(none.v) / sizeof(T));
        if (head > 0 && head < n) {
            f(0, Vec<T>::load(in, head, none)...).store(out, head);
            i = head;
        }
        if (head < n)
            for (; i + L <= n; i += L) f(i, Vec<T>::load(in + i)...).stream(out + i);
    } else {
        for (; i + L <= n; i += L) f(i, Vec<T>::load(in + i)...).store(out + i);
    }
    if (i < n) f(i, Vec<T>::load(in + i, n - i, none)...).store(out + i, n - i);
}

}  // namespace
}  // namespace bncpu
