"""Tangents against per-sample gradients: autograd, one pair at a time, unpacked, with transformers' own forward.

`RMSNorm` of transformers computes in fp32 whatever the model's dtype, which alone parts forward and backward mode by
1e-7; where fp64 is meant to be fp64, `exact_norms` gives both sides one that is.

Shapes: N pairs, P weights of the model in one vector.
"""

from __future__ import annotations

import copy
import itertools
import json
import types
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_models import naive_logps, random_groups, related_groups, tiny_causal

from prefsel.errors import NonFiniteError, UserError
from prefsel.models import directional, directional_logps, score_groups, tangent
from prefsel.models import pair_features as per_pair
from prefsel.models.chat import EncodedGroup
from prefsel.models.directional import (
    column,
    differences,
    directional_route,
    finite_difference_logps,
    finite_difference_route,
    largest_error,
)
from prefsel.models.logps import packed_logps
from prefsel.models.pair_features import PairFeatures, pair_features
from prefsel.models.tangent import (
    fisher_diagonal,
    load_tangents,
    norm,
    precondition,
    save_tangent,
    validation_gradient,
)

BETA = 0.1
FAMILIES = ["llama", "qwen2", "gpt_neox"]  # the first two with two query heads to a key head


def exact_norms(model):
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(rms_norm, module)
    return model


def rms_norm(self, hidden):
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def tiny(model_type, **options):
    return tiny_causal(model_type, **({"intermediate_size": 64} | options))


def double(model_type, **options):
    return exact_norms(tiny(model_type, **options).double())


def naive_pair(model, group):
    return torch.stack([naive_logps(model, group.prompt_tokens, tokens) for tokens in group.completion_tokens])


def pairs_with_reference(model, count, seed):
    """Pairs, and reference log-probs some nats from the model's, so that σ(−IRM) takes all values."""
    return with_reference(model, random_groups([2] * count, longest=40, seed=seed), seed)


def with_reference(model, groups, seed):
    with torch.no_grad():
        logps_N2 = torch.stack([naive_pair(model, group) for group in groups]).numpy()
    return groups, logps_N2 + np.random.default_rng(seed).normal(scale=10.0, size=(len(groups), 2))


def naive_loss(model, group, reference_2):
    chosen, rejected = naive_pair(model, group) - torch.tensor(reference_2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected))


def naive_gradients(model, groups, reference_N2):
    """[N, P], one backward pass per pair."""
    rows = []
    for group, reference_2 in zip(groups, reference_N2):
        loss = naive_loss(model, group, reference_2)
        gradient = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.double().flatten() for part in gradient]))
    return torch.stack(rows)


def flat(direction, model):
    assert list(direction) == [name for name, _ in model.named_parameters()]
    return torch.cat([direction[name].double().flatten() for name, _ in model.named_parameters()])


def unflat(vector_P, model):
    parts = vector_P.split([p.numel() for p in model.parameters()])
    return {name: part.view(p.shape) for (name, p), part in zip(model.named_parameters(), parts)}


def through(route, groups, token_budget=300):
    """The numbers of a route, [N, 2, …]."""
    values = [[None] * len(group.completion_tokens) for group in groups]
    with route.context():
        for batch in route.rows(groups, token_budget):
            for (group, completion), numbers in zip(batch.completion_index, route.forward(batch).tolist()):
                values[group][completion] = numbers
    return np.array(values)


def influence(values_N2S, reference_N2, direction=0):
    """By the chain rule from log-probs and their derivatives."""
    log_ratio_N2 = values_N2S[..., 0] - reference_N2
    margin_N = BETA * (log_ratio_N2[:, 0] - log_ratio_N2[:, 1])
    dlogps_N2 = values_N2S[..., 1 + direction]
    return -BETA / (1 + np.exp(margin_N)) * (dlogps_N2[:, 0] - dlogps_N2[:, 1])


