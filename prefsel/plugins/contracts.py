"""What a metric, a loss and a format from another package must be able to do, and the check that refuses others.

The records of this package (`prefsel.metrics.Metric`, `prefsel.config.losses.Loss`) satisfy these contracts, with
defaults for the parts that are rarely needed; so does any object with the same parts.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from prefsel.errors import UserError

LOSS_COLUMNS = {"preference_divergence": "divergence", "aspect_weight": "aspect_weights"}
"""Numbers of a pair that a loss may take, and the option of a training that each of them comes from."""


class MetricContract(Protocol):
    """What a metric is: `prefsel.metrics.Metric` has every part, with defaults for those that are rarely needed."""

    @property
    def name(self) -> str:
        """What a configuration calls it; that of its entry point."""

    @property
    def params(self) -> type[BaseModel]:
        """Its parameters, a subclass of `prefsel.config.Options`: what a configuration gives is checked against it."""

    @property
    def paper(self) -> str:
        """Where it comes from, for people."""

    def columns(self, params: Any) -> Sequence[str]:
        """The flat columns that it reads."""

    def score(self, columns: Mapping[str, Any], params: Any, fitted: Mapping[str, Mapping[str, float]]) -> Any:
        """The score of every pair, float64 [N], from the columns (float64 [N] each) and what `rounds` found."""

    def rounds(self, params: Any) -> Sequence[Callable[..., Any]]:
        """What it must know about the whole corpus: one function per round of statistics."""

    def labels(self, params: Any) -> Mapping[str, Sequence[str]]:
        """The values that a text column may have."""

    def unused(self, columns: Mapping[str, Any], params: Any) -> Mapping[str, Any]:
        """Rows, bool [N], where a column may be null."""

    def warnings(self, params: Any, fitted: Any) -> Sequence[str]:
        """What a person should know about the fitted numbers."""

    def resolve(self, params: Any, available: Iterable[str]) -> Any:
        """The parameters with what only a table's column names can tell."""


class LossContract(Protocol):
    """What a preference loss is: `prefsel.config.losses.Loss` has every part."""

    @property
    def function(self) -> str | Callable[..., Any]:
        """One loss per pair, [N], from log-probs of chosen and rejected, [N] each, and the parameters below; or where
        it lies, as `package.module:function`."""

    @property
    def uses_reference(self) -> bool:
        """Whether the reference's two log-probs follow the policy's."""

    @property
    def uses_lengths(self) -> bool:
        """Whether it takes `num_tokens_chosen` and `num_tokens_rejected`."""

    @property
    def columns(self) -> Sequence[str]:
        """Numbers of every pair that it takes by name: `preference_divergence`, `aspect_weight`."""

    @property
    def options(self) -> Mapping[str, str]:
        """Its other parameters, and the option of a training that each of them is."""

    @property
    def params(self) -> Mapping[str, float | str]:
        """Further parameters with their defaults, which a training sets in `loss_params`."""

    def parameters(self, options: Any) -> Mapping[str, Any]:
        """What the options of a training say about its parameters."""

    def compares_means(self, options: Any) -> bool:
        """Whether it compares log-probs per token."""


class FormatContract(Protocol):
    """What a format is: a pure function of one row."""

    def __call__(self, row: Mapping[str, Any], options: Any) -> Any:
        """The `prefsel.ingest.formats.Example` of a row; raises `RowError` for a row that the format does not allow."""


class ScorerContract(Protocol):
    """What a kind of scorer is: `ScorerKind` has both parts."""

    @property
    def record(self) -> type[BaseModel]:
        """Its entry under `scorers`, a subclass of `prefsel.config.PooledScorer` whose `kind` is a `Literal` of its
        name: it says its label, the columns it makes and the models it runs."""

    def load(self, job: Any, storage: Any) -> Any:
        """What an actor calls once: the models of a `prefsel.score.job.Job`, as a `prefsel.score.contract.Ready`."""


@dataclass(frozen=True)
class ScorerKind:
    """A kind of scorer: the record of its settings, and how an actor makes it."""

    record: type[BaseModel]
    """A subclass of `prefsel.config.PooledScorer`; see `ScorerContract`."""
    load: Callable[[Any, Any], Any]
    """(job, storage) to a `prefsel.score.contract.Ready`; imports torch itself, if it needs it."""


