"""The documentation site: Sphinx with MyST-NB. ``make docs`` builds it, warnings as errors, and reaches no network."""

from __future__ import annotations

from latex2mathml.converter import convert
from sphinx.application import Sphinx

import sasa

project, author = "sasa", "The sasa authors"
project_copyright = "The sasa authors, MIT licence"
version = release = sasa.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["studies/*/table.md"]
html_theme = "furo"
html_title = f"sasa {release}"
html_static_path = ["_static"]
html_css_files = ["sasa.css"]
html_extra_path = ["explore.html"]
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def inline(self, node) -> None:
    """A formula as MathML, which browsers draw themselves: no script, no fonts from elsewhere."""
    self.body.append(convert(node.astext()))
    raise_skip()


def display(self, node) -> None:
    """A formula on a line of its own."""
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise_skip()


def raise_skip() -> None:
    """The formula's text is not written again."""
    from docutils.nodes import SkipNode

    raise SkipNode


def setup(app: Sphinx) -> None:
    """Formulas are MathML."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
