// How a problem is cut: a pure function of the shape (Grid: which partial sums exist) and of the
// machine (Plan: who computes them, and what stays in cache). Results depend on the Grid alone, so
// they are the same for every number of threads and every cache size.
//
// Below the door every array is K rows by C channels by a run of S contiguous values:
//   rows form     each (row, channel) is a run of S values of one channel, summed along the run;
//   columns form  each row is C * S contiguous values, summed down the rows, column by column.
//                 S = 1 is channels-last; S = H * W is a small feature map, where a run is too
//                 short to be worth a loop of its own.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bncpu {
namespace {

// Values summed in the precision of the arithmetic before they are flushed to double: few enough
// that not even errors of one sign (as repeated values make them) show in float32.
constexpr int64_t kPieceValues = 2048;
constexpr int64_t kWholeVectors = 64;
// The same in rows, where every row ends in the same few sums: few enough for float32, many enough
// that the flush, which costs about ten operations in double per column, does not show.
constexpr int64_t kPieceRows = 128;
// Columns handled at once: the coefficients and sums of as many stay in L1, or near it in a
// gradient, which has the most.
constexpr int64_t kColumns = 1024;
// Pieces are merged into at most this many parts per channel: work for many threads, yet few
// enough that merging them costs nothing beside reading the channel.
constexpr int64_t kParts = 128;
// Parts are whole rows, which are read in one go, where there are this many to share out.
constexpr int64_t kRowParts = 16;
// A contiguous run this long per sample keeps the prefetchers and the TLB content.
constexpr int64_t kRunBytes = 8192;
// The shortest worthwhile run in the columns form.
constexpr int64_t kShortRunBytes = 1024;
// A thread is worth waking for this much input. Measured on two cores: one thread and two take the
// same time between 1 and 2 MB.
constexpr int64_t kBytesPerThread = 512 * 1024;

struct Shape {
    bool columns;
    int64_t rows, channels, run;  // K, C, S
};

struct Grid {
    Shape shape;
    int64_t piece_rows;  // rows in a piece
    int64_t segments;    // pieces that one long run is cut into (rows form)
    int64_t segment;     // values of each but the last
    int64_t pieces;      // per channel
    int64_t parts;       // per channel
    bool whole_rows;     // whether a part holds all segments of its rows
    // Parts are the same number of steps, but for the first few, which have one more.
    int64_t step, steps, longer_parts;  // pieces in a step, steps in a part
};

struct Plan {
    int64_t tile_channels, tiles;  // a tile's input stays in cache between the two passes
    int64_t unit_channels;         // channels of one work item
    int outer_threads;             // threads that take whole tiles ...
    int inner_threads;             // ... or threads that share each tile; one of the two is 1
    bool stream;                   // results bypass the caches
    bool pipelined;                // a tile is summed while the one before it is mapped
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Grid make_grid(Shape shape) {
    Grid grid{shape, 1, 1, shape.run, 0, 0, true, 1, 0, 0};
    if (shape.columns) {
        grid.piece_rows = kPieceRows;
    } else if (shape.run > kPieceValues) {
        // As even as whole vectors of any level allow.
        const int64_t least = ceil_div(shape.run, ceil_div(shape.run, kPieceValues));
        grid.segment = ceil_div(least, kWholeVectors) * kWholeVectors;
        grid.segments = ceil_div(shape.run, grid.segment);
    } else {
        grid.piece_rows = std::min(kPieceRows, kPieceValues / shape.run);
    }
    const int64_t groups = ceil_div(shape.rows, grid.piece_rows);
    grid.pieces = groups * grid.segments;
    grid.whole_rows = groups >= kRowParts;
    grid.step = grid.whole_rows ? grid.segments : 1;
    const int64_t steps = grid.pieces / grid.step;
    grid.parts = std::min(steps, kParts);
    grid.steps = steps / grid.parts;
    grid.longer_parts = steps % grid.parts;
    return grid;
}

// `inputs` arrays of `itemsize` bytes are read, once or in two passes; l2 is one core's, l3 what
// all cores share.
inline Plan make_plan(const Grid& grid, int64_t itemsize, int64_t inputs, int64_t passes,
                      int64_t threads, int64_t l2, int64_t l3) {
    const Shape& shape = grid.shape;
    const int64_t run_bytes = shape.run * itemsize;
    const int64_t channel_bytes = shape.rows * run_bytes * inputs;
    const int64_t total_bytes = channel_bytes * shape.channels;
    threads = std::max<int64_t>(1, std::min(threads, total_bytes / kBytesPerThread));

    Plan plan{};
    plan.unit_channels =
        shape.columns ? std::max<int64_t>(1, std::min(shape.channels, kColumns / shape.run)) : 1;
    const int64_t wanted = shape.columns ? plan.unit_channels : ceil_div(kRunBytes, run_bytes);
    const int64_t least =
        shape.columns ? std::min(plan.unit_channels, ceil_div(kShortRunBytes, run_bytes)) : 1;

    // Channels that one thread can keep to itself: in its L2 (the quarter left is for results,
    // coefficients and the stack), or a few of them in its share of half the L3.
    const int64_t near = l2 * 3 / 4, far = l3 / (2 * threads);
    int64_t own = std::min(wanted, l2 / 2 / channel_bytes);  // the next tile fits beside it
    if (own < least) own = std::min(wanted, near / channel_bytes);
    if (own < least && least * channel_bytes <= far) own = least;
    if (own > least && ceil_div(shape.channels, own) < threads)
        own = std::max(least, ceil_div(shape.channels, threads));

    if (passes == 1) {
        // Nothing is read again: one tile, whatever its size.
        plan.tile_channels = shape.channels;
        plan.outer_threads = 1;
        plan.inner_threads = (int)threads;
    } else if (own >= least && ceil_div(shape.channels, own) >= threads) {
        // Whole tiles per thread, in even shares: tiles a multiple of the threads.
        const int64_t rounds = ceil_div(ceil_div(shape.channels, own), threads);
        const int64_t even = ceil_div(shape.channels, rounds * threads);
        plan.tile_channels = even < least ? own : even;
        plan.outer_threads = (int)threads;
        plan.inner_threads = 1;
    } else {
        // All threads share a tile, each keeping its parts of it in its own L2. Where not even that
        // fits, take whole rows: nothing will be in cache, but memory likes long runs.
        const int64_t fit = threads * near / channel_bytes;
        plan.tile_channels = shape.columns && fit < least
                                 ? shape.channels
                                 : std::clamp<int64_t>(fit, 1, shape.channels);
        plan.outer_threads = 1;
        plan.inner_threads = (int)threads;
    }
    plan.unit_channels = std::min(plan.unit_channels, plan.tile_channels);
    plan.tiles = ceil_div(shape.channels, plan.tile_channels);
    // Results that would be evicted before anybody reads them need not enter the cache at all;
    // short rows would leave partial lines behind. Where a pipeline can write them while it reads,
    // that pays from half the cache on (measured with arrays that were not in it).
    const int64_t held = passes == 2 ? l3 / 2 : l3;
    plan.stream = (inputs + 1) * total_bytes / inputs > held &&
                  (shape.columns || run_bytes >= kShortRunBytes);
    plan.pipelined = passes == 2 && plan.stream && plan.tiles > plan.outer_threads;
    return plan;
}

}  // namespace
}  // namespace bncpu
