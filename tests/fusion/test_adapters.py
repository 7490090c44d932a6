"""A fused adapter is an ordinary PEFT adapter: the weighted sum of what went in, exactly, or the best of its rank."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import yaml
from peft import PeftModel

from emorl.aggregation.ensemble import ParameterAverage
from emorl.config import UserError
from emorl.fusion.adapters import concatenate_adapters, fuse_adapters
from emorl.fusion.low_rank import compress, factor_gram, factorize
from emorl.fusion.operators import OPERATORS, Fusion, fuse_tensor
from emorl.policies.adapters import check_adapter_fits, read_adapter

WEIGHTS = [0.7, -0.4, 1.3]


@pytest.fixture(params=["llama", "gpt2"])
def base_and_adapters(request, make_causal_model, write_adapter, tmp_path):
    """Three adapters of different rank, scaling and target modules, so that some modules have 1, some 2, some 3 of
    them."""
    base = make_causal_model(request.param)
    some, few = (["c_attn", "c_fc"], ["c_attn"]) if request.param == "gpt2" else (["q_proj", "up_proj"], ["q_proj"])
    paths = [
        write_adapter(base, tmp_path / "all", rank=2, seed=1),
        write_adapter(
            base, tmp_path / "some", rank=5, alpha=3, rslora=True, target_modules=some, seed=2, layers_to_transform=[1]
        ),
        write_adapter(base, tmp_path / "few", rank=3, alpha=6, target_modules=few, seed=3),
    ]
    return base, [read_adapter(path) for path in paths]


@torch.no_grad()
def test_fused_adapter_equals_parameter_average_and_dense_sum(base_and_adapters, tokenizer, tmp_path):
    base, adapters = base_and_adapters
    fused = concatenate_adapters(adapters, WEIGHTS, tmp_path / "fused")
    inputs = tokenizer(["a prompt", "another one"], return_tensors="pt", padding=True)
    loaded = PeftModel.from_pretrained(deepcopy(base), str(fused)).eval()
    found = loaded(**inputs).logits

    named = {adapter.path.name: adapter for adapter in adapters}
    average = ParameterAverage(base, named, include_base=True, weights=[*WEIGHTS, 0.0])
    torch.testing.assert_close(average(**inputs).logits, found, atol=2e-4, rtol=1e-4)

    dense = deepcopy(base)
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        for name, (a, b) in adapter.factors.items():
            delta = weight * (a @ b)  # (in, out)
            matrix = dense.get_submodule(name).weight.data
            matrix += delta if adapter.fan_in_fan_out else delta.T
    torch.testing.assert_close(dense(**inputs).logits, found, atol=2e-4, rtol=1e-4)


def test_one_adapter_of_weight_one_comes_back_unchanged(base_and_adapters, tmp_path):
    base, (adapter, *_) = base_and_adapters
    again = read_adapter(concatenate_adapters([adapter], [1.0], tmp_path / "fused"))
    check_adapter_fits(again, base)
    assert again.factors.keys() == adapter.factors.keys()
    for name, factors in adapter.factors.items():
        assert all(torch.equal(before, after) for before, after in zip(factors, again.factors[name], strict=True))
    assert again.fan_in_fan_out == adapter.fan_in_fan_out


def test_ranks_add_up_and_scaling_is_one(base_and_adapters, tmp_path):
    _, adapters = base_and_adapters
    fused = concatenate_adapters(adapters, WEIGHTS, tmp_path / "fused")
    config = json.loads((fused / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {5, 7, 10}
    assert not config["use_rslora"]


def test_the_common_base_is_recorded_and_different_bases_are_refused(base_and_adapters, tmp_path):
    _, (first, second, _) = base_and_adapters
    for adapter in (first, second):
        (adapter.path / "policy.json").write_text(json.dumps({"base_fingerprint": "one"}))
    both = [read_adapter(first.path), read_adapter(second.path)]
    assert read_adapter(concatenate_adapters(both, [1, 1], tmp_path / "fused")).base_fingerprint == "one"
    (second.path / "policy.json").write_text(json.dumps({"base_fingerprint": "two"}))
    with pytest.raises(ValueError, match="were trained on different bases; fuse adapters of one base"):
        concatenate_adapters([both[0], read_adapter(second.path)], [1, 1], tmp_path / "refused")


def test_wrong_weights_and_shapes_are_refused(base_and_adapters, make_causal_model, write_adapter, tmp_path):
    base, adapters = base_and_adapters
    with pytest.raises(ValueError, match="3 adapters and 2 weights; expected one weight per"):
        concatenate_adapters(adapters, [1, 2], tmp_path / "out")
    with pytest.raises(ValueError, match=r"Got weights \[1, 2, nan\]; expected finite"):
        concatenate_adapters(adapters, [1, 2, float("nan")], tmp_path / "out")
    wider = {"n_inner": 64} if base.config.model_type == "gpt2" else {"intermediate_size": 64}
    other = read_adapter(write_adapter(make_causal_model(base.config.model_type, **wider), tmp_path / "wide"))
    with pytest.raises(ValueError, match="map different shapes"):
        concatenate_adapters([adapters[0], other], [1, 1], tmp_path / "out")


SETTINGS = {
    "ties": {"density": 0.4, "scale": 0.8},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": [0.3, 0.5, 0.9]},
    "task_arithmetic": {"scale": 0.3},
}
METHOD_WEIGHTS = {"keep": (0.0, 2.0, 0.0), "model_stock": (1.0, 1.0, 1.0), "slerp": (0.5, 0.2, 0.3)}
FULL = 48  # at least the rank of any module of the tiny models


@pytest.fixture
def three(make_causal_model, write_adapter, tmp_path):
    """A Llama and three adapters of all of its projections, related enough for SLERP and Model Stock to be themselves."""
    base = make_causal_model("llama")
    first = read_adapter(write_adapter(base, tmp_path / "one", rank=2, seed=1))
    others = [read_adapter(write_adapter(base, tmp_path / name, seed=seed)) for name, seed in (("two", 2), ("three", 3))]
    related = {
        name: (torch.cat([a, other_a[:, :1]], 1), torch.cat([b, other_b[:1]], 0))
        for name, (a, b) in first.factors.items()
        for other_a, other_b in [others[0].factors[name]]
    }
    return base, [replace(first, factors=related), *others]


def fusion_of(method, count=3):
    return Fusion(method, METHOD_WEIGHTS.get(method, tuple(WEIGHTS))[:count], SETTINGS.get(method, {}))


def deltas(adapter):
    """module -> (in, out) in float64."""
    return {name: a.double() @ b.double() for name, (a, b) in adapter.factors.items()}


def distance(found, expected):
    """Relative to all of what is expected; a module that is not there is zero."""
    apart = sum((found.get(name, torch.zeros(())) - delta).square().sum() for name, delta in expected.items())
    return math.sqrt(apart / sum(delta.square().sum() for delta in expected.values()))


def fused_tensors(fusion, adapters, seed=0):
    """The same fusion of full deltas, in the layout of a Linear's weight."""
    modules = {name: pair for adapter in adapters for name, pair in adapter.factors.items()}
    result = {}
    for name, (a, b) in modules.items():
        zero = torch.zeros(b.shape[1], a.shape[0])
        each = [(one.factors[name][0] @ one.factors[name][1]).T if name in one.factors else zero for one in adapters]
        result[name] = fuse_tensor(fusion, each, zero, name=f"{name}.weight", seed=seed).T
    return result


