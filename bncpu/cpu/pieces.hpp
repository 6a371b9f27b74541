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
    T* data = nullptr;
    const int64_t* planes = nullptr;
    int64_t rows_per_plane = 1, row = 0, channel = 0;

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

// The first piece of a part; parts differ by one row group (or one piece) at most.
inline int64_t part_begin(const Grid& grid, int64_t part) {
    const int64_t step = grid.whole_rows ? grid.segments : 1, steps = grid.pieces / step;
    return step * (steps / grid.parts * part + std::min(part, steps % grid.parts));
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

// What this thread will read after row k of a piece: the rest of the row, then the next channel's
// row, or the same channel's further rows where the tile is that one channel.
template <class T>
const T* row_ahead(const Job<T>& job, const View<T>& x, const Piece& piece, int64_t k, int64_t c) {
    const Shape& shape = job.grid.shape;
    const int64_t below = k + job.grid.piece_rows;
    if (piece.start + piece.length == shape.run && job.plan.tile_channels == 1 &&
        below < shape.rows)
        return x.at(below, c);
    return x.at(k, c) + piece.start + piece.length;
}

// Rows form: mean first, then sums about it while the piece is in L1. The second pass, which leaves
// memory idle, asks for what comes next.
template <class T>
Sums row_moments(const Job<T>& job, const Piece& piece, int64_t c) {
    const View<T>& x = job.x;
    Accumulators<T> plain, about_pivot;
    for (int64_t k = piece.k0; k < piece.k1; ++k)
        fold_row(
            plain, piece.length, [](int64_t, auto& to, Vec<T> v) { to.first = to.first + v; },
            Row<T>{x.at(k, c) + piece.start, Vec<T>::all(0)});
    const double n = piece.count();
    const T pivot = (T)(plain.first() / n);

    const Vec<T> about = Vec<T>::all(pivot);
    for (int64_t k = piece.k0; k < piece.k1; ++k) {
        const T* ahead = row_ahead(job, x, piece, k, c);
        fold_row(
            about_pivot, piece.length,
            [about, ahead](int64_t i, auto& to, Vec<T> v) {
                prefetch(ahead + i);
                const Vec<T> d = v - about;
                to.first = to.first + d;
                to.second = fma(d, d, to.second);
            },
            Row<T>{x.at(k, c) + piece.start, about});
    }
    const Sums moments = moments_about(pivot, about_pivot.first(), about_pivot.second(), n);
    return out_of_range(pivot, moments.second, n) ? careful_moments(x, piece, c) : moments;
}

// Calls f(first row, rows) for the rows of a piece four at a time, then one at a time.
template <class F>
inline void by_quads(const Piece& piece, F f) {
    int64_t k = piece.k0;
    for (; k + 4 <= piece.k1; k += 4) f(k, std::integral_constant<int, 4>());
    for (; k < piece.k1; ++k) f(k, std::integral_constant<int, 1>());
}

// Columns form: two sums down each column of a strip.
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
            [](int64_t, auto& to, Vec<T> a, Vec<T> b) {
                to.first = to.first + a;
                to.second = to.second + b;
            },
            Row<T>{first + j, zero}, Row<T>{second + j, zero});
        return {total.first(), total.second()};
    }
};

// A pivot for every channel, written out per column: the mean of its values in the first rows. From
// r of R rows, it costs at most a factor 1 + R / r of the rounding error, and that only if those
// rows are outliers.
template <class T>
void find_pivots(const View<T>& x, const Piece& piece, int64_t c0, int64_t c1, T* pivot) {
    const int64_t rows = std::min<int64_t>(piece.k1 - piece.k0, 4), run = piece.length;
    const Vec<T> zero = Vec<T>::all(0);
    if (run == 1) {
        const Vec<T> share = Vec<T>::all((T)1 / (T)rows);
        by_vectors<T>(c1 - c0, [&](int64_t i, auto load) {
            Vec<T> mean = zero;
            for (int64_t k = piece.k0; k < piece.k0 + rows; ++k)
                mean = fma(load(x.at(k, c0), zero), share, mean);
            mean.store(pivot + i);
        });
        return;
    }
    for (int64_t c = c0; c < c1; ++c) {
        Accumulators<T> total;
        for (int64_t k = piece.k0; k < piece.k0 + rows; ++k)
            fold_row(
                total, run, [](int64_t, auto& to, Vec<T> v) { to.first = to.first + v; },
                Row<T>{x.at(k, c), zero});
        std::fill_n(pivot + (c - c0) * run, run, (T)(total.first() / (double)(rows * run)));
    }
}

template <class T>
void column_moments(const View<T>& x, const Piece& piece, int64_t c0, int64_t c1, Sums* out) {
    const int64_t run = piece.length, width = (c1 - c0) * run;
    alignas(64) T pivot[kColumns + Vec<T>::lanes];
    find_pivots(x, piece, c0, c1, pivot);

    ColumnSums<T> sums;
    by_quads(piece, [&](int64_t k, auto quad) {
        constexpr int R = decltype(quad)::value;
        const T* row[R];
        for (int r = 0; r < R; ++r) row[r] = x.at(k + r, c0);
        by_vectors<T>(width, [&](int64_t i, auto load) {
            const Vec<T> about = Vec<T>::load(pivot + i);
            Vec<T> sum = Vec<T>::all(0), squares = sum;
            for (int r = 0; r < R; ++r) {
                const Vec<T> d = load(row[r], about) - about;
                sum = sum + d;
                squares = fma(d, d, squares);
            }
            sums.add(i, sum, squares);
        });
    });
    const double n = piece.count();
    for (int64_t c = 0; c < c1 - c0; ++c) {
        const Sums about_pivot = sums.of(c * run, run);
        out[c] = moments_about(pivot[c * run], about_pivot.first, about_pivot.second, n);
    }
    for (int64_t c = 0; c < c1 - c0; ++c)
        if (out_of_range(pivot[c * run], out[c].second, n))
            out[c] = careful_moments(x, piece, c0 + c);
}

