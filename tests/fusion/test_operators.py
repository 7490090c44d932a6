"""Fusion operators: known answers, identities, and mergekit's results where its definitions are ours."""

import math

import numpy as np
import pytest
import torch

from emorl.config import UserError
from emorl.fusion.chunks import combine, gram
from emorl.fusion.methods.method import EntryWise, Setting, WeightedSum
from emorl.fusion.methods.spherical import karcher_coefficients, slerp_coefficients
from emorl.fusion.methods.ties import trim_threshold
from emorl.fusion.operators import (
    OPERATORS,
    Fusion,
    check_fusion,
    coefficients_of,
    fuse_tensor,
    methods_markdown,
)

BIG = (1 << 18) + 1017  # more than one chunk


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fuse(method, tensors, weights, base=None, **settings):
    return fuse_tensor(Fusion(method, tuple(weights), settings), tensors, base, name="layer.weight", seed=3)


def test_linear_by_hand_with_and_without_normalising():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    torch.testing.assert_close(fuse("linear", tensors, [3, 1]), torch.tensor([1.5, 3.0]))
    torch.testing.assert_close(fuse("linear", tensors, [3, 1], normalize=False), torch.tensor([6.0, 12.0]))
    with pytest.raises(UserError, match="sum to 0"):
        fuse("linear", tensors, [1, -1])


def test_task_arithmetic_adds_and_negates_task_vectors():
    base, one, two = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 4.0])
    torch.testing.assert_close(fuse("task_arithmetic", [one, two], [1, 1], base), torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(fuse("task_arithmetic", [one, two], [1, -1], base, scale=0.5), torch.tensor([1.5, -0.5]))


def test_slerp_of_a_right_angle_by_hand():
    found = fuse("slerp", [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])], [0.5, 0.5])
    torch.testing.assert_close(found, torch.full((2,), math.sqrt(2.0)))


@pytest.mark.parametrize("space", ["weights", "task_vectors"])
def test_slerp_ends_and_symmetry(space):
    one, two, base = random(7, 5), random(7, 5, seed=1), random(7, 5, seed=2)
    torch.testing.assert_close(fuse("slerp", [one, two], [1, 0], base, space=space), one)
    torch.testing.assert_close(fuse("slerp", [one, two], [0, 1], base, space=space), two)
    there, back = (
        fuse("slerp", [one, two], [0.7, 0.3], base, space=space),
        fuse("slerp", [two, one], [0.3, 0.7], base, space=space),
    )
    torch.testing.assert_close(there, back)


def test_slerp_of_nearly_parallel_or_vanishing_tensors_is_linear():
    one = random(100)
    near = one + 0.001 * random(100, seed=1)
    torch.testing.assert_close(fuse("slerp", [one, near], [0.25, 0.75]), fuse("linear", [one, near], [0.25, 0.75]))
    torch.testing.assert_close(fuse("slerp", [one, torch.zeros(100)], [0.25, 0.75]), 0.25 * one)


def test_karcher_mean_of_two_is_slerp_and_of_three_does_not_depend_on_order():
    vectors = [torch.nn.functional.normalize(random(50, seed=seed), dim=0) for seed in range(3)]
    pair = gram(vectors[:2])
    for share in (0.0, 0.25, 0.5, 0.9):
        expected = slerp_coefficients(pair, [1 - share, share])
        np.testing.assert_allclose(karcher_coefficients(pair, [1 - share, share]), expected, atol=1e-6)
    forwards = fuse("slerp", vectors, [0.2, 0.3, 0.5])
    torch.testing.assert_close(forwards, fuse("slerp", vectors[::-1], [0.5, 0.3, 0.2]))
    assert abs(forwards.norm() - 1) < 1e-5
    inside = torch.stack([torch.arccos((vector @ forwards).clamp(-1, 1)) for vector in vectors])
    tangents = [angle / angle.sin() * (vector - angle.cos() * forwards) for angle, vector in zip(inside, vectors, strict=True)]
    resting = sum(weight * tangent for weight, tangent in zip([0.2, 0.3, 0.5], tangents, strict=True))
    assert resting.norm() < 1e-4  # the defining property: the weighted tangents cancel


