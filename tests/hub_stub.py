"""A stand-in Hugging Face Hub for tests: in memory, standard library only.

    with HubStub() as hub:
        run_child(code, **hub.environment(home))

`huggingface_hub` reads its environment once, when it is imported, so its clients run in child processes. The stub
serves what they need to create repositories, commit (regular and LFS files), tag, branch, open pull requests, list and
download, and what `datasets.load_dataset` needs besides. Who asks is told by the token, see `HubStub.tokens`; and
`HubStub.cut` breaks a connection in the middle.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

KIND = r"(?P<kind>models|datasets|spaces)"
REPO = r"(?P<repo>[^/]+/[^/]+?)"
REVISION = r"(?P<revision>[^/]+)"
NOW = "2026-01-01T00:00:00.000Z"
SDKS = ("gradio", "docker", "static", "streamlit")
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
LICENSES = ("apache-2.0", "cc-by-4.0", "mit", "other", "unknown")  # some of those that the Hub knows

# What a listing says of a file: its `oid`, its `size`, and `lfs` where it is one.
FileInfo = dict[str, Any]


@dataclass
class Commit:
    parent: str | None
    title: str
    files: dict[str, FileInfo]


@dataclass
class Repo:
    """A repository; `branches` and `tags` map names to keys of `commits`. A pull request is the branch `refs/pr/1`.

    A Space has an `sdk`: the one that its card names, or else the one that it was made for. `large` has the names of
    the files that came by LFS, in a commit or not yet.
    """

    private: bool = False
    sdk: str | None = None
    large: set[str] = field(default_factory=set)
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

    def open_pull_request(self, parent: str) -> int:
        """Start the branch of a pull request, and return its number."""
        number = 1 + sum(name.startswith("refs/pr/") for name in self.branches)
        self.branches[f"refs/pr/{number}"] = parent
        return number

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit's own name means."""
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        return name if name in self.commits else None