def error(got, expected):
    return np.abs(got - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


# ------------------------------------------------------------------------------------------------------- influence


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_influence_equals_the_dot_product_of_per_sample_gradients(model_type, options):
    model = double(model_type, **options)
    groups, reference_N2 = pairs_with_reference(model, 10, seed=1)
    validation, validation_reference_N2 = pairs_with_reference(model, 6, seed=2)
    v = validation_gradient(model, validation, validation_reference_N2, beta=BETA, token_budget=200)
    values = through(directional_route(model, v.directions), groups)
    mean_P = naive_gradients(model, validation, validation_reference_N2).mean(0)
    expected_N = naive_gradients(model, groups, reference_N2) @ mean_P
    assert error(influence(values, reference_N2), expected_N) <= 1e-9
    with torch.no_grad():
        assert error(values[..., 0], torch.stack([naive_pair(model, group) for group in groups])) <= 1e-12


@pytest.mark.parametrize("model_type", FAMILIES)
def test_influence_of_pairs_that_begin_alike(model_type):
    model = double(model_type, max_position_embeddings=512)
    groups, reference_N2 = with_reference(model, related_groups(), seed=1)
    v = validation_gradient(model, *with_reference(model, related_groups(seed=2), 3), beta=BETA, token_budget=2000)
    values = through(directional_route(model, v.directions), groups, token_budget=2000)
    expected_N = naive_gradients(model, groups, reference_N2) @ flat(v.directions["all"], model)
    assert error(influence(values, reference_N2), expected_N) <= 1e-9


@pytest.mark.parametrize("model_type", FAMILIES)
def test_influence_in_fp32(model_type):
    model = tiny(model_type)
    groups, reference_N2 = pairs_with_reference(model, 10, seed=1)
    validation, validation_reference_N2 = pairs_with_reference(model, 6, seed=2)
    v = validation_gradient(model, validation, validation_reference_N2, beta=BETA, token_budget=200)
    values = through(directional_route(model, v.directions), groups)
    exact = exact_norms(copy.deepcopy(model).double())
    mean_P = naive_gradients(exact, validation, validation_reference_N2).mean(0)
    expected_N = naive_gradients(exact, groups, reference_N2) @ mean_P
    assert all(tensor.dtype == torch.float32 for tensor in v.directions["all"].values())
    assert error(influence(values, reference_N2), expected_N) <= 3e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_step_on_the_validation_loss_makes_lossdiff_the_influence(model_type):
    model = double(model_type)
    groups, reference_N2 = pairs_with_reference(model, 6, seed=1)
    validation, validation_reference_N2 = pairs_with_reference(model, 4, seed=2)
    v = validation_gradient(model, validation, validation_reference_N2, beta=BETA).directions["all"]
    influence_N = influence(through(directional_route(model, {"v": v}), groups), reference_N2)

    def losses(at):
        with torch.no_grad():
            return np.array([float(naive_loss(at, group, row)) for group, row in zip(groups, reference_N2)])

    errors = []
    for eta in (1e-4, 1e-5, 1e-6):
        stepped = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in stepped.named_parameters():
                parameter -= eta * v[name]
        errors.append(error((losses(model) - losses(stepped)) / eta, influence_N))
    assert errors[2] < 1e-3
    # First order: a tenth of the step, a tenth of the error.
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.2)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.2)


def test_several_directions_are_what_each_is_alone():
    model = double("llama")
    groups, reference_N2 = pairs_with_reference(model, 6, seed=1)
    labels = ["wit", "honesty", "wit", "wit", "honesty", "wit"]
    strata = validation_gradient(model, groups, reference_N2, beta=BETA, strata=labels, token_budget=200)
    naive_NP = naive_gradients(model, groups, reference_N2)
    values = through(directional_route(model, strata.directions), groups)
    assert strata.num_pairs == {"wit": 4, "honesty": 2}
    for number, name in enumerate(["wit", "honesty"]):
        members = [i for i, label in enumerate(labels) if label == name]
        expected_P = naive_NP[members].mean(0)
        assert error(flat(strata.directions[name], model), expected_P) <= 1e-9
        with torch.no_grad():
            losses = [float(naive_loss(model, groups[i], reference_N2[i])) for i in members]
        assert strata.losses[name] == pytest.approx(np.mean(losses), rel=1e-12)
        assert error(influence(values, reference_N2, number), naive_NP @ expected_P) <= 1e-9


