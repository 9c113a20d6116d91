"""What scoring and training both need of a model.

chat → tokens    tree → packed rows    attention, logps, reward → numbers    padded: the path of every other model
loading: models, tokenizers, identities
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefsel.models.logps import score_groups

__all__ = ["score_groups"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds that `import prefsel.models` alone does not need.
    if name == "score_groups":
        from prefsel.models.logps import score_groups

        return score_groups
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
