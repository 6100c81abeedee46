"""Sphinx's settings: `pip install '.[cpu,docs]'`, then `sphinx-build -W --keep-going -b html docs build/docs`.

Pages are Markdown (myst-parser); the API page comes from docstrings (autodoc, napoleon). Links that lead out of docs/ are
relative, as GitHub wants them; on the site they hand out the file.
"""

import os
from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx

project = "mlx-fused-adam"
release = version = metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes alone: quotes stay as they are typed
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"{project} {release}"


def hand_out_files(app: Sphinx, tree: nodes.document) -> None:
    """Makes downloads of links to Markdown files outside docs/: myst-parser takes them for pages, which they are not."""
    for link in list(tree.findall(pending_xref)):
        file = Path(app.srcdir, f"{link['reftarget']}.md").resolve()
        if link["refdomain"] == "doc" and file.is_file() and not file.is_relative_to(app.srcdir):
            target = os.path.relpath(file, app.srcdir)
            download = download_reference(reftarget=target, refdoc=link["refdoc"])
            download += link.children
            link.replace_self(download)


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", hand_out_files, priority=0)  # before Sphinx collects downloads
