# cython: language_level=3, freethreading_compatible=True
"""Python functions on the threads on which the kernels run.

A pool of other threads would share the cores with the kernels' own, which after a call wait for the
next one without giving up theirs.
"""

from cython.parallel cimport prange


def share_out(work, int parts, int num_threads):
    """Call work(i) for i = 0 to parts - 1, each number on thread i % num_threads.

    An exception is raised here when all threads are done.
    """
    cdef int i
    for i in prange(parts, nogil=True, schedule="static", chunksize=1, num_threads=num_threads):
        with gil:
            work(i)
