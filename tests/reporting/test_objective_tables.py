from emorl.objectives import REGISTRY
from emorl.objectives.catalogue import Entry, catalogue
from emorl.reporting.objective_tables import catalogue_markdown


def test_a_row_says_what_an_objective_scores_its_range_options_and_needs():
    entry = Entry("f", "Share a|b:", (0.0, 5.0), {"most": 3, "label": None, "marks": ("#", "|")}, ("model",), None)
    *_, row = catalogue_markdown([entry]).splitlines()
    options = '`most: 3`, `label: null`, `marks: ["#", "&#124;"]`'
    assert row == f"| `f` | Share a&#124;b | [0, 5] | {options} | `model` |"


def test_every_registered_objective_has_a_row_of_five_cells():
    head, rule, *rows = catalogue_markdown(catalogue()).splitlines()
    assert [row.split("`")[1] for row in rows] == list(REGISTRY)
    assert {row.count("|") for row in (head, rule, *rows)} == {6}
