"""Settings of the site: `sphinx-build -W --keep-going docs docs/build` writes it to docs/build/index.html.

The first build executes the examples of the gallery, later ones those that have changed, and `-D plot_gallery=0` none.

The pages are Markdown, and links between them work on the site as in the repository. `BISAM_DOCS_NETWORK=1` adds links
to the references of Python, torch and NumPy, which needs their inventories from the network; the site is whole without.

`BISAM_DOCS_VERSIONS="0.2.0 0.1.0"` makes the site that of one of several versions, the newest of which is first: its
pages have a menu of them, and a banner if another one is newer. They read switcher.json in the folder that has the
folders of the versions, which is `BISAM_DOCS_ROOT` on its server; the build writes that file beside index.html.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

from sphinx.util.inspect import stringify_signature  # noqa: E402

import bisam  # noqa: E402

project = "bisam"
author = "The bisam developers"
project_copyright = author
version = release = bisam.__version__

extensions = [
    "myst_parser",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["build"]
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",  # all of them are executed; `-D plot_gallery=0` executes none
    "abort_on_example_error": True,
    "backreferences_dir": None,
    "doc_module": "bisam",
    "reference_url": {"bisam": None},  # links from the code to the reference, without the network
    "remove_config_comments": True,  # those that name the committed thumbnails
    "show_signature": False,
    "write_computation_times": False,  # a page with scripts from the network
    "within_subsection_order": "FileNameSortKey",
}
templates_path = ["_templates"]
default_role = "py:obj"  # of `text` in a docstring: a link where it is a name, else code
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # Of other projects: found only where the network is.
    ("py:.*", r"((collections|lightning|os|pytorch_lightning|torch|transformers|typing)\..*|nn\.Module)"),
    ("py:class", r"Any|Callable|Iterable|Iterator|Mapping|Optimizer|Sequence|StorageReader|Tensor|[a-z]\w*"),
    # Of bisam, and not public.
    (
        "py:class",
        r"bisam\.(distributed|model|optim)\..*|(bisam\.vector\.)?Layout|Averaging|Count|Findings|ForwardPass|Momentum|"
        r"OfClasses|Preview|RandomState|Tensors",
    ),
]

ALIASES = {  # of types, by their names in signatures; docs/api/types.md documents them
    name: f"{module}.{name}"
    for module, names in {
        "bisam.objectives": "Objective Bound",
        "bisam.schedules": "Radius Schedule",
        "bisam.batches": "Batch",
        "bisam.model.oracle": "Forward",
        "bisam.model.gradients": "Scaler",
        "bisam.distributed.placement": "Scope",
        "bisam.perturbations": "Perturbation Part",
        "bisam.methods.drawn": "Restore",
        "bisam.methods.longtail": "LabelWeight",
        "bisam.proximal": "Prox",
        "bisam.seeded": "Key Kind",
        "bisam.vector": "Scalar",
        "bisam.analysis.samples": "Source Mode Progress",
        "bisam.analysis.monitor": "Measure Record",
        "bisam.analysis.curvature": "Matrix By",
        "bisam.analysis.connectivity": "Checkpoint",
        "bisam.analysis.landscape": "Direction",
        "bisam.analysis.corruptions": "Corruption Channels",
        "bisam.analysis.margins": "Normalization",
    }.items()
    for name in names.split()
}
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "extra_repr, get_extra_state, set_extra_state"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = [name for name in ("lightning", "transformers") if find_spec(name) is None]
SECTIONS = ("Raises when called", "Raises when training starts", "Raises in training")
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [(title, "params_style") for title in SECTIONS]
python_use_unqualified_type_names = True
add_module_names = False
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
html_context = {"default_mode": "auto"}  # light or dark as the browser; unset, each page logs an error
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
VERSIONS = os.environ.get("BISAM_DOCS_VERSIONS", "").split()
SITES = os.environ.get("BISAM_DOCS_ROOT", "").rstrip("/")
if VERSIONS:
    if release not in VERSIONS:
        raise ValueError(f"BISAM_DOCS_VERSIONS {' '.join(VERSIONS)} lacks {release}, the version of this site: add it")
    html_theme_options |= {
        "switcher": {"json_url": f"{SITES}/switcher.json", "version_match": release},
        "check_switcher": False,  # it is a file of the server, and none of this folder
        "navbar_end": ["version-switcher", "theme-switcher", "navbar-icon-links"],
        "show_version_warning_banner": True,
    }
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


LITERAL = re.compile(r"(`[^`]*`)")
SECTION = re.compile(r"^\w[\w ]*:$")


def docstring(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Makes a docstring reStructuredText: blocks of code are marked as such, and `|` outside of code is a character."""
    made: list[str] = []
    before = ""
    for paragraph in re.split(r"\n{2,}", "\n".join(lines)):
        rows = paragraph.split("\n")
        code = all(row.startswith("    ") for row in rows) and not SECTION.match(before.split("\n")[-1])
        example = rows[0].lstrip().startswith(">>>") or any(row.lstrip().startswith(">>>") for row in rows)
        if code and not example and not rows[0].lstrip().startswith(("*", "-")):
            made += ["::", ""]
        elif not example:
            rows = ["".join(p if p.startswith("`") else p.replace("|", "\\|") for p in LITERAL.split(r)) for r in rows]
        made += [*rows, ""]
        before = paragraph
    if what in ("attribute", "data", "property"):
        made.insert(0, r"\ ")  # otherwise napoleon takes what is before a colon for the type
    lines[:] = made


def signature(app: Any, what: str, name: str, obj: Any, options: object, arguments: str, returned: str) -> Any:
    """The signature with the types as the source has them: `Perturbation | Radius`, not what the aliases stand for."""
    if what not in ("class", "function", "method"):
        return None
    found = inspect.signature(obj)
    parameters = [p for p in found.parameters.values() if what != "method" or p.name not in ("self", "cls")]
    answer = inspect.Signature.empty if what == "class" else found.return_annotation
    bare = found.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    shown = stringify_signature(found.replace(parameters=[], return_annotation=answer), unqualified_typehints=True)
    return stringify_signature(bare, unqualified_typehints=True), shown.removeprefix("()").removeprefix(" -> ")


def reference(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Resolves type aliases, which are data and no classes, and `Names` that only one other module has."""
    if node.get("refdomain") != "py":
        return None
    name, domain = node["reftarget"], env.domains["py"]
    target = ALIASES.get(name)
    if target is None and node["reftype"] == "obj":
        kinds = ("class", "data", "exception", "function")
        ends = "." + name.removesuffix("()")
        found = [other for other, entry in domain.objects.items() if other.endswith(ends) and entry.objtype in kinds]
        target = found[0] if len({domain.objects[other].node_id for other in found}) == 1 else None
    if target is None:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def home(app: Any, module: str, name: str) -> str | None:
    """The module whose source has a name; that of a type alias is the one that it is documented in, not `builtins`."""
    return module if name in ALIASES else None


def write_versions(app: Any, error: Exception | None) -> None:
    """Writes switcher.json, which the pages of all versions read."""
    if VERSIONS and error is None:
        entries = [{"version": one, "url": f"{SITES}/{one}/", "preferred": one == VERSIONS[0]} for one in VERSIONS]
        (Path(app.outdir) / "switcher.json").write_text(json.dumps(entries, indent=2) + "\n")


def setup(app: Any) -> None:
    """Connects the functions above; the first runs before napoleon."""
    app.connect("autodoc-process-docstring", docstring, priority=100)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", reference)
    app.connect("viewcode-follow-imported", home)
    app.connect("build-finished", write_versions)
