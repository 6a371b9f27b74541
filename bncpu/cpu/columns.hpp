// What the sums of the columns form share: two sums down each column of a strip, and the rows of
// results that are filled beside them, four at a time.
#pragma once

#include <array>
#include <utility>

#include "pieces.hpp"

namespace bncpu {
namespace {

// Two sums down each column of a strip.
template <class T>
struct ColumnSums {
    alignas(64) T first[kColumns + Vec<T>::lanes] = {}, second[kColumns + Vec<T>::lanes] = {};

    void add(int64_t i, Vec<T> a, Vec<T> b) {
        (Vec<T>::load(first + i) + a).store(first + i);
        (Vec<T>::load(second + i) + b).store(second + i);
    }

    // The sums of one channel: its `run` columns from j on.
    Sums of(int64_t j, int64_t run) const {
        if (run == 1) return {first[j], second[j]};
        const Vec<T> zero = Vec<T>::all(0);
        Accumulators<T> total;
        fold_row(
            total, run,
            [](int64_t, int, auto& to, Vec<T> a, Vec<T> b) {
                to.first = to.first + a;
                to.second = to.second + b;
            },
            Row<T>{first + j, zero}, Row<T>{second + j, zero});
        return {total.first().sum(), total.second().sum()};
    }
};

// Four rows of another tile's results, vector by vector beside four rows of sums.
template <int R, class Beside>
struct RowsBeside {
    using Map = decltype(std::declval<Beside>().row(0));
    std::array<Map, R> map;

    BNCPU_INLINE RowsBeside(const Beside& beside, int64_t k)
        : map(make(beside, k, std::make_index_sequence<R>())) {}
    BNCPU_INLINE void step() {
        for (Map& one : map) one.step();
    }
    BNCPU_INLINE void rest() {
        for (Map& one : map) Beside::rest(one);
    }

   private:
    template <size_t... r>
    static BNCPU_INLINE std::array<Map, R> make(const Beside& beside, int64_t k,
                                                std::index_sequence<r...>) {
        return {beside.row(k + (int64_t)r)...};
    }
};

}  // namespace
}  // namespace bncpu
