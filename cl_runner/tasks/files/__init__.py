"""Rows from files: JSON, JSON Lines, CSV, TSV, Parquet and saved ``datasets`` folders, in the forms that people have.

``opening`` finds files and makes text of them, ``documents``, ``tables`` and ``columnar`` make records of that,
``forms`` and ``chats`` make a record a text and its answer. Text files are parsed here, because an error must name
file, line and row, and because ``datasets`` guesses types: "NA" becomes a missing value, "007" a 7, a date a timestamp.
Nothing is copied into a cache.
"""

from cl_runner.tasks.files.documents import document, instruction
from cl_runner.tasks.files.forms import Form
from cl_runner.tasks.files.opening import ENDINGS, existing, find, looking
from cl_runner.tasks.files.positions import Found, Place, where
from cl_runner.tasks.files.reading import read

__all__ = [
    "ENDINGS",
    "Form",
    "Found",
    "Place",
    "document",
    "existing",
    "find",
    "instruction",
    "looking",
    "read",
    "where",
]
