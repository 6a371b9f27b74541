# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""The CPU kernels: tiles of channels in parallel, rows in turn.

Each function takes a Geometry (bncpu.layout), arrays that fit it, parameters as contiguous float64
vectors of one value per channel, and a number of threads; it fills the arrays it is given. What is
checked is checked before (bncpu.arguments): nothing here looks at a shape or raises for one.

A tile is reduced, its channels are finished, and it is mapped to the result while it is in cache;
where results leave the caches, that waits until the next tile is reduced beside it. Either whole
tiles go to threads, or the threads share each tile (tiling.hpp decides); partial sums and the order
of merging them depend on the shape alone. Compiled once per instruction level.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cython.parallel cimport prange
from libc.math cimport sqrt
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc

cdef extern from *:
    """
    #ifndef BNCPU_LEVEL
    #error "BNCPU_LEVEL: the build names the instruction level of this module"
    #endif
    #ifdef _OPENMP
    #include <omp.h>
    static const int openmp_standard = _OPENMP;
    #else
    static inline int omp_get_max_threads(void) { return 1; }
    static const int openmp_standard = 0;
    #endif
    """
    const char* BNCPU_LEVEL
    const int openmp_standard
    int omp_get_max_threads() noexcept nogil

cdef extern from "tiling.hpp" namespace "bncpu" nogil:
    const int64_t kBytesPerThread

    cdef struct Shape:
        bint columns
        int64_t rows, channels, run, fold, last

    cdef struct Grid:
        Shape shape
        int64_t piece_rows, segments, pieces, parts
        bint whole_rows

    cdef struct Plan:
        int64_t tiles, tile_channels, units
        int outer_threads, inner_threads
        bint stream, pipelined

    cdef struct Caches:
        int64_t l2, l3

    cdef struct Traffic:
        int64_t itemsize, inputs, passes
        bint adjoining

    Shape folded_rows(Shape shape) noexcept
    int64_t values_of(const Shape& shape) noexcept
    int64_t share(int64_t total, int64_t n, int64_t i) noexcept
    Grid make_grid(Shape shape) noexcept
    Grid make_map_grid(Shape shape) noexcept
    Plan make_plan(const Grid& grid, const Traffic& traffic, int64_t threads,
                   const Caches& caches) noexcept

cdef extern from "coefficients.hpp" namespace "bncpu" nogil:
    cdef struct Channels:
        double* mean
        double* invstd
        double* scale
        double* shift
        double* mean_dy
        double* slope

cdef extern from "storage.hpp" namespace "bncpu" nogil:
    cdef cppclass Half:
        pass

    cdef cppclass BFloat16:
        pass

cdef extern from "items.hpp" namespace "bncpu" nogil:
    cdef struct Sums:
        double first, second

    cdef cppclass View[T]:
        T* data
        const int64_t* planes
        int64_t rows_per_plane, row, channel

    cdef cppclass Job[T]:
        Grid grid
        Plan plan
        View[T] x, residual, dy, out, dresidual
        uint8_t* mask
        bint relu, fixed, gapless
        Channels channels

    cdef enum Step:
        kSum, kMap, kMapAndSum

    bint rows_alike[T](const Job[T]& job) noexcept
    bint channels_adjoin[T](const Job[T]& job) noexcept
    bint rows_adjoin[T](const Job[T]& job) noexcept
    int64_t bytes_of_table[T](const Job[T]& job) noexcept
    void place_table[T](Job[T]& job, void* memory) noexcept
    void set_forward[T](Job[T]& job, int64_t c) noexcept
    void set_backward[T](Job[T]& job, int64_t c) noexcept
    void run_item[T](Step step, const Job[T]& job, int64_t tile, int64_t i, Sums* table,
                     void* scratch) noexcept
    int64_t bytes_of_scratch[T](const Job[T]& job) noexcept
    void merge_moments_of_parts(const Grid& grid, const Plan& plan, Sums* table) noexcept
    void add_gradients_of_parts(const Grid& grid, const Plan& plan, Sums* table) noexcept

cdef extern from "streams.hpp" namespace "bncpu" nogil:
    const int64_t kStreamBlock
    void stream_block[T](const T* a, const T* b, T* out, int64_t n, bint non_temporal) noexcept
    double read_block[T](const T* a, int64_t n) noexcept

