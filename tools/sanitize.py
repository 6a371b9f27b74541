"""Run the kernels under clang's sanitizers, over a grid of calls and faults they must find.

AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer, each in a build of its own
under build/sanitize that Python loads, run tests/under_sanitizers.py. A finding ends the run.

Of undefined behaviour: alignment, bounds, bool, enum, builtin, division of integers by zero,
shifts, overflow of signed integers and pointers, floats too large for an integer. Division of
floats by zero and float64 beyond float32 are IEEE's infinities; unsigned integers may wrap. Arrays
come from malloc in their exact size (PYTHONMALLOC=malloc; NumPy's cache of small blocks goes by
size, and hides no more than a use after free), between poisoned bytes, 128 at least. Leaks are not
looked for: Python's own are many.

ThreadSanitizer knows from libarcher where the threads of LLVM's OpenMP runtime fork, join and wait;
libgomp, whose futexes it does not see, has nothing of the kind. Python and NumPy are not
instrumented: what they access is ignored (ignore_noninstrumented_modules), so races between them
and a kernel are hidden, those within kernels are not. Vectors wider than 16 bytes and masked ones
it passes over; of these seen_by_tsan.hpp tells it. It
says nothing of a race whose first access it has forgotten (history_size, at its largest), so that
small problems show more than large ones: a thread starts for a kilobyte in that build
(BNCPU_BYTES_PER_THREAD).
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bncpu.cpu

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ("cmake", "ninja", "cython", "cython-cmake")
COMPILERS = ("clang++", *(f"clang++-{version}" for version in range(25, 14, -1)))
MOST_SECONDS = {"build": 3600, "plant": 300, "grid": 7200}

# What a process that is watched finds in its environment.
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:redzone=128:max_redzone=2048:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    },
    "thread": {
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66"
        ":history_size=7",
        "OMP_WAIT_POLICY": "passive",
    },
}
# The faults that must be found, and what the sanitizer says of each.
PLANTS = {
    "address": {
        "read_beyond": "heap-buffer-overflow",
        "write_beyond": "heap-buffer-overflow",
        "write_beyond_in_columns": "heap-buffer-overflow",
        "overflow": "signed integer overflow",
    },
    "thread": {"write_twice": "data race", "read_while_written": "data race"},
}


def found(name, *, compiler):
    """Return the path of a library of the compiler's, or end."""
    printed = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if Path(printed).is_absolute():
        return printed
    beside = Path(compiler).resolve().parent.parent / "lib" / name
    if beside.exists():
        return str(beside)
    sys.exit(
        f"{compiler} has no {name} (Debian: apt install clang-16 libclang-rt-16-dev libomp-16-dev)"
    )


def cxx():
    """Return the path of clang++, CXX before others."""
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        path = shutil.which(name)
        if path and "clang" in Path(name).name:
            return path
    sys.exit(
        "no clang++ (Debian: apt install clang-16 libclang-rt-16-dev libomp-16-dev), nor in CXX"
    )


def build(kind, levels, *, compiler):
    """Compile the package for a sanitizer; return the folder to import it from."""
    folder = ROOT / "build" / "sanitize" / kind
    site = folder / "site"
    modules = importlib.util.find_spec("cython_cmake")
    if modules is None or not all(map(shutil.which, NEEDS[:3])):
        sys.exit(f"the build needs {', '.join(NEEDS)}: {sys.executable} -m pip install ...")
    made = [
        [
            *("cmake", "-S", ROOT, "-B", folder / "cmake", "-G", "Ninja"),
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DCMAKE_MODULE_PATH={Path(modules.origin).parent / 'cmake'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DBNCPU_SANITIZE={kind}",
            f"-DBNCPU_LEVELS={';'.join(levels)}",
        ],
        ["cmake", "--build", folder / "cmake"],
    ]
    shutil.rmtree(site, ignore_errors=True)
    for command in made:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=MOST_SECONDS["build"],
        )
        if done.returncode:
            sys.exit(f"{kind}: the build failed\n{done.stdout}{done.stderr}")
    shutil.copytree(
        ROOT / "bncpu",
        site / "bncpu",
        ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"),
    )
    for module in (folder / "cmake").glob("*.so"):
        shutil.copy2(module, site / "bncpu" / "cpu")
    return site


