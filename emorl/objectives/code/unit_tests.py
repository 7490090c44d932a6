"""Code that passes unit tests, as MBPP (Austin et al. 2021, arXiv 2108.07732) and HumanEval (Chen et al. 2021, arXiv
2107.03374) score it.

Departure: tests see the completion's values as plain data; an object of its own class compares with nothing, because it could
call itself equal to everything.
"""

import ast
import functools
import io
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from emorl.config import UserError
from emorl.objectives.code.sandbox import Limits, Suite, run
from emorl.objectives.code.sandbox_link import TRUSTED
from emorl.objectives.rules.columns import column, texts
from emorl.policies.conversation import completion_text

logger = logging.getLogger(__name__)

_PYTHON = {"python", "python3", "py"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def code_of(text: str) -> str:
    """The code in a text: its Python fences joined, else its fences without a language, else the whole text.

    What follows `</think>` is read; an open fence ends with the text.

    >>> code_of("Sure:\\n```python\\nx = 1\\n```\\nRun it:\\n```sh\\npython x.py\\n```")
    'x = 1\\n'
    """
    text = text.rpartition("</think>")[2]
    blocks: list[tuple[str, list[str]]] = []  # language, lines
    inside = False
    for line in io.StringIO(text):
        bare = line.lstrip(" \t")
        if not bare.startswith("```"):
            if inside:
                blocks[-1][1].append(line)
        elif inside or not line.endswith("\n"):
            inside = False
        else:
            inside = True
            blocks.append((re.split(r"[^\w+-]", bare[3:].lstrip(" \t"), maxsplit=1)[0].lower(), []))
    python = [lines for language, lines in blocks if language in _PYTHON] or [
        lines for language, lines in blocks if not language
    ]
    return "\n".join(map("".join, python)) if python else text


@functools.lru_cache(maxsize=10_000)
def suite_of(texts: tuple[str, ...]) -> Suite:
    """One test per top-level statement with an assert, with the statements before it; calls at the end are one too.

    Raises:
        SyntaxError: the texts are not Python.
        ValueError: nothing in them tests anything.
    """
    tests, names, called, modules, group = [], set(), set(), set(), []
    with warnings.catch_warnings(action="ignore"):  # of data that is not ours, such as "\d"
        statements = [statement for text in texts for statement in ast.parse(text).body]
        for place, statement in enumerate(statements, start=1):
            nodes = list(ast.walk(statement))
            names |= {node.id for node in nodes if isinstance(node, ast.Name)}
            called |= {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
            modules |= {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
            group.append(statement)
            if _holds(statement, ast.Assert) or (place == len(statements) and any(_holds(node, ast.Call) for node in group)):
                tests.append(tuple(compile(ast.Module([part], type_ignores=[]), "tests.py", "exec") for part in group))
                group = []
    if not tests:
        raise ValueError("nothing in it is asserted or called; a test that only defines check(candidate) needs `entry_column`")
    return Suite(tuple(tests), tuple(sorted(names)), tuple(sorted((modules & TRUSTED) - called - {"datetime"})))


def _holds(statement: ast.stmt, kind: type[ast.AST]) -> bool:
    return not isinstance(statement, _DEFINITIONS) and any(isinstance(node, kind) for node in ast.walk(statement))


@functools.cache
def _warn(missing: str) -> None:
    logger.warning("unit_tests: this system does not give the code under test %s; run it in a container", missing)


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False))
class UnitTests:
    """1 where the completion's code passes all of its row's tests, else 0; with `partial`, the share of the tests it passes.

    Code runs in an interpreter of its own with an empty environment and a temporary directory, under limits of time, memory,
    file size and open files; all it starts is killed with it, and it opens no socket (Linux on x86-64 and ARM64). Where Linux
    gives user namespaces to everybody, it sees no other process, starts few, and can write no file elsewhere. Where not
    (Docker's default, macOS), one warning says what is missing: this then protects from accidents, not from attackers, so run
    emorl in a container without network. Either way it reads the files you can read.

    Tests run in a process of their own, which the code cannot reach, and see its values as plain data: built-in types,
    fractions, decimals, dates; arrays as lists. Printing, exiting and ending the process earn nothing, nor do objects equal to
    everything, redefined builtins and patched modules. What a test asks an object of the code's own (`x.is_right()`) is
    believed, and so is what every answer passes. Read what wins.

    >>> UnitTests(tests_column="tests")(["Double x."], ["def f(x):\\n    return 2 * x"], tests=[["assert f(2) == 4"]])
    [1.0]
    """

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    tests_column: str
    """the data set's column with the tests: code, or a list of assert statements"""
    setup_column: str | None = None
    """column with code before the completion's: imports, or the prompt of a function whose body the completion is"""
    entry_column: str | None = None
    """column with the name of the function that the tests' `check(candidate)` takes (HumanEval: entry_point)"""
    partial: bool = False
    """score the share of tests passed; a test is a statement with an assert, not inside a function"""
    timeout: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """seconds for one completion with all its tests"""
    memory_mb: int = Field(default=1024, ge=64)
    """MiB of address space for each of its processes (Linux)"""
    workers: int | None = Field(default=None, ge=1)
    """completions run at the same time; as many as there are processors by default"""
    isolation: Literal["best", "namespaces", "process"] = "best"
    """namespaces where the system gives them, only with all of them, or never"""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        values = zip(
            column(columns, self.tests_column, "unit_tests", "tests_column"),
            self._optional(columns, "setup_column", len(completions)),
            self._optional(columns, "entry_column", len(completions)),
            strict=True,
        )
        jobs: list[tuple[str, Suite] | None] = []
        for row, (completion, (tests, setup, entry)) in enumerate(zip(completions, values, strict=True)):
            suite, before, code = self._suite(tests, entry, row), self._setup(setup, row), code_of(completion_text(completion))
            jobs.append((before + code, suite) if code.strip() else None)  # silence must not pay
        distinct = list(dict.fromkeys(job for job in jobs if job))
        with ThreadPoolExecutor(self.workers or os.cpu_count() or 1) as pool:
            scores = dict(zip(distinct, pool.map(self._score, distinct), strict=True))
        return [scores[job] if job else 0.0 for job in jobs]

    def _optional(self, columns: Mapping[str, Any], option: str, rows: int) -> Sequence[Any]:
        name = getattr(self, option)
        return [None] * rows if name is None else column(columns, name, "unit_tests", option)

    def _suite(self, tests: Any, entry: Any, row: int) -> Suite:
        """The row's tests, compiled."""
        held = texts(tests, "unit_tests", self.tests_column, row)
        if self.entry_column is not None:
            if not isinstance(entry, str) or not entry.isidentifier():
                raise UserError(
                    f"unit_tests: completion {row} has {entry!r:.60} in column {self.entry_column!r}; expected a name"
                )
            held.append(f"check({entry})")
        try:
            return suite_of(tuple(held))
        except (SyntaxError, ValueError) as error:
            reason = f"not Python ({error})" if isinstance(error, SyntaxError) else error
            raise UserError(f"unit_tests: completion {row}, tests in column {self.tests_column!r}: {reason}") from None

    def _setup(self, setup: Any, row: int) -> str:
        """The row's setup as whole lines."""
        lines = [setup or ""] if setup is None or isinstance(setup, str) else setup
        if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
            raise UserError(
                f"unit_tests: completion {row} has {setup!r:.60} in column {self.setup_column!r}; expected code or a list"
            )
        return "".join(line if line.endswith("\n") or not line else f"{line}\n" for line in lines)

    def _score(self, job: tuple[str, Suite]) -> float:
        verdict = run(*job, Limits(self.timeout, self.memory_mb, self.isolation), self.partial)
        if verdict.missing and self.isolation == "namespaces":
            raise UserError(
                f"unit_tests: this system does not give the code under test {'; '.join(verdict.missing)}, which `isolation: "
                "namespaces` asks for; run in a container that is closed itself, with `isolation: best`"
            )
        if verdict.missing and self.isolation == "best":
            _warn("; ".join(verdict.missing))
        return sum(verdict.passed) / len(verdict.passed) if self.partial else float(all(verdict.passed))