@pytest.mark.parametrize("method", OPERATORS)
def test_every_method_is_its_operator_on_the_full_deltas(three, method, tmp_path):
    _, adapters = three
    fused = fuse_adapters(adapters, fusion_of(method), tmp_path / "fused", rank=FULL, seed=5)
    assert distance(deltas(read_adapter(fused)), fused_tensors(fusion_of(method), adapters, seed=5)) < 1e-5


@pytest.mark.parametrize("method", OPERATORS)
def test_a_missing_module_is_a_zero_delta(three, method, tmp_path):
    _, (first, *others) = three
    fewer = replace(first, factors={name: pair for name, pair in first.factors.items() if "mlp" not in name})
    fused = fuse_adapters([fewer, *others], fusion_of(method), tmp_path / "fused", rank=FULL)
    assert distance(deltas(read_adapter(fused)), fused_tensors(fusion_of(method), [fewer, *others])) < 1e-5


def test_slerp_of_two_is_on_the_arc_between_their_deltas(three, tmp_path):
    _, adapters = three
    fusion = Fusion("slerp", (0.7, 0.3), {"space": "task_vectors"})
    found = deltas(read_adapter(fuse_adapters(adapters[:2], fusion, tmp_path / "fused")))
    assert distance(found, fused_tensors(fusion, adapters[:2])) < 1e-5
    linear = fused_tensors(Fusion("linear", (0.7, 0.3)), adapters[:2])
    assert distance(found, linear) > 0.1
    end = fuse_adapters(adapters[:2], Fusion("slerp", (0.0, 1.0)), tmp_path / "end")
    assert distance(deltas(read_adapter(end)), deltas(adapters[1])) < 1e-6


