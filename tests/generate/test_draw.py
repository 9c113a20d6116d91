"""Random numbers of one's own, and the token they draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefsel.errors import UserError
from prefsel.generate.draw import LIKELIEST, Sampling, pick, random_numbers

LOGITS_1V = torch.tensor([[0.2, 0.5, 0.3]]).log()


@pytest.mark.parametrize(
    ("uniform", "top_p", "expected"),
    [
        # From the likeliest down: token 1 up to 0.5, token 2 up to 0.8, token 0 up to 1.
        (0.0, 1.0, 1),
        (0.49, 1.0, 1),
        (0.51, 1.0, 2),
        (0.79, 1.0, 2),
        (0.81, 1.0, 0),
        (0.999999, 1.0, 0),
        # 0.6 needs tokens 1 and 2, together 0.8: token 1 up to 0.5 / 0.8 = 0.625.
        (0.62, 0.6, 1),
        (0.63, 0.6, 2),
        (0.999999, 0.6, 2),
        # 0.4 is reached by token 1 alone.
        (0.999999, 0.4, 1),
    ],
)
def test_pick_inverts_the_distribution(uniform, top_p, expected):
    assert pick(LOGITS_1V, torch.tensor([uniform], dtype=torch.float64), 1.0, top_p).tolist() == [expected]


def test_pick_draws_the_softmax_at_a_temperature():
    logits_V = torch.tensor([0.3, -1.0, 2.0, 0.0])
    uniform_N = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn_N = pick(logits_V.expand(20_000, 4), uniform_N, 0.7, 1.0)
    expected_V = (logits_V / 0.7).softmax(dim=0)
    np.testing.assert_allclose(drawn_N.bincount(minlength=4) / 20_000, expected_V, atol=1e-4)
    assert pick(logits_V[None], torch.tensor([0.99], dtype=torch.float64), 0.0, 1.0).tolist() == [2]


def naive_pick(logits_V, uniform, temperature, top_p):
    """In numpy, all tokens in order."""
    order = np.lexsort((np.arange(len(logits_V)), -logits_V))
    weights = np.exp((logits_V[order].astype(np.float64) - logits_V.max()) / temperature)
    cumulative = np.cumsum(weights / weights.sum())
    last = min(int(np.searchsorted(cumulative, top_p)), len(order) - 1)
    return order[min(int(np.searchsorted(cumulative, uniform * cumulative[last], side="right")), last)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter has ties
@pytest.mark.parametrize("scale", [0.1, 3.0, 8.0])  # nearly even: the likeliest do not suffice; peaked: they do
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.95), (0.3, 0.5), (2.0, 0.999)])
def test_ordering_only_the_likeliest_changes_nothing(dtype, scale, temperature, top_p):
    generator = torch.Generator().manual_seed(0)
    logits_BV = (torch.randn(200, 8 * LIKELIEST, generator=generator) * scale).to(dtype)
    uniform_B = torch.rand(200, generator=generator, dtype=torch.float64)
    want = [
        naive_pick(logits_V, uniform, temperature, top_p)
        for logits_V, uniform in zip(logits_BV.float().numpy(), uniform_B.numpy())
    ]
    assert pick(logits_BV, uniform_B, temperature, top_p).tolist() == want


def test_ties_across_the_likeliest_are_ordered_too():
    # 300 equal tokens: which 128 of them topk takes is left to chance.
    logits_BV = torch.zeros(50, 1024)
    logits_BV[:, 300:] = -50.0
    uniform_B = (torch.arange(50, dtype=torch.float64) + 0.37) / 50
    assert pick(logits_BV, uniform_B, 1.0, 1.0).tolist() == [int(300 * u) for u in uniform_B.tolist()]


def test_barred_tokens_are_never_drawn():
    logits_BV = torch.full((100, 600), float("-inf"))
    logits_BV[:, 599], logits_BV[:, 3] = 1.0, 0.0
    uniform_B = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    drawn = pick(logits_BV, uniform_B, 1.0, 1.0).tolist()
    assert (drawn.count(599), drawn.count(3)) == (73, 27)  # e / (1 + e) = 0.731


@pytest.mark.parametrize("key", [0, 5, 2**62 + 1, 2**63 - 1, 2**63, 2**63 + 1025, 0xFEDCBA9876543210])
def test_the_first_sample_has_the_numbers_it_always_had(key):
    want = np.random.Generator(np.random.Philox(key=[7, key])).random(9)
    np.testing.assert_array_equal(random_numbers(7, key, 0).random(9), want)
    np.testing.assert_array_equal(random_numbers(7, key, 0).random(4), want[:4])


def test_numbers_do_not_change_with_a_version_of_numpy():
    assert random_numbers(7, 5, 0).random(2).tolist() == [0.0487398305493153, 0.8109222632854719]
    assert random_numbers(7, 2**63 + 5, 3).random(2).tolist() == [0.6338217403339119, 0.3104314517006258]


def test_samples_prompts_and_seeds_share_no_number():
    many = [random_numbers(seed, key, sample).random(1000) for seed in (0, 1) for key in (0, 1) for sample in range(4)]
    assert len(np.unique(np.concatenate(many))) == 16_000


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"seed": -1}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)
