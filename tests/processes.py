"""A program that starts children in every way there is, after its threads have computed something.

    python tests/processes.py                   all ways, as a table
    python tests/processes.py "os.fork" ...     some of them
    python tests/processes.py --json "os.fork"  one of them, for tests/test_processes.py

Every child computes the same problems as the parent did before, and the bits are compared. Nothing
here sets limits of time: a child that waits for threads that it does not have waits for ever.
"""

import argparse
import concurrent.futures
import ctypes
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
from forms import EVERYTHING, problem, run

import bncpu
from bncpu.threads import number_of_threads, share_out

CHILDREN = 2
WAYS = {}


def way(name):
    """Enter a function under a name: it returns what `work` returned in each of its children."""

    def enter(function):
        WAYS[name] = function
        return function

    return enter


@functools.cache
def problems():
    """Return one problem of whole tiles for each thread, and one whose tiles the threads share."""
    rng = np.random.default_rng(0)
    shapes = [(8, 64, 28, 28), (4, 2, 256, 256)]
    return [problem(rng, shape, np.dtype(np.float32)) for shape in shapes]


def threads_here():
    """Return how many threads this process has, or None where nobody knows."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else None


def work(_=None):
    """Compute all problems; return (get_num_threads(), threads that were started, digest)."""
    before = threads_here()
    digest = hashlib.sha256()
    share_out(lambda _: None, 2)
    for p in problems():
        results = run(EVERYTHING, p)
        # A child may ask for more than it gets.
        results["asked"] = bncpu.batch_norm_train(p.x, num_threads=2).y
        for name, array in sorted(results.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    started = None if before is None else threads_here() - before
    return bncpu.get_num_threads(), started, digest.hexdigest()


# ---- The forks of the operating system


def _forked(fork, work=work):
    """Run `work` in a child that fork() makes; return what it says."""
    read, write = os.pipe()
    child = fork()
    if child == 0:
        os.close(read)
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return tuple(json.loads(answer))


@way("os.fork")
def os_fork():
    with number_of_threads(2):  # the parent's wish, which a child does not grant
        return [_forked(os.fork) for _ in range(CHILDREN)]


@way("os.fork, and its child's")
def fork_of_a_fork():
    return [_forked(os.fork, lambda: _forked(os.fork))]


@way("fork in C")
def fork_in_c():
    # As a server written in C does it, which tells Python nothing.
    return [_forked(ctypes.PyDLL(None).fork)]


@way("os.fork beside a parallel region")
def fork_beside_a_region():
    """Fork while another thread computes on the team of threads."""
    stop, p = threading.Event(), problems()[0]

    def compute():
        while not stop.is_set():
            bncpu.batch_norm_train(p.x, num_threads=2)

    others = [threading.Thread(target=compute) for _ in range(2)]
    for other in others:
        other.start()
    try:
        time.sleep(0.05)
        return [_forked(os.fork) for _ in range(4)]
    finally:
        stop.set()
        for other in others:
            other.join()


@way("os.fork in a thread")
def fork_in_a_thread():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
        return [pool.submit(_forked, os.fork).result()]


# ---- multiprocessing and concurrent.futures


def _send(pipe):
    pipe.send(work())
    pipe.close()


def _in_processes(method, *, daemon=False):
    context = multiprocessing.get_context(method)
    children = []
    for _ in range(CHILDREN):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_send, args=(sender,), daemon=daemon)
        child.start()
        sender.close()
        children.append((child, receiver))
    results = [receiver.recv() for _, receiver in children]
    for child, _ in children:
        child.join()
        assert child.exitcode == 0, f"exit code {child.exitcode}"
    return results


def _in_pool(method):
    with multiprocessing.get_context(method).Pool(CHILDREN) as pool:
        return pool.map(work, range(2 * CHILDREN), chunksize=1)


def _in_executor(method):
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(CHILDREN, mp_context=context) as pool:
        return list(pool.map(work, range(2 * CHILDREN)))


METHODS = multiprocessing.get_all_start_methods()
for _method in METHODS:
    WAYS[f"multiprocessing.Process, {_method}"] = functools.partial(_in_processes, _method)
    WAYS[f"multiprocessing.Pool, {_method}"] = functools.partial(_in_pool, _method)
    WAYS[f"ProcessPoolExecutor, {_method}"] = functools.partial(_in_executor, _method)


@way("multiprocessing.Process, fork, daemon")
def daemons():
    return _in_processes("fork", daemon=True)


@way("multiprocessing.Pool, forkserver with bncpu preloaded")
def preloaded():
    """Let the server import bncpu and compute: its children are forks of one with threads."""
    # One that an earlier way has started has preloaded nothing.
    multiprocessing.forkserver._forkserver._stop()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.set_forkserver_preload(["processes_warm"])
    return _in_pool("forkserver")


@way("ThreadPoolExecutor")
def threads():
    with concurrent.futures.ThreadPoolExecutor(CHILDREN) as pool:
        return list(pool.map(work, range(2 * CHILDREN)))


# ---- joblib


def _in_joblib(backend):
    import joblib

    calls = (joblib.delayed(work)() for _ in range(2 * CHILDREN))
    return joblib.Parallel(n_jobs=CHILDREN, backend=backend)(calls)


for _backend in ("loky", "multiprocessing", "threading"):
    WAYS[f"joblib, {_backend}"] = functools.partial(_in_joblib, _backend)


# ---- A server that forks its workers


def _serve(listener, layer):
    """Answer every request, a batch of x's shape and type, with the layer's y; for ever."""
    x = problems()[0].x
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as stream:
            while request := stream.read(x.nbytes):
                y = layer.forward(np.frombuffer(request, x.dtype).reshape(x.shape))
                stream.write(y.tobytes())
                stream.write(json.dumps(work()).encode() + b"\n")
                stream.flush()


def _ask(address, times, expected):
    """Send requests over one connection; return what `work` returned beside each answer."""
    x, results = problems()[0].x, []
    with socket.create_connection(address) as connection, connection.makefile("rwb") as stream:
        for _ in range(times):
            stream.write(x.tobytes())
            stream.flush()
            assert stream.read(x.nbytes) == expected, "a worker answers other bits"
            results.append(tuple(json.loads(stream.readline())))
    return results


@way("a server that forks its workers")
def prefork():
    """Warm up, fork workers that serve several requests each, replace one, end and reap them."""
    layer = bncpu.BatchNorm(64)
    layer.forward(problems()[0].x)
    expected = layer.eval().forward(problems()[0].x).tobytes()
    workers = []

    def start_worker():
        worker = os.fork()
        if worker == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _serve(listener, layer)
        workers.append(worker)

    def end_worker(worker):
        os.kill(worker, signal.SIGTERM)
        _, status = os.waitpid(worker, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        for _ in range(CHILDREN):
            start_worker()
        with concurrent.futures.ThreadPoolExecutor(CHILDREN) as clients:
            results = list(clients.map(lambda _: _ask(address, 2, expected), range(CHILDREN)))
            end_worker(workers.pop(0))
            layer.forward(problems()[0].x)  # the parent's own threads serve it still
            start_worker()
            results += clients.map(lambda _: _ask(address, 2, expected), range(CHILDREN))
        for worker in workers:
            end_worker(worker)
    return [result for of_one in results for result in of_one]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", nargs="*", choices=[[], *WAYS], help="all, if none is named")
    parser.add_argument("--json", action="store_true", help="print what the children said")
    arguments = parser.parse_args()
    expected = work()
    if not arguments.json:
        print(f"parent: {expected[0]} threads, {bncpu.config()['openmp']}")
        print(f"{'way':<56} {'children':>8} {'threads':>7} {'started':>7} {'bits':>5} {'s':>6}")
    for name in arguments.way or WAYS:
        begin = time.perf_counter()
        results = [tuple(result) for result in WAYS[name]()]
        seconds = time.perf_counter() - begin
        # And the parent still has its threads.
        after = work()
        if arguments.json:
            print(json.dumps({"before": expected, "children": results, "after": after}))
            continue
        same = all(result[2] == expected[2] for result in [*results, after])
        threads, started = ({r[i] for r in results} for i in (0, 1))
        print(
            f"{name:<56} {len(results):>8} {'/'.join(map(str, sorted(threads))):>7} "
            f"{'/'.join(map(str, sorted(started))):>7} {'same' if same else 'OTHER':>5} "
            f"{seconds:>6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    # So that children find the functions in a module, as joblib's want them.
    import processes

    processes.main()
