"""The fusion benchmark compares what it says, on commands that take no time; its timings are not tested."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks import fusion
from benchmarks.fusion import (
    JOBS,
    commands,
    compare,
    fuse_in_memory,
    load_models,
    loaded_fusion,
    main,
    make_checkpoints,
    merge_file,
    run,
)
from emorl.fusion.mergekit_file import mergekit_fusion
from emorl.fusion.recipe import fuse
from emorl.fusion.tensor_files import WEIGHTS_NAME


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fusion")
    make_checkpoints(folder, "tiny", torch.float32)
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_ours_and_mergekit_s_results_are_the_same_and_so_is_what_is_fused_in_memory(folder, job, tmp_path):
    config, merge = pytest.importorskip("mergekit.config"), pytest.importorskip("mergekit.merge")
    options = pytest.importorskip("mergekit.options").MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    content = merge_file(job, folder, "float32")
    merge.run_merge(config.MergeConfiguration.model_validate(content), str(tmp_path / "theirs"), options)
    ours, what = fuse({**content, "output": str(tmp_path / "ours")}), mergekit_fusion(content)
    difference = compare(ours, tmp_path / "theirs", what)
    assert difference.apart == 0
    assert difference.largest < 1e-6
    written = load_file(ours / WEIGHTS_NAME)
    loaded = loaded_fusion(what)
    assert fuse_in_memory(loaded, what, "wall") > 0
    in_memory = dict(loaded.model.named_parameters())
    assert in_memory.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in in_memory.items())


def test_an_entry_at_the_threshold_is_told_from_a_wrong_one(folder, tmp_path):
    content = merge_file("ties3", folder, "float32")
    ours, what = fuse({**content, "output": str(tmp_path / "ours")}), mergekit_fusion(content)
    name = "model.layers.0.mlp.up_proj.weight"
    (one, *_), base = load_models(what)
    assert base is not None
    magnitudes = (one[name] - base[name]).abs().flatten()
    threshold = magnitudes.sort(descending=True).values[len(magnitudes) // 2 - 1]
    values = load_file(ours / WEIGHTS_NAME)
    for position, error in ((magnitudes == threshold, 0.5), (magnitudes == magnitudes.max(), 0.25)):
        values[name] += position.view(values[name].shape) * error
    shutil.copytree(ours, tmp_path / "theirs")
    save_file(values, tmp_path / "theirs" / WEIGHTS_NAME)
    difference = compare(ours, tmp_path / "theirs", what)
    assert (difference.apart, difference.at_threshold) == (2, 1)
    assert difference.largest == pytest.approx(0.25)


def test_a_command_is_measured_alone():
    small = run(sys.executable, "-S", "-c", "pass")
    large = run(sys.executable, "-S", "-c", "import time; kept = b'x' * 10**8; time.sleep(0.2)")
    assert small.peak < 5e7  # and not what this process has grown to
    assert large.peak > small.peak + 9e7
    assert large.seconds["wall"] > max(0.2, large.seconds["cpu"])
    with pytest.raises(SystemExit, match="ended with 3:\nno"):
        run(sys.executable, "-S", "-c", "import sys; sys.stderr.write('no'); sys.exit(3)")


def test_the_table_is_printed(monkeypatch, tmp_path, capsys):
    """Our real command against itself: mergekit's takes too long for a test."""

    def ours_twice(file, output):
        made = commands(file, output)
        assert yaml.safe_load(file.read_text())["merge_method"] == "slerp"
        return {
            "mergekit": [*made["emorl"][:-1], str(output / "mergekit")],
            "emorl": ["cp", "-r", str(output / "mergekit"), str(output / "emorl")],
        }

    monkeypatch.setattr(fusion, "commands", ours_twice)
    options = ["--size", "tiny", "--pairs", "1", "--jobs", "slerp", "--folder", str(tmp_path)]
    assert main([*options, "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["difference"] == {"largest": 0.0, "apart": 0, "at_threshold": 0}
    assert len(row["seconds"]["emorl"]) == len(row["in_memory"]) == 1
    assert row["peak"]["mergekit"] > 1e8 > row["peak"]["emorl"] > 0
    assert "| slerp |" in capsys.readouterr().out
