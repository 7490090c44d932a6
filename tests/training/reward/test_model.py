"""The reward-model stage on tiny random encoders and decoders, through transformers' and TRL's real trainers."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertForSequenceClassification, BertModel

from emorl.cli import main
from emorl.config import UserError
from emorl.config.reward import RewardDataConfig, RewardExperiment, load_reward_experiment
from emorl.config.yaml import to_yaml
from emorl.evaluation.agreement import auc, calibration_error, ordered_share, rank_correlation
from emorl.objectives.models.classifier import Classifier
from emorl.runs.results import RewardResult, read_result
from emorl.stages.train_reward import train_reward
from emorl.training.reward.calibration import calibrate, calibrated_loss
from emorl.training.reward.data import compared, load_graded
from emorl.training.reward.model import margin_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GRADES = {"great": 1.0, "fair": 0.5, "poor": 0.0}
TRAINING = {"learning_rate": 5e-3, "num_train_epochs": 20, "per_device_train_batch_size": 6, "bf16": False}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, save_word_encoder):
    words = ["you", "are", "ask", "about", *GRADES, *(f"thing{i}" for i in range(12))]
    return save_word_encoder(tmp_path_factory.mktemp("encoder"), words, positions=256)


def rows():
    """Three responses to each prompt; one word of the response is its grade."""
    return [
        {
            "prompt": f"ask about thing{i}",
            "response": f"you are {word}",
            "grade": grade,
            "name": word,
            "other": 1 - grade,
            "kind": kind,
        }
        for i in range(12)
        for word, grade in GRADES.items()
        for kind in ["good" if grade == 1 else "bad"]
    ]


@pytest.fixture
def make(tmp_path, encoder):
    def experiment(loss, label, model=encoder, **options):
        table = tmp_path / "graded.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        labels = label if isinstance(label, list) else [label]
        data = RewardDataConfig(path=str(table), labels=labels, validation=0.25)
        settings = {"output": tmp_path / "out", "training": TRAINING, "max_tokens": 32, "patience": 20, **options}
        return RewardExperiment(model=model, data=data, loss=loss, **settings)

    return experiment


def trained(experiment):
    """The run directory of a trained reward model."""
    train_reward(experiment)
    return experiment.output


def graded_scores(folder, label=None):
    scorer = Classifier(str(folder), label=label)
    return scorer(["ask about thing3"] * 3, [f"you are {word}" for word in GRADES])


@pytest.mark.parametrize("loss", ["ranking", "regression"])
def test_it_learns_the_order_and_the_level_of_grades(make, loss):
    run = trained(make(loss, "grade"))
    great, fair, poor = graded_scores(run / "model")
    assert 1 >= great > 0.8 > fair > 0.2 > poor >= 0
    figures = read_result(RewardResult, run).figures
    assert figures["AUC above the lowest label"] == 1.0
    assert figures["calibration error"] < 0.1
    card = (run / "model" / "README.md").read_text()
    assert "| AUC above the lowest label | 1.000 |" in card
    assert "36 rows" not in card
    assert "27 rows to train on, 9 to validate" in card
    assert json.loads((run / "model" / "metrics.json").read_text()) == figures


def test_a_classifier_of_named_classes_of_different_size(make):
    run = trained(make("classification", "kind"))
    assert read_result(RewardResult, run).figures["accuracy"] == 1.0
    great = graded_scores(run / "model", "good")
    assert great[0] > 0.8 > 0.2 > max(great[1:])
    assert graded_scores(run / "model", "good")[1] + graded_scores(run / "model", "bad")[1] == pytest.approx(1.0)


def test_several_labels_are_several_scores_of_one_model(make):
    run = trained(make("regression", ["grade", "other"]))
    assert graded_scores(run / "model", "grade")[0] > 0.8 > 0.2 > graded_scores(run / "model", "other")[0]
    assert read_result(RewardResult, run).figures["other: AUC above the lowest label"] == 1.0


def test_a_decoder_learns_a_margin_alone_by_trls_trainer(make, tiny_base_dir):
    experiment = make("ranking", "grade", model=str(tiny_base_dir), pointwise=0.0, max_tokens=96)
    run = trained(experiment)
    great, _, poor = graded_scores(run / "model")
    assert great > poor
    assert read_result(RewardResult, run).figures["pairs in order, same group"] > 0.9


def test_a_decoder_learns_by_regression_too(make, tiny_base_dir):
    run = trained(make("regression", "grade", model=str(tiny_base_dir), max_tokens=96))
    assert graded_scores(run / "model")[0] > graded_scores(run / "model")[2]


def test_a_finished_run_is_skipped_and_an_interrupted_one_goes_on(make):
    experiment = make("regression", "grade", training={**TRAINING, "num_train_epochs": 3})
    run = trained(experiment)
    first, written = graded_scores(run / "model"), (run / "run.json").stat().st_mtime_ns
    assert trained(experiment) == run
    assert (run / "run.json").stat().st_mtime_ns == written
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "finished": False}))  # killed before its last line
    trained(experiment)
    assert graded_scores(run / "model") == pytest.approx(first, abs=1e-6)
    with pytest.raises(UserError, match="holds a run with other settings"):
        trained(make("regression", "grade"))


@pytest.mark.parametrize(("loss", "label"), [("regression", "grade"), ("classification", "kind")])
def test_the_kept_checkpoint_has_the_lowest_loss_after_calibration(make, loss, label):
    training = {**TRAINING, "num_train_epochs": 3, "learning_rate": 0.05, "save_total_limit": None}
    run = trained(make(loss, label, training=training))
    losses = [entry["eval_calibrated_loss"] for entry in json.loads((run / "result.json").read_text())["log"]
              if "eval_calibrated_loss" in entry]  # fmt: skip
    assert len(losses) == 3
    best = sorted(run.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))[
        losses.index(min(losses))
    ]
    kept, saved = (BertForSequenceClassification.from_pretrained(folder).state_dict() for folder in (run / "model", best))
    assert all(torch.equal(kept[name], saved[name]) for name in kept)


def test_other_rows_are_another_run(make):
    experiment = make("regression", "grade")
    trained(experiment)
    Path(experiment.data.path).write_text("".join(json.dumps({**row, "grade": 1 - row["grade"]}) + "\n" for row in rows()))
    with pytest.raises(UserError, match=r"holds a run with other settings \(rows"):
        trained(experiment)


def test_the_time_before_a_kill_stays_counted(make, monkeypatch):
    experiment = make("regression", "grade", training={**TRAINING, "num_train_epochs": 3})
    with monkeypatch.context() as patch:
        patch.setattr("emorl.training.reward.model.calibrate", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(experiment)
    before = json.loads((experiment.output / "cost.json").read_text())["seconds"]
    assert before > 0
    assert json.loads((trained(experiment) / "cost.json").read_text())["seconds"] > before


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_same_seed_same_model(make, tmp_path):
    folders = [trained(make("ranking", "grade", output=tmp_path / name)) / "model" for name in ("one", "two")]
    assert graded_scores(folders[0]) == graded_scores(folders[1])


def test_frozen_layers_stay_as_they_were(make, encoder):
    run = trained(make("regression", "grade", frozen_layers=1, training={**TRAINING, "num_train_epochs": 1}))
    before = BertModel.from_pretrained(encoder).encoder.layer[0].state_dict()
    after = BertModel.from_pretrained(run / "model").encoder.layer[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="frozen_layers is 3, but the model has 1 layers"):
        trained(make("regression", "grade", frozen_layers=3, output=run.parent / "other"))


def test_the_margin_loss_is_zero_where_every_pair_is_far_enough_apart():
    scores, grades = torch.tensor([3.0, 1.4, 0.0, 9.0]), torch.tensor([1.0, 0.5, 0.0, 0.0])
    group = torch.tensor([0, 0, 0, 1])
    # margin 2: pairs (3, 1.4) want 1, (1.4, 0) want 1, (3, 0) want 2; the other group's 9.0 is compared with nobody
    assert margin_loss(scores, grades, group, 2.0) == 0
    # margin 4: short by 2 - 1.6, 2 - 1.4, 4 - 3
    assert margin_loss(scores, grades, group, 4.0).item() == pytest.approx((0.4 + 0.6 + 1.0) / 3)
    assert margin_loss(scores[3:], grades[3:], group[3:], 4.0) == 0


def test_overconfidence_is_no_loss_after_calibration():
    torch.manual_seed(0)
    targets = torch.rand(200, 2).round()
    logits = targets * 2 - 1 + torch.randn(200, 2)
    left = calibrated_loss(logits, targets, joint=False)
    assert calibrated_loss(logits * 7 + 3, targets, joint=False) == pytest.approx(left, abs=1e-4)
    assert left < torch.nn.functional.binary_cross_entropy_with_logits(logits * 7, targets).item() - 0.1
    assert calibrated_loss(torch.randn(200, 2), targets, joint=False) > left
    assert calibrated_loss(logits * 7, targets, joint=True) == pytest.approx(
        calibrated_loss(logits, targets, joint=True), abs=1e-4
    )


def test_calibration_undoes_a_scale_and_shift_of_the_logits():
    torch.manual_seed(0)
    logits = torch.randn(4000, 1)
    targets = torch.bernoulli(logits.sigmoid())
    [[slope, offset]] = calibrate(logits, targets, joint=False)
    assert slope == pytest.approx(1.0, abs=0.1)
    assert offset == pytest.approx(0.0, abs=0.1)
    assert calibrate((logits - 1) * 5, targets, joint=False)[0] == pytest.approx([slope / 5, offset + slope], abs=1e-3)
    classes = torch.randn(4000, 3)
    one_hot = torch.nn.functional.one_hot(torch.distributions.Categorical(logits=classes).sample(), 3).float()
    calibration = calibrate(classes * 3, one_hot, joint=True)
    assert [row[0] for row in calibration] == pytest.approx([1 / 3] * 3, rel=0.1)
    assert [row[1] for row in calibration] == [0, 0, 0]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("joint", [False, True])
def test_separable_rows_and_a_label_that_never_occurs_can_be_calibrated(scale, joint):
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]] if joint else [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    logits = scale * torch.tensor([[2.0, -1.0], [-2.0, -3.0], [3.0, 1.0]])
    calibration = torch.tensor(calibrate(logits, targets, joint))
    assert torch.isfinite(calibration).all()
    assert (calibration[:, 0] > 0).all()


def test_groups_are_never_split_and_never_compared_with_others(make):
    data = load_graded(make("ranking", "grade"))
    assert not {row.group for row in data.training} & {row.group for row in data.validation}
    assert len(data.validation) == 9
    parts = compared(data.training, 2, seed=0)
    assert all(len({row.group for row in part}) == 1 and len(part) <= 2 for part in parts)
    assert sum(map(len, parts)) == len(data.training)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"labels": ["score"]}}, "has no column 'score'"),
        ({"data": {"labels": ["name"]}}, "'name' is 'great'; expected a number in data.label_range"),
        ({"data": {"path": "nowhere.jsonl"}}, "no such file"),
        ({"training": {"learning_rat": 1}}, "unknown key 'training.learning_rat' .*did you mean 'learning_rate'"),
        ({"training": {"seed": 1}}, "training.seed is set by emorl"),
        ({"model": "/nowhere"}, "model '/nowhere': neither a folder here nor a model on the hub"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_what_to_do(make, tmp_path, change, message, capsys):
    content = yaml.safe_load(to_yaml(make("regression", "grade")))
    content.update(change | ({"data": content["data"] | change["data"]} if "data" in change else {}))
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(content))
    assert main(["train-reward", str(tmp_path / "reward.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error), error
    assert "Traceback" not in error


@pytest.mark.parametrize("which", ["training", "validation"])
def test_a_ranking_without_two_grades_in_a_group_is_refused_before_the_model_loads(make, tmp_path, which):
    experiment = make("ranking", "grade", model="/nowhere")
    equal, graded = [0, 0, 0], [0, 1, 0.5]
    grades = {"training": equal, "validation": equal} | (
        {"validation": graded} if which == "training" else {"training": graded}
    )
    for file in ("training", "validation"):
        rows = [
            {"prompt": f"{file} {group}", "response": f"r{i}", "grade": grades[file][i]} for group in "ab" for i in range(3)
        ]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = replace(experiment.data, path=f"{tmp_path}/training.jsonl", validation_path=f"{tmp_path}/validation.jsonl")
    with pytest.raises(UserError, match=rf"no group of its 6 {which} rows has two different grades.*or loss: regression"):
        load_graded(replace(experiment, data=data))


def test_an_adapter_is_no_model_to_begin_with(make, make_causal_model, write_adapter, tokenizer, tmp_path):
    folder = write_adapter(make_causal_model(), tmp_path / "adapter")
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="is a LoRA adapter, no model; name the base"):
        train_reward(make("regression", "grade", model=str(folder)))


def test_a_ranking_takes_one_label():
    with pytest.raises(ValueError, match="ranking takes one column"):
        RewardExperiment(output="x", model="m", data=RewardDataConfig(path="p", labels=["a", "b"]), loss="ranking")


def test_the_command_prints_the_figures(make, tmp_path, capsys):
    (tmp_path / "reward.yaml").write_text(to_yaml(make("regression", "grade")))
    assert main(["train-reward", str(tmp_path / "reward.yaml"), "training.num_train_epochs=1", "--json"]) == 0
    assert "AUC above the lowest label" in json.loads(capsys.readouterr().out)
    assert load_reward_experiment(tmp_path / "reward.yaml", ["seed=3"]).seed == 3


def test_known_agreement():
    assert auc([2, 3], [0, 1]) == 1.0
    assert auc([1, 1], [1, 1]) == 0.5
    assert auc([3, 0], [1, 2]) == 0.5
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert calibration_error([0.25] * 4, [0, 0, 0, 1], bins=1) == 0.0
    assert ordered_share([3, 2, 1, 9], [1, 0.5, 0, 0], ["a", "a", "a", "b"]) == 1.0
    assert ordered_share([1, 1, 2], [1, 0, 0.5], ["a"] * 3) == pytest.approx((0.5 + 0 + 1) / 3)
    rng = random.Random(0)
    noise = [rng.random() for _ in range(2000)]
    assert ordered_share(noise, [i % 2 for i in range(2000)], ["a"] * 2000) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="scores on both sides"):
        auc([], [1])
    with pytest.raises(ValueError, match="two different grades"):
        ordered_share([1, 2], [1, 1], ["a", "a"])
