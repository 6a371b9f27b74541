"""The command bncpu: info, bench, train, moments, data, reproduce.

Nothing is computed here: a command reads its arguments, calls the package, prints the result. An
error is one line on stderr and exit status 2, an interrupt 130, a reader that has gone away 141 and
no line; files are written whole or not at all, and whatever can be refused is refused before the
work begins. Under mpiexec, with --distributed, rank 0 alone prints and writes, and whoever fails
ends all.

========================  ===========================================================
entry.py                  main: the parser of all commands, errors to lines and statuses
ranks.py                  the processes among which a command runs
numbers.py                types of arguments
bench.py, train.py, ...   one command each: SUMMARY, EXAMPLES, add_arguments, run
========================  ===========================================================
"""

from bncpu.cli.entry import main

__all__ = ["main"]
