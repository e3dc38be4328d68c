"""What the pages say works: code runs, commands parse, targets and links exist.

A block of code is run unless the line before it is ``<!-- no-test -->``. The blocks of
a page share their names, from top to bottom, as if a reader typed them. A script in
`docs/` is a notebook, and runs as it is.
"""

import functools
import pathlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

import pytest

import grpo_jax
from grpo_jax import cli, objective
from grpo_jax.config import TrainConfig
from grpo_jax.training import _run_dir

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("docs", "tpu_setup", "experiments", "benchmarks")
PAGES = sorted(
    page
    for page in [
        *ROOT.glob("*.md"),
        *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
    ]
)
NOTEBOOKS = sorted(set((ROOT / "docs").glob("*.py")) - {ROOT / "docs" / "conf.py"})
SKIP = "<!-- no-test -->"
SEPARATORS = {"&&", "||", "|", ";", "&", ">", ">>", "2>"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first fence."""

    page: pathlib.Path
    language: str
    text: str
    line: int
    skipped: bool

    def __str__(self):
        return f"{name_of(self.page)}:{self.line}"


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, f"{page}: a block is not closed"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        yield Block(
            page=page,
            language=lines[start].strip().removeprefix("```").strip(),
            text="\n".join(lines[start + 1 : end]),
            line=start + 1,
            skipped=start > 0 and lines[start - 1].strip() == SKIP,
        )


def prose(page):
    """The page without its blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.DOTALL | re.MULTILINE)


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def commands():
    """(block, words) of each simple command in the blocks that are for a shell."""
    for block in BLOCKS:
        if block.language not in ("sh", "bash", "console") or block.skipped:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            command: list[str] = []
            for word in [*words, ";"]:
                if word not in SEPARATORS:
                    command.append(word)
                    continue
                while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                    command.pop(0)
                if command:
                    yield block, command
                command = []


def uses_of(program):
    """(place, arguments) of each use of a program, by whatever path it is called.

    Another program may start it, as in `srun grpo-jax eval`, or take the whole command
    as one argument.
    """
    uses = []
    for block, words in commands():
        inner = [word for word in words if word.startswith(f"{program} ")]
        for command in [words, *map(shlex.split, inner)]:
            names = [pathlib.Path(word).name for word in command]
            if program in names and command[0] not in ("git", "cd", "pip"):
                uses.append((str(block), command[names.index(program) + 1 :]))
    return uses


def titles(uses):
    return [f"{place} {' '.join(arguments)}"[:90] for place, arguments in uses]


GRPO_JAX, MAKE = [use for use in uses_of("grpo-jax") if use[1]], uses_of("make")


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses the arguments of grpo-jax as the program does, and runs nothing."""
    names = ("train", "plan", "evaluate", "sample", "chat", "export", "plot", "report")
    for name in names:
        # The wrapper has the signature and the docstring that tyro reads.
        command = vars(cli)[f"_{name}"]
        monkeypatch.setattr(
            cli, f"_{name}", functools.wraps(command)(lambda *args, **kwargs: None)
        )

    def parse(arguments):
        if "--config" in arguments:
            # A reader's own file is not here; a whole one stands in for it.
            _run_dir.check_config(tmp_path, TrainConfig())
            place = arguments.index("--config") + 1
            file = str(tmp_path / "config.yaml")
            arguments = [*arguments[:place], file, *arguments[place + 1 :]]
        cli._dispatch(arguments)

    return parse


def code_of(page):
    """The program of a page; its line numbers are the page's: a traceback helps."""
    if page.suffix == ".py":
        return page.read_text(encoding="utf-8")
    lines: list[str] = []
    for block in PYTHON:
        if block.page == page and not block.skipped:
            lines += [""] * (block.line - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [*NOTEBOOKS, *(p for p in PAGES if any(b.page == p for b in PYTHON))],
    ids=name_of,
)
def test_the_code_of_a_page_runs(page, tmp_path):
    program = tmp_path / "page.py"
    program.write_text(code_of(page), encoding="utf-8")
    # As a reader has it: one device, and none of the strict settings of the tests.
    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_few_blocks_are_left_out():
    assert sum(block.skipped for block in PYTHON) <= 4


