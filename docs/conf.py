"""Settings of the site: `sphinx-build -W --keep-going docs docs/build` writes it to docs/build/index.html.

The pages are Markdown, and links between them work on the site as in the repository. `BISAM_DOCS_NETWORK=1` adds links
to the references of Python, torch and NumPy, which needs their inventories from the network; the site is whole without.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

import bisam  # noqa: E402

project = "bisam"
author = "The bisam developers"
project_copyright = author
version = release = bisam.__version__

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["build"]
highlight_language = "bash"  # of blocks that name none: commands

if os.environ.get("BISAM_DOCS_NETWORK"):
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "numpy": ("https://numpy.org/doc/stable", None),
}

myst_heading_anchors = 4  # those of GitHub, so that a link to a section works in both
myst_enable_extensions = ["colon_fence"]

html_theme = "pydata_sphinx_theme"
html_title = "bisam"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
