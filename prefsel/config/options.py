"""What every record of a configuration is, and the types of value that several of them have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Dtype = Literal["fp32", "bf16", "fp16"]


def default_kind(kind: str) -> BeforeValidator:
    """What makes an entry without a `kind` one of this kind: pydantic picks the record of a union before defaults."""

    def filled(entry: Any) -> Any:
        return {"kind": kind, **entry} if isinstance(entry, Mapping) else entry

    return BeforeValidator(filled)


class Options(BaseModel):
    """A frozen record; an unknown key is an error, and so is a number that is infinite or none."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )
