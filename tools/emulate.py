"""Runs the kernels' tests as another processor would, under QEMU's user emulation.

    tools/emulate.py nehalem     an old x86-64, whose highest level is x86_64_v2
    tools/emulate.py haswell     one of x86_64_v3
    tools/emulate.py conroe      one below them all: the import must say that nothing runs on it
    tools/emulate.py aarch64     kernels that are cross-compiled, an interpreter of that processor

What is compiled here is compiled as it is shipped; what is emulated says nothing of speed. For
x86-64 it needs qemu-user-static; for aarch64 g++-aarch64-linux-gnu too, and Debian's apt-get, which
fetches that processor's Python into the work folder and installs nothing. All that is made is kept
there, and made anew where the sources are newer.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ("*.hpp", "*.pyx", "*.pxi")
NEEDS = ("numpy>=2.2", "pytest>=8", "hypothesis>=6.100", "ml_dtypes>=0.4", "threadpoolctl>=3.5")
BUILD_NEEDS = ("cmake>=3.20", "ninja", "cython>=3.1", "cython-cmake>=0.3")

# A tenth of the speed, or less: what computes is tested whole but for its longest grids.
TESTS = (
    *("train", "infer", "backward", "fused", "half", "moments", "layouts", "signs", "plain"),
    *("threads", "levels", "import", "tiling"),
)


@dataclass(frozen=True)
class Machine:
    """A processor as QEMU knows it, and what must be chosen on it ("" where nothing can run)."""

    program: str
    level: str
    cpu: str = "max"
    # Options of pytest.
    options: tuple[str, ...] = ()

    @property
    def command(self):
        """What an interpreter is run by."""
        return [shutil.which(self.program), "-cpu", self.cpu]


MACHINES = {
    "nehalem": Machine("qemu-x86_64-static", "x86_64_v2", "Nehalem"),
    # Without what QEMU would complain of to everybody who reads what a test's process has said.
    "haswell": Machine(
        "qemu-x86_64-static",
        "x86_64_v3",
        "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid",
    ),
    "conroe": Machine("qemu-x86_64-static", "", "Conroe"),
    # What is cross-compiled is no installed distribution.
    "aarch64": Machine(
        "qemu-aarch64-static",
        "aarch64",
        options=("--deselect=tests/test_import.py::test_version_is_that_of_the_distribution",),
    ),
}

# NumPy's own modules need x86_64_v2, so where nothing runs `import numpy` has failed before. What
# is ours and runs before the choice must still run, and say so: so without pool, which needs NumPy.
NOTHING_RUNS = """
import sys, types
package = types.ModuleType("bncpu")
package.__path__ = [sys.argv[1]]
sys.modules |= {"bncpu": package, "bncpu.cpu.pool": types.ModuleType("pool")}
try:
    import bncpu.cpu
except ImportError as error:
    print(error)
    sys.exit("no compiled level runs on this machine" not in str(error))
sys.exit("a level was chosen: " + bncpu.cpu.level)
"""


class EmulationError(Exception):
    """A step did not succeed, or something is missing; the text says what."""


def run(*command, **options):
    """Run a command, and show it."""
    command = [str(word) for word in command]
    print("$", shlex.join(command), flush=True)
    if subprocess.run(command, check=False, **options).returncode:
        raise EmulationError(f"this failed: {shlex.join(command)}")


def output_of(*command, **options):
    """Return what a command prints."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise EmulationError(f"this failed: {shlex.join(map(str, command))}\n{done.stderr}")
    return done.stdout.strip()


def demand(program, package):
    """Raise if a program is not installed."""
    if shutil.which(program) is None:
        raise EmulationError(f"{program}: not found; Debian: apt install {package}")


def is_older(made, sources):
    """Whether something is missing, or older than what it is made from."""
    return not made.exists() or made.stat().st_mtime < max(p.stat().st_mtime for p in sources)


