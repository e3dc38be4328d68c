"""A stand-in for Cloud Storage: its JSON API over HTTP, with objects in memory.

It has the rules of an object store: an object appears whole, nothing is appended to,
there are no folders, and a change can require the generation that it replaces. Of the
API it has what gcsfs and TensorStore use.
"""

import base64
import contextlib
import datetime
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)$")


class Store:
    """The objects of one bucket; `requests` are the methods and paths that arrived."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.objects: dict[str, bytes] = {}
        self.numbers: dict[str, list[int]] = {}  # generation and metageneration
        self.changed: dict[str, float] = {}  # the time of the last change
        self.sessions: dict[str, bytes] = {}  # uploads that are not complete
        self.requests: list[str] = []
        self.refuses = ""  # answers 403 to changes of names that contain this text
        self.lock = threading.RLock()
        self._made = 0

    def put(self, name: str, data: bytes) -> dict[str, str]:
        self._made += 1
        self.objects[name] = data
        self.numbers[name] = [self._made, 1]
        self.changed[name] = time.time()
        return self.describe(name)

    def describe(self, name: str) -> dict[str, str]:
        generation, metageneration = self.numbers[name]
        changed = datetime.datetime.fromtimestamp(self.changed[name], datetime.UTC)
        when = changed.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        digest = base64.b64encode(hashlib.md5(self.objects[name]).digest()).decode()
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.bucket,
            "size": str(len(self.objects[name])),
            "generation": str(generation),
            "metageneration": str(metageneration),
            "md5Hash": digest,
            "timeCreated": when,
            "updated": when,
        }

    def list(self, prefix: str, delimiter: str) -> dict[str, list]:
        items, folders = [], {}
        for name in sorted(self.objects):
            if not name.startswith(prefix):
                continue
            inner, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                folders[prefix + inner + delimiter] = None
            else:
                items.append(self.describe(name))
        return {"items": items, "prefixes": list(folders)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client needs no answer
            self.wfile.write(body)

    def answer_json(self, value: object, **headers: str) -> None:
        text = json.dumps(value).encode()
        self.answer(200, text, Content_Type="application/json", **headers)

    def serve(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.store.lock:
            self.store.requests.append(f"{self.command} {unquote(self.path)}")
            self.route(url.path.removeprefix("/download"), query, body)

    def route(self, path: str, query: dict[str, str], body: bytes) -> None:
        store, found = self.store, _OBJECT.fullmatch(path)
        bucket = re.search(r"/b/([^/]+)", path)
        if bucket is None or unquote(bucket[1]) != store.bucket:
            return self.answer(404, b'{"error": {"message": "no such bucket"}}')
        name = unquote(found[2]) if found else query.get("name", "")
        if path.startswith("/upload/"):
            return self.upload(name, query, body)
        if path.endswith("/o"):
            listed = store.list(query.get("prefix", ""), query.get("delimiter", ""))
            return self.answer_json(listed)
        if moved := re.fullmatch(r".*/o/([^/]+)/moveTo/o/([^/]+)", path):
            old, new = map(unquote, moved.groups())
            return self.answer_json(store.put(new, store.objects.pop(old)))
        if found is None:
            return self.answer_json({"name": store.bucket, "kind": "storage#bucket"})
        if name not in store.objects:
            return self.answer(404)
        self.answer_for(name, query)

    def answer_for(self, name: str, query: dict[str, str]) -> None:
        store = self.store
        if self.command == "GET" and query.get("alt") == "media":
            return self.download(name)
        if self.command == "GET":
            return self.answer_json(store.describe(name))
        if not self.may_change(name, query):
            return None
        if self.command == "DELETE":
            del store.objects[name]
            return self.answer(204)
        store.numbers[name][1] += 1  # PATCH: its metadata alone
        store.changed[name] = time.time()
        return self.answer_json(store.describe(name))

    def may_change(self, name: str, query: dict[str, str]) -> bool:
        there = self.store.numbers[name][0] if name in self.store.objects else 0
        if self.store.refuses and self.store.refuses in name:
            self.answer(403, b'{"error": {"message": "storage.objects denied"}}')
            return False
        if int(query.get("ifGenerationMatch", there)) != there:
            self.answer(412)
            return False
        return True

    def upload(self, name: str, query: dict[str, str], body: bytes) -> None:
        if "session" in query:
            return self.continue_upload(name, query["session"], body)
        if query["uploadType"] == "resumable":
            self.store.sessions[number := str(len(self.store.sessions))] = b""
            place = f"http://{self.headers['Host']}{self.path}&session={number}"
            return self.answer(200, Location=place)
        if query["uploadType"] == "multipart":
            head, body = body.split(b"Content-Type: ", 2)[1:]
            name = json.loads(head[head.index(b"{") : head.rindex(b"}") + 1])["name"]
            body = body.split(b"\n\n", 1)[1].removesuffix(b"\n--==0==--")
        if not self.may_change(name, query):
            return
        made = self.store.put(name, body)
        self.answer_json(made, x_goog_generation=made["generation"])

    def continue_upload(self, name: str, session: str, body: bytes) -> None:
        sessions = self.store.sessions
        sessions[session] += body
        if self.headers["Content-Range"].endswith("*"):
            return self.answer(308, Range=f"bytes=0-{len(sessions[session]) - 1}")
        self.answer_json(self.store.put(name, sessions.pop(session)))

    def download(self, name: str) -> None:
        data, generation = self.store.objects[name], self.store.numbers[name][0]
        headers = {"x_goog_generation": str(generation)}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(asked[1])
            end = min(int(asked[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return self.answer(416)
            place = f"bytes {start}-{end}/{len(data)}"
            return self.answer(
                206, data[start : end + 1], Content_Range=place, **headers
            )
        self.answer(200, data, **headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve


@contextlib.contextmanager
def serving(bucket: str) -> Iterator[tuple[str, Store]]:
    """The address of a server with one empty bucket, and what it stores."""
    store = Store(bucket)
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