def test_the_sum_is_exact_and_a_fused_adapter_fuses_to_itself(base_and_adapters, tmp_path):
    _, adapters = base_and_adapters
    fused = read_adapter(fuse_adapters(adapters, Fusion("task_arithmetic", tuple(WEIGHTS)), tmp_path / "fused"))
    expected = {name: torch.zeros(delta.shape, dtype=torch.float64) for one in adapters for name, delta in deltas(one).items()}
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        for name, delta in deltas(adapter).items():
            expected[name] += weight * delta
    assert distance(deltas(fused), expected) < 1e-6
    for method in ("linear", "task_arithmetic", "keep"):
        again = read_adapter(fuse_adapters([fused], Fusion(method, (1.0,)), tmp_path / method))
        for name, (a, b) in fused.factors.items():
            assert torch.equal(a, again.factors[name][0])
            assert torch.equal(b, again.factors[name][1])


def test_keep_leaves_one_adapter_as_it_is(base_and_adapters, tmp_path):
    _, adapters = base_and_adapters
    kept = read_adapter(fuse_adapters(adapters, Fusion("keep", (0.0, 1.0, 0.0)), tmp_path / "kept"))
    assert kept.factors.keys() == adapters[1].factors.keys()
    assert all(torch.equal(a, kept.factors[name][0]) for name, (a, _) in adapters[1].factors.items())


@torch.no_grad()
@pytest.mark.parametrize(("method", "rank"), [("task_arithmetic", 3), ("ties", None)])
def test_a_truncated_fusion_loads_in_peft_and_gives_the_dense_models_logits(
    base_and_adapters, tokenizer, tmp_path, method, rank
):
    base, adapters = base_and_adapters
    fused = fuse_adapters(adapters, Fusion(method, tuple(WEIGHTS)), tmp_path / "fused", rank=rank)
    adapter = read_adapter(fused)
    check_adapter_fits(adapter, base)
    inputs = tokenizer(["a prompt", "another one"], return_tensors="pt", padding=True)
    loaded = PeftModel.from_pretrained(deepcopy(base), str(fused)).eval()
    dense = deepcopy(base)
    for name, (a, b) in adapter.factors.items():
        dense.get_submodule(name).weight.data += a @ b if adapter.fan_in_fan_out else (a @ b).T
    torch.testing.assert_close(dense(**inputs).logits, loaded(**inputs).logits, atol=2e-4, rtol=1e-4)
    ranks = {name: a.shape[1] for name, (a, _) in adapter.factors.items()}
    sums = {name: sum(one.factors[name][0].shape[1] for one in adapters if name in one.factors) for name in ranks}
    assert ranks == ({name: min(rank, most) for name, most in sums.items()} if rank else sums)


