# Plain calls, whole in compiled code: C-contiguous NumPy arrays with the channels on axis 1 or
# last, parameters of the right shape and dtype. Most calls are, and the checks in Python would cost
# them microseconds, tens of them where large arrays have just driven Python's own code and objects
# out of the caches. Everything else, and every error, is left to bncpu.functional: these functions
# then return None and have written nothing.

from cpython.long cimport PyLong_AsLongAndOverflow
from libc.math cimport INFINITY
from libc.string cimport memcpy

cimport numpy as cnp

from bncpu.cpu.pool import empty_like as large_like

cnp.import_array()

cdef enum:
    SHORT_RUN = 64  # as in bncpu.layout, which says why
    ROWS_FOR_COLUMNS = 4
    LARGE = 4 << 20  # bytes of a result for which the pool may have memory
    MOST_ARRAYS = 12
    MOST_VECTORS = 6


cdef inline bint is_plain(array, int kind) noexcept:
    return (cnp.PyArray_CheckExact(array) and cnp.PyArray_TYPE(array) == kind
            and cnp.PyArray_ISCARRAY_RO(array))


cdef inline bint is_vector(array, int kind, int64_t n) noexcept:
    return (is_plain(array, kind) and cnp.PyArray_NDIM(array) == 1
            and cnp.PyArray_DIM(array, 0) == n)