def watched(kind, site, arguments, *, compiler, most):
    """Run tests/under_sanitizers.py in a process that the sanitizer watches."""
    runtime = {"address": "asan", "thread": "tsan"}[kind]
    library = found(f"libclang_rt.{runtime}-{platform.machine()}.so", compiler=compiler)
    environment = os.environ | OPTIONS[kind]
    environment |= {
        "LD_PRELOAD": library,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "tests")]),
        "PYTHONMALLOC": "malloc",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    symbols = Path(compiler).resolve().parent / "llvm-symbolizer"
    if symbols.exists():
        names = {"address": ("ASAN", "UBSAN"), "thread": ("TSAN",)}[kind]
        environment |= {f"{name}_SYMBOLIZER_PATH": str(symbols) for name in names}
    command = [sys.executable, "-P", ROOT / "tests" / "under_sanitizers.py", kind, *arguments]
    if kind == "thread":
        environment["OMP_TOOL_LIBRARIES"] = found("libarcher.so", compiler=compiler)
        # Its shadow of memory wants addresses that are not random.
        command = ["setarch", "-R", *command]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=most
    )


def check(kind, level, site, *, compiler, options, dtypes):
    """Run the plants and the grid of one level; return what the grid counted."""
    for plant, said in PLANTS[kind].items():
        for dtype in dtypes:
            how = [level, "--plant", plant, "--dtype", dtype]
            done = watched(kind, site, how, compiler=compiler, most=MOST_SECONDS["plant"])
            at = f"kernels_{level}"
            if done.returncode == 0 or said not in done.stderr or at not in done.stderr:
                sys.exit(
                    f"{kind}, {level}: the planted fault {plant} in {dtype} was not found\n"
                    f"{done.stdout}{done.stderr}"
                )
            if said == "signed integer overflow":
                break  # of no dtype
    done = watched(kind, site, [level, *options], compiler=compiler, most=MOST_SECONDS["grid"])
    if done.returncode:
        sys.exit(f"{kind}, {level}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Build and run what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smaller grid and one level: a check of every change"
    )
    parser.add_argument("--kind", choices=OPTIONS, help="one of the two sanitizers (default: both)")
    parser.add_argument(
        "--levels", nargs="+", help="kernels to compile and run (default: all that run here)"
    )
    parser.add_argument("--seed", default="0", help="of the grid's random numbers")
    options = parser.parse_args()
    compiler = cxx()
    runnable = bncpu.cpu.runnable_levels()
    levels = options.levels or runnable[: 1 if options.quick else None]
    if not set(levels) <= set(runnable):
        parser.error(f"--levels: expected some of {', '.join(runnable)}; got {', '.join(levels)}")
    dtypes = ("float32",) if options.quick else ("float32", "float64", "float16", "bfloat16")
    grid = ["--seed", options.seed, *(["--quick"] if options.quick else [])]

    def all_of(kind):
        start = time.monotonic()
        site = build(kind, levels, compiler=compiler)
        print(f"{kind}: built in {time.monotonic() - start:.0f} s", flush=True)
        for level in levels:
            start = time.monotonic()
            counts = check(kind, level, site, compiler=compiler, options=grid, dtypes=dtypes)
            print(
                f"{kind}, {level}: {counts['cases']} cases, {counts['calls']} calls, 0 errors, "
                f"all {len(PLANTS[kind])} planted faults found, {time.monotonic() - start:.0f} s",
                flush=True,
            )

    kinds = [options.kind] if options.kind else list(OPTIONS)
    with concurrent.futures.ThreadPoolExecutor(len(kinds)) as beside:
        for done in [beside.submit(all_of, kind) for kind in kinds]:
            done.result()


if __name__ == "__main__":
    main()