def listing(files: dict[str, FileInfo]) -> dict[str, FileInfo]:
    """What there is under each path: files, and the folders that they lie in."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents if str(folder) != "."}
    entries = {path: {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)}
    return entries | {path: {"type": "file", "path": path, **info} for path, info in files.items()}


def large_file(oid: str, size: int) -> FileInfo:
    """A file that came by LFS, whose SHA-256 is `oid`."""
    return {"oid": oid[:40], "size": size, "lfs": {"oid": oid, "size": size, "pointerSize": 134}}


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
    cut_of_answer: str | None = None

    def log_message(self, *args: Any) -> None:
        """Keep test output clean; `HubStub.log` has every request."""

    def reply(self, body: Any = b"", status: int = 200, **headers: Any) -> None:
        """Answer with bytes as they are, and with anything else as JSON."""
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        if self.cut_of_answer == "answer":
            self.hang_up()
            return
        self.hub.log.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            is_cut = self.cut_of_answer == "middle"
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
            if is_cut:
                self.hang_up()

    def serve(self) -> None:
        """Find the route of this request and follow it."""
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            cut = self.hub.take_cut(f"{self.command} {path}")
        if cut == "request":
            self.rfile.read(length // 2)
            self.hang_up()
            return
        self.cut_of_answer = cut
        data = self.rfile.read(length)
        try:
            with self.hub.lock:
                self.role()  # before anything else, the Hub refuses a token that it does not know
                for methods, pattern, function in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in methods:
                        function(self, data, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                        return
            raise Refusal(501, "", f"the stub does not serve {self.command} {path}")
        except Refusal as refusal:
            self.reply({"error": str(refusal)}, refusal.status, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def hang_up(self) -> None:
        """Leave the client without an answer."""
        self.hub.log.append((self.command, self.path, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    @property
    def hub(self) -> "HubStub":
        return self.server.hub

    @property
    def asks_for_pull_request(self) -> bool:
        return parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]

    def role(self) -> str | None:
        """What the token of this request allows: `"write"`, `"read"`, or None where there is no token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def demand_write(self, repo: str, revision: str = "main") -> None:
        """Refuse whoever may not change `repo`; anybody who may write at all may open pull requests, and go on."""
        role = self.role()
        if role is None:
            raise Refusal(401, "", "Invalid username or password.")
        is_owner = repo.split("/")[0] == self.hub.user
        if role != "write" or not (is_owner or self.asks_for_pull_request or revision.startswith("refs/pr/")):
            raise Refusal(403, "", f"You don't have the rights to write to {repo}")

    def find(self, kind: str | None, repo: str, revision: str | None = "main") -> tuple[Repo, str]:
        """The repository and the commit, or the refusal that the Hub gives."""
        found = self.hub.repos.get((kind or "models", repo))
        role = self.role()
        if found is None or (found.private and role is None):
            # Without a token nobody learns whether there is a private repository of this name.
            raise Refusal(404 if role else 401, "RepoNotFound", "Repository not found")
        commit = found.find(revision or "main")
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return found, commit

    def whoami(self, data: bytes) -> None:
        token = {"accessToken": {"role": self.role(), "displayName": "tests"}}
        self.reply({"type": "user", "name": self.hub.user, "orgs": [], "auth": token})

    def validate_yaml(self, data: bytes) -> None:
        body = json.loads(data)
        card = dict(re.findall(r"^(\w+): (.+)$", body["content"], re.MULTILINE))
        allowed = {"license": LICENSES}
        if body.get("repoType") == "space":
            allowed |= {"sdk": SDKS, "colorFrom": COLORS, "colorTo": COLORS}
            card.setdefault("sdk", "")
        wrong = {name: values for name, values in allowed.items() if name in card and card[name] not in values}
        errors = [{"message": f'"{name}" must be one of ' + ", ".join(values)} for name, values in wrong.items()]
        if len(card.get("short_description", "")) > 60:
            errors.append({"message": '"short_description" length must be less than or equal to 60 characters long'})
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def agent_harnesses(self, data: bytes) -> None:
        self.reply({"standardEnvVars": [], "harnesses": {}})

    def create(self, data: bytes) -> None:
        body = json.loads(data)
        kind = body.get("type", "model") + "s"
        repo = f"{body.get('organization') or self.hub.user}/{body['name']}"
        self.demand_write(repo)
        if kind == "spaces" and body.get("sdk") not in SDKS:
            raise Refusal(400, "", f'"sdk" must be one of {", ".join(SDKS)}')
        status = 409 if (kind, repo) in self.hub.repos else 200
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.hub.repos.setdefault((kind, repo), Repo(private, body.get("sdk")))
        prefix = "" if kind == "models" else kind + "/"
        self.reply({"url": f"{self.hub.url}/{prefix}{repo}", "name": repo}, status)

    def preupload(self, data: bytes, kind: str, repo: str, revision: str) -> None:
        self.demand_write(repo, revision)
        found, name = self.find(kind, repo, revision)
        there = found.commits[name].files
        files = []
        for file in json.loads(data)["files"]:
            info = there.get(file["path"], {})
            mode = "lfs" if file["size"] >= self.hub.lfs_over else "regular"
            oid = info.get("lfs", info).get("oid")  # by which a client sees that it has nothing new
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": files})

    def lfs_batch(self, data: bytes, repo: str, kind: str | None) -> None:
        there = self.find(kind, repo)[0].large
        objects = json.loads(data)["objects"]
        for item in objects:
            if item["oid"] not in there:
                # Within the repository, so that a cut of its requests cuts this one.
                href = f"{self.hub.url}/{kind or 'models'}/{repo}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, data: bytes, kind: str, repo: str, oid: str) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(422, "", "not what its name says")
        self.hub.repos[kind, repo].large.add(oid)  # whoever has the address may write there, without a token
        self.hub.blobs[oid] = data
        self.reply()

    def commit(self, data: bytes, kind: str, repo: str, revision: str) -> None:
        self.demand_write(repo, revision)
        found, parent = self.find(kind, repo, revision)
        title, files = "", dict(found.commits[parent].files)
        for operation in map(json.loads, data.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = large_file(value["oid"], len(self.hub.blobs[value["oid"]]))
            elif key in ("deletedFile", "deletedFolder"):
                gone = value["path"].rstrip("/")
                files = {p: f for p, f in files.items() if p != gone and not p.startswith(gone + "/")}
        address = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}"
        answer = {"success": True}
        if self.asks_for_pull_request:
            number = found.open_pull_request(parent)
            revision, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{address}/discussions/{number}"
        name = found.commit(revision, title, files)
        self.reply(answer | {"commitOid": name, "commitUrl": f"{address}/commit/{name}"})

    def info(self, data: bytes, kind: str, repo: str, revision: str | None) -> None:
        found, name = self.find(kind, repo, revision)
        files = found.commits[name].files
        readme = files.get("README.md", {})
        readme = readme.get("lfs", readme).get("oid")
        card = dict(re.findall(r"^(\w+): (\S+)$", self.hub.blobs[readme].decode(), re.MULTILINE)) if readme else {}
        answer = {"id": repo, "sha": name, "gated": False, "tags": [], "downloads": 0, "likes": 0}
        answer |= {"private": found.private, "lastModified": NOW, "createdAt": NOW}
        answer |= {"siblings": [{"rfilename": path} for path in files]}
        if kind == "spaces":
            answer |= {"sdk": card.get("sdk", found.sdk)}
        else:
            answer |= {key: card.get(key) for key in ("pipeline_tag", "library_name")}
        self.reply(answer)

    def tree(self, data: bytes, kind: str, repo: str, revision: str, path: str) -> None:
        found, name = self.find(kind, repo, revision)
        entries = listing(found.commits[name].files)
        if path and path not in entries:
            raise Refusal(404, "EntryNotFound", f"no {path}")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        prefix = path + "/" if path else ""
        below = [entry for place, entry in entries.items() if place.startswith(prefix) and place != path]
        self.reply([entry for entry in below if recursive or "/" not in entry["path"][len(prefix) :]])

    def paths_info(self, data: bytes, kind: str, repo: str, revision: str) -> None:
        found, name = self.find(kind, repo, revision)
        entries = listing(found.commits[name].files)
        self.reply([entries[path] for path in parse_qs(data.decode())["paths"] if path in entries])

    def refs(self, data: bytes, kind: str, repo: str) -> None:
        found, _ = self.find(kind, repo)

        def rows(what: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{what}/{n}", "targetCommit": commit} for n, commit in names.items()]

        branches = {name: commit for name, commit in found.branches.items() if not name.startswith("refs/pr/")}
        self.reply({"branches": rows("heads", branches), "tags": rows("tags", found.tags), "converts": []})

    def tag(self, data: bytes, kind: str, repo: str, revision: str) -> None:
        self.demand_write(repo)
        found, name = self.find(kind, repo, revision)
        found.tags[json.loads(data)["tag"]] = name
        self.reply({})

    def branch(self, data: bytes, kind: str, repo: str, name: str) -> None:
        self.demand_write(repo)
        found, start = self.find(kind, repo, json.loads(data or b"{}").get("startingPoint", "main"))
        if name in found.branches:
            raise Refusal(409, "", f"Reference {name} already exists")
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
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self.reply(blob, **headers)
            return
        start, stop = int(part[1]), min(int(part[2] or len(blob)) + 1, len(blob))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(blob)}"
        self.reply(blob[start:stop], 206, **headers)


