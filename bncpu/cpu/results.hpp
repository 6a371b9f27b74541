// The results of a piece: y or dx, row by row, each row a target of RowMap (rows.hpp).
#pragma once

#include <limits>

#include "pieces.hpp"

namespace bncpu {
namespace {

// Streamed rows begin and end within cache lines that are written like any other. A store to a line
// that is not in the cache holds up all stores behind it, so these lines are asked for early: the
// last one of this row, and the first one of the next unless that is the same.
template <class S>
BNCPU_INLINE void prefetch_ends(const Job<S>& job, const View<S>& out, int64_t row, int64_t c,
                                const Piece& piece, int64_t width) {
    const S* begin = out.at(row, c) + piece.start;
    prefetch(begin + width - 1);
    if (row + 1 < piece.k1 && job.plan.tile_channels < job.grid.shape.channels)
        prefetch(out.at(row + 1, c) + piece.start);
}

// y = act(xhat * gamma + beta + residual) of one row, and its bits of the mask.
template <bool with_residual, bool with_mask, class S, class Coefficients>
struct ForwardRow {
    using T = Arithmetic<S>;
    const Coefficients& k;
    S* out;
    const S *x, *residual, *ahead;
    Vec<T> floor;
    BitWriter writer;

    BNCPU_INLINE ForwardRow(const Job<S>& job, const Piece& piece, int64_t row, int64_t c,
                            int64_t width, const Coefficients& k)
        : k(k),
          out(job.out.at(row, c) + piece.start),
          x(job.x.at(row, c) + piece.start),
          residual(with_residual ? job.residual.at(row, c) + piece.start : nullptr),
          ahead(job.x.at(row + 1 < piece.k1 ? row + 1 : row, c) + piece.start),
          floor(Vec<T>::all(job.relu ? (T)0 : -std::numeric_limits<T>::infinity())),
          writer(job.mask, with_mask ? job.bit(row, c) + piece.start : 0) {
        if (job.plan.stream) prefetch_ends(job, job.out, row, c, piece, width);
    }

    template <class Load>
    BNCPU_INLINE Vec<T> value(int64_t i, int n, Load load_at) {
        const Vec<T> none = Vec<T>::all(0);
        Vec<T> z = Normalise::value(k, i, load_at(x, none));
        if constexpr (with_residual) z = z + load_at(residual, none);
        if constexpr (with_mask) writer.put(bits_above(z, Vec<T>::all(kStoredAsZero<S>)), n);
        return at_least(floor, z);
    }
    BNCPU_INLINE void prefetch_ahead(int64_t i) { prefetch_l2(ahead + i); }
    BNCPU_INLINE void finish() {
        if constexpr (with_mask) writer.finish();
    }
};

// dx of one row, and dresidual = dz where it is asked for. Constant statistics need x only for the
// sign.
template <bool fixed, Gate gate, class S, class Coefficients>
struct BackwardRow {
    using T = Arithmetic<S>;
    static constexpr bool reads_x = !fixed || gate == kSign;
    const Job<S>& job;
    const Coefficients& k;
    S *out, *dresidual = nullptr;
    const S *x, *dy, *x_ahead, *dy_ahead;
    int64_t bit;
    bool stream_both = false;

    BNCPU_INLINE BackwardRow(const Job<S>& job, const Piece& piece, int64_t row, int64_t c,
                             int64_t width, const Coefficients& k)
        : job(job),
          k(k),
          out(job.out.at(row, c) + piece.start),
          x(job.x.at(row, c) + piece.start),
          dy(job.dy.at(row, c) + piece.start),
          x_ahead(job.x.at(row + 1 < piece.k1 ? row + 1 : row, c) + piece.start),
          dy_ahead(job.dy.at(row + 1 < piece.k1 ? row + 1 : row, c) + piece.start),
          bit(job.bit(row, c) + piece.start) {
        if (job.dresidual.data != nullptr) {
            dresidual = job.dresidual.at(row, c) + piece.start;
            stream_both =
                job.plan.stream && ((uintptr_t)dresidual - (uintptr_t)out) % kStreamBytes<S> == 0;
        }
        if (job.plan.stream) prefetch_ends(job, job.out, row, c, piece, width);
    }

    template <class Load>
    BNCPU_INLINE Vec<T> value(int64_t i, int n, Load load_at) {
        const Vec<T> none = Vec<T>::all(0);
        const Vec<T> g = load_at(dy, none);
        Vec<T> v = none;
        if constexpr (reads_x) v = load_at(x, none);
        const Vec<T> dz = gated<gate>(job, k, bit, i, n, g, v);
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
            return FixedGradient::value(k, i, dz);
        else
            return Gradient::value(k, i, dz, v);
    }
    BNCPU_INLINE void prefetch_ahead(int64_t i) {
        prefetch_l2(dy_ahead + i);
        if constexpr (reads_x) prefetch_l2(x_ahead + i);
    }
    BNCPU_INLINE void finish() {}
};

// Every row of a piece as a target of its own: out = ...
template <class Target, class S, class Coefficients>
BNCPU_HOT void map_piece(const Job<S>& job, const Piece& piece, int64_t c, int64_t width,
                         const Coefficients& k) {
    for (int64_t row = piece.k0; row < piece.k1; ++row)
        map_row<S>(job.plan.stream, Target(job, piece, row, c, width, k), width);
}

}  // namespace
}  // namespace bncpu
