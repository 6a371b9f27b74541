// The columns form's working memory: what the loops need of every column of an item's rows, and two
// sums down each of them.
#pragma once

#include "pieces.hpp"

namespace bncpu {
namespace {

// The memory of one thread. A plane is one value per column.
template <class T>
class Scratch {
   public:
    Scratch(void* memory, const Shape& shape, const Plan& plan)
        : width(width_of(shape, plan)),
          totals((double*)(((uintptr_t)memory + kLineBytes - 1) / kLineBytes * kLineBytes)),
          values((T*)(totals + 2 * width)) {}

    static int64_t bytes(const Shape& shape, const Plan& plan) {
        if (!shape.columns) return 0;
        return kLineBytes +
               width_of(shape, plan) * (int64_t)(2 * sizeof(double) + kPlanes * sizeof(T));
    }

    // Two sums down each column, of some rows and of all before them.
    T* first() const { return values; }
    T* second() const { return values + width; }
    double* first_total() const { return totals; }
    double* second_total() const { return totals + width; }

    T* pivot() const { return values + 2 * width; }
    // A plane for each field of the sums and of the results.
    ColumnCoefficients<T> for_sums() const { return {values + 3 * width, width}; }
    ColumnCoefficients<T> for_results() const { return {values + (3 + kFields) * width, width}; }

   private:
    static constexpr int kPlanes = 3 + 2 * kFields;
    int64_t width;
    double* totals;
    T* values;

    // Whole cache lines, and the vector that the last column's may reach into.
    static int64_t width_of(const Shape& shape, const Plan& plan) {
        const int64_t channels =
            shape.fold > 1 ? shape.fold * shape.channels : ceil_div(plan.tile_channels, plan.units);
        return (channels * shape.run / 16 + 2) * 16;
    }
};

template <class T>
BNCPU_HOT void clear_sums(const Scratch<T>& scratch, int64_t columns) {
    std::fill_n(scratch.first(), columns, (T)0);
    std::fill_n(scratch.second(), columns, (T)0);
    std::fill_n(scratch.first_total(), columns, 0.0);
    std::fill_n(scratch.second_total(), columns, 0.0);
}

// Adds the sums to the totals, and begins anew.
template <class T>
BNCPU_HOT void flush_sums(const Scratch<T>& scratch, int64_t columns) {
    const auto flush = [columns](T* __restrict sums, double* __restrict totals) {
        for (int64_t i = 0; i < columns; ++i) {
            totals[i] += (double)sums[i];
            sums[i] = 0;
        }
    };
    flush(scratch.first(), scratch.first_total());
    flush(scratch.second(), scratch.second_total());
}

// The two totals of one channel: of its runs, which begin at column j and every row of all
// channels.
template <class T>
BNCPU_HOT Sums total_of(const Scratch<T>& scratch, const Shape& shape, int64_t j) {
    const Vec<double> zero = Vec<double>::all(0);
    const int64_t step = shape.channels * shape.run;
    Sums total{0, 0};
    for (int64_t r = 0; r < shape.fold; ++r, j += step) {
        const double *first = scratch.first_total() + j, *second = scratch.second_total() + j;
        if (shape.run == 1) {
            total = total + Sums{*first, *second};
            continue;
        }
        Accumulators<double> sums;
        fold_row(
            sums, shape.run,
            [](int64_t, int, auto& to, Vec<double> a, Vec<double> b) {
                to.first = to.first + a;
                to.second = to.second + b;
            },
            Row<double>{first, zero}, Row<double>{second, zero});
        total = total + Sums{sums.first().sum(), sums.second().sum()};
    }
    return total;
}

// n values, one at least. Short runs are many: whole vectors, the last one over the one before it.
template <class T>
BNCPU_INLINE void fill(T* p, int64_t n, T value) {
    constexpr int L = Vec<T>::lanes;
    const Vec<T> all = Vec<T>::all(value);
    if (n < L) return all.store(p, n);
    for (int64_t i = 0; i + L < n; i += L) all.store(p + i);
    all.store(p + n - L);
}

// The same value in every column of a channel.
template <class T>
void spread(T* plane, const Shape& shape, int64_t channel, T value) {
    for (int64_t r = 0; r < shape.fold; ++r)
        fill(plane + (r * shape.channels + channel) * shape.run, shape.run, value);
}

// The fields of an item's channels in their columns. Where a channel is one column, that is how the
// table has them.
template <unsigned fields, class T>
ColumnCoefficients<T> spread_out(ColumnCoefficients<T> k, const ChannelTable<T>& table,
                                 const Item& item, const Shape& shape) {
    const int64_t channels = item.c1 - item.c0;
    if (shape.run == 1 && shape.fold == 1)
        return {table.field((Field)0) + item.c0, table.field((Field)1) - table.field((Field)0)};
    k.template each<fields>([&](Field f) {
        T* plane = k.plane(f);
        const T* value = table.field(f) + item.c0;
        if (shape.run == 1)
            std::copy_n(value, channels, plane);
        else
            for (int64_t c = 0; c < channels; ++c) fill(plane + c * shape.run, shape.run, value[c]);
        const int64_t columns = channels * shape.run;
        for (int64_t r = 1; r < shape.fold; ++r) std::copy_n(plane, columns, plane + r * columns);
    });
    return k;
}

template <class T>
BNCPU_INLINE void add_to(T* plane, Vec<T> v) {
    (Vec<T>::load(plane) + v).store(plane);
}

}  // namespace
}  // namespace bncpu
