// How a problem is cut: a pure function of the shape (Grid: which partial sums exist) and of the
// machine (Plan: who computes them, and what stays in cache). Results depend on the Grid alone, so
// they are the same for every number of threads and every cache size.
//
// Below the door every array is K rows by C channels by a run of S contiguous values:
//   rows form     each (row, channel) is a run of S values of one channel, summed along the run;
//   columns form  each row is C * S contiguous values, summed down the rows, column by column.
//                 S = 1 is channels-last; S = H * W is a small feature map, where a run is too
//                 short to be worth a loop of its own. Several rows may be folded into one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bncpu {
namespace {

// Values summed in the precision of the arithmetic before they are flushed to double: few enough
// that not even errors of one sign (as repeated values make them) show in float32.
constexpr int64_t kPieceValues = 2048;
constexpr int64_t kWholeVectors = 64;
// The same in rows of the columns form, where every row ends in the same few sums: few enough for
// float32, many enough that the flush, a few operations in double per column, does not show;
// between these, as many as leave so many pieces to share out.
constexpr int64_t kPieceRows = 128, kFewPieceRows = 32;
constexpr int64_t kManyPieces = 64;
// Columns handled at once, a contiguous run of each row: their coefficients and sums stay in L2,
// and serve four rows whenever they are read. Shorter rows are folded into rows of as many columns,
// if that leaves enough of them; where they follow each other without a gap, each is then one run.
constexpr int64_t kColumns = 4096;
constexpr int64_t kFoldedRows = 8;
// Pieces are merged into at most this many parts per channel, none of fewer values than these: work
// for many threads, yet few enough that a part's pivot and its merging cost nothing beside reading
// it. In the columns form threads share out the rows, and all channels' parts are merged: parts are
// measured by the values of all channels, and fewer.
constexpr int64_t kParts = 128;
constexpr int64_t kPartValues = 32768;
constexpr int64_t kColumnParts = 32;
constexpr int64_t kColumnPartValues = 65536;
// A thread takes the runs of neighbouring channels in one strip, row after row. Memory is as fast
// as it can be for strips of 64 kB and hardly slower for 16 kB; with half as much it loses a tenth,
// with 4 kB a third (measured for a copy of 32 rows, strip by strip).
constexpr int64_t kStripBytes = 32768;
constexpr int64_t kShortStripBytes = 8192;
// The sums of a strip's channels, 136 bytes each, stand on the stack.
constexpr int64_t kStripChannels = 256;
// A pipeline of so many tiles loses little at its ends, where it only reads or only writes.
constexpr int64_t kPipeline = 12;
// What stays in L2 between the two passes is cut into strips of this size.
constexpr int64_t kNearStripBytes = 8192;
// Runs that do not adjoin are worth streaming from this size on.
constexpr int64_t kShortRunBytes = 1024;
// Values of a long run that a thread maps at a time where there are no sums.
constexpr int64_t kMapValues = 16384;
// A thread is worth waking for this much input. Measured on two cores: two threads take as long as
// one for 0.5 MB, and 0.6 of its time for 1 MB.
#ifdef BNCPU_BYTES_PER_THREAD  // small problems on many threads, for ThreadSanitizer to see
constexpr int64_t kBytesPerThread = BNCPU_BYTES_PER_THREAD;
#else
constexpr int64_t kBytesPerThread = 256 * 1024;
#endif

struct Shape {
    bool columns;
    int64_t rows, channels, run;  // K, C, S
    int64_t fold = 1, last = 1;   // rows that are taken as one, and how many the last one has
};

struct Grid {
    Shape shape;
    int64_t piece_rows;   // rows in a piece
    int64_t segments;     // pieces that one long run is cut into (rows form)
    int64_t segment;      // values of each but the last
    int64_t pieces;       // per channel
    int64_t parts;        // per channel
    bool whole_rows;      // whether a part holds all segments of its rows
    int64_t step, steps;  // pieces in a step, and steps in all, of which parts are even shares
};

struct Plan {
    int64_t tiles;  // even shares of the channels, whose input stays in cache between the passes
    int64_t tile_channels;  // of the widest tile
    int64_t units;          // even shares of a tile, of one work item each (and part)
    int outer_threads;      // threads that take whole tiles ...
    int inner_threads;      // ... or threads that share each tile; one of the two is 1
    bool stream;            // results bypass the caches
    bool pipelined;         // a tile is summed while the one before it is mapped
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where share i of n even shares begins.
constexpr int64_t share(int64_t total, int64_t n, int64_t i) { return total * i / n; }

// The rows of the shape folded.
inline Shape folded_rows(Shape shape) {
    const int64_t most =
        std::min(kColumns / (shape.channels * shape.run), shape.rows / kFoldedRows);
    if (!shape.columns || most < 2) return shape;
    const int64_t rows = ceil_div(shape.rows, most);
    shape.fold = most;
    shape.last = shape.rows - (rows - 1) * most;
    shape.rows = rows;
    return shape;
}

inline int64_t rows_in(const Shape& shape, int64_t row) {
    return row == shape.rows - 1 ? shape.last : shape.fold;
}

// Values of a channel in the rows before this one, and in all.
inline int64_t values_above(const Shape& shape, int64_t row) {
    const int64_t missing = row == shape.rows ? shape.fold - shape.last : 0;
    return (row * shape.fold - missing) * shape.run;
}
inline int64_t values_of(const Shape& shape) { return values_above(shape, shape.rows); }

inline Grid make_grid(Shape shape) {
    Grid grid{shape, 1, 1, shape.run, 0, 0, true, 1, 0};
    if (shape.columns) {
        const int64_t even = ceil_div(shape.rows, kManyPieces * 4) * 4;  // whole quads
        grid.piece_rows = std::clamp(even, kFewPieceRows, kPieceRows);
    } else if (shape.run > kPieceValues) {
        // As even as whole vectors of any level allow.
        const int64_t least = ceil_div(shape.run, ceil_div(shape.run, kPieceValues));
        grid.segment = ceil_div(least, kWholeVectors) * kWholeVectors;
        grid.segments = ceil_div(shape.run, grid.segment);
    }
    const int64_t groups = ceil_div(shape.rows, grid.piece_rows);
    grid.pieces = groups * grid.segments;
    // Parts are whole rows, which are read in one go, where there are rows enough to share out.
    const int64_t wanted =
        shape.columns ? std::clamp<int64_t>(values_of(shape) * shape.channels / kColumnPartValues,
                                            1, kColumnParts)
                      : std::clamp<int64_t>(values_of(shape) / kPartValues, 1, kParts);
    grid.whole_rows = groups >= wanted;
    grid.step = grid.whole_rows ? grid.segments : 1;
    grid.steps = grid.pieces / grid.step;
    grid.parts = std::min(grid.steps, wanted);
    return grid;
}

// Whether items follow each other row by row, all channels of a row in turn; else a part is a
// stretch of long rows, and one channel's parts follow each other.
inline bool rows_first(const Grid& grid) { return grid.whole_rows || grid.segments == 1; }

// The grid of an operation without sums, where pieces only share out the work: as memory has it.
inline Grid make_map_grid(Shape shape) {
    Grid grid = make_grid(shape);
    if (shape.columns) {
        grid.piece_rows = std::clamp<int64_t>(shape.rows / kManyPieces, 4, kPieceRows);
        grid.pieces = grid.parts = ceil_div(shape.rows, grid.piece_rows);
    } else {
        grid.piece_rows = 1;
        grid.segment = std::min(shape.run, kMapValues);
        grid.segments = ceil_div(shape.run, grid.segment);
        grid.pieces = grid.parts = shape.rows * grid.segments;
        grid.whole_rows = grid.segments == 1;
    }
    grid.step = 1;
    grid.steps = grid.parts;
    return grid;
}

// A machine's caches in bytes: one core's L2, and the L3 that all cores share.
struct Caches {
    int64_t l2, l3;
};

// What is read: `inputs` arrays of `itemsize` bytes, once or in two passes, the runs of
// neighbouring channels adjoining or not.
struct Traffic {
    int64_t itemsize, inputs, passes;
    bool adjoining;
};

// Channels whose values a thread keeps in cache between the passes; 0 if not even the fewest fit.
inline int64_t channels_per_tile(const Shape& shape, const Traffic& traffic, int64_t threads,
                                 const Caches& caches, int64_t unit, bool stream) {
    const int64_t run_bytes = shape.run * traffic.itemsize;
    const int64_t channel_bytes = values_of(shape) * traffic.itemsize * traffic.inputs;
    // L2, where a quarter is left for results, coefficients and the stack, and a thread's share of
    // half the L3.
    const int64_t near = caches.l2 * 3 / 4, far = caches.l3 / (2 * threads);
    if (!shape.columns && stream) {
        // Two tiles at a time, the one that is read and the one that is written, in strips as long
        // as memory likes them, unless the pipeline would be too short for that.
        const int64_t share = ceil_div(shape.channels, threads) * run_bytes;
        const int64_t strip = std::clamp(share / kPipeline, kShortStripBytes, kStripBytes);
        const int64_t wanted = std::clamp<int64_t>(strip / run_bytes, 1, unit);
        const int64_t own = std::min(wanted, std::max(near, far) / 2 / channel_bytes);
        return own > 0 || channel_bytes > std::max(near, far) ? own : 1;
    }
    const int64_t wanted = shape.columns ? unit : ceil_div(kNearStripBytes, run_bytes);
    const int64_t least = shape.columns ? std::min(unit, ceil_div(kNearStripBytes, run_bytes)) : 1;
    int64_t own = std::min(wanted, caches.l2 / 2 / channel_bytes);  // the next tile fits beside it
    if (own < least) own = std::min(wanted, near / channel_bytes);
    if (own < least && least * channel_bytes <= far) own = least;
    if (own > least && ceil_div(shape.channels, own) < threads)
        own = std::max(least, ceil_div(shape.channels, threads));
    return own < least ? 0 : own;
}

inline Plan make_plan(const Grid& grid, const Traffic& traffic, int64_t threads,
                      const Caches& caches) {
    const Shape& shape = grid.shape;
    const int64_t run_bytes = shape.run * traffic.itemsize;
    const int64_t channel_bytes = values_of(shape) * traffic.itemsize * traffic.inputs;
    const int64_t total_bytes = channel_bytes * shape.channels;
    threads = std::max<int64_t>(1, std::min(threads, total_bytes / kBytesPerThread));

    Plan plan{};
    // Results that are evicted before anybody reads them need not enter the cache at all; short
    // rows would leave partial lines behind. Beyond all L2 and an eighth of the L3 streaming is
    // faster by a fifth to a half where x is in no cache, and takes as long where the result is
    // read at once (measured).
    plan.stream = (traffic.inputs + 1) * total_bytes / traffic.inputs >
                      std::max(caches.l3 / 8, threads * caches.l2) &&
                  (shape.columns || traffic.adjoining || run_bytes >= kShortRunBytes);

    // Channels of an item: those of a strip, or as many columns as are taken at once.
    int64_t unit = 1;
    if (shape.columns)
        unit = shape.fold > 1 ? shape.channels : kColumns / shape.run;
    else if (traffic.adjoining && rows_first(grid))
        unit = std::min(kStripBytes / run_bytes, kStripChannels);
    unit = std::clamp<int64_t>(unit, 1, shape.channels);

    const int64_t own = traffic.passes == 1 || shape.fold > 1
                            ? 0
                            : channels_per_tile(shape, traffic, threads, caches, unit, plan.stream);
    // Whole tiles per thread, as many for each; a thread with a channel more than the others must
    // not cost more than a tenth.
    if (own > 0 && 10 * shape.channels >= 9 * threads * ceil_div(shape.channels, threads)) {
        plan.tiles =
            std::min(shape.channels, threads * ceil_div(ceil_div(shape.channels, own), threads));
        plan.outer_threads = (int)std::min(threads, plan.tiles);
        plan.inner_threads = 1;
    } else {
        // All threads share a tile, each keeping its parts of it in its own L2 or all of them in
        // the L3. Where not even that fits, take whole rows: nothing will be in cache, but memory
        // likes long runs. What is read once is one tile, whatever its size.
        const int64_t fit =
            std::max(threads * (caches.l2 * 3 / 4), shape.columns ? 0 : caches.l3 / 4) /
            channel_bytes;
        const int64_t least =
            shape.columns ? std::min(unit, ceil_div(kNearStripBytes, run_bytes)) : 1;
        const bool one = traffic.passes == 1 || shape.fold > 1 || (shape.columns && fit < least);
        plan.tiles =
            one ? 1 : ceil_div(shape.channels, std::clamp<int64_t>(fit, 1, shape.channels));
        plan.outer_threads = 1;
        plan.inner_threads = (int)threads;
        // Enough items for all threads, and for even shares.
        const int64_t wanted = ceil_div(4 * threads, grid.parts);
        if (shape.fold == 1)
            unit = std::clamp<int64_t>(ceil_div(shape.channels, plan.tiles) / wanted, 1, unit);
    }
    plan.tile_channels = ceil_div(shape.channels, plan.tiles);
    plan.units = ceil_div(plan.tile_channels, unit);
    plan.pipelined = traffic.passes == 2 && plan.stream && plan.tiles > plan.outer_threads;
    return plan;
}

}  // namespace
}  // namespace bncpu
