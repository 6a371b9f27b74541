// The moments of an item. Sums are formed in the precision of the arithmetic about a pivot and
// leave as double; parts of a channel are merged by Chan, Golub & LeVeque 1983. No threads here, no
// memory is allocated.
#pragma once

#include "columns.hpp"

namespace bncpu {
namespace {

// How much two parts of so many values count.
struct Weights {
    double a, b;     // their shares of all values
    double product;  // a * b / (a + b) of the counts

    Weights(double count_a, double count_b)
        : a(count_a / (count_a + count_b)),
          b(count_b / (count_a + count_b)),
          product(count_a * b) {}
};

// Mean and m2 of parts a and b together. The weighted mean is the way out for infinite means,
// which IEEE arithmetic keeps infinite and the update formula would turn into NaN.
inline Sums merge_moments(Weights weights, Sums a, Sums b) {
    const double delta = b.first - a.first;
    if (!std::isfinite(delta)) return {a.first * weights.a + b.first * weights.b, delta * delta};
    return {a.first + delta * weights.b, a.second + b.second + delta * delta * weights.product};
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

// Two long sums in double, of values and of their squares: block by block, each in lanes, so that
// no chain of additions is long.
class LongSums {
   public:
    void add(double d) {
        block[count] = d;
        if (++count == kLanes * kChain) flush();
    }
    Sums sum() {
        flush();
        return total;
    }

   private:
    static constexpr int kLanes = 8, kChain = 128;
    double block[kLanes * kChain];
    int count = 0;
    Sums total{0, 0};

    void flush() {
        std::fill(block + count, block + ceil_div(count, kLanes) * kLanes, 0.0);
        double first[kLanes] = {}, second[kLanes] = {};
        for (int i = 0; i < count; i += kLanes)
            for (int j = 0; j < kLanes; ++j) {
                first[j] += block[i + j];
                second[j] += block[i + j] * block[i + j];
            }
        Sums lanes{0, 0};
        for (int j = 0; j < kLanes; ++j) lanes = lanes + Sums{first[j], second[j]};
        total = total + lanes;
        count = 0;
    }
};

// Two passes in double over pieces [begin, end) whose squares float32 cannot hold. What the second
// one finds of the first mean's rounding errors, which grow with |mean|, corrects both moments
// (Chan, Golub & LeVeque 1983). Also the way of NaN and Inf.
template <class S>
BNCPU_HOT Sums careful_moments(const Job<S>& job, int64_t begin, int64_t end, int64_t c) {
    const double n = values_between(job.grid, begin, end);
    const auto about = [&](double mean) {
        LongSums sums;
        for (int64_t p = begin; p < end; ++p) {
            const Piece piece(job.grid, p);
            by_rows(job.grid.shape, piece, [&](int64_t k) {
                const S* run = job.x.at(k, c) + piece.start;
                for (int64_t i = 0; i < piece.length; ++i) sums.add(value_of(run[i]) - mean);
            });
        }
        return sums.sum();
    };
    const double mean = about(0).first / n;
    const Sums sums = about(mean);
    const double off = sums.first / n;
    if (!std::isfinite(off)) return {mean, sums.second};
    return {mean + off, std::max(sums.second - sums.first * off, 0.0)};
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

// A pivot for every channel of an item, from its first row.
template <class S>
BNCPU_HOT void find_pivots(const Job<S>& job, const Item& item, Arithmetic<S>* pivot) {
    const ItemRows rows(job.grid, item);
    const int64_t begin = rows.begin(rows.k0), length = rows.end(rows.k0) - begin;
    for (int64_t c = item.c0; c < item.c1; ++c)
        pivot[c - item.c0] = pivot_of(job.x.at(rows.k0, c) + begin, length);
}

// Rows form: sums about a pivot for each of the channels [c0, c1) of an item, row after row, as
// memory has them. What comes next is asked for meanwhile.
template <class S, class Beside>
BNCPU_INLINE void sum_rows(const Job<S>& job, const Item& item, const Arithmetic<S>* pivot,
                           Totals* totals, const Beside& beside) {
    using T = Arithmetic<S>;
    const Grid& grid = job.grid;
    const ItemRows rows(grid, item);
    for (int64_t c = 0; c < item.c1 - item.c0; ++c)
        totals[c] = {Vec<double>::all(0), Vec<double>::all(0)};
    for (int64_t k = rows.k0; k < rows.k1; ++k) {
        const int64_t begin = rows.begin(k), end = rows.end(k);
        const S* ahead = at_spot(job.x, spot_after(grid, item, rows, k, 1));
        auto map = beside.template rows<1>(k, 0);
        for (int64_t c = 0; c < item.c1 - item.c0; ++c) {
            const S* run = job.x.at(k, item.c0 + c);
            const Vec<T> about = Vec<T>::all(pivot[c]);
            for (int64_t i = begin; i < end; i += grid.segment) {
                const int64_t length = std::min(grid.segment, end - i);
                Accumulators<T> sums;
                fold_row(
                    map, sums, length,
                    [about, ahead](int64_t j, int, auto& to, Vec<T> v) {
                        prefetch_l2(ahead + j);
                        const Vec<T> d = v - about;
                        to.first = to.first + d;
                        to.second = fma(d, d, to.second);
                    },
                    Row<S>{run + i, about});
                totals[c].add(sums);
                ahead += length;
            }
        }
        beside.rest(map);
    }
}

// The moments of a channel from sums about a pivot, and whether they will do.
template <class T>
inline bool settle(T pivot, Sums about_pivot, double n, Sums& out) {
    out = moments_about(pivot, about_pivot.first, about_pivot.second, n);
    return !out_of_range(pivot, about_pivot.second, out.second, n);
}

// Whether a second pass about a pivot near the mean will do where the first does not: the
// first values of images often are some std off the mean. Farther off they are outliers, which
// leave no digits in float32 for the others.
inline bool worth_another(Sums about_pivot, Sums moments) {
    return about_pivot.second <= 16 * moments.second;
}

// A pivot for the second pass: near the mean, and of so few digits that what integers, as images
// have, differ from it by is exact, and so are its squares. Their roundings would have one sign.
template <class T>
inline T pivot_near_mean(Sums moments, double n) {
    const double std = std::sqrt(moments.second / n);
    if (!(std > 0) || !std::isfinite(std)) return (T)moments.first;
    const double step = std::ldexp(1.0, std::ilogb(std) - 2);
    return (T)(std::nearbyint(moments.first / step) * step);
}

// The moments of one channel of an item of which sums about a pivot are known, but will not do.
template <class S>
BNCPU_HOT Sums moments_again(const Job<S>& job, Item item, int64_t c, Sums about_pivot,
                             Sums moments, double n) {
    using T = Arithmetic<S>;
    if (worth_another(about_pivot, moments)) {
        item.c0 = c;
        item.c1 = c + 1;
        const T pivot = pivot_near_mean<T>(moments, n);
        Totals totals;
        sum_rows(job, item, &pivot, &totals, NothingBeside{});
        if (settle(pivot, totals.sum(), n, moments)) return moments;
    }
    return careful_moments(job, item.begin, item.end, c);
}

// The moments of an item's channels from their totals.
template <class S>
BNCPU_HOT void settle_rows(const Job<S>& job, const Item& item, const Arithmetic<S>* pivot,
                           const Totals* totals, Sums* out) {
    const double n = values_between(job.grid, item.begin, item.end);
    for (int64_t c = 0; c < item.c1 - item.c0; ++c) {
        const Sums sums = totals[c].sum();
        if (!settle(pivot[c], sums, n, out[c]))
            out[c] = moments_again(job, item, item.c0 + c, sums, out[c], n);
    }
}

template <class S, class Beside>
BNCPU_HOT void row_moments(const Job<S>& job, const Item& item, Sums* out, const Beside& beside) {
    Arithmetic<S> pivot[kStripChannels];
    Totals totals[kStripChannels];
    find_pivots(job, item, pivot);
    sum_rows(job, item, pivot, totals, beside);
    settle_rows(job, item, pivot, totals, out);
}

// A pivot for every channel in all its columns; where a channel is one column of a row, the mean of
// its first rows.
template <class S>
BNCPU_HOT void find_column_pivots(const Job<S>& job, const Item& item, const ItemRows& rows,
                                  Arithmetic<S>* pivot) {
    using T = Arithmetic<S>;
    const Shape& shape = job.grid.shape;
    const View<S>& x = job.x;
    if (shape.run > 1) {
        for (int64_t c = item.c0; c < item.c1; ++c)
            spread(pivot, shape, c - item.c0, pivot_of(x.at(rows.k0 * shape.fold, c), shape.run));
        return;
    }
    const int64_t count = exact_count(rows.k1 - rows.k0, 16), channels = item.c1 - item.c0;
    const Vec<T> zero = Vec<T>::all(0), half = Vec<T>::all((T)0.5);
    by_vectors<S>(channels, [&](int64_t i, int n, auto load_at) {
        Vec<T> mean[16] = {};
        for (int64_t r = 0; r < count; ++r)
            mean[r] = load_at(x.at((rows.k0 + r) * shape.fold, item.c0), zero);
        for (int64_t k = count / 2; k > 0; k /= 2)
            for (int64_t r = 0; r < k; ++r) mean[r] = fma(mean[r], half, mean[r + k] * half);
        if (n < Vec<T>::lanes)
            mean[0].store(pivot + i, n);
        else
            mean[0].store(pivot + i);
    });
    for (int64_t r = 1; r < shape.fold; ++r) std::copy_n(pivot, channels, pivot + r * channels);
}

// Sums about the pivots, four rows at a time, piece by piece.
template <class S, class Beside>
BNCPU_INLINE void sum_columns(const Job<S>& job, const Item& item, const ItemRows& rows,
                              const Scratch<Arithmetic<S>>& scratch, const Beside& beside) {
    using T = Arithmetic<S>;
    const Shape& shape = job.grid.shape;
    const T* pivot = scratch.pivot();
    T *first = scratch.first(), *second = scratch.second();
    const int64_t widest = widest_row(shape, item);
    clear_sums(scratch, widest);
    for (int64_t p = item.begin; p < item.end; ++p) {
        const Piece piece(job.grid, p);
        by_quads(shape, piece.k0, piece.k1, [&](int64_t k, auto quad) BNCPU_INLINE_LAMBDA {
            constexpr int R = decltype(quad)::value;
            const Runs runs(job, item, k);
            const S* ahead[R];
            for (int r = 0; r < R; ++r)
                ahead[r] = at_spot(job.x, spot_after(job.grid, item, rows, k + r, R));
            for (int64_t j = 0; j < runs.count; ++j) {
                const int64_t column = j * runs.width;
                const S* row[R];
                for (int r = 0; r < R; ++r) row[r] = job.x.at((k + r) * shape.fold + j, item.c0);
                auto map = beside.template rows<R>(k, j);
                by_vectors<S>(runs.width, [&](int64_t i, int, auto load_at) {
                    map.step();
                    for (int r = 0; r < R; ++r) prefetch_l2(ahead[r] + column + i);
                    const Vec<T> about = Vec<T>::load(pivot + column + i);
                    Vec<T> sum = Vec<T>::all(0), squares = sum;
                    for (int r = 0; r < R; ++r) {
                        const Vec<T> d = load_at(row[r], about) - about;
                        sum = sum + d;
                        squares = fma(d, d, squares);
                    }
                    add_to(first + column + i, sum);
                    add_to(second + column + i, squares);
                });
                beside.rest(map);
            }
        });
        flush_sums(scratch, widest);
    }
}

// The moments of every channel from its totals. Where they will not do, but a second pass might,
// the mean becomes the new pivot; returns whether there is such a channel.
template <class S>
BNCPU_HOT bool settle_columns(const Job<S>& job, const Item& item,
                              const Scratch<Arithmetic<S>>& scratch, Sums* out, bool last) {
    const Shape& shape = job.grid.shape;
    const double n = values_between(job.grid, item.begin, item.end);
    bool again = false;
    for (int64_t c = 0; c < item.c1 - item.c0; ++c) {
        const Arithmetic<S> pivot = scratch.pivot()[c * shape.run];
        const Sums sums = total_of(scratch, shape, c * shape.run);
        if (settle(pivot, sums, n, out[c])) continue;
        if (!last && worth_another(sums, out[c])) {
            again = true;
            spread(scratch.pivot(), shape, c, pivot_near_mean<Arithmetic<S>>(out[c], n));
        } else {
            out[c] = careful_moments(job, item.begin, item.end, item.c0 + c);
        }
    }
    return again;
}

template <class S, class Beside>
BNCPU_HOT void column_moments(const Job<S>& job, const Item& item,
                              const Scratch<Arithmetic<S>>& scratch, Sums* out,
                              const Beside& beside) {
    const ItemRows rows(job.grid, item);
    find_column_pivots(job, item, rows, scratch.pivot());
    sum_columns(job, item, rows, scratch, beside);
    if (!settle_columns(job, item, scratch, out, false)) return;
    sum_columns(job, item, rows, scratch, NothingBeside{});
    settle_columns(job, item, scratch, out, true);
}

}  // namespace
}  // namespace bncpu