@pytest.mark.parametrize("token_budget", [1, 150, 10_000])
def test_the_rows_of_the_validation_pairs_do_not_matter(token_budget):
    model = double("qwen2")
    groups, reference_N2 = pairs_with_reference(model, 5, seed=3)
    # The last pair's prompt was cut on the left, for the chosen completion only.
    cut = EncodedGroup([7, *groups[0].prompt_tokens], groups[0].completion_tokens, ["ok", "ok"], 1, (1, 0))
    alone = [(cut.prompt_tokens[1:], cut.completion_tokens[0]), (cut.prompt_tokens, cut.completion_tokens[1])]
    groups, reference_N2 = [*groups, cut], np.concatenate([reference_N2, reference_N2[:1]])
    with mock.patch.object(tangent, "pair_logps", wraps=tangent.pair_logps) as rows:
        v = validation_gradient(model, groups, reference_N2, beta=BETA, token_budget=token_budget)
    runs = [call.args[1] for call in rows.call_args_list]
    lengths = [[len(g.prompt_tokens) + sum(map(len, g.completion_tokens)) for g in run] for run in runs]
    assert all(sum(run) <= token_budget or len(run) == 1 for run in lengths)
    # No two neighbouring rows would have fitted into one.
    assert all(sum(run) + following[0] > token_budget for run, following in itertools.pairwise(lengths))

    def loss(group, reference_2):
        if group is not cut:
            return naive_loss(model, group, reference_2)
        chosen, rejected = (naive_logps(model, *tokens) for tokens in alone)
        return -torch.nn.functional.logsigmoid(BETA * (chosen - reference_2[0] - rejected + reference_2[1]))

    total = sum(loss(group, row) for group, row in zip(groups, reference_N2)) / 6
    expected_P = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    assert error(flat(v.directions["all"], model), expected_P) <= 1e-9
    assert v.losses["all"] == pytest.approx(float(total.detach()), rel=1e-12)


@pytest.mark.parametrize(
    ("model_type", "dtype", "tolerance"),
    [("mistral", torch.float64, 1e-6), ("gemma2", torch.float32, 3e-5), ("phi", torch.float64, 1e-9)],
)
def test_models_that_are_padded_and_heads_with_a_bias(model_type, dtype, tolerance):
    """A sliding window and soft-capping take the padded path; the head of phi has a bias.

    Norms compute in fp32, and eager attention, which soft-capping needs, turns its mask into NaN in fp64.
    """
    options = {"sliding_window": 16} if model_type != "phi" else {}
    model = tiny(model_type, **options).to(dtype)
    groups = random_groups([2, 2, 2], longest=40, seed=4)
    reference_N2 = np.full((3, 2), -100.0)
    v = validation_gradient(model, groups, reference_N2, beta=BETA)
    route = directional_route(model, v.directions, pad_token_id=0)
    assert route.is_packed == (model_type == "phi")
    values = through(route, groups)
    naive_NP = naive_gradients(model, groups, reference_N2)
    assert error(flat(v.directions["all"], model), naive_NP.mean(0)) <= tolerance
    assert error(influence(values, reference_N2), naive_NP @ naive_NP.mean(0)) <= tolerance


