"""Configuration of the manual."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_origin

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import pyro_gumbel
from pyro_gumbel import diagnostics, distributions, estimators, guides, infer

project = "pyro_gumbel"
author = "The pyro_gumbel developers"
copyright = author
version = release = pyro_gumbel.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
templates_path = ["_templates"]
exclude_patterns = ["_templates"]

# Pages of the interface come from the docstrings of the names in each module's __all__.
autosummary_generate = True
autosummary_generate_overwrite = True
autosummary_ignore_module_all = False
autodoc_inherit_docstrings = False  # Pyro's and torch's methods have their own manuals
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

nitpicky = True
# Types of other libraries have manuals of their own.
nitpick_ignore_regex = [
    ("py:(class|data|exc|obj)", r"(?!pyro_gumbel\b).*"),
    ("py:class", r"pyro_gumbel\.\w+\.\w+\.\w+"),  # a private class in a signature
]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Tutorials run at each build. An error in a cell is an error of the build.
os.environ.pop("MPLBACKEND", None)  # the Makefile's draws no figures in notebooks
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parents[1] / "out" / "docs-cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # notes of tqdm and ArviZ; warnings that matter are in the text

copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"pyro_gumbel {release}"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#8a3b12", "color-brand-content": "#8a3b12"},
    "dark_css_variables": {"color-brand-primary": "#f0a878", "color-brand-content": "#f0a878"},
}


PUBLIC = {
    name: f"{module.__name__}.{name}"
    for module in (diagnostics, distributions, estimators, guides, infer)
    for name in module.__all__
}


def public_bases(
    app: Sphinx, name: str, kind: type, options: dict[str, Any], bases: list[Any]
) -> None:
    """Show the nearest public classes in place of private base classes."""
    shown: list[Any] = []
    for base in bases:
        cls = base if isinstance(base, type) else get_origin(base) or object
        nearest = next(one for one in cls.__mro__ if is_public(one))
        path = PUBLIC.get(nearest.__name__)
        shown.append(f":py:class:`~{path}`" if path else nearest)
    bases[:] = dict.fromkeys(shown)


def is_public(kind: type) -> bool:
    """Return whether a class has a page, or belongs to another library."""
    return not kind.__module__.startswith("pyro_gumbel.") or kind.__name__ in PUBLIC


def skip_foreign(
    app: Sphinx, what: str, name: str, member: Any, skip: bool, options: dict[str, Any]
) -> bool | None:
    """Skip members that other libraries define and document."""
    function = getattr(member, "fget", member)
    module = getattr(function, "__module__", None) or "pyro_gumbel"
    return None if module.startswith("pyro_gumbel") else True


def link_to_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> Element | None:
    """Link a class in the module that defines it to the page of its public name."""
    path = PUBLIC.get(node.get("reftarget", "").rpartition(".")[2])
    if node.get("refdomain") != "py" or path is None:
        return None
    domain, docname = env.domains.python_domain, node["refdoc"]
    return domain.resolve_any_xref(env, docname, app.builder, path, node, content)[0][1]


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("missing-reference", link_to_public_name)
