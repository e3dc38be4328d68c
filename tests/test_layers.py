"""Imports point one way, heavy libraries have one owner, files and functions are small.

Nothing is imported here: every file of the package is read as a syntax tree, so that
imports inside functions count as well.
"""

import ast
import functools
import graphlib
import pathlib
import re
import sys
import tomllib
from dataclasses import dataclass

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_jax"
TESTS = ROOT / "tests"

# Folder or module -> row.
ROWS = {
    "config": 0,
    "objective": 1,
    "parallel": 1,
    "tasks": 1,
    "workers": 1,
    "models": 2,
    "weights": 3,
    "environments": 3,
    "rewards": 3,
    "checkpointing": 3,
    "planning": 4,
    "rollout": 4,
    "reporting": 4,
    "training": 5,
    "flags": 6,
    "cli": 6,
    "commands": 6,
    "__main__": 6,
}
# Library -> the module that owns it. All but Orbax are imported inside functions. What
# a longer name here starts with has an owner of its own.
OWNERS = {
    "orbax": "checkpointing._orbax",
    "gcsfs": "checkpointing._gcs",
    "fsspec": "checkpointing._gcs",
    "transformers": "weights.tokenizer",
    # About functions, and not about models: environments know nothing of weights.
    "transformers.utils.chat_template_utils": "environments._tools",
    "tokenizers": "weights._gguf_tokenizer",
    "huggingface_hub": "weights.pretrained",
    "gguf": "weights._gguf_file",
    "datasets": "tasks.gsm8k",
    "reasoning_gym": "tasks.reasoning_gym",
    "textarena": "environments.textarena",
    "skyrl_gym": "environments.skyrl_gym",
    "matplotlib": "reporting._figure",
    "wandb": "reporting.trackers",
    "tensorboardX": "reporting.trackers",
}
HOST_ONLY = ("environments", "tasks", "rewards", "workers")
# What a GRPO step of a plain dense model passes through, from a row to an update: the
# part of the package to read first. All else is a wing, which the spine does not need.
# Behind `Sampler` there is the engine, a second part to read. `_together` has the same
# algorithm in one loop without slots, which draws the same.
SPINE = (
    "rollout.encoding",
    "rollout.sampler",
    "rollout.generate",
    "rollout._together",
    "rollout.draw",
    "rollout.rollout",
    "rollout.collect",
    "models.decoder",
    "models._block",
    "models._layers",
    "models._rows",
    "models._attention",
    "models._row_attention",
    "models.cache",
    "models.rope",
    "objective",
    "objective.advantages",
    "objective.aggregate",
    "objective._checks",
    "objective.kl",
    "objective.logprobs",
    "objective.loss",
    "objective.structs",
    "objective.surrogate",
    "training.advantages",
    "training.state",
    "training.step",
    "training.learner",
    "training.loop",
)
WINGS = ("weights", "planning", "reporting", "checkpointing", "rewards", "training")
WINGS += ("environments",)
# What the spine may import of the wings. `training.loop` wires the whole run together,
# so it may import anything.
OF_THE_WINGS = {
    "rollout.encoding": {"weights.tokenizer"},
    "rollout.draw": {"weights.tokenizer"},
    "rollout.rollout": {"rewards.metrics"},
    "rollout.collect": {"weights.tokenizer", "rewards.runner"},
    "training.learner": {
        "training._like_lengths",
        "training.compiled",
        "training.optimizer",
    },
    "training.state": {"training._like_lengths"},
    "training.step": {
        "training._balance",
        "training._like_lengths",
        "training._microbatches",
    },
}
# Modules without a test file of their own name -> the file that tests them.
TESTED_IN = {
    "commands": "test_cli.py",
    "config.objective": "config/test_run.py",
    "config.trl_names": "test_flags.py",
    "environments.outcome": "environments/test_play.py",
    "environments._channel": "environments/test_isolated.py",
    "environments._episode": "environments/test_play.py",
    "environments._local": "environments/test_play.py",
    "environments._pool": "environments/test_host.py",
    "environments._seat": "environments/test_play.py",
    "environments._steps": "environments/test_play.py",
    "environments._worker": "environments/test_isolated.py",
    "models._block": "models/test_decoder.py",
    "models.cache": "models/test_attention.py",
    "models._frozen": "models/test_quantized.py",
    "models._frequencies": "models/test_rope.py",
    "models._hf_config": "models/test_config.py",
    "models._hf_mixers": "models/test_config.py",
    "models._hf_rope": "models/test_config.py",
    "models._hf_wrappers": "models/test_config.py",
    "models.limits": "rollout/test_encoding.py",
    "models.protocol": "training/test_own_model.py",
    "models._tpu_blocks": "models/test_tpu_flash.py",
    "models._tpu_kernels": "models/test_tpu_flash.py",
    "models._tpu_experts": "models/test_experts.py",
    "models._routing": "models/test_experts.py",
    "models._delta_net": "models/test_hybrid.py",
    "models._conv": "models/test_short_conv.py",
    "models._lfm2": "models/test_hf_checks.py",
    "models._hf_conv": "models/test_short_conv.py",
    "models._mixers": "models/test_hybrid.py",
    "models._short_conv_net": "models/test_short_conv.py",
    "models._rows": "models/test_decoder.py",
    "models._row_attention": "models/test_decoder.py",
    "planning._bytes": "planning/test_memory.py",
    "planning._kept": "planning/test_memory.py",
    "parallel.agreement": "training/test_preemption.py",
    "parallel.collectives": "training/test_programs.py",
    "reporting.logs": "reporting/test_console.py",
    "reporting._figure": "reporting/test_plots.py",
    "reporting._panels": "reporting/test_plots.py",
    "reporting._run_files": "reporting/test_metrics.py",
    "tasks._rows": "tasks/test_base.py",
    "rewards.metrics": "rewards/test_runner.py",
    "environments.reward": "rollout/test_episodes.py",
    "rollout._complete": "rollout/test_generate.py",
    "rollout._blocks": "rollout/test_draw.py",
    "rollout._engine": "rollout/test_generate.py",
    "rollout._together": "rollout/test_generate.py",
    "rollout.scoring": "rollout/test_collect.py",
    "rollout._extend": "rollout/test_forced.py",
    "rollout._loop": "rollout/test_slots.py",
    "rollout._settings": "rollout/test_generate.py",
    "rollout._programs": "rollout/test_generate.py",
    "rollout._stored": "rollout/test_carry_over.py",
    "checkpointing._bucket_folders": "checkpointing/test_bucket.py",
    "checkpointing._bucket_lock": "checkpointing/test_bucket.py",
    "checkpointing._gcs": "checkpointing/test_bucket.py",
    "checkpointing._steps": "checkpointing/test_retention.py",
    "checkpointing._metadata": "checkpointing/test_checkpoints.py",
    "checkpointing._orbax": "checkpointing/test_accidents.py",
    "training._lowered": "planning/test_programs.py",
    "planning._counts": "planning/test_program_text.py",
    "planning._compiled_table": "training/test_compile_plan.py",
    "rollout.lowered": "planning/test_programs.py",
    "training.scores": "training/test_evaluate.py",
    "training._held_out": "training/test_evaluate.py",
    "training._judge": "training/test_evaluate.py",
    "training.compiled": "training/test_step.py",
    "training._microbatches": "training/test_step.py",
    "training._policy": "training/test_restore.py",
    "training._reference": "training/test_lora.py",
    "training._run": "training/test_loop.py",
    "training.state": "training/test_step.py",
    "weights._arrays": "training/test_quantized_base.py",
    "weights._adapter_names": "weights/test_adapter.py",
    "models._family": "models/test_hf_checks.py",
    "weights._name_tables": "weights/test_names.py",
    "weights._gguf_config": "weights/test_gguf.py",
    "weights._gguf_pre_tokenizers": "weights/test_gguf_tokenizer.py",
    "weights._mixer_names": "weights/test_names.py",
    "weights._gguf_file": "weights/test_gguf.py",
    "weights._text_tensors": "weights/test_pretrained.py",
    "workers.event_loop": "rewards/test_in_process.py",
    "workers.process": "rewards/test_subprocess.py",
}
# Deprecated, private, or not to be mixed with Linen.
BANNED = (
    "jax._src",
    "jax.experimental.maps",
    "jax.experimental.pjit",
    "jax.experimental.shard_map",
    "flax.nnx",
    "torch",
)


