"""The dashboard: serves run directories to a page on this machine, as JSON, audio and server-sent events."""

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
from unbraid.web.audio import audio_path, spectrogram_image
from unbraid.web.run_store import POLL_SECONDS, RunStore, read_progress

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_PORT = 8642
MAX_BUCKETS = 4000
KEEP_ALIVE_SECONDS = 15.0

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


# ---- Starting and stopping


def serve(paths: Sequence[Path], *, address: str = "127.0.0.1", port: int | None = None) -> None:
    """Print the link to a page on some runs, and serve it until interrupted.

    Args:
        paths: Run directories, or folders that contain some; runs that start later appear too.
        address: Address to listen on.
        port: Port to listen on. If None, `DEFAULT_PORT`, or any free port if that one is taken.

    Raises:
        UserError: If a folder does not exist, or the address and port cannot be listened on.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"There is no folder {path}. Give run directories, or a folder that contains some.")
    listener = _listen(address, port)
    port = listener.getsockname()[1]
    token = secrets.token_urlsafe(18)
    store = RunStore([path.absolute() for path in paths])
    hosts = LOOPBACK if address in LOOPBACK else None
    app = require_token(create_app(store), hosts=hosts, token=token, cookie=f"unbraid-{port}")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, server_header=False
    )
    server = _Server(config, store)
    watcher = threading.Thread(target=store.watch, daemon=True)
    try:
        # From the first line printed on, a signal sets a flag. As a KeyboardInterrupt it could strike inside a
        # callback of the garbage collector, where Python ignores it, and the server would go on.
        with server.capture_signals():
            print(f"Open http://{_link_host(address)}:{port}/?token={token}", flush=True)  # noqa: T201
            print("Press Ctrl-C to stop.", flush=True)  # noqa: T201
            store.update_list()
            watcher.start()
            server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again once it has stopped
    finally:
        store.closing.set()
        if watcher.ident is not None:  # None if the list could not be read
            watcher.join(timeout=5)


class _Server(uvicorn.Server):
    """A server that ends the event streams on a signal; uvicorn would wait for them and then cut them off."""

    def __init__(self, config: uvicorn.Config, store: RunStore) -> None:
        super().__init__(config)
        self.store = store

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the event streams, and then the server."""
        self.store.closing.set()
        super().handle_exit(sig, frame)


def _listen(address: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for candidate in (DEFAULT_PORT, 0) if port is None else (port,):
        # asyncio turns off Nagle's algorithm, which delays small answers, only if the protocol is given as TCP.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if sys.platform != "win32":  # on Windows the option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, candidate))
            listener.listen()  # before the link is printed, so that it works at once
        except (OSError, OverflowError) as error:
            listener.close()
            if port is None and candidate == DEFAULT_PORT and address in LOOPBACK:
                continue
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"Cannot listen on {address}, port {candidate} ({reason}). Give another port with --port."
            ) from error
        return listener
    raise UserError(f"No port is free on {address}.")


def _link_host(address: str) -> str:
    """Return the host to print in the link for a listening address."""
    if address in ("0.0.0.0", "::"):  # every interface: others reach it by this machine's name
        return socket.gethostname()
    return f"[{address}]" if ":" in address else address


# ---- Access


