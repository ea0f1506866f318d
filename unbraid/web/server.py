"""The dashboard: run directories served as JSON, sound and events to a page on this machine."""

import asyncio
import json
import re
import secrets
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path
from types import FrameType
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unbraid.errors import UserError
from unbraid.web.audio import picture, sound_file
from unbraid.web.run_store import TICK_SECONDS, Library, progress

STATIC = Path(__file__).parent / "static"
KINDS = {".js": "text/javascript", ".css": "text/css"}
LOCAL = ("127.0.0.1", "localhost", "::1")
PORT = 8642
MOST_BUCKETS = 4000

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def serve(paths: Sequence[Path], *, address: str = "127.0.0.1", port: int | None = None) -> None:
    """Serve a page on some runs until it is interrupted; prints the link to it.

    Args:
        paths: Run directories, or folders that hold some; runs that come later are found too.
        address: Where to listen.
        port: Which port; `PORT`, or any free one where that is taken, if None.

    Raises:
        UserError: If there is nothing at a path, or it cannot be listened there.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"There is no folder {path}; give run directories, or a folder that holds some.")
    listening = _listen(address, port)
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(18)
    library = Library([path.absolute() for path in paths])
    hosts = LOCAL if address in LOCAL else None
    app = guarded(routes(library), hosts=hosts, token=token, cookie=f"unbraid-{port}")
    shown = socket.gethostname() if address in ("0.0.0.0", "::") else f"[{address}]" if ":" in address else address
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, server_header=False
    )
    watching = threading.Thread(target=library.watch, daemon=True)
    try:
        print(f"The page: http://{shown}:{port}/?token={token}", flush=True)  # noqa: T201
        print("Ctrl-C ends it.", flush=True)  # noqa: T201
        library.look_for_runs()
        watching.start()
        _Server(config, library).run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        library.closing.set()
        if watching.ident is not None:
            watching.join(timeout=5)


class _Server(uvicorn.Server):
    """Tells the pages that listen that it ends, so that it need not break off what it tells them."""

    def __init__(self, config: uvicorn.Config, library: Library) -> None:
        super().__init__(config)
        self.library = library

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Hear of a signal."""
        self.library.closing.set()
        super().handle_exit(sig, frame)


def _listen(address: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for wanted in (PORT, 0) if port is None else (port,):
        listening = socket.socket(
            family, socket.SOCK_STREAM, socket.IPPROTO_TCP
        )  # said, so that answers are not held up
        if sys.platform != "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address, wanted))
            listening.listen()  # from here on nobody who has the link is turned away
        except (OSError, OverflowError) as error:
            listening.close()
            if port is None and wanted == PORT and address in LOCAL:
                continue
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"Nothing can listen at {address}, port {wanted} ({reason}); name another --port."
            ) from error
        return listening
    raise UserError(f"No port is free at {address}.")