def test_random_masks_are_those_of_whole_models_and_follow_the_seed(three, tmp_path):
    base, adapters = three
    fusion = fusion_of("dare_linear")
    name = "model.layers.1.mlp.up_proj"
    weight = base.get_submodule(name).weight.data
    models = [weight + (one.factors[name][0] @ one.factors[name][1]).T for one in adapters]
    whole = fuse_tensor(fusion, models, weight, name=f"{name}.weight", seed=7) - weight
    found = [
        deltas(read_adapter(fuse_adapters(adapters, fusion, tmp_path / f"{index}", rank=FULL, seed=seed)))[name]
        for index, seed in enumerate((7, 7, 8))
    ]
    torch.testing.assert_close(found[0].float(), whole.T, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best(delta, rank):
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    share = float(values[:rank].square().sum() / values.square().sum())
    return (left[:, :rank] * values[:rank]) @ right[:rank], share


@pytest.mark.parametrize(("inputs", "outputs", "ranks"), [(40, 25, 12), (25, 40, 12), (10, 40, 12), (40, 10, 12)])
def test_compressed_is_the_best_of_its_rank(inputs, outputs, ranks):
    a, b = random(inputs, ranks) * torch.logspace(0, -3, ranks), random(ranks, outputs, seed=1)
    exact = a.double() @ b.double()
    for shorten in (compress, lambda a, b, **kept: factorize(a.double() @ b.double(), **kept)):
        for rank in (1, 5, 12, 99):
            found = shorten(a, b, rank=rank)
            expected, share = best(exact, rank)
            assert found.a.dtype == found.b.dtype == torch.float32
            assert found.a.shape[1] <= rank
            assert float((found.a.double() @ found.b.double() - expected).norm() / exact.norm()) < 1e-6
            assert found.kept_energy == pytest.approx(share, abs=1e-12)
            torch.testing.assert_close(found.a.norm(dim=0), found.b.norm(dim=1), rtol=1e-3, atol=1e-6)
        assert float((shorten(a, b).a @ shorten(a, b).b - exact).norm() / exact.norm()) < 1e-6


def test_the_smallest_rank_that_keeps_the_energy_is_taken():
    a, b = torch.eye(6)[:, :4], torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])) @ torch.eye(7)[:4]  # energies 9, 4, 1, 0
    for shorten in (compress, lambda a, b, **kept: factorize(a @ b, **kept)):
        for energy, rank, share in ((0.5, 1, 9 / 14), (0.7, 2, 13 / 14), (0.95, 3, 1.0), (1.0, 3, 1.0)):
            found = shorten(a, b, energy=energy)
            assert found.a.shape[1] == found.b.shape[0] == rank
            assert found.kept_energy == pytest.approx(share)
        nothing = shorten(a, torch.zeros_like(b), energy=0.9)
        assert nothing.kept_energy == 1.0
        assert not (nothing.a @ nothing.b).any()


def test_inner_products_follow_from_the_factors():
    factors = [(random(9, rank, seed=rank), random(rank, 11, seed=rank + 9)) for rank in (2, 5, 3)]
    factors.append((torch.zeros(9, 0), torch.zeros(0, 11)))
    flat = torch.stack([(a.double() @ b.double()).flatten() for a, b in factors])
    torch.testing.assert_close(factor_gram(factors), flat @ flat.T)


def test_modules_may_have_fusions_of_their_own(three, tmp_path):
    _, adapters = three
    whole, own = Fusion("linear", tuple(WEIGHTS)), Fusion("keep", (0.0, 0.0, 1.0))
    name = next(iter(adapters[2].factors))
    fused = read_adapter(fuse_adapters(adapters, whole, tmp_path / "fused", by_module={name: own}))
    expected = {**fused_tensors(whole, adapters), name: deltas(adapters[2])[name]}
    assert distance(deltas(fused), expected) < 1e-5
    assert f"| {name} | keep 0, 0, 1 |" in (tmp_path / "fused" / "README.md").read_text()


