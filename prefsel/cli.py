"""The command line.

Exit codes: 0 done; 1 a fault; 2 the user's input is wrong; 3 refused, as while another run writes to the workspace;
130 and 143 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefsel import display, interrupts
from prefsel.display import say
from prefsel.errors import PrefselError, UserError, known_error
from prefsel.plan.commands import plan
from prefsel.publishing import commands
from prefsel.version import __version__
from prefsel.withdraw.commands import withdraw

if TYPE_CHECKING:
    from prefsel.config import Config
    from prefsel.pipeline import Outcome
    from prefsel.progress import Progress

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Choose the preference data worth training on: score, select exactly, train on what was kept.",
    epilog="Exit codes: 0 done; 1 a fault; 2 the input is wrong; 3 refused; 130 and 143 interrupted.",
)

# Typer's command-line errors (unknown option, missing argument) share a base that it does not export.
CommandLineError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

ConfigFile = Annotated[Path, typer.Argument(help="configuration, YAML")]
Workspace = Annotated[str, typer.Option("--workspace", "-w", help="directory or URI (s3://, gs://)")]
Set = Annotated[list[str], typer.Option("--set", help="dotted.key=value, overrides the file; repeatable")]

Wait = Annotated[bool, typer.Option("--wait", help="wait while another run writes to the workspace")]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"prefsel {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    """Options of the program itself."""


def _pipeline(
    file: Path,
    workspace: str,
    overrides: list[str],
    wait: bool,
    until: str | None,
    *,
    page: bool = False,
    work: Callable[[Config, str, Progress], Outcome] | None = None,
) -> None:
    """Run the job, or a part of it, and say what came of it.

    Args:
        file: The configuration.
        workspace: Directory or URI.
        overrides: Of `--set`.
        wait: For the end of another run that writes to the workspace.
        until: The part; None: all of it.
        page: Write the report in any case.
        work: What is done instead of a run.
    """
    from prefsel.config.file import load_config
    from prefsel.plan.check import check_without_models
    from prefsel.workspace.storage import Storage

    started = time.monotonic()
    config, storage = load_config(file, overrides), Storage(workspace)
    check_without_models(config, storage)
    # Ray and torch take seconds to import: a mistake in the configuration is told before.
    from prefsel.closing import closing
    from prefsel.pipeline import run
    from prefsel.progress import Progress

    progress = Progress()
    with interrupts.telling(progress.committed):
        if work is not None:
            outcome = work(config, workspace, progress)
        else:
            outcome = run(config, workspace, progress, until=until, always_report=page, wait=wait)
    report = storage.full(outcome.page) if outcome.page else None
    if not outcome.is_new:
        progress.line("nothing to do: every artifact of this configuration is already in the workspace")
        if report:
            progress.line(f"report: {report}")
        return
    place = f"--workspace {shlex.quote(workspace)}"
    then = [f"prefsel explain PAIR_ID {place}", f"prefsel verify {place}"]
    if until:
        more = "".join(f" --set {shlex.quote(one)}" for one in overrides)
        then = [f"prefsel status {shlex.quote(workspace)}", f"prefsel run {shlex.quote(str(file))} {place}{more}"]
    seconds = time.monotonic() - started
    reports = [*outcome.reports, *(report for one in outcome.made for report in one.reports)]
    for line in closing(reports, seconds=seconds, workspace=workspace, page=report, then=then):
        progress.line(line)


@app.command()
def run(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Run everything: ingest, score, select, train, report."""
    _pipeline(config, workspace, overrides, wait, None)


