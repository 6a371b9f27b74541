"""Sphinx's settings for `make docs`: every warning is an error, and nothing is fetched.

Pages are Markdown (MyST) as they stand here; the API reference comes from the docstrings, the
command line's from its own parser, and the drawings from code, all at build time (extensions/).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

import bncpu

project = "bncpu"
author = "The bncpu developers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name
version = release = bncpu.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "mathml",
    "command_line",
    "drawings",
]
root_doc = "index"
exclude_patterns = ["extensions"]
nitpicky = True
# Names in docstrings that are there, but are no entries: fields, and what is inherited.
nitpick_ignore = [
    ("py:obj", name)
    for name in ("accuracy", "backward", "forward", "loss", "seed", "settings", "step", "test")
]
# `name` in a docstring is a link where there is such a name, and plain where there is none.
default_role = "autolink"

autosummary_generate = False  # the tables link to the pages, which are written by hand
autodoc_typehints = "none"  # the docstrings say more about arrays than Any does
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["torch"]  # installed or not, the pages are the same
numpydoc_show_class_members = False
numpydoc_attributes_as_param_list = True
viewcode_line_numbers = True

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["config.cache"]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"bncpu {release}"
html_static_path = ["static"]
html_css_files = ["bncpu.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0066a1"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}


def leave_out(_app, _what, _name, thing, _skipped, _options):
    """Leave out the fields of named tuples, which the section Attributes has."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-skip-member", leave_out)
