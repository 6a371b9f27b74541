# Small plain calls, whole in compiled code: where a call takes a few microseconds, most of them
# would go to the checks in Python. What is recognised here is C-contiguous NumPy arrays with the
# channels on axis 1, parameters of the right shape and dtype, and work too small for a second
# thread; everything else, and every error, is left to bncpu.functional: these functions then return
# None and have written nothing.

from libc.math cimport INFINITY
from libc.string cimport memcpy

cimport numpy as cnp

cnp.import_array()

cdef enum:
    MOST_CHANNELS = 512  # of a small call; their parameters stand on the stack
    SHORT_RUN = 64  # as in bncpu.layout, which says why
    ROWS_FOR_COLUMNS = 4


cdef struct Small:
    # x, checked: its walk as bncpu.layout would have it, and its parameters.
    int kind
    Shape shape
    double eps
    bint relu
    bint with_gamma, with_beta
    double mean[MOST_CHANNELS]
    double var[MOST_CHANNELS]  # or invstd
    double gamma[MOST_CHANNELS]
    double beta[MOST_CHANNELS]


cdef inline bint is_plain(array, int kind) noexcept:
    return (cnp.PyArray_CheckExact(array) and cnp.PyArray_TYPE(array) == kind
            and cnp.PyArray_ISCARRAY_RO(array))


cdef inline bint is_vector(array, int kind, int64_t channels) noexcept:
    return (is_plain(array, kind) and cnp.PyArray_NDIM(array) == 1
            and cnp.PyArray_DIM(array, 0) == channels)


cdef bint take(array, int kind, int64_t channels, double* values) noexcept:
    # A vector's values as double, if it is one of that kind.
    cdef int64_t c
    if not is_vector(array, kind, channels):
        return False
    if kind == cnp.NPY_FLOAT64:
        memcpy(values, cnp.PyArray_DATA(array), channels * sizeof(double))
    else:
        for c in range(channels):
            values[c] = (<float*> cnp.PyArray_DATA(array))[c]
    return True


cdef bint take_statistic(array, int64_t channels, double* values) noexcept:
    return (take(array, cnp.NPY_FLOAT64, channels, values)
            or take(array, cnp.NPY_FLOAT32, channels, values))


cdef bint take_call(Small& call, x, gamma, beta, eps, axis, activation):
    cdef int kind, dims, a
    cdef int64_t n, channels, run = 1
    if not cnp.PyArray_CheckExact(x):
        return False
    kind, dims = cnp.PyArray_TYPE(x), cnp.PyArray_NDIM(x)
    if kind != cnp.NPY_FLOAT32 and kind != cnp.NPY_FLOAT64:
        return False
    if dims < 2 or not cnp.PyArray_ISCARRAY_RO(x) or cnp.PyArray_NBYTES(x) > kBytesPerThread:
        return False
    if type(axis) is not int or axis != 1 or type(eps) is not float:
        return False
    if not (activation is None or (type(activation) is str and activation == "relu")):
        return False
    call.kind, call.eps, call.relu = kind, eps, activation is not None
    if not 0 <= call.eps < INFINITY:
        return False
    n, channels = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1)
    for a in range(2, dims):
        run *= cnp.PyArray_DIM(x, a)
    if channels > MOST_CHANNELS or n * channels * run == 0:
        return False
    call.shape.channels = channels
    if channels == 1:
        call.shape.columns, call.shape.rows, call.shape.run = False, 1, n * run
    else:
        call.shape.columns = run == 1 or (run < SHORT_RUN and n >= ROWS_FOR_COLUMNS)
        call.shape.rows, call.shape.run = n, run
        call.shape = folded_rows(call.shape)
    call.with_gamma, call.with_beta = gamma is not None, beta is not None
    return ((gamma is None or take(gamma, kind, channels, call.gamma))
            and (beta is None or take(beta, kind, channels, call.beta)))


cdef void place_plain(View[real]& view, array, Small& call) noexcept:
    view.data = <real*> cnp.PyArray_DATA(array)
    view.planes = NULL
    view.rows_per_plane = call.shape.rows
    view.row = call.shape.channels * call.shape.run
    view.channel = call.shape.run


cdef int run_plain(Job[real]& job, Small& call, Operation operation, x, dy, out, double* dgamma,
                   double* dbeta) except -1:
    cdef Parameters given = Parameters(NULL, NULL, NULL, dgamma, dbeta, call.eps, NULL, call.relu)
    if call.with_gamma:
        given.gamma = call.gamma
    if call.with_beta:
        given.beta = call.beta
    if operation != OPERATION_BACKWARD:
        given.var = call.var
    place_plain(job.x, x, call)
    if dy is not None:
        place_plain(job.dy, dy, call)
    place_plain(job.out, out, call)
    cdef double invstd[MOST_CHANNELS]
    cdef int64_t channels = call.shape.channels
    if operation == OPERATION_BACKWARD:
        return run(job, given, operation, call.shape, call.mean, call.var, 1)
    run(job, given, operation, call.shape, call.mean, invstd, 1)
    if operation == OPERATION_TRAIN:
        memcpy(dgamma, invstd, channels * sizeof(double))
    return 0


