"""Whether a model may take the place of the one that is served: by the held-out pairs that both were evaluated on."""

from __future__ import annotations

from prefsel.errors import GateError
from prefsel.evaluate.intervals import Values, paired_difference
from prefsel.publishing.publish import read_lineage
from prefsel.publishing.versions import read_pointer
from prefsel.report.trained import accuracies
from prefsel.train.heldout import read_margins
from prefsel.workspace.storage import Storage

MAX_DROP = 1.0
"""Points of held-out accuracy that a new model may lose."""


def require_no_worse(storage: Storage, name: str, model: str, artifact: str, max_drop: float) -> str:
    """Refuse a model that orders fewer held-out pairs as they are labelled than the published one.

    Compared are the pairs that both were evaluated on, pair by pair; a corpus that has grown adds others.

    Args:
        storage: The workspace.
        name: What is published.
        model: The new model's name.
        artifact: Where it lies.
        max_drop: Points of accuracy that it may lose.

    Returns:
        A line about what was compared.

    Raises:
        GateError: it lost more, or one of them was not evaluated pair by pair.
    """
    pointer = read_pointer(storage, name)
    served = None if pointer is None else read_lineage(storage, name, pointer[0].version)["model"]
    if pointer is None or served is None:
        return f"gate      {model}: no model is published as {name!r}, so it is compared with none"
    version = pointer[0].version
    if served["path"] == artifact:
        return f"gate      {model}: it is the published one"
    sides = [_accuracy(storage, path) for path in (artifact, served["path"])]
    for side, path in zip(sides, (artifact, served["path"])):
        if side is None:
            raise GateError(
                f"refresh: {path} has no held-out numbers, so {model} is not published and {name} {version} stays "
                "current; set split.holdout, or publish it by hand with `prefsel publish`"
            )
    new, old = (side for side in sides if side is not None)
    change = paired_difference(new, old)
    if change is None:
        raise GateError(
            f"refresh: no held-out pair is common to {artifact} and {served['path']}; {model} is not published and "
            f"{name} {version} stays current"
        )
    told = (
        f"{change.mean:+.2f} points of held-out accuracy against {name} {version} ({change.low:+.2f} to "
        f"{change.high:+.2f}, {change.num_items:,} pairs)"
    )
    if change.mean < -max_drop:
        raise GateError(
            f"refresh: {model}: {told}; more than {max_drop:g} lost, so it is not published and {version} stays current"
        )
    return f"gate      {model}: {told}"


def _accuracy(storage: Storage, artifact: str) -> Values | None:
    margins = read_margins(storage, artifact)
    return None if margins is None else accuracies(margins, "after")
