"""Build, test and measure on a machine with an NVIDIA GPU: what `make gpu` runs, step by step.

Needs no network: this Python's own CuPy, PyTorch, pytest and build tools are used, and before them
the wheels found in .whl/. Nothing is installed outside build/gpu; the compiled modules stand in the
tree, as they do for `make test`. A step that fails or takes too long does not keep the later ones
from running; the table at the end says how each went, and log.txt holds what they printed.
Imports nothing of bncpu, which the first steps build.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "gpu"
# All steps together, and the most that each may take, in seconds.
ALL = 460
BUILD, LOOK, TESTS, SANITIZER, SPEED = 240, 60, 200, 60, 240
# Left by the tests, so that something is measured even where one of them hangs.
FOR_SPEED = 100
LOOK_AT_GPU = "import bncpu; from bncpu.backends import cupy; bncpu.show_config(); cupy()"


class Steps:
    """Commands in turn, each within the time that is left, and how they went."""

    def __init__(self, out):
        self.log, self.rows, self.end = out / "log.txt", [], time.monotonic() + ALL
        self.log.write_bytes(b"")

    def left(self):
        return self.end - time.monotonic()

    def run(self, name, command, seconds, *, keep=0.0, more=None):
        """Run a command within some seconds, and print and keep what it says.

        keep: seconds to leave for later steps.
        more: variables of its environment.
        """
        seconds = min(seconds, self.left() - keep)
        if seconds < 1:
            self.rows.append((name, "NO TIME LEFT", ""))
            return False
        command = [str(part) for part in command]
        title = f"\n==== {name}: {' '.join(command)}\n"
        print(title, end="", flush=True)
        begin, before = time.monotonic(), self.log.stat().st_size
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(import_paths())} | (more or {})
        with self.log.open("ab") as log:
            log.write(title.encode())
            log.flush()
            try:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                    check=False,
                )
                said = "FAILED" if done.returncode else "ok"
            except subprocess.TimeoutExpired:
                said = f"FAILED, over {seconds:.0f} s"
        text = self.log.read_bytes()[before + len(title.encode()) :].decode(errors="replace")
        print(text[-8000:], flush=True)
        if said != "ok" and "Device not supported" in text:
            said = "not possible on this machine"
        self.rows.append((name, said, f"{time.monotonic() - begin:.0f} s"))
        return said == "ok"

    def table(self):
        """Return how the steps went, and whether none failed."""
        width = max(len(name) for name, *_ in self.rows)
        text = "\n".join(f"{name:<{width}}  {took:>6}  {said}" for name, said, took in self.rows)
        return text, not any(said.startswith(("FAILED", "NO")) for _, said, _ in self.rows)


def import_paths():
    """Return where this tree, what was brought, and what was built are found, in that order."""
    found = [path for kind in ("site", "dist") for path in SITE.glob(f"**/{kind}-packages")]
    mine = [ROOT, SITE / "wheels", *found]
    return [*map(str, mine), *filter(None, [os.environ.get("PYTHONPATH")])]


def build(steps):
    """Install the wheels that somebody brought, and compile bncpu."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    pip += ["--no-deps"]
    wheels = sorted((ROOT / ".whl").glob("*.whl"))
    if wheels:
        steps.run("wheels", [*pip, "--upgrade", "--target", SITE / "wheels", *wheels], BUILD)
    editable = ["--no-build-isolation", "--ignore-installed", "--prefix", SITE, "--editable", "."]
    return steps.run("build", [*pip, *editable], BUILD)


def test(steps):
    """Run the tests that need a GPU, and the small ones under the sanitizer's tools."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    pytest += ["tests/test_gpu.py", "-m", "gpu"]
    steps.run("tests", pytest, TESTS, keep=FOR_SPEED)
    if shutil.which("compute-sanitizer") is None:
        steps.rows.append(("sanitizer", "compute-sanitizer is not installed", ""))
        return
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command = [*sanitizer, *pytest, "-k", "small", "-x"]
        steps.run(tool, command, SANITIZER, keep=FOR_SPEED, more={"BNCPU_GPU_POOL": "0"})


def measure(steps, out):
    """Measure what is promised about speed, within the time that is left."""
    seconds = min(SPEED, steps.left() - 10)
    script = [sys.executable, ROOT / "benchmarks" / "gpu_speed.py", "--out", out]
    # A table that has begun is finished: some seconds more than it is told.
    steps.run("speed", [*script, "--seconds", f"{seconds - 30:.0f}"], seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for what is printed")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"Python {platform.python_version()}, {sys.executable}", flush=True)
    out = options.out.resolve()
    results = out / "speed.json"
    results.unlink(missing_ok=True)
    steps = Steps(out)
    if build(steps) and steps.run("gpu", [sys.executable, "-c", LOOK_AT_GPU], LOOK):
        test(steps)
        measure(steps, out)
    text, went_well = steps.table()
    if results.exists():
        promises = json.loads(results.read_bytes())["promises"]
        kept = sum(line["kept"] == "yes" for line in promises)
        text += (
            f"\n\n{kept} of {len(promises)} promises about speed kept; the others:\n"
            + "\n".join(
                "{kept:<12}  {measured:>20} {promised:>8}  {what}".format(**line)
                for line in promises
                if line["kept"] != "yes"
            )
        )
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n==== summary, with the full results in {out}\n{text}", flush=True)
    return 0 if went_well else 1


if __name__ == "__main__":
    sys.exit(main())
