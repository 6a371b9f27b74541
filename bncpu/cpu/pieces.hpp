// What happens to one piece of a problem: its sums, and its results once the channel's sums are
// known. Sums are formed in the array's own precision about a pivot and leave as double; parts of a
// channel are merged by Chan, Golub & LeVeque 1983. No threads here, no memory is allocated.
#pragma once

#include <type_traits>

#include "coefficients.hpp"

namespace bncpu {
namespace {

// An array below the door. Row k of channel c begins at planes[k / rows_per_plane] (0 without
// planes) + (k % rows_per_plane) * row + c * channel.
template <class T>
struct View {
    T* data;
    const int64_t* planes;
    int64_t rows_per_plane, row, channel;

    T* at(int64_t k, int64_t c) const {
        T* p = data + c * channel;
        return planes == nullptr ? p + k * row
                                 : p + planes[k / rows_per_plane] + k % rows_per_plane * row;
    }
};

// Two sums of one channel over one part: (mean, m2) forward, (sum dy, sum dy * xhat) backward.
struct Sums {
    double first, second;
};

template <class T>
struct Job {
    Grid grid;
    Plan plan;
    View<T> x, dy, out;  // out is y or dx
    Channels channels;
};

// The rows [k0, k1) of a piece and, within each, `length` values of the run from `start` on.
struct Piece {
    int64_t k0, k1, start, length;

