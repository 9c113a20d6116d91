"""A version as commits of a hub: the real client against a server that keeps commits and checks the parent."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from finished_runs import run_again


class Hub(ThreadingHTTPServer):
    """Repositories by kind and name: their files, and their commits, the last one the head."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.commits_before_the_next: str | None = None
        """A repository that somebody else commits to just before the next commit arrives."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *told: Any) -> None:
        pass

    def send(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def repository(self) -> str:
        """`datasets/owner/name` of an address `/api/datasets/owner/name/…`."""
        return "/".join(self.path.split("?")[0].split("/")[2:5])

    def do_GET(self) -> None:
        repo = self.repository()
        if repo not in self.server.files:
            self.send({"error": f"no repository: {self.path}"}, 404)
            return
        files = [{"rfilename": name} for name in self.server.files[repo]]
        self.send({"id": repo.partition("/")[2], "sha": self.server.commits[repo][-1], "siblings": files})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        if self.path.startswith("/api/repos/create"):
            made = json.loads(body)
            repo = f"{made.get('type', 'model')}s/{made.get('organization') or 'me'}/{made['name']}"
            is_there = repo in hub.files
            hub.files.setdefault(repo, {".gitattributes": b""})
            hub.commits.setdefault(repo, ["0" * 40])
            self.send({"url": f"{hub.address}/{repo}"}, 409 if is_there else 200)
        elif self.path == "/api/validate-yaml":
            self.send({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.send({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        else:
            self.commit(hub, self.repository(), [json.loads(line) for line in body.splitlines()])

    def commit(self, hub: Hub, repo: str, lines: list[dict[str, Any]]) -> None:
        if hub.commits_before_the_next == repo:
            hub.commits_before_the_next = None
            hub.commits[repo].append("f" * 40)
        head = next(line["value"] for line in lines if line["key"] == "header")
        if head.get("parentCommit") != hub.commits[repo][-1]:
            self.send({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        for line in lines:
            if line["key"] == "file":
                hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del hub.files[repo][line["value"]["path"]]
        hub.commits[repo].append(f"{len(hub.commits[repo]):040}")
        oid = hub.commits[repo][-1]
        self.send({"commitUrl": f"{hub.address}/{repo}/commit/{oid}", "commitOid": oid, "commitMessage": ""})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def publish(hub: Hub, place: Path, *more: str) -> tuple[int, str]:
    """The real command."""
    told = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", "from prefsel.cli import main; main()", "publish", "top", "-w", str(place)]
    command += ["--to-hub", "me/kept", *more]
    found = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, check=False, timeout=120)
    assert "hf_secret" not in found.stdout + found.stderr
    return found.returncode, found.stdout + found.stderr


REPO = "datasets/me/kept"


def test_a_version_lands_on_the_commit_that_was_seen(hub: Hub, finished: tuple[Path, Path], place: Path) -> None:
    code, told = publish(hub, place)
    assert code == 0, told
    assert f"publish: {hub.address}/{REPO}/commit/{1:040}" in told
    version = place / "published/top/v0001"
    names = {str(file.relative_to(version)) for file in version.rglob("*") if file.is_file()} - {"_ledger/files.json"}
    assert hub.files[REPO] == {".gitattributes": b""} | {name: (version / name).read_bytes() for name in names}

    hub.files[REPO]["data/train-00001-of-00002.parquet"] = b"of an older version"
    run_again(finished, place)
    hub.commits_before_the_next = REPO
    code, told = publish(hub, place)
    assert code == 3, told
    assert "somebody else committed to me/kept (dataset) meanwhile; run again" in told
    assert hub.files[REPO]["README.md"] == (version / "README.md").read_bytes()

    code, told = publish(hub, place)
    assert code == 0, told
    assert "v0002 is current and holds this already" in told
    assert hub.files[REPO]["README.md"] == (place / "published/top/v0002/README.md").read_bytes()
    assert "data/train-00001-of-00002.parquet" not in hub.files[REPO]


def test_a_hub_out_of_reach_is_one_line(place: Path, hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    code, told = publish(hub, place)
    assert code == 1, told
    assert "Traceback" not in told
    assert "prefsel: --to-hub: me/kept (dataset): " in told
