"""`bncpu info`: what this installation runs on."""

import argparse

import bncpu
from bncpu.cli.ranks import Ranks

SUMMARY = "print what this installation runs on"
EXAMPLES = "  bncpu info"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Add no argument."""


def run(_: argparse.Namespace, __: Ranks) -> None:
    """Print the configuration."""
    bncpu.show_config()