ctypedef fused storage:
    float
    double
    Half
    BFloat16

ctypedef fused real:
    float
    double

cdef enum Operation:
    OPERATION_MOMENTS
    OPERATION_TRAIN
    OPERATION_INFER
    OPERATION_BACKWARD
    OPERATION_INFER_BACKWARD

# Sane defaults until set_cache_sizes: a core of the last ten years, a modest share of an L3.
cdef Caches caches = Caches(1 << 20, 8 << 20)


@cython.final
@cython.freelist(8)
cdef class Buffer:
    """The memory of an array, held for as long as a kernel uses it."""

    cdef Py_buffer view
    cdef const int64_t[::1] planes
    cdef int64_t row, channel

    def __cinit__(self, array, place, bint writable):
        PyObject_GetBuffer(array, &self.view, PyBUF_STRIDES | PyBUF_FORMAT
                           | (PyBUF_WRITABLE if writable else 0))
        self.planes, self.row, self.channel = place

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


cdef class Arrays:
    """The arrays of one call, None where the operation has none; places in this order."""

    cdef Buffer x, residual, dy, out, dresidual

    def __cinit__(self, geometry, x, residual, dy, out, dresidual):
        places = iter(geometry.places)
        self.x = Buffer(x, next(places), False)
        if residual is not None:
            self.residual = Buffer(residual, next(places), False)
        if dy is not None:
            self.dy = Buffer(dy, next(places), False)
        if out is not None:
            self.out = Buffer(out, next(places), True)
        if dresidual is not None:
            self.dresidual = Buffer(dresidual, next(places), True)


cdef void place(View[storage]& view, Buffer buffer, int64_t rows_per_plane) noexcept:
    if buffer is None:
        return
    view.data = <storage*> buffer.view.buf
    view.planes = NULL
    if buffer.planes is not None:
        view.planes = &buffer.planes[0]
    view.rows_per_plane = rows_per_plane
    view.row = buffer.row
    view.channel = buffer.channel


cdef struct Parameters:
    # What a channel is finished with: values per channel (NULL: not given), and eps.
    const double* gamma
    const double* beta
    double* var
    double* dgamma
    double* dbeta
    double eps
    uint8_t* mask
    bint relu


cdef void finish_moments(Job[storage]& job, Parameters& given, Sums moments, int64_t c,
                         Operation operation) noexcept nogil:
    # Algorithm 1 of the paper, lines 1 and 2; scale and shift are what its line 4 needs.
    job.channels.mean[c] = moments.first
    if operation == OPERATION_MOMENTS:
        given.var[c] = moments.second  # m2: the caller has no use for a variance yet
        return
    given.var[c] = moments.second / <double> values_of(job.grid.shape)
    prepare_channel(job, given, c)


cdef void prepare_channel(Job[storage]& job, Parameters& given, int64_t c) noexcept nogil:
    cdef double invstd
    if given.var != NULL:
        job.channels.invstd[c] = 1 / sqrt(given.var[c] + given.eps)
    invstd = job.channels.invstd[c]
    job.channels.scale[c] = invstd if given.gamma == NULL else given.gamma[c] * invstd
    job.channels.shift[c] = 0 if given.beta == NULL else given.beta[c]
    set_forward(job, c)


cdef void finish_gradients(Job[storage]& job, Parameters& given, Sums sums,
                           int64_t c) noexcept nogil:
    cdef double m = <double> values_of(job.grid.shape)
    given.dbeta[c] = sums.first
    given.dgamma[c] = sums.second
    job.channels.mean_dy[c] = sums.first / m
    job.channels.slope[c] = -job.channels.invstd[c] * (sums.second / m)
    set_backward(job, c)


cdef void run_share(Step step, Job[storage]& job, int64_t tile, Sums* table, char* scratch,
                    int64_t worker) noexcept nogil:
    # A worker's items of a tile: the same ones in every step, so that what a thread has read in one
    # is in its own L2 in the next.
    cdef int64_t items = job.grid.parts * job.plan.units, i
    cdef int64_t first = share(items, job.plan.inner_threads, worker)
    cdef int64_t last = share(items, job.plan.inner_threads, worker + 1)
    for i in range(first, last):
        run_item(step, job, tile, i, table, scratch)


