"""Sphinx settings; warnings are errors (sphinx-build -W)."""

import importlib.metadata
import re
import tempfile

project = "kermes"
author = "kermes developers"
copyright = "2026, kermes developers"
version = release = importlib.metadata.version("kermes")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "matplotlib.sphinxext.plot_directive",
    "numpydoc",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "code"

html_theme = "furo"
html_title = "kermes"

# What needs the middleware of LSST is documented without it.
autodoc_mock_imports = ["lsst", "starlink", "astro_metadata_translator"]
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "FloatArray", "DoubleArray", "PsfField")}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autosummary_generate = True
numpydoc_show_class_members = False
suppress_warnings = ["ref.python"]  # the public names are found in two places

# The figures of the tutorial are made by its own code.
plot_formats = [("png", 120)]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_include_source = True
_folder = tempfile.TemporaryDirectory()
plot_working_directory = _folder.name


def shorten_types(app, what, name, obj, options, signature, returned):
    """Write array types as the source does: NDArray[float64]."""

    def shorten(text):
        text = re.sub(
            r"[~\w.]*ndarray\[[~\w.]*tuple\[[~\w.]*Any, \.\.\.\], [~\w.]*dtype\[[~\w.]*?(\w+)\]\]", r"NDArray[\1]", text
        )
        return re.sub(r"[~\w.]*TypeAliasForwardRef\('(\w+)'\)", r"\1", text)

    return signature and shorten(signature), returned and shorten(returned)


def setup(app):
    """Sphinx calls this once."""
    app.connect("autodoc-process-signature", shorten_types, priority=400)  # before numpydoc's
