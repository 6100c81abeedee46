"""Sphinx's settings: `pip install '.[cpu,docs]'`, then `sphinx-build -W --keep-going -b html docs build/docs`.

Pages are Markdown (myst-parser); the API page comes from docstrings (autodoc, napoleon), the first page from README.
Links out of docs/ are relative, as GitHub wants them; on the site they download the file, or lead to the first page for
README.
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


def resolve_links_out_of_docs(app: Sphinx, tree: nodes.document) -> None:
    """Resolve links to Markdown files outside docs/, which myst-parser takes for pages of the site."""
    docs = Path(app.srcdir)
    for link in list(tree.findall(pending_xref)):
        path = link["reftarget"].removesuffix(".md") + ".md"
        # What is not found from docs/ is README's, which index.md includes.
        folder = docs if (docs / path).exists() else docs.parent
        file = (folder / path).resolve()
        if file == docs.parent / "README.md":
            link["reftarget"] = "index"
        elif file.is_file() and not file.is_relative_to(docs):
            target = os.path.relpath(file, docs)
            download = download_reference(reftarget=target, refdoc=link["refdoc"])
            download += link.children
            link.replace_self(download)


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", resolve_links_out_of_docs, priority=0)  # before Sphinx collects downloads
