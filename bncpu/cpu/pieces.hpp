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

// S is what values are stored as, here and below; T what they are computed in.
template <class S>
struct Job {
    Grid grid;
    Plan plan;
    View<S> x, residual, dy, out, dresidual;  // out is y or dx
    uint8_t* mask = nullptr;
    bool relu = false, fixed = false;  // fixed: the statistics are constants
    bool gapless = false;              // rows that are folded into one are one run in all arrays
    Channels channels;
    ChannelTable<Arithmetic<S>> table;

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
};

// Values of a channel in the pieces before this one.
inline int64_t values_before(const Grid& grid, int64_t piece) {
    const Shape& shape = grid.shape;
    const int64_t row = std::min(shape.rows, piece / grid.segments * grid.piece_rows);
    return values_above(shape, row) + std::min(shape.run, piece % grid.segments * grid.segment);
}

// The first piece of a part.
inline int64_t part_begin(const Grid& grid, int64_t part) {
    return grid.step * share(grid.steps, grid.parts, part);
}

inline double values_between(const Grid& grid, int64_t begin, int64_t end) {
    return (double)(values_before(grid, end) - values_before(grid, begin));
}
inline double part_count(const Grid& grid, int64_t part) {
    return values_between(grid, part_begin(grid, part), part_begin(grid, part + 1));
}

// What a thread is given at a time: pieces [begin, end) of channels [c0, c1) of a tile.
struct Item {
    int64_t begin, end, c0, c1;
    int64_t tile_c0, tile_c1;
    int64_t slot;  // where its sums stand in the tile's table

    // Items of a tile as memory has them: rows outermost, unless a part is a stretch of a long row.
    Item(const Grid& grid, const Plan& plan, int64_t tile, int64_t index)
        : tile_c0(share(grid.shape.channels, plan.tiles, tile)),
          tile_c1(share(grid.shape.channels, plan.tiles, tile + 1)) {
        const bool down = rows_first(grid);
        const int64_t outer = index / (down ? plan.units : grid.parts);
        const int64_t inner = index - outer * (down ? plan.units : grid.parts);
        const int64_t part = down ? outer : inner, unit = down ? inner : outer;
        begin = part_begin(grid, part);
        end = part_begin(grid, part + 1);
        c0 = tile_c0 + share(tile_c1 - tile_c0, plan.units, unit);
        c1 = tile_c0 + share(tile_c1 - tile_c0, plan.units, unit + 1);
        slot = part * plan.tile_channels + c0 - tile_c0;
    }
};

// The rows [k0, k1) of an item. They are whole, from value 0 to the end of the run, unless its part
// is a stretch of long rows, which begins within the first one and ends within the last.
struct ItemRows {
    int64_t k0, k1;

    ItemRows(const Grid& grid, const Item& item) : run(grid.shape.run) {
        const Piece first(grid, item.begin), last(grid, item.end - 1);
        k0 = first.k0;
        k1 = last.k1;
        begin_of_first = first.start;
        end_of_last = last.start + last.length;
    }
    int64_t begin(int64_t k) const { return k == k0 ? begin_of_first : 0; }
    int64_t end(int64_t k) const { return k == k1 - 1 ? end_of_last : run; }

   private:
    int64_t run, begin_of_first, end_of_last;
};

// In the columns form, columns of an item's rows but for the last one, which may have fewer.
inline int64_t widest_row(const Shape& shape, const Item& item) {
    return (shape.fold > 1 ? shape.fold * shape.channels : item.c1 - item.c0) * shape.run;
}

// A row of the columns form in memory: one run, or as many as rows are folded into it.
struct Runs {
    int64_t count, width;

    template <class S>
    Runs(const Job<S>& job, const Item& item, int64_t k) {
        const Shape& shape = job.grid.shape;
        const int64_t rows = rows_in(shape, k);
        count = job.gapless ? 1 : rows;
        width = (shape.fold > 1 ? rows / count * shape.channels : item.c1 - item.c0) * shape.run;
    }
};

// A row, a channel and a value of its run: a place in every array, and in the mask.
struct Spot {
    int64_t k, c, i;
};

// What a thread reads after row k of an item, of which it takes `count` rows at a time: the rows
// below, then the same rows of the next channels, then the tile's next rows, then the next tile. It
// may lie beyond the arrays, but not beyond their rows. Of rows that are folded it is the first
// one.
inline Spot spot_after(const Grid& grid, const Item& item, const ItemRows& rows, int64_t k,
                       int64_t count) {
    const int64_t fold = grid.shape.fold, over = k + count - rows.k1, bottom = grid.shape.rows;
    if (over < 0) return {(k + count) * fold, item.c0, 0};
    if (!rows_first(grid)) return {k, item.c0, rows.end(k)};
    if (item.c1 < item.tile_c1) return {std::min(rows.k0 + over, bottom - 1) * fold, item.c1, 0};
    if (rows.k1 + over < bottom) return {(rows.k1 + over) * fold, item.tile_c0, 0};
    return {std::min(over, bottom - 1) * fold, item.tile_c1, 0};
}

