# cython: language_level=3, freethreading_compatible=True
"""The threads on which the kernels run: Python functions on them, and whether they are there.

A pool of other threads would share the cores with the kernels' own, which after a call wait for the
next one without giving up theirs.

The threads of GNU OpenMP do not survive a fork, and a parallel region in the child would wait for
them for ever. Any fork is seen, also that of a server written in C, of which Python is not told.
"""

from cython.parallel cimport prange

cdef extern from *:
    """
    static int is_forked = 0;
    #if defined(_OPENMP) && !defined(_WIN32)
    #include <pthread.h>
    static void after_fork_in_child(void) { is_forked = 1; }
    static int watch_for_forks(void) { return pthread_atfork(NULL, NULL, after_fork_in_child); }
    #else
    // Without threads, or without fork, there is nothing to lose.
    static int watch_for_forks(void) { return 0; }
    #endif
    """
    bint is_forked
    int watch_for_forks() noexcept

if watch_for_forks() != 0:
    raise MemoryError("bncpu: no memory to be told of forks")


def forked():
    """Return whether this process is a fork's child, which has none of its parent's threads."""
    return is_forked


def share_out(work, int parts, int num_threads):
    """Call work(i) for i = 0 to parts - 1, each number on thread i % num_threads.

    An exception is raised here when all threads are done.
    """
    cdef int i
    for i in prange(parts, nogil=True, schedule="static", chunksize=1, num_threads=num_threads):
        with gil:
            work(i)
