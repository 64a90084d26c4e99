"""As much of the API of Google Cloud Storage as tensorstore uses, over `buckets.FakeBucket`.

So what orbax writes with tensorstore lies in the same bucket as what it and we write with etils.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from buckets import FakeBucket

_OBJECT = re.compile(r"(/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?")
_lock = threading.Lock()
_generations: dict[str, int] = {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        if name is None:
            return self._list(bucket, query)
        content = self._content(bucket, name)
        if content is None:
            return self._answer(404)
        if query.get("alt") != "media":
            return self._answer(200, json.dumps(self._described(bucket, name)).encode())
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if given is None:
            return self._answer(200, content, bucket, name)
        start, end = int(given[1]), int(given[2] or len(content) - 1)
        if start >= len(content):
            return self._answer(416)
        part = content[start : end + 1]
        said = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return self._answer(206, part, bucket, name, **{"Content-Range": said})

    def do_POST(self) -> None:
        bucket, _, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = query["name"]
        with _lock:
            now = self._generation(bucket, name)
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
                return self._answer(412)
            FakeBucket().pipe_file(f"gs://{bucket}/{name}", content)
            _generations[f"/{bucket}/{name}"] = now + 1
        self._answer(200, json.dumps(self._described(bucket, name)).encode())

    def do_DELETE(self) -> None:
        bucket, name, _ = self._asked()
        with _lock:
            if FakeBucket.store.pop(f"/{bucket}/{name}", None) is None:
                return self._answer(404)
        self._answer(204)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        names = sorted(key.removeprefix(f"/{bucket}/") for key in list(FakeBucket.store))
        wanted = [
            name
            for name in names
            if name.startswith(query.get("prefix", ""))
            and name >= query.get("startOffset", "")
            and ("endOffset" not in query or name < query["endOffset"])
        ]
        items = [self._described(bucket, name) for name in wanted]
        self._answer(200, json.dumps({"items": items}).encode())

    def _asked(self) -> tuple[str, str | None, dict[str, str]]:
        address = urlsplit(self.path)
        found = _OBJECT.fullmatch(address.path)
        assert found is not None, self.path
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        return found[2], None if found[3] is None else unquote(found[3]), query

    def _content(self, bucket: str, name: str) -> bytes | None:
        file = FakeBucket.store.get(f"/{bucket}/{name}")
        return None if file is None else file.getvalue()

    def _generation(self, bucket: str, name: str) -> int:
        there = f"/{bucket}/{name}" in FakeBucket.store
        return _generations.get(f"/{bucket}/{name}", 1) if there else 0

    def _described(self, bucket: str, name: str) -> dict[str, str]:
        size = len(self._content(bucket, name) or b"")
        number = str(self._generation(bucket, name))
        return {"name": name, "bucket": bucket, "size": str(size), "generation": number}

    def _answer(
        self, status: int, content: bytes = b"", bucket: str = "", name: str = "", **headers: str
    ) -> None:
        self.send_response(status)
        if name:
            headers["x-goog-generation"] = str(self._generation(bucket, name))
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@functools.cache
def serve() -> None:
    """Let tensorstore find the bucket. It reads the address once, hence one server for good."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"
    # Or it would look for one on the network.
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "anyone"  # noqa: S105