SCORER_PARTS = ("label", "models", "columns", "recipe_settings", "check")
"""What the record of a scorer must be able to say; `PooledScorer` has defaults for all but the first and third."""
CONTRACTS: dict[str, type] = {
    "metrics": MetricContract,
    "losses": LossContract,
    "formats": FormatContract,
    "scorers": ScorerContract,
}
"""What can come from elsewhere; the entry-point groups are called `prefsel.<kind>`."""
SINGULAR = {"metrics": "metric", "losses": "loss", "formats": "format", "scorers": "scorer"}


def check(kind: str, name: str, found: Any, origin: str) -> None:
    """Refuse an object that cannot do what its kind must.

    Args:
        kind: A key of `CONTRACTS`.
        name: What it is called.
        found: The object.
        origin: Where it comes from, for the error.

    Raises:
        UserError: Says what was got, what is missing or does not fit, and the contract.
    """
    contract = CONTRACTS[kind]
    problems = _unfit(contract, found)
    if not problems and kind == "scorers":
        problems = _unfit_record(name, found.record)
    if not problems and kind == "metrics" and found.name != name:
        problems = [f"its own name is {found.name!r}"]
    if not problems and kind == "metrics" and not (isinstance(found.params, type) and _is_record(found.params)):
        problems = [f"params: got {found.params!r}; valid: a subclass of prefsel.config.Options"]
    if not problems and kind == "losses" and (unknown := [one for one in found.columns if one not in LOSS_COLUMNS]):
        problems = [f"columns: got {', '.join(unknown)}; valid: {', '.join(LOSS_COLUMNS)}"]
    if problems:
        promise = f"valid: what `prefsel.plugins.{contract.__name__}` describes"
        raise UserError(f"{SINGULAR[kind]} {name!r} ({origin}): got {_shown(found)}: {'; '.join(problems)}; {promise}")


def _unfit_record(name: str, record: Any) -> list[str]:
    """What the record of a scorer lacks."""
    if not (isinstance(record, type) and _is_record(record)):
        return [f"record: got {record!r}; valid: a subclass of prefsel.config.PooledScorer"]
    if lacking := [part for part in SCORER_PARTS if not hasattr(record, part)]:
        return [f"record {record.__name__} has no {', '.join(lacking)}; derive it from prefsel.config.PooledScorer"]
    given = kind_of(record)
    return [] if given == name else [f"record {record.__name__}: its kind is {given!r}"]


def kind_of(record: Any) -> str | None:
    """The one name that the `kind` of a record may have; None where it says none."""
    field = getattr(record, "model_fields", {}).get("kind")
    names = typing.get_args(field.annotation) if field else ()
    return names[0] if len(names) == 1 else None


def _is_record(params: type) -> bool:
    return issubclass(params, BaseModel) and params.model_config.get("extra") == "forbid"


def _unfit(contract: type, found: Any) -> list[str]:
    """What an object lacks of a contract: parts, or arguments that its functions must take."""
    names = [name for name, part in vars(contract).items() if callable(part) and _is_part(name)]
    parts = [name for name, part in vars(contract).items() if isinstance(part, property)]
    if lacking := [f"it has no {name}" for name in [*parts, *names] if not hasattr(found, name)]:
        return lacking
    problems = []
    for name in names:
        expected = list(inspect.signature(getattr(contract, name)).parameters)[1:]
        try:
            inspect.signature(found if name == "__call__" else getattr(found, name)).bind(*expected)
        except (TypeError, ValueError):
            shown = "it" if name == "__call__" else name
            problems.append(f"{shown} must be callable with ({', '.join(expected)})")
    return problems


def _is_part(name: str) -> bool:
    return name == "__call__" or not name.startswith("_")


def _shown(found: Any) -> str:
    kind = "a class" if isinstance(found, type) else "a function" if inspect.isroutine(found) else type(found).__name__
    return f"{kind} {found.__name__}" if hasattr(found, "__name__") else kind
