"""Sphinx extension: formulas as MathML, by docutils' own converter from TeX.

Browsers draw MathML themselves: no script, no fonts, nothing to fetch.
"""

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError


def inline(translator, node):
    translator.body.append(converted(node, as_block=False))
    raise SkipNode


def block(translator, node):
    translator.body.append(f'<div class="math">{converted(node, as_block=True)}</div>')
    raise SkipNode


def converted(node, *, as_block):
    """Return the MathML of a formula's TeX."""
    tex = " ".join(node.astext().split())
    try:
        return tex2mathml(tex, as_block=as_block)
    except Exception as error:
        raise ExtensionError(f"math: expected TeX that docutils knows; got {tex!r}") from error


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
