"""Pages of the API say as plain Markdown what each name is; Sphinx adds the rest.

`python tests/test_api_pages.py` writes their tables anew.
"""

import importlib
import inspect
import pathlib
import re

import pytest

import grpo_jax

PAGES = sorted((pathlib.Path(__file__).parents[1] / "docs" / "api").glob("*.md"))
TABLE = r"(?:^\|.*\n)+"


def documented(text):
    """(name as written, object) of each that a page leaves to Sphinx."""
    module = ""
    for kind, name, members in re.findall(
        r"^\.\. (\w+):: ([\w.]+)(?:\n +:members: (\w.*))?$", text, re.MULTILINE
    ):
        if kind == "currentmodule":
            module = name
        elif kind == "automodule":
            for member in members.split(", "):
                yield member, getattr(importlib.import_module(name), member)
        else:
            place, _, last = f"{module}.{name}".rpartition(".")
            if name.startswith("grpo_jax."):
                place, _, last = name.rpartition(".")
            yield last, getattr(importlib.import_module(place), last)


def table(text):
    """The rows: name, first paragraph of its docstring, file."""
    rows = ["| name | what it is | in |", "| --- | --- | --- |"]
    for name, thing in documented(text):
        summary = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
        file = pathlib.Path(inspect.getfile(inspect.unwrap(thing)))
        file = file.relative_to(pathlib.Path(grpo_jax.__file__).parents[1]).as_posix()
        rows.append(f"| `{name}` | {summary.replace('|', chr(92) + '|')} | `{file}` |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_table_of_a_page_says_what_the_docstrings_say(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(TABLE, text, re.MULTILINE) == [table(text)], __doc__


def write_tables():
    for page in PAGES:
        text = re.sub(TABLE + "\n", "", page.read_text(encoding="utf-8"), flags=re.M)
        before, fence, after = text.partition("```{eval-rst}")
        page.write_text(f"{before}{table(text)}\n{fence}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_tables()