def test_ties_by_hand():
    base = torch.zeros(4)
    taus = [torch.tensor([4.0, -3.0, 0.1, 2.0]), torch.tensor([2.0, 5.0, 0.2, -1.0]), torch.tensor([-1.0, 4.0, 3.0, 0.3])]
    # kept at density 0.5: (4, -3, 0, 0), (2, 5, 0, 0), (0, 4, 3, 0); signs +, +, +, none; means of those that agree
    torch.testing.assert_close(fuse("ties", taus, [1, 1, 1], base, density=0.5), torch.tensor([3.0, 4.5, 3.0, 0.0]))
    summed = fuse("ties", taus, [1, 1, 1], base, density=0.5, normalize=False, scale=2.0)
    torch.testing.assert_close(summed, 2 * torch.tensor([6.0, 9.0, 3.0, 0.0]))


def test_ties_trims_even_where_one_model_is_all_there_is():
    found = fuse("ties", [random(BIG)], [1.0], torch.zeros(BIG), density=0.2)
    assert (found != 0).sum() == int(0.2 * BIG)
    assert found[found != 0].abs().min() >= random(BIG)[found == 0].abs().max()


def test_thresholds_from_outside_replace_the_tensor_s_own():
    tau, base = random(1000), torch.zeros(1000)
    found = fuse("ties", [tau], [1.0], base, thresholds=(1.5,))
    torch.testing.assert_close(found, tau * (tau.abs() >= 1.5))
    assert trim_threshold(tau, base, 1.0) == 0.0


def test_equal_models_come_back_whatever_the_method():
    base, model = random(40, 30), random(40, 30, seed=1)
    for method, operator in OPERATORS.items():
        weights = [1.0, 0.0, 0.0] if method == "keep" else [1.0, 1.0, 1.0] if method == "model_stock" else [0.2, 0.3, 0.5]
        settings = {"density": 1.0} if "density" in operator.settings else {}
        torch.testing.assert_close(fuse(method, [model] * 3, weights, base, **settings), model, atol=1e-5, rtol=1e-5)


def test_dare_keeps_the_expectation_and_its_seed():
    base, tau = torch.zeros(BIG), 1 + random(BIG).abs()
    found = fuse("dare_linear", [tau], [1.0], base, density=0.25)
    assert abs((found != 0).float().mean() - 0.25) < 0.005
    assert abs(found.mean() / tau.mean() - 1) < 0.02
    torch.testing.assert_close(found[found != 0], 4 * tau[found != 0])
    assert torch.equal(found, fuse("dare_linear", [tau], [1.0], base, density=0.25))
    other = fuse_tensor(Fusion("dare_linear", (1.0,), {"density": 0.25}), [tau], base, name="another.weight", seed=3)
    assert not torch.equal(found, other)
    signs = fuse("dare_ties", [tau, -tau], [1.0, 1.0], base, density=0.5)
    assert torch.isin((signs / tau).round(), torch.tensor([-2.0, 0.0, 2.0])).all()


def test_model_stock_of_opposite_changes_is_the_base():
    base, change = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(fuse("model_stock", [base + change, base - change], [1, 1], base), base)
    nearly = fuse("model_stock", [base + change, base - 1.5 * change], [1, 1], base)
    assert nearly.isfinite().all()


def test_model_stock_by_hand():
    base = torch.zeros(2)  # 45 degrees between them: t = 2 cos / (1 + cos)
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    cosine = math.sqrt(0.5)
    torch.testing.assert_close(fuse("model_stock", [one, two], [1, 1], base), 2 * cosine / (1 + cosine) * (one + two) / 2)
    assert torch.equal(fuse("model_stock", [one, base], [1, 1], base), base)  # one has not moved: they do not agree at all
    with pytest.raises(UserError, match="treats all models alike"):
        fuse("model_stock", [one, two], [1, 2], base)


def test_half_precision_is_accumulated_in_float32():
    tensors = [random(BIG, seed=seed).bfloat16() for seed in range(3)]
    base = random(BIG, seed=9).bfloat16()
    for method, operator in OPERATORS.items():
        weights = [0.0, 1.0, 0.0] if method == "keep" else [1.0, 1.0, 1.0]
        found = fuse(method, tensors, weights, base)
        expected = fuse(method, [tensor.float() for tensor in tensors], weights, base.float())
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), (method, operator)


