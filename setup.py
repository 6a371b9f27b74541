"""Hands the native build to CMake, and makes sdists that depend on their files alone.

Everything else stands in pyproject.toml.
"""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class Sdist(sdist):
    """An sdist whose bytes do not depend on where, when and by whom it was made.

    Only where SOURCE_DATE_EPOCH says what time it is to bear, as everywhere.
    """

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **owner):  # noqa: A002
        """Make the archive with the time that is given, sorted, of nobody's files."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, **owner)
        root = Path(root_dir or ".")
        archive = Path(f"{base_name}.tar.gz")
        archive.parent.mkdir(parents=True, exist_ok=True)
        with (
            archive.open("wb") as file,
            gzip.GzipFile("", "wb", mtime=int(epoch), fileobj=file) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path in sorted(p for p in (root / base_dir).rglob("*") if p.is_file()):
                member = tarfile.TarInfo(path.relative_to(root).as_posix())
                member.size = path.stat().st_size
                member.mtime = int(epoch)
                member.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
                with path.open("rb") as content:
                    tar.addfile(member, content)
        return str(archive)


setup(cmake_source_dir=".", cmdclass={"sdist": Sdist})
