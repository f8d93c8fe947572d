"""A Hub of one's own on the loopback: the part of the Hub's HTTP API that `huggingface_hub` uploads and loads by.

Repositories are kept in memory. Files above a size go by Git LFS, and above another in parts; both sizes are given,
so that small test files do what large ones do. A connection can be cut in the middle of a body, either way.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "Loopback" * 4 + "Xy"
"""The one that it lets in."""

SECONDS = 30
"""After which a silent connection is closed, so that nothing waits for ever."""


@dataclass
class Stored:
    """A file of a commit: its bytes, or the name of the LFS object that has them."""

    content: bytes = b""
    lfs: str | None = None


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[tuple[str, dict[str, Stored]]]]  # commits: (hash, path -> file)

    def commit_of(self, revision):
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for commits in self.branches.values() for commit in commits if commit[0] == revision), None)


@dataclass
class Cut:
    """A connection that breaks in the middle of a body.

    Args:
        method: Of the request.
        path: Pattern in its path.
        after: Bytes of the body that pass before.
        times: How often; then it holds.
    """

    method: str
    path: str
    after: int
    times: int = 1


@dataclass
class LoopbackHub:
    """The server and what it has seen; a context manager that stops it.

    Args:
        token: The one that may write, and read what is private.
        lfs_from: Bytes from which a file goes by LFS.
        parts_of: Bytes of a part; what is larger is uploaded in parts.
        readers: Tokens that may read and not write.
        refusal: What the server says to a wrong token.

    Attributes:
        requests: (method, path) of each, in order.
        ranges: `Range` headers of the downloads.
        received: (object, part, bytes) of each LFS upload that arrived whole.
        cuts: Connections to break.
    """

    token: str
    lfs_from: int = 4096
    parts_of: int = 1 << 30
    readers: tuple[str, ...] = ()
    refusal: str = "Invalid username or password."
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    received: list[tuple[str, int, int]] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)

    def __enter__(self):
        hub = self

        class BoundHandler(Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def take_cut(self, method, path):
        for cut in self.cuts:
            if cut.times and cut.method == method and re.search(cut.path, path):
                cut.times -= 1
                return cut.after
        return None

    def files(self, repo_id, revision="main"):
        """Path -> bytes of a repository's files."""
        tree = self.repos[repo_id].commit_of(revision)[1]
        return {path: self.content(stored) for path, stored in tree.items()}

    def content(self, stored):
        return self.objects[stored.lfs] if stored.lfs else stored.content

    def commits(self, repo_id, revision="main"):
        return len(self.repos[repo_id].branches[revision])


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SECONDS
    disable_nagle_algorithm = True  # a body after its headers would wait for the client's acknowledgement
    server_hub: LoopbackHub

    ROUTES = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "lfs_put"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
    OPEN = ("lfs_put", "lfs_complete", "resolve", "model_info", "tree")  # signed, or checked where private

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def answer_request(self):
        hub, url = self.server_hub, urlsplit(self.path)
        path = url.path
        self.query = parse_qs(url.query)
        hub.requests.append((self.command, path))
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if self.command not in methods.split("|") or match is None:
                continue
            values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            body = self.read_body(hub.take_cut(self.command, path) if self.command == "PUT" else None)
            if body is None:
                return self.cut()
            if name not in self.OPEN and not self.authorized():
                return self.refuse()
            return getattr(self, name)(body, **values)
        return self.send(404, {"error": f"this Hub does not speak {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def read_body(self, cut_after):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if cut_after is not None and sum(map(len, parts)) >= cut_after:
                    return None
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length", 0))
        if cut_after is not None:
            self.rfile.read(min(cut_after, length))
            return None
        return self.rfile.read(length)

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def authorized(self):
        return self.headers.get("Authorization") == f"Bearer {self.server_hub.token}"

    def refuse(self):
        if self.headers.get("Authorization", "").removeprefix("Bearer ") in self.server_hub.readers:
            return self.send(403, {"error": "You have no rights here."})
        return self.send(401, {"error": self.server_hub.refusal})

    def missing(self, code):
        return self.send(404, {"error": code}, {"X-Error-Code": code})

    def send(self, status, value, headers=None, content_type="application/json"):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": content_type,
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            size = self.server_hub.take_cut("GET", self.path) if self.command == "GET" else None
            self.wfile.write(content[:size])
            if size is not None:
                self.wfile.flush()
                self.cut()

    # Uploading.

    def create_repo(self, body):
        wanted, hub = json.loads(body), self.server_hub
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        url = {"url": f"{hub.endpoint}/{repo_id}"}
        if repo_id in hub.repos:
            return self.send(409, {"error": "You already created this model repo", **url})
        attributes = {".gitattributes": Stored(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        hub.repos[repo_id] = Repo(wanted.get("visibility") == "private", {"main": [("0" * 40, attributes)]})
        return self.send(200, url)

    def validate_yaml(self, body):
        block = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        values = yaml.safe_load(block[1]) if block else {}
        if values.get("model-index") and not all(result["metrics"] for result in values["model-index"][0]["results"]):
            return self.send(400, {"errors": [{"message": "model-index without metrics"}]})
        return self.send(200, {"errors": [], "warnings": []})

    def preupload(self, body, repo, revision):
        hub = self.server_hub
        if repo not in hub.repos or (commit := hub.repos[repo].commit_of(revision)) is None:
            return self.missing("RepoNotFound" if repo not in hub.repos else "RevisionNotFound")
        answers = []
        for file in json.loads(body)["files"]:
            stored = commit[1].get(file["path"])
            is_lfs = file["size"] >= hub.lfs_from
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if stored is not None:
                answer["oid"] = stored.lfs or git_hash(stored.content)
            answers.append(answer)
        return self.send(200, {"files": answers})

    def lfs_batch(self, body, repo):
        hub, objects = self.server_hub, []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            if oid not in hub.objects:
                url = f"{hub.endpoint}/lfs/{oid}"
                upload = {"href": url}
                if size > hub.parts_of:
                    parts = {str(n + 1): f"{url}/{n + 1}" for n in range(ceil(size / hub.parts_of))}
                    upload = {"href": f"{url}/complete", "header": {"chunk_size": str(hub.parts_of), **parts}}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
            objects.append(wanted)
        return self.send(200, {"transfer": "multipart", "objects": objects})

    def lfs_put(self, body, oid, part="0"):
        hub = self.server_hub
        hub.received.append((oid, int(part), len(body)))
        if part == "0":
            if hashlib.sha256(body).hexdigest() != oid:
                return self.send(400, {"error": "the content is not the object's"})
            hub.objects[oid] = body
        else:
            hub.parts[oid, int(part)] = body
        return self.send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def lfs_complete(self, body, oid):
        hub, parts = self.server_hub, json.loads(body)["parts"]
        content = b"".join(hub.parts[oid, part["partNumber"]] for part in parts)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.send(400, {"error": "the parts are not the object's"})
        hub.objects[oid] = content
        return self.send(200, {})

    def lfs_verify(self, body, oid):
        wanted = json.loads(body)
        good = len(self.server_hub.objects.get(oid, b"")) == wanted["size"]
        return self.send(200 if good else 404, {} if good else {"error": "no such object"})

    def branch(self, body, repo, revision):
        branches = self.server_hub.repos[repo].branches
        if revision in branches:
            return self.send(409, {"error": "the branch exists"})
        branches[revision] = list(branches["main"])
        return self.send(200, {})

    def commit(self, body, repo, revision):
        hub = self.server_hub
        commits = hub.repos[repo].branches[revision]
        tree = dict(commits[-1][1])
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                tree[value["path"]] = Stored(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in hub.objects:
                    return self.send(400, {"error": f"{value['path']}: its LFS object was not uploaded"})
                tree[value["path"]] = Stored(lfs=value["oid"])
            elif key == "deletedFile":
                del tree[value["path"]]
        oid = hashlib.sha1(commits[-1][0].encode() + body).hexdigest()
        commits.append((oid, tree))
        url = f"{hub.endpoint}/{repo}/commit/{oid}"
        return self.send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # Loading.

    def readable(self, repo, revision):
        """The commit; None where it was answered that there is none, or none for this reader."""
        found = self.server_hub.repos.get(repo)
        if found is None or (found.private and not self.authorized()):
            self.send(401, {"error": "RepoNotFound"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = found.commit_of(revision)
        if commit is None:
            self.missing("RevisionNotFound")
        return commit

    def model_info(self, body, repo, revision="main"):
        commit = self.readable(repo, revision)
        if commit is None:
            return None
        card = self.server_hub.files(repo, commit[0]).get("README.md", b"").decode()
        block = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        values = {"id": repo, "sha": commit[0], "private": self.server_hub.repos[repo].private, "tags": []}
        values["siblings"] = [{"rfilename": path} for path in commit[1]]
        if block:
            values["cardData"] = yaml.safe_load(block[1])
        return self.send(200, values)

    def tree(self, body, repo, revision, folder=""):
        commit = self.readable(repo, revision)
        if commit is None:
            return None
        entries = []
        for path, stored in commit[1].items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            content = self.server_hub.content(stored)
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if stored.lfs:
                entry["lfs"] = {"oid": stored.lfs, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return self.send(200, entries) if entries or not folder else self.missing("EntryNotFound")

    def resolve(self, body, repo, revision, path):
        commit = self.readable(repo, revision)
        if commit is None:
            return None
        stored = commit[1].get(path)
        if stored is None:
            return self.send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit[0]})
        content = self.server_hub.content(stored)
        headers = {"ETag": f'"{stored.lfs or git_hash(content)}"', "X-Repo-Commit": commit[0], "Accept-Ranges": "bytes"}
        if stored.lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is not None:
            self.server_hub.ranges.append(start[0])
        else:
            return self.send(200, content, headers, "application/octet-stream")
        headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
        return self.send(206, content[int(start[1]) :], headers, "application/octet-stream")