def test_arguments_are_left_as_they_were():
    base, tensors = random(100), [random(100, seed=1), random(100, seed=2)]
    copies = [base.clone(), *[tensor.clone() for tensor in tensors]]
    for method in OPERATORS:
        fuse(method, tensors, [1.0, 0.0] if method == "keep" else [1.0, 1.0], base)
        assert all(torch.equal(before, after) for before, after in zip(copies, [base, *tensors], strict=True)), method


def test_combine_equals_the_sum_over_many_chunks():
    tensors = [random(BIG, seed=seed) for seed in range(3)]
    torch.testing.assert_close(combine(tensors, [0.5, -1.0, 2.0]), 0.5 * tensors[0] - tensors[1] + 2.0 * tensors[2])
    products = gram(tensors, tensors[0])
    assert products[0].abs().max() == 0
    np.testing.assert_allclose(products[1, 1], ((tensors[1] - tensors[0]).double() ** 2).sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("fusion", "base", "message"),
    [
        (Fusion("tis", (1, 1)), True, "no fusion method is called 'tis'; did you mean 'ties'"),
        (Fusion("ties", (1, 1), {"densty": 1}), True, "ties has no setting 'densty'; did you mean 'density'"),
        (Fusion("ties", (1, 1)), False, "works on differences to a base model"),
        (Fusion("linear", (1, 1, 1)), True, "got 3 weights for 2 models"),
        (Fusion("linear", (1, math.nan)), True, "must be finite"),
        (Fusion("dare_ties", (1, 1), {"density": 0}), True, "share of entries kept"),
        (Fusion("ties", (1, 1), {"density": [0.5]}), True, r"share of entries kept, in \(0, 1\], for all models or each; got"),
        (Fusion("ties", (1, 1), {"density": "0.5"}), True, "share of entries kept"),
        (Fusion("ties", (1, 1), {"thresholds": [0.1]}), True, "a number of at least 0 for each model; got"),
        (Fusion("ties", (1, 1), {"scale": math.inf}), True, "ties: scale is .* a finite number; got inf"),
        (Fusion("linear", (1, 1), {"normalize": "no"}), True, "whether the weights are divided by their sum, true or false"),
        (Fusion("linear", (1, 1), {"scale": 2}), True, "take it out of the settings .it is one of task_arithmetic, ties"),
        (Fusion("slerp", (1, 1), {"space": "weight"}), True, "weights or task_vectors; got 'weight'"),
        (Fusion("slerp", (1, 1), {"space": "task_vectors"}), False, "works on differences to a base model"),
        (Fusion("slerp", (1, -1)), True, "sum to 0 and cannot be normalised"),
        (Fusion("linear", (1, -1)), True, "sum to 0 and cannot be normalised"),
        (Fusion("model_stock", (1, 2)), True, "treats all models alike"),
        (Fusion("keep", (1, 1)), True, "keep takes one model, whose weight alone is not 0"),
    ],
)
def test_mistakes_are_told(fusion, base, message):
    with pytest.raises(UserError, match=message):
        check_fusion(fusion, 2, base)


def test_defaults_are_what_a_method_allows():
    for method, operator in OPERATORS.items():
        for name, setting in operator.settings.items():
            assert setting.allows(setting.default, 3), (method, name)
        weights = (1.0, 0.0, 0.0) if method == "keep" else (1.0, 1.0, 1.0)
        check_fusion(Fusion(method, weights, operator.complete({})), 3, has_base=True)


def test_the_page_tells_of_every_method_and_setting():
    sections = {text.split("\n", 1)[0]: " ".join(text.split()) for text in methods_markdown().split("\n## ")[1:]}
    assert list(sections) == list(OPERATORS)
    for method, operator in OPERATORS.items():
        text = sections[method]
        assert " ".join(operator.summary.split()) in text
        assert f"- paper: {operator.paper or 'none'} -" in text
        assert ("- base: needed" in text) == operator.needs_base
        assert f"- models: {operator.least_models} or more" in text
        for name, setting in operator.settings.items():
            assert f"- `{name}` ({str(setting.default).lower()}): {setting.meaning}; {setting.expected}" in text
    assert max(map(len, methods_markdown().splitlines())) <= 110