@pytest.mark.parametrize(("place", "arguments"), GRPO_JAX, ids=titles(GRPO_JAX))
def test_a_command_of_a_page_parses(place, arguments, parse):
    try:
        parse(arguments)
    except SystemExit as end:
        prints = {"--help", "--tyro-print-completion"} & set(arguments)
        assert not end.code and prints, f"{place} does not parse"


def test_a_command_with_an_unknown_flag_would_be_found(parse):
    with pytest.raises(SystemExit):
        parse(["eval", "--modle", "embedded"])
    with pytest.raises(SystemExit):
        parse(["train", "--objective.beta", "1"])


def in_code(pattern):
    """(page, text) of each piece of code within the prose of docs/ that is like it."""
    for page in PAGES:
        if page.parent.name == "docs":
            for code in re.findall(r"`([^`\n]+)`", prose(page)):
                if re.fullmatch(pattern, code):
                    yield name_of(page), code


def test_flags_in_the_prose_parse(parse):
    flags = {code for _, code in in_code(r"--[a-z]+\.[a-z-]+ .*")}
    assert len(flags) > 10
    for flag in flags:
        parse(["train", *shlex.split(flag)])


def test_fields_in_the_prose_exist():
    config = TrainConfig()
    sections = {n: v for n, v in vars(config).items() if hasattr(v, "section")}
    names = "|".join(sections)
    named = set(in_code(rf"({names})\.\w+|--({names})\.[a-z-]+"))
    assert len(named) > 40
    for page, name in named:
        section, field = name.removeprefix("--").replace("-", "_").split(".")
        assert field in vars(sections[section]), f"{page}: {name}"


def test_metrics_in_the_prose_exist():
    sources = [*(ROOT / "grpo_jax").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    shared = r"(rewards/<name>|completions|clip_ratio|time|tokens_per_second|mfu|eval"
    named = set(in_code(rf"{shared}|compile|sampler_logp_diff|tools|episodes)/\w+"))
    assert len(named) > 20
    for page, name in named:
        # Some are put together from parts: rewards/<name>/mean, clip_ratio/low_mean.
        assert name in code or f"/{name.split('/')[-1]}" in code, f"{page}: {name}"


def test_each_public_name_has_its_place_in_the_api_pages():
    pages = (ROOT / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    assert {*grpo_jax.__all__, *objective.__all__} - {"__version__"} <= set(named)


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"train", "test", "check"} <= targets
    used = {
        word
        for _, words in MAKE
        for word in words
        if re.fullmatch("[a-z][a-z-]*", word)
    }
    for page in PAGES:
        used |= set(re.findall(r"`make ([a-z-]+)", prose(page)))
    assert used <= targets


def test_files_in_commands_exist():
    missing = [
        f"{block}: {word}"
        for block, words in commands()
        for word in words
        if re.fullmatch(
            r"(\./)?(experiments|benchmarks|tests|tpu_setup)/[\w/]+\.\w+", word
        )
        and not (ROOT / word).exists()
        and word != "tpu_setup/env.sh"  # the reader's own, made from the example
    ]
    assert not missing


def anchors(page):
    """Names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.strip().replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target):
            broken.append(link)
    assert not broken


def theory_rows():
    """(functions, tests) of the rows of the tables in docs/theory.md."""
    page = ROOT / "docs" / "theory.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        if line.startswith("|") and "::" in cells[-1]:
            functions = re.findall(r"`([a-z_0-9]+)", cells[-2])
            yield functions, re.findall(r"(test_\w+)::(test_\w+)", cells[-1])


def test_functions_and_tests_of_the_theory_exist():
    rows = list(theory_rows())
    assert rows
    functions = {name for names, _ in rows for name in names}
    assert functions <= {*vars(objective), *vars(objective.Mean)}
    for module, test in {pair for _, pairs in rows for pair in pairs}:
        source = (ROOT / "tests" / "objective" / f"{module}.py").read_text()
        assert f"def {test}(" in source, f"{module}::{test}"
