// The parameter gradients of a piece: sum dz and sum dz * xhat (Ioffe & Szegedy 2015, below
// Algorithm 1), dz being dy after the gate of the activation.
#pragma once

#include "columns.hpp"

namespace bncpu {
namespace {

// The parameter gradients of a piece in double, where their sums are beyond float32 (or where there
// is a NaN or Inf). Slow, so one vector at a time through the same gate.
template <Gate gate, class S, class Coefficients>
BNCPU_HOT Sums careful_gradients(const Job<S>& job, const Piece& piece, int64_t c,
                                 const Coefficients& k, int64_t column) {
    using T = Arithmetic<S>;
    const double mean = job.channels.mean[c], invstd = job.channels.invstd[c];
    const Vec<T> zero = Vec<T>::all(0);
    Sums total{0, 0};
    for (int64_t row = piece.k0; row < piece.k1; ++row) {
        const S* x = job.x.at(row, c) + piece.start;
        const S* dy = job.dy.at(row, c) + piece.start;
        const int64_t bit = job.bit(row, c) + piece.start;
        by_vectors<S>(piece.length, [&](int64_t i, int n, auto load_at) {
            // A vector of coefficients from `column` on may reach into the next channel: only its
            // first n lanes are looked at.
            const Vec<T> v = load_at(x, zero);
            const Vec<T> dz =
                gated<gate>(job, at_column(k, column), bit, i, n, load_at(dy, zero), v);
            for (int j = 0; j < n; ++j) {
                total.first += dz.v[j];
                total.second += dz.v[j] * ((v.v[j] - mean) * invstd);
            }
        });
    }
    return total;
}

template <class S>
inline bool finite(Sums sums) {
    return std::is_same_v<S, double> || (std::isfinite(sums.first) && std::isfinite(sums.second));
}

// Rows form of the parameter gradients over the pieces [begin, end) of a channel: sum dz,
// sum dz * xhat.
template <Gate gate, class S, class Beside>
BNCPU_HOT Sums row_gradients(const Job<S>& job, const Item& item,
                             const ChannelCoefficients<Arithmetic<S>>& k, Beside beside_piece) {
    using T = Arithmetic<S>;
    const int64_t c = item.c0;
    Totals<T> totals;
    for (int64_t p = item.begin; p < item.end; ++p) {
        const Piece piece(job.grid, p);
        const auto beside = beside_piece(piece);
        Accumulators<T> total;
        for (int64_t row = piece.k0; row < piece.k1; ++row) {
            const int64_t bit = job.bit(row, c) + piece.start;
            const S* ahead = row_ahead(job, item, job.x, piece, row);
            const S* ahead_dy = row_ahead(job, item, job.dy, piece, row);
            auto map = beside.row(row);
            fold_row(
                map, total, piece.length,
                [&](int64_t i, int n, auto& to, Vec<T> dy, Vec<T> x) {
                    prefetch(ahead + i);
                    prefetch(ahead_dy + i);
                    const Vec<T> dz = gated<gate>(job, k, bit, i, n, dy, x);
                    to.first = to.first + dz;
                    to.second = fma(dz, Xhat::value(k, i, x), to.second);
                },
                Row<S>{job.dy.at(row, c) + piece.start, Vec<T>::all(0)},
                Row<S>{job.x.at(row, c) + piece.start, k.at(kMean, 0)});
            beside.rest(map);
        }
        totals.add(total);
    }
    const Sums sums = {totals.first.sum(), totals.second.sum()};
    if (finite<S>(sums)) return sums;
    Sums careful{0, 0};
    for (int64_t p = item.begin; p < item.end; ++p)
        careful = careful + careful_gradients<gate>(job, Piece(job.grid, p), c, k, 0);
    return careful;
}

template <Gate gate, class S, class Beside>
BNCPU_HOT void column_gradients(const Job<S>& job, const Piece& piece, int64_t c0, int64_t c1,
                                const ColumnCoefficients<Arithmetic<S>>& k, Sums* out,
                                const Beside& beside) {
    using T = Arithmetic<S>;
    const int64_t run = piece.length;
    const Vec<T> zero = Vec<T>::all(0);
    ColumnSums<T> sums;
    by_quads(piece, [&](int64_t first, auto quad) {
        constexpr int R = decltype(quad)::value;
        const S *x[R], *dy[R];
        int64_t bit[R];
        for (int r = 0; r < R; ++r) {
            x[r] = job.x.at(first + r, c0);
            dy[r] = job.dy.at(first + r, c0);
            bit[r] = job.bit(first + r, c0);
        }
        RowsBeside<R, Beside> maps(beside, first);
        by_vectors<S>((c1 - c0) * run, [&](int64_t i, int n, auto load_at) {
            maps.step();
            Vec<T> sum = zero, products = zero;
            for (int r = 0; r < R; ++r) {
                const Vec<T> v = load_at(x[r], zero);
                const Vec<T> dz = gated<gate>(job, k, bit[r], i, n, load_at(dy[r], zero), v);
                sum = sum + dz;
                products = fma(dz, Xhat::value(k, i, v), products);
            }
            sums.add(i, sum, products);
        });
        maps.rest();
    });
    for (int64_t c = 0; c < c1 - c0; ++c) {
        out[c] = sums.of(c * run, run);
        if (!finite<S>(out[c])) out[c] = careful_gradients<gate>(job, piece, c0 + c, k, c * run);
    }
}

}  // namespace
}  // namespace bncpu
