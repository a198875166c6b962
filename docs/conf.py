"""Sphinx configuration: `make docs` builds the site, with warnings as errors.

The pages are Markdown that reads on GitHub too: docs/README.md is the title page, plain links
between files are checked by Sphinx, and what is generated is committed. Nothing is fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fairchem_kd import __version__

project = "fairchem-kd"
author = "fairchem-kd contributors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "README.md"]  # README.md is included by index.rst
default_role = "code"  # single backticks in docstrings

# Headings can be linked to as on GitHub: page.md#heading-in-small-letters
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

html_theme = "furo"
html_title = f"fairchem-kd {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
highlight_language = "none"  # blocks without a language: commands and their output

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
