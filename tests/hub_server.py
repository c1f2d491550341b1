"""A small Hugging Face Hub for tests: loopback only, spoken to by the real huggingface_hub client.

It knows repositories of models and data sets with branches and tags, tokens with a role, git-LFS uploads, commits, file
listings and downloads, and it fails on demand. It speaks no Xet: clients set HF_HUB_DISABLE_XET=1. hub_fixtures.py starts
it; on its own, `python hub_server.py FOLDER` serves until it is stopped.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_write", "hf_read", "hf_somebody_else"
USERS = {WRITE_TOKEN: ("tester", "write"), READ_TOKEN: ("tester", "read"), OTHER_TOKEN: ("somebody", "write")}
ORGANISATIONS = {"tester": ["org"], "somebody": []}
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".png")
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match; the request is not carried out."""

    method: str
    path: str  # regular expression, found anywhere in the path
    status: int | None = None  # answer with this status ...
    drop: bool = False  # ... or read half of the body and hang up ...
    stall: float = 0.0  # ... after this many seconds ...
    lose_answer: bool = False  # ... or carry the request out and hang up instead of answering
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)  # of the answer

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


@dataclass
class Hub:
    """The state of the server: `root/blobs` holds contents by their hash, memory the rest."""

    root: Path
    repos: dict[tuple[str, str], dict] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # (method, path) of all that came in
    lock: threading.RLock = field(default_factory=threading.RLock)
    url: str = ""

    def fail(self, method: str, path: str, **fault: Any) -> Fault:
        self.faults.append(Fault(method, path, **fault))
        return self.faults[-1]

    def heal(self) -> None:
        self.faults.clear()

    def next_fault(self, method: str, path: str) -> Fault | None:
        """Note a request; what goes wrong with it, if anything."""
        with self.lock:
            self.requests.append((method, path))
            fault = next((fault for fault in self.faults if fault.matches(method, path)), None)
            if fault is not None:
                fault.times -= 1
            return fault

    def head(self, repo_id: str, kind: str = "models", branch: str = "main") -> dict:
        """The newest commit of a branch: `files` (path -> entry), `title`, `parent`."""
        repo = self.repos[kind, repo_id]
        return repo["commits"][repo["branches"][branch]]

    def read(self, repo_id: str, path: str, kind: str = "models") -> bytes:
        return self.blob(self.head(repo_id, kind)["files"][path]["sha256"]).read_bytes()

    def files(self, repo_id: str, kind: str = "models", branch: str = "main") -> set[str]:
        return set(self.head(repo_id, kind, branch)["files"])

    def titles(self, repo_id: str) -> list[str]:
        """Titles of main's commits, newest first."""
        return [commit["title"] for commit in self.repos["models", repo_id]["commits"].values()][::-1]

    def write(self, repo_id: str, contents: dict[str, bytes], title: str = "by hand", kind: str = "models") -> None:
        """A commit as somebody makes it on the web page."""
        with self.lock:
            repo = self.repos.get((kind, repo_id)) or self.create(kind, repo_id, private=False)
            parent = repo["branches"]["main"]
            files = repo["commits"][parent]["files"] | {path: self.entry(data) for path, data in contents.items()}
            self.commit(repo, "main", parent, files, title)

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def store(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blob(sha256).parent.mkdir(parents=True, exist_ok=True)
        self.blob(sha256).write_bytes(data)
        return sha256

    def entry(self, data: bytes) -> dict:
        return {"sha256": self.store(data), "size": len(data), "oid": _git_oid(data), "lfs": False}

    def lfs_entry(self, sha256: str) -> dict:
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {"sha256": sha256, "size": size, "oid": _git_oid(pointer), "lfs": True}

    def create(self, kind: str, repo_id: str, private: bool) -> dict:
        repo = {"branches": {}, "tags": {}, "commits": {}, "private": private}
        self.commit(repo, "main", None, {".gitattributes": self.entry(GIT_ATTRIBUTES)}, "initial commit")
        self.repos[kind, repo_id] = repo
        return repo

    def commit(self, repo: dict, branch: str, parent: str | None, files: dict, title: str) -> str:
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        content = json.dumps([parent, files, title, now, len(repo["commits"])], sort_keys=True)
        sha = hashlib.sha1(content.encode()).hexdigest()
        repo["commits"][sha] = {"parent": parent, "files": files, "title": title, "date": now}
        repo["branches"][branch] = sha
        return sha


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait for an acknowledgement
    hub: Hub

    # ---- plumbing -------------------------------------------------------------------------------------

    def log_message(self, format: str, *arguments: Any) -> None:
        pass  # `Hub.requests` has them

    def body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return b""
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send(self, status: int, data: Any = b"", headers: dict[str, str] | None = None) -> None:
        """Make this the answer; it goes out when the request is done with the Hub's state."""
        headers = dict(headers or {})
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
            headers.setdefault("Content-Type", "application/json")
        self.answer = status, data, headers

    def refuse(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **(more or {})})

    def deliver(self) -> None:
        status, data, headers = self.answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        fault = self.hub.next_fault(self.command, url.path)
        if fault is not None:
            time.sleep(fault.stall)
            if fault.drop:
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                self.close_connection = True
                return
        data = self.body()
        if fault is not None and fault.status:
            self.refuse(fault.status, "InjectedFault", HTTPStatus(fault.status).phrase, fault.headers)
        else:
            with self.hub.lock:  # not while answering: a client may take its time to read, and ask for something else first
                self.carry_out(url.path, data)
        if fault is not None and fault.lose_answer:
            self.close_connection = True
        else:
            self.deliver()

    def carry_out(self, path: str, data: bytes) -> None:
        for methods, pattern, function in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, path)):
                groups = {name: unquote(value) if value else value for name, value in match.groupdict().items()}
                function(self, data, **groups)
                return
        self.refuse(404, "NotFound", f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    @property
    def user(self) -> tuple[str | None, str]:
        """(name, role) of who asks; (None, "") for nobody that is known."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        return USERS.get(token, (None, ""))

    def may_write(self, repo_id: str) -> bool:
        """Whether who asks may write there; if not, the answer has been sent."""
        name, role = self.user
        if name is None:
            self.refuse(401, "Unauthorized", "Invalid username or password.")
        elif role != "write" or repo_id.split("/")[0] not in (name, *ORGANISATIONS[name]):
            self.refuse(403, "Forbidden", f"You don't have the rights to write to {repo_id}.")
        else:
            return True
        return False

    def find(self, kind: str, repo_id: str, revision: str = "main") -> tuple[dict, str] | tuple[None, None]:
        """(repository, commit), or the answer has been sent."""
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo["private"] and self.user[0] not in (repo_id.split("/")[0], "tester")):
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None, None
        sha = repo["branches"].get(revision) or repo["tags"].get(revision)
        sha = sha or (revision if revision in repo["commits"] else None)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None, None
        return repo, sha

    # ---- account and repositories ---------------------------------------------------------------------

    def whoami(self, data: bytes) -> None:
        name, role = self.user
        if name is None:
            self.refuse(401, "Unauthorized", "Invalid username or password.")
            return
        organisations = [{"name": organisation} for organisation in ORGANISATIONS[name]]
        token = {"accessToken": {"role": role, "displayName": "local"}}
        self.send(200, {"type": "user", "name": name, "fullname": name, "orgs": organisations, "auth": token})

    def validate_yaml(self, data: bytes) -> None:
        """A fraction of what the real Hub checks: YAML that is an object, with fields of the right type."""
        content = json.loads(data)["content"]
        match = re.match(r"---\s*\n(.*?)\n---", content, re.DOTALL)
        try:
            card = (yaml.safe_load(match[1]) if match else {}) or {}
            bad = [
                name
                for name, types in {"tags": list, "datasets": (list, str), "license": (str, list), "model-index": list}.items()
                if name in card and not isinstance(card[name], types)
            ]
        except yaml.YAMLError as error:
            bad = [str(error)]
        if bad:
            self.send(400, {"errors": [{"message": f"invalid metadata: {bad}"}], "warnings": []})
        else:
            self.send(200, {"errors": [], "warnings": []})

    def create(self, data: bytes) -> None:
        options = json.loads(data)
        kind = options.get("type", "model") + "s"
        repo_id = f"{options.get('organization') or self.user[0]}/{options['name']}"
        if not self.may_write(repo_id):
            return
        answer = {"url": self.base + ("" if kind == "models" else f"/{kind}") + f"/{repo_id}", "name": repo_id, "id": "local"}
        if (kind, repo_id) in self.hub.repos:
            self.send(409, {**answer, "error": f"You already created this {kind[:-1]} repo"})
            return
        private = options.get("private") is True or options.get("visibility") == "private"
        self.hub.create(kind, repo_id, private)
        self.send(200, answer)

    def check_access(self, data: bytes, kind: str, repo_id: str, write: str | None = None) -> None:
        repo, _ = self.find(kind, repo_id)
        if repo is not None and (write is None or self.may_write(repo_id)):
            self.send(200, {})

    def make_ref(self, data: bytes, kind: str, repo_id: str, ref: str, name: str) -> None:
        repo, sha = self.find(kind, repo_id, name if ref == "tag" else "main")
        if repo is None or not self.may_write(repo_id):
            return
        options = json.loads(data or b"{}")
        if ref == "tag":
            repo["tags"][options["tag"]] = sha
        else:
            repo["branches"][name] = options.get("startingPoint") or sha
        self.send(201, {})

    # ---- pushing --------------------------------------------------------------------------------------

    def preupload(self, data: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo, sha = self.find(kind, repo_id, revision)
        if repo is None or not self.may_write(repo_id):
            return
        present, answer = repo["commits"][sha]["files"], []
        for file in json.loads(data)["files"]:
            path = file["path"]
            binary = b"\0" in base64.b64decode(file.get("sample", "")) or path.endswith(LFS_SUFFIXES)
            oid = present[path]["sha256" if present[path]["lfs"] else "oid"] if path in present else None
            answer.append({"path": path, "uploadMode": "lfs" if binary else "regular", "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answer, "commitOid": sha})

    def lfs_batch(self, data: bytes, kind: str | None, repo_id: str) -> None:
        if not self.may_write(repo_id):
            return
        answer = []
        for wanted in json.loads(data)["objects"]:
            oid = wanted["oid"]
            one = {"oid": oid, "size": wanted["size"]}
            if not self.hub.blob(oid).exists():
                address = f"{self.base}/_lfs/{oid}"
                one["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            answer.append(one)
        self.send(200, {"transfer": "basic", "objects": answer})

    def lfs_put(self, data: bytes, oid: str) -> None:
        whole = hashlib.sha256(data).hexdigest() == oid
        if whole:
            self.hub.store(data)
        self.send(200 if whole else 400)

    def lfs_verify(self, data: bytes, oid: str) -> None:
        self.send(200 if self.hub.blob(oid).exists() else 404, {})

    def commit(self, data: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo, parent = self.find(kind, repo_id, revision)
        if repo is None or not self.may_write(repo_id):
            return
        files, title = dict(repo["commits"][parent]["files"]), "commit"
        for line in filter(None, data.split(b"\n")):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    self.refuse(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
                    return
            elif key == "file":
                encoded = value.get("encoding") == "base64"
                content = base64.b64decode(value["content"]) if encoded else value["content"].encode()
                files[value["path"]] = self.hub.entry(content)
            elif key == "lfsFile":
                if not self.hub.blob(value["oid"]).exists():
                    self.refuse(400, "BadRequest", f"LFS object {value['oid']} was not uploaded")
                    return
                files[value["path"]] = self.hub.lfs_entry(value["oid"])
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: entry for path, entry in files.items() if not path.startswith(folder)}
        branch = revision if revision in repo["branches"] else "main"
        prefix = f"{self.base if kind == 'models' else f'{self.base}/{kind}'}/{repo_id}"
        answer = {"success": True, "hookOutput": ""}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo["branches"])
            branch, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{prefix}/discussions/{number}"
        sha = self.hub.commit(repo, branch, parent, files, title)
        self.send(200, answer | {"commitUrl": f"{prefix}/commit/{sha}", "commitOid": sha})

    # ---- reading --------------------------------------------------------------------------------------

    def info(self, data: bytes, kind: str, repo_id: str, revision: str | None = None) -> None:
        repo, sha = self.find(kind, repo_id, revision or "main")
        if repo is None:
            return
        commit = repo["commits"][sha]
        siblings = [
            {"rfilename": path} | (self.details(entry) if "blobs" in self.query else {})
            for path, entry in sorted(commit["files"].items())
        ]
        self.send(200, {
            "_id": "local", "id": repo_id, "modelId": repo_id, "sha": sha, "author": repo_id.split("/")[0],
            "lastModified": commit["date"], "createdAt": commit["date"], "private": repo["private"], "disabled": False,
            "gated": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings, "cardData": {},
        })  # fmt: skip

    def details(self, entry: dict) -> dict:
        lfs = {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": 130}
        return {"size": entry["size"], "blobId": entry["oid"]} | ({"lfs": lfs} if entry["lfs"] else {})

    def refs(self, data: bytes, kind: str, repo_id: str) -> None:
        repo, _ = self.find(kind, repo_id)
        if repo is not None:
            lists = {
                name: [{"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": sha} for ref, sha in repo[name].items()]
                for name, place in {"branches": "heads", "tags": "tags"}.items()
            }
            self.send(200, {**lists, "converts": [], "pullRequests": []})

    def entry(self, commit: dict, sha: str, path: str) -> dict | None:
        last = {"lastCommit": {"id": sha, "title": commit["title"], "date": commit["date"]}}
        if entry := commit["files"].get(path):
            file = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"], **last}
            lfs = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}
            return file | ({"lfs": lfs} if entry["lfs"] else {})
        if any(other.startswith(f"{path}/") for other in commit["files"]):
            oid = hashlib.sha1(path.encode()).hexdigest()
            return {"type": "directory", "path": path, "oid": oid, "size": 0, **last}
        return None

    def tree(self, data: bytes, kind: str, repo_id: str, revision: str, path: str | None = None) -> None:
        repo, sha = self.find(kind, repo_id, revision)
        if repo is None:
            return
        commit = repo["commits"][sha]
        prefix = f"{path.strip('/')}/" if path and path.strip("/") else ""
        deep = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        seen = {}
        for file in sorted(commit["files"]):
            if file.startswith(prefix):
                parts = file[len(prefix) :].split("/")
                for depth in range(1, len(parts) + 1 if deep else 2):
                    seen[prefix + "/".join(parts[:depth])] = None
        if prefix and not seen:
            self.refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
            return
        self.send(200, [self.entry(commit, sha, file) for file in seen])

    def paths_info(self, data: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo, sha = self.find(kind, repo_id, revision)
        if repo is None:
            return
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(data)["paths"] if is_json else parse_qs(data.decode()).get("paths", [])
        entries = [self.entry(repo["commits"][sha], sha, path.strip("/")) for path in paths]
        self.send(200, [entry for entry in entries if entry])

    def resolve(self, data: bytes, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        repo, sha = self.find(kind or "models", repo_id, revision)
        if repo is None:
            return
        entry = repo["commits"][sha]["files"].get(path)
        if entry is None:
            message = "Entry not found"
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message, "X-Repo-Commit": sha}
            self.send(404, message.encode(), headers)
            return
        content = self.hub.blob(entry["sha256"]).read_bytes()
        etag = entry["sha256"] if entry["lfs"] else entry["oid"]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not (wanted and content):
            self.send(200, content, headers)
            return
        last = len(content) - 1
        if wanted[1]:
            low, high = int(wanted[1]), min(int(wanted[2] or last), last)
        else:
            low, high = max(0, len(content) - int(wanted[2])), last
        if low > high:
            self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            self.send(206, content[low : high + 1], {**headers, "Content-Range": f"bytes {low}-{high}/{len(content)}"})


REPO = r"(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
PLAIN_REPO = r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), r"/api/repos/create", Handler.create),
    (("GET",), rf"/api/{REPO}/auth-check(?P<write>/write)?", Handler.check_access),
    (("POST",), rf"/api/{REPO}/preupload/{REVISION}", Handler.preupload),
    (("POST",), rf"/api/{REPO}/commit/{REVISION}", Handler.commit),
    (("POST",), rf"/api/{REPO}/paths-info/{REVISION}", Handler.paths_info),
    (("POST",), rf"/api/{REPO}/(?P<ref>branch|tag)/(?P<name>[^/]+)", Handler.make_ref),
    (("GET",), rf"/api/{REPO}/tree/{REVISION}(?:/(?P<path>.*))?", Handler.tree),
    (("GET",), rf"/api/{REPO}/refs", Handler.refs),
    (("GET", "HEAD"), rf"/api/{REPO}/revision/{REVISION}", Handler.info),
    (("GET", "HEAD"), rf"/api/{REPO}", Handler.info),
    (("POST",), rf"{PLAIN_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (("POST",), r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.lfs_verify),
    (("GET", "HEAD"), rf"{PLAIN_REPO}/(?:resolve|raw)/{REVISION}/(?P<path>.+)", Handler.resolve),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted; more are tried again after a second or more

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of clients that hang up
            super().handle_error(request, client_address)


def start(root: Path, port: int = 0) -> tuple[Hub, _Server]:
    """A Hub on a free port, served by a thread until `server.shutdown()`."""
    hub = Hub(Path(root))
    server = _Server(("127.0.0.1", port), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return hub, server


if __name__ == "__main__":
    print(start(Path(sys.argv[1]))[0].url, flush=True)
    threading.Event().wait()
