"""The command `prefsel plan`: what a run would make, take and need, before anything is computed."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from prefsel.display import say
from prefsel.errors import RefusedError, UserError, invalid
from prefsel.plan.accelerators import find_accelerator


def plan(
    config: Annotated[Path, typer.Argument(help="configuration, YAML")],
    workspace: Annotated[
        str, typer.Option("--workspace", "-w", help="what is there already, and how fast it was made")
    ] = "",
    overrides: Annotated[
        list[str], typer.Option("--set", help="dotted.key=value, overrides the file; repeatable")
    ] = [],  # noqa: B006
    sample: Annotated[str, typer.Option(help="prompts to tokenise, or all")] = "1000",
    seed: Annotated[int, typer.Option(help="of the sample")] = 0,
    accelerator: Annotated[str | None, typer.Option(help="the kind of GPU, as Ray calls it: H100, A100-80G")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many of them at once")] = 1,
    price: Annotated[list[str], typer.Option(help="TYPE=USD an hour; repeatable")] = [],  # noqa: B006
    max_gpu_hours: Annotated[
        float | None, typer.Option(min=0, help="exit with 3 where the upper end of the estimate is above it")
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="try each model here for seconds")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Print what a run would make, cost and need, from a sample of the data, before anything is computed.

    No weights are read or fetched, only configurations and tokenizers. With a workspace, the report of its next run
    sets what was planned beside what was counted.
    """
    from prefsel.config.file import load_config
    from prefsel.plan.check import check_without_models
    from prefsel.plan.plan_report import lines
    from prefsel.workspace.storage import Storage

    prices = dict(_price(one) for one in price)
    num_groups = _groups(sample)
    kind = find_accelerator(accelerator) if accelerator else None
    if max_gpu_hours is not None and kind is None:
        raise UserError("--max-gpu-hours: an hour of which GPU? name it with --accelerator")
    settings = load_config(config, overrides)
    with tempfile.TemporaryDirectory() as nothing:
        storage = Storage(workspace or nothing)
        made = check_without_models(settings, storage)
        from prefsel.plan.changes import changes
        from prefsel.plan.counted import former_rates, keep_plan
        from prefsel.plan.estimate import estimate, upper_gpu_hours
        from prefsel.plan.sample import take_sample
        from prefsel.plan.work import Works

        seen = take_sample(settings, num_groups=num_groups, seed=seed)
        changed = changes(made)
        rates = former_rates(storage)
        if calibrate:
            from prefsel.plan.calibrate import calibrated_rates

            rates = calibrated_rates(made, Works(made, seen)) | rates
        document = estimate(made, seen, changed, gpu=kind, num_gpus=gpus, prices=prices, rates=rates)
        if workspace:
            keep_plan(storage, settings, document)
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        for line in lines(document):
            say(line)
    if max_gpu_hours is not None and (most := upper_gpu_hours(document)) > max_gpu_hours:
        lacking = f", without {', '.join(document['missing'])}" if document["missing"] else ""
        raise RefusedError(
            f"plan: up to {most:,.3g} GPU-hours on {accelerator}{lacking}; --max-gpu-hours allows {max_gpu_hours:g}"
        )


def _price(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    if not re.fullmatch(r"\d+(\.\d+)?", amount):
        raise invalid("--price", text, "TYPE=USD an hour, such as H100=2.50")
    return find_accelerator(name, field="--price").name, float(amount)


def _groups(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 2:
        raise invalid("--sample", text, "a number of prompts from 2, or all")
    return int(text)