def test_a_method_is_applied_checked_and_documented_by_being_listed(monkeypatch):
    power = Setting(2.0, "the exponent of the weights", "at least 1", lambda value, _: value >= 1)

    def powers(products, weights, *, power):
        return [weight**power for weight in weights]

    largest = EntryWise(summary="The largest entries.", fuse=lambda tensors, *_: torch.stack(list(tensors)).amax(0))
    monkeypatch.setitem(OPERATORS, "powers", WeightedSum(summary="By powers.", settings={"power": power}, coefficients=powers))
    monkeypatch.setitem(OPERATORS, "largest", largest)
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])]
    torch.testing.assert_close(fuse("powers", tensors, [1, 2]), torch.tensor([13.0, 6.0]))
    torch.testing.assert_close(fuse("powers", tensors, [1, 2], power=3.0), torch.tensor([25.0, 10.0]))
    assert coefficients_of(Fusion("powers", (1, 2)), lambda: torch.eye(2)) == [1.0, 4.0]  # what adapters go by
    assert fuse("largest", tensors, [1, 1], torch.zeros(2)).tolist() == [3.0, 2.0]
    assert coefficients_of(Fusion("largest", (1, 2)), lambda: torch.eye(2)) is None
    with pytest.raises(UserError, match=r"powers: power is the exponent of the weights, at least 1; got 0"):
        check_fusion(Fusion("powers", (1, 1), {"power": 0}), 2, has_base=False)
    assert "## powers\n\nBy powers.\n" in methods_markdown()
    assert "- `power` (2.0): the exponent of the weights; at least 1\n" in methods_markdown()


def test_a_tensor_that_counts_nothing_is_not_read():
    one, broken, base = random(BIG), torch.full((BIG,), torch.nan), random(BIG, seed=1)
    assert torch.equal(fuse("keep", [broken, one], [0, 2]), one)
    torch.testing.assert_close(combine([broken, one], [0.0, 1.0], base), one)
    assert torch.equal(combine([one, one], [0.0, 0.0], base), base)
    assert not combine([one, one], [0.0, 0.0]).any()


# --- mergekit (LGPL, a test extra): the same inputs, where the definitions agree


def test_parity_with_mergekit():
    merging = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    slerping = pytest.importorskip("mergekit.merge_methods.slerp")
    sparsifying = pytest.importorskip("mergekit.sparsify")
    base, tensors = random(300, 200), [random(300, 200, seed=seed) for seed in (1, 2, 3)]
    for share in (0.1, 0.5, 0.8):
        [theirs] = slerping.slerp(torch.tensor([share]), tensors[0][None], tensors[1][None])
        torch.testing.assert_close(fuse("slerp", tensors[:2], [1 - share, share]), theirs, atol=1e-6, rtol=1e-6)
    weights, density = [0.5, 0.2, 0.8], 0.3
    deltas = torch.stack([sparsifying.magnitude(tensor - base, density) for tensor in tensors])
    weighted = deltas * torch.tensor(weights)[:, None, None]
    mask = merging.get_mask(weighted, "sum", deltas.dtype)
    divisor = (mask * torch.tensor(weights)[:, None, None]).sum(0)
    divisor[divisor.abs() < 1e-8] = 1
    theirs = base + (weighted * mask).sum(0) / divisor
    torch.testing.assert_close(fuse("ties", tensors, weights, base, density=density), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", OPERATORS)
def test_what_is_written_to_a_given_tensor_is_what_is_returned(method, dtype):
    base, *tensors = [random(7, BIG // 7, seed=seed).to(dtype) for seed in range(3)]
    fusion = Fusion(method, (0.0, 1.0) if method == "keep" else (0.5, 0.5))
    given, out = base if OPERATORS[method].needs_base else None, torch.full_like(base, torch.nan, dtype=torch.float32)
    assert fuse_tensor(fusion, tensors, given, out=out) is out
    assert torch.equal(out, fuse_tensor(fusion, tensors, given))
