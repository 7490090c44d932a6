"""Four workers on one search, one of them killed and replaced: what was evaluated twice, lost or left behind.

python -m recipes.distributed.demo EXPERIMENT POLICIES [--storage URL] [--output FOLDER]
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna


def worker(options: argparse.Namespace, host: str) -> "subprocess.Popen[bytes]":
    """One `emorl search` under a host name of its own."""
    command = [sys.executable, "-m", "emorl", "search", str(options.experiment), f"output={options.output}"]
    settings = [f"policies={options.policies}", "search.batch=1", "--storage", options.storage]
    surroundings = {**os.environ, "EMORL_HOST": host, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *settings], env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def study_of(options: argparse.Namespace) -> optuna.Study:
    return optuna.load_study(study_name=f"{options.output.name}-weights", storage=options.storage)


def main() -> None:
    parser = argparse.ArgumentParser(description="Four workers on one search; one is killed and replaced.")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("policies", help="output of the experiment that trained them")
    parser.add_argument("--storage", default="", help="an Optuna URL; SQLite in the output by default")
    parser.add_argument("--output", type=Path, default=Path("runs/distributed"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.storage = options.storage or f"sqlite:///{options.output.absolute()}/study.db"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    killed, *others = [worker(options, f"machine {number}") for number in range(4)]
    while True:
        try:
            if any(trial.state.is_finished() for trial in study_of(options).trials):
                break
        except KeyError:  # no study yet
            pass
        time.sleep(0.5)
    killed.kill()
    killed.wait()
    codes = [process.wait() for process in (*others, worker(options, "another machine"))]
    trials = study_of(options).trials
    done = Counter(tuple(sorted(trial.params.items())) for trial in trials if trial.state.name == "COMPLETE")
    asked = {tuple(sorted(trial.user_attrs["candidate"].items())) for trial in trials if "candidate" in trial.user_attrs}
    print(f"candidates evaluated            {len(done)}")
    print(f"evaluated twice                 {sum(count - 1 for count in done.values())}")
    print(f"lost                            {len(asked - set(done))}")
    print(f"workers that died by themselves {sum(code != 0 for code in codes)}")


if __name__ == "__main__":
    main()