@dataclass(frozen=True)
class Import:
    """One imported name: in which module, what, where, and whether at import time."""

    importer: str
    target: str
    line: int
    lazy: bool

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: {self.target}"


def module_name(path: pathlib.Path) -> str:
    """`training.loop` for training/loop.py, `training` for its __init__, "" on top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names that a statement or a call of `import_module` imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            assert node.level == 0, f"relative import of {node.module}"
            return [f"{node.module}.{alias.name}" for alias in node.names]
        case ast.Call(func=func, args=[ast.Constant(value=str(name))]):
            called = ast.unparse(func).rpartition(".")[2]
            return [name] if called in ("import_module", "__import__") else []
    return []


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            for name in imported_names(child):
                found.append(Import(module, name, child.lineno, lazy))
            function = isinstance(child, ast.FunctionDef | ast.Lambda)
            visit(child, lazy or function or is_type_checking(child))

    visit(tree(module), False)
    return tuple(found)


def all_imports() -> list[Import]:
    return [found for module in FILES for found in imports(module)]


def own_module(name: str) -> str | None:
    """The module of the package that a dotted name lies in; None for others."""
    if name.partition(".")[0] != "grpo_jax":
        return None
    inner = name.removeprefix("grpo_jax").removeprefix(".")
    # `from grpo_jax.tasks import load_task` names a function: its module is meant.
    return inner if inner in FILES else inner.rpartition(".")[0]


def folder(module: str) -> str:
    is_package = FILES[module].name == "__init__.py"
    return module if is_package else module.rpartition(".")[0]


def row(module: str) -> int:
    return ROWS[module] if module in ROWS else ROWS[folder(module)]


def may_import(importer: str, imported: str) -> bool:
    higher, lower = row(importer), row(imported)
    return lower < higher or (folder(importer) == folder(imported) and lower == higher)


def functions(module: str) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef)]


def public_definitions(module: str) -> list[ast.FunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [node for node in tree(module).body if isinstance(node, kinds)]
    return [node for node in found if not node.name.startswith("_")]


def exported_names() -> set[str]:
    """The names that `grpo_jax` itself offers; nothing is imported to read them."""
    (table,) = (
        node.value
        for node in tree("").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    texts = {n.value for n in ast.walk(table) if isinstance(n, ast.Constant)}
    return {text for text in texts if not text.startswith("grpo_jax.")}


def is_private(name: str) -> bool:
    """Whether the last part of a dotted name starts with one underscore."""
    last = name.rpartition(".")[2]
    return last.startswith("_") and not last.startswith("__")


def is_of_others(importer: str, target: str) -> bool:
    """Whether a dotted name belongs to other authors, who may change it at will.

    So does a module with an underscore of another folder, and a name with an underscore
    of any other module.
    """
    module = own_module(target)
    if module is None:
        return False
    of_module = is_private(target) and target != f"grpo_jax.{module}"
    return of_module or (is_private(module) and folder(module) != folder(importer))


def private_uses(importer: str, code: ast.Module) -> list[str]:
    """The names of others that a module imports, or reads as attributes of modules."""
    modules = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(code)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.{alias.name}".removeprefix("grpo_jax.") in FILES
    }
    wrong = []
    for node in ast.walk(code):
        targets = imported_names(node)
        match node:
            case ast.Attribute(value=ast.Name(id=alias), attr=name):
                targets = [f"{modules[alias]}.{name}"] if alias in modules else []
        found = [target for target in targets if is_of_others(importer, target)]
        wrong += [f"{importer}, line {node.lineno}: {target}" for target in found]
    return wrong


def modules_used_elsewhere() -> set[str]:
    """Those that another folder, an experiment, a benchmark or a page imports."""
    used = {
        module
        for found in all_imports()
        if (module := own_module(found.target)) is not None
        and folder(module) != folder(found.importer)
    }
    for place in ("docs", "experiments", "benchmarks"):
        for path in (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                used.update(filter(None, map(own_module, imported_names(node))))
    pages = [p.read_text(encoding="utf-8") for p in (ROOT / "docs").rglob("*.md")]
    for module, path in FILES.items():
        # The tables of the API pages name the file of each name.
        texts = f"`{path.relative_to(ROOT).as_posix()}`", f"grpo_jax.{module} import"
        if any(text in page for page in pages for text in texts):
            used.add(module)
    return used


def test_every_module_has_a_row():
    rowless = [m for m in FILES if m and m not in ROWS and folder(m) not in ROWS]
    assert not rowless, "give them a row here and in CONTRIBUTING.md"


def test_every_module_has_its_tests():
    """In the file of its name, without its underscore, or in the one listed above."""
    untested, needless = [], set(TESTED_IN)
    for module, path in FILES.items():
        if path.stem in ("__init__", "__main__"):
            continue
        own = path.relative_to(PACKAGE).with_name(f"test_{path.name.lstrip('_')}")
        if (TESTS / own).is_file():
            continue
        needless.discard(module)
        if not (module in TESTED_IN and (TESTS / TESTED_IN[module]).is_file()):
            untested.append(f"{module}: write tests/{own}")
    assert not untested, "or name the file that tests it in TESTED_IN"
    assert not needless, "these have a test file of their own name, or are gone"


def test_the_rows_are_those_of_the_contributors_page():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^ (\d)  (.+)$", page, flags=re.MULTILINE)
    assert len(rows) == 7
    named = {name: int(n) for n, line in rows for name in re.findall(r"\w+", line)}
    assert named == {name: ROWS[name] for name in ROWS if name != "__main__"}


def test_imports_point_to_lower_rows_or_within_a_folder():
    wrong = []
    for found in all_imports():
        imported = own_module(found.target)
        if imported is not None and not may_import(found.importer, imported):
            wrong.append(str(found))
    assert not wrong


def test_names_with_an_underscore_are_used_at_home_only():
    assert not [use for module in FILES for use in private_uses(module, tree(module))]


def test_a_module_that_only_its_folder_uses_has_an_underscore():
    """Or it is of the spine, which is there to be read."""
    public = {m for m in FILES if folder(m) not in ("", m) and not is_private(m)}
    alone = public - set(SPINE) - modules_used_elsewhere()
    assert not alone


def test_few_definitions_are_public_and_not_exported():
    exported = exported_names()
    found = [
        f"{module}.{node.name}"
        for module in FILES
        if not is_private(module)
        for node in public_definitions(module)
        if node.name not in exported
    ]
    assert len(found) <= 277, "start with an underscore what its module alone uses"


def test_the_spine_is_short():
    """It can be read in an evening."""
    assert sum(len(FILES[m].read_text().splitlines()) for m in SPINE) <= 4960


def test_the_spine_imports_no_wing():
    wrong = []
    for module in set(SPINE) - {"training.loop"}:
        for found in imports(module):
            name = own_module(found.target)
            is_wing = name and name not in SPINE and folder(name) in WINGS
            if is_wing and name not in OF_THE_WINGS.get(module, ()):
                wrong.append(str(found))
    assert not wrong


def test_the_package_itself_imports_none_of_its_modules():
    assert not [str(i) for i in imports("") if own_module(i.target) is not None]


def test_there_are_no_cycles():
    graph = {
        module: {own_module(found.target) for found in imports(module)} - {None}
        for module in FILES
    }
    # Raises CycleError with the modules of a cycle.
    graphlib.TopologicalSorter(graph).prepare()


def test_the_objective_knows_only_arrays():
    allowed = {"jax", "jaxtyping", *sys.stdlib_module_names}
    wrong = []
    for found in all_imports():
        if folder(found.importer) != "objective":
            continue
        inside = found.target.startswith("grpo_jax.objective")
        struct = found.target == "flax.struct"
        if not (inside or struct or found.library in allowed):
            wrong.append(str(found))
    assert not wrong


def loaded_with(module: str) -> set[str]:
    """The module, and all that importing it imports, packages on the way included."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        targets = [own_module(i.target) for i in imports(name) if not i.lazy]
        waiting += [target for target in targets if target is not None]
    return reached


