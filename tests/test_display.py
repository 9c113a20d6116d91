"""What people see: no secrets, nothing that acts on a terminal, and messages of bounded length."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from prefsel import cli, display
from prefsel.config import Config
from prefsel.config.file import parse_config
from prefsel.display import MAX_MESSAGE, message, printable, redact, redacted, say
from prefsel.errors import UserError
from prefsel.progress import Progress
from prefsel.workspace.manifest import config_text, seal
from prefsel.workspace.storage import Storage

SECRET = "5up3rs3cr3tvalue"
HUB = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "text",
    [
        f"s3://KEY:{SECRET}@bucket/x",
        f"s3://KEY:{SECRET}/with@slashes@bucket/x",
        f"s3://b/x?secret_key={SECRET}&region=eu",
        f"https://h/x?X-Amz-Signature={SECRET}&a=1",
        f"https://h/x?sig={SECRET}",
        f"access_token={SECRET}",
        f"password: {SECRET}",
        f'{{"api_key": "{SECRET}", "a": 1}}',
        f"hf_token: '{SECRET}'",
        f"Authorization: Bearer {SECRET}",
        f"curl -H 'Bearer {SECRET}'",
    ],
)
def test_secrets_are_taken_out_and_the_rest_stays(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("text", [HUB, "ghp_" + "x" * 36, "AKIA" + "A1" * 8, "eyJ" + "a" * 20 + "." + "b" * 20 + ".cc"])
def test_tokens_are_known_by_their_shape(text: str) -> None:
    assert redact(f"got {text!r}; valid: none") == "got '***'; valid: none"


def test_secrets_of_the_environment_are_known_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redact(f"a line with {SECRET} in it, abc") == "a line with *** in it, abc"


@pytest.mark.parametrize(
    "text",
    [
        "batch_tokens: 4096",
        "token_budget: 77",
        "tokenizer: bpe",
        "max_new_tokens: 9",
        "s3://bucket/x",
        "12 tokens: a b",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_what_acts_on_a_terminal_is_shown_as_its_escape() -> None:
    text = "a\x1b[2J\x9b1m\x07\r\x00\u202eb\ud800\n\tü日本🎉"
    assert printable(text) == "a\\x1b[2J\\x9b1m\\x07\\r\\x00\\u202eb\\ud800\n\tü日本🎉"


def test_a_long_message_keeps_its_ends_and_costs_little() -> None:
    short = "x" * MAX_MESSAGE
    assert message(short) == short
    cut = message("begin " + "m" * 5_000 + " end")
    assert len(cut) <= MAX_MESSAGE
    assert cut.startswith("begin m")
    assert cut.endswith("m end")
    assert "5,010 characters, cut here" in cut
    for text in ("a://" * 10**6, "token" * 10**6, "_a" * 10**6, "\x1b" * 10**6):
        began = time.monotonic()
        assert len(message(text)) <= MAX_MESSAGE
        assert time.monotonic() - began < 5


def test_lines_of_a_run_and_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().line(f"[b]source[/b] \x1b]0;title\x07 s3://K:{SECRET}@b")
    say(f"\x1b[2J {HUB}")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert SECRET not in out
    assert HUB not in out
    assert "[b]source[/b]" in out


def test_an_error_of_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError(f"\x1b[2J s3://K:{SECRET}@b " + "x" * 5_000)

    monkeypatch.setattr("prefsel.environment.lines", fail)
    assert cli.guarded(cli.app, ["env"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("prefsel: \\x1b[2J s3://***@b")
    assert len(told) <= MAX_MESSAGE + len("prefsel: \n")


def test_a_traceback_of_the_command_line_holds_no_secret() -> None:
    """Of a fault that nobody foresaw, in the program as it is started."""
    code = (
        "import prefsel.environment as e, prefsel.cli as c, sys\n"
        "def lines(): raise KeyError('s3://K:' + 'sec' + 'ret@b \\x1b[2J')\n"
        "e.lines = lines; sys.argv = ['prefsel', 'env']; c.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError" in done.stderr
    assert "K:secret" not in done.stderr
    assert "\x1b" not in done.stderr


def config() -> Config:
    return parse_config({"name": "t", "sources": [{"name": "s", "paths": [f"s3://K:{SECRET}@b/x?token={SECRET}"]}]})


def test_a_workspace_keeps_no_secret(tmp_path: Path) -> None:
    text = config_text(config())
    assert SECRET not in text
    assert yaml.safe_load(text)["sources"][0]["paths"] == ["s3://***@b/x?token=***"]
    path = seal(Storage(str(tmp_path)), "r", {"config_yaml": text, "stages": [{"uri": HUB, "api_key": SECRET}], "n": 1})
    kept = (tmp_path / path).read_text()
    assert SECRET not in kept
    assert HUB not in kept
    assert json.loads(kept)["config_yaml"] == text  # what `open` finds the run by
    assert redacted({"a": [f"Bearer {SECRET}"], "password": "x", "n": None, 1: 2}) == {
        **{"a": ["Bearer ***"], "password": "***", "n": None, 1: 2},
    }


def test_a_fault_is_shown_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        raise ValueError(f"\x1b[2J {HUB}")
    except ValueError as error:
        display.show_fault(type(error), error, error.__traceback__)
    assert "ValueError: \\x1b[2J ***" in stream.getvalue()
