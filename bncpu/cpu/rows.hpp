// The inner loops over one row of contiguous values: fold (sums) and map (results), each written
// once over any number of input rows. What is summed or mapped comes in as a function on vectors.
#pragma once

#include <algorithm>

#include "storage.hpp"

namespace bncpu {
namespace {

// Independent accumulators: enough to hide the latency of an addition.
constexpr int kAccumulators = 4;

// A row to read, and what the lanes beyond its end stand for (so that they add nothing to a sum).
template <class S>
struct Row {
    const S* data;
    VecOf<S> beyond;
};

// Two running sums, four times over.
template <class T>
struct Accumulators {
    struct Pair {
        Vec<T> first = Vec<T>::all(0), second = Vec<T>::all(0);
    };
    Pair pair[kAccumulators];

    // Added in a fixed order.
    Vec<T> first() const {
        return (pair[0].first + pair[1].first) + (pair[2].first + pair[3].first);
    }
    Vec<T> second() const {
        return (pair[0].second + pair[1].second) + (pair[2].second + pair[3].second);
    }
};

// What accumulators leave behind when they begin anew: their sums in double, lane by lane.
template <class T>
struct Totals {
    Wide<T> first, second;

    void add(const Accumulators<T>& a) {
        first.add(a.first().wide());
        second.add(a.second().wide());
    }
};

// Work that a fold does vector by vector beside its own: none.
struct Nothing {
    void step() {}
    void block() {}
};

// Every vector of the rows is taken in by f(i, n, pair, vectors...), whose first lane is element i
// and of whose lanes n are elements, in a fixed order. With each goes one step of `beside`.
template <class Beside, class F, class S, class... Rest>
BNCPU_INLINE void fold_row(Beside& beside, Accumulators<Arithmetic<S>>& sums, int64_t n, F f,
                           Row<S> row, Rest... rest) {
    constexpr int L = VecOf<S>::lanes;
    Accumulators<Arithmetic<S>> to = sums;  // registers: nobody else can see them change
    int64_t i = 0;
    const auto take = [&](int64_t at, auto& pair) {
        f(at, L, pair, load(row.data + at), load(rest.data + at)...);
    };
    static_assert(kAccumulators == 4, "written out, so that they stay in registers");
    for (; i + 4 * L <= n; i += 4 * L) {
        beside.block();
        take(i, to.pair[0]);
        take(i + L, to.pair[1]);
        take(i + 2 * L, to.pair[2]);
        take(i + 3 * L, to.pair[3]);
    }
    for (; i + L <= n; i += L) take(i, to.pair[0]);
    if (i < n)
        f(i, (int)(n - i), to.pair[1], load(row.data + i, n - i, row.beyond),
          load(rest.data + i, n - i, rest.beyond)...);
    sums = to;
}

template <class F, class S, class... Rest>
BNCPU_INLINE void fold_row(Accumulators<Arithmetic<S>>& to, int64_t n, F f, Row<S> row,
                           Rest... rest) {
    Nothing beside;
    fold_row(beside, to, n, f, row, rest...);
}

// f(i, lanes, load_at) for every vector of a row of n, where load_at(p, beyond) reads that vector
// of any row p.
template <class S, class F>
BNCPU_INLINE void by_vectors(int64_t n, F f) {
    constexpr int L = VecOf<S>::lanes;
    int64_t i = 0;
    for (; i + L <= n; i += L) f(i, L, [i](const auto* p, auto) { return load(p + i); });
    if (i < n)
        f(i, (int)(n - i),
          [i, n](const auto* p, auto beyond) { return load(p + i, n - i, beyond); });
}

// One row of results, out[i] = value(i, lanes, load_at), to be written at once (rest) or, vector by
// vector, beside other work (step). When streamed, results go past the caches: the head of the row
// up to the first aligned vector, and its tail, are ordinary stores.
//
// A Target has the row `out` and the functions value(i, lanes, load_at), load_at as by_vectors has
// it, prefetch_ahead(i), called for a row that is written at once (alone), and finish().
template <bool streamed, bool alone, class S, class Target>
class RowMap {
   public:
    BNCPU_INLINE RowMap(Target target, int64_t n) : target(target), n(n) {
        if (!streamed) return;
        const int64_t head = (int64_t)(-(uintptr_t)target.out % kStreamBytes<S> / sizeof(S));
        if (head > 0) part(std::min(head, n));
    }

    // The next vector, or the next four, if there are as many left.
    BNCPU_INLINE void step() {
        if (i + L <= n) vector(i), i += L;
    }
    BNCPU_INLINE void block() {
        if (i + 4 * L > n) return;
        vector(i);
        vector(i + L);
        vector(i + 2 * L);
        vector(i + 3 * L);
        i += 4 * L;
    }

    // All that is left; to be called once.
    BNCPU_INLINE void rest() {
        for (; i + L <= n; i += L) vector(i);
        if (i < n) part(n - i);
        target.finish();
    }

   private:
    static constexpr int L = VecOf<S>::lanes;
    Target target;
    int64_t n, i = 0;

    BNCPU_INLINE void vector(int64_t at) {
        if (alone) target.prefetch_ahead(at);
        const auto y = target.value(at, L, [at](const auto* p, auto) { return load(p + at); });
        if (streamed)
            stream(y, target.out + at);
        else
            store(y, target.out + at);
    }
    BNCPU_INLINE void part(int64_t count) {
        if (count == L) {
            vector(i);
        } else {
            const int64_t at = i;
            const auto y = target.value(at, (int)count, [at, count](const auto* p, auto beyond) {
                return load(p + at, count, beyond);
            });
            store(y, target.out + at, count);
        }
        i += count;
    }
};

template <class S, class Target>
BNCPU_INLINE void map_row(bool streamed, Target target, int64_t n) {
    if (streamed)
        RowMap<true, true, S, Target>(target, n).rest();
    else
        RowMap<false, true, S, Target>(target, n).rest();
}

// What the sums of a piece may have beside them: the results of the piece as another tile has it,
// row by row (MapBeside), or nothing.
struct NothingBeside {
    Nothing row(int64_t) const { return {}; }
    static void rest(Nothing&) {}
};

template <class S, class Maker>
struct MapBeside {
    Maker make;  // make(k) is the target of row k
    int64_t width;

    BNCPU_INLINE auto row(int64_t k) const {
        const auto target = make(k);
        return RowMap<true, false, S, decltype(make(k))>(target, width);
    }
    template <class Map>
    static BNCPU_INLINE void rest(Map& map) {
        map.rest();
    }
};

}  // namespace
}  // namespace bncpu
