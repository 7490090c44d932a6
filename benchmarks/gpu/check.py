"""The device check: every part on a random model of SmolLM2's shape and on one of 1B, under one clock.

`benchmarks/gpu/check.sh` calls this. Each part is a process with a limit of its own; what it printed goes to `check.log`,
what it found so far to `check.json` and `check.md` in the output folder, after each part; what matters least comes last. A
part that fails, is stopped or has no time left is a row that says so, and the exit code is 1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT, LOG = Path(__file__).parents[2], "check.log"
PLAN = [
    ("machine", "134m", 60), ("tests", "134m", 120), ("train", "134m", 120), ("decode", "134m", 150), ("decode", "1b", 90),
    ("trie", "134m", 60), ("union", "134m", 60), ("train", "1b", 120), ("trie", "1b", 60), ("union", "1b", 60),
    ("fuse", "134m", 60), ("fuse", "1b", 180),
]  # fmt: skip
"""part, model, and the most seconds it may take"""


def run_part(part: str, size: str, device: str, limit: float, folder: Path) -> list[dict[str, Any]]:
    """The rows of one part; of one that failed, those it had, and one that says why."""
    file = folder / f".{part}-{size}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.parts", part, "--size", size, "--device", device, "--json", str(file)]
    start, failure = time.monotonic(), ""
    with (folder / LOG).open("a", encoding="utf-8") as output:
        output.write(f"\n== {part} {size}\n")
        output.flush()
        running = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, process_group=0)
        try:
            code = running.wait(limit)
            failure = f"failed with {code}, see {LOG}" if code else ""
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # with the commands that it started
            running.wait()
            failure = f"stopped after {limit:.0f} s"
    rows = json.loads(file.read_text()) if file.is_file() else []
    file.unlink(missing_ok=True)
    print(f"{part} {size}: {time.monotonic() - start:.0f} s, {len(rows)} rows{failure and ', ' + failure}", flush=True)
    return [*rows, *([{"part": part, "model": size, "what": failure, "failed": True}] if failure else [])]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows in Markdown."""
    lines = ["| part | model | what | figure | time / | | time / bound |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        numbers = ["" if row.get(key) is None else f"{row[key]:.2f}" for key in ("ratio", "bound")]
        cells = [row["part"], row["model"], row["what"], row.get("figure", ""), numbers[0], row.get("to", ""), numbers[1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for check.json, check.md and check.log")
    parser.add_argument(
        "--seconds", type=float, default=540, help="all parts together; what comes later is left out (%(default)s)"
    )
    parser.add_argument("--parts", nargs="+", choices=sorted({part for part, _, _ in PLAN}), help="only these")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU, each part once")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = [step for step in PLAN if not options.parts or step[0] in options.parts]
    plan = {(part, "tiny" if options.dry_run else size): limit for part, size, limit in wanted}
    end, rows = time.monotonic() + options.seconds, []
    (options.output / LOG).write_text("")
    for (part, size), limit in plan.items():
        left = end - time.monotonic()
        if left < min(limit, 20):
            rows.append({"part": part, "model": size, "what": "left out: no time left", "failed": True})
        else:
            device, limit = ("cpu", left) if options.dry_run else ("cuda", min(limit, left))
            rows += run_part(part, size, device, limit, options.output)
        (options.output / "check.json").write_text(json.dumps(rows, indent=2) + "\n")
        (options.output / "check.md").write_text(table(rows))
    print(table(rows))
    return 1 if any(row.get("failed") for row in rows) else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
