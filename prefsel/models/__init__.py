"""What scoring and training both need of a model.

    writer → text    chat → tokens    packing → rows    attention, logps, reward → numbers
    padded: the path of every other model
    tangent → directions of weights    directional → derivatives of log-probs along them
    directory: files and identities    declared: configurations    loading: models and tokenizers

Public are `score_groups` and `directional_logps`; they are imported when they are asked for, because torch takes
seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefsel.models.directional import directional_logps
    from prefsel.models.logps import score_groups

__all__ = ["directional_logps", "score_groups"]


def __getattr__(name: str) -> Any:
    if name == "score_groups":
        from prefsel.models.logps import score_groups

        return score_groups
    if name == "directional_logps":
        from prefsel.models.directional import directional_logps

        return directional_logps
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
