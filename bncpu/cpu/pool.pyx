# cython: language_level=3, freethreading_compatible=True
"""New arrays for large results, in memory that earlier ones have left (pool.hpp says why).

They are ordinary NumPy arrays that own their memory; when one is gone its memory is kept, up to a
limit, and the next of its size begins where the pages are there already.
"""

from cpython.pycapsule cimport PyCapsule_New

import numpy

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMem_Handler:
        pass

    object PyDataMem_SetHandler(object handler)
    int import_array "_import_array"() except -1

cdef extern from "pool.hpp" namespace "bncpu":
    PyDataMem_Handler pool_handler

    cdef cppclass Pool:
        void set_limit(size_t) nogil
        size_t limit() nogil
        size_t kept() nogil

    Pool& pool() nogil

import_array()

# NumPy asks for huge pages from this size on, and below it a page fault is rare.
cdef size_t LEAST = 4 << 20

cdef object handler = PyCapsule_New(&pool_handler, "mem_handler", NULL)


def empty_like(x):
    """Return an uninitialised ndarray of x's shape, dtype and order of axes in memory."""
    if x.nbytes < LEAST or pool().limit() == 0:
        return numpy.empty_like(x, subok=False)
    before = PyDataMem_SetHandler(handler)
    try:
        return numpy.empty_like(x, subok=False)
    finally:
        PyDataMem_SetHandler(before)


def set_limit(size_t nbytes):
    """Keep at most so many bytes for later results; 0 frees them, and later ones at once."""
    pool().set_limit(nbytes)


def limit():
    """Return how many bytes are kept at most."""
    return pool().limit()


def kept():
    """Return how many bytes are kept now."""
    return pool().kept()
