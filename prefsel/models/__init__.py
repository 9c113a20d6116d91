"""What scoring and training both need of a model.

chat → tokens    tree → packed rows    attention, logps, reward → numbers    padded: the path of every other model
tangent → directions of weights, and derivatives of log-probs along them
loading: models, tokenizers, identities
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefsel.models.directional import directional_logps
    from prefsel.models.logps import score_groups

__all__ = ["directional_logps", "score_groups"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds that `import prefsel.models` alone does not need.
    if name == "score_groups":
        from prefsel.models.logps import score_groups

        return score_groups
    if name == "directional_logps":
        from prefsel.models.directional import directional_logps

        return directional_logps
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
