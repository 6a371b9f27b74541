// What is done to an item: its sums, its results, or its sums beside the results of the tile
// before. The only layer that knows both how a problem is cut (tiling.hpp) and what is done to a
// piece (moments.hpp, gradients.hpp, results.hpp).
#pragma once

#include "gradients.hpp"
#include "moments.hpp"
#include "results.hpp"

namespace bncpu {
namespace {

template <class S>
int64_t items_in(const Job<S>& job, int64_t c0, int64_t c1) {
    return job.grid.parts * ceil_div(c1 - c0, job.plan.unit_channels);
}

// The targets of a row of results, by form: what map_piece and MapBeside are told to fill.
template <bool with_residual, bool with_mask>
struct Forward {
    static constexpr unsigned fields = Normalise::fields;
    template <class S, class Coefficients>
    using Target = ForwardRow<with_residual, with_mask, S, Coefficients>;
};
template <bool fixed, Gate gate>
struct Backward {
    static constexpr unsigned fields =
        (fixed ? FixedGradient::fields : Gradient::fields) | gate_fields(gate);
    template <class S, class Coefficients>
    using Target = BackwardRow<fixed, gate, S, Coefficients>;
};

// Columns form: sums an item's pieces in order. of_piece(p, sums) fills the sums of its channels,
// merge(count, sums, more, sums) joins those of the next one.
template <class S, class OfPiece, class Merge>
void sum_pieces(const Job<S>& job, const Item& item, Sums* total, OfPiece of_piece, Merge merge) {
    Sums sums[kColumns];
    double count = 0;
    for (int64_t p = item.begin; p < item.end; ++p) {
        const double more = Piece(job.grid, p).count();
        of_piece(p, sums);
        for (int64_t c = 0; c < item.c1 - item.c0; ++c)
            total[c] = count == 0 ? sums[c] : merge(count, total[c], more, sums[c]);
        count += more;
    }
}

inline Sums add(double, Sums a, double, Sums b) { return a + b; }

// An item's coefficients, in one form or the other.
template <bool columns, class T>
struct CoefficientsOf {
    using type = ChannelCoefficients<T>;
    static type make(const Channels& channels, const Item& item, const Grid&, unsigned fields) {
        return {channels, item.c0, fields};
    }
};
template <class T>
struct CoefficientsOf<true, T> {
    using type = ColumnCoefficients<T>;
    static type make(const Channels& channels, const Item& item, const Grid& grid,
                     unsigned fields) {
        return {channels, item.c0, item.c1, grid.shape.run, fields};
    }
};

// The moments of an item; what is beside them comes from beside(piece).
template <bool columns, class S, class Beside>
void moments_item(const Job<S>& job, const Item& item, Sums* table, Beside beside) {
    Sums* total = table + item.slot;
    if constexpr (columns)
        sum_pieces(
            job, item, total,
            [&](int64_t p, Sums* sums) {
                column_moments(job, p, item.c0, item.c1, sums, beside(Piece(job.grid, p)));
            },
            merge_moments);
    else
        *total = row_moments(job, item, beside);
}

template <bool columns, Gate gate, class S, class Beside>
void gradients_item(const Job<S>& job, const Item& item, Sums* table, Beside beside) {
    Sums* total = table + item.slot;
    const auto k = CoefficientsOf<columns, Arithmetic<S>>::make(job.channels, item, job.grid,
                                                                Xhat::fields | gate_fields(gate));
    if constexpr (columns)
        sum_pieces(
            job, item, total,
            [&](int64_t p, Sums* sums) {
                const Piece piece(job.grid, p);
                column_gradients<gate>(job, piece, item.c0, item.c1, k, sums, beside(piece));
            },
            add);
    else
        *total = row_gradients<gate>(job, item, k, beside);
}

// Fills an item's results.
template <bool columns, class Form, class S>
void map_item(const Job<S>& job, const Item& item) {
    using Of = CoefficientsOf<columns, Arithmetic<S>>;
    const auto k = Of::make(job.channels, item, job.grid, Form::fields);
    const int64_t width = (item.c1 - item.c0) * job.grid.shape.run;
    for (int64_t p = item.begin; p < item.end; ++p) {
        const Piece piece(job.grid, p);
        map_piece<typename Form::template Target<S, typename Of::type>>(
            job, piece, item.c0, columns ? width : piece.length, k);
    }
    if (job.plan.stream) store_fence();
}

// Sums an item by sum(beside) while the results of the same item of the tile before are filled.
template <bool columns, class Form, class S, class Sum>
void map_and_sum_item(const Job<S>& job, const Item& item, Sum sum) {
    using Of = CoefficientsOf<columns, Arithmetic<S>>;
    using Target = typename Form::template Target<S, typename Of::type>;
    const Item before = item.in_tile_before(job.plan);
    const auto k = Of::make(job.channels, before, job.grid, Form::fields);
    const int64_t width = (item.c1 - item.c0) * job.grid.shape.run;
    sum([&](const Piece& piece) {
        const int64_t n = columns ? width : piece.length;
        const auto make = [&job, &before, &k, piece, n](int64_t row) {
            return Target(job, piece, row, before.c0, n, k);
        };
        return MapBeside<S, decltype(make)>{make, n};
    });
    store_fence();
}

// What can be done to a tile, item by item: its sums, its results, or its sums and the results of
// the tile before. The last one keeps memory busy in both directions all the time.
enum Step { kSum, kMap, kMapAndSum };

template <bool columns, class Form, class S, class Sum>
void run_step(Step step, const Job<S>& job, const Item& item, Sum sum) {
    if (step == kSum)
        sum([](const Piece&) { return NothingBeside{}; });
    else if (step == kMap)
        map_item<columns, Form>(job, item);
    else
        map_and_sum_item<columns, Form>(job, item, sum);
}

template <bool columns, bool with_residual, bool with_mask, class S>
void run_forward(Step step, const Job<S>& job, const Item& item, Sums* table) {
    run_step<columns, Forward<with_residual, with_mask>>(
        step, job, item, [&](auto beside) { moments_item<columns>(job, item, table, beside); });
}

template <bool columns, Gate gate, class S>
void run_backward(Step step, const Job<S>& job, const Item& item, Sums* table) {
    const auto sum = [&](auto beside) { gradients_item<columns, gate>(job, item, table, beside); };
    if (job.fixed)
        run_step<columns, Backward<true, gate>>(step, job, item, sum);
    else
        run_step<columns, Backward<false, gate>>(step, job, item, sum);
}

template <bool columns, class S>
void run_item_of(Step step, const Job<S>& job, const Item& item, Sums* table) {
    const bool residual = job.residual.data != nullptr, mask = job.mask != nullptr;
    if (job.dy.data == nullptr) {
        if (residual && mask) return run_forward<columns, true, true>(step, job, item, table);
        if (residual) return run_forward<columns, true, false>(step, job, item, table);
        if (mask) return run_forward<columns, false, true>(step, job, item, table);
        return run_forward<columns, false, false>(step, job, item, table);
    }
    if (!job.relu) return run_backward<columns, kOpen>(step, job, item, table);
    if (!mask) return run_backward<columns, kSign>(step, job, item, table);
    return run_backward<columns, kBits>(step, job, item, table);
}

template <class S>
void run_item(Step step, const Job<S>& job, int64_t c0, int64_t c1, int64_t index, Sums* table) {
    const Item item(job.grid, job.plan, c0, c1, index);
    if (job.grid.shape.columns)
        run_item_of<true>(step, job, item, table);
    else
        run_item_of<false>(step, job, item, table);
}

// The parts of channel c (its place in the tile's table) as one.
inline Sums merged_moments(const Grid& grid, const Plan& plan, const Sums* table, int64_t c) {
    Sums total = table[c];
    double count = part_count(grid, 0);
    for (int64_t part = 1; part < grid.parts; ++part) {
        const double more = part_count(grid, part);
        total = merge_moments(count, total, more, table[part * plan.tile_channels + c]);
        count += more;
    }
    return total;
}

inline Sums merged_gradients(const Grid& grid, const Plan& plan, const Sums* table, int64_t c) {
    Sums total{0, 0};
    for (int64_t part = 0; part < grid.parts; ++part) {
        total.first += table[part * plan.tile_channels + c].first;
        total.second += table[part * plan.tile_channels + c].second;
    }
    return total;
}

}  // namespace
}  // namespace bncpu
