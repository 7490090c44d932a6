"""A run directory: what one stage wrote, with its resolved config, versions, seed and cost, and whether it is finished.

Stages meet only on disk. A finished run with the same config is skipped, an unfinished one is continued, and one with
another config is refused, so that nothing a user has is ever overwritten. Kept free of torch.
"""

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emorl.config import UserError
from emorl.runs.faults import TRACEBACK
from emorl.runs.layout import COST, MANIFEST

_PACKAGES = ("emorl", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "optuna")


@dataclass(frozen=True)
class Cost:
    """What a stage consumed. `prompts` counts prompts drawn, `completions` sequences generated, `tokens` the generated
    tokens, `reward_calls` completions scored by one objective, `seconds` wall time."""

    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    reward_calls: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


@dataclass(frozen=True)
class Run:
    """One stage's directory; `run.json` in it says what ran and whether it is finished."""

    path: Path
    stage: str
    config: Mapping[str, Any]
    finished: bool
    cost: Cost
    is_main: bool = True
    """whether this process writes; of several, the first one does"""

    @property
    def cost_path(self) -> Path:
        return self.path / COST

    def add_cost(self, cost: Cost) -> "Run":
        """The run with `cost` added, on disk too: what was spent before a kill stays counted."""
        return self.with_cost(self.cost + cost)

    def with_cost(self, cost: Cost) -> "Run":
        """The run with `cost` as all it has cost, on disk too."""
        if self.is_main:
            write_json(self.cost_path, asdict(cost))
        return replace(self, cost=cost)

    def finish(self) -> "Run":
        """Marks the run as finished; the last thing a stage does."""
        _write_manifest(self.path, self.stage, self.config, finished=True)
        return replace(self, finished=True)


def open_run(path: Path, stage: str, config: Mapping[str, Any], is_main: bool = True) -> Run:
    """The run in `path`: new, unfinished (continue it) or finished (skip it). A setting that is null and one that is not
    there are the same. Only the main one of several processes writes.

    Raises:
        UserError: `path` holds a run with another config, or a damaged one.
    """
    manifest_path = path / MANIFEST
    config = json.loads(json.dumps(config))
    if not manifest_path.exists() or not _holds_work(path):
        if is_main:
            path.mkdir(parents=True, exist_ok=True)
            _write_manifest(path, stage, config, finished=False)
        return Run(path, stage, config, finished=False, cost=read_cost(path), is_main=is_main)
    manifest = _read_manifest(path)
    changed = ", ".join(differences(manifest.get("config", {}), config))
    if manifest.get("stage") != stage or changed:
        changed = changed or "the stage"
        reuse = f" (`policies={path.parent}` uses the trained policies again)" if (path.parent / "train").is_dir() else ""
        raise UserError(
            f"{path} holds a run with other settings ({changed}); give another `output`{reuse}, or move that directory away"
        )
    return Run(path, stage, config, bool(manifest.get("finished")), read_cost(path), is_main)


def read_cost(path: Path) -> Cost:
    """What a run directory says it has cost; nothing where it does not say.

    Raises:
        UserError: the file is damaged.
    """
    file = path / COST
    content = read_json(file) if file.exists() else {}
    numbers = content.values() if isinstance(content, dict) else [None]
    known = {field.name for field in fields(Cost)}
    if not all(type(number) in (int, float) for number in numbers) or not known.issuperset(content):
        raise UserError(f"{file} is damaged (it holds other things than {', '.join(sorted(known))}); move {path} away")
    return Cost(**content)


def _read_manifest(path: Path) -> dict[str, Any]:
    content = read_json(path / MANIFEST)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict) or "stage" not in content:
        raise UserError(f"{path / MANIFEST} is damaged (no stage with its config); move {path} away and run the stage again")
    return content


def _holds_work(path: Path) -> bool:
    """Whether a run got further than its start; one that failed at once, on a wrong setting say, may be started anew."""
    if _read_manifest(path).get("finished"):
        return True
    return any(file.is_file() and file.name not in (MANIFEST, TRACEBACK, COST, ".lock") for file in path.rglob("*"))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs; nothing, an empty block and an empty list are the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    empty = (None, {}, [])
    return [] if old == new or (old in empty and new in empty) else [f"{prefix.rstrip('.')}: {old!r:.60} -> {new!r:.60}"]


def _write_manifest(path: Path, stage: str, config: Mapping[str, Any], *, finished: bool) -> None:
    manifest = {
        "stage": stage,
        "finished": finished,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in _PACKAGES},
        "config": config,
    }
    write_json(path / MANIFEST, manifest)


@contextmanager
def only_process(path: Path, waits: bool = False) -> Iterator[None]:
    """Holds the run directory for this process; a second process is told so, or waits. Released by the kernel after a kill."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}); give another `output`") from None
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{path} is being written by another process; wait for it or give another `output`") from None
        yield


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours; a damaged one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away and run the stage again") from None
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that writes it first") from None


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all, also under `kill -9`."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed otherwise.

    >>> with written_whole(Path("table.csv")) as temporary:
    ...     frame.to_csv(temporary)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        with temporary.open("xb") as file:  # with the user's umask
            yield temporary
            os.fsync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the block ends well, and is removed otherwise; what a
    killed process left there is removed first. `path` may exist if it is empty."""
    temporary = path.with_name(f".{path.name}.partial")
    with only_process(temporary):
        for left in temporary.iterdir():
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield temporary
            (temporary / ".lock").unlink()
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