@app.command()
def refresh(
    config: ConfigFile,
    workspace: Workspace,
    train: Annotated[bool, typer.Option("--train", help="also train, answer and evaluate")] = False,
    retrain_scorers: Annotated[
        bool, typer.Option("--retrain-scorers", help="make the models that score anew, and score everything with them")
    ] = False,
    publish: Annotated[str | None, typer.Option(help="publish what this selection kept, see `prefsel publish`")] = None,
    name: Annotated[str | None, typer.Option(help="what consumers know it by; default: the selection's name")] = None,
    model: Annotated[
        str | None, typer.Option(help="a training published along, unless it is worse than the published one")
    ] = None,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0, help="points of held-out accuracy that it may lose")
    ] = 1.0,
    keep: Annotated[int | None, typer.Option(min=1, help="remove all but this many of the newest versions")] = None,
    overrides: Set = [],  # noqa: B006
    wait: Wait = False,
) -> None:
    """Bring the workspace up to date with its inputs at the cost of what is new, and say what entered and left."""

    if publish is None and (name or model or keep):
        raise UserError("--name, --model and --keep say what is published; name the selection with --publish")

    def work(settings: Config, place: str, progress: Progress) -> Outcome:
        from prefsel.refresh import Publishing
        from prefsel.refresh import refresh as bring_up_to_date

        asked = None
        if publish is not None:
            asked = Publishing(publish, name or publish, model, max_drop, keep)
        return bring_up_to_date(
            settings, place, progress, retrain_scorers=retrain_scorers, trains=train, publishing=asked, wait=wait
        ).outcome

    _pipeline(config, workspace, overrides, wait, None, work=work)