    Piece(const Grid& grid, int64_t index) {
        const Shape& shape = grid.shape;
        k0 = index / grid.segments * grid.piece_rows;
        k1 = std::min(shape.rows, k0 + grid.piece_rows);
        start = index % grid.segments * kPieceValues;
        length = grid.segments == 1 ? shape.run : std::min(kPieceValues, shape.run - start);
    }
    double count() const { return (double)((k1 - k0) * length); }
};

// Values of a channel in the pieces before this one.
inline int64_t values_before(const Grid& grid, int64_t piece) {
    const Shape& shape = grid.shape;
    const int64_t row = std::min(shape.rows, piece / grid.segments * grid.piece_rows);
    return row * shape.run + std::min(shape.run, piece % grid.segments * kPieceValues);
}

// The first piece of a part; parts differ by one piece at most.
inline int64_t part_begin(const Grid& grid, int64_t part) {
    return grid.pieces / grid.parts * part + std::min(part, grid.pieces % grid.parts);
}

inline double part_count(const Grid& grid, int64_t part) {
    return (double)(values_before(grid, part_begin(grid, part + 1)) -
                    values_before(grid, part_begin(grid, part)));
}

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

// float32 squares have lost their digits, or overflowed, or there are none: double must decide.
// About a pivot of ordinary size x - pivot is 0 or large enough to be squared.
inline bool out_of_range(float pivot, double m2, double n) {
    return !(m2 <= 1e36) || (m2 < n * 1e-28 && std::fabs(pivot) < 1e-9f);
}
inline bool out_of_range(double, double, double) { return false; }

// Two passes in double over a piece whose squares float32 cannot hold. Also the way of NaN and Inf.
template <class T>
Sums careful_moments(const View<T>& x, const Piece& piece, int64_t c) {
    constexpr int kLanes = 8;
    double lanes[kLanes] = {}, mean = 0;
    for (int pass = 0; pass < 2; ++pass) {
        std::fill_n(lanes, kLanes, 0.0);
        for (int64_t k = piece.k0; k < piece.k1; ++k) {
            const T* row = x.at(k, c) + piece.start;
            int64_t i = 0;
            for (; i + kLanes <= piece.length; i += kLanes)
                for (int j = 0; j < kLanes; ++j) {
                    const double d = row[i + j] - mean;
                    lanes[j] += pass == 0 ? d : d * d;
                }
            for (; i < piece.length; ++i) {
                const double d = row[i] - mean;
                lanes[0] += pass == 0 ? d : d * d;
            }
        }
        double sum = 0;
        for (int j = 0; j < kLanes; ++j) sum += lanes[j];
        if (pass == 1) return {mean, sum};
        mean = sum / piece.count();
    }
    return {mean, 0};  // not reached
}

// Rows form: mean first, then sums about it while the piece is in L1.
template <class T>
Sums row_moments(const View<T>& x, const Piece& piece, int64_t c) {
    struct Accumulator {
        Vec<T> sum, squares;
    };
    const Vec<T> zero = Vec<T>::all(0);
    Accumulator total[kAccumulators] = {{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}};
    for (int64_t k = piece.k0; k < piece.k1; ++k)
        fold_row(
            total, piece.length, [](Accumulator& a, Vec<T> v) { a.sum = a.sum + v; },
            Row<T>{x.at(k, c) + piece.start, zero});
    const double n = piece.count();
    const T pivot = (T)(((total[0].sum + total[1].sum) + (total[2].sum + total[3].sum)).sum() / n);

    const Vec<T> about = Vec<T>::all(pivot);
    Accumulator a[kAccumulators] = {{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}};
    for (int64_t k = piece.k0; k < piece.k1; ++k)
        fold_row(
            a, piece.length,
            [about](Accumulator& to, Vec<T> v) {
                const Vec<T> d = v - about;
                to.sum = to.sum + d;
                to.squares = fma(d, d, to.squares);
            },
            Row<T>{x.at(k, c) + piece.start, about});
    const double sum = ((a[0].sum + a[1].sum) + (a[2].sum + a[3].sum)).sum();
    const double squares = ((a[0].squares + a[1].squares) + (a[2].squares + a[3].squares)).sum();
    const Sums moments = moments_about(pivot, sum, squares, n);
    return out_of_range(pivot, moments.second, n) ? careful_moments(x, piece, c) : moments;
}

// Calls f(first row, rows) for the rows of a piece four at a time, then one at a time.
template <class F>
inline void by_quads(const Piece& piece, F f) {
    int64_t k = piece.k0;
    for (; k + 4 <= piece.k1; k += 4) f(k, std::integral_constant<int, 4>());
    for (; k < piece.k1; ++k) f(k, std::integral_constant<int, 1>());
}

// Columns form: sums about the mean of the piece's first rows, column by column, then the columns
// of a channel merged as equal parts. A pivot from r of R rows costs at most a factor 1 + R / r of
// the rounding error, and that only if those rows are outliers.
template <class T>
void column_moments(const View<T>& x, const Piece& piece, int64_t c0, int64_t c1, Sums* out) {
    constexpr int64_t L = Vec<T>::lanes;
    const int64_t run = piece.length, width = (c1 - c0) * run, rows = piece.k1 - piece.k0;
    alignas(64) T pivot[kColumns + L], sum[kColumns + L] = {}, squares[kColumns + L] = {};
    const Vec<T> zero = Vec<T>::all(0);

    const int64_t first = std::min<int64_t>(rows, 4);
    const Vec<T> share = Vec<T>::all((T)1 / (T)first);
    for (int64_t i = 0; i < width; i += L) {
        Vec<T> mean = zero;
        for (int64_t k = 0; k < first; ++k) {
            const T* p = x.at(piece.k0 + k, c0) + i;
            mean = fma(i + L <= width ? Vec<T>::load(p) : Vec<T>::load(p, width - i, zero), share,
                       mean);
        }
        mean.store(pivot + i);
    }
    by_quads(piece, [&](int64_t k, auto quad) {
        constexpr int R = decltype(quad)::value;
        const T* row[R];
        for (int r = 0; r < R; ++r) row[r] = x.at(k + r, c0);
        for (int64_t i = 0; i < width; i += L) {
            const Vec<T> about = Vec<T>::load(pivot + i);
            Vec<T> s = zero, q = zero;
            for (int r = 0; r < R; ++r) {
                const Vec<T> d = (i + L <= width ? Vec<T>::load(row[r] + i)
                                                 : Vec<T>::load(row[r] + i, width - i, about)) -
                                 about;
                s = s + d;
                q = fma(d, d, q);
            }
            (Vec<T>::load(sum + i) + s).store(sum + i);
            (Vec<T>::load(squares + i) + q).store(squares + i);
        }
    });
    for (int64_t c = c0; c < c1; ++c) {
        const int64_t j0 = (c - c0) * run, j1 = j0 + run;
        double mean = 0, m2 = 0;
        for (int64_t j = j0; j < j1; ++j)
            mean += ((double)pivot[j] - pivot[j0]) + (double)sum[j] / (double)rows;
        mean = pivot[j0] + mean / (double)run;
        for (int64_t j = j0; j < j1; ++j) {
            const Sums column = moments_about(pivot[j], sum[j], squares[j], (double)rows);
            const double delta = column.first - mean;
            m2 += column.second + (double)rows * (delta * delta);
        }
        out[c - c0] = out_of_range(pivot[j0], m2, piece.count()) ? careful_moments(x, piece, c)
                                                                 : Sums{mean, m2};
    }
}

// Rows form of the parameter gradients: sum dy, sum dy * xhat.
template <class T>
Sums row_gradients(const Job<T>& job, const Piece& piece, int64_t c) {
    struct Accumulator {
        Vec<T> dy, dy_xhat;
    };
    const ChannelCoefficients<T> k(job.channels, c);
    const Vec<T> zero = Vec<T>::all(0);
    Accumulator a[kAccumulators] = {{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}};
    for (int64_t row = piece.k0; row < piece.k1; ++row)
        fold_row(
            a, piece.length,
            [&k](Accumulator& to, Vec<T> dy, Vec<T> x) {
                to.dy = to.dy + dy;
                to.dy_xhat = fma(dy, xhat(k, 0, x), to.dy_xhat);
            },
            Row<T>{job.dy.at(row, c) + piece.start, zero},
            Row<T>{job.x.at(row, c) + piece.start, k.at(kMean, 0)});
    return {((a[0].dy + a[1].dy) + (a[2].dy + a[3].dy)).sum(),
            ((a[0].dy_xhat + a[1].dy_xhat) + (a[2].dy_xhat + a[3].dy_xhat)).sum()};
}

template <class T>
void column_gradients(const Job<T>& job, const Piece& piece, int64_t c0, int64_t c1, Sums* out) {
    constexpr int64_t L = Vec<T>::lanes;
    const int64_t run = piece.length, width = (c1 - c0) * run;
    const ColumnCoefficients<T> k(job.channels, c0, c1, run);
    alignas(64) T sum[kColumns + L] = {}, products[kColumns + L] = {};
    const Vec<T> zero = Vec<T>::all(0);
    by_quads(piece, [&](int64_t first, auto quad) {
        constexpr int R = decltype(quad)::value;
        const T *x[R], *dy[R];
        for (int r = 0; r < R; ++r) {
            x[r] = job.x.at(first + r, c0);
            dy[r] = job.dy.at(first + r, c0);
        }
        for (int64_t i = 0; i < width; i += L) {
            const bool whole = i + L <= width;
            Vec<T> s = zero, q = zero;
            for (int r = 0; r < R; ++r) {
                const Vec<T> g =
                    whole ? Vec<T>::load(dy[r] + i) : Vec<T>::load(dy[r] + i, width - i, zero);
                const Vec<T> v =
                    whole ? Vec<T>::load(x[r] + i) : Vec<T>::load(x[r] + i, width - i, zero);
                s = s + g;
                q = fma(g, xhat(k, i, v), q);
            }
            (Vec<T>::load(sum + i) + s).store(sum + i);
            (Vec<T>::load(products + i) + q).store(products + i);
        }
    });
    for (int64_t c = 0; c < c1 - c0; ++c) {
        out[c] = {0, 0};
        for (int64_t j = c * run; j < (c + 1) * run; ++j) {
            out[c].first += sum[j];
            out[c].second += products[j];
        }
    }
}

template <class Operation, class T, class Coefficients>
void apply_rows(const Job<T>& job, const Piece& piece, int64_t c, int64_t width,
                const Coefficients& k) {
    for (int64_t row = piece.k0; row < piece.k1; ++row) {
        T* out = job.out.at(row, c) + piece.start;
        const auto value = [&k](int64_t i, auto... in) { return Operation::value(k, i, in...); };
        if constexpr (std::is_same_v<Operation, Normalise>)
            map_row(job.plan.stream, out, width, value, job.x.at(row, c) + piece.start);
        else if constexpr (std::is_same_v<Operation, Gradient>)
            map_row(job.plan.stream, out, width, value, job.dy.at(row, c) + piece.start,
                    job.x.at(row, c) + piece.start);
        else
            map_row(job.plan.stream, out, width, value, job.dy.at(row, c) + piece.start);
    }
}

}  // namespace
}  // namespace bncpu
