"""A process that has imported everything and forks a child for each command: a command costs what it does, not its imports.

Reads lines of JSON {arguments, folder, kill_after} on standard input, answers with {code, error, output} (code null where the
child was killed).
"""

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

_IMPORTED = (
    "emorl.training.trainers", "emorl.training.rehearsal", "emorl.training.lora", "emorl.training.reward.model",
    "emorl.search.weight_evaluation", "emorl.search.proposers.fusions", "emorl.dynamic.ensemble", "emorl.reporting.report",
    "emorl.evaluation.attacks", "emorl.objectives.loading", "emorl.fusion.recipe", "emorl.stages.compare",
    "emorl.stages.dynamic", "emorl.stages.refresh_reward", "emorl.stages.generate", "emorl.stages.train_reward",
    "emorl.stages.init",
)  # fmt: skip


def _child(arguments: list[str], folder: str, output: str, error: str) -> None:
    """Runs the command and ends the process with its code; a traceback ends with 99."""
    for number, file in ((1, output), (2, error)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    os.chdir(folder)
    code: Any = 99
    try:
        code = importlib.import_module("emorl.cli").main(arguments)
    except SystemExit as end:  # argparse
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 98)


def _run(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    output, error = scratch / "output", scratch / "error"
    child = os.fork()
    if child == 0:
        _child(request["arguments"], request["folder"], str(output), str(error))
    timer = None
    if request.get("kill_after") is not None:
        timer = threading.Timer(request["kill_after"], lambda: os.kill(child, signal.SIGKILL))
        timer.start()
    _, status = os.waitpid(child, 0)
    if timer is not None:
        timer.cancel()
    code = os.waitstatus_to_exitcode(status)
    texts = {name: file.read_text(errors="replace") for name, file in (("output", output), ("error", error))}
    return {"code": None if code == -signal.SIGKILL else code, **texts}


def main() -> None:
    for module in _IMPORTED:
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line), Path(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