// The parameter gradients of a piece in double, where their sums are beyond float32 (or where there
// is a NaN or Inf).
template <class T>
Sums careful_gradients(const Job<T>& job, const Piece& piece, int64_t c) {
    const double mean = job.channels.mean[c], invstd = job.channels.invstd[c];
    Sums total{0, 0};
    for (int64_t row = piece.k0; row < piece.k1; ++row) {
        const T* dy = job.dy.at(row, c) + piece.start;
        const T* x = job.x.at(row, c) + piece.start;
        for (int64_t i = 0; i < piece.length; ++i) {
            total.first += dy[i];
            total.second += dy[i] * ((x[i] - mean) * invstd);
        }
    }
    return total;
}

template <class T>
inline bool finite(Sums sums) {
    return sizeof(T) == 8 || (std::isfinite(sums.first) && std::isfinite(sums.second));
}

// Rows form of the parameter gradients: sum dy, sum dy * xhat.
template <class T>
Sums row_gradients(const Job<T>& job, const Piece& piece, int64_t c,
                   const ChannelCoefficients<T>& k) {
    Accumulators<T> total;
    for (int64_t row = piece.k0; row < piece.k1; ++row)
        fold_row(
            total, piece.length,
            [&k](int64_t i, auto& to, Vec<T> dy, Vec<T> x) {
                to.first = to.first + dy;
                to.second = fma(dy, Xhat::value(k, i, x), to.second);
            },
            Row<T>{job.dy.at(row, c) + piece.start, Vec<T>::all(0)},
            Row<T>{job.x.at(row, c) + piece.start, k.at(kMean, 0)});
    const Sums sums = {total.first(), total.second()};
    return finite<T>(sums) ? sums : careful_gradients(job, piece, c);
}

template <class T>
void column_gradients(const Job<T>& job, const Piece& piece, int64_t c0, int64_t c1,
                      const ColumnCoefficients<T>& k, Sums* out) {
    const int64_t run = piece.length;
    const Vec<T> zero = Vec<T>::all(0);
    ColumnSums<T> sums;
    by_quads(piece, [&](int64_t first, auto quad) {
        constexpr int R = decltype(quad)::value;
        const T *x[R], *dy[R];
        for (int r = 0; r < R; ++r) {
            x[r] = job.x.at(first + r, c0);
            dy[r] = job.dy.at(first + r, c0);
        }
        by_vectors<T>((c1 - c0) * run, [&](int64_t i, auto load) {
            Vec<T> sum = zero, products = zero;
            for (int r = 0; r < R; ++r) {
                const Vec<T> g = load(dy[r], zero);
                sum = sum + g;
                products = fma(g, Xhat::value(k, i, load(x[r], zero)), products);
            }
            sums.add(i, sum, products);
        });
    });
    for (int64_t c = 0; c < c1 - c0; ++c) {
        out[c] = sums.of(c * run, run);
        if (!finite<T>(out[c])) out[c] = careful_gradients(job, piece, c0 + c);
    }
}

// out = f(dy, x), f(dy) or f(x), row by row.
template <class Operation, class T, class Coefficients>
void apply_rows(const Job<T>& job, const Piece& piece, int64_t c, int64_t width,
                const Coefficients& k) {
    // The next tile, which this thread will sum next, comes into L2 while this one leaves.
    const int64_t next = job.plan.prefetch_next ? job.plan.tile_channels : 0;
    for (int64_t row = piece.k0; row < piece.k1; ++row) {
        T* out = job.out.at(row, c) + piece.start;
        const T* x = job.x.at(row, c) + piece.start;
        const T* dy = job.dy.data ? job.dy.at(row, c) + piece.start : nullptr;
        const T* next_x = x + next * job.x.channel;
        const T* next_dy = dy + next * job.dy.channel;
        if constexpr (std::is_same_v<Operation, Normalise>) {
            const auto value = [&k](int64_t i, Vec<T> v) { return Operation::value(k, i, v); };
            const auto ahead = [&](int64_t i, Vec<T> v) {
                prefetch_l2(next_x + i);
                return value(i, v);
            };
            if (next)
                map_row(job.plan.stream, out, width, ahead, x);
            else
                map_row(job.plan.stream, out, width, value, x);
        } else if constexpr (std::is_same_v<Operation, Gradient>) {
            const auto value = [&k](int64_t i, Vec<T> g, Vec<T> v) {
                return Operation::value(k, i, g, v);
            };
            const auto ahead = [&](int64_t i, Vec<T> g, Vec<T> v) {
                prefetch_l2(next_x + i);
                prefetch_l2(next_dy + i);
                return value(i, g, v);
            };
            if (next)
                map_row(job.plan.stream, out, width, ahead, dy, x);
            else
                map_row(job.plan.stream, out, width, value, dy, x);
        } else {
            map_row(
                job.plan.stream, out, width,
                [&k](int64_t i, Vec<T> g) { return Operation::value(k, i, g); }, dy);
        }
    }
}

}  // namespace
}  // namespace bncpu
