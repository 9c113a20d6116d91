"""The command line. Exit codes: 0 done; 1 a fault; 2 the user's input is wrong; 3 refused."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from prefsel.errors import PrefselError, UserError
from prefsel.workspace.storage import redact

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

# Typer's command-line errors (unknown option, missing argument) share a base that it does not export.
CommandLineError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

ConfigFile = Annotated[Path, typer.Argument(help="configuration, YAML")]
Workspace = Annotated[str, typer.Option("--workspace", "-w", help="directory or URI (s3://, gs://)")]
Set = Annotated[list[str], typer.Option("--set", help="dotted.key=value, overrides the file; repeatable")]


def _pipeline(config: Path, workspace: str, overrides: list[str], until: str | None, *, page: bool = False) -> None:
    from prefsel.configfile import load_config
    from prefsel.pipeline import run
    from prefsel.progress import Progress
    from prefsel.workspace.storage import Storage

    progress = Progress()
    outcome = run(load_config(config, overrides), workspace, progress, until=until, always_report=page)
    if not outcome.is_new:
        progress.line("nothing to do: every artifact of this configuration is already in the workspace")
    if outcome.page:
        progress.line(f"report: {Storage(workspace).full(outcome.page)}")


@app.command()
def run(config: ConfigFile, workspace: Workspace, overrides: Set = []) -> None:  # noqa: B006
    """Run everything: ingest, score, select, train, report."""
    _pipeline(config, workspace, overrides, None)


@app.command()
def ingest(config: ConfigFile, workspace: Workspace, overrides: Set = []) -> None:  # noqa: B006
    """Bring the sources into the workspace: groups, pairs, quarantine."""
    _pipeline(config, workspace, overrides, "ingest")


@app.command("train-reward")
def train_reward(config: ConfigFile, workspace: Workspace, overrides: Set = []) -> None:  # noqa: B006
    """Train the reward models of the configuration (and what must come before)."""
    _pipeline(config, workspace, overrides, "train-reward")


@app.command()
def score(config: ConfigFile, workspace: Workspace, overrides: Set = []) -> None:  # noqa: B006
    """Run the models over the corpus (and what must come before)."""
    _pipeline(config, workspace, overrides, "score")


@app.command()
def select(config: ConfigFile, workspace: Workspace, overrides: Set = []) -> None:  # noqa: B006
    """Score the pairs and keep the subsets (and what must come before)."""
    _pipeline(config, workspace, overrides, "select")


@app.command()
def train(config: ConfigFile, workspace: Workspace, overrides: Set = []) -> None:  # noqa: B006
    """Train on the subsets (and what must come before)."""
    _pipeline(config, workspace, overrides, "train")


@app.command()
def report(config: ConfigFile, workspace: Workspace, overrides: Set = []) -> None:  # noqa: B006
    """Write the page again from what the workspace holds; computes only what is missing."""
    _pipeline(config, workspace, overrides, None, page=True)


@app.command()
def demo(
    workspace: Workspace = "demo-workspace",
    seed: Annotated[int, typer.Option(help="of the world, the models and the training")] = 0,
    config: Annotated[Path | None, typer.Option(help="run this configuration on the demo's inputs")] = None,
) -> None:
    """A generated corpus with a known gold reward, small models made on the spot, and the whole job on it."""
    from prefsel.demo import run_demo
    from prefsel.progress import Progress

    run_demo(workspace, seed=seed, progress=Progress(), config_file=config)


@app.command()
def verify(
    workspace: Workspace, quick: Annotated[bool, typer.Option("--quick", help="sizes and ledgers only")] = False
) -> None:
    """Re-read every artifact against its ledger."""
    from prefsel.workspace.storage import Storage
    from prefsel.workspace.verify import verify as check

    storage = Storage(workspace)
    if not storage.exists("catalog.json"):
        raise UserError(f"--workspace: {redact(workspace)!r} is not a workspace: it holds no catalog.json")
    result = check(storage, quick=quick)
    for finding in result.findings:
        typer.echo(str(finding))
    state = "clean" if result.is_clean else "NOT CLEAN"
    typer.echo(
        f"verify: {state}: {result.artifacts:,} artifacts, {result.shards:,} shards, {result.rows:,} rows, "
        f"{result.bytes / 2**20:,.1f} MiB; {result.retried:,} shards begun more than once"
    )
    if not result.is_clean:
        raise PrefselError("verify: the workspace does not match its ledgers")


@app.command()
def explain(
    pair_id: Annotated[str, typer.Argument(help="32 hex digits, or their beginning")], workspace: Workspace
) -> None:
    """Print every number and percentile that decided about a pair."""
    from prefsel.report.explain import explain_pair
    from prefsel.workspace.storage import Storage

    for line in explain_pair(Storage(workspace), pair_id):
        typer.echo(line)


@app.command()
def selftest(config: ConfigFile, overrides: Set = []) -> None:  # noqa: B006
    """Score the first groups of the data in every way that must agree; names the cause where a model does not."""
    from prefsel.check import check
    from prefsel.configfile import load_config
    from prefsel.progress import Progress
    from prefsel.selftest import lines, require_agreement
    from prefsel.selftest import selftest as check_models
    from prefsel.workspace.storage import Storage

    settings = load_config(config, overrides)
    with tempfile.TemporaryDirectory() as no_workspace:
        check(settings, Storage(no_workspace))
    checks = check_models(settings, Progress())
    for line in lines(checks):
        typer.echo(line)
    require_agreement(checks)


@app.command("config-schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration file, rules and metric parameters included."""
    from prefsel.config_schema import full_schema

    typer.echo(json.dumps(full_schema(), indent=1))


def guarded(call: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run a command; a known error becomes one message and its exit code, an unknown one keeps its traceback."""
    try:
        call(args=arguments, standalone_mode=False)
    except PrefselError as error:
        print(f"prefsel: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except CommandLineError as error:
        error.show()
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 1
    return 0


def main() -> None:
    """The console script."""
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
