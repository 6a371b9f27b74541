// The parameter gradients of an item: sum dz and sum dz * xhat (Ioffe & Szegedy 2015, below
// Algorithm 1), dz being dy after the gate of the activation.
#pragma once

#include "columns.hpp"

namespace bncpu {
namespace {

// The parameter gradients of a channel in pieces [begin, end) in double, where their sums are
// beyond float32 (or where there is a NaN or Inf). Slow, so one vector at a time through the same
// gate.
template <Gate gate, class S>
BNCPU_HOT Sums careful_gradients(const Job<S>& job, int64_t begin, int64_t end, int64_t c) {
    using T = Arithmetic<S>;
    const auto k = of_channel<gate_fields(gate)>(job.table, c);
    const double mean = job.channels.mean[c], invstd = job.channels.invstd[c];
    const Vec<T> zero = Vec<T>::all(0);
    Sums total{0, 0};
    for (int64_t p = begin; p < end; ++p) {
        const Piece piece(job.grid, p);
        by_rows(job.grid.shape, piece, [&](int64_t row) {
            const S *x = job.x.at(row, c) + piece.start, *dy = job.dy.at(row, c) + piece.start;
            const int64_t bit = job.bit(row, c) + piece.start;
            by_vectors<S>(piece.length, [&](int64_t i, int n, auto load_at) {
                const Vec<T> v = load_at(x, zero);
                auto bits = gate_bits<gate>(job, bit + i, n);
                const Vec<T> dz = gated<gate, S>(bits, n, k, load_at(dy, zero), v);
                for (int j = 0; j < n; ++j) {
                    total.first += dz.v[j];
                    total.second += dz.v[j] * ((v.v[j] - mean) * invstd);
                }
            });
        });
    }
    return total;
}

template <class S>
inline bool finite(Sums sums) {
    return std::is_same_v<S, double> || (std::isfinite(sums.first) && std::isfinite(sums.second));
}

// The gradients of an item's channels from their totals.
template <Gate gate, class S, class TotalOf>
BNCPU_HOT void settle_gradients(const Job<S>& job, const Item& item, Sums* out, TotalOf total_of) {
    for (int64_t c = 0; c < item.c1 - item.c0; ++c) {
        out[c] = total_of(c);
        if (!finite<S>(out[c]))
            out[c] = careful_gradients<gate>(job, item.begin, item.end, item.c0 + c);
    }
}

// Rows form, row after row, as memory has them.
template <Gate gate, class S, class Beside>
BNCPU_HOT void row_gradients(const Job<S>& job, const Item& item, Sums* out, const Beside& beside) {
    using T = Arithmetic<S>;
    const Grid& grid = job.grid;
    const ItemRows rows(grid, item);
    const int64_t channels = item.c1 - item.c0;
    const Vec<T> zero = Vec<T>::all(0);
    Totals totals[kStripChannels];
    for (int64_t c = 0; c < channels; ++c) totals[c] = {Vec<double>::all(0), Vec<double>::all(0)};
    for (int64_t row = rows.k0; row < rows.k1; ++row) {
        const int64_t begin = rows.begin(row), end = rows.end(row);
        const Spot after = spot_after(grid, item, rows, row, 1);
        const S *ahead = at_spot(job.x, after), *ahead_dy = at_spot(job.dy, after);
        if (gate == kBits) prefetch_mask(job, after, channels * grid.shape.run);
        auto map = beside.template rows<1>(row, 0);
        for (int64_t c = 0; c < channels; ++c) {
            const S *x = job.x.at(row, item.c0 + c), *dy = job.dy.at(row, item.c0 + c);
            const auto k = of_channel<Xhat::fields | gate_fields(gate)>(job.table, item.c0 + c);
            for (int64_t i = begin; i < end; i += grid.segment) {
                const int64_t length = std::min(grid.segment, end - i);
                const int64_t bit = job.bit(row, item.c0 + c) + i;
                Accumulators<T> sums;
                fold_row(
                    map, sums, length,
                    [&](int64_t j, int n, auto& to, Vec<T> g, Vec<T> v) {
                        prefetch_l2(ahead + j);
                        prefetch_l2(ahead_dy + j);
                        auto bits = gate_bits<gate>(job, bit + j, n);
                        const Vec<T> dz = gated<gate, S>(bits, n, k, g, v);
                        to.first = to.first + dz;
                        to.second = fma(dz, Xhat::value(k, v), to.second);
                    },
                    Row<S>{dy + i, zero}, Row<S>{x + i, k.at(kMean)});
                totals[c].add(sums);
                ahead += length;
                ahead_dy += length;
            }
        }
        beside.rest(map);
    }
    settle_gradients<gate>(job, item, out, [&](int64_t c) { return totals[c].sum(); });
}

// Columns form, four rows at a time.
template <Gate gate, class S, class Beside>
BNCPU_HOT void column_gradients(const Job<S>& job, const Item& item,
                                const Scratch<Arithmetic<S>>& scratch, Sums* out,
                                const Beside& beside) {
    using T = Arithmetic<S>;
    constexpr unsigned fields = Xhat::fields | gate_fields(gate);
    const Shape& shape = job.grid.shape;
    const ItemRows rows(job.grid, item);
    const auto all = spread_out<fields>(scratch.for_sums(), job.table, item, shape);
    T *first = scratch.first(), *second = scratch.second();
    const int64_t widest = widest_row(shape, item);
    clear_sums(scratch, widest);
    for (int64_t p = item.begin; p < item.end; ++p) {
        const Piece piece(job.grid, p);
        by_quads(shape, piece.k0, piece.k1, [&](int64_t k, auto quad) BNCPU_INLINE_LAMBDA {
            constexpr int R = decltype(quad)::value;
            const Runs runs(job, item, k);
            const S *ahead[R], *ahead_dy[R];
            for (int r = 0; r < R; ++r) {
                const Spot after = spot_after(job.grid, item, rows, k + r, R);
                ahead[r] = at_spot(job.x, after);
                ahead_dy[r] = at_spot(job.dy, after);
                if (gate == kBits) prefetch_mask(job, after, runs.count * runs.width);
            }
            for (int64_t j = 0; j < runs.count; ++j) {
                const int64_t column = j * runs.width;
                const S *x[R], *dy[R];
                int64_t bit[R];
                for (int r = 0; r < R; ++r) {
                    const int64_t row = (k + r) * shape.fold + j;
                    x[r] = job.x.at(row, item.c0);
                    dy[r] = job.dy.at(row, item.c0);
                    bit[r] = job.bit(row, item.c0);
                }
                auto map = beside.template rows<R>(k, j);
                by_vectors<S>(runs.width, [&](int64_t i, int n, auto load_at) {
                    map.step();
                    const auto here = all.template here<fields>(column + i);
                    const Vec<T> zero = Vec<T>::all(0);
                    Vec<T> sum = zero, products = zero;
                    for (int r = 0; r < R; ++r) {
                        prefetch_l2(ahead[r] + column + i);
                        prefetch_l2(ahead_dy[r] + column + i);
                        const Vec<T> v = load_at(x[r], zero);
                        auto bits = gate_bits<gate>(job, bit[r] + i, n);
                        const Vec<T> dz = gated<gate, S>(bits, n, here, load_at(dy[r], zero), v);
                        sum = sum + dz;
                        products = fma(dz, Xhat::value(here, v), products);
                    }
                    add_to(first + column + i, sum);
                    add_to(second + column + i, products);
                });
                beside.rest(map);
            }
        });
        flush_sums(scratch, widest);
    }
    settle_gradients<gate>(job, item, out,
                           [&](int64_t c) { return total_of(scratch, shape, c * shape.run); });
}

}  // namespace
}  // namespace bncpu
