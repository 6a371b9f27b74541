// The moments of a piece. Sums are formed in the precision of the arithmetic about a pivot and
// leave as double; parts of a channel are merged by Chan, Golub & LeVeque 1983. No threads here, no
// memory is allocated.
#pragma once

#include "columns.hpp"

namespace bncpu {
namespace {

// Mean and m2 of parts a and b together. The weighted mean is the way out for infinite means,
// which IEEE arithmetic keeps infinite and the update formula would turn into NaN.
inline Sums merge_moments(double count_a, Sums a, double count_b, Sums b) {
    const double count = count_a + count_b, delta = b.first - a.first;
    const double weight = count_b / count;
    if (!std::isfinite(delta))
        return {a.first * (count_a / count) + b.first * weight, delta * delta};
    return {a.first + delta * weight, a.second + b.second + delta * delta * count_a * weight};
}

// Moments from sums of x - pivot over n values.
inline Sums moments_about(double pivot, double sum, double squares, double n) {
    const double mean = sum / n;
    return {pivot + mean, std::max(squares - sum * mean, squares != squares ? squares : 0.0)};
}

// The sums about a pivot will not do: the pivot is so far from the mean that squares have lost the
// digits of m2, or float32 squares have lost theirs, or overflowed, or there are none. Double must
// decide. About a pivot of ordinary size x - pivot is 0 or large enough to be squared.
inline bool out_of_range(float pivot, double squares, double m2, double n) {
    return !(m2 <= 1e36) || (m2 < n * 1e-28 && std::fabs(pivot) < 1e-9f) || squares > 4 * m2;
}
inline bool out_of_range(double, double squares, double m2, double) { return squares > 4 * m2; }

// Two passes in double over pieces [begin, end) whose squares float32 cannot hold. Also the way of
// NaN and Inf.
template <class S>
BNCPU_HOT Sums careful_moments(const Job<S>& job, int64_t begin, int64_t end, int64_t c) {
    constexpr int kLanes = 8;
    double lanes[kLanes] = {}, mean = 0, n = 0;
    for (int pass = 0; pass < 2; ++pass) {
        std::fill_n(lanes, kLanes, 0.0);
        n = 0;
        for (int64_t p = begin; p < end; ++p) {
            const Piece piece(job.grid, p);
            n += piece.count();
            for (int64_t k = piece.k0; k < piece.k1; ++k) {
                const S* row = job.x.at(k, c) + piece.start;
                for (int64_t i = 0; i < piece.length; ++i) {
                    const double d = value_of(row[i]) - mean;
                    lanes[i % kLanes] += pass == 0 ? d : d * d;
                }
            }
        }
        double sum = 0;
        for (int j = 0; j < kLanes; ++j) sum += lanes[j];
        if (pass == 1) return {mean, sum};
        mean = sum / n;
    }
    return {mean, 0};  // not reached
}

// The largest power of two up to a count and a limit: the sum, and so the mean, of as many equal
// values is exact, and a constant channel's pivot is its value.
constexpr int64_t exact_count(int64_t count, int64_t limit) {
    while (limit > count) limit /= 2;
    return limit;
}

// A pivot for a channel's values from row k on: the mean of the first few. Should these be
// outliers, the sums about it are found out (out_of_range).
template <class S>
Arithmetic<S> pivot_of(const S* row, int64_t length) {
    const int64_t n = exact_count(length, 16);
    Accumulators<Arithmetic<S>> total;
    fold_row(
        total, n, [](int64_t, int, auto& to, auto v) { to.first = to.first + v; },
        Row<S>{row, VecOf<S>::all(0)});
    return (Arithmetic<S>)(total.first().sum() / (double)n);
}

// Rows form: sums about a pivot over the pieces [begin, end) of a channel. What comes next is asked
// for meanwhile.
template <class S, class Beside>
BNCPU_HOT Sums row_moments(const Job<S>& job, const Item& item, Beside beside_piece) {
    using T = Arithmetic<S>;
    const View<S>& x = job.x;
    const int64_t c = item.c0;
    const Piece first(job.grid, item.begin);
    const T pivot = pivot_of(x.at(first.k0, c) + first.start, first.length);
    const Vec<T> about = Vec<T>::all(pivot);
    Totals<T> totals;
    double n = 0;
    for (int64_t p = item.begin; p < item.end; ++p) {
        const Piece piece(job.grid, p);
        const auto beside = beside_piece(piece);
        Accumulators<T> sums;
        for (int64_t k = piece.k0; k < piece.k1; ++k) {
            const S* ahead = row_ahead(job, item, x, piece, k);
            auto map = beside.row(k);
            fold_row(
                map, sums, piece.length,
                [about, ahead](int64_t i, int, auto& to, Vec<T> v) {
                    prefetch(ahead + i);
                    const Vec<T> d = v - about;
                    to.first = to.first + d;
                    to.second = fma(d, d, to.second);
                },
                Row<S>{x.at(k, c) + piece.start, about});
            beside.rest(map);
        }
        totals.add(sums);
        n += piece.count();
    }
    const double squares = totals.second.sum();
    const Sums moments = moments_about(pivot, totals.first.sum(), squares, n);
    return out_of_range(pivot, squares, moments.second, n)
               ? careful_moments(job, item.begin, item.end, c)
               : moments;
}

// A pivot for every channel, written out per column; where a channel is one column, the mean of its
// first rows.
template <class S>
void find_pivots(const View<S>& x, const Piece& piece, int64_t c0, int64_t c1,
                 Arithmetic<S>* pivot) {
    using T = Arithmetic<S>;
    const int64_t run = piece.length;
    if (run > 1) {
        for (int64_t c = c0; c < c1; ++c)
            std::fill_n(pivot + (c - c0) * run, run, pivot_of(x.at(piece.k0, c), run));
        return;
    }
    const int64_t rows = exact_count(piece.k1 - piece.k0, 16);
    const Vec<T> zero = Vec<T>::all(0), half = Vec<T>::all((T)0.5);
    by_vectors<S>(c1 - c0, [&](int64_t i, int, auto load_at) {
        Vec<T> mean[16] = {load_at(x.at(piece.k0, c0), zero)};
        for (int64_t r = 1; r < rows; ++r) mean[r] = load_at(x.at(piece.k0 + r, c0), zero);
        for (int64_t n = rows / 2; n > 0; n /= 2)
            for (int64_t r = 0; r < n; ++r) mean[r] = fma(mean[r], half, mean[r + n] * half);
        mean[0].store(pivot + i);
    });
}

template <class S, class Beside>
BNCPU_HOT void column_moments(const Job<S>& job, int64_t p, int64_t c0, int64_t c1, Sums* out,
                              const Beside& beside) {
    using T = Arithmetic<S>;
    const View<S>& x = job.x;
    const Piece piece(job.grid, p);
    const int64_t run = piece.length, width = (c1 - c0) * run;
    alignas(64) T pivot[kColumns + Vec<T>::lanes];
    find_pivots(x, piece, c0, c1, pivot);

    ColumnSums<T> sums;
    by_quads(piece, [&](int64_t k, auto quad) {
        constexpr int R = decltype(quad)::value;
        const S* row[R];
        for (int r = 0; r < R; ++r) row[r] = x.at(k + r, c0);
        RowsBeside<R, Beside> maps(beside, k);
        by_vectors<S>(width, [&](int64_t i, int, auto load_at) {
            maps.step();
            const Vec<T> about = Vec<T>::load(pivot + i);
            Vec<T> sum = Vec<T>::all(0), squares = sum;
            for (int r = 0; r < R; ++r) {
                const Vec<T> d = load_at(row[r], about) - about;
                sum = sum + d;
                squares = fma(d, d, squares);
            }
            sums.add(i, sum, squares);
        });
        maps.rest();
    });
    const double n = piece.count();
    double squares[kColumns];
    for (int64_t c = 0; c < c1 - c0; ++c) {
        const Sums about_pivot = sums.of(c * run, run);
        squares[c] = about_pivot.second;
        out[c] = moments_about(pivot[c * run], about_pivot.first, about_pivot.second, n);
    }
    for (int64_t c = 0; c < c1 - c0; ++c)
        if (out_of_range(pivot[c * run], squares[c], out[c].second, n))
            out[c] = careful_moments(job, p, p + 1, c0 + c);
}

}  // namespace
}  // namespace bncpu