@cython.final
@cython.freelist(8)
cdef class Plain:
    """A call that is being recognised, array by array; what is taken has been checked.

    Every take_ method returns whether what it is given is as it is in a plain call. Pointers stay
    good for as long as the arguments that they are taken from.
    """

    cdef object x
    cdef int kind, real_kind  # NumPy's numbers of x's dtype and of its parameters'
    cdef Shape shape
    cdef Parameters given
    cdef double* mean
    cdef double* invstd
    cdef void* residual
    cdef void* dy
    cdef void* out
    cdef void* dresidual
    # What has been taken, in order: what is written later may not be among it.
    cdef int count
    cdef char* begin[MOST_ARRAYS]
    cdef char* end[MOST_ARRAYS]
    # One vector of doubles per parameter that comes as something else, or comes out.
    cdef double* memory
    cdef double* unused

    def __cinit__(self):
        self.given = Parameters(NULL, NULL, NULL, NULL, NULL, 0, NULL, False)
        self.mean = self.invstd = self.memory = NULL
        self.residual = self.dy = self.out = self.dresidual = NULL
        self.count = 0

    def __dealloc__(self):
        free(self.memory)

    cdef bint take_x(self, x, axis) except -1:
        cdef int dims, a, overflows
        cdef long at
        cdef int64_t channels, outer = 1, inner = 1
        if not cnp.PyArray_CheckExact(x) or type(axis) is not int:
            return False
        self.kind, dims = cnp.PyArray_TYPE(x), cnp.PyArray_NDIM(x)
        if self.kind not in (cnp.NPY_FLOAT32, cnp.NPY_FLOAT64, cnp.NPY_FLOAT16):
            return False
        if dims < 2 or not cnp.PyArray_ISCARRAY_RO(x):
            return False
        at = PyLong_AsLongAndOverflow(axis, &overflows)
        if at < 0:
            at += dims
        if overflows or not (at == 1 or at == dims - 1):
            return False
        for a in range(at):
            outer *= cnp.PyArray_DIM(x, a)
        for a in range(at + 1, dims):
            inner *= cnp.PyArray_DIM(x, a)
        channels = cnp.PyArray_DIM(x, at)
        if outer * channels * inner == 0:
            return False
        # The walk as bncpu.layout would have it.
        self.shape.channels = channels
        if channels == 1:
            self.shape.columns, self.shape.rows, self.shape.run = False, 1, outer * inner
        else:
            self.shape.columns = inner == 1 or (inner < SHORT_RUN and outer >= ROWS_FOR_COLUMNS)
            self.shape.rows, self.shape.run = outer, inner
        self.shape = folded_rows(self.shape)
        self.x = x
        self.real_kind = cnp.NPY_FLOAT64 if self.kind == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32
        self.note(x)
        self.memory = self.unused = <double*> malloc(MOST_VECTORS * channels * sizeof(double))
        if self.memory == NULL:
            raise MemoryError(f"{MOST_VECTORS * channels * sizeof(double)} bytes for parameters")
        return True

    cdef inline void note(self, array) noexcept:
        self.begin[self.count] = <char*> cnp.PyArray_DATA(array)
        self.end[self.count] = self.begin[self.count] + cnp.PyArray_NBYTES(array)
        self.count += 1

    cdef inline double* vector(self) noexcept:
        # Room for one value per channel.
        cdef double* values = self.unused
        self.unused += self.shape.channels
        return values

    cdef bint take_vector(self, array, int kind, double** to) noexcept:
        cdef int64_t c
        if not is_vector(array, kind, self.shape.channels):
            return False
        self.note(array)
        if kind == cnp.NPY_FLOAT64:
            to[0] = <double*> cnp.PyArray_DATA(array)
            return True
        to[0] = self.vector()
        for c in range(self.shape.channels):
            to[0][c] = (<float*> cnp.PyArray_DATA(array))[c]
        return True

    cdef bint take_affine(self, gamma, beta) noexcept:
        return ((gamma is None
                 or self.take_vector(gamma, self.real_kind, <double**> &self.given.gamma))
                and (beta is None
                     or self.take_vector(beta, self.real_kind, <double**> &self.given.beta)))

    cdef bint take_statistic(self, array, double** to) noexcept:
        return (self.take_vector(array, cnp.NPY_FLOAT64, to)
                or self.take_vector(array, cnp.NPY_FLOAT32, to))

    cdef bint take_variance(self, array) noexcept:
        cdef int64_t c
        cdef bint negative = False
        if not self.take_statistic(array, &self.given.var):
            return False
        for c in range(self.shape.channels):
            negative |= self.given.var[c] < 0
        return not negative

    cdef bint take_epsilon(self, eps) noexcept:
        if type(eps) is not float:
            return False
        self.given.eps = eps
        return 0 <= self.given.eps < INFINITY

    cdef bint take_activation(self, activation, mask) noexcept:
        cdef int64_t nbytes = (cnp.PyArray_SIZE(self.x) + 7) // 8
        self.given.relu = activation is not None
        if self.given.relu and not (type(activation) is str and activation == "relu"):
            return False
        if mask is None:
            return True
        if not self.given.relu or not is_vector(mask, cnp.NPY_UINT8, nbytes):
            return False
        self.given.mask = <uint8_t*> cnp.PyArray_DATA(mask)
        return True

    cdef bint take_read_mask(self, mask) noexcept:
        if mask is not None:
            self.note(mask)
        return True

    cdef bint take_filled_mask(self, mask) noexcept:
        cdef void* ignored
        return mask is None or self.take_written(mask, 0, &ignored)

    cdef bint take_like_x(self, array, void** to) noexcept:
        if not is_plain(array, self.kind) or not cnp.PyArray_SAMESHAPE(array, self.x):
            return False
        to[0] = cnp.PyArray_DATA(array)
        self.note(array)
        return True

    cdef bint take_written(self, array, unsigned may_be, void** to) noexcept:
        # Bit i of may_be: it may be the very array that was taken as number i.
        cdef int i
        cdef char* begin = <char*> cnp.PyArray_DATA(array)
        cdef char* end = begin + cnp.PyArray_NBYTES(array)
        if not cnp.PyArray_ISWRITEABLE(array):
            return False
        for i in range(self.count):
            if (may_be >> i) & 1 and begin == self.begin[i] and end == self.end[i]:
                continue
            if begin < self.end[i] and self.begin[i] < end:
                return False
        to[0] = begin
        self.note(array)
        return True

    cdef bint take_result(self, array, unsigned may_be, void** to) noexcept:
        return (is_plain(array, self.kind) and cnp.PyArray_SAMESHAPE(array, self.x)
                and self.take_written(array, may_be, to))

    cdef bint take_running(self, mean, var) noexcept:
        cdef void* ignored
        for array in (mean, var):
            if not ((is_vector(array, cnp.NPY_FLOAT32, self.shape.channels)
                     or is_vector(array, cnp.NPY_FLOAT64, self.shape.channels))
                    and self.take_written(array, 0, &ignored)):
                return False
        return True

    cdef new_result(self, void** to):
        x = self.x
        if cnp.PyArray_NBYTES(x) >= LARGE:
            new = large_like(x)
        else:
            new = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), self.kind, 0)
        to[0] = cnp.PyArray_DATA(new)
        return new

    cdef int run(self, Operation operation, int threads) except -1:
        cdef Job[float] of_float
        cdef Job[double] of_double
        cdef Job[Half] of_half
        if self.kind == cnp.NPY_FLOAT32:
            return run_plain(of_float, self, operation, threads)
        if self.kind == cnp.NPY_FLOAT64:
            return run_plain(of_double, self, operation, threads)
        return run_plain(of_half, self, operation, threads)


