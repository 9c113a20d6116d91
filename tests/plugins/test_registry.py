"""Objects from other packages: found by name, refused where they do not fit, named in recipes by their code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from packages import METRIC, install, write

from prefsel.config import DpoOptions, FormatOptions, Options
from prefsel.config.file import parse_config
from prefsel.config.losses import LOSSES, Loss
from prefsel.errors import UserError
from prefsel.ingest.formats import FORMATS, Example
from prefsel.ingest.rows import RawRow
from prefsel.ingest.windows import ingest_windows
from prefsel.metrics import METRICS, Metric, score_table
from prefsel.metrics.table import find_metric
from prefsel.plugins import register_format, register_loss, register_metric, registry
from prefsel.plugins.failures import prepared
from prefsel.train.losses import dpo_loss

TABLE = pa.table({"rm_gold_chosen": [1.0, 5.0, None], "rm_gold_rejected": [0.0, 2.0, 1.0]})


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, and what is registered and imported from it forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before, kept = set(sys.modules), {kind: dict(known) for kind, known in registry._REGISTERED.items()}
    monkeypatch.setattr(registry, "_LOADED", {})
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    for kind, known in kept.items():
        registry._REGISTERED[kind].clear()
        registry._REGISTERED[kind].update(known)
    registry._loaded_entry.cache_clear()


class Bare(Options):
    rm: str


def bare(name: str = "bare", **changes: Any) -> Metric:
    parts = {"name": name, "params": Bare, "columns": lambda params: ("x",), "paper": ""}
    return Metric(**(parts | {"score": lambda columns, params, fitted: columns["x"]} | changes))


def test_a_metric_of_an_installed_package(elsewhere: Path) -> None:
    write(elsewhere, "centred_metric", METRIC)
    install(elsewhere, "centred", {"prefsel.metrics": {"centred": "centred_metric:METRIC"}})
    assert "centred" in METRICS
    assert "centred" in list(METRICS)
    assert "centred_metric" not in sys.modules  # listing names imports nothing
    scores = score_table(TABLE, "centred", rm="gold", factor=2.0)
    assert np.array_equal(scores, [2.0 * (1 - 2), 2.0 * (3 - 2), np.nan], equal_nan=True)
    with pytest.raises(
        UserError, match=r"metric centred: facto: unknown key; did you mean 'factor'\? valid: factor, rm"
    ):
        score_table(TABLE, "centred", rm="gold", facto=2.0)
    with pytest.raises(UserError, match=r"metric: got 'centered'; did you mean 'centred'"):
        score_table(TABLE, "centered", rm="gold")
    assert METRICS["random"] is METRICS.builtin["random"]
    assert set(METRICS) - set(METRICS.builtin) == {"centred"}


def test_what_a_notebook_registers(elsewhere: Path) -> None:
    register_metric(bare())
    assert score_table({"x": [2.0]}, "bare", rm="").tolist() == [2.0]
    register_metric(bare())  # a cell that is run again


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda params: None, r"metric '\?' \(registered by test_registry\): got a function <lambda>: it has no name"),
        (Bare, "got a class Bare: it has no .*valid: what `prefsel.plugins.MetricContract` describes"),
        (bare(score=lambda columns: None), r"got Metric: score must be callable with \(columns, params, fitted\)"),
        (bare(columns=None), r"columns must be callable with \(params\)"),
        (bare(params=dict), "params: got <class 'dict'>; valid: a subclass of prefsel.config.Options"),
        (bare("random"), "metric 'random': several things have this name: built in; registered by test_registry"),
    ],
)
def test_a_wrong_metric(elsewhere: Path, wrong: Any, told: str) -> None:
    def registered() -> None:
        register_metric(wrong)
        score_table({"x": [1.0]}, "random")  # a name of this package is refused where it is asked for

    with pytest.raises(UserError, match=told):
        registered()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (dpo_loss, "loss 'mine' .* got a function dpo_loss: it has no function"),
        (Loss(dpo_loss, columns=("margin",)), "columns: got margin; valid: preference_divergence, aspect_weight"),
    ],
)
def test_a_wrong_loss(elsewhere: Path, wrong: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        register_loss("mine", wrong)


@pytest.mark.parametrize("wrong", [None, {"question": "prompt"}, lambda row: None])
def test_a_wrong_format(elsewhere: Path, wrong: Any) -> None:
    told = r"format 'mine' .*must be callable with \(row, options\)|format 'mine' .*it has no __call__"
    with pytest.raises(UserError, match=told):
        register_format("mine", wrong)


def test_two_packages_with_one_name(elsewhere: Path) -> None:
    write(elsewhere, "centred_metric", METRIC)
    for package in ("centred", "other"):
        install(elsewhere, package, {"prefsel.metrics": {"centred": f"{package}_metric:METRIC"}})
    told = (
        r"metric 'centred': several things .*entry point centred_metric:METRIC of centred 1.0; .* of other 1.0; rename"
    )
    with pytest.raises(UserError, match=told):
        find_metric("centred", {"rm": "gold"})
    assert score_table({"pair_id": [1]}, "random").shape == (1,)  # others are not in the way of it


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "import no_such_module",
            r"metric 'mine' \(entry point mine:METRIC of mine 1.0\): cannot be imported: No",
        ),
        ("OTHER = 1", "cannot be imported: .*METRIC"),
        ("METRIC = 1", "got int: it has no name"),
        (METRIC, "got Metric: its own name is 'centred'"),
    ],
)
def test_a_broken_package(elsewhere: Path, code: str, told: str) -> None:
    write(elsewhere, "mine", code)
    install(elsewhere, "mine", {"prefsel.metrics": {"mine": "mine:METRIC"}})
    with pytest.raises(UserError, match=told):
        find_metric("mine", {})


BASE: dict[str, Any] = {"name": "x", "sources": [{"name": "uf", "paths": ["a.jsonl"]}]}
TRAIN = {"name": "t", "selection": "s", "model": "m", "reference": "m", "learning_rate": 1e-6}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"plugins": ["no_such_module"]},
            "plugins: cannot import 'no_such_module': No module named .*; it must",
        ),
        ({"plugins": "x"}, "plugins: got 'x'"),
        ({"plugins": ["a/b.py"]}, r"plugins: cannot import 'a/b\.py'|plugins.0: got 'a/b.py'"),
        ({"train": [TRAIN | {"loss": "mien"}]}, r"train.t.loss: got 'mien'; did you mean 'mine'\? valid: dpo, "),
        (
            {"train": [TRAIN | {"loss": "mine", "ipo_reduction": "mean"}]},
            "ipo_reduction: got 'mean' with loss 'mine'; only used by ipo",
        ),
        ({"train": [TRAIN | {"loss": "mine"}]}, "divergence: got None; loss 'mine' needs it"),
    ],
)
def test_a_configuration_with_plugins(elsewhere: Path, change: dict[str, Any], told: str) -> None:
    loss = Loss(dpo_loss, options={"label_smoothing": "label_smoothing"}, columns=("preference_divergence",))
    register_loss("mine", loss)
    with pytest.raises(UserError, match=told):
        parse_config(BASE | change)
    fitting = TRAIN | {"loss": "mine", "divergence": "pd", "label_smoothing": 0.1}
    parsed = parse_config(BASE | {"train": [fitting]}).train[0]
    assert isinstance(parsed, DpoOptions)
    assert LOSSES[parsed.loss].parameters(parsed) == {"beta": 0.1, "label_smoothing": 0.1}


# --------------------------------------------------------------------------------------------------------- recipes


def test_the_code_is_part_of_the_recipe(elsewhere: Path) -> None:
    file = write(elsewhere, "centred_metric", METRIC)
    install(elsewhere, "centred", {"prefsel.metrics": {"centred": "centred_metric:METRIC"}})
    before = registry.code_of("metrics", "centred")
    assert list(before) == ["code"]
    assert registry.code_of("metrics", "centred") == before
    file.write_text(file.read_text() + "# another line\n")
    assert registry.code_of("metrics", "centred") != before
    assert all(registry.code_of("metrics", name) == {} for name in METRICS.builtin)


def test_functions_of_other_files_count(elsewhere: Path) -> None:
    """The hash covers the module that registers and those its functions lie in, not where on the disk they are."""
    write(elsewhere, "worker", "def score(columns, params, fitted):\n    return columns['x']\n")
    code = """
        import functools
        from prefsel.config import Options
        from prefsel.metrics import Metric
        from prefsel.plugins import register_metric
        from worker import score

        register_metric(Metric("far", Options, lambda params: ("x",), functools.partial(score), ""))
    """
    write(elsewhere, "registers", code)
    registry.load(["registers"])
    before = registry.code_of("metrics", "far")
    worker = elsewhere / "worker.py"
    worker.write_text(worker.read_text() + "\n")
    assert registry.code_of("metrics", "far") != before


def test_code_without_a_file_has_no_recipe(elsewhere: Path) -> None:
    scope: dict[str, Any] = {"Loss": Loss, "__name__": "typed_in", "register_loss": register_loss, "f": dpo_loss}
    exec("register_loss('typed', Loss(f))", scope)
    with pytest.raises(UserError, match=r"loss 'typed' \(registered by typed_in\): its code lies in no file"):
        registry.code_of("losses", "typed")


def test_a_window_is_named_by_the_code_of_its_format(elsewhere: Path) -> None:
    code = """
        from prefsel.ingest.formats import FORMATS
        from prefsel.plugins import register_format

        def adapt(row, options):
            return FORMATS["prompt_chosen_rejected"](row, options)

        register_format("mine", adapt)
    """
    file = write(elsewhere, "my_format", code)
    registry.load(["my_format"])
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}

    def digest(format: str, **more: Any) -> str:
        rows = iter([RawRow(0, 0, b"raw", row)])
        options = {"file": "f", "options": FormatOptions(), "rows_per_shard": 10}
        (window,) = ingest_windows(rows, format=format, **options, **more)
        assert window.num_accepted == 1
        return window.digest

    before, builtin = digest("mine"), digest("prompt_chosen_rejected")
    prompts = digest("mine", prompts_only=True)
    file.write_text(file.read_text() + "\n")
    assert digest("mine") != before
    assert digest("mine", prompts_only=True) != prompts
    assert digest("prompt_chosen_rejected") == builtin
    assert isinstance(FORMATS["mine"](row, FormatOptions()), Example)


def test_workers_load_what_the_driver_loaded(elsewhere: Path) -> None:
    def work(item: int) -> int:
        return item + 1

    write(elsewhere, "my_module", "COUNT = []\nCOUNT.append(1)\n")
    registry.load(["my_module"])
    assert registry.loaded() == ("my_module",)
    call = prepared(work)
    del sys.modules["my_module"]
    assert call(1) == 2
    assert "my_module" in sys.modules
    assert call.__name__ == "work"  # what Ray shows


@pytest.mark.parametrize("code", ["def broken(:", "raise ValueError('odd')"])
def test_a_module_that_cannot_be_run_is_named(elsewhere: Path, code: str) -> None:
    write(elsewhere, "cannot_be_run", code)
    with pytest.raises(UserError, match="plugins: cannot import 'cannot_be_run': "):
        parse_config(BASE | {"plugins": ["cannot_be_run"]})
