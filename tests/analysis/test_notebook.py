"""The notebook runs on a finished run and computes what the stages recorded."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from emorl import load_run
from emorl.evaluation.pareto import hypervolume

NOTEBOOK = Path(__file__).parents[2] / "analysis" / "pareto_front.ipynb"


@pytest.fixture(scope="module")
def outputs(finished_run, tmp_path_factory):
    """Cell id -> its printed and shown text, of the executed notebook."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMORL_RUN", str(finished_run))
        NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return {cell["id"]: cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"}


def _text(outputs):
    return "".join(output.get("text", "") or output["data"].get("text/plain", "") for output in outputs)


def test_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_draws_one_front_per_pair_of_objectives(outputs):
    shown = [output["data"].get("text/html", "") for output in outputs["fronts"] if output["output_type"] == "display_data"]
    assert sum('class="plotly-graph-div"' in html for html in shown) == 3  # what an export to HTML shows


def test_hypervolumes_equal_the_recorded_ones_and_name_their_reference(outputs, finished_run):
    text = _text(outputs["hypervolume"])
    assert "direction: maximise" in text
    assert str(load_run(finished_run).evaluation.reference_point) in text
    rows = [line.split()[-2:] for line in text.splitlines() if line.startswith(("policies", "parameter", "ensemble"))]
    assert len(rows) == 3
    assert all(computed == recorded and float(computed) > 0 for computed, recorded in rows)


def test_growth_ends_at_the_hypervolume_of_all_trials(outputs, finished_run):
    scores = load_run(finished_run).trials[["score_reflection", "score_empathy", "score_fluency"]]
    whole = hypervolume(scores, scores.min().tolist())
    assert f"hypervolume after 15 trials: {whole:.6g}" in _text(outputs["growth"])


def test_shows_the_weights_of_every_point_of_the_front(outputs, finished_run):
    points = int(load_run(finished_run).trials["front"].sum())
    html = outputs["weights"][0]["data"]["text/html"]
    assert html.count("<tr") == points + 1
    assert "weight_empathy" in html
