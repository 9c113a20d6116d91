"""`prefsel withdraw`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from prefsel.display import redact, say
from prefsel.errors import UserError

if TYPE_CHECKING:
    from prefsel.withdraw.keys import Asked
    from prefsel.workspace.storage import Storage

Keys = list[str]
SHOWN = 20


def withdraw(
    workspace: Annotated[str, typer.Option("--workspace", "-w", help="directory or URI (s3://, gs://)")],
    pair_id: Annotated[Keys, typer.Option(help="32 hex digits; repeatable")] = [],  # noqa: B006
    prompt_id: Annotated[Keys, typer.Option(help="32 hex digits: everything of the prompt; repeatable")] = [],  # noqa: B006
    source_key: Annotated[
        Keys, typer.Option(help="SOURCE/FILE#ROW, or SOURCE:FIELD=VALUE of a carried field; repeatable")
    ] = [],  # noqa: B006
    file: Annotated[
        str | None, typer.Option(help="such keys, one a line, or CSV or Parquet: pair_id, prompt_id, source_key")
    ] = None,
    why: Annotated[str, typer.Option(help="kept in the record; no text of the rows, please")] = "",
    remove_models: Annotated[bool, typer.Option("--remove-models", help="remove models that saw the rows")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, change nothing")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="wait while another run writes to the workspace")] = False,
) -> None:
    """Take rows back: they leave everything that was made of them, and are never ingested again."""
    from prefsel.withdraw.keys import Asked, Given, parse, read_file
    from prefsel.workspace.lease import hold
    from prefsel.workspace.storage import Storage

    asked = parse(Given(pair_id, prompt_id, source_key)) | (read_file(file) if file is not None else Asked())
    storage = Storage(workspace)
    if not asked:
        raise UserError("withdraw: nothing to take back; give --pair-id, --prompt-id, --source-key or --file")
    if not storage.exists("catalog.json"):
        raise UserError(f"--workspace: {redact(workspace)!r} is not a workspace with a corpus: no catalog.json")
    with nullcontext(storage) if dry_run else hold(storage, wait=wait, tell=say) as held:
        _withdraw(held, asked, why, remove_models=remove_models, dry_run=dry_run)


def _withdraw(storage: Storage, asked: Asked, why: str, *, remove_models: bool, dry_run: bool) -> None:
    from prefsel.withdraw.found import find
    from prefsel.withdraw.others import inputs_within
    from prefsel.withdraw.removal import finish_withdrawals
    from prefsel.withdraw.removal import withdraw as carry_out

    if not dry_run:
        for before in finish_withdrawals(storage):
            say(f"withdraw: {before.id}, begun {before.when}, is finished now")
    record = find(storage, asked, why)
    if remove_models and not dry_run:
        _remove_models_of_before(storage, asked)
    if record is None:
        say("withdraw: nothing to do: all of it was taken back before")
        return
    sizes = f"{len(record.pairs):,} pairs, {len(record.completions):,} completions, {len(record.prompts):,} prompts"
    sizes += f", {len(record.rows):,} quarantined rows"
    if dry_run:
        say(f"withdraw: would take back {sizes}, in {len(record.shards):,} shards; nothing was changed")
    else:
        saw, record = record.models, carry_out(storage, replace(record, removes_models=remove_models))
        say(f"withdraw: took back {sizes}; record withdrawn/{record.id}.json")
        say("  removed: " + (", ".join(f"{count:,} {name}" for name, count in record.counts.items()) or "nothing"))
        if remove_models and saw:
            say(f"  removed models that saw them: {', '.join(saw)}")
    for path in record.models[:SHOWN]:
        say(f"  saw them: {path}" + ("" if dry_run else "; it stays (--remove-models with their ids removes it)"))
    if len(record.models) > SHOWN:
        say(f"  and {len(record.models) - SHOWN:,} more models")
    for name in record.files[:SHOWN] if dry_run else ():
        say(f"  shows them: {name}")
    for name in inputs_within(storage)[:SHOWN]:
        say(f"  an input file inside the workspace stays as it is: {name}")


def _remove_models_of_before(storage: Storage, asked: Asked) -> None:
    """Remove the models that saw what is asked for and was taken back before; its ids alone are known of that."""
    from prefsel.withdraw.removal import remove_models
    from prefsel.workspace.withdrawals import read_withdrawals

    for record in read_withdrawals(storage):
        known = record.gone.pairs | record.gone.prompts
        if record.models and known & (asked.pairs | asked.prompts | asked.either):
            say(f"withdraw: removed models that saw {record.id}: {', '.join(record.models)}")
            remove_models(storage, record)
