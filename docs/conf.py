"""Sphinx: Markdown pages by MyST, docstrings by napoleon, Furo's look. `make docs` builds it; warnings are errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import steerkit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docs.docstrings import as_rst

project = "steerkit"
author = "the steerkit authors"
release = version = steerkit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# A folder of results with nothing measured in it yet is no mistake.
suppress_warnings = ["toc.empty_glob"]
highlight_language = "text"

# Two hyphens are two hyphens.
smartquotes = False
# Anchors as a forge makes them, so that links work in both places.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "Attributes")]
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "steerkit"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def setup(app: Any) -> None:
    """Read docstrings the way they are written, and color lines of JSON like JSON."""
    from pygments.lexers.data import JsonLexer

    app.add_lexer("jsonl", JsonLexer)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