@app.command()
def ingest(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Bring the sources into the workspace: groups, pairs, quarantine."""
    _pipeline(config, workspace, overrides, wait, "ingest")


@app.command("train-reward")
def train_reward(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Train the reward models of the configuration (and what must come before)."""
    _pipeline(config, workspace, overrides, wait, "train-reward")


@app.command()
def score(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Run the models over the corpus (and what must come before)."""
    _pipeline(config, workspace, overrides, wait, "score")


@app.command()
def select(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Score the pairs and keep the subsets (and what must come before)."""
    _pipeline(config, workspace, overrides, wait, "select")


@app.command()
def train(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Train on the subsets (and what must come before)."""
    _pipeline(config, workspace, overrides, wait, "train")


@app.command()
def generate(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Answer prompts with the models of `generate` (and what must come before)."""
    _pipeline(config, workspace, overrides, wait, "generate")


@app.command()
def evaluate(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Measure what the trained policies answer (and make what that needs), as `evaluate` says."""
    _pipeline(config, workspace, overrides, wait, "evaluate")


@app.command()
def report(config: ConfigFile, workspace: Workspace, overrides: Set = [], wait: Wait = False) -> None:  # noqa: B006
    """Write the page again from what the workspace holds; computes only what is missing."""
    _pipeline(config, workspace, overrides, wait, None, page=True)


@app.command()
def demo(
    workspace: Workspace = "demo-workspace",
    seed: Annotated[int, typer.Option(help="of the world, the models and the training")] = 0,
    config: Annotated[Path | None, typer.Option(help="run this configuration on the demo's inputs")] = None,
    wait: Wait = False,
) -> None:
    """A generated corpus with a known gold reward, small models made on the spot, and the whole job on it."""
    from prefsel.demo import run_demo
    from prefsel.progress import Progress

    progress = Progress()
    with interrupts.telling(progress.committed):
        run_demo(workspace, seed=seed, progress=progress, config_file=config, wait=wait)


@app.command()
def verify(
    workspace: Workspace,
    quick: Annotated[bool, typer.Option("--quick", help="sizes and ledgers only")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="set aside what is damaged, and make it again")] = False,
    wait: Wait = False,
) -> None:
    """Re-read every artifact against its ledger; with --repair, make again what is damaged."""
    from prefsel.workspace.storage import Storage
    from prefsel.workspace.verify import require_clean
    from prefsel.workspace.verify import verify as check

    storage = Storage(workspace)
    if not any(storage.exists(name) for name in ("catalog.json", "config.yaml")):
        raise UserError(
            f"--workspace: {display.redact(workspace)!r} is not a workspace: no catalog.json, no config.yaml"
        )
    if repair:
        from prefsel.mend import mend
        from prefsel.progress import Progress

        progress = Progress()
        with interrupts.telling(progress.committed):
            result = mend(storage, progress, quick=quick, wait=wait)
    else:
        result = check(storage, quick=quick)
    for finding in result.findings:
        say(str(finding))
    state = "clean" if result.is_clean else "NOT CLEAN"
    say(
        f"verify: {state}: {result.artifacts:,} artifacts, {result.shards:,} shards, {result.rows:,} rows, "
        f"{result.bytes / 2**20:,.1f} MiB; {result.retried:,} shards begun more than once"
    )
    require_clean(result)


app.command()(withdraw)


@app.command()
def gc(
    workspace: Workspace,
    older_than: Annotated[float, typer.Option(min=0, help="days since an artifact was written to")] = 0,
    keep_bytes: Annotated[
        str | None, typer.Option(help="remove unnamed artifacts, oldest first, until no more is left: 200GB, 1.5TiB")
    ] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="also copies set aside of what is there again")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="remove it; without, only say what would go")] = False,
    wait: Wait = False,
) -> None:
    """Say what no kept configuration needs, and with --yes remove it."""
    from prefsel.garbage import find_waste, merged, remove
    from prefsel.workspace.lease import hold
    from prefsel.workspace.storage import Storage

    storage = Storage(workspace)
    if not any(storage.exists(name) for name in ("catalog.json", "config.yaml")):
        place = display.redact(workspace)
        raise UserError(f"--workspace: {place!r} is not a workspace: it has no catalog.json and no config.yaml")
    limit = None if keep_bytes is None else _bytes_of(keep_bytes)
    with hold(storage, wait=wait, tell=say) if yes else nullcontext(storage) as held:
        found = find_waste(held, older_than_days=older_than, keep_bytes=limit, damaged=damaged)
        for one in merged(found.waste):
            days = (time.time() - one.changed) / 86400
            say(f"{one.why:<11} {one.path} ({one.bytes / 2**20:,.2f} MiB, {days:,.1f} days old)")
        for path, why in found.kept.items():
            say(f"kept        {path}: {why}")
        total = sum(one.bytes for one in found.waste) / 2**20
        of = f"of {found.bytes / 2**20:,.1f} MiB"
        if yes:
            say(f"gc: removed {remove(held, found.waste) / 2**20:,.1f} MiB {of}")
        else:
            say(f"gc: {total:,.1f} MiB {of} can go; nothing was removed, --yes removes it")


def _bytes_of(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtKMGT]?)(i?)[bB]?\s*", text)
    if found is None:
        raise UserError(f"--keep-bytes: got {text!r}; valid: a number of bytes, or with a unit such as 200GB or 1.5TiB")
    return int(
        float(found[1]) * (1024 if found[3] else 1000) ** ("kmgt".index(found[2].lower()) + 1 if found[2] else 0)
    )


@app.command()
def init(
    files: Annotated[list[str], typer.Argument(help="data: files, folders, globs, URIs or datasets:NAME/SPLIT")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default: <name>.yaml here")] = None,
    name: Annotated[str | None, typer.Option(help="of the run; default: after the first file")] = None,
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Look at data files and write a commented configuration for them that runs as it is."""
    from prefsel.draft import draft

    drafted = draft(files, name=name, file=None if output is None else str(output))
    target = (output or Path(f"{drafted.name}.yaml")).expanduser()
    if target.exists() and not force:
        raise UserError(f"init: {target} is there already; give another --output, or --force to write over it")
    try:
        target.write_text(drafted.text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"init: cannot write {target}: {error.strerror}; give another --output") from error
    for line in drafted.seen:
        say(line)
    place = shlex.quote(str(target))
    say(f"\nwrote {target}; next: prefsel run {place} --workspace {drafted.name}-workspace")


@app.command("status")
def show_status(
    workspace: Annotated[str, typer.Argument(help="directory or URI of a workspace")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what a workspace holds, what is missing, how large it is and what is being made."""
    from prefsel.status import lines, status
    from prefsel.workspace.storage import Storage

    found = status(Storage(workspace))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    for line in lines(found):
        say(line)


@app.command()
def explain(
    pair_id: Annotated[str, typer.Argument(help="32 hex digits, or their beginning")], workspace: Workspace
) -> None:
    """Print every number and percentile that decided about a pair."""
    from prefsel.report.explain import explain_pair
    from prefsel.workspace.storage import Storage

    for line in explain_pair(Storage(workspace), pair_id):
        say(line)


@app.command()
def export(
    workspace: Annotated[str, typer.Argument(help="directory or URI (s3://, gs://) of a finished run")],
    output: Annotated[
        str | None, typer.Option(help="FILE.parquet, .csv or .jsonl, or with --for a FOLDER; default: printed lines")
    ] = None,
    columns: Annotated[list[str], typer.Option(help="only these, in this order; repeatable, or a,b,c")] = [],  # noqa: B006
    selection: Annotated[str | None, typer.Option(help="only the pairs that this selection kept")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="that a model answered, such as a round; default: the files'")
    ] = None,
    trainer: Annotated[
        str | None, typer.Option("--for", help="write a folder for a trainer: trl, openrlhf, axolotl, llamafactory")
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="with --for: leave out pairs that the trainer cannot hold, and say so")
    ] = False,
) -> None:
    """Write every pair with its text, ids, scores, percentiles and why it was kept or dropped, as one table.

    With --for, write the pairs that a selection kept as a folder which that trainer opens.
    """
    if trainer is not None:
        _export_for(trainer, workspace, output, columns, selection, corpus, leave_out)
        return
    if leave_out:
        raise UserError("--leave-out: it leaves out what a trainer cannot hold; name the trainer with --for")
    from prefsel.report.export_file import export_file, write_batches
    from prefsel.report.opened import open_workspace

    names = list(dict.fromkeys(name.strip() for given in columns for name in given.split(",") if name.strip()))
    if columns and not names:
        raise UserError(f"--columns: got {','.join(columns)!r}, which names none")
    opened = open_workspace(workspace, corpus)
    pairs = opened.pairs(names or None, selection=selection)
    if output is None:
        try:
            write_batches(pairs.schema, pairs, sys.stdout.buffer, ".jsonl")
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # whoever reads has enough, as `head` does; Python would complain once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    rows = export_file(pairs.schema, pairs, output)
    say(f"export: {rows:,} pairs, {len(pairs.schema)} columns: {output}")
    if any(name == "dropped" or name.startswith("reason_") for name in pairs.schema.names):
        for reason, meaning in opened.reasons.items():
            say(f"  {reason}: {meaning}")


def _export_for(
    trainer: str,
    workspace: str,
    output: str | None,
    columns: list[str],
    selection: str | None,
    corpus: str | None,
    leave_out: bool,
) -> None:
    from prefsel.pairs.trainers import TRAINERS
    from prefsel.report.opened import open_workspace
    from prefsel.report.trainer_folder import write_folder

    if output is None or selection is None or columns:
        raise UserError(f"--for {trainer}: it needs --selection and --output FOLDER, and takes no --columns")
    written = write_folder(open_workspace(workspace, corpus), selection, trainer, output, leave_out=leave_out)
    say(f"export: {written.rows:,} pairs for {TRAINERS[trainer].title}: {output}")
    if written.refused:
        say(f"  left out {written.refused.total():,}: {written.reasons()}")
    lines = TRAINERS[trainer].lines(str(Path(output).expanduser()), selection)
    say(f"  README.md in it shows the lines that read it:\n\n{lines}")


@app.command("answers")
def write_answers(
    workspace: Annotated[str, typer.Argument(help="directory or URI of a workspace")],
    model: Annotated[str, typer.Argument(help="one that was evaluated")],
    output: Annotated[str, typer.Option(help="the file to write")],
    judge: Annotated[str, typer.Option("--for", help="whose format: alpaca_eval, arena_hard, arena_hard_choices")],
    questions: Annotated[
        str | None, typer.Option(help="the benchmark's own questions: ids, order and further fields are taken from it")
    ] = None,
) -> None:
    """Write what a model answered in its evaluation as a file that a public judge reads."""
    from prefsel.report.answers_file import write_answers_file
    from prefsel.workspace.storage import Storage

    written = write_answers_file(Storage(workspace), model, judge, output, questions=questions)
    say(f"answers: {written:,} of {model}, for {judge}: {output}")


@app.command()
def selftest(config: ConfigFile, overrides: Set = []) -> None:  # noqa: B006
    """Score the first groups of the data in every way that must agree; names the cause where a model does not."""
    from prefsel.config.file import load_config
    from prefsel.plan.check import check
    from prefsel.progress import Progress
    from prefsel.selftest import lines, require_agreement
    from prefsel.selftest import selftest as check_models
    from prefsel.workspace.storage import Storage

    settings = load_config(config, overrides)
    with tempfile.TemporaryDirectory() as no_workspace:
        check(settings, Storage(no_workspace))
    checks = check_models(settings, Progress())
    for line in lines(checks):
        say(line)
    require_agreement(checks)


@app.command()
def graph(
    config: ConfigFile,
    workspace: Annotated[str, typer.Option("--workspace", "-w", help="what is there; default: nothing is")] = "",
    dot: Annotated[bool, typer.Option("--dot", help="as a Graphviz digraph")] = False,
    overrides: Set = [],  # noqa: B006
) -> None:
    """Print what a configuration makes, from what, and what of it a workspace already holds."""
    from prefsel.config.file import load_config
    from prefsel.plan import show
    from prefsel.plan.check import check_names
    from prefsel.plan.nodes import make_plan
    from prefsel.workspace.storage import Storage

    with tempfile.TemporaryDirectory() as nothing:
        storage = Storage(workspace or nothing)
        storage.require_folder()
        plan = make_plan(load_config(config, overrides), storage)
        check_names(plan)
        for line in show.dot(plan) if dot else show.text(plan):
            say(line)


app.command()(plan)


@app.command("env")
def show_environment() -> None:
    """Print versions, hardware and where Ray is, for bug reports."""
    from prefsel.environment import lines

    for line in lines():
        say(line)


@app.command("config-schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration file, rules and metric parameters included."""
    from prefsel.plan.config_schema import full_schema

    typer.echo(json.dumps(full_schema(), indent=1))


app.command()(commands.publish)
app.command()(commands.rollback)
app.command()(commands.diff)


def guarded(call: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run a command; a known error becomes one message and its exit code, an unknown one is raised."""
    try:
        call(args=arguments, standalone_mode=False)
    except CommandLineError as error:
        error.show()
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        from prefsel.plugins.failures import failure_of_plugin

        known = error if isinstance(error, PrefselError) else failure_of_plugin(error) or known_error(error)
        if known is None:
            sys.excepthook = display.show_fault  # only now: typer puts its own there when it is called
            raise
        print(f"prefsel: {display.message(str(known))}", file=sys.stderr)
        return known.exit_code
    return 0


def main() -> None:
    """The console script."""
    interrupts.install()
    sys.exit(guarded(app))


def job(command: str) -> None:
    """A script of `jobs/`: the same command with the configuration given as `--config`."""
    arguments = [part for argument in sys.argv[1:] for part in _split_option(argument)]
    if "--config" in arguments:
        at = arguments.index("--config")
        arguments = arguments[at + 1 : at + 2] + arguments[:at] + arguments[at + 2 :]
    sys.argv = [f"prefsel {command}", command, *arguments]
    main()


def _split_option(argument: str) -> list[str]:
    return ["--config", argument.removeprefix("--config=")] if argument.startswith("--config=") else [argument]
