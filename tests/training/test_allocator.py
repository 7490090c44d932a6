"""Freed memory is used again without the kernel; where it is not ours to decide, nothing changes."""

import json
import os
import platform
import subprocess
import sys

import pytest

from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.training import allocator
from emorl.training.allocator import HUGE_PAGES, keep_freed_memory
from tests.training.trained import train

_IS_GLIBC = platform.libc_ver()[0] == "glibc"

_FAULTS = """
import resource, sys
from emorl.training.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(1 << 27)[::4096] = b"x" * (1 << 15)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
print(kept, faults(), faults())
"""


def fresh(**variables):
    """(whether memory is kept, page faults of a large block, and of another when the first is freed), in a new process."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment = plain | {HUGE_PAGES: "1"} | variables
    done = subprocess.run([sys.executable, "-c", _FAULTS], env=environment, capture_output=True, text=True, check=True)
    kept, first, second = done.stdout.split()
    return kept == "True", int(first), int(second)


@pytest.mark.skipif(not _IS_GLIBC, reason="no glibc")
def test_a_freed_block_costs_no_page_faults_when_it_is_used_again():
    kept, first, second = fresh()
    assert kept
    assert first > 100 * max(1, second)


@pytest.mark.skipif(not _IS_GLIBC, reason="no glibc")
@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_ARENA_MAX": "2"},
        {"MALLOC_PERTURB_": "0"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
        {HUGE_PAGES: "0"},
        {HUGE_PAGES: ""},
    ],
)
def test_who_has_set_how_to_allocate_keeps_that(variables):
    kept, first, second = fresh(**variables)
    assert not kept
    assert second > first / 2


def test_another_c_library_is_left_alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(HUGE_PAGES, "1")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_training_keeps_freed_memory_where_a_cpu_does_it(use_cpu, tiny_base_dir, tmp_path, monkeypatch):
    """Without a GPU, a training that does not ask for the CPU is done by it all the same."""
    called = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: called.append(True))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {index}"}) + "\n" for index in range(8)))
    grpo = {"max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2, "use_cpu": use_cpu}
    train(
        Experiment(
            output=tmp_path / "run",
            base=BaseConfig(model=str(tiny_base_dir)),
            data=DataConfig(path=str(tmp_path / "prompts.jsonl"), validation=2, test=2),
            objectives={"short": ObjectiveConfig(function="length", options={"minimum": 0, "maximum": 1})},
            generation={"max_new_tokens": 2, "do_sample": False},
            train=TrainConfig(lora={"r": 2, "target_modules": "all-linear"}, grpo=grpo),
        ),
        "short",
    )
    assert called == [True] * use_cpu
