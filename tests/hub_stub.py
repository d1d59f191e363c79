"""A stand-in Hugging Face Hub for tests: in memory, standard library only.

    with HubStub() as hub:
        run_child(code, **hub.environment(home))

`huggingface_hub` reads its environment once, when it is imported, so its clients run in child processes. The stub
serves what they need to create repositories, commit (regular and LFS files), tag, branch, list and download.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

KIND = r"(?P<kind>models|datasets|spaces)"
REPO = r"(?P<repo>[^/]+/[^/]+?)"
REVISION = r"(?P<revision>[^/]+)"
NOW = "2026-01-01T00:00:00.000Z"

# What a listing says of a file: its `oid`, its `size`, and `lfs` where it is one.
FileInfo = dict[str, Any]


@dataclass
class Commit:
    parent: str | None
    title: str
    files: dict[str, FileInfo]


@dataclass
class Repo:
    """A repository; `branches` and `tags` map names to keys of `commits`."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {})

    def commit(self, branch: str, title: str, files: dict[str, FileInfo]) -> str:
        """Add a commit that holds `files`, and return its name."""
        parent = self.branches.get(branch)
        name = hashlib.sha1(repr((parent, title, sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[name] = Commit(parent, title, files)
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's own name means."""
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        return name if name in self.commits else None


class Refusal(Exception):
    """An answer with an error: status, the Hub's error code, message, further headers."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *args: Any) -> None:
        """Keep test output clean; `HubStub.log` has every request."""

    def reply(self, body: Any = b"", status: int = 200, **headers: Any) -> None:
        """Answer with bytes as they are, and with anything else as JSON."""
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.hub.log.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self) -> None:
        """Find the route of this request and follow it."""
        path = urlsplit(self.path).path
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with self.hub.lock:
                for methods, pattern, function in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in methods:
                        function(self, data, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                        return
            raise Refusal(501, "", f"the stub does not serve {self.command} {path}")
        except Refusal as refusal:
            self.reply({"error": str(refusal)}, refusal.status, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    @property
    def hub(self) -> "HubStub":
        return self.server.hub

    def find(self, kind: str | None, repo: str, revision: str | None = "main") -> tuple[Repo, str]:
        """The repository and the commit, or the refusal that the Hub gives."""
        found = self.hub.repos.get((kind or "models", repo))
        if found is None:
            raise Refusal(404, "RepoNotFound", f"no repository {repo}")
        commit = found.find(revision or "main")
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return found, commit

    def whoami(self, data: bytes) -> None:
        token = {"accessToken": {"role": "write", "displayName": "tests"}}
        self.reply({"type": "user", "name": self.hub.user, "orgs": [], "auth": token})

    def validate_yaml(self, data: bytes) -> None:
        self.reply({"errors": [], "warnings": []})

    def agent_harnesses(self, data: bytes) -> None:
        self.reply({"standardEnvVars": [], "harnesses": {}})

    def create(self, data: bytes) -> None:
        body = json.loads(data)
        kind = body.get("type", "model") + "s"
        repo = f"{body.get('organization') or self.hub.user}/{body['name']}"
        status = 409 if (kind, repo) in self.hub.repos else 200
        self.hub.repos.setdefault((kind, repo), Repo())
        prefix = "" if kind == "models" else kind + "/"
        self.reply({"url": f"{self.hub.url}/{prefix}{repo}", "name": repo}, status)

    def preupload(self, data: bytes, kind: str, repo: str, revision: str) -> None:
        self.find(kind, repo)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= self.hub.lfs_over else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(data)["files"]
        ]
        self.reply({"files": files})

    def lfs_batch(self, data: bytes, repo: str, kind: str | None) -> None:
        objects = json.loads(data)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, data: bytes, oid: str) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(422, "", "not what its name says")
        self.hub.blobs[oid] = data
        self.reply()

    def commit(self, data: bytes, kind: str, repo: str, revision: str) -> None:
        found, parent = self.find(kind, repo, revision)
        title, files = "", dict(found.commits[parent].files)
        for operation in map(json.loads, data.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self.stored(value["oid"])
            elif key in ("deletedFile", "deletedFolder"):
                gone = value["path"].rstrip("/")
                files = {p: f for p, f in files.items() if p != gone and not p.startswith(gone + "/")}
        name = found.commit(revision, title, files)
        self.reply({"success": True, "commitOid": name, "commitUrl": f"{self.hub.url}/{repo}/commit/{name}"})

    def store(self, blob: bytes) -> FileInfo:
        """Keep a file under the name that git would give it."""
        oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        self.hub.blobs[oid] = blob
        return {"oid": oid, "size": len(blob)}

    def stored(self, oid: str) -> FileInfo:
        """A file that came by LFS."""
        size = len(self.hub.blobs[oid])
        return {"oid": oid[:40], "size": size, "lfs": {"oid": oid, "size": size, "pointerSize": 134}}

    def info(self, data: bytes, kind: str, repo: str, revision: str | None) -> None:
        found, name = self.find(kind, repo, revision)
        files = found.commits[name].files
        readme = files.get("README.md", {}).get("oid")
        card = dict(re.findall(r"^(\w+): (\S+)$", self.hub.blobs[readme].decode(), re.MULTILINE)) if readme else {}
        answer = {"id": repo, "sha": name, "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
        answer |= {"lastModified": NOW, "createdAt": NOW, "siblings": [{"rfilename": path} for path in files]}
        answer |= {key: card.get(key) for key in ("pipeline_tag", "library_name")}
        self.reply(answer)

    def tree(self, data: bytes, kind: str, repo: str, revision: str, path: str) -> None:
        found, name = self.find(kind, repo, revision)
        prefix = path + "/" if path else ""  # every file below it, whatever `recursive` says
        files = found.commits[name].files
        rows = [{"type": "file", "path": p, **info} for p, info in files.items() if p.startswith(prefix)]
        if prefix and not rows:
            raise Refusal(404, "EntryNotFound", f"no {path}")
        self.reply(rows)

    def refs(self, data: bytes, kind: str, repo: str) -> None:
        found, _ = self.find(kind, repo)

        def rows(what: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{what}/{n}", "targetCommit": commit} for n, commit in names.items()]

        self.reply({"branches": rows("heads", found.branches), "tags": rows("tags", found.tags), "converts": []})

    def tag(self, data: bytes, kind: str, repo: str, revision: str) -> None:
        found, name = self.find(kind, repo, revision)
        found.tags[json.loads(data)["tag"]] = name
        self.reply({})

    def branch(self, data: bytes, kind: str, repo: str, name: str) -> None:
        found, start = self.find(kind, repo, json.loads(data or b"{}").get("startingPoint", "main"))
        found.branches[name] = start
        self.reply({})

    def resolve(self, data: bytes, repo: str, revision: str, path: str, kind: str | None) -> None:
        found, name = self.find(kind, repo, revision)
        info = found.commits[name].files.get(path)
        if info is None:
            # With the commit, clients remember that there is no such file, and need not ask when they are offline.
            raise Refusal(404, "EntryNotFound", f"no {path}", **{"X-Repo-Commit": name})
        oid = info.get("lfs", info)["oid"]
        blob = self.hub.blobs[oid]
        headers = {"X-Repo-Commit": name, "ETag": f'"{oid}"'}
        if "lfs" in info:
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(blob))}
        self.reply(blob, **headers)


Route = tuple[Iterable[str], str, Callable[..., None]]
ROUTES: list[Route] = [
    (["GET"], "/api/whoami-v2", Handler.whoami),
    (["POST"], "/api/validate-yaml", Handler.validate_yaml),
    (["GET"], "/api/agent-harnesses", Handler.agent_harnesses),
    (["POST"], "/api/repos/create", Handler.create),
    (["POST"], f"/api/{KIND}/{REPO}/preupload/{REVISION}", Handler.preupload),
    (["POST"], rf"/(?:{KIND}/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (["PUT"], "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (["POST"], f"/api/{KIND}/{REPO}/commit/{REVISION}", Handler.commit),
    (["GET"], f"/api/{KIND}/{REPO}/refs", Handler.refs),
    (["POST"], f"/api/{KIND}/{REPO}/tag/{REVISION}", Handler.tag),
    (["POST"], f"/api/{KIND}/{REPO}/branch/(?P<name>[^/]+)", Handler.branch),
    (["GET"], f"/api/{KIND}/{REPO}/tree/{REVISION}/?(?P<path>.*)", Handler.tree),
    (["GET"], f"/api/{KIND}/{REPO}(?:/revision/{REVISION})?", Handler.info),
    (["GET", "HEAD"], f"/(?:{KIND}/)?{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: "HubStub"


class HubStub:
    """The Hub of one user, on a free port of this machine while the `with` block lasts.

    Args:
        user (`str`, *optional*, defaults to `"tester"`): whose token every token is.
        lfs_over (`int`, *optional*, defaults to `10000`): files of at least so many bytes go by LFS.
    """

    def __init__(self, user: str = "tester", lfs_over: int = 10_000) -> None:
        self.user, self.lfs_over = user, lfs_over
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []  # method, path and status of every request
        self.lock = threading.RLock()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Path | str) -> dict[str, str]:
        """What a child process needs to take this for the Hub; `home` is its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_x",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The content of every file of a repository."""
        found = self.repos[kind, repo]
        commit = found.find(revision)
        if commit is None:
            raise KeyError(revision)
        return {path: self.blobs[f.get("lfs", f)["oid"]] for path, f in found.commits[commit].files.items()}

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
