"""A published version as a commit of repositories on a hub: it lands on the commit that was seen, or not at all."""

from __future__ import annotations

from typing import Any

from prefsel.display import redact
from prefsel.errors import PrefselError, RefusedError, UserError
from prefsel.publishing.versions import files_of, read_file
from prefsel.workspace.storage import Storage

CONFLICT = (409, 412)
"""What a hub answers when the repository has another commit than the parent that was named."""


def to_hub(storage: Storage, name: str, version: str, repo: str) -> list[str]:
    """Commit a version to the dataset repository `repo`, and its model to the model repository of the same name.

    The repository then holds the version's files and no others, but for what begins with a dot. One commit of a
    repository is whole or not there; the model comes first, so a dataset never names one that is missing.

    Args:
        storage: The workspace.
        name: What is published.
        version: Of it.
        repo: `owner/name`; the token is taken from the environment, as by `huggingface_hub`.

    Returns:
        Addresses of the commits.

    Raises:
        RefusedError: somebody else committed meanwhile.
        UserError: the token may not write there.
        IntegrityError: a file is not what was published.
        PrefselError: the hub does not answer, or not as it should.
    """
    there = files_of(storage, name, version)
    model = [one for one in there if one.startswith("model/")]
    dataset = [one for one in there if one not in model]
    commits = []
    for kind, files, below in (("model", model, "model/"), ("dataset", dataset, "")):
        if files:
            contents = {one.removeprefix(below): read_file(storage, name, version, one) for one in files}
            commits.append(_commit(repo, kind, contents, f"{name} {version}"))
    return commits


def _commit(repo: str, kind: str, files: dict[str, bytes], message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api: Any = HfApi()
    # Of the HTTP client that the library uses, which has changed between its versions.
    failures: Any = (*HfHubHTTPError.__bases__, OfflineModeIsEnabled)
    try:
        api.create_repo(repo, repo_type=kind, exist_ok=True)
        seen = api.repo_info(repo, repo_type=kind)
        there = {file.rfilename for file in seen.siblings or () if not file.rfilename.startswith(".")}
        operations: list[Any] = [CommitOperationAdd(path, data) for path, data in files.items()]
        operations += [CommitOperationDelete(path) for path in sorted(there - files.keys())]
        made = api.create_commit(
            repo, operations, commit_message=message, repo_type=kind, parent_commit=seen.sha, num_threads=1
        )
    except failures as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        told = redact(str(error).strip().partition("\n")[0])
        if status in CONFLICT:
            raise RefusedError(
                f"--to-hub: somebody else committed to {repo} ({kind}) meanwhile; run again to put this version on"
                f" top of that: {told}"
            ) from error
        if status in (401, 403):
            raise UserError(f"--to-hub: may not write to {repo} ({kind}); set HF_TOKEN: {told}") from error
        raise PrefselError(f"--to-hub: {repo} ({kind}): {told}; the version is current here, so run again") from error
    return str(made.commit_url)
