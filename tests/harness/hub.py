"""A hub on this machine that speaks what huggingface_hub asks of the real one.

Repositories with branches and commits, files as git blobs or by LFS, tokens that may write, and
redirects of large files to another host, as the real hub sends them to its CDN. Xet is not spoken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from urllib.parse import unquote

import anyio
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.harness.hub_repos import (
    OWNER,
    READ_TOKEN,
    WRITE_TOKEN,
    Files,
    Repo,
    about,
    is_lfs,
    refusal,
)


class Hub:
    """The server, in a thread; `close` ends it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.log: list[str] = []
        """Each request: method and path."""
        self.leaked: list[str] = []
        """Tokens that came to the CDN, where none belongs."""
        self.change: Callable[[bytes], bytes] = lambda data: data
        """What the CDN does to a file."""
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        """While it is not set, the CDN stops in the middle of a file."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url, self.cdn = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        repo = "/{owner}/{name}"
        api = f"/api/models{repo}"
        routes = [
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/validate-yaml", self._validate, methods=["POST"]),
            Route(f"{api}/preupload/{{rev:path}}", self._preupload, methods=["POST"]),
            Route(f"{api}/commit/{{rev:path}}", self._commit, methods=["POST"]),
            Route(f"{api}/branch/{{rev:path}}", self._branch, methods=["POST"]),
            Route(f"{api}/paths-info/{{rev:path}}", self._paths, methods=["POST"]),
            Route(f"{api}/tree/{{rev:path}}", self._tree),
            Route(f"{api}/revision/{{rev:path}}", self._info),
            Route(api, self._info),
            Route(f"{repo}.git/info/lfs/objects/batch", self._batch, methods=["POST"]),
            Route(f"{repo}/resolve/{{rev}}/{{path:path}}", self._resolve),
            Route("/lfs/verify", self._verify, methods=["POST"]),
            Route("/lfs/{oid}", self._store, methods=["PUT"]),
            Route("/cdn/{oid}", self._serve),
            Route("/page/{path:path}", self._page),
        ]
        app = Starlette(routes=routes)
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the server."""
        self.go_on.set()
        self._server.should_exit = True
        self._thread.join(10)

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """Return what a branch or a commit holds."""
        repo = self.repos[repo_id]
        return repo.commits[repo.branches.get(revision, revision)]

    # -- who may what ---------------------------------------------------------------------------

    def _refusal(self, request: Request, *, write: bool = False) -> Response | None:
        """Log a request; return the answer to one that may not be, as the real hub does."""
        self.log.append(f"{request.method} {unquote(request.url.path)}")
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in (WRITE_TOKEN, READ_TOKEN):
            return refusal(401, "", "Invalid credentials in Authorization header")
        if "owner" not in request.path_params:
            return refusal(401, "", "Invalid username or password.") if not token else None
        repo = self.repos.get(self._id(request))
        if repo is None or (repo.private and not token):
            return refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token != WRITE_TOKEN:
            return refusal(403, "", "you are not in the authorized list") if token else refusal(401)
        revision = request.path_params.get("rev", "main")
        if revision not in repo.branches and revision not in repo.commits:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _id(self, request: Request) -> str:
        return f"{request.path_params['owner']}/{request.path_params['name']}"

    def _files(self, request: Request) -> Files:
        return self.files(self._id(request), request.path_params.get("rev", "main"))

    # -- repositories ---------------------------------------------------------------------------

    async def _create(self, request: Request) -> Response:
        if refused := self._refusal(request):
            return refused
        wanted = await request.json()
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        token = request.headers["authorization"].removeprefix("Bearer ")
        if wanted["organization"] != OWNER or token != WRITE_TOKEN:
            return refusal(403, "", "You don't have the rights to create a model here")
        if repo_id in self.repos:
            return JSONResponse({"error": "exists", "url": f"{self.url}/{repo_id}"}, 409)
        repo = self.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return JSONResponse({"url": f"{self.url}/{repo_id}"})

    async def _info(self, request: Request) -> Response:
        if refused := self._refusal(request):
            return refused
        repo, revision = self.repos[self._id(request)], request.path_params.get("rev", "main")
        return JSONResponse(
            {
                "_id": "0",
                "id": self._id(request),
                "private": repo.private,
                "sha": repo.branches.get(revision, revision),
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(self._files(request))],
            }
        )

    async def _branch(self, request: Request) -> Response:
        name = request.path_params.pop("rev")
        if refused := self._refusal(request, write=True):
            return refused
        repo = self.repos[self._id(request)]
        if name in repo.branches:
            return refusal(409, "", "Reference already exists")
        repo.branches[name] = repo.branches["main"]
        return Response(status_code=201)

    async def _paths(self, request: Request) -> Response:
        if refused := self._refusal(request):
            return refused
        form, files = await request.form(), self._files(request)
        asked = [str(path) for path in form.getlist("paths")]
        return JSONResponse([about(path, files[path]) for path in asked if path in files])

    async def _tree(self, request: Request) -> Response:
        if refused := self._refusal(request):
            return refused
        return JSONResponse([about(path, data) for path, data in self._files(request).items()])

    # -- uploads --------------------------------------------------------------------------------

    async def _validate(self, request: Request) -> Response:
        content = (await request.json())["content"]
        head = content.split("---\n")[1] if content.startswith("---\n") else ""
        try:
            yaml.safe_load(head)
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        if refused := self._refusal(request, write=True):
            return refused
        files, answer = self._files(request), []
        ignored = files.get(".gitignore", b"").decode().split()
        for wanted in (await request.json())["files"]:
            path = wanted["path"]
            mode = "lfs" if is_lfs(path) else "regular"
            found = {"path": path, "uploadMode": mode, "shouldIgnore": path in ignored}
            if path in files:
                file = about(path, files[path])
                found["oid"] = file["lfs"]["oid"] if mode == "lfs" else file["oid"]
            answer.append(found)
        return JSONResponse({"files": answer})

    async def _batch(self, request: Request) -> Response:
        if refused := self._refusal(request, write=True):
            return refused
        objects = []
        for wanted in (await request.json())["objects"]:
            if wanted["oid"] not in self.stored:
                upload = {"href": f"{self.cdn}/lfs/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.url}/lfs/verify", "header": {}}
                wanted["actions"] = {"upload": upload, "verify": verify}
            objects.append(wanted)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _store(self, request: Request) -> Response:
        self._note_leak(request)
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != request.path_params["oid"]:
            return refusal(400, "", "another content than its name says")
        self.stored[request.path_params["oid"]] = data
        return Response()

    async def _verify(self, request: Request) -> Response:
        wanted = await request.json()
        found = self.stored.get(wanted["oid"])
        return Response(status_code=200 if found and len(found) == wanted["size"] else 404)

    async def _commit(self, request: Request) -> Response:
        if refused := self._refusal(request, write=True):
            return refused
        branch, files = request.path_params["rev"], dict(self._files(request))
        summary = ""
        for line in (await request.body()).splitlines():
            kind, value = (item := json.loads(line))["key"], item["value"]
            if kind == "header":
                summary = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            else:
                assert kind == "deletedFile", kind
                del files[value["path"]]
        repo_id = self._id(request)
        commit = self.repos[repo_id].commit(branch, files, summary)
        url = f"{self.url}/{repo_id}/commit/{commit}"
        return JSONResponse({"success": True, "commitOid": commit, "commitUrl": url})

    # -- downloads ------------------------------------------------------------------------------

    async def _resolve(self, request: Request) -> Response:
        if refused := self._refusal(request):
            return refused
        path, revision = request.path_params["path"], request.path_params["rev"]
        files, branches = self._files(request), self.repos[self._id(request)].branches
        headers = {"X-Repo-Commit": branches.get(revision, revision)}
        if path not in files:
            return refusal(404, "EntryNotFound", "Entry not found")
        file = about(path, files[path])
        if not is_lfs(path):
            return Response(files[path], headers={**headers, "ETag": f'"{file["oid"]}"'})
        oid = file["lfs"]["oid"]
        self.stored[oid] = files[path]
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(file["size"])}
        return Response(
            status_code=302, headers={**headers, "ETag": '"0"', "Location": f"{self.cdn}/cdn/{oid}"}
        )

    async def _serve(self, request: Request) -> Response:
        self._note_leak(request)
        data = self.change(self.stored[request.path_params["oid"]])
        return StreamingResponse(self._pieces(data), headers={"Content-Length": str(len(data))})

    async def _pieces(self, data: bytes) -> AsyncIterator[bytes]:
        yield data[: len(data) // 2]
        if not self.go_on.is_set():
            self.stalled.set()
            while not self.go_on.is_set():
                await anyio.sleep(0.05)
        yield data[len(data) // 2 :]

    async def _page(self, request: Request) -> Response:
        """Answer as a server that is no hub."""
        return Response("<html>Hello</html>", media_type="text/html")

    def _note_leak(self, request: Request) -> None:
        self.log.append(f"{request.method} {request.url.path}")
        if "authorization" in request.headers:
            self.leaked.append(request.headers["authorization"])
