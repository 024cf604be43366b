"""Notebooks. The sources are Python in jupytext's percent format; beside each stands the executed
notebook, with its pictures:

    python -m notebooks [NAME ...]     # executes sources anew, by default all of them

`REPOSITORY` is where Colab finds them, `SITE` where the documentation is. Badges, install cells and
links have them written out.
"""

import pathlib

REPOSITORY = "OWNER/fop_optax"
SITE = "https://OWNER.github.io/fop_optax/"
FOLDER = pathlib.Path(__file__).parent
SOURCES = tuple(sorted(FOLDER.glob("[0-9][0-9]_*.py")))
