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


class RefusedError(PrefselError):
    """The command may not run now (exit code 3), such as while another run writes to the workspace."""

    exit_code = 3


class LostLeaseError(PrefselError):
    """Another run took the workspace over while this one was silent; nothing more was written to it."""


class GateError(PrefselError):
    """A new model is worse than the published one, or cannot be compared with it; what is served stays."""


class NonFiniteError(PrefselError):
    """A NaN or infinity where only finite numbers are allowed; names the column and the first offenders."""


class IntegrityError(PrefselError):
    """An artifact does not match its ledger, or rows were lost between two stages."""


class CheckpointError(IntegrityError):
    """A checkpoint of a training is not what was saved; the training has to begin anew."""


class DamagedError(IntegrityError):
    """An object of a workspace is gone, or is not what was committed."""

    def __init__(self, workspace: str, path: str, problem: str, detail: str = "") -> None:
        """Say what is wrong and how it is mended.

        Args:
            workspace: Directory or URI, without credentials.
            path: Of the object, relative to the workspace.
            problem: `missing`, `altered` or `added`.
            detail: What was expected and what was found.
        """
        why = f" ({detail})" if detail else ""
        repair = f"prefsel verify --workspace {workspace} --repair"
        again = "" if problem == "added" else " and makes it again"
        super().__init__(f"{path}: {problem}{why}; a run sets it aside{again}, and so does `{repair}`")
        self.workspace, self.path, self.problem, self.detail = workspace, path, problem, detail

    def __reduce__(self) -> tuple[type[DamagedError], tuple[str, ...]]:
        return type(self), (self.workspace, self.path, self.problem, self.detail)


class StoreError(PrefselError):
    """An object store refuses an operation, or failed for longer than is waited."""

    def __init__(self, message: str = "", kind: str = "other") -> None:
        """Say what failed.

        Args:
            message: The operation, the object, and what the store says.
            kind: `passing`, `unreached`, `denied`, `absent` or `other`; see `workspace/patience.py`.
        """
        super().__init__(message)
        self.kind = kind

    @property
    def may_pass(self) -> bool:
        """Whether trying again later may help without that anything is changed."""
        return self.kind in ("passing", "unreached")

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, ...]]:
        return type(self), (self.message, self.kind)


class TemplateError(UserError):
    """The chat template of a model cannot be shared as prompt prefix + completions."""


def known_error(error: BaseException) -> PrefselError | None:
    """The known error behind what Ray, or anything else, put around it; None where nothing of it is known.

    Looks into `cause` (Ray's tasks), `worker_failures` and `controller_failure` (Ray Train's workers), and `__cause__`.
    What the operating system refused (a full disk, a permission) is known too, where a process raised just that.
    """
    waiting, seen = [(error, True)], set()
    refused: OSError | None = None
    while waiting:
        layer, is_what_was_raised = waiting.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        carried = _carried(layer)
        # Ray's wrapper is an instance of the cause's class too; what is wanted is the cause itself.
        if isinstance(layer, PrefselError) and not carried:
            return layer
        if isinstance(layer, OSError) and not carried and is_what_was_raised:
            refused = refused or layer
        waiting += [(one, is_what_was_raised) for one in carried]
        waiting += [(layer.__cause__, False)] if layer.__cause__ else []
    return None if refused is None else PrefselError(_told(refused))


def _carried(layer: BaseException) -> list[BaseException]:
    """What a wrapper says that somebody else raised."""
    failures = getattr(layer, "worker_failures", None)
    found = [getattr(layer, "cause", None), getattr(layer, "controller_failure", None)]
    found += list(failures.values()) if isinstance(failures, dict) else []
    return [one for one in found if isinstance(one, BaseException)]


def _told(error: OSError) -> str:
    if error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}; what is committed is kept, so run again once that is mended"
    return f"{type(error).__name__}: {error}"


def invalid(field: str, value: object, valid: Iterable[object] | str) -> UserError:
    """A `UserError` that names the field, the value that was got and the valid ones.

    >>> str(invalid("dtype", "int3", ["fp32", "bf16"]))
    "dtype: got 'int3'; valid: fp32, bf16"
    """
    choices = valid if isinstance(valid, str) else ", ".join(str(choice) for choice in valid)
    return UserError(f"{field}: got {value!r}; valid: {choices}")
