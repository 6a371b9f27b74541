"""Sphinx extension: `.. command:: bench` shows what `bncpu bench --help` prints.

The text comes from the parser itself, so that a page cannot say what the command does not.
"""

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from bncpu.cli.entry import COMMANDS, parser

WIDTH = 84


def help_of(command):
    """Return the help of a command, or of bncpu itself for an empty name."""
    top = parser()
    if not command:
        return with_width(top)
    (commands,) = (action.choices for action in top._actions if isinstance(action.choices, dict))
    return with_width(commands[command])


def with_width(of):
    """Return a parser's help in lines of WIDTH, whatever the terminal."""
    kind = of.formatter_class
    of.formatter_class = lambda prog, **options: kind(prog, width=WIDTH, **options)
    of.color = False  # of Python 3.14
    return of.format_help()


class CommandHelp(SphinxDirective):
    optional_arguments = 1

    def run(self):
        command = self.arguments[0] if self.arguments else ""
        if command and command not in COMMANDS:
            raise self.error(f"command: expected one of {', '.join(COMMANDS)}; got {command}")
        text = help_of(command)
        return [nodes.literal_block(text, text, language="text")]


def setup(app):
    app.add_directive("command", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