cdef void run_items(Step step, Job[storage]& job, int64_t tile, Sums* table,
                    char* scratch) noexcept nogil:
    # Every item of a tile. One thread enters no parallel region: regions within regions start
    # threads anew, and this may already run within one.
    cdef int64_t size = bytes_of_scratch(job)
    cdef int workers = job.plan.inner_threads, worker
    if workers == 1:
        run_share(step, job, tile, table, scratch, 0)
    else:
        for worker in prange(workers, num_threads=workers, schedule="static"):
            run_share(step, job, tile, table, scratch + worker * size, worker)


cdef void finish_tile(Job[storage]& job, Parameters& given, Operation operation, int64_t c0,
                      int64_t c1, Sums* table) noexcept nogil:
    cdef int64_t c
    if operation == OPERATION_MOMENTS or operation == OPERATION_TRAIN:
        merge_moments_of_parts(job.grid, job.plan, table)
        for c in range(c0, c1):
            finish_moments(job, given, table[c - c0], c, operation)
    else:
        add_gradients_of_parts(job.grid, job.plan, table)
        for c in range(c0, c1):
            finish_gradients(job, given, table[c - c0], c)


cdef void run_tiles(Job[storage]& job, Parameters& given, Operation operation, int64_t first,
                    int64_t last, Sums* table, char* scratch) noexcept nogil:
    # The tiles from first up to last, in turn: sums, channels, results. In a pipeline a tile's
    # results wait until the next tile is summed.
    cdef int64_t tile, channels = job.grid.shape.channels
    cdef bint waiting = False
    for tile in range(first, last):
        if operation != OPERATION_INFER:
            run_items(kMapAndSum if waiting else kSum, job, tile, table, scratch)
            finish_tile(job, given, operation, share(channels, job.plan.tiles, tile),
                        share(channels, job.plan.tiles, tile + 1), table)
        waiting = operation != OPERATION_MOMENTS and job.plan.pipelined and tile < last - 1
        if operation != OPERATION_MOMENTS and not waiting:
            run_items(kMap, job, tile, table, scratch)


