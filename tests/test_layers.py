"""The import rows of the README: a module uses rows above its own, never below, and nothing imports inside functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    {"config"},
    {"runs"},
    {"data", "policies"},
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


def imports(path, *, inside_functions):
    tree = ast.parse(path.read_text())
    nested = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if (id(node) in nested) == inside_functions:
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


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "cli.py"], ids=lambda path: path.stem)
def test_nothing_is_imported_inside_functions(path):
    assert not list(imports(path, inside_functions=True))


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


@pytest.mark.parametrize("module", ["config.experiment", "config.reward", "runs.run", "runs.layout", "cli"])
def test_a_wrong_config_is_found_without_torch(module):
    seen, queue = set(), [f"emorl.{module}"]
    while queue:
        current = queue.pop()
        path = ROOT / (current.replace(".", "/") + ".py")
        if current in seen or not path.exists():
            continue
        seen.add(current)
        for name in imports(path, inside_functions=False):
            assert name.split(".")[0] not in ("torch", "transformers", "trl", "peft", "datasets"), f"{current} imports {name}"
            queue += [name, name.rpartition(".")[0]]
