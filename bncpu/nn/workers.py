"""The images of a batch shared out among threads, for layers whose work NumPy does on one.

NumPy lets other threads run while it copies, adds and multiplies large arrays. Every image is
computed as it would be alone, and results are bitwise the same for every number of threads.
"""

from collections.abc import Callable

from bncpu.threads import get_num_threads, share_out

# A second thread costs some 10 us, in which one copies about so many float32.
WORTH_A_THREAD = 1 << 15


def over_images(images: int, work: Callable[[slice], None], *, size: int) -> None:
    """Call `work` for slices that together are all images, each on a thread of its own.

    Parameters
    ----------
    images : int
        How many there are.
    work : callable
        Does what is to be done with the images of a slice, and writes to nothing of the others.
    size : int
        How many values pass through it; for a few a second thread costs more than it brings.
    """
    threads = min(get_num_threads(), images) if size >= WORTH_A_THREAD else 1
    if threads < 2:
        work(slice(0, images))
        return
    ends = [images * i // threads for i in range(threads + 1)]
    share_out(lambda i: work(slice(ends[i], ends[i + 1])), threads)
