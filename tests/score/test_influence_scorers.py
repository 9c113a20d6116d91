from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from test_scorers import TEXTS, assert_close, naive_columns, table
from tiny_models import bpe_tokenizer, naive_logps, tiny_causal

from prefsel.errors import IntegrityError, PrefselError, UserError
from prefsel.models.architecture import model_shape
from prefsel.models.chat import Encoder
from prefsel.models.packing import flops_min
from prefsel.models.tangent import save_tangent
from prefsel.schema import PAIRS
from prefsel.score import influence
from prefsel.score.influence import DirectionalScorer, PairGradientScorer

BETA = 0.2


def random_direction(model, seed, *, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) * scale for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a tangent of two directions, and an optimizer's state."""
    path = tmp_path_factory.mktemp("policy")
    model = tiny_causal()
    model.save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    directions = {"t-wit": random_direction(model, 1), "t-honesty": random_direction(model, 2)}
    save_tangent(path / "tangent", directions, {"beta": BETA})
    (path / "optimizer").mkdir()
    save_file(random_direction(model, 3), path / "optimizer" / "exp_avg.safetensors")
    squares = {name: tensor.square() for name, tensor in random_direction(model, 4).items()}
    save_file(squares, path / "optimizer" / "exp_avg_sq.safetensors")
    return path


def directional(folder, **options):
    options = {"tangent_dir": folder / "tangent", "dtype": "fp32", "device": "cpu"} | options
    return DirectionalScorer(path=str(folder), **options)


def pair_gradients(folder, **options):
    options = {"tangent_dir": folder / "tangent", "optimizer_dir": folder / "optimizer", "device": "cpu"} | options
    return PairGradientScorer(path=str(folder), dtype="fp32", **options)


def errors_of(shard):
    """What was measured of finite differences."""
    return {name: fact for name, fact in shard.facts.items() if name.startswith("fd_error_")}


def naive_derivatives(folder, seed):
    """Gradient of every completion's log-prob in fp64, times the direction of a seed."""
    groups, _ = naive_columns(folder)
    model = tiny_causal().double()
    direction = random_direction(model, seed)
    return [
        [
            sum(
                float((gradient * direction[name]).sum())
                for gradient, (name, _) in zip(
                    torch.autograd.grad(naive_logps(model, group.prompt_tokens, ids), list(model.parameters())),
                    model.named_parameters(),
                )
            )
            for ids in group.completion_tokens
        ]
        for group in groups
    ]


def assert_near(got, expected, relative):
    """Within a share of the largest: derivatives may cancel."""
    numbers = np.array([v for row in expected for v in row])
    assert [len(row) for row in got] == [len(row) for row in expected]
    assert np.abs(np.array([v for row in got for v in row]) - numbers).max() <= relative * np.abs(numbers).max()


@pytest.mark.parametrize("token_budget", [20, 70, None])
def test_a_column_per_direction_equals_the_dot_product_with_the_gradient(folder, token_budget):
    shard = directional(folder, token_budget=token_budget).score(table())
    assert list(shard.columns) == ["dlogps_t-wit", "dlogps_t-honesty"]
    assert_near(shard.columns["dlogps_t-wit"], naive_derivatives(folder, 1), 1e-5)
    assert_near(shard.columns["dlogps_t-honesty"], naive_derivatives(folder, 2), 1e-5)
    assert (shard.dropped, shard.poisoned, errors_of(shard)) == ({}, [], {})


def test_flops_are_three_forwards_a_direction(folder):
    exact = directional(folder, token_budget=100)
    counters = exact.score(table()).counters
    plain = influence.Engine(tiny_causal(), exact.engine.encoder, influence.logps_route(tiny_causal()), 100)
    expected = plain.run(table()).counters
    assert counters["flops_model"] == 6 * expected["flops_model"]
    for name in ("flops_min", "trunk_tokens", "head_rows", "rows", "completions"):
        assert counters[name] == expected[name]
    near = directional(folder, token_budget=100, method="finite_difference")
    check = exact.score(table().slice(0, influence.CHECKED_GROUPS)).counters["flops_model"]
    assert near.score(table()).counters["flops_model"] == 3 * expected["flops_model"] + check