def require_token(app: ASGIApp, *, hosts: Collection[str] | None, token: str, cookie: str) -> ASGIApp:
    """Return an application that serves read requests with the right token, and adds `HEADERS` to every answer.

    Args:
        app: The application to protect.
        hosts: Names allowed in the Host header with any port (it may be forwarded). They defend against DNS rebinding,
            by which a foreign site could reach this machine. None allows any, for a page that is open to a network.
        token: The link carries it as ``?token=``. From then on it is kept in a cookie.
        cookie: Name of the cookie.
    """

    async def protected(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        response = _refuse_or_redirect(Request(scope), hosts, token, cookie)
        await (response or app)(scope, receive, send_with_headers)

    return protected


def _refuse_or_redirect(request: Request, hosts: Collection[str] | None, token: str, cookie: str) -> Response | None:
    """Return a refusal, or the redirect from the printed link to the page; None if the request is allowed."""
    if hosts is not None and _host_name(request.headers.get("host", "")) not in hosts:
        return PlainTextResponse("This page is served to 127.0.0.1 and localhost only.", 403)
    if request.method not in ("GET", "HEAD"):
        return PlainTextResponse("This page is read-only. Use GET.", 405, {"allow": "GET, HEAD"})
    link_token = parse_qs(request.url.query).get("token", [""])[0]
    if link_token and secrets.compare_digest(link_token.encode(), token.encode()):
        if request.url.path != "/":
            return None
        redirect = Response(status_code=303, headers={"location": "/"})
        # "lax" and not "strict": the link may be followed from another site's page, such as a web mailer.
        redirect.set_cookie(cookie, token, httponly=True, samesite="lax")
        return redirect
    if not secrets.compare_digest(request.cookies.get(cookie, "").encode(), token.encode()):
        return PlainTextResponse("Open the link that unbraid dashboard has printed. It contains a token.", 403)
    return None


def _host_name(host: str) -> str:
    """Return the name in ``name``, ``name:port`` or ``[::1]:port``, in lower case."""
    match = re.fullmatch(r"(?:\[([\da-fA-F:]+)\]|([\w.-]+))(?::\d+)?", host)
    return (match[1] or match[2]).lower() if match else ""


# ---- Routes


def create_app(store: RunStore) -> Starlette:
    """Return the application that serves the page and everything it requests."""

    def for_run(handler: Callable[[str, Request], Response]) -> Callable[[Request], Response]:
        """Wrap a handler so that its errors become answers in words."""

        def endpoint(request: Request) -> Response:
            try:
                return handler(request.path_params["run_id"], request)
            except KeyError:
                return JSONResponse({"problem": "This run no longer exists."}, 404)
            except (UserError, OSError) as error:
                return JSONResponse({"problem": str(error)}, 404)
            except ValueError as error:
                return JSONResponse({"problem": f"The request is not valid ({error})."}, 400)

        return endpoint

    def series(run_id: str, request: Request) -> Response:
        query = request.query_params
        first = int(query.get("first", 0))
        last = int(query.get("last", 2**62))
        n_buckets = int(query.get("n", 600))
        if not (-(2**62) <= first <= last <= 2**62 and n_buckets > 0):  # the limits keep them within int64
            raise ValueError("first must not be greater than last, and n must be greater than 0")
        return JSONResponse(store.series(run_id, first, last, min(n_buckets, MAX_BUCKETS)))

    def audio(run_id: str, request: Request) -> Response:
        return FileResponse(audio_path(store.runs[run_id], request.query_params.get("name", "")))

    def spectrogram(run_id: str, request: Request) -> Response:
        query = request.query_params
        path = audio_path(store.runs[run_id], query.get("name", ""))
        reference = audio_path(store.runs[run_id], query["reference"]) if query.get("reference") else None
        # The modification times are part of the cache's key.
        mtime = path.stat().st_mtime_ns
        reference_mtime = reference.stat().st_mtime_ns if reference else None
        return Response(_cached_spectrogram(path, mtime, reference, reference_mtime), media_type="image/webp")

    return Starlette(
        routes=[
            Route("/", lambda request: Response(page_html(), media_type="text/html")),
            Route("/static/{name}", _static_file),
            Route("/api/runs", lambda request: JSONResponse(list(store.overviews.values()))),
            Route("/api/details/{run_id}", for_run(lambda run_id, _: JSONResponse(store.details(run_id)))),
            Route("/api/diagnosis/{run_id}", for_run(lambda run_id, _: JSONResponse(store.diagnosis(run_id)))),
            Route("/api/series/{run_id}", for_run(series)),
            Route("/api/audio/{run_id}", for_run(audio)),
            Route("/api/spectrogram/{run_id}", for_run(spectrogram)),
            Route("/api/live", lambda request: _live_events(store)),
        ]
    )


def page_html() -> str:
    """Return the page as it is served."""
    return (STATIC / "page.html").read_text(encoding="utf-8")


def _static_file(request: Request) -> Response:
    path = STATIC / request.path_params["name"]
    if path.suffix not in MEDIA_TYPES or path.parent != STATIC or not path.is_file():
        return PlainTextResponse("There is no such file.", 404)
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix])


@lru_cache(maxsize=256)
def _cached_spectrogram(path: Path, mtime: int, reference: Path | None, reference_mtime: int | None) -> bytes:
    return spectrogram_image(path, reference)


def _live_events(store: RunStore) -> Response:
    """Return a stream of events: ``grown`` for each followed run that has changed, ``runs`` when the list has."""

    async def stream() -> AsyncIterator[str]:
        sent_versions: dict[str, int] = {}
        sent_list_version = store.list_version
        silent_seconds = 0.0
        yield "retry: 1000\n\n"
        while not store.closing.is_set():
            versions = dict(store.versions)  # a copy: the watching thread changes it
            changed = [run_id for run_id, version in versions.items() if sent_versions.get(run_id) != version]
            for run_id in changed:
                run = store.followed.get(run_id)
                if run is not None:
                    yield f"event: grown\ndata: {json.dumps(read_progress(run_id, run))}\n\n"
            sent_versions = versions
            if store.list_version != sent_list_version:
                sent_list_version = store.list_version
                yield f"event: runs\ndata: {json.dumps(list(store.overviews.values()))}\n\n"
            silent_seconds = 0.0 if changed else silent_seconds + POLL_SECONDS
            if silent_seconds > KEEP_ALIVE_SECONDS:  # a lost connection is noticed only by writing to it
                silent_seconds = 0.0
                yield ": keep-alive\n\n"
            await asyncio.sleep(POLL_SECONDS)

    return StreamingResponse(stream(), media_type="text/event-stream")
