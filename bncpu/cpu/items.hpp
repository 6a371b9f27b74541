// Work items: one part of one unit of channels of a tile. What a thread is given at a time; the
// only layer that knows both how a problem is cut (tiling.hpp) and what is done to a piece
// (pieces.hpp).
#pragma once

#include "pieces.hpp"

namespace bncpu {
namespace {

struct Item {
    int64_t part, c0, c1, slot;  // slot: where its sums stand in the tile's table

    Item(const Grid& grid, const Plan& plan, int64_t tile_c0, int64_t tile_c1, int64_t index) {
        const int64_t units = ceil_div(tile_c1 - tile_c0, plan.unit_channels);
        // As memory has them: rows outermost, unless rows are few and therefore long.
        const int64_t unit = grid.whole_rows ? index % units : index / grid.parts;
        part = grid.whole_rows ? index / units : index % grid.parts;
        c0 = tile_c0 + unit * plan.unit_channels;
        c1 = std::min(tile_c1, c0 + plan.unit_channels);
        slot = part * plan.tile_channels + c0 - tile_c0;
    }
};

template <class T>
int64_t items_in(const Job<T>& job, int64_t c0, int64_t c1) {
    return job.grid.parts * ceil_div(c1 - c0, job.plan.unit_channels);
}

template <class T>
void moments_item(const Job<T>& job, int64_t c0, int64_t c1, int64_t index, Sums* table) {
    const Item item(job.grid, job.plan, c0, c1, index);
    Sums* total = table + item.slot;
    Sums sums[kColumns];
    double count = 0;
    for (int64_t p = part_begin(job.grid, item.part); p < part_begin(job.grid, item.part + 1);
         ++p) {
        const Piece piece(job.grid, p);
        if (job.grid.shape.columns)
            column_moments(job.x, piece, item.c0, item.c1, sums);
        else
            for (int64_t c = item.c0; c < item.c1; ++c)
                sums[c - item.c0] = row_moments(job, piece, c);
        for (int64_t c = 0; c < item.c1 - item.c0; ++c)
            total[c] =
                count == 0 ? sums[c] : merge_moments(count, total[c], piece.count(), sums[c]);
        count += piece.count();
    }
}

template <class T>
void gradients_item(const Job<T>& job, int64_t c0, int64_t c1, int64_t index, Sums* table) {
    const Item item(job.grid, job.plan, c0, c1, index);
    Sums* total = table + item.slot;
    std::fill_n(total, item.c1 - item.c0, Sums{0, 0});
    const int64_t begin = part_begin(job.grid, item.part);
    const int64_t end = part_begin(job.grid, item.part + 1);
    const auto add = [](Sums& to, Sums sums) {
        to.first += sums.first;
        to.second += sums.second;
    };
    if (job.grid.shape.columns) {
        const ColumnCoefficients<T> k(job.channels, item.c0, item.c1, job.grid.shape.run,
                                      Xhat::fields);
        Sums sums[kColumns];
        for (int64_t p = begin; p < end; ++p) {
            column_gradients(job, Piece(job.grid, p), item.c0, item.c1, k, sums);
            for (int64_t c = 0; c < item.c1 - item.c0; ++c) add(total[c], sums[c]);
        }
    } else {
        for (int64_t c = item.c0; c < item.c1; ++c) {
            const ChannelCoefficients<T> k(job.channels, c, Xhat::fields);
            for (int64_t p = begin; p < end; ++p)
                add(total[c - item.c0], row_gradients(job, Piece(job.grid, p), c, k));
        }
    }
}

template <class Operation, class T>
void apply_item(const Job<T>& job, int64_t c0, int64_t c1, int64_t index) {
    const Item item(job.grid, job.plan, c0, c1, index);
    const int64_t begin = part_begin(job.grid, item.part);
    const int64_t end = part_begin(job.grid, item.part + 1);
    if (job.grid.shape.columns) {
        const int64_t run = job.grid.shape.run;
        const ColumnCoefficients<T> k(job.channels, item.c0, item.c1, run, Operation::fields);
        for (int64_t p = begin; p < end; ++p)
            apply_rows<Operation>(job, Piece(job.grid, p), item.c0, (item.c1 - item.c0) * run, k);
    } else {
        for (int64_t c = item.c0; c < item.c1; ++c) {
            const ChannelCoefficients<T> k(job.channels, c, Operation::fields);
            for (int64_t p = begin; p < end; ++p) {
                const Piece piece(job.grid, p);
                apply_rows<Operation>(job, piece, c, piece.length, k);
            }
        }
    }
    if (job.plan.stream) store_fence();
}

// What can be done to an item.
enum Step { kMoments, kParameterGradients, kNormalise, kGradient, kFixedGradient };

template <class T>
void run_item(Step step, const Job<T>& job, int64_t c0, int64_t c1, int64_t index, Sums* table) {
    switch (step) {
        case kMoments:
            return moments_item(job, c0, c1, index, table);
        case kParameterGradients:
            return gradients_item(job, c0, c1, index, table);
        case kNormalise:
            return apply_item<Normalise>(job, c0, c1, index);
        case kGradient:
            return apply_item<Gradient>(job, c0, c1, index);
        case kFixedGradient:
            return apply_item<FixedGradient>(job, c0, c1, index);
    }
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
