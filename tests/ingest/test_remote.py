"""A hub or an object store that does not give a source: one message for each cause, from real servers and clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prefsel.errors import PrefselError, UserError
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.remote import reachable, reached

ANSWERS = {
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this data set is restricted."}),
    "private": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}),
    "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "missing": (404, {"X-Error-Code": "RepoNotFound"}),
    "broken": (500, {}),
    "throttled": (429, {}),
}
"""What a hub answers by the organisation asked for: status and headers, as the hub's client reads them."""


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers = next((answer for name, answer in ANSWERS.items() if f"/{name}" in self.path), (404, {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


ASK = """
import json, sys
from prefsel.errors import PrefselError
from prefsel.ingest.identity import file_digest
from prefsel.ingest.readers import list_files
found = {}
for uri in json.loads(sys.argv[1]):
    try:
        found[uri] = [file_digest(one) for one in list_files(uri)]
    except PrefselError as error:
        found[uri] = [error.exit_code, str(error)]
print(json.dumps(found))
"""


def told(uris: list[str], **environment: str) -> dict[str, tuple[int, str]]:
    """Exit code and message by source; the hub's client reads its endpoint when it is imported, so in a new process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(uris)],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {uri: (found[0], found[1]) for uri, found in json.loads(done.stdout.splitlines()[-1]).items()}


def test_the_hub_gives_one_message_for_each_cause(endpoint: str) -> None:
    uris = [
        f"{form.format(name)}"
        for name in ANSWERS
        for form in ("datasets:{}/set/train", "hf://datasets/{}/set/a.parquet")
    ]
    found = told(uris, HF_ENDPOINT=endpoint)
    expected = {
        "gated": (2, "is gated: accept its conditions on its page, then set HF_TOKEN"),
        "private": (2, "there is none of this name, or it is private; set HF_TOKEN"),
        "token": (2, "is private, or the credentials do not allow reading it"),
        "missing": (2, "there is none of this name"),
        "broken": (1, "its server answers 500"),
        "throttled": (1, "its server answers 429"),
    }
    for uri, (code, message) in found.items():
        name = next(one for one in ANSWERS if f"{one}/" in uri)
        assert (code, expected[name][1] in message) == (expected[name][0], True), message
        assert message.startswith(f"source: {uri!r}")
        assert "\n" not in message


def test_a_hub_out_of_reach_and_offline_mode() -> None:
    uris = ["datasets:org/set/train", "hf://datasets/org/set/a.parquet"]
    for code, message in told(uris, HF_ENDPOINT="http://127.0.0.1:9").values():
        assert (code, "its server could not be reached" in message) == (1, True), message
    for code, message in told(uris, HF_HUB_OFFLINE="1").values():
        assert (code, "HF_HUB_OFFLINE is set, so the hub is not asked" in message) == (2, True), message


def test_a_store_out_of_reach_is_named_and_its_secrets_are_not() -> None:
    with pytest.raises(PrefselError, match="its server could not be reached") as caught:
        list_files("s3://key:topsecret@bucket/a.jsonl?endpoint_override=127.0.0.1:9&scheme=http")
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermissionError("AWS Error ACCESS_DENIED during HeadObject"), UserError, "is private, or the credentials"),
        (OSError("AWS Error NO_SUCH_BUCKET during HeadObject"), UserError, "there is none of this name"),
        (ConnectionResetError("connection lost"), PrefselError, "its server could not be reached"),
        (TimeoutError("timed out"), PrefselError, "its server could not be reached"),
    ],
)
def test_what_a_store_says(error: Exception, kind: type[PrefselError], message: str) -> None:
    def rows() -> Iterator[int]:
        yield 1
        raise error

    read = reached("s3://bucket/a.jsonl", rows())
    assert next(read) == 1
    with pytest.raises(PrefselError, match=message) as caught:
        next(read)
    assert type(caught.value) is kind


def test_a_fault_of_the_code_stays_what_it_is() -> None:
    with pytest.raises(KeyError), reachable("s3://bucket/a.jsonl"):
        raise KeyError("ours")


def test_a_local_file_that_may_not_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match="no file at"):
        list(read_rows(str(tmp_path / "none.jsonl"), max_row_bytes=1 << 20))
    with pytest.raises(UserError, match="permission to read it is denied"), reachable("/rows.jsonl"):
        raise PermissionError(13, "Permission denied")
