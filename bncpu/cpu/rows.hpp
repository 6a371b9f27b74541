// The inner loops over one row of contiguous values: fold (sums) and map (results), each written
// once over any number of input rows. What is summed or mapped comes in as a function on vectors.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

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

// Two sums of one channel: of x and its square about a pivot, (mean, m2), or (sum dy, sum dy *
// xhat).
struct Sums {
    double first, second;
};
inline Sums operator+(Sums a, Sums b) { return {a.first + b.first, a.second + b.second}; }

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

// What accumulators leave behind when they begin anew: their sums in double, lanes upon lanes.
struct Totals {
    Vec<double> first, second;

    template <class T>
    BNCPU_INLINE void add(const Accumulators<T>& a) {
        first = first + folded(a.first());
        second = second + folded(a.second());
    }
    Sums sum() const { return {first.sum(), second.sum()}; }
};

// Nothing: as work that a fold does vector by vector beside its own, or as a row's bits.
struct Nothing {
    template <class... Ignored>
    Nothing(const Ignored&...) {}
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
    for (; i + L <= n; i += L) {
        beside.step();
        take(i, to.pair[0]);
    }
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

// Rows of results, out[i] = value(here, i, lanes, load_at), some vectors of each in turn: to be
// written at once (rest) or, as much at a time as the sums of a vector or of four take in, beside
// other work (step, block). When streamed, results go past the caches: the head of a row up to the
// first aligned vector, and its tail, are ordinary stores, and all rows are aligned alike.
//
// A Target is one row: `out`, coefficients_at(i), which are asked for from left to right, once for
// all rows if vector by vector, same_until(i), whether they are the same_coefficients() up to
// there, bits_of(i, n), what the n values from i on have in the mask, value(bits, here, i, lanes,
// load_at), load_at as by_vectors has it, keep(bits) after these n, and finish().
template <bool streamed, int R, class S, class Target>
class RowsMap {
   public:
    template <class Maker>
    BNCPU_INLINE RowsMap(const Maker& make, int64_t n)
        : RowsMap(make, n, std::make_integer_sequence<int, R>()) {}

    // As many vectors as the calls until now have left behind, if there are as many left.
    BNCPU_INLINE void step() {
        if (kAtOnce > 1 && ++waiting < kAtOnce) return;
        waiting = 0;
        if (i + kAtOnce * L <= n) next();
    }
    BNCPU_INLINE void block() {
        if (i + 4 * L > n) return;
        if (R == 1 && target[0].same_until(i + 4 * L)) {
            const auto& here = target[0].same_coefficients();
            auto bits = target[0].bits_of(i, 4 * L);
            for (int j = 0; j < 4; ++j) vector(target[0], bits, here, i + j * L);
            target[0].keep(bits);
            i += 4 * L;
        } else {
            for (int j = 0; j < 4; ++j) single();
        }
    }

    // All that is left; to be called once.
    BNCPU_INLINE void rest() {
        if (R == 1)
            while (i + 4 * L <= n) block();
        while (i + kAtOnce * L <= n) next();
        while (i + L <= n) single();
        if (i < n) part(n - i);
        for (Target& row : target) row.finish();
    }

   private:
    static constexpr int L = VecOf<S>::lanes;
    // What goes past the caches is gathered line by line; rows that take turns within a line would
    // leave in pieces, each as dear as a line.
    static constexpr int kAtOnce =
        streamed && R > 1 ? std::clamp<int>(kLineBytes / kStreamBytes<S>, 1, 4) : 1;
    std::array<Target, R> target;
    int64_t n, i = 0;
    int waiting = 0;  // vectors of other work that have passed without results

    template <class Maker, int... r>
    BNCPU_INLINE RowsMap(const Maker& make, int64_t n, std::integer_sequence<int, r...>)
        : target{make(r)...}, n(n) {
        if (!streamed) return;
        const auto before = [&](int64_t bytes) {
            return (int64_t)(-(uintptr_t)target[0].out % (uintptr_t)bytes / sizeof(S));
        };
        if (const int64_t head = before(kStreamBytes<S>)) part(std::min(head, n));
        if (kAtOnce > 1)
            for (const int64_t line = before(kLineBytes); i < line && i + L <= n;) single();
    }

    template <class Bits, class Here>
    BNCPU_INLINE void vector(const Target& row, Bits& bits, const Here& here, int64_t at) {
        const auto y =
            row.value(bits, here, at, L, [at](const auto* p, auto) { return load(p + at); });
        if (streamed)
            stream(y, row.out + at);
        else
            store(y, row.out + at);
    }
    // The next vector of all rows.
    BNCPU_INLINE void single() {
        const auto& here = target[0].coefficients_at(i);
        for (Target& row : target) {
            auto bits = row.bits_of(i, L);
            vector(row, bits, here, i);
            row.keep(bits);
        }
        i += L;
    }
    // The next kAtOnce vectors of one row after the other.
    BNCPU_INLINE void next() {
        if (kAtOnce == 1) return single();
        for (Target& row : target) next_of(row, std::make_integer_sequence<int, kAtOnce>());
        i += kAtOnce * L;
    }
    template <int... j>
    BNCPU_INLINE void next_of(Target& row, std::integer_sequence<int, j...>) {
        auto bits = row.bits_of(i, kAtOnce * L);
        (vector(row, bits, row.coefficients_at(i + j * L), i + j * L), ...);
        row.keep(bits);
    }
    // Values that are no vector: before the first aligned one, or the last.
    BNCPU_INLINE void part(int64_t count) {
        const int64_t at = i;
        const auto& here = target[0].coefficients_at(at);
        for (Target& row : target) {
            auto bits = row.bits_of(at, (int)count);
            store(row.value(bits, here, at, (int)count,
                            [at, count](const auto* p, auto beyond) {
                                return load(p + at, count, beyond);
                            }),
                  row.out + at, count);
            row.keep(bits);
        }
        i += count;
    }
};

// R rows of n results at once; make(r) is the target of row r.
template <int R, class S, class Maker>
BNCPU_INLINE void map_rows(bool streamed, const Maker& make, int64_t n) {
    using Target = decltype(make(0));
    if (streamed)
        RowsMap<true, R, S, Target>(make, n).rest();
    else
        RowsMap<false, R, S, Target>(make, n).rest();
}

// What sums may have beside them: the results of the same rows of other channels, as many rows at a
// time (MapBeside), or nothing.
struct NothingBeside {
    template <int R>
    Nothing rows(int64_t, int64_t) const {
        return {};
    }
    static void rest(Nothing&) {}
};

template <class S, class Results>
struct MapBeside {
    const Results& results;

    // Run j of the rows from k on.
    template <int R>
    BNCPU_INLINE auto rows(int64_t k, int64_t j) const {
        const auto row = [=](int r) { return results.row(k + r, j, R); };
        return RowsMap<true, R, S, decltype(row(0))>(row, results.width(k));
    }
    template <class Map>
    static BNCPU_INLINE void rest(Map& map) {
        map.rest();
    }
};

}  // namespace
}  // namespace bncpu
