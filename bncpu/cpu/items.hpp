// What is done to an item: its sums, its results, or its sums beside the results of the tile
// before. The only layer that knows both how a problem is cut (tiling.hpp) and what is done to a
// part of it (moments.hpp, gradients.hpp, results.hpp).
#pragma once

#include "gradients.hpp"
#include "moments.hpp"
#include "results.hpp"

namespace bncpu {
namespace {

// Where the sums of a tile go, and the thread's own memory.
template <class S>
struct Memory {
    Sums* table;
    Scratch<Arithmetic<S>> scratch;
};

// What a row of results is, by form.
template <bool with_residual, bool with_mask>
struct Forward {
    static constexpr unsigned fields = Normalise::fields;
    template <class S, class K>
    using Row = ForwardRow<with_residual, with_mask, S, K>;
};
template <bool fixed, Gate gate>
struct Backward {
    static constexpr unsigned fields =
        (fixed ? FixedGradient::fields : Gradient::fields) | gate_fields(gate);
    template <class S, class K>
    using Row = BackwardRow<fixed, gate, S, K>;
};

// The moments of an item's channels, with what is beside them.
template <bool columns, class S, class Beside>
void moments_item(const Job<S>& job, const Item& item, const Memory<S>& memory,
                  const Beside& beside) {
    if constexpr (columns)
        column_moments(job, item, memory.scratch, memory.table + item.slot, beside);
    else
        row_moments(job, item, memory.table + item.slot, beside);
}

template <bool columns, Gate gate, class S, class Beside>
void gradients_item(const Job<S>& job, const Item& item, const Memory<S>& memory,
                    const Beside& beside) {
    if constexpr (columns)
        column_gradients<gate>(job, item, memory.scratch, memory.table + item.slot, beside);
    else
        row_gradients<gate>(job, item, memory.table + item.slot, beside);
}

// Calls f(results) with an item's results as rows of Form.
template <bool columns, class Form, class S, class F>
void with_results(const Job<S>& job, const Item& item, const Memory<S>& memory, F f) {
    using T = Arithmetic<S>;
    const ItemRows rows(job.grid, item);
    const Shape& shape = job.grid.shape;
    if constexpr (columns) {
        using K = ColumnsOf<T, Form::fields>;
        const auto all =
            spread_out<Form::fields>(memory.scratch.for_results(), job.table, item, shape);
        const auto k = [all](int64_t column) { return K{all, column}; };
        f(Results<typename Form::template Row<S, K>, S, decltype(k)>{job, item, rows, k});
    } else {
        using K = StripCoefficients<T, Form::fields>;
        const auto k = [&](int64_t) { return K(job.table, item.c0, item.c1, shape.run); };
        f(Results<typename Form::template Row<S, K>, S, decltype(k)>{job, item, rows, k});
    }
}

// Fills an item's results.
template <bool columns, class Form, class S>
void map_item(const Job<S>& job, const Item& item, const Memory<S>& memory) {
    with_results<columns, Form>(job, item, memory, [&](const auto& results) {
        if (columns && rows_alike(job))
            map_item_rows<columns>(results);
        else
            map_item_rows<false>(results);
    });
    if (job.plan.stream) store_fence();
}

// Sums by sum(beside) while the results of the item of another tile are filled.
template <bool columns, class Form, class S, class Sum>
void map_and_sum_item(const Job<S>& job, const Item& before, const Memory<S>& memory, Sum sum) {
    if (before.c0 == before.c1) return sum(NothingBeside{});
    with_results<columns, Form>(job, before, memory, [&](const auto& results) {
        sum(MapBeside<S, std::decay_t<decltype(results)>>{results});
    });
    store_fence();
}

// What can be done to a tile, item by item: its sums, its results, or its sums and the results of
// the tile before (their items have the same rows). The last one keeps memory busy in both
// directions all the time.
enum Step { kSum, kMap, kMapAndSum };

template <bool columns, class Form, class S, class Sum>
void run_step(Step step, const Job<S>& job, const Item& item, const Item& before,
              const Memory<S>& memory, Sum sum) {
    if (step == kSum)
        sum(NothingBeside{});
    else if (step == kMap)
        map_item<columns, Form>(job, item, memory);
    else
        map_and_sum_item<columns, Form>(job, before, memory, sum);
}

template <bool columns, bool with_residual, bool with_mask, class S>
void run_forward(Step step, const Job<S>& job, const Item& item, const Item& before,
                 const Memory<S>& memory) {
    run_step<columns, Forward<with_residual, with_mask>>(
        step, job, item, before, memory,
        [&](const auto& beside) { moments_item<columns>(job, item, memory, beside); });
}

template <bool columns, Gate gate, class S>
void run_backward(Step step, const Job<S>& job, const Item& item, const Item& before,
                  const Memory<S>& memory) {
    const auto sum = [&](const auto& beside) {
        gradients_item<columns, gate>(job, item, memory, beside);
    };
    if (job.fixed)
        run_step<columns, Backward<true, gate>>(step, job, item, before, memory, sum);
    else
        run_step<columns, Backward<false, gate>>(step, job, item, before, memory, sum);
}

template <bool columns, class S>
void run_item_of(Step step, const Job<S>& job, const Item& item, const Item& before,
                 const Memory<S>& memory) {
    const bool residual = job.residual.data != nullptr, mask = job.mask != nullptr;
    if (job.dy.data == nullptr) {
        if (residual && mask)
            return run_forward<columns, true, true>(step, job, item, before, memory);
        if (residual) return run_forward<columns, true, false>(step, job, item, before, memory);
        if (mask) return run_forward<columns, false, true>(step, job, item, before, memory);
        return run_forward<columns, false, false>(step, job, item, before, memory);
    }
    if (!job.relu) return run_backward<columns, kOpen>(step, job, item, before, memory);
    if (!mask) return run_backward<columns, kSign>(step, job, item, before, memory);
    return run_backward<columns, kBits>(step, job, item, before, memory);
}

template <class S>
void run_item(Step step, const Job<S>& job, int64_t tile, int64_t index, Sums* table,
              void* scratch) {
    const Memory<S> memory{table, {scratch, job.grid.shape, job.plan}};
    const Item item(job.grid, job.plan, tile, index);
    const Item before(job.grid, job.plan, tile > 0 ? tile - 1 : tile, index);
    if (item.c0 == item.c1 && (step != kMapAndSum || before.c0 == before.c1)) return;
    if (job.grid.shape.columns)
        run_item_of<true>(step, job, item, before, memory);
    else
        run_item_of<false>(step, job, item, before, memory);
}

// Bytes of a thread's own memory.
template <class S>
int64_t bytes_of_scratch(const Job<S>& job) {
    return Scratch<Arithmetic<S>>::bytes(job.grid.shape, job.plan);
}

// The parts of a tile's channels as one, in the place of the first part. (A slot that is no
// channel's, in a tile narrower than the widest, holds anything.)
inline void merge_moments_of_parts(const Grid& grid, const Plan& plan, Sums* table) {
    double count = part_count(grid, 0);
    for (int64_t part = 1; part < grid.parts; ++part) {
        const Weights weights(count, part_count(grid, part));
        const Sums* more = table + part * plan.tile_channels;
        for (int64_t c = 0; c < plan.tile_channels; ++c)
            table[c] = merge_moments(weights, table[c], more[c]);
        count += part_count(grid, part);
    }
}

inline void add_gradients_of_parts(const Grid& grid, const Plan& plan, Sums* table) {
    for (int64_t part = 1; part < grid.parts; ++part)
        for (int64_t c = 0; c < plan.tile_channels; ++c)
            table[c] = table[c] + table[part * plan.tile_channels + c];
}

}  // namespace
}  // namespace bncpu