cdef int run_small(Small& call, Operation operation, x, dy, out, double* dgamma,
                   double* dbeta) except -1:
    # In training, where there is no dgamma, invstd goes there.
    cdef Job[float] single
    cdef Job[double] twice
    if call.kind == cnp.NPY_FLOAT32:
        return run_plain(single, call, operation, x, dy, out, dgamma, dbeta)
    return run_plain(twice, call, operation, x, dy, out, dgamma, dbeta)


cdef cnp.ndarray new_like(x):
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)


cdef cnp.ndarray new_vector(const double* values, int64_t channels, int kind):
    cdef cnp.npy_intp n = channels
    cdef cnp.ndarray vector = cnp.PyArray_EMPTY(1, &n, kind, 0)
    cdef int64_t c
    if kind == cnp.NPY_FLOAT64:
        memcpy(cnp.PyArray_DATA(vector), values, channels * sizeof(double))
    else:
        for c in range(channels):
            (<float*> cnp.PyArray_DATA(vector))[c] = <float> values[c]
    return vector


cdef inline bint apart(a, b) noexcept:
    # Whether two plain arrays (or None) share no memory.
    if b is None:
        return True
    cdef char* first = <char*> cnp.PyArray_DATA(a)
    cdef char* second = <char*> cnp.PyArray_DATA(b)
    return (first + cnp.PyArray_NBYTES(a) <= second) or (second + cnp.PyArray_NBYTES(b) <= first)


cdef bint is_running(array, int64_t channels, x, gamma, beta) noexcept:
    return ((is_vector(array, cnp.NPY_FLOAT32, channels)
             or is_vector(array, cnp.NPY_FLOAT64, channels))
            and cnp.PyArray_ISWRITEABLE(array) and apart(array, x) and apart(array, gamma)
            and apart(array, beta))


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


def small_train(x, gamma, beta, running_mean, running_var, momentum, eps, axis, activation):
    """Return (y, mean, invstd) of a small plain call, or None if it is another."""
    cdef Small call
    cdef double invstd[MOST_CHANNELS]
    if not take_call(call, x, gamma, beta, eps, axis, activation):
        return None
    cdef int64_t channels = call.shape.channels
    cdef double m = <double> values_of(call.shape), weight = 0
    cdef bint update = running_mean is not None or running_var is not None
    if m < 2:
        return None
    if update:
        if type(momentum) is not float or not (
                is_running(running_mean, channels, x, gamma, beta)
                and is_running(running_var, channels, x, gamma, beta)
                and apart(running_mean, running_var)):
            return None
        weight = momentum
        if not 0 <= weight <= 1:
            return None
    y = new_like(x)
    run_small(call, OPERATION_TRAIN, x, None, y, invstd, NULL)
    if update:
        move_towards(running_mean, call.mean, 1, weight, channels)
        move_towards(running_var, call.var, m / (m - 1), weight, channels)
    return (y, new_vector(call.mean, channels, cnp.NPY_FLOAT64),
            new_vector(invstd, channels, cnp.NPY_FLOAT64))


def small_infer(x, mean, var, gamma, beta, eps, axis, activation):
    """Return y of a small plain call, or None if it is another."""
    cdef Small call
    cdef int64_t c
    if not (take_call(call, x, gamma, beta, eps, axis, activation)
            and take_statistic(mean, call.shape.channels, call.mean)
            and take_statistic(var, call.shape.channels, call.var)):
        return None
    for c in range(call.shape.channels):
        if call.var[c] < 0:
            return None
    y = new_like(x)
    run_small(call, OPERATION_INFER, x, None, y, NULL, NULL)
    return y


def small_backward(dy, x, mean, invstd, gamma, beta, axis, activation):
    """Return (dx, dgamma, dbeta) of a small plain call, or None if it is another."""
    cdef Small call
    cdef double dgamma[MOST_CHANNELS]
    cdef double dbeta[MOST_CHANNELS]
    if not (take_call(call, x, gamma, beta, 0.0, axis, activation) and is_plain(dy, call.kind)
            and cnp.PyArray_SAMESHAPE(dy, x)
            and take_statistic(mean, call.shape.channels, call.mean)
            and take_statistic(invstd, call.shape.channels, call.var)):
        return None
    dx = new_like(x)
    run_small(call, OPERATION_BACKWARD, x, dy, dx, dgamma, dbeta)
    return (dx, new_vector(dgamma, call.shape.channels, call.kind),
            new_vector(dbeta, call.shape.channels, call.kind))