def test_adapters_have_tangents_of_their_own():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(double("llama"), config).eval().double()
    groups = random_groups([2, 2], seed=4)
    reference_N2 = np.full((2, 2), -100.0)
    v = validation_gradient(model, groups, reference_N2, beta=BETA).directions["all"]
    assert v
    assert all("lora_" in name for name in v)
    values = through(directional_route(model, {"v": v}), groups)
    inner = model.get_base_model()
    weights = [p for p in inner.parameters() if p.requires_grad]
    naive = [torch.autograd.grad(naive_loss(inner, g, r), weights) for g, r in zip(groups, reference_N2)]
    naive_NP = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in naive])
    assert error(influence(values, reference_N2), naive_NP @ naive_NP.mean(0)) <= 1e-9


def test_tied_weights_are_one_weight():
    model = double("llama", tie_word_embeddings=True)
    groups, reference_N2 = pairs_with_reference(model, 2, seed=1)
    v = validation_gradient(model, groups, reference_N2, beta=BETA).directions["all"]
    assert "lm_head.weight" not in v
    values = through(
        directional_route(model, {"v": {"model.embed_tokens.weight": v["model.embed_tokens.weight"]}}), groups
    )
    logp = naive_logps(model, groups[0].prompt_tokens, groups[0].completion_tokens[0])
    gradient = torch.autograd.grad(logp, model.lm_head.weight)[0]
    assert values[0, 0, 1] == pytest.approx(float((gradient * v["model.embed_tokens.weight"]).sum()), rel=1e-9)


def test_half_precision_does_not_swallow_a_small_tangent():
    """fp16 ends at 6e-8; a tangent is scaled by a power of two, which changes no digit."""
    model = tiny_causal().to(torch.float16)
    groups = random_groups([2, 1])
    generator = torch.Generator().manual_seed(0)
    v = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    small = {name: tensor * 2.0**-30 for name, tensor in v.items()}
    values = [through_list(directional_route(model, {"v": direction}), groups) for direction in (v, small)]
    assert all(a[1] == b[1] * 2.0**30 != 0 for a, b in zip(*values))


def through_list(route, groups):
    with route.context():
        return [numbers for batch in route.rows(groups, 10_000) for numbers in route.forward(batch).tolist()]


def test_forward_mode_keeps_nothing_for_a_backward_pass():
    """The peak of what eight layers allocate is that of two; with autograd it is far more."""

    def peak(num_layers, keeps_graph):
        model = tiny_causal(num_hidden_layers=num_layers, hidden_size=64)
        groups = random_groups([2] * 6, longest=200)
        # The rest of the weights stays as it is, and would ask autograd for a graph.
        v = {name: torch.ones_like(p) for name, p in model.named_parameters() if "k_proj" not in name}
        route = directional_route(model, {"v": v})
        (batch,) = route.rows(groups, 10_000)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            if keeps_graph:
                kept = packed_logps(model, batch)  # noqa: F841
            else:
                with route.context():
                    route.forward(batch)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert events
        return max(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]))

    assert peak(8, False) <= 1.05 * peak(2, False)
    assert peak(8, True) >= 2 * peak(2, True)


# ------------------------------------------------------------------------------- preconditioning, finite differences


def test_a_preconditioned_tangent_is_the_preconditioned_dot_product():
    model = double("llama")
    groups, reference_N2 = pairs_with_reference(model, 6, seed=1)
    naive_NP = naive_gradients(model, groups, reference_N2)
    fisher = fisher_diagonal(model, groups, reference_N2, beta=BETA)
    assert error(flat(fisher, model), naive_NP.square().mean(0)) <= 1e-9
    v = validation_gradient(model, groups, reference_N2, beta=BETA).directions["all"]
    values = through(directional_route(model, {"v": precondition(v, fisher, 1e-3)}), groups)
    preconditioned_P = naive_NP.mean(0) / (naive_NP.square().mean(0).sqrt() + 1e-3)
    assert error(influence(values, reference_N2), naive_NP @ preconditioned_P) <= 1e-9


