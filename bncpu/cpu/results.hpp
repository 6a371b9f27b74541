// The results of an item: y or dx, each row a target of RowsMap (rows.hpp).
#pragma once

#include <limits>

#include "columns.hpp"

namespace bncpu {
namespace {

// A row of results: values [begin, begin + width) of row k from channel c on; the row that is
// written after it, if any; and the row of the residual to ask for meanwhile, if any.
template <class S>
struct Place {
    int64_t k, c, begin, width;
    const S *next, *residual_next;
};

// Streamed rows begin and end within cache lines that are written like any other. A store to a line
// that is not in the cache holds up all stores behind it, so these lines are asked for early: the
// last one of this row, and the first one of the row that is written after it.
template <class S>
BNCPU_INLINE void prefetch_ends(const S* out, const Place<S>& at) {
    prefetch(out + at.width - 1);
    if (at.next != nullptr) prefetch(at.next);
}

// y = act(xhat * gamma + beta + residual) of one row, and its bits of the mask. K gives the
// coefficients along the row.
template <bool with_residual, bool with_mask, class S, class K>
struct ForwardRow {
    using T = Arithmetic<S>;
    static constexpr bool with_bits = with_mask;
    K k;
    S* out;
    const S *x, *residual, *residual_next;
    Vec<T> floor;
    std::conditional_t<with_mask, BitWriter, Nothing> writer;
    using Bits = std::conditional_t<with_mask, GatheredBits, Nothing>;

    BNCPU_INLINE ForwardRow(const Job<S>& job, const Place<S>& at, const K& k)
        : k(k),
          out(job.out.at(at.k, at.c) + at.begin),
          x(job.x.at(at.k, at.c) + at.begin),
          residual(with_residual ? job.residual.at(at.k, at.c) + at.begin : nullptr),
          residual_next(at.residual_next != nullptr ? at.residual_next : residual),
          floor(Vec<T>::all(job.relu ? (T)0 : -std::numeric_limits<T>::infinity())),
          writer(job.mask, job.bit(at.k, at.c) + at.begin) {
        if (job.plan.stream) prefetch_ends(out, at);
    }

    BNCPU_INLINE decltype(auto) coefficients_at(int64_t i) { return k.here(i); }
    BNCPU_INLINE bool same_until(int64_t i) const { return k.same_until(i); }
    BNCPU_INLINE decltype(auto) same_coefficients() const { return k.same(); }
    BNCPU_INLINE Bits bits_of(int64_t, int) const { return {}; }
    BNCPU_INLINE void keep(const Bits& bits) {
        if constexpr (with_mask) writer.put(bits.bits, bits.count);
    }
    template <class Here, class Load>
    BNCPU_INLINE Vec<T> value(Bits& bits, const Here& here, int64_t i, int n, Load load_at) const {
        const Vec<T> none = Vec<T>::all(0);
        Vec<T> z = Normalise::value(here, load_at(x, none));
        if constexpr (with_residual) {
            prefetch_l2(residual_next + i);
            z = z + load_at(residual, none);
        }
        if constexpr (with_mask) bits.put(bits_above(z, Vec<T>::all(kStoredAsZero<S>)), n);
        return at_least(floor, z);
    }
    BNCPU_INLINE void finish() {
        if constexpr (with_mask) writer.finish();
    }
};

// dx of one row, and dresidual = dz where it is asked for. Constant statistics need x only for the
// sign.
template <bool fixed, Gate gate, class S, class K>
struct BackwardRow {
    using T = Arithmetic<S>;
    static constexpr bool reads_x = !fixed || gate == kSign, with_bits = gate == kBits;
    const Job<S>& job;
    K k;
    S *out, *dresidual = nullptr;
    const S *x, *dy;
    int64_t bit;
    bool stream_both = false;
    using Bits = std::conditional_t<gate == kBits, BitsAhead, Nothing>;

