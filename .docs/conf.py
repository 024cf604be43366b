"""The site: `make site` builds it from `pages/` into `build/site`, warnings as errors."""

import importlib.metadata

project = "fop_optax"
author = "The fop_optax authors"
copyright = author
version = release = importlib.metadata.version("fop_optax")

extensions = [
  "myst_nb",  # Markdown, and the notebooks as they were executed
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.intersphinx",
  "sphinx.ext.mathjax",
  "sphinx_copybutton",
]
exclude_patterns = ["notebooks/*.py", "notebooks/__pycache__"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nitpicky = True
# Types of fields, which autodoc takes from where they are defined.
nitpick_ignore_regex = [
  ("py:class", r"(collections\.abc|jax\._src|optax\.contrib\._|fop_optax\.(layers|costs)\.).*")
]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what arguments are
autodoc_default_options = {"exclude-members": "count, index"}  # of tuples
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"fop_optax {version}"
html_theme_options = {
  "source_repository": "https://github.com/OWNER/fop_optax/",
  "source_branch": "main",
  "source_directory": ".docs/pages/",
}