Route = tuple[Iterable[str], str, Callable[..., None]]
ROUTES: list[Route] = [
    (["GET"], "/api/whoami-v2", Handler.whoami),
    (["POST"], "/api/validate-yaml", Handler.validate_yaml),
    (["GET"], "/api/agent-harnesses", Handler.agent_harnesses),
    (["POST"], "/api/repos/create", Handler.create),
    (["POST"], f"/api/{KIND}/{REPO}/preupload/{REVISION}", Handler.preupload),
    (["POST"], rf"/(?:{KIND}/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (["PUT"], f"/{KIND}/{REPO}/lfs/(?P<oid>[0-9a-f]{{64}})", Handler.lfs_put),
    (["POST"], f"/api/{KIND}/{REPO}/commit/{REVISION}", Handler.commit),
    (["GET"], f"/api/{KIND}/{REPO}/refs", Handler.refs),
    (["POST"], f"/api/{KIND}/{REPO}/tag/{REVISION}", Handler.tag),
    (["POST"], f"/api/{KIND}/{REPO}/branch/(?P<name>[^/]+)", Handler.branch),
    (["GET"], f"/api/{KIND}/{REPO}/tree/{REVISION}/?(?P<path>.*)", Handler.tree),
    (["POST"], f"/api/{KIND}/{REPO}/paths-info/{REVISION}", Handler.paths_info),
    (["GET"], f"/api/{KIND}/{REPO}(?:/revision/{REVISION})?", Handler.info),
    (["GET", "HEAD"], f"/(?:{KIND}/)?{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: "HubStub"


class HubStub:
    """The Hub of one user, on a free port of this machine while the `with` block lasts.

    Args:
        user (`str`, *optional*, defaults to `"tester"`): whose tokens `tokens` are, and who may write to `user/...`.
        lfs_over (`int`, *optional*, defaults to `10000`): files of at least so many bytes go by LFS.
    """

    def __init__(self, user: str = "tester", lfs_over: int = 10_000) -> None:
        self.user, self.lfs_over = user, lfs_over
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens = {"hf_x": "write", "hf_read": "read"}  # token -> what it allows
        self.log: list[tuple[str, str, int]] = []  # method, path and status (0: cut) of every request
        self.cuts: list[tuple[str, str, int]] = []
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

    def cut(self, pattern: str, what: str = "request", skip: int = 0) -> None:
        """Break the connection of the next request whose "METHOD path" holds the regular expression `pattern`.

        Args:
            pattern (`str`): such as `"POST .*/commit/"`.
            what (`str`, *optional*): `"request"` cuts off its second half, `"answer"` serves it and says nothing,
                `"middle"` serves it and sends half of the answer.
            skip (`int`, *optional*, defaults to 0): so many such requests pass before.
        """
        self.cuts.append((pattern, what, skip))

    def take_cut(self, line: str) -> str | None:
        """How to break the request that begins with `line`, if at all."""
        for place, (pattern, what, skip) in enumerate(self.cuts):
            if not re.search(pattern, line):
                continue
            if skip == 0:
                del self.cuts[place]
                return what
            self.cuts[place] = (pattern, what, skip - 1)
        return None

    def add(self, repo: str, files: dict[str, bytes], kind: str = "models") -> None:
        """Put a repository there, whoever its owner is."""
        found = self.repos.setdefault((kind, repo), Repo())
        found.commit("main", "files", {path: self.store(blob) for path, blob in files.items()})

    def store(self, blob: bytes) -> FileInfo:
        """Keep a file under the name that git would give it."""
        oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        self.blobs[oid] = blob
        return {"oid": oid, "size": len(blob)}

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