def test_the_card_names_the_recipe_and_what_was_lost(three, tmp_path):
    _, adapters = three
    fused = fuse_adapters(adapters, Fusion("dare_ties", tuple(WEIGHTS), {"density": 0.5}), tmp_path / "fused", rank=4, seed=3)
    _, front_matter, text = (fused / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front_matter)["library_name"] == "peft"
    for row in ("| method | dare_ties |", "| density | 0.5 |", "| normalize | True |", "| rank | 4 |", "| seed | 3 |"):
        assert row in text
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        assert f"| {adapter.path} | {weight} | 1.0 |" in text
    full = fused_tensors(Fusion("dare_ties", tuple(WEIGHTS), {"density": 0.5}), adapters, seed=3)
    shares = {name: best(delta, 4)[1] for name, delta in full.items()}
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    retained = {cell[0]: float(cell[3]) for cell in cells if cell[0] in shares and cell[2] == "4"}
    assert retained == pytest.approx(shares, abs=1e-5)
    energies = {name: float(delta.square().sum()) for name, delta in full.items()}
    total = sum(shares[name] * energy for name, energy in energies.items()) / sum(energies.values())
    assert float(text.split("rank written: ")[1].split()[0]) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize(
    ("fusion", "options", "message"),
    [
        (Fusion("tise", (1, 1, 1)), {}, "no fusion method is called 'tise'; did you mean 'ties'"),
        (Fusion("linear", (1, 1)), {}, "got 2 weights for 3 models"),
        (Fusion("linear", (1, -1, 0)), {}, "sum to 0 and cannot be normalised"),
        (Fusion("keep", (1, 1, 0)), {}, "keep takes one model"),
        (Fusion("model_stock", (1, 2, 1)), {}, "treats all models alike"),
        (
            Fusion("slerp", (1, 1, 1), {"space": "weights"}),
            {},
            "between their deltas: set `space` to task_vectors or leave it out",
        ),
        (Fusion("linear", (1, 1, 1)), {"rank": 4, "energy": 0.9}, "rank 4 and energy 0.9: give one"),
        (Fusion("linear", (1, 1, 1)), {"rank": 0}, "rank 0: expected at least 1"),
        (Fusion("linear", (1, 1, 1)), {"energy": 1.5}, r"energy 1.5: expected the share .* in \(0, 1\]"),
        (Fusion("task_arithmetic", (0, 0, 0)), {}, "leaves nothing of these adapters"),
    ],
)
def test_fusions_that_cannot_be_are_refused_and_leave_nothing(three, fusion, options, message, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        fuse_adapters(three[1], fusion, tmp_path / "fused", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_fusion_that_breaks_off_leaves_no_directory(three, tmp_path):
    _, (first, second, _) = three
    name = list(second.factors)[-1]
    a, b = second.factors[name]
    broken = replace(second, factors={**second.factors, name: (a, b * float("nan"))})
    before = sorted(tmp_path.iterdir())
    for method in ("linear", "ties"):
        with pytest.raises(UserError, match=rf"two holds NaN or infinity at '{name}'; train it again"):
            fuse_adapters([first, broken], Fusion(method, (0.5, 0.5)), tmp_path / "fused")
    assert sorted(tmp_path.iterdir()) == before


def test_what_lies_in_the_output_directory_is_not_overwritten(three, tmp_path):
    _, adapters = three
    fusion, output = Fusion("linear", (0.5, 0.2, 0.3)), tmp_path / "deep" / "fused"
    output.mkdir(parents=True)
    fuse_adapters(adapters, fusion, output)  # an empty one is filled
    written = {file.name: file.read_bytes() for file in output.iterdir()}
    assert set(written) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(UserError, match="fused exists and is not empty; give another output, or move it away"):
        fuse_adapters(adapters, fusion, output)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == written
