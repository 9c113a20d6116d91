"""How fast this machine is at what a run computes: as a former run of the workspace was, or as a few forwards are now.

runs/*.json ─ FLOPs ÷ seconds of each stage ─┐
--calibrate ─ forwards of each model ────────┴─▶ node ─▶ FLOPs a second
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prefsel.errors import UserError
from prefsel.models.loading import default_device, load_causal, load_reward
from prefsel.models.logps import logps_route
from prefsel.models.packing import flops_min
from prefsel.models.reward import reward_route
from prefsel.plan.models import starting_model
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plan.sizes import ROW_TOKENS
from prefsel.plan.work import Works, made_folder

SECONDS = 3.0
"""Of forwards of each model that is calibrated."""


def calibrated_rates(plan: Plan, works: Works) -> dict[str, float]:
    """FLOPs a second of each scorer's model on the sample's groups, here and now; "" is their mean, for trainings."""
    found = {}
    for node in (
        plan.node("columns", one.label) for one in plan.scorers if one.kind in ("causal_logps", "reward_model")
    ):
        try:
            found[str(node)] = _rate(plan, works, node)
        except UserError:  # the table says why nothing is known of it
            continue
    if found:
        found[""] = sum(found.values()) / len(found)
    return found


def _rate(plan: Plan, works: Works, node: Node) -> float:
    scorer = node.spec
    name = scorer.models(plan.config)[-1]
    is_reward = scorer.kind == "reward_model"
    spec = starting_model(plan, name)
    path = (made_folder(plan, name, weights=True) if spec.is_made_here else spec.path) or ""
    if not path:
        raise UserError(f"models.{name}: not made yet")
    model = works.model(name, "reward" if is_reward else "policy")
    encoded = works.encoded(model)
    more = {} if spec.is_made_here else {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    load = load_reward if is_reward else load_causal
    loaded = load(path, dtype=model.settings["dtype"], device=default_device(None), **more)
    route = reward_route(loaded) if is_reward else logps_route(loaded, model.tokenizer.pad_token_id)
    flops, seconds = 0.0, 0.0
    for groups in _slices(encoded):
        started = time.perf_counter()
        with route.context():
            for row in route.rows(groups, scorer.token_budget or ROW_TOKENS):
                route.forward(row.to(loaded.device)).tolist()
        if flops or seconds:  # the first slice warms up
            flops += flops_min(groups, model.size.shape)
        seconds += time.perf_counter() - started if flops else 1e-9
        if seconds > SECONDS:
            break
    if not flops:
        raise UserError(f"{node}: too few groups to calibrate on")
    return flops / seconds


def _slices(groups: list[Any], size: int = 32) -> Iterator[list[Any]]:
    return (groups[at : at + size] for at in range(0, len(groups), size))