@pytest.mark.parametrize(
    "module", [m for m in FILES if m in HOST_ONLY or folder(m) in HOST_ONLY]
)
def test_rewards_and_tasks_import_no_jax(module):
    libraries = {"jax", "jaxlib", "flax", "optax", "orbax"}
    direct = [str(i) for i in imports(module) if i.library in libraries]
    reached = [
        str(i)
        for other in loaded_with(module)
        for i in imports(other)
        if i.library in libraries and not i.lazy
    ]
    assert not direct + reached


def owned(target: str) -> str | None:
    """The longest name in `OWNERS` that an imported name starts with."""
    owners = [name for name in OWNERS if f"{target}.".startswith(f"{name}.")]
    return max(owners, key=len, default=None)


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_has_one_owner(library):
    users = {i.importer for i in all_imports() if owned(i.target) == library}
    assert users == {OWNERS[library]}


def test_heavy_libraries_are_imported_on_use():
    lazily = set(OWNERS) - {"orbax"}
    early = [str(i) for i in all_imports() if i.library in lazily and not i.lazy]
    assert not early


def test_deprecated_and_private_modules_stay_out():
    banned = tuple(f"{name}." for name in BANNED)
    assert not [str(i) for i in all_imports() if f"{i.target}.".startswith(banned)]