cdef inline void place_plain(View[storage]& view, void* data, const Shape& shape) noexcept:
    view.data = <storage*> data
    view.row = shape.channels * shape.run
    view.channel = shape.run


cdef int run_plain(Job[storage]& job, Plain call, Operation operation, int threads) except -1:
    place_plain(job.x, cnp.PyArray_DATA(call.x), call.shape)
    place_plain(job.residual, call.residual, call.shape)
    place_plain(job.dy, call.dy, call.shape)
    place_plain(job.out, call.out, call.shape)
    place_plain(job.dresidual, call.dresidual, call.shape)
    return run(job, call.given, operation, call.shape, call.mean, call.invstd, threads)


cdef cnp.ndarray new_vector(int64_t n, double** to):
    cdef cnp.npy_intp size = n
    cdef cnp.ndarray vector = cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0)
    to[0] = <double*> cnp.PyArray_DATA(vector)
    return vector


cdef cnp.ndarray as_vector(const double* values, int64_t n, int kind):
    cdef cnp.npy_intp size = n
    cdef cnp.ndarray vector = cnp.PyArray_EMPTY(1, &size, kind, 0)
    cdef int64_t c
    if kind == cnp.NPY_FLOAT64:
        memcpy(cnp.PyArray_DATA(vector), values, n * sizeof(double))
    else:
        for c in range(n):
            (<float*> cnp.PyArray_DATA(vector))[c] = <float> values[c]
    return vector


cdef void move_towards(array, const double* batch, double factor, double momentum,
                       int64_t channels) noexcept:
    # new = (1 - momentum) * old + momentum * batch * factor
    cdef int64_t c
    cdef float* single = <float*> cnp.PyArray_DATA(array)
    cdef double* twice = <double*> cnp.PyArray_DATA(array)
    for c in range(channels):
        if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
            single[c] = <float> ((1 - momentum) * single[c] + momentum * (batch[c] * factor))
        else:
            twice[c] = (1 - momentum) * twice[c] + momentum * (batch[c] * factor)


def plain_moments(x, axis, int threads):
    """Return (count, mean, m2) of a plain call, or None if it is another."""
    cdef Plain call = Plain()
    if not call.take_x(x, axis):
        return None
    mean = new_vector(call.shape.channels, &call.mean)
    m2 = new_vector(call.shape.channels, &call.given.var)
    call.run(OPERATION_MOMENTS, threads)
    return (values_of(call.shape), mean, m2)