def sources():
    """Return the files that the installed package depends on."""
    native = [path for pattern in NATIVE for path in (ROOT / "bncpu" / "cpu").glob(pattern)]
    python = (ROOT / "bncpu").rglob("*.py")
    return [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", *native, *python]


def emulated_python(interpreter, machine, *options):
    """Return a program beside an interpreter that is this interpreter on that machine.

    It names itself as the interpreter, so that sys.executable is emulated as well.
    """
    path = interpreter.with_name(f"emulated-{machine.cpu.partition('-')[0].lower()}")
    words = shlex.join([*machine.command, *options, "-0"])
    path.write_text(f'#!/bin/sh\nexec {words} "$0" {shlex.quote(str(interpreter))} "$@"\n')
    path.chmod(0o755)
    return path


def installed_x86_64(work, machine):
    """Return a Python of this processor that is emulated, and has the package of this tree."""
    home = work / "x86_64"
    python, stamp = home / "bin" / "python", home / "installed"
    if is_older(stamp, sources()):
        venv.create(home, with_pip=True, clear=True)
        run(python, "-m", "pip", "install", "--quiet", ROOT, *NEEDS)
        stamp.touch()
    return emulated_python(python, machine)


def foreign_root(root, folder, packages):
    """Fetch Debian packages of aarch64, and what they depend on, and unpack them in a folder."""
    lists, archives = folder / "lists", folder / "archives"
    for path in (lists / "partial", archives / "partial", root):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::Cache": folder,
        "Dir::Cache::archives": archives,
        "Dir::State::lists": lists,
        "Dir::State::status": folder / "status",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    run(*apt, "update")
    run(*apt, "install", "--yes", "--download-only", *packages, stdout=subprocess.DEVNULL)
    unpack(archives, root)
    # Its headers alone: the C library's are the cross compiler's.
    run(*apt, "download", f"lib{python_of(root).name}-dev", cwd=archives)
    unpack(archives, root)


def unpack(archives, root):
    """Unpack all packages of a folder."""
    for package in archives.glob("*.deb"):
        output_of("dpkg-deb", "--extract", package, root)


def installed_aarch64(work, machine):
    """Return an emulated Python of aarch64 that has the package of this tree, cross-compiled."""
    demand("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    demand("apt-get", "apt")
    home, root = work / "aarch64", work / "aarch64" / "root"
    host, site, stamp = home / "host", home / "site", home / "packages"
    if not stamp.exists():
        foreign_root(root, home / "apt", ("python3", "libgomp1", "libstdc++6"))
        venv.create(host, with_pip=True, clear=True)
        pip = [host / "bin" / "python", "-m", "pip", "install", "--quiet"]
        run(*pip, *BUILD_NEEDS)
        tags = [f"manylinux{tag}_aarch64" for tag in ("2014", "_2_17", "_2_27", "_2_28")]
        platforms = [word for tag in (*tags, "any") for word in ("--platform", tag)]
        version = python_of(root).name.removeprefix("python")
        of_python = ("--python-version", version, "--implementation", "cp", *platforms)
        run(*pip, "--target", site, "--only-binary=:all:", *of_python, *NEEDS)
        stamp.touch()
    os.environ["PYTHONPATH"] = str(site)
    python = emulated_python(python_of(root), machine, "-L", str(root))
    if is_older(home / "built", sources()):
        cross_compile(home, python)
        (home / "built").touch()
    return python


def python_of(root):
    """Return the interpreter in a folder of unpacked packages."""
    version = next(root.glob("usr/lib/python3.*/os.py")).parent.name
    return root / "usr" / "bin" / version


def cross_compile(home, python):
    """Build the native modules for an emulated Python and put the package beside its packages.

    CMake asks that Python for its headers, NumPy's and the names of modules; all that computes for
    long, Cython and the compiler, is of this machine.
    """
    bin_, build, site = home / "host" / "bin", home / "build", home / "site"
    environment = {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    where = "import cython_cmake as c, pathlib; print(pathlib.Path(c.__file__).parent / 'cmake')"
    found = home / "found.cmake"
    found.write_text("set(CMAKE_CROSSCOMPILING FALSE)\n")
    variables = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
        "CMAKE_CXX_FLAGS": f"-isystem {home / 'root' / 'usr' / 'include'}",
        "CMAKE_MODULE_PATH": output_of(bin_ / "python", "-c", where),
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        # Its Python runs here like any other: CMake may ask it as if nothing were foreign.
        "CMAKE_PROJECT_bncpu_INCLUDE": found,
        "CYTHON_EXECUTABLE": bin_ / "cython",
        "Python_EXECUTABLE": python,
        "BNCPU_WERROR": "ON",
    }
    options = [f"-D{name}={value}" for name, value in variables.items()]
    shutil.rmtree(build, ignore_errors=True)
    run(bin_ / "cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options, env=environment)
    run(bin_ / "cmake", "--build", build, env=environment)
    shutil.rmtree(site / "bncpu", ignore_errors=True)
    compiled = shutil.ignore_patterns("*.so", "__pycache__", *NATIVE)
    shutil.copytree(ROOT / "bncpu", site / "bncpu", ignore=compiled)
    run(bin_ / "cmake", "--install", build, "--prefix", site, env=environment)


def check_level(work, python, machine):
    """Raise unless this machine chooses its level, and the kernels say so themselves."""
    code = "import bncpu.cpu as c; print(c.level, c.kernels.level(), *c.runnable_levels())"
    chosen, compiled, *runnable = output_of(python, "-c", code, cwd=work).split()
    print(f"chosen: {chosen}; runnable: {', '.join(runnable)}")
    if not chosen == compiled == runnable[-1] == machine.level:
        raise EmulationError(
            f"expected {machine.level} to be chosen; got {chosen}, compiled for {compiled}"
        )


def check_refusal(work, python):
    """Raise unless the import says that no level runs here; with the code of this installation."""
    code = "import importlib.util as u; print(u.find_spec('bncpu').origin)"
    package = Path(output_of(python, "-c", code, cwd=work)).parent
    print(f"importing bncpu.cpu of {package}")
    print(output_of(python, "-c", NOTHING_RUNS, package, cwd=work))


def run_tests(work, python, machine, options):
    """Run the tests away from the tree, so that it is the installed package that they import."""
    away = work / "tests"
    shutil.rmtree(away, ignore_errors=True)
    shutil.copytree(ROOT / "tests", away / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", away)
    chosen = [] if any(re.search(r"\.py(::|$)", word) for word in options) else TESTS
    files = [f"tests/test_{name}.py" for name in chosen]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *machine.options)
    run(python, *pytest, *files, *options, cwd=away, env=environment)


def main():
    """Emulate what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("machine", choices=MACHINES)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "emulate", help="default: %(default)s"
    )
    parser.add_argument(
        "tests", nargs=argparse.REMAINDER, help="what pytest is given, instead of all tests of it"
    )
    chosen = parser.parse_args()
    machine, work = MACHINES[chosen.machine], chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        demand(machine.program, "qemu-user-static")
        install = installed_aarch64 if chosen.machine == "aarch64" else installed_x86_64
        python = install(work, machine)
        if not machine.level:
            check_refusal(work, python)
        else:
            check_level(work, python, machine)
            run_tests(work, python, machine, chosen.tests)
    except EmulationError as error:
        sys.exit(f"emulate: {error}")
    print(f"emulate: {chosen.machine}: passed")


if __name__ == "__main__":
    main()
