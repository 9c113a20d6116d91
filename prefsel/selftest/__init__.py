"""`prefsel selftest`: whether a model's numbers are the same however its rows are made, on the user's own data.

    first groups ─ template ─▶ tokens ─┬─▶ one sequence at a time, transformers' own attention: the reference
                                       ├─▶ the engine: all groups together, reversed, 1, 2 and 8 groups a row
                                       └─▶ padded: 1, 2 and 8 sequences of unequal length
    a difference above the tolerance ─ experiments ─▶ its cause

All in this process: no Ray, no workspace, nothing written. A cause is named only when an experiment shows it: what is
suspected is taken away, and the numbers agree.

subject    the first groups of the data, a loaded model, and what is said about it
findings   what is seen without a forward: template, limits, tokens
ways       the ways of making rows, and the reference
diagnosis  tolerances, comparisons, and the experiments that name a cause
check      every check of one model, for every scorer that names one
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefsel.selftest.check import selftest
    from prefsel.selftest.subject import lines, require_agreement

__all__ = ["lines", "require_agreement", "selftest"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds that `import prefsel.selftest` alone does not need.
    if name == "selftest":
        from prefsel.selftest.check import selftest

        return selftest
    if name in ("lines", "require_agreement"):
        from prefsel.selftest.subject import lines, require_agreement

        return {"lines": lines, "require_agreement": require_agreement}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
