"""Feed a reader of files with bytes that a coverage-guided fuzzer makes up, until one breaks it.

What must hold is in tests/readers.py. The fuzzer is atheris (libFuzzer), which is no dependency of
the project: `pip install atheris`. Files go to a folder in memory where there is one; what breaks a
reader is left in the working folder as crash-..., and given again by naming it as an argument.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Their branches are what the fuzzer looks for new ones of; NumPy's header reader is Python too.
WATCHED = ["bncpu", "gzip", "json.decoder", "json.scanner", "numpy.lib._format_impl", "readers"]

with atheris.instrument_imports(include=WATCHED):
    import readers


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Further arguments are libFuzzer's: files to try, -max_total_time=, -runs=, -seed=.",
    )
    parser.add_argument("kind", choices=readers.READERS)
    args, for_libfuzzer = parser.parse_known_args()

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        files, corpus = Path(folder) / "files", Path(folder) / "corpus"
        files.mkdir()
        corpus.mkdir()
        place = readers.placed(args.kind, files)
        for i, content in enumerate(place.reader.good()):
            (corpus / f"good-{i}").write_bytes(content)
        warnings.simplefilter("error")  # as in the tests

        def once(content):
            readers.read_any(place, content)

        limits = ["-rss_limit_mb=2048", "-malloc_limit_mb=1536", "-timeout=20", "-max_len=65536"]
        given = [a for a in for_libfuzzer if not a.startswith("-")]
        where = [] if given else [str(corpus)]
        atheris.Setup([sys.argv[0], *limits, *for_libfuzzer, *where], once)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
