"""How Sphinx builds these pages: `make docs`, in which a warning is an error.

The pages are plain Markdown and readable without it. Sphinx adds the API pages, made
from docstrings, and the output of the notebook, which it runs.
"""

import ast
import dataclasses
import inspect
import io
import tokenize

from flax import linen
from sphinx.util import rst

import grpo_jax
from grpo_jax import config
from grpo_jax.config.validation import Section

project = "grpo_jax"
author = "The grpo_jax authors"
version = release = grpo_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The root of the sources is that of the repository, so that links lead where they do
# there.
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "docs/losses.py",
    "tpu_setup/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = ["docs/_build"]
html_theme = "furo"
html_title = f"grpo_jax {version}"
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Scripts in percent format are notebooks.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
napoleon_attr_annotations = False  # shapes and types are in the words
python_maximum_signature_line_length = 80
# Docstrings put code between single backticks, as Markdown does.
default_role = "code"


def setup(app) -> None:
    """Connects the functions below."""
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", list_fields)


def shorten_signature(app, what, name, thing, options, arguments, returned):
    """A signature without the paths of types; none for what lists its fields."""
    if isinstance(thing, type) and (
        issubclass(thing, Section) or "Attributes:" in (thing.__doc__ or "")
    ):
        return "", None
    if isinstance(thing, type) and issubclass(thing, linen.Module):
        return "(config)", None  # Linen adds a name and a parent
    short = [
        text and text.replace("jaxlib._jax.", "") for text in (arguments, returned)
    ]
    return tuple(short)


def list_fields(app, what, name, thing, options, lines) -> None:
    """Appends the fields of a configuration: name, type, default and meaning."""
    if not (isinstance(thing, type) and issubclass(thing, Section)):
        return
    source = inspect.getsource(thing)
    nodes = ast.parse(source).body[0].body
    fields = [node for node in nodes if isinstance(node, ast.AnnAssign)]
    comments = comments_of(source)
    for node in fields:
        if (name := node.target.id) in thing.__dataclass_fields__:
            if not ast.unparse(node.annotation).startswith("ClassVar"):
                meaning = rst.escape(comment_of(node, source.splitlines(), comments))
                lines += [
                    "",
                    f"**{name}** (``{ast.unparse(node.annotation)}``,"
                    f" {default_of(thing, name)})",
                    f"   {meaning}",
                ]


def comments_of(source: str) -> dict[int, str]:
    """The comments of Python source, by line."""
    return {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }


def comment_of(node: ast.AnnAssign, lines: list[str], comments: dict[int, str]) -> str:
    """The comments above and beside a field."""
    first = node.lineno
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    found = [comments.get(line) for line in range(first, node.end_lineno + 1)]
    return " ".join(text for text in found if text)


def default_of(section: type, name: str) -> str:
    """The default of a field; where it depends on the model, both."""
    field = section.__dataclass_fields__[name]
    if field.default_factory is not dataclasses.MISSING:
        return "its own defaults"
    if section is config.TrainConfig and field.default is config.UNSET:
        default = shown(vars(config.TrainConfig(model="another"))[name])
        embedded = shown(vars(config.TrainConfig())[name])
        if embedded != default:
            return f"default ``{default}``, with the embedded model ``{embedded}``"
        return f"default ``{default}``"
    return f"default ``{shown(field.default)}``"


def shown(value: object) -> str:
    """A default as code; for a section, only the fields that differ from its own."""
    if not isinstance(value, Section):
        return repr(value)
    plain = vars(type(value)())
    changed = [f"{k}={v!r}" for k, v in vars(value).items() if v != plain[k]]
    return f"{type(value).__name__}({', '.join(changed)})"