def test_precondition_by_hand():
    got = precondition({"w": torch.tensor([6.0, 1.0, 0.0])}, {"w": torch.tensor([4.0, 0.0, 9.0])}, damping=1.0)
    assert got["w"].tolist() == [2.0, 1.0, 0.0]
    g = {"w": torch.ones(2)}
    with pytest.raises(UserError, match=r"it lacks w in the shape \[2\]"):
        precondition(g, {"w": torch.ones(3)}, damping=1.0)
    with pytest.raises(UserError, match="w has negative entries"):
        precondition(g, {"w": -torch.ones(2)}, damping=1.0)
    with pytest.raises(UserError, match=r"damping: got 0\.0"):
        precondition(g, {"w": torch.ones(2)}, damping=0.0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_finite_difference_is_near_and_says_how_near(model_type):
    model = tiny(model_type)
    before = copy.deepcopy(model.state_dict())
    groups, reference_N2 = pairs_with_reference(model, 8, seed=1)
    v = validation_gradient(model, groups, reference_N2, beta=BETA).directions
    exact = through(directional_route(model, v), groups)

    def errors(step):
        route, epsilons = finite_difference_route(model, v, step=step)
        values = through(route, groups)
        assert epsilons[0] == pytest.approx(step * norm(dict(model.named_parameters())) / norm(v["all"]), rel=1e-6)
        _, (quotients,) = differences(values.tolist(), epsilons)
        reported = largest_error(quotients, column(exact.tolist(), 1))
        assert reported == pytest.approx(error(np.array(quotients), exact[..., 1]), rel=1e-12)
        return reported

    assert errors(3e-5) < 1e-2
    assert errors(1e-1) > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failing_forward_leaves_the_weights_as_they_were():
    model = tiny_causal()
    before = copy.deepcopy(model.state_dict())
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    (batch,) = directional_route(model, {"v": v}).rows(random_groups([2]), 10_000)
    for route in (directional_route(model, {"v": v}), finite_difference_route(model, {"v": v}, step=1e-3)[0]):
        with (
            mock.patch.object(model.lm_head, "forward", side_effect=IndexError),
            mock.patch.object(directional, "_head_parts", side_effect=IndexError),
            pytest.raises(IndexError),
            route.context(),
        ):
            route.forward(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())


# --------------------------------------------------------------------------------------------- groups → columns

GROUPS = [
    {"prompt": "the cat sat", "completions": ["on the mat.", "on the dog!"]},
    {"prompt": "please write", "completions": ["a short story " * 40, "bread", "why?"]},
]


def test_directional_logps_takes_strings_and_returns_columns(tokenizer):
    model = double("llama")
    generator = torch.Generator().manual_seed(0)
    v = {name: torch.randn(p.shape, generator=generator).double() for name, p in model.named_parameters()}
    options = {"token_budget": 64, "max_length": 60}
    got = directional_logps(model, tokenizer, GROUPS, v, **options)
    base = score_groups(model, tokenizer, GROUPS, **options)
    assert {name: got[name] for name in base if name != "logps"} == {n: c for n, c in base.items() if n != "logps"}
    assert got["dlogps"][1][0] is None
    for row, other in zip(got["logps"], base["logps"]):
        assert [v for v in row if v is not None] == pytest.approx([v for v in other if v is not None], rel=1e-12)
    for g, c in [(0, 0), (0, 1), (1, 1), (1, 2)]:
        start = f"<|im_start|>user\n{GROUPS[g]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(start)["input_ids"]
        full = tokenizer(f"{start}{GROUPS[g]['completions'][c]}<|im_end|>\n")["input_ids"]
        logp = naive_logps(model, prompt, full[len(prompt) :])
        gradient = torch.autograd.grad(logp, list(model.parameters()))
        expected = sum(float((part * v[name]).sum()) for part, (name, _) in zip(gradient, model.named_parameters()))
        assert got["dlogps"][g][c] == pytest.approx(expected, rel=1e-9)

    twice = {name: 2 * tensor for name, tensor in v.items()}
    several = directional_logps(model, tokenizer, GROUPS, {"a": v, "b": twice}, **options)
    assert several["dlogps_a"] == got["dlogps"]
    assert several["dlogps_b"][0] == pytest.approx([2 * value for value in got["dlogps"][0]], rel=1e-12)

    near = finite_difference_logps(model, tokenizer, GROUPS, v, step=1e-7, **options)
    assert near["dlogps"][0] == pytest.approx(got["dlogps"][0], rel=1e-4)
    with mock.patch.object(directional, "packed_logps", wraps=directional.packed_logps) as forward:
        given = finite_difference_logps(model, tokenizer, GROUPS, v, step=1e-7, logps=base["logps"], **options)
        with_logps = forward.call_count
        finite_difference_logps(model, tokenizer, GROUPS, v, step=1e-7, **options)
    assert given["dlogps"][0] == pytest.approx(got["dlogps"][0], rel=1e-4)
    assert forward.call_count == 3 * with_logps
    with pytest.raises(UserError, match="do not belong to these groups"):
        finite_difference_logps(model, tokenizer, GROUPS, v, logps=[[0.0, 0.0], [0.0, 0.0, 0.0]], **options)


@pytest.mark.parametrize(
    ("direction", "kind", "message"),
    [
        ({}, UserError, "got no direction"),
        ({"nothing": torch.ones(1)}, UserError, r"no weights \['nothing'\]"),
        ({"lm_head.weight": torch.ones(2, 2)}, UserError, r"shape \[2, 2\], in the model \[400, 32\]"),
        ({"lm_head.weight": torch.zeros(400, 32)}, UserError, "norm 0"),
        ({"lm_head.weight": torch.full((400, 32), float("nan"))}, NonFiniteError, r"NaN or infinity in \['lm_head"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(tokenizer, direction, kind, message):
    for function in (directional_logps, finite_difference_logps):
        with pytest.raises(kind, match=message):
            function(tiny_causal(), tokenizer, GROUPS, direction)


def test_finite_differences_refuse_half_precision_and_steps_of_nothing():
    v = {"v": {"lm_head.weight": torch.ones(400, 32)}}
    with pytest.raises(UserError, match=r"dtype: got 'torch\.bfloat16'; valid: fp32"):
        finite_difference_route(tiny_causal().to(torch.bfloat16), v, step=1e-3)
    with pytest.raises(UserError, match="step: got 0"):
        finite_difference_route(tiny_causal(), v, step=0)


def test_validation_refuses_no_pairs_and_names_a_loss_that_is_not_finite():
    model = tiny_causal()
    with pytest.raises(UserError, match="at least 1"):
        validation_gradient(model, [], np.zeros((0, 2)), beta=BETA)
    groups, reference_N2 = pairs_with_reference(model, 2, seed=1)
    reference_N2[1, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"among the pairs \[1\]"):
        validation_gradient(model, groups, reference_N2, beta=BETA, token_budget=1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="no weight that requires a gradient"):
        validation_gradient(model, groups, reference_N2, beta=BETA)


# -------------------------------------------------------------------------------------------------------- storage


def test_what_is_saved_is_loaded(tmp_path):
    directions = {
        "t-a/b …": {"w": torch.arange(3.0), "x.y": torch.ones(2, 2, dtype=torch.float64).T},
        "t-c": {"w": torch.tensor([3.0, 4.0])},
    }
    save_tangent(tmp_path / "new", directions, {"beta": 0.3, "pairs": {"a": 4}})
    got = load_tangents(tmp_path / "new")
    assert list(got.directions) == list(directions)
    for name, direction in directions.items():
        assert got.directions[name].keys() == direction.keys()
        assert all(torch.equal(got.directions[name][key], tensor) for key, tensor in direction.items())
        assert all(got.directions[name][key].dtype == tensor.dtype for key, tensor in direction.items())
    assert got.facts == {"beta": 0.3, "pairs": {"a": 4}}
    manifest = json.loads((tmp_path / "new" / "tangent.json").read_text())
    assert [entry["norm"] for entry in manifest["directions"]] == [3.0, 5.0]
    (tmp_path / "new" / manifest["directions"][1]["file"]).write_bytes(b"not safe")
    with pytest.raises(UserError, match="cannot be read"):
        load_tangents(tmp_path / "new")
    with pytest.raises(UserError, match="cannot be read"):
        load_tangents(tmp_path)
    save_tangent(tmp_path / "none", {}, {})
    with pytest.raises(UserError, match="names no direction"):
        load_tangents(tmp_path / "none")


# ----------------------------------------------------------------------------------------------------------- LESS


@pytest.mark.parametrize(
    ("model_type", "dtype", "tolerance"), [("llama", torch.float64, 1e-9), ("gpt_neox", torch.float32, 3e-5)]
)
def test_less_features_equal_those_of_flat_vectors(model_type, dtype, tolerance):
    model = exact_norms(tiny(model_type).to(dtype))
    groups, reference_N2 = pairs_with_reference(model, 5, seed=1)
    labels = ["a", "b", "a", "b", "a"]
    directions = validation_gradient(model, groups, reference_N2, beta=BETA, strata=labels).directions
    exact = copy.deepcopy(model).double()
    naive_NP = naive_gradients(exact, groups, reference_N2)
    generator = torch.Generator().manual_seed(0)
    m_P = torch.randn(naive_NP.shape[1], generator=generator, dtype=torch.float64) * naive_NP.abs().mean()
    v_P = torch.rand(naive_NP.shape[1], generator=generator, dtype=torch.float64) * naive_NP.square().mean()
    m_P, v_P = m_P.float().double(), v_P.float().double()
    moments = {"exp_avg": unflat(m_P.float(), model), "exp_avg_sq": unflat(v_P.float(), model)}
    dots_NS, norms_N = pair_features(model, groups, reference_N2, directions, **moments, beta=BETA)
    features_NP = (0.9 * m_P + 0.1 * naive_NP) / (0.999 * v_P + 0.001 * naive_NP.square() + 1e-8).sqrt()
    strata_SP = torch.stack([naive_NP[0::2].mean(0), naive_NP[1::2].mean(0)])
    expected_NS = features_NP @ (strata_SP / strata_SP.norm(dim=1, keepdim=True)).T
    assert error(dots_NS, expected_NS) <= tolerance
    assert error(norms_N, features_NP.norm(dim=1)) <= tolerance


def test_less_golden_example(golden):
    example = golden["less-feature"]
    inputs, expected = example["inputs"], example["expected"]

    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

    vectors = {name: {"w": torch.tensor(values)} for name, values in inputs.items()}
    features = PairFeatures(
        Weights(),
        {"v": vectors["validation_gradient"]},
        exp_avg=vectors["adam_m"],
        exp_avg_sq=vectors["adam_v"],
        beta=BETA,
    )
    with mock.patch.object(per_pair, "pair_gradient", return_value=(0.7, vectors["gradient"])):
        (dot,), length = features(EncodedGroup([1], [[2], [3]], ["ok", "ok"], 0), np.zeros(2))
    assert length == pytest.approx(np.linalg.norm(expected["feature"]), abs=example["atol"])
    assert dot / length == pytest.approx(expected["cosine"], abs=example["atol"])


def test_less_needs_every_moment():
    model = tiny_causal()
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    some = {name: tensor for name, tensor in ones.items() if name != "lm_head.weight"}
    with pytest.raises(UserError, match=r"exp_avg_sq: it lacks \['lm_head\.weight'\]"):
        PairFeatures(model, {"v": ones}, exp_avg=ones, exp_avg_sq=some, beta=BETA)