cdef int run(Job[storage]& job, Parameters& given, Operation operation, Shape shape, double* mean,
             double* invstd, int threads) except -1:
    # A job whose arrays have their places.
    cdef int64_t channels = shape.channels
    job.grid = make_map_grid(shape) if operation == OPERATION_INFER else make_grid(shape)
    cdef Traffic traffic
    traffic.itemsize = sizeof(storage)
    traffic.inputs = 1 if job.dy.data == NULL else 2
    traffic.passes = 1 if operation == OPERATION_MOMENTS or operation == OPERATION_INFER else 2
    traffic.adjoining = channels_adjoin(job)
    job.gapless = rows_adjoin(job)
    job.plan = make_plan(job.grid, traffic, threads, caches)
    if shape.columns and not rows_alike(job):
        job.plan.pipelined = False
    job.mask, job.relu = given.mask, given.relu
    job.fixed = operation == OPERATION_INFER_BACKWARD

    # Five coefficients per channel, the same as the loops want them, a table of partial sums for
    # every tile under way, and what each thread works with.
    cdef int64_t table_size = 0, scratch_size = bytes_of_scratch(job)
    if operation != OPERATION_INFER:
        table_size = job.grid.parts * job.plan.tile_channels
    cdef int outer = job.plan.outer_threads
    cdef size_t size = (5 * channels * sizeof(double) + bytes_of_table(job)
                        + outer * table_size * sizeof(Sums)
                        + outer * job.plan.inner_threads * scratch_size)
    cdef double* memory = <double*> malloc(size)
    if memory == NULL:
        raise MemoryError(f"{size} bytes for partial sums")
    # From here on nothing fails, and results are written.
    if job.mask != NULL and (operation == OPERATION_TRAIN or operation == OPERATION_INFER):
        # The bits beyond the last element: no run of elements owns them.
        job.mask[(channels * values_of(job.grid.shape) - 1) // 8] = 0
    job.channels.mean = mean
    job.channels.invstd = memory if invstd == NULL else invstd
    job.channels.scale = memory + channels
    job.channels.shift = memory + 2 * channels
    job.channels.mean_dy = memory + 3 * channels
    job.channels.slope = memory + 4 * channels
    cdef char* rest = <char*> (memory + 5 * channels)
    place_table(job, rest)
    cdef Sums* tables = <Sums*> (rest + bytes_of_table(job))
    cdef char* scratch = <char*> (tables + outer * table_size)
    cdef int64_t strand, c
    with nogil:
        if operation != OPERATION_MOMENTS and operation != OPERATION_TRAIN:
            for c in range(channels):
                prepare_channel(job, given, c)
        if outer == 1:
            run_tiles(job, given, operation, 0, job.plan.tiles, tables, scratch)
        else:
            for strand in prange(outer, num_threads=outer, schedule="static"):
                run_tiles(job, given, operation, job.plan.tiles * strand // outer,
                          job.plan.tiles * (strand + 1) // outer, tables + strand * table_size,
                          scratch + strand * scratch_size)
    free(memory)
    return 0


cdef int place_and_run(Job[storage]& job, Parameters& given, Operation operation, geometry,
                       Arrays arrays, double* mean, double* invstd, int threads) except -1:
    cdef int64_t rows_per_plane = geometry.rows_per_plane
    cdef Shape shape
    shape.columns, shape.rows, shape.channels, shape.run = (
        geometry.columns, geometry.rows, geometry.channels, geometry.run)
    shape = folded_rows(shape)
    place(job.x, arrays.x, rows_per_plane)
    place(job.residual, arrays.residual, rows_per_plane)
    place(job.dy, arrays.dy, rows_per_plane)
    place(job.out, arrays.out, rows_per_plane)
    place(job.dresidual, arrays.dresidual, rows_per_plane)
    return run(job, given, operation, shape, mean, invstd, threads)


cdef int dispatch(Operation operation, geometry, Arrays arrays, double* mean, double* invstd,
                  Parameters& given, int threads) except -1:
    # To the instance for the values' type, by its buffer format; bfloat16, which has none, comes as
    # uint16.
    cdef Job[float] of_float
    cdef Job[double] of_double
    cdef Job[Half] of_half
    cdef Job[BFloat16] of_bfloat16
    cdef char kind = arrays.x.view.format[0]
    if kind == b"f":
        return place_and_run(of_float, given, operation, geometry, arrays, mean, invstd,
                             threads)
    if kind == b"d":
        return place_and_run(of_double, given, operation, geometry, arrays, mean, invstd,
                             threads)
    if kind == b"e":
        return place_and_run(of_half, given, operation, geometry, arrays, mean, invstd,
                             threads)
    return place_and_run(of_bfloat16, given, operation, geometry, arrays, mean, invstd,
                         threads)


cdef inline double* pointer(const double[::1] values) noexcept:
    # NULL for None. What an operation only reads shares a field with what another one fills, hence
    # the cast; prepare_channel and the finish functions write no field that came from here.
    if values is None:
        return NULL
    return <double*> &values[0]


cdef inline uint8_t* bits(const uint8_t[::1] mask) noexcept:
    # Backward reads the mask and does not write it.
    if mask is None:
        return NULL
    return <uint8_t*> &mask[0]


def moments(geometry, x, double[::1] mean, double[::1] m2, int num_threads):
    """Fill mean and m2 of every channel of x."""
    cdef Parameters given = Parameters(NULL, NULL, &m2[0], NULL, NULL, 0, NULL, False)
    cdef Arrays arrays = Arrays(geometry, x, None, None, None, None)
    dispatch(OPERATION_MOMENTS, geometry, arrays, &mean[0], NULL, given, num_threads)


def train(geometry, x, residual, y, uint8_t[::1] mask, bint relu, const double[::1] gamma,
          const double[::1] beta, double eps, double[::1] mean, double[::1] var,
          double[::1] invstd, int num_threads):
    """Fill y, the mask, mean, var (biased) and invstd (Ioffe & Szegedy 2015, Algorithm 1)."""
    cdef Parameters given = Parameters(pointer(gamma), pointer(beta), &var[0], NULL, NULL, eps,
                                       bits(mask), relu)
    cdef Arrays arrays = Arrays(geometry, x, residual, None, y, None)
    dispatch(OPERATION_TRAIN, geometry, arrays, &mean[0], &invstd[0], given, num_threads)


def infer(geometry, x, residual, y, uint8_t[::1] mask, bint relu, const double[::1] mean,
          const double[::1] var, const double[::1] gamma, const double[::1] beta, double eps,
          int num_threads):
    """Fill y and the mask from given statistics (Algorithm 2, line 11)."""
    cdef Parameters given = Parameters(pointer(gamma), pointer(beta), pointer(var), NULL, NULL, eps,
                                       bits(mask), relu)
    cdef Arrays arrays = Arrays(geometry, x, residual, None, y, None)
    dispatch(OPERATION_INFER, geometry, arrays, pointer(mean), NULL, given, num_threads)


def backward(geometry, x, dy, dx, dresidual, const uint8_t[::1] mask, bint relu,
             const double[::1] mean, const double[::1] invstd, const double[::1] gamma,
             const double[::1] beta, double[::1] dgamma, double[::1] dbeta, int num_threads):
    """Fill dx, dresidual, dgamma and dbeta for batch statistics (section 3, below Algorithm 1)."""
    cdef Parameters given = Parameters(pointer(gamma), pointer(beta), NULL, &dgamma[0], &dbeta[0],
                                       0, bits(mask), relu)
    cdef Arrays arrays = Arrays(geometry, x, None, dy, dx, dresidual)
    dispatch(OPERATION_BACKWARD, geometry, arrays, pointer(mean), pointer(invstd), given,
             num_threads)


def infer_backward(geometry, x, dy, dx, dresidual, const uint8_t[::1] mask, bint relu,
                   const double[::1] mean, const double[::1] var, const double[::1] gamma,
                   const double[::1] beta, double eps, double[::1] dgamma, double[::1] dbeta,
                   int num_threads):
    """Fill dx, dresidual, dgamma and dbeta where mean and var are constants."""
    cdef Parameters given = Parameters(pointer(gamma), pointer(beta), pointer(var), &dgamma[0],
                                       &dbeta[0], eps, bits(mask), relu)
    cdef Arrays arrays = Arrays(geometry, x, None, dy, dx, dresidual)
    dispatch(OPERATION_INFER_BACKWARD, geometry, arrays, pointer(mean), NULL, given, num_threads)


def tile_plan(bint columns, int64_t rows, int64_t channels, int64_t run, *, int64_t itemsize=4,
              int64_t inputs=1, int64_t passes=2, int64_t threads=1, int64_t l2=1 << 20,
              int64_t l3=8 << 20, bint adjoining=True):
    """Return the grid and the plan for a problem on a given machine, as one dict (for tests)."""
    cdef Shape shape
    shape.columns, shape.rows, shape.channels, shape.run = columns, rows, channels, run
    shape = folded_rows(shape)
    cdef Grid grid = make_grid(shape)
    cdef Traffic traffic
    traffic.itemsize, traffic.inputs, traffic.passes = itemsize, inputs, passes
    traffic.adjoining = adjoining
    cdef Plan plan = make_plan(grid, traffic, threads, Caches(l2, l3))
    return {
        "rows": grid.shape.rows,
        "fold": grid.shape.fold,
        "last": grid.shape.last,
        "piece_rows": grid.piece_rows,
        "segments": grid.segments,
        "pieces": grid.pieces,
        "parts": grid.parts,
        "whole_rows": bool(grid.whole_rows),
        "tile_channels": plan.tile_channels,
        "tiles": plan.tiles,
        "units": plan.units,
        "outer_threads": plan.outer_threads,
        "inner_threads": plan.inner_threads,
        "stream": bool(plan.stream),
        "pipelined": bool(plan.pipelined),
    }


def set_cache_sizes(int64_t l2, int64_t l3):
    """Say how large one core's L2 and the shared L3 are, in bytes."""
    caches.l2, caches.l3 = l2, l3


def max_threads():
    """Return what OpenMP would use for a parallel region of the calling thread."""
    return omp_get_max_threads()


def openmp():
    """Return the date of the OpenMP standard that this module was built with, 0 for none."""
    return openmp_standard


def level():
    """Return the instruction level that this module was compiled for."""
    return BNCPU_LEVEL.decode()


include "plain.pxi"
include "streams.pxi"
