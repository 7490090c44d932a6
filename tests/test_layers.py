"""The import rows of the README: a module uses rows above its own, never below, and nothing imports inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    {"config"},
    {"runs"},
    {"policies"},
    {"data"},
    {"objectives"},
    {"evaluation", "aggregation", "fusion"},
    {"training", "search", "dynamic"},
    {"serving", "reporting", "quickstart"},
    {"stages"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
MODULES = sorted((ROOT / "emorl").rglob("*.py"))


def part(path):
    relative = path.relative_to(ROOT / "emorl")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _is_for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path, *, inside_functions):
    tree = ast.parse(path.read_text())
    nested = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for_types = {id(node) for block in ast.walk(tree) if _is_for_types(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if (id(node) in nested) == inside_functions and id(node) not in for_types:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from {f"{node.module}.{alias.name}" for alias in node.names}


def test_modules_are_found():
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_part_and_rows_above(path):
    if path == ROOT / "emorl" / "__init__.py":
        return
    own = part(path)
    for name in [*imports(path, inside_functions=False), *imports(path, inside_functions=True)]:
        if name.startswith("emorl."):
            other = name.split(".")[1]
            allowed = LEVEL[other] < LEVEL[own] or other == own
            if own not in ("cli", "__main__"):
                assert allowed, f"{path.name} ({own}) may not import {name}"
        assert not name.startswith(("reward_models", "recipes", "analysis")), f"emorl may not import {name}"


def imports_where_it_works(path):
    """Whether a module may wait with its imports until it needs them: the command line, the stages, and the lazy registries."""
    relative = path.relative_to(ROOT / "emorl")
    return relative.parts[0] in ("cli.py", "__init__.py", "stages")


@pytest.mark.parametrize("path", [path for path in MODULES if not imports_where_it_works(path)], ids=lambda path: path.stem)
def test_nothing_is_imported_inside_functions(path):
    assert not list(imports(path, inside_functions=True))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_rooms_that_run_or_read_experiments_know_one(path):
    """Everything else can be used without an `Experiment`."""
    if part(path) not in ("config", "stages", "reporting", "quickstart", "cli", "__init__"):
        assert "emorl.config.experiment.Experiment" not in {*imports(path, inside_functions=False)}


@pytest.mark.parametrize("path", [path for path in MODULES if part(path) == "reporting"], ids=lambda path: path.stem)
def test_reporting_only_reads(path):
    for name in imports(path, inside_functions=False):
        assert not name.startswith(("torch", "emorl.aggregation", "emorl.dynamic", "emorl.search", "emorl.training")), name


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name for name, count in lines.items() if count > 400} <= {"emorl/aggregation/trie.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_have_at_most_50_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 50, node.name


def test_there_is_no_import_cycle():
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(imports(path, inside_functions=False))
    graph = {
        name: {target for target in graph for wanted in used if target in (wanted, wanted.rpartition(".")[0])} - {name}
        for name, used in graph.items()
    }
    done = set()

    def visit(name, above):
        assert name not in above, f"cycle: {' -> '.join([*above, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "pandas", "optuna")
LIGHT = [path for path in MODULES if part(path) in ("config", "runs", "stages", "cli", "__init__")]
LIGHT += [ROOT / "emorl" / "reporting" / "fusion_lines.py", ROOT / "emorl" / "objectives" / "loading.py"]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_answers_a_cheap_mistake_loads_no_library(path):
    seen, queue = set(), [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")]
    while queue:
        current = queue.pop()
        file = ROOT / (current.replace(".", "/") + ".py")
        file = file if file.exists() else ROOT / current.replace(".", "/") / "__init__.py"
        if current in seen or not file.exists():
            continue
        seen.add(current)
        for name in imports(file, inside_functions=False):
            assert name.split(".")[0] not in HEAVY, f"{current} imports {name}"
            queue += [name, name.rpartition(".")[0]]


def test_all_stages_are_imported_without_torch():
    """In a process of its own, which nothing else has filled."""
    names = [f"emorl.stages.{path.stem}" for path in (ROOT / "emorl" / "stages").glob("*.py")]
    code = f"import emorl, {', '.join(names)}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
