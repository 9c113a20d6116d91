"""`prefsel publish`, `rollback` and `diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from prefsel.display import say
from prefsel.publishing.versions import GRACE_H

Workspace = Annotated[str, typer.Option("--workspace", "-w", help="directory or URI (s3://, gs://)")]
Wait = Annotated[bool, typer.Option("--wait", help="wait while another run writes to the workspace")]


def publish(
    selection: Annotated[str, typer.Argument(help="a selection or control of the last finished run")],
    workspace: Workspace,
    name: Annotated[str | None, typer.Option(help="what consumers know it by; default: the selection's name")] = None,
    model: Annotated[str | None, typer.Option(help="a model of that run that goes along")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="remove all but this many of the newest versions")] = None,
    grace: Annotated[float, typer.Option(min=0, help="hours that a version stays after it was current")] = GRACE_H,
    to_hub: Annotated[str | None, typer.Option("--to-hub", help="commit it to this repository, owner/name")] = None,
    wait: Wait = False,
) -> None:
    """Make what a selection kept the next version of a published dataset, and that the current one."""
    from prefsel.publishing import hub
    from prefsel.publishing.publish import publish as make
    from prefsel.publishing.versions import folder, prune
    from prefsel.workspace.lease import hold
    from prefsel.workspace.storage import Storage

    storage = Storage(workspace)
    storage.require_folder()
    name = selection if name is None else name
    folder(name)
    with hold(storage, wait=wait, tell=say) as held:
        made = make(held, selection, name, model)
        place = held.full(folder(name, made.version))
        state = "is current now" if made.is_new else "is current and holds this already"
        say(f"publish: {name} {made.version} {state}: {made.rows:,} pairs, {place}")
        if keep is not None and (gone := prune(held, name, keep, grace)):
            say(f"publish: removed {', '.join(gone)}")
        for commit in hub.to_hub(held, name, made.version, to_hub) if to_hub else ():
            say(f"publish: {commit}")


def rollback(
    name: Annotated[str, typer.Argument(help="what is published")],
    workspace: Workspace,
    to: Annotated[str | None, typer.Option(help="a version, such as v0003; default: the next older one")] = None,
    wait: Wait = False,
) -> None:
    """Make an earlier version the current one again."""
    from prefsel.publishing.versions import rollback as move
    from prefsel.workspace.lease import hold
    from prefsel.workspace.storage import Storage

    storage = Storage(workspace)
    storage.require_folder()
    with hold(storage, wait=wait, tell=say) as held:
        before, now = move(held, name, to)
    say(f"rollback: {name} {now} is current" + (f"; it was {before}" if before != now else " already"))


def diff(
    a: Annotated[str, typer.Argument(help="a selection, or NAME/v0001 or NAME/current of what is published")],
    b: Annotated[str, typer.Argument(help="another one")],
    workspace: Workspace,
    output: Annotated[str | None, typer.Option(help="FILE.jsonl for the ids that entered and left")] = None,
) -> None:
    """Say which pairs entered and left between two versions or selections, and how score and length moved."""
    from prefsel.publishing.difference import compare
    from prefsel.workspace.storage import Storage

    storage = Storage(workspace)
    storage.require_folder()
    found = compare(storage, a, b)
    for line in found.lines(a, b):
        say(line)
    if output is not None:
        found.write(output)
        say(f"  {len(found.entered) + len(found.left):,} ids: {output}")