template <class S>
const S* at_spot(const View<S>& view, Spot spot) {
    return view.data == nullptr ? nullptr : view.at(spot.k, spot.c) + spot.i;
}

// Asks for the bits of n values from a spot on. A store to a line of the mask that is not in the
// cache would hold up all results behind it.
template <class S>
void prefetch_mask(const Job<S>& job, Spot spot, int64_t n) {
    const uint8_t* p = job.mask + (job.bit(spot.k, spot.c) + spot.i) / 8;
    for (int64_t i = 0; i < n / 8 + kLineBytes; i += kLineBytes) prefetch(p + i);
}

// Where the coefficients of the loops stand.
template <class S>
int64_t bytes_of_table(const Job<S>& job) {
    // Of doubles, which follow it.
    const int64_t bytes = ChannelTable<Arithmetic<S>>::bytes(job.grid.shape.channels);
    return ceil_div(bytes, sizeof(double)) * (int64_t)sizeof(double);
}
template <class S>
void place_table(Job<S>& job, void* memory) {
    job.table = {memory, job.grid.shape.channels};
}
template <class S>
void set_forward(Job<S>& job, int64_t c) {
    set_forward(job.table, job.channels, c);
}
template <class S>
void set_backward(Job<S>& job, int64_t c) {
    set_backward(job.table, job.channels, c);
}

// Whether the runs of neighbouring channels adjoin in all arrays, so that a row of them is one run.
template <class S>
bool channels_adjoin(const Job<S>& job) {
    for (const View<S>* view : {&job.x, &job.residual, &job.dy, &job.out, &job.dresidual})
        if (view->data != nullptr && view->channel != job.grid.shape.run) return false;
    return job.grid.shape.run >= Vec<Arithmetic<S>>::lanes;
}

// Whether rows follow each other without a gap in all arrays.
template <class S>
bool rows_adjoin(const Job<S>& job) {
    const Shape& shape = job.grid.shape;
    if (shape.fold == 1) return true;
    for (const View<S>* view : {&job.x, &job.residual, &job.dy, &job.out, &job.dresidual})
        if (view->data != nullptr &&
            (view->planes != nullptr || view->row != shape.channels * shape.run))
            return false;
    return true;
}

// Whether results can go out several rows at a time: streamed ones need the same alignment.
template <class S>
bool rows_alike(const Job<S>& job) {
    return !job.plan.stream ||
           (job.out.planes == nullptr &&
            job.grid.shape.fold * job.out.row * (int64_t)sizeof(S) % kStreamBytes<S> == 0);
}

// Calls f(first row, rows) for the rows [k0, k1) four at a time, then one at a time; a last row
// with fewer columns comes alone.
template <class F>
BNCPU_INLINE void by_quads(const Shape& shape, int64_t k0, int64_t k1, F f) {
    const int64_t full = k1 == shape.rows && shape.last < shape.fold ? k1 - 1 : k1;
    for (; k0 + 4 <= full; k0 += 4) f(k0, std::integral_constant<int, 4>());
    for (; k0 < k1; ++k0) f(k0, std::integral_constant<int, 1>());
}

// Calls f(row) for the rows of a piece as they are in memory.
template <class F>
inline void by_rows(const Shape& shape, const Piece& piece, F f) {
    const int64_t end =
        piece.k1 * shape.fold - (piece.k1 == shape.rows ? shape.fold - shape.last : 0);
    for (int64_t k = piece.k0 * shape.fold; k < end; ++k) f(k);
}

// What decides whether a gradient passes the activation: there is none, the sign of z as the
// forward had it, or the mask.
enum Gate { kOpen, kSign, kBits };

// The fields of a channel that a gate reads.
constexpr unsigned gate_fields(Gate gate) { return gate == kSign ? Normalise::fields : 0; }

// The bits of n values from bit `bit` of the mask on, where the gate reads them.
template <Gate gate, class S>
BNCPU_INLINE auto gate_bits(const Job<S>& job, int64_t bit, int n) {
    if constexpr (gate == kBits)
        return BitsAhead{read_bits(job.mask, bit, n)};
    else
        return Nothing{};
}

// dz, the gradient before the activation, of the next n values: dy where the stored y is not zero,
// else 0. The sign is computed as the forward computed it.
template <Gate gate, class S, class Bits, class K, class T>
BNCPU_INLINE Vec<T> gated(Bits& bits, int n, const K& k, Vec<T> dy, Vec<T> x) {
    if constexpr (gate == kOpen)
        return dy;
    else if constexpr (gate == kSign)
        return where_above(Normalise::value(k, x), Vec<T>::all(kStoredAsZero<S>), dy);
    else
        return where_set(bits.take(n), dy);
}

}  // namespace
}  // namespace bncpu