def test_imported_libraries_are_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + sum(
        project["optional-dependencies"].values(), start=[]
    )
    declared = {re.match(r"[\w-]+", line).group().lower() for line in lines}
    other_names = {
        "orbax": "orbax-checkpoint",
        "yaml": "pyyaml",
        "reasoning_gym": "reasoning-gym",
        "skyrl_gym": "skyrl-gym",
        "huggingface_hub": "transformers",  # which depends on it
        "tensorboardX": "tensorboardx",
    }
    known = {"grpo_jax", "__future__", *sys.stdlib_module_names}
    used = {i.library for i in all_imports()} - known
    assert {other_names.get(name, name) for name in used} <= declared


def test_files_are_short():
    lengths = {m: len(p.read_text().splitlines()) for m, p in FILES.items()}
    assert not {m: n for m, n in lengths.items() if n > 400}


def test_functions_are_short():
    long = []
    for module in FILES:
        for node in functions(module):
            documented = ast.get_docstring(node) is not None
            body = node.body[1:] if documented else node.body
            if body and node.end_lineno - body[0].lineno + 1 > 60:
                long.append(f"{module}.{node.name}")
    assert not long


def test_positional_arguments_are_few():
    many = []
    for module in FILES:
        for node in functions(module):
            names = [a.arg for a in node.args.posonlyargs + node.args.args]
            private = node.name.startswith("_") and node.name != "__init__"
            if not private and len([n for n in names if n not in ("self", "cls")]) > 6:
                many.append(f"{module}.{node.name}")
    assert not many


