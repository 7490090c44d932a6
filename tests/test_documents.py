"""Documents are short, current and point to what is there."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs.generate import pages
from emorl.cli import COMMANDS
from emorl.fusion.operators import OPERATORS
from emorl.objectives import REGISTRY

ROOT = Path(__file__).parents[1]
TRACKED = [ROOT / name for name in subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()]  # fmt: skip
FILES = [path for path in TRACKED or ROOT.rglob("*") if path.is_file() and "runs" not in path.relative_to(ROOT).parts[:1]]
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
POINTER = re.compile(r"(?<![\w/.{<-])((?:[\w.-]+/)+[\w-]+\.(?:py|md|html|ipynb|sh)|[A-Z]+\.md)\b")
_ELSEWHERE = re.compile(r"^(runs|report|OUTPUT|RUN|path|my_\w+|models|[\w.]+\.(com|edu|org))/|/X\.py$|mergekit")
"""a user's files, a run's, or other projects'"""


def named(path):
    return str(path.relative_to(ROOT))


def test_the_readme_stops_early():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 800
    assert "docs/front.svg" in text
    assert ElementTree.parse(ROOT / "docs" / "front.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_lines_of_pages_are_at_most_110_characters(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > 110]


@pytest.mark.parametrize("name", list(pages()))
def test_a_generated_page_is_current(name):
    assert (ROOT / "docs" / name).read_text() == pages()[name], "stale: python -m docs.generate"


def test_generated_pages_name_every_command_objective_and_method():
    texts = pages()
    assert all(f"\n## emorl {name}\n" in texts["commands.md"] for name in COMMANDS)
    assert all(f"\n## {name}\n" in texts["objectives.md"] for name in REGISTRY)
    assert all(name in texts["fusion-methods.md"] for name in OPERATORS)
    assert "value.scalarize [mean]" in texts["experiment-keys.md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)#:\s]*(?:#[^)\s]*)?)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        place = (path.parent / file) if file else path
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


def pointers(path):
    """Paths that comments, docstrings or a document's text name."""
    text = path.read_text()
    if path.suffix == ".py":
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        said = [token.string for token in tokens if token.type == tokenize.COMMENT]
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
        said += [
            node.value.value for node in nodes if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]
        text = "\n".join(said)
    return [found for found in POINTER.findall(text) if not _ELSEWHERE.search(found)]


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix in (".py", ".toml", ".md", ".yaml")], ids=named)
def test_files_that_are_pointed_to_exist(path):
    if path.name in ("LOG.md", "CHANGELOG.md"):  # say what was
        return
    rooms = (ROOT, ROOT / "emorl", ROOT / "tests", path.parent, ROOT.parent / "shared", ROOT.parent)
    gone = [p for p in pointers(path) if not any((room / p).exists() or list(room.glob(f"*/{p}")) for room in rooms)]
    has_shared = (ROOT.parent / "shared").is_dir()  # material beside the repository, which a stranger does not have
    assert [p for p in gone if has_shared or "shared/" not in p] == []