def test_finite_differences_report_their_error(folder, monkeypatch):
    monkeypatch.setattr(influence, "CHECKED_GROUPS", 2)
    shard = directional(folder, method="finite_difference").score(table())
    assert list(errors_of(shard)) == ["fd_error_t-wit", "fd_error_t-honesty"]
    for seed, name in ((1, "t-wit"), (2, "t-honesty")):
        expected = naive_derivatives(folder, seed)
        got = shard.columns[f"dlogps_{name}"]
        assert_near(got, expected, 2e-2)
        first = [np.array([v for row in rows[:2] for v in row]) for rows in (got, expected)]
        error = np.abs(first[0] - first[1]).max() / np.abs(first[1]).max()
        assert shard.facts[f"fd_error_{name}"] == pytest.approx(error, rel=0.01)
    coarse = directional(folder, method="finite_difference", step=0.1).score(table())
    assert min(errors_of(coarse).values()) > 10 * max(errors_of(shard).values())
    assert errors_of(directional(folder, method="finite_difference").score(table([]))) == {}


def test_too_long_completions_and_fine_shards(folder):
    shard = directional(folder, max_length=30).score(table([("the cat", ["the dog " * 40, "sat"])]))
    assert shard.dropped == {"too_long": 1}
    assert shard.columns["dlogps_t-wit"][0][0] is None
    near = directional(folder, max_length=30, method="finite_difference")
    found = near.score(table([("the cat", ["the dog " * 40, "sat"])])).columns["dlogps_t-wit"]
    assert found[0][0] is None
    assert found[0][1] == pytest.approx(shard.columns["dlogps_t-wit"][0][1], rel=0.1)


def test_memory_that_runs_out_halves_the_budget(folder):
    scorer = directional(folder, token_budget=1000)
    forward = scorer.engine.route.forward

    def small(batch):
        if batch.trunk_tokens > 80:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch)

    scorer.engine.route = replace(scorer.engine.route, forward=small)
    shard = scorer.score(table())
    assert_near(shard.columns["dlogps_t-wit"], naive_derivatives(folder, 1), 1e-5)
    assert shard.counters["oom_halvings"] >= 1


def test_a_group_without_finite_derivatives_is_isolated(folder):
    scorer = directional(folder)
    forward, story = scorer.engine.route.forward, bpe_tokenizer()(" story")["input_ids"][-1]

    def broken(batch):
        output = forward(batch)
        return output * math.nan if (batch.input_ids_T == story).any() else output

    expected = scorer.score(table()).columns
    scorer.engine.route = replace(scorer.engine.route, forward=broken)
    shard = scorer.score(table())
    assert shard.dropped == {"poisoned": 3}
    for name, rows in expected.items():
        assert_close(shard.columns[name], [rows[0], [None] * 3, *rows[2:]])


def test_a_padded_model_says_why(folder, tmp_path):
    model = tiny_causal("mistral", sliding_window=16)
    model.save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    save_tangent(tmp_path / "tangent", {"t": random_direction(model, 1)}, {})
    exact, near = (directional(tmp_path, method=m).score(table()) for m in ("exact", "finite_difference"))
    assert "sliding-window" in exact.padded_because
    assert_near(near.columns["dlogps_t"], exact.columns["dlogps_t"], 2e-2)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"method: got 'central'; valid: exact, finite_difference"):
        directional(folder, method="central")
    with pytest.raises(UserError, match="fp32 for finite differences"):
        directional(folder, method="finite_difference", dtype="bf16")
    with pytest.raises(UserError, match=r"tangent .* cannot be read"):
        directional(folder, tangent_dir=tmp_path)
    with pytest.raises(UserError, match=r"exp_avg\.safetensors cannot be read"):
        pair_gradients(folder, optimizer_dir=tmp_path)
    save_tangent(tmp_path, {"t": random_direction(tiny_causal(), 1)}, {"num_pairs": 3})
    with pytest.raises(UserError, match=r"name no beta, got \['num_pairs'\]"):
        pair_gradients(folder, tangent_dir=tmp_path)


# ------------------------------------------------------------------------------------------------- pair gradients

PAIRS_OF = [(0, 0, 1), (1, 2, 0), (1, 0, 1), (3, 1, 0)]
"""(group, chosen, rejected)."""


