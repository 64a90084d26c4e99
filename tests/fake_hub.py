"""A Hugging Face hub on this machine: the few answers that the real client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Repositories by their id, each a list of commits, the newest one last.

    Attributes:
      repos: of every repository and commit, the files.
      tags: commits by repository and tag.
      gated: repositories that want a login.
      down: whether every answer is an error of the hub.
      asked: method and path of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.down = False
        self.asked: list[tuple[str, str]] = []

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """A new commit; returns its hash."""
        commits = self.repos.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()  # noqa: S324
        commits[commit] = files
        return commit

    def downloaded(self) -> set[str]:
        """Names of the files that were fetched."""
        return {path.rsplit("/", 1)[1] for method, path in self.asked if "/resolve/" in path}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        if self.down:
            return 500, {}, b"the disk of the hub is full"
        path = path.split("?")[0]
        words = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(words[:2]), words[2:]
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commits = self.repos[repo]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.tags.get((repo, revision), revision)
        if revision == "main":
            commit = list(commits)[-1]
        if commit not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = commits[commit]
        if path.startswith("/api/"):
            if rest[:1] == ["tree"]:
                return 200, {}, json.dumps([_entry(*file) for file in files.items()]).encode()
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
            return 200, {}, json.dumps(info).encode()
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        content = files["/".join(rest[2:])]
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit}
        return 200, headers, content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _digest(content)[:40]}


@contextmanager
def serving() -> Iterator[tuple[FakeHub, str]]:
    """A hub, and its address."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append((self.command, self.path))
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
