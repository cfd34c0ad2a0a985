"""Sphinx builds the site from this folder: `python -m sphinx -W docs docs/_build`. It needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.parsers.rst.directives.images import Figure
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import fastnorm

project = "fastnorm"
author = "The fastnorm developers"
version = release = fastnorm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

smartquotes_action = "qe"  # no dashes: `--quick` stays what it is
default_role = "py:obj"  # docstrings name functions in single backticks
autodoc_typehints = "none"  # the docstrings say kinds, shapes and dtypes, which types cannot
autodoc_preserve_defaults = True  # `dtype=np.float32`, not `<class ...>`
autodoc_member_order = "bysource"
# Without these libraries, their integrations are documented all the same, but for signatures that they inherit.
autodoc_mock_imports = [library for library in ("torch", "autograd", "thinc") if find_spec(library) is None]
numpydoc_show_class_members = False
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"fastnorm {version}"
html_static_path = ["_static"]
html_css_files = ["fastnorm.css"]
html_math_renderer = "mathml"
html_show_sphinx = html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"


# -- formulas: MathML, which browsers draw without a script from the network -------------------------------------------


def visit_inline_math(self: Any, node: nodes.Element) -> None:
    """Write a formula within a line."""
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_display_math(self: Any, node: nodes.Element) -> None:
    """Write a formula on lines of its own, which scrolls by itself where the screen is narrow."""
    self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


# -- pictures: one for light pages, one for dark ones ------------------------------------------------------------------


class Picture(Figure):
    """``{picture} NAME``: the figure that ``figures.py`` drew twice, `figures/NAME-light.svg` and `-dark.svg`."""

    arguments: list[str]
    options: dict[str, Any]
    option_spec = {"alt": directives.unchanged_required}  # noqa: RUF012  # docutils reads a dict of the class

    def run(self) -> list[nodes.Node]:
        """Make both figures; the theme shows one of them."""
        (name,) = self.arguments
        made: list[nodes.Node] = []
        for scheme in ("light", "dark"):
            self.arguments = [f"/figures/{name}-{scheme}.svg"]
            self.options["figclass"] = [f"only-{scheme}"]
            made += super().run()
        return made


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the above to Sphinx."""
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_display_math, None))
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