def test_modules_and_public_definitions_are_documented():
    silent = [module for module in FILES if ast.get_docstring(tree(module)) is None]
    silent += [
        f"{module}.{node.name}"
        for module in FILES
        for node in public_definitions(module)
        if ast.get_docstring(node) is None
    ]
    assert not silent


def test_public_functions_are_annotated():
    bare = []
    for module in FILES:
        for node in public_definitions(module):
            if isinstance(node, ast.ClassDef):
                continue
            every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            if node.returns is None or any(a.annotation is None for a in every):
                bare.append(f"{module}.{node.name}")
    assert not bare


def test_only_the_command_line_prints():
    printing = {
        module
        for module in FILES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    }
    assert printing <= {"cli", "commands"}


def test_the_rules_reject_what_they_should():
    # Upwards, sideways; then what is allowed.
    assert not may_import("config.run", "models.config")
    assert not may_import("tasks.base", "parallel.mesh")
    assert not may_import("rollout.generate", "reporting.metrics")
    assert not may_import("checkpointing.checkpoints", "training.state")
    assert may_import("training.loop", "training.step")
    assert may_import("cli", "training.loop") and not may_import("training.loop", "cli")


@pytest.mark.parametrize(
    ("importer", "code"),
    [
        ("training.loop", "from grpo_jax.tasks._numbers import plain"),
        ("training.loop", "from grpo_jax.tasks import _numbers"),
        ("tasks.gsm8k", "from grpo_jax.tasks.answers import _normalized"),
        ("tasks.gsm8k", "from grpo_jax.tasks import answers\nanswers._normalized('')"),
    ],
)
def test_the_use_of_a_private_name_is_found(importer, code):
    assert private_uses(importer, ast.parse(code))
    assert not private_uses("tasks.answers", ast.parse("import grpo_jax.tasks._rows"))
