// What the kernels work on: arrays below the door (View) and all of a call (Job), cut into pieces
// of rows (Piece) and the items that threads take (Item). What stands between a gradient and the
// batch norm, the gate of an activation, is here too, because sums and results both pass through
// it.
#pragma once

#include "bits.hpp"
#include "coefficients.hpp"

namespace bncpu {
namespace {

// An array below the door. Row k of channel c begins at planes[k / rows_per_plane] (0 without
// planes) + (k % rows_per_plane) * row + c * channel.
template <class S>
struct View {
    S* data = nullptr;
    const int64_t* planes = nullptr;
    int64_t rows_per_plane = 1, row = 0, channel = 0;

    BNCPU_INLINE S* at(int64_t k, int64_t c) const {
        S* p = data + c * channel;
        return planes == nullptr ? p + k * row
                                 : p + planes[k / rows_per_plane] + k % rows_per_plane * row;
    }
};

// Two sums of one channel over one part: (mean, m2) forward, (sum dy, sum dy * xhat) backward.
struct Sums {
    double first, second;
};
inline Sums operator+(Sums a, Sums b) { return {a.first + b.first, a.second + b.second}; }

// S is what values are stored as, here and below; T what they are computed in.
template <class S>
struct Job {
    Grid grid;
    Plan plan;
    View<S> x, residual, dy, out, dresidual;  // out is y or dx
    uint8_t* mask = nullptr;
    bool relu = false, fixed = false;  // fixed: the statistics are constants
    Channels channels;

    // The place of a value in the mask.
    int64_t bit(int64_t k, int64_t c) const {
        return (k * grid.shape.channels + c) * grid.shape.run;
    }
};

// The rows [k0, k1) of a piece and, within each, `length` values of the run from `start` on.
struct Piece {
    int64_t k0, k1, start = 0, length;

    Piece(const Grid& grid, int64_t index) {
        const Shape& shape = grid.shape;
        length = shape.run;
        k0 = index;
        if (grid.segments > 1) {
            k0 = index / grid.segments;
            start = (index - k0 * grid.segments) * grid.segment;
            length = std::min(grid.segment, shape.run - start);
        }
        k0 *= grid.piece_rows;
        k1 = std::min(shape.rows, k0 + grid.piece_rows);
    }
    double count() const { return (double)((k1 - k0) * length); }
};

// Values of a channel in the pieces before this one.
inline int64_t values_before(const Grid& grid, int64_t piece) {
    const Shape& shape = grid.shape;
    const int64_t row = std::min(shape.rows, piece / grid.segments * grid.piece_rows);
    return row * shape.run + std::min(shape.run, piece % grid.segments * grid.segment);
}

// The first piece of a part.
inline int64_t part_begin(const Grid& grid, int64_t part) {
    return grid.step * (grid.steps * part + std::min(part, grid.longer_parts));
}

inline double part_count(const Grid& grid, int64_t part) {
    return (double)(values_before(grid, part_begin(grid, part + 1)) -
                    values_before(grid, part_begin(grid, part)));
}

// What a thread is given at a time: pieces [begin, end) of channels [c0, c1) of a tile.
struct Item {
    int64_t begin, end, c0, c1;
    int64_t tile_c0, tile_c1;
    int64_t slot;  // where its sums stand in the tile's table

    // Items of a tile as memory has them: rows outermost, unless a part is a stretch of a long row.
    Item(const Grid& grid, const Plan& plan, int64_t tile_c0, int64_t tile_c1, int64_t index)
        : tile_c0(tile_c0), tile_c1(tile_c1) {
        const int64_t units = ceil_div(tile_c1 - tile_c0, plan.unit_channels);
        const bool rows_first = grid.whole_rows || grid.segments == 1;
        const int64_t outer = index / (rows_first ? units : grid.parts);
        const int64_t inner = index - outer * (rows_first ? units : grid.parts);
        const int64_t part = rows_first ? outer : inner, unit = rows_first ? inner : outer;
        begin = part_begin(grid, part);
        end = part_begin(grid, part + 1);
        c0 = tile_c0 + unit * plan.unit_channels;
        c1 = std::min(tile_c1, c0 + plan.unit_channels);
        slot = part * plan.tile_channels + c0 - tile_c0;
    }

    Item in_tile_before(const Plan& plan) const {
        Item item = *this;
        item.c0 -= plan.tile_channels;
        item.c1 -= plan.tile_channels;
        return item;
    }
};

// What a thread will read after row k of a piece of an item of one channel: the rest of the row,
// then the next channel's row, and after the tile's last channel the rows below.
template <class S>
BNCPU_INLINE const S* row_ahead(const Job<S>& job, const Item& item, const View<S>& x,
                                const Piece& piece, int64_t k) {
    const Shape& shape = job.grid.shape;
    const int64_t below = k + job.grid.piece_rows;
    if (piece.start + piece.length == shape.run && item.c1 == item.tile_c1 && below < shape.rows)
        return x.at(below, item.tile_c0);
    return x.at(k, item.c0) + piece.start + piece.length;
}

// Calls f(first row, rows) for the rows of a piece four at a time, then one at a time.
template <class F>
inline void by_quads(const Piece& piece, F f) {
    int64_t k = piece.k0;
    for (; k + 4 <= piece.k1; k += 4) f(k, std::integral_constant<int, 4>());
    for (; k < piece.k1; ++k) f(k, std::integral_constant<int, 1>());
}

// What decides whether a gradient passes the activation: there is none, the sign of z as the
// forward had it, or the mask.
enum Gate { kOpen, kSign, kBits };

// The fields of a channel that a gate reads.
constexpr unsigned gate_fields(Gate gate) { return gate == kSign ? Normalise::fields : 0; }

// dz, the gradient before the activation, of n values from the i-th on after bit `bit` of the mask:
// dy where the stored y is not zero, else 0. The sign is computed as the forward computed it.
template <Gate gate, class S, class Coefficients, class T>
BNCPU_INLINE Vec<T> gated(const Job<S>& job, const Coefficients& k, int64_t bit, int64_t i, int n,
                          Vec<T> dy, Vec<T> x) {
    if constexpr (gate == kOpen)
        return dy;
    else if constexpr (gate == kSign)
        return where_above(Normalise::value(k, i, x), Vec<T>::all(kStoredAsZero<S>), dy);
    else
        return where_set(read_bits(job.mask, bit + i, n), dy);
}

}  // namespace
}  // namespace bncpu