def guarded(app: ASGIApp, *, hosts: Collection[str] | None, token: str, cookie: str) -> ASGIApp:
    """An application that answers nobody but the holder of a token, reads only, and runs no script but its own.

    Args:
        app: What is guarded.
        hosts: Names that the header Host may say, so that no foreign one can be led to this machine; with any port, as
            one may be forwarded from elsewhere. Anything if None, where the page is open to a network.
        token: What the first address must carry, as ``?token=``; it is kept in a cookie from then on.
        cookie: The cookie's name.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    *((k.encode(), v.encode()) for k, v in HEADERS.items()),
                ]
            await send(message)

        request = Request(scope)
        refusal = _refusal(request, hosts, token, cookie)
        await (refusal or app)(scope, receive, send_with_headers)

    return answer


def _refusal(request: Request, hosts: Collection[str] | None, token: str, cookie: str) -> Response | None:
    """Why a request is not answered, or the way from the printed link to the page; None where it is answered."""
    if hosts is not None and _host_name(request.headers.get("host", "")) not in hosts:
        return PlainTextResponse("This page answers to 127.0.0.1 and localhost alone.", 403)
    if request.method not in ("GET", "HEAD"):
        return PlainTextResponse("This page can only be read (GET).", 405, {"allow": "GET, HEAD"})
    given = parse_qs(request.url.query).get("token", [""])[0]
    if given and secrets.compare_digest(given.encode(), token.encode()):
        forward = Response(status_code=303, headers={"location": "/"})
        forward.set_cookie(cookie, token, httponly=True, samesite="lax")  # the link may be followed from another page
        return forward if request.url.path == "/" else None
    if not secrets.compare_digest(request.cookies.get(cookie, "").encode(), token.encode()):
        return PlainTextResponse("Open the link that unbraid dashboard has printed: it carries a token.", 403)
    return None


def _host_name(host: str) -> str:
    """Of ``name``, ``name:port`` or ``[::1]:port``."""
    found = re.fullmatch(r"(?:\[([\da-fA-F:]+)\]|([\w.-]+))(?::\d+)?", host)
    return (found[1] or found[2]).lower() if found else ""


def routes(library: Library) -> Starlette:
    """The page, and what it asks for."""

    def of_run(found: Callable[[str, Request], Response]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            try:
                return found(request.path_params["name"], request)
            except KeyError:
                return JSONResponse({"problem": "There is no such run any more."}, 404)
            except (UserError, OSError) as error:
                return JSONResponse({"problem": str(error)}, 404)
            except ValueError as error:
                return JSONResponse({"problem": f"That cannot be asked ({error})."}, 400)

        return answer

    def series(name: str, request: Request) -> Response:
        asked = request.query_params
        first, last, n = int(asked.get("first", 0)), int(asked.get("last", 2**62)), int(asked.get("n", 600))
        if not (-(2**62) <= first <= last <= 2**62 and n > 0):
            raise ValueError("first must not be behind last, and n must be above 0")
        return JSONResponse(library.series(name, first, last, min(n, MOST_BUCKETS)))

    def sound(name: str, request: Request) -> Response:
        return FileResponse(sound_file(library.runs[name], request.query_params.get("name", "")))

    def spectrogram(name: str, request: Request) -> Response:
        run, asked = library.runs[name], request.query_params
        named = [asked.get("name", ""), *([asked["like"]] if asked.get("like") else [])]
        files = [sound_file(run, file) for file in named]
        return Response(_drawn(*((file, file.stat().st_mtime_ns) for file in files)), media_type="image/webp")

    return Starlette(
        routes=[
            Route("/", lambda request: Response(page(), media_type="text/html")),
            Route("/static/{name}", _static),
            Route("/api/runs", lambda request: JSONResponse(list(library.overviews.values()))),
            Route("/api/run/{name}", of_run(lambda name, _: JSONResponse(library.details(name)))),
            Route("/api/judged/{name}", of_run(lambda name, _: JSONResponse(library.judged(name)))),
            Route("/api/series/{name}", of_run(series)),
            Route("/api/sound/{name}", of_run(sound)),
            Route("/api/picture/{name}", of_run(spectrogram)),
            Route("/api/live", lambda request: _live(library)),
        ]
    )


def page() -> str:
    """The page as it is served."""
    return (STATIC / "page.html").read_text(encoding="utf-8")


def _static(request: Request) -> Response:
    path = STATIC / request.path_params["name"]
    if path.suffix not in KINDS or path.parent != STATIC or not path.is_file():
        return PlainTextResponse("There is no such file.", 404)
    return FileResponse(path, media_type=KINDS[path.suffix])


@lru_cache(maxsize=256)
def _drawn(sound: tuple[Path, int], like: tuple[Path, int] | None = None) -> bytes:
    """A spectrogram by file and time of its last change, so that the same is drawn once."""
    return picture(sound[0], like[0] if like else None)


def _live(library: Library) -> Response:
    """Server-sent events: ``grown`` for each followed run that has, ``runs`` where the list has changed."""

    async def told() -> AsyncIterator[str]:
        versions: dict[str, int] = {}
        list_version, quiet = library.list_version, 0.0
        yield "retry: 1000\n\n"
        while not library.closing.is_set():
            known = dict(library.versions)
            grown = {name: version for name, version in known.items() if versions.get(name) != version}
            for name in grown:
                if (run := library.followed.get(name)) is not None:
                    yield f"event: grown\ndata: {json.dumps(progress(name, run))}\n\n"
            if library.list_version != list_version:
                list_version = library.list_version
                yield f"event: runs\ndata: {json.dumps(list(library.overviews.values()))}\n\n"
            versions |= grown
            quiet = 0.0 if grown else quiet + TICK_SECONDS
            if quiet > KEEP_ALIVE_SECONDS:  # or a dead connection would never be noticed
                quiet = 0.0
                yield ": still here\n\n"
            await asyncio.sleep(TICK_SECONDS)

    return StreamingResponse(told(), media_type="text/event-stream")


KEEP_ALIVE_SECONDS = 15.0
