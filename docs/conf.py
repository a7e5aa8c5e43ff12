"""How Sphinx builds the site: `make docs`. It reads nothing from the network, and every warning is an error."""

import sys
from pathlib import Path

import instruct_trl

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "instruct_trl"
release = instruct_trl.__version__
html_title = f"{project} {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "settings_table",
    "mathml",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Files that a page points to but that are no page: they are read in the repository, not on the site.
myst_links_external_new_tab = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_math_renderer = "mathml"
html_theme_options = {"sidebar_hide_name": False}
html_show_sourcelink = False
html_copy_source = False
templates_path: list[str] = []

linkcheck_ignore = [r"http://localhost.*"]
