"""The head's own backward pass against autograd through `log_softmax` and `gather`, and what it holds meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import random_groups, tiny_causal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefsel.models import head as head_module
from prefsel.models.head import head_logps
from prefsel.models.logps import packed_logps
from prefsel.models.packing import pack

NUM_TOKENS, NUM_ROWS, WIDTH, VOCAB = 400, 300, 16, 331


class OneHead(nn.Module):
    """What `head_logps` needs of a model."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.config = type("Config", (), {"vocab_size": VOCAB})()

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def inputs(dtype: torch.dtype, *, bias: bool = True) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head, hidden rows, which of them predict (some twice), and targets, the first and last token among them."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=bias)
    with torch.no_grad():
        head.weight.mul_(12.0)  # sharp predictions: some targets have almost all of the probability, most have none
    hidden_TD = torch.randn(NUM_TOKENS, WIDTH)
    rows_R = torch.randint(NUM_TOKENS, (NUM_ROWS,))
    targets_R = torch.randint(VOCAB, (NUM_ROWS,))
    targets_R[:20] = head(hidden_TD[rows_R[:20]]).argmax(dim=1)
    targets_R[20:22] = torch.tensor([0, VOCAB - 1])
    return head.to(dtype), hidden_TD.to(dtype).requires_grad_(), rows_R, targets_R


def naive(head: nn.Linear, hidden_TD: torch.Tensor, rows_R: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    return head(hidden_TD[rows_R]).log_softmax(dim=-1).gather(1, targets_R[:, None])[:, 0]


def gradients(logps_R: torch.Tensor, *sources: Any) -> list[torch.Tensor]:
    weight_R = torch.linspace(-2, 3, len(logps_R), dtype=logps_R.dtype)
    return list(torch.autograd.grad(logps_R, [one for one in sources if one is not None], weight_R))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.dtype == want.dtype or want.dtype == torch.float64
    return float(torch.linalg.norm(got.double() - want.double()) / torch.linalg.norm(want.double()))


@pytest.fixture(params=["kept", "again", "in small slices"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Logits kept, computed again in one slice of the vocabulary, or in slices (and chunks) that do not divide it."""
    if request.param != "kept":
        monkeypatch.setattr(head_module, "KEPT_SHARE", 0.0)
    if request.param == "in small slices":
        monkeypatch.setattr(head_module, "LOGITS_BYTES", 40_000)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_values_and_gradients_are_autograds(way: str, dtype: torch.dtype, limit: float, bias: bool) -> None:
    head, *rest = inputs(dtype, bias=bias)
    sources = (rest[0], head.weight, head.bias)
    expected, got = naive(head, *rest), head_logps(OneHead(head), *rest)
    assert expected.max() > -0.05
    assert expected.min() < -20
    assert relative(got, expected) <= limit
    for mine, theirs in zip(gradients(got, *sources), gradients(expected, *sources), strict=True):
        assert relative(mine, theirs) <= limit


def test_gradcheck(way: str) -> None:
    head, hidden_TD, rows_R, targets_R = inputs(torch.float64)

    def of_weights(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor) -> torch.Tensor:
        return head_module._Logps.apply(hidden_TD[rows_R[:12]], weight_VD, bias_V, targets_R[:12])

    small = hidden_TD.detach()[:, :3].contiguous().requires_grad_(), head.weight.detach()[:, :3].requires_grad_()
    assert torch.autograd.gradcheck(of_weights, (*small, head.bias.detach().requires_grad_()))


def test_bf16_gradients_are_as_near_to_fp64_as_autograds(way: str) -> None:
    head, *rest = inputs(torch.bfloat16)
    sources = (rest[0], head.weight, head.bias)
    logps_R = head_logps(OneHead(head), *rest)
    assert logps_R.dtype == torch.float32
    theirs = head_module.target_logps(head(rest[0][rest[1]]), rest[2])
    exact_head, exact_rest = nn.Linear(WIDTH, VOCAB).double(), [rest[0].detach().double().requires_grad_(), *rest[1:]]
    exact_head.load_state_dict({name: value.double() for name, value in head.state_dict().items()})
    exact = gradients(naive(exact_head, *exact_rest), exact_rest[0], exact_head.weight, exact_head.bias)
    for mine, autograds, want in zip(gradients(logps_R, *sources), gradients(theirs, *sources), exact, strict=True):
        assert relative(mine, want) <= 1.1 * relative(autograds, want)


def test_a_frozen_head_gets_no_gradient_and_backward_may_be_repeated(way: str) -> None:
    head, *rest = inputs(torch.float64)
    expected = gradients(naive(head, *rest), rest[0])[0]
    head.requires_grad_(False)
    logps_R = head_logps(OneHead(head), *rest)
    for _ in range(2):
        rest[0].grad = None
        logps_R.backward(torch.linspace(-2, 3, NUM_ROWS, dtype=torch.float64), retain_graph=True)
        assert relative(rest[0].grad, expected) <= 1e-13
    assert head.weight.grad is None


def test_a_second_derivative_is_refused() -> None:
    head, *rest = inputs(torch.float64)
    (first,) = torch.autograd.grad(head_logps(OneHead(head), *rest).square().sum(), rest[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_logits_stay_within_the_limit_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 150_000  # bytes, of 400 KB of logits
    monkeypatch.setattr(head_module, "LOGITS_BYTES", limit)
    monkeypatch.setattr(head_module, "CACHED_LOGITS_BYTES", limit)
    monkeypatch.setattr(head_module, "CACHED_ROWS", 1)
    monkeypatch.setattr(head_module, "MIN_COLUMNS", 1)
    head, *rest = inputs(torch.float32)
    with Largest() as largest:
        logps_R = head_logps(OneHead(head), *rest)
        logps_R.sum().backward()
    assert largest.elements <= max(NUM_ROWS * WIDTH, VOCAB * WIDTH, limit // 8)
    with Largest() as largest:
        naive(head, *rest).sum().backward()
    assert largest.elements == NUM_ROWS * VOCAB


def test_any_other_head_is_called_once_for_all_rows() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(hidden)

    head, *rest = inputs(torch.float32)
    other = Scaled(WIDTH, VOCAB)
    other.load_state_dict(head.state_dict())
    calls: list[int] = []
    doubled = head_logps(OneHead(other), *rest)
    torch.testing.assert_close(doubled, naive(other, *rest))
    head.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    assert relative(head_logps(OneHead(head), *rest), naive(head, *rest)) <= 1e-6
    assert calls == [NUM_ROWS, NUM_ROWS]


def test_tied_embeddings_get_both_gradients() -> None:
    model = tiny_causal(tie_word_embeddings=True).double()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    (row,) = pack(random_groups([2, 3]), 10_000)
    packed_logps(model, row).sum().backward()
    mine = model.lm_head.weight.grad
    model.zero_grad()
    hook = model.lm_head.register_forward_hook(lambda module, arguments, output: None)  # autograd's way
    packed_logps(model, row).sum().backward()
    hook.remove()
    assert relative(mine, model.lm_head.weight.grad) <= 1e-12
