"""Uploads to a hub of this machine, which fails as it is told: a repository has all files of an export or none."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from megatron_itt.cli import main
from megatron_itt.data.text.http_file import RetryPolicy
from megatron_itt.errors import ExportError
from megatron_itt.hf.hub import check_hub, push_folder

NAME = "me/itt-tiny"
QUICK = RetryPolicy(attempts=3, first_wait_s=0.01)


class FakeHub(ThreadingHTTPServer):
    """Repositories as files by name; `failures` are (part of a request line, status), each used once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: list[tuple[str, int]] = []
        self.log: list[str] = []
        self.commits = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _answer(self, body: bytes) -> None:
        hub, line = self.server, f"{self.command} {self.path.partition('?')[0]}"
        hub.log.append(line)
        failure = next((each for each in hub.failures if each[0] in line), None)
        if failure is not None:
            hub.failures.remove(failure)
            self._reply({"error": "told to fail"}, failure[1])
        elif line == f"GET /api/models/{NAME}" and NAME not in hub.files:
            self._reply({"error": "Repository not found"}, 404)
        elif self.path.startswith("/blobs/"):
            hub.blobs[self.path.split("/")[-1]] = body
            self._reply({})
        elif line.endswith("/commit/main"):
            self._reply(self._commit(body))
        else:
            self._reply(self._route(line, json.loads(body) if body.startswith(b"{") else None))

    def _route(self, line: str, given: Any) -> Any:
        hub = self.server
        if line.endswith("/whoami-v2"):
            return {"name": "me", "type": "user"}
        if line.endswith("/repos/create"):
            name = f"{given['organization']}/{given['name']}"
            hub.files.setdefault(name, {})
            hub.visibility.setdefault(name, given["visibility"])
            return {"url": f"{hub.address}/{name}"}
        if line.endswith("/validate-yaml"):
            return {"errors": [], "warnings": []}
        if line.endswith("/tree/main"):
            return [{"type": "file", "path": path, "size": 1, "oid": "0"} for path in hub.files[NAME]]
        if line.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in given["files"]]
            return {
                "files": [
                    {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False}
                    for path in paths
                ]
            }
        if line.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.address}/blobs/{each['oid']}"}}}
                for each in given["objects"]
            ]
            return {"transfer": "basic", "objects": objects}
        if line == f"GET /api/models/{NAME}":
            return {"id": NAME, "sha": "0" * 40}
        assert line.endswith("/settings"), line
        hub.visibility[NAME] = given.get("visibility") or ("private" if given["private"] else "public")
        return {}

    def _commit(self, body: bytes) -> Any:
        hub = self.server
        files = hub.files[NAME]
        for each in map(json.loads, body.decode().splitlines()):
            value = each["value"]
            if each["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
            elif each["key"] == "deletedFile":
                del files[value["path"]]
        hub.commits += 1
        return {"commitUrl": f"{hub.address}/{NAME}/commit/{hub.commits:040x}", "commitOid": f"{hub.commits:040x}"}

    def _reply(self, content: Any, status: int = 200) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)  # as HF_ENDPOINT sets it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # large files over plain HTTP
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of an export, as far as a hub sees them."""
    export = tmp_path / "hf"
    export.mkdir()
    contents = {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n", "model.safetensors": bytes(999)}
    for name, content in contents.items():
        (export / name).write_bytes(content)
    return export


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_is_one_commit_of_a_private_repository_until_it_is_complete(hub: FakeHub, folder: Path) -> None:
    assert push_folder(folder, NAME, policy=QUICK) == f"{hub.address}/{NAME}"
    assert (hub.files[NAME], hub.commits, hub.visibility[NAME]) == (contents(folder), 1, "private")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    push_folder(folder, NAME, public=True, policy=QUICK)
    assert (hub.files[NAME], hub.commits, hub.visibility[NAME]) == (contents(folder), 2, "public")
    assert hub.log[-1].endswith("/settings")  # public after the commit


def test_failures_that_pass_are_retried(hub: FakeHub, folder: Path) -> None:
    hub.failures = [("/whoami-v2", 503), ("/repos/create", 502), ("/commit/", 500), ("/commit/", 429)]
    check_hub(NAME, policy=QUICK)
    push_folder(folder, NAME, policy=QUICK)
    assert not hub.failures
    assert (hub.files[NAME], hub.commits) == (contents(folder), 1)
    oid = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert hub.log.count(f"PUT /blobs/{oid}") >= 1


@pytest.mark.parametrize("place", ["/repos/create", "/preupload/", "PUT /blobs/", "/commit/"])
def test_an_upload_that_fails_leaves_no_file_and_can_be_continued(
    hub: FakeHub, folder: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failures = [(place, 403)]
    command = ["export", "--output", str(folder), "--push-to-hub", NAME]
    assert main(command) != 0
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and f"itt export --output {folder} --push-to-hub {NAME}" in error
    assert hub.files.get(NAME, {}) == {} and hub.visibility.get(NAME, "private") == "private"
    assert main(command) == 0
    assert hub.files[NAME] == contents(folder)


def test_what_cannot_be_uploaded_is_refused_before_an_export(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["export", "--output", str(tmp_path / "none"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "--checkpoint is missing" in refused()
    assert "--public belongs to --push-to-hub" in refused("--public", "--checkpoint", "run")
    assert "nothing can be uploaded to a/b/c" in refused("--checkpoint", "run", "--push-to-hub", "a/b/c")
    assert "has no config.json" in refused("--push-to-hub", NAME)
    hub.failures = [("/whoami-v2", 401)]
    assert f"nothing can be uploaded to {NAME}" in refused("--checkpoint", "run", "--push-to-hub", NAME)
    hub.server_close()
    with pytest.raises(ExportError, match="nothing can be uploaded"):
        check_hub(NAME, policy=QUICK)
    assert not (tmp_path / "none").exists()