def plain_train(x, gamma, beta, running_mean, running_var, momentum, eps, axis, residual,
                activation, mask, out, int threads):
    """Return (y, mean, invstd) of a plain call, or None if it is another."""
    cdef Plain call = Plain()
    cdef double m, weight = 0
    cdef bint update = running_mean is not None or running_var is not None
    if not (call.take_x(x, axis) and call.take_epsilon(eps) and call.take_affine(gamma, beta)
            and call.take_activation(activation, mask)):
        return None
    m = <double> values_of(call.shape)
    cdef unsigned may_be = 1 << call.count
    if m < 2 or not (residual is None or call.take_like_x(residual, &call.residual)):
        return None
    if residual is None:
        may_be = 0
    if not (call.take_filled_mask(mask)
            and (out is None or call.take_result(out, may_be, &call.out))):
        return None
    if update:
        if type(momentum) is not float or not call.take_running(running_mean, running_var):
            return None
        weight = momentum
        if not 0 <= weight <= 1:
            return None
    y = call.new_result(&call.out) if out is None else out
    mean = new_vector(call.shape.channels, &call.mean)
    invstd = new_vector(call.shape.channels, &call.invstd)
    call.given.var = call.vector()
    call.run(OPERATION_TRAIN, threads)
    if update:
        move_towards(running_mean, call.mean, 1, weight, call.shape.channels)
        move_towards(running_var, call.given.var, m / (m - 1), weight, call.shape.channels)
    return (y, mean, invstd)


def plain_infer(x, mean, var, gamma, beta, eps, axis, residual, activation, mask, out, int threads):
    """Return y of a plain call, or None if it is another."""
    cdef Plain call = Plain()
    if not (call.take_x(x, axis) and call.take_statistic(mean, &call.mean)
            and call.take_variance(var) and call.take_affine(gamma, beta)
            and call.take_epsilon(eps) and call.take_activation(activation, mask)):
        return None
    cdef unsigned may_be = 1
    if residual is not None:
        may_be |= 1 << call.count
        if not call.take_like_x(residual, &call.residual):
            return None
    if not (call.take_filled_mask(mask)
            and (out is None or call.take_result(out, may_be, &call.out))):
        return None
    y = call.new_result(&call.out) if out is None else out
    call.run(OPERATION_INFER, threads)
    return y


cdef plain_gradients(Plain call, Operation operation, dy, gamma, beta, residual, activation, mask,
                     out, int threads):
    # What the gradients of training and of inference share, after their statistics.
    cdef int64_t channels = call.shape.channels
    cdef unsigned is_dy
    if not (call.take_affine(gamma, beta) and call.take_activation(activation, mask)
            and call.take_read_mask(mask)):
        return None
    is_dy = 1 << call.count
    if not (call.take_like_x(dy, &call.dy)
            and (out is None or call.take_result(out, is_dy, &call.out))):
        return None
    dresidual = None
    if residual is not False:
        # Without an activation it is dy, or a copy.
        if mask is None or not (residual is True
                                or call.take_result(residual, is_dy, &call.dresidual)):
            return None
        dresidual = call.new_result(&call.dresidual) if residual is True else residual
    dx = call.new_result(&call.out) if out is None else out
    call.given.dgamma = call.vector()
    call.given.dbeta = call.vector()
    call.run(operation, threads)
    return (dx, as_vector(call.given.dgamma, channels, call.real_kind),
            as_vector(call.given.dbeta, channels, call.real_kind), dresidual)


def plain_backward(dy, x, mean, invstd, gamma, beta, axis, residual, activation, mask, out,
                   int threads):
    """Return (dx, dgamma, dbeta, dresidual) of a plain call, or None if it is another."""
    cdef Plain call = Plain()
    if not (call.take_x(x, axis) and call.take_statistic(mean, &call.mean)
            and call.take_statistic(invstd, &call.invstd)):
        return None
    return plain_gradients(call, OPERATION_BACKWARD, dy, gamma, beta, residual, activation, mask,
                           out, threads)


def plain_infer_backward(dy, x, mean, var, gamma, beta, eps, axis, residual, activation, mask, out,
                         int threads):
    """Return (dx, dgamma, dbeta, dresidual) of a plain call, or None if it is another."""
    cdef Plain call = Plain()
    if not (call.take_x(x, axis) and call.take_statistic(mean, &call.mean)
            and call.take_variance(var) and call.take_epsilon(eps)):
        return None
    return plain_gradients(call, OPERATION_INFER_BACKWARD, dy, gamma, beta, residual, activation,
                           mask, out, threads)