    BNCPU_INLINE BackwardRow(const Job<S>& job, const Place<S>& at, const K& k)
        : job(job),
          k(k),
          out(job.out.at(at.k, at.c) + at.begin),
          x(job.x.at(at.k, at.c) + at.begin),
          dy(job.dy.at(at.k, at.c) + at.begin),
          bit(job.bit(at.k, at.c) + at.begin) {
        if (job.dresidual.data != nullptr) {
            dresidual = job.dresidual.at(at.k, at.c) + at.begin;
            stream_both =
                job.plan.stream && ((uintptr_t)dresidual - (uintptr_t)out) % kStreamBytes<S> == 0;
        }
        if (job.plan.stream) prefetch_ends(out, at);
    }

    BNCPU_INLINE decltype(auto) coefficients_at(int64_t i) { return k.here(i); }
    BNCPU_INLINE bool same_until(int64_t i) const { return k.same_until(i); }
    BNCPU_INLINE decltype(auto) same_coefficients() const { return k.same(); }
    BNCPU_INLINE Bits bits_of(int64_t i, int n) const { return gate_bits<gate>(job, bit + i, n); }
    BNCPU_INLINE void keep(const Bits&) const {}
    template <class Here, class Load>
    BNCPU_INLINE Vec<T> value(Bits& bits, const Here& here, int64_t i, int n, Load load_at) const {
        const Vec<T> none = Vec<T>::all(0);
        const Vec<T> g = load_at(dy, none);
        Vec<T> v = none;
        if constexpr (reads_x) v = load_at(x, none);
        const Vec<T> dz = gated<gate, S>(bits, n, here, g, v);
        if constexpr (gate == kBits)
            if (dresidual != nullptr) {
                if (n < Vec<T>::lanes)
                    store(dz, dresidual + i, n);
                else if (stream_both)
                    stream(dz, dresidual + i);
                else
                    store(dz, dresidual + i);
            }
        if constexpr (fixed)
            return FixedGradient::value(here, dz);
        else
            return Gradient::value(here, dz, v);
    }
    BNCPU_INLINE void finish() {}
};

// The targets of an item's rows: what is filled by Target, with the coefficients that K makes.
template <class Target, class S, class K>
struct Results {
    const Job<S>& job;
    const Item& item;
    const ItemRows& rows;
    const K& k;  // k(column) gives those of a run

    // Run j (the only one in the rows form) of a row; the one below is `step` rows on.
    BNCPU_INLINE Target row(int64_t row, int64_t j, int64_t step) const {
        const Shape& shape = job.grid.shape;
        const Spot after = spot_after(job.grid, item, rows, row, step);
        const bool apart = row + step < rows.k1 && item.c1 - item.c0 < shape.channels;
        // Beside sums the residual comes from memory in strips, as x does (alone: in one go).
        const S* residual_next = job.plan.pipelined ? at_spot(job.residual, after) : nullptr;
        if (Target::with_bits) prefetch_mask(job, after, width(row));
        return Target(job,
                      {row * shape.fold + j, item.c0, rows.begin(row), width(row),
                       apart ? at_spot(job.out, after) : nullptr, residual_next},
                      k(j * width(row)));
    }
    BNCPU_INLINE int64_t width(int64_t row) const {
        const Shape& shape = job.grid.shape;
        if (shape.columns) return Runs(job, item, row).width;
        return rows.end(row) - rows.begin(row) + (item.c1 - item.c0 - 1) * shape.run;
    }
    BNCPU_INLINE int64_t runs(int64_t row) const {
        return job.grid.shape.columns ? Runs(job, item, row).count : 1;
    }
};

// An item's rows, four at a time or one.
template <bool quads, class Target, class S, class K>
BNCPU_HOT void map_item_rows(const Results<Target, S, K>& results) {
    const auto map = [&](int64_t k, auto count) {
        for (int64_t j = 0; j < results.runs(k); ++j)
            map_rows<decltype(count)::value, S>(
                results.job.plan.stream, [&](int r) { return results.row(k + r, j, count); },
                results.width(k));
    };
    const ItemRows& rows = results.rows;
    if constexpr (quads)
        by_quads(results.job.grid.shape, rows.k0, rows.k1, map);
    else
        for (int64_t k = rows.k0; k < rows.k1; ++k) map(k, std::integral_constant<int, 1>());
}

}  // namespace
}  // namespace bncpu
