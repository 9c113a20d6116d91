"""One exception per cause the caller can act on; the command line turns each into its exit code."""

from __future__ import annotations

from collections.abc import Iterable


class PrefselError(Exception):
    """A fault of the run (exit code 1): schedulers may retry it."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        """Keep the message apart from `args`: Ray Data adds advice on retries to those of whatever an actor raises."""
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        """The message as it was written."""
        return self.message


class UserError(PrefselError):
    """The user's input is wrong (exit code 2): one readable message, retrying cannot help."""

    exit_code = 2


class NonFiniteError(PrefselError):
    """A NaN or infinity where only finite numbers are allowed; names the column and the first offenders."""


class IntegrityError(PrefselError):
    """An artifact does not match its ledger, or rows were lost between two stages."""


class TemplateError(UserError):
    """The chat template of a model cannot be shared as prompt prefix + completions."""


def invalid(field: str, value: object, valid: Iterable[object] | str) -> UserError:
    """A `UserError` that names the field, the value that was got and the valid ones.

    >>> str(invalid("dtype", "int3", ["fp32", "bf16"]))
    "dtype: got 'int3'; valid: fp32, bf16"
    """
    choices = valid if isinstance(valid, str) else ", ".join(str(choice) for choice in valid)
    return UserError(f"{field}: got {value!r}; valid: {choices}")