def pair_table(groups, listed=PAIRS_OF):
    ids = groups["prompt_id"].to_pylist()
    rows = [
        {"pair_id": bytes([number] * 16), "prompt_id": ids[g], "chosen": chosen, "rejected": rejected}
        for number, (g, chosen, rejected) in enumerate(listed)
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS)


def reference_of(count=4):
    return -30 + 5 * np.random.default_rng(0).normal(size=(count, 2))


def group_of(encoder, g, chosen, rejected):
    prompt, responses = TEXTS[g]
    messages = [[{"role": "assistant", "content": responses[side]}] for side in (chosen, rejected)]
    return encoder.encode_group([{"role": "user", "content": prompt}], messages)


def naive_features(listed=PAIRS_OF, encoder=None):
    """Dots [N, 2] and norms [N] from flat fp64 vectors, one pair at a time, unpacked."""
    model, encoder = tiny_causal().double(), encoder or Encoder(bpe_tokenizer())
    names = [name for name, _ in model.named_parameters()]

    def flat(tensors):
        return torch.cat([tensors[name].double().flatten() for name in names])

    m_P, v_P = flat(random_direction(model, 3)), flat(random_direction(model, 4)).square()
    units = [flat(random_direction(model, seed)) for seed in (1, 2)]
    units = [unit / unit.norm() for unit in units]
    dots, norms = [], []
    for one, reference_2 in zip(listed, reference_of(len(listed))):
        group = group_of(encoder, *one)
        starts = group.prompt_starts or (0, 0)
        prompts = [group.prompt_tokens[start:] for start in starts]
        logps = [naive_logps(model, prompt, ids) for prompt, ids in zip(prompts, group.completion_tokens)]
        margin = BETA * (logps[0] - reference_2[0] - logps[1] + reference_2[1])
        gradient = torch.autograd.grad(-torch.nn.functional.logsigmoid(margin), list(model.parameters()))
        g_P = torch.cat([part.flatten() for part in gradient])
        feature_P = (0.9 * m_P + 0.1 * g_P) / (0.999 * v_P + 0.001 * g_P**2 + 1e-8).sqrt()
        dots.append([float(feature_P @ unit) for unit in units])
        norms.append(float(feature_P.norm()))
    return np.array(dots), np.array(norms)


def test_pair_features_equal_those_of_flat_vectors(folder):
    groups = table()
    shard = pair_gradients(folder).score_pairs(groups, pair_table(groups), reference_of(), np.ones(4, dtype=bool))
    names = ["gamma_dot_t-wit", "gamma_norm_t-wit", "gamma_dot_t-honesty", "gamma_norm_t-honesty"]
    assert list(shard.columns) == names
    dots_N2, norms_N = naive_features()
    for direction, name in enumerate(["t-wit", "t-honesty"]):
        assert shard.columns[f"gamma_dot_{name}"] == pytest.approx(dots_N2[:, direction].tolist(), rel=1e-4)
        assert shard.columns[f"gamma_norm_{name}"] == pytest.approx(norms_N.tolist(), rel=1e-5)
    assert (shard.dropped, shard.poisoned, shard.padded_because) == ({}, [], "")
    assert shard.counters["pairs"] == 4
    encoder = Encoder(bpe_tokenizer())
    groups_of = [group_of(encoder, *one) for one in PAIRS_OF]
    assert shard.counters["flops_min"] == pytest.approx(3 * flops_min(groups_of, model_shape(tiny_causal())), rel=1e-12)
    assert 1 <= shard.counters["flops_model"] / shard.counters["flops_min"] < 1.1


def test_prompts_cut_on_the_left_are_cut_for_each_side_by_itself(folder):
    groups = table()
    encoder = Encoder(bpe_tokenizer(), max_length=28, truncation="left")
    listed = [one for one in PAIRS_OF if len(set(group_of(encoder, *one).prompt_starts)) == 2]
    assert listed
    scorer = pair_gradients(folder, max_length=28, truncation="left")
    wanted = np.ones(len(listed), dtype=bool)
    shard = scorer.score_pairs(groups, pair_table(groups, listed), reference_of(len(listed)), wanted)
    dots_N2, norms_N = naive_features(listed, encoder)
    assert shard.columns["gamma_dot_t-wit"] == pytest.approx(dots_N2[:, 0].tolist(), rel=1e-4)
    assert shard.columns["gamma_norm_t-wit"] == pytest.approx(norms_N.tolist(), rel=1e-6)


def test_pairs_left_out_are_counted_by_reason(folder):
    groups = table([*TEXTS, ("the cat", ["the dog " * 40, "sat"])])
    pairs = pair_table(groups, [*PAIRS_OF, (4, 1, 0)])
    reference = reference_of(5)
    expected = pair_gradients(folder).score_pairs(groups, pairs, reference, np.ones(5, dtype=bool)).columns
    reference[1, 1] = np.nan
    scorer = pair_gradients(folder, max_length=60)
    shard = scorer.score_pairs(groups, pairs, reference, np.array([False, True, True, True, True]))
    assert shard.dropped == {"ineligible": 1, "missing_reference": 1, "too_long": 1}
    for name, values in shard.columns.items():
        assert [value is None for value in values] == [True, True, False, False, True]
        assert values[2:4] == expected[name][2:4]


def test_a_pair_without_finite_gradient_is_poisoned_and_one_that_recovers_is_not(folder):
    groups = table()
    expected = pair_gradients(folder).score_pairs(groups, pair_table(groups), reference_of(), np.ones(4, dtype=bool))
    scorer, calls = pair_gradients(folder), []
    features = scorer.features

    def broken(group, reference_2):
        calls.append(float(reference_2[0]))
        dots, length = features(group, reference_2)
        number = [float(row[0]) for row in reference_of()].index(calls[-1])
        if number == 0 and calls.count(calls[-1]) == 1:
            raise IndexError("once")
        return (dots * math.nan, length) if number == 2 else (dots, length)

    scorer.features = broken
    shard = scorer.score_pairs(groups, pair_table(groups), reference_of(), np.ones(4, dtype=bool))
    assert shard.dropped == {"poisoned": 1}
    assert shard.poisoned == [bytes([2] * 16).hex()]
    assert len(calls) == 6
    for name, values in shard.columns.items():
        assert values == [None if number == 2 else v for number, v in enumerate(expected.columns[name])]


def test_faults_of_all_pairs_and_of_memory_are_raised(folder):
    groups, scorer = table(), pair_gradients(folder)

    def failing(error):
        def features(group, reference_2):
            raise error

        scorer.features = features
        return scorer.score_pairs(groups, pair_table(groups), reference_of(), np.ones(4, dtype=bool))

    with pytest.raises(IndexError):
        failing(IndexError("always"))
    with pytest.raises(PrefselError, match=r"out of memory for the gradient of a single pair of \d+ tokens"):
        failing(torch.OutOfMemoryError("out of memory"))
    other = pair_table(table([("another prompt", ["a", "b"])]), [(0, 0, 1)])
    with pytest.raises(IntegrityError, match="not among the groups"):
        scorer.score_pairs(groups, other, reference_of(1), np.ones(1, dtype=bool))


def test_windows_of_prompts_do_not_matter(folder, monkeypatch):
    groups = table()
    wanted = np.ones(4, dtype=bool)
    expected = pair_gradients(folder).score_pairs(groups, pair_table(groups), reference_of(), wanted)
    monkeypatch.setattr(influence, "WINDOW_GROUPS", 1)
    got = pair_gradients(folder).score_pairs(groups, pair_table(groups), reference_of(), wanted)
    assert got.columns == expected.columns


def test_a_pair_of_the_same_tokens_has_no_gradient_to_take(folder):
    groups = table([("who sat?", ["a dog", "a dog", "the cat"])])
    identity = groups["prompt_id"][0].as_py()
    rows = [
        {"pair_id": bytes([n]) * 16, "prompt_id": identity, "chosen": 0, "rejected": rejected}
        for n, rejected in enumerate((1, 2))
    ]
    pairs = pa.Table.from_pylist(rows, PAIRS)
    shard = pair_gradients(folder).score_pairs(groups, pairs, np.full((2, 2), -3.0), np.ones(2, bool))
    assert shard.dropped == {"same_tokens": 1}
    assert [value is None for value in shard.columns["gamma_norm_t-wit"]] == [True, False]
