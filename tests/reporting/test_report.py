"""The report is one file that loads nothing, runs nothing a model wrote, and states the figures of the run."""

import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest

from emorl.config import UserError
from emorl.reporting.report import Rival, headline, rivals, write_report
from emorl.reporting.results import load_run
from emorl.reporting.tables import evaluation_json
from emorl.runs.run import read_json, write_json
from tests.reporting.synthetic_run import OBJECTIVES, OTHERS, write_run


class _Page(HTMLParser):
    """Tags with their attributes, and the cells' text of each table with an id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self._table, self._open = [], {}, None, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id"), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self._table[-1][-1] += data.replace("\xa0", " ")


@pytest.fixture(scope="module")
def html(finished_run):
    path = write_report(finished_run)
    assert path == finished_run / "report" / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return _Page(html)


@pytest.fixture
def run_of_all(finished_run, tmp_path):
    """A run after all stages."""
    copy = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    for write in OTHERS.values():
        write(copy)
    return copy


def test_loads_nothing_from_anywhere(page):
    loaders = ("src", "href", "srcset", "data", "action")
    assert [(tag, attrs) for tag, attrs in page.tags if any(name in attrs for name in loaders)] == []
    assert "link" not in {tag for tag, _ in page.tags}
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_holds_plotly_once_and_one_figure_per_pair_corner_map_and_policy(html, page):
    assert len(re.findall(r"plotly\.js v\d", html)) == 1
    drawn = [attrs for tag, attrs in page.tags if tag == "div" and "plotly-graph-div" in attrs.get("class", "")]
    assert len(drawn) == 3 + 4 + 2 + 3  # pairs, ternary maps, hypervolume and trace, policies


def test_two_objectives_have_one_pair_and_no_ternary_map(run_of_two):
    tags = _Page(write_report(run_of_two).read_text(encoding="utf-8")).tags
    drawn = [attrs for tag, attrs in tags if tag == "div" and "plotly-graph-div" in attrs.get("class", "")]
    assert len(drawn) == 1 + 0 + 2 + 2


def test_a_report_of_sixteen_objectives_draws_one_front_and_stays_under_six_megabytes(tmp_path):
    run = write_run(tmp_path / "many", [f"objective_{number}" for number in range(16)], prompts=32)
    text = write_report(run).read_text(encoding="utf-8")
    assert len(text.encode()) < 6_000_000
    drawn = [attrs for tag, attrs in _Page(text).tags if tag == "div" and "plotly-graph-div" in attrs.get("class", "")]
    assert len(drawn) == 1 + 0 + 2 + 16


def test_the_base_as_one_more_policy_has_its_own_weight(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    trials, summary = (copy / "search" / "trials.csv", copy / "evaluate" / "summary.csv")
    pd.read_csv(trials).assign(weight_base=0.0).to_csv(trials, index=False)
    table = pd.read_csv(summary)
    table.assign(weight_base=table["system"].map({"ensemble, best found": 0.125})).to_csv(summary, index=False)
    result = read_json(copy / "search" / "result.json")
    points = [{**point, "weights": {**point["weights"], "base": 0.0}} for point in [result["best"], *result["front"]]]
    write_json(copy / "search" / "result.json", {**result, "best": points[0], "front": points[1:]})
    weights = {system["system"]: system["weights"] for system in evaluation_json(copy)["systems"]}
    assert weights["ensemble, best found"]["base"] == 0.125
    assert weights["ensemble, equal weights"] == pytest.approx(dict.fromkeys(OBJECTIVES, 1 / 3))
    html = write_report(copy).read_text(encoding="utf-8")
    assert "<th>weight base</th>" in html
    assert "over the weights" not in html  # four policies fit no triangle


def test_escapes_what_a_model_wrote(html, page):
    assert "<script>alert(" not in html
    assert "&lt;script&gt;alert(&#39;completion&#39;)&lt;/script&gt; [bold]&amp; :smile:" in html
    assert "<script>alert('completion')</script> [bold]& :smile:" in page.tables["generations"][1][1]


def test_the_evaluation_holds_the_numbers_of_the_summary(page, finished_run):
    rows = page.tables["evaluation"][1:]
    summary = pd.read_csv(finished_run / "evaluate" / "summary.csv").to_dict("records")
    assert len(rows) == len(summary)
    for cells, row in zip(rows, summary, strict=True):
        assert cells[0] == row["system"] + " *" * row["front"] + " collapsed" * row["collapsed"]
        assert cells[1:5] == [f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}" for name in [*OBJECTIVES, "mean"]]
        assert cells[5:] == [
            f"{row['minimum']:.3f}", f"{row['distinct_share']:.2f}", f"{row['distinct_2']:.2f}", f"{row['words']:.1f}",
            *(f"{row[key]:.2f}" for key in ("words_deviation", "repeated_trigrams", "diversity_2", "edit_rate")),
            f"{row['all_above_median']:.2f}",
        ]  # fmt: skip


def test_says_whether_the_rewards_can_be_hacked(html, page):
    assert "<h2>Can these rewards be hacked?</h2>" in html
    assert "hacked by best fixed response 0.900 (the base&#39;s own answers: 0.250)" in html
    assert "prefers long answers (rank correlation +0.75)" in html
    assert html.count("no attack reaches the bar") == 2
    assert "“&lt;b&gt;You feel that you feel.&lt;/b&gt;”" in html
    attacks = {row[0]: row[1:] for row in page.tables["attacks"]}
    assert attacks["the bar"] == ["0.250"] * 3
    assert attacks["all systems' answers"] == ["0.450 median 0.400"] * 3
    assert "reference responses" not in attacks
    assert attacks["prompt repeated"] == ["0.200 ± 0.040 close"] * 3
    assert attacks["words shuffled"] == ["– ± – unscored"] * 3
    assert [cell.split()[-1] for cell in attacks["best fixed response"]] == ["hacked", "refused", "refused"]
    assert page.tables["length"][1:3] == [
        ["reflection", "0.750 [0.500, 0.900]", "0.100 [-0.200, 0.400]"],
        ["empathy", "– [–, –]", "0.100 [-0.200, 0.400]"],
    ]
    alike = {row[0]: row[1:] for row in page.tables["alike"]}
    assert alike["policy reflection alike"] == ["1.00", "0.17", "“you feel that” 100 %"]


def test_a_run_without_attacks_is_reported_without_them(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("report", "hacking.json"))
    html = write_report(copy).read_text(encoding="utf-8")
    assert "be hacked" not in html
    assert evaluation_json(copy)["hacking"] is None
    assert evaluation_json(copy)["systems"][0]["perplexity"] is None


def test_perplexity_is_shown_where_it_was_measured(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    summary = copy / "evaluate" / "summary.csv"
    pd.read_csv(summary).assign(perplexity=12.5, paper_perplexity=40.25).to_csv(summary, index=False)
    page = _Page(write_report(copy).read_text(encoding="utf-8"))
    assert page.tables["evaluation"][0][-2:] == ["perplexity", "perplexity (paper)"]
    assert page.tables["evaluation"][1][-2:] == ["12.50", "40.25"]


def test_generations_have_a_row_per_prompt_and_a_column_per_system(page):
    table = page.tables["generations"]
    assert len(table) == 1 + 6
    assert table[0][:3] == ["prompt", "base", "ensemble, best found"]
    assert len(table[0]) == 1 + 7
    assert all("reflection " in cell and "fluency " in cell for cell in table[1][1:])


def test_warns_of_collapse_before_anything_else(html):
    assert html.index('class="warning"') < html.index("best found against")
    assert "policy reflection: 0.17 of its answers to test prompts are distinct, base 1.00" in html


def test_cost_ends_with_the_total(page):
    assert page.tables["cost"][-1] == ["total", "396", "1,936", "38,720", "3,408", "224"]


def test_reference_point_direction_settings_and_versions_are_stated(html):
    assert "direction: maximise; reference point" in html
    assert "The search (hierarchical_grid, " in html
    assert re.search(r"torch \d", html)


def test_rivals_compare_by_prompt(finished_run):
    found = {rival.name: rival for rival in rivals(load_run(finished_run))}
    assert found["parameter average, equal weights"].verdict == "better"
    assert found["base"].difference > 0.3
    assert list(found)[-1] == "base"
    assert found["policy reflection"].collapsed


@pytest.mark.parametrize(
    ("difference", "error", "verdict"),
    [
        (0.1, 0.04, "better"),
        (-0.1, 0.04, "worse"),
        (0.1, 0.06, "undecided"),
        (0.0, 0.0, "same"),
        (0.1, float("nan"), "undecided"),
    ],
)
def test_a_difference_counts_beyond_two_standard_errors(difference, error, verdict):
    assert Rival("x", 0.5, 0.01, difference, error, collapsed=False).verdict == verdict


def test_headline_says_in_words_what_was_found():
    found = [
        Rival("policy a", 0.4, 0.01, 0.1, 0.01, collapsed=False),
        Rival("policy b", 0.4, 0.01, 0.1, 0.01, collapsed=False),
        Rival("ensemble, equal weights", 0.5, 0.01, 0.001, 0.01, collapsed=False),
    ]
    assert headline(found) == (
        "On average over the objectives the best ensemble found scores higher than policy a and policy b, "
        "and cannot be told apart from equal weights."
    )


SHOWN = {
    "train": "<h2>Training</h2>",
    "search": "<h2>The front</h2>",
    "evaluate": "best found against",
    "compare": '<h2 id="methods">',
    "fuse": "<h2>The policies fused into one</h2>",
    "dynamic": '<h2 id="dynamic">',
    "distill": '<h2 id="distilled">',
}


@pytest.mark.parametrize("stage", SHOWN)
def test_each_stage_alone_has_a_report_that_says_how_to_add_the_others(finished_run, tmp_path, stage):
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(finished_run / "experiment.yaml", copy)
    with pytest.raises(UserError, match="holds no finished stage yet; run `emorl run"):
        write_report(copy)
    assert not (copy / "report").exists()
    if stage in OTHERS:
        OTHERS[stage](copy)
    else:
        shutil.copytree(finished_run / stage, copy / stage)
    html = write_report(copy).read_text(encoding="utf-8")
    assert [name for name, text in SHOWN.items() if text in html] == [stage]
    for other in set(SHOWN) - {stage}:
        assert f"<code>emorl {other} {copy / 'experiment.yaml'}</code>" in html
    results = load_run(copy)
    assert results.ran == [stage]
    assert (results.trials is None, results.summary is None) == (stage != "search", stage != "evaluate")
    assert ("<h2>Cost</h2>" in html) == (stage != "dynamic")  # no table of one total of nothing
    assert ("Marked systems" in html, "The search (" in html) == (False, stage == "search")


def test_all_stages_are_shown_together(run_of_all):
    html = write_report(run_of_all).read_text(encoding="utf-8")
    assert [name for name, text in SHOWN.items() if text in html] == list(SHOWN)
    assert "Not run here" not in html


def test_methods_and_dynamic_ensembles_are_shown(run_of_all):
    html = write_report(run_of_all).read_text(encoding="utf-8")
    assert "<td>&lt;b&gt;gdpo</td><td>+0.125 [-0.100, +0.300], 90%</td>" in html
    assert "<td>RLAE-PPO</td><td>8</td><td>0.500 ± 0.100</td>" in html
    assert "<td>ensemble</td>" in html


def test_what_an_adapter_keeps_is_shown(run_of_all):
    html = write_report(run_of_all).read_text(encoding="utf-8")
    assert "<td>value</td><td>+0.25 (+0.2 to +0.3)</td><td>80% (70% to 90%)</td>" in html
    assert "<td>score empathy</td><td>+0.01 (-0.1 to +0.1)</td><td>– (ensemble and soup do not differ here)</td>" in html
    assert "&lt;b&gt;best found: reflection 1.00" in html


def test_a_fusion_search_in_the_same_output_is_shown(run_of_all, page):
    assert "fusion" not in page.tables
    text = write_report(run_of_all).read_text(encoding="utf-8")
    shown = _Page(text)
    assert shown.tables["fusion"] == [
        ["trial", "plan", "score empathy", "value"],
        ["1", "slerp, empathy", "0.600", "0.500"],
        ["0", "2 x slerp", "0.400", "0.400"],
    ]
    assert "best of 2 by coordinate_descent: reflection 0.500" in text
    assert "layers.1: &lt;b&gt;empathy" in text
    assert [row[1] for row in shown.tables["cost"] if row[0] == "fuse"] == ["7"]


def test_writing_again_gives_the_same_report(finished_run, html):
    again = write_report(finished_run).read_text(encoding="utf-8")
    identifiers = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}")
    assert identifiers.sub("", again) == identifiers.sub("", html)
