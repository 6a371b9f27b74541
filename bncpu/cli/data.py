"""`bncpu data`: what is found of the datasets; the looking is bncpu.data.inventory's."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bncpu.cli.ranks import Ranks
from bncpu.data.files import named_folder
from bncpu.data.inventory import Found, FoundFile, inventory

SUMMARY = "list the datasets that are found, with checksums and shapes, and where to get them"
EXAMPLES = """\
  bncpu data
  bncpu data --data-dir ~/data"""
ORIGINAL = {True: "yes", False: "no", None: "unknown"}


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments to the command's parser."""
    sub.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="holds the files, itself or in the subfolders mnist, cifar10 and cifar-10-batches-bin "
        "(default: $BNCPU_DATA)",
    )


def run(args: argparse.Namespace, _: Ranks) -> None:
    """Print what is found of each dataset; damage is an error, when all has been listed."""
    folder = named_folder(args.data_dir)
    if folder is None:
        print("No data folder: name one with --data-dir FOLDER, or in the variable BNCPU_DATA.")
    else:
        print(f"Data folder: {folder}")
    found = inventory(args.data_dir)
    for each in found:
        print_found(each)
    if any(file.original is not None for each in found for file in each.files):
        print(
            "\nsha256 is of the file as it is. It is original if its content, unzipped, has the "
            "SHA-256\nof what was published."
        )
    damaged = [each.name for each in found if each.problem and each.files]
    if damaged:
        raise ValueError(f"{' and '.join(damaged)}: cannot be loaded; see what is listed")


def print_found(found: Found) -> None:
    """Print a dataset: its files, its arrays or what they lack, where the originals are."""
    print(f"\n{found.name}")
    if found.files:
        print_files(found.files)
    arrays = [f"{name} {shape}" for name, shape in found.shapes.items()]
    wanted = found.missing + found.absent
    for title, entries in (
        ("missing", found.missing),
        ("not there, and not needed", found.absent),
        ("plain or .gz, looked for in", found.places if wanted else []),
        ("cannot be loaded", [found.problem] if found.problem else []),
        ("arrays", arrays),
        ("originals", found.published),
    ):
        if entries:
            print(f"  {title}: {', '.join(map(str, entries))}")


def print_files(files: Sequence[FoundFile]) -> None:
    """Print a table of files, and below a damaged one what is wrong with it."""
    head = ("file", "bytes", "holds", "original", "sha256")
    rows = [
        (
            str(file.path),
            f"{file.size:,}",
            "damaged" if file.problem else str(file.shape),
            "no" if file.problem else ORIGINAL[file.original],
            file.sha256,
        )
        for file in files
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if name == "bytes" else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        return f"  {'  '.join(cells)}".rstrip()

    print(line(head))
    for row, file in zip(rows, files, strict=True):
        print(line(row))
        if file.problem:
            print(f"    {file.problem}")
