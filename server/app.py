"""The HTTP face of the relay: authenticate and admit before the upgrade. The only Flask."""

from __future__ import annotations

import base64
import binascii
import functools
import logging
import re
import sys
from typing import Any

from flask import Flask, Response, g, jsonify, request
from flask_sock import Sock
from werkzeug.exceptions import HTTPException

from http_network_relay.wire.codes import Code
from http_network_relay.wire.constants import (
    CLIENTS_PATH,
    INSTANCE_HEADER,
    RELAY_HEADER,
    RELAY_HEADER_VALUE,
    SUBPROTOCOL,
    TUNNEL_HEADER,
    USERS_PATH,
)
from http_network_relay.wire.errors import ConfigError, Refused
from server.access.credentials import Login
from server.access.file_watch import FileWatch
from server.config import Config
from server.legs.websocket import SERVER_OPTIONS, Connection, prepare_upgrade
from server.logs import ROOT_NAME, set_up_logging
from server.relay import Relay

_log = logging.getLogger(f"{ROOT_NAME}.app")

# The name in `app.extensions` under which the worker finds the relay.
EXTENSION = "http_network_relay"
# gunicorn's WORKER_BOOT_ERROR: with it the master ends too, and starts no further worker.
_EXIT_CANNOT_START = 3

# The HTTP status of an error that Flask raises by itself -> code and message.
_HTTP_ERRORS = {
    404: (Code.NOT_FOUND, f"the relay has {CLIENTS_PATH}, {USERS_PATH} and /healthz only"),
    500: (Code.INTERNAL_ERROR, "the relay failed; its log says why"),
}

# Ids of a client's instance and of a tunnel.
_ID = re.compile(r"[0-9a-f]{32}")
_WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_NEWER_SUBPROTOCOL = re.compile(r"http-network-relay\.v([2-9]|[1-9][0-9]{1,3})")


def create_app(config: Config) -> Flask:
    """Return the WSGI application. A wrong setting ends the process with one line."""
    set_up_logging()
    try:
        config.validate()
        watch = FileWatch(config.credentials_file)
        credentials = watch.load()
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        raise SystemExit(_EXIT_CANNOT_START) from None
    return build_app(Relay(config, credentials, watch))


def build_app(relay: Relay) -> Flask:
    """Return the WSGI application around `relay`."""
    app = Flask(__name__, static_folder=None)
    app.extensions[EXTENSION] = relay
    app.config["SOCK_SERVER_OPTIONS"] = SERVER_OPTIONS
    # A redirect would make peers send their secret once more, or elsewhere.
    app.url_map.merge_slashes = False
    app.before_request(functools.partial(_admit, relay))
    app.teardown_request(functools.partial(_give_slot_back, relay))
    app.after_request(_mark)
    app.add_url_rule("/healthz", "healthz", functools.partial(_healthz, relay))
    sock = Sock(app)
    for path in (CLIENTS_PATH, USERS_PATH):
        sock.route(path, endpoint=path)(functools.partial(_serve, relay))
    app.register_error_handler(Refused, functools.partial(_refusal_response, relay))
    app.register_error_handler(HTTPException, _http_error_response)
    return app


# The steps of a request: admit, serve, give the slot back.


def _admit(relay: Relay) -> None:
    """Authenticate and admit a peer before the upgrade."""
    if request.path == CLIENTS_PATH:
        _check_upgrade(relay, "client")
        login = _authenticate_client(relay)
        instance = _id_header(INSTANCE_HEADER)
        g.slot = relay.admit_client(login, instance, _address(relay))
    elif request.path == USERS_PATH:
        _check_upgrade(relay, "proxy command")
        login = _authenticate_user(relay)
        tunnel_id = _id_header(TUNNEL_HEADER) if TUNNEL_HEADER in request.headers else ""
        g.slot = relay.admit_user(login, _address(relay), tunnel_id)
    else:
        return
    relay.attach(g.slot, Connection(prepare_upgrade(request.environ)))


def _serve(relay: Relay, websocket: Any) -> None:
    relay.serve(g.slot, websocket)


def _give_slot_back(relay: Relay, _error: BaseException | None) -> None:
    slot = g.pop("slot", None)
    if slot is not None:
        relay.release(slot)


def _mark(response: Response) -> Response:
    """Let peers see that this is a relay."""
    response.headers[RELAY_HEADER] = RELAY_HEADER_VALUE
    return response


def _healthz(relay: Relay) -> Response:
    if relay.is_draining:
        raise Refused(Code.SERVER_RESTART, "the relay restarts")
    return jsonify(status="ok")


def _check_upgrade(relay: Relay, peer: str) -> None:
    """Refuse a request that is no WebSocket upgrade of the version spoken here."""
    header = request.headers.get
    tokens = [token.strip().lower() for token in header("Connection", "").split(",")]
    is_upgrade = (
        request.method == "GET"
        and request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
        and header("Upgrade", "").lower() == "websocket"
        and "upgrade" in tokens
        and header("Sec-WebSocket-Version") == "13"
        and _WEBSOCKET_KEY.fullmatch(header("Sec-WebSocket-Key", "")) is not None
    )
    if not is_upgrade:
        raise Refused(
            Code.BAD_REQUEST,
            "this path takes WebSocket upgrades (version 13) over HTTP/1.1 only; if a proxy "
            "stands before the relay, let it pass Upgrade and Connection on",
        )
    relay.check_started()
    offered = [name.strip() for name in header("Sec-WebSocket-Protocol", "").split(",")]
    if SUBPROTOCOL not in offered:
        side = "relay" if any(map(_NEWER_SUBPROTOCOL.fullmatch, offered)) else peer
        raise Refused(
            Code.VERSION_UNSUPPORTED, f"the relay speaks {SUBPROTOCOL}: upgrade the {side}"
        )


def _authorization(scheme: str) -> str:
    given, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if given.lower() == scheme else ""


def _authenticate_client(relay: Relay) -> Login:
    try:
        pair = base64.b64decode(_authorization("basic"), validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        pair = ""
    name, _, secret = pair.partition(":")
    login = relay.credentials.login_client(name, secret)
    if login is None:
        message = "the client's name or secret is wrong"
        raise relay.policy.failed_login("client", name, _address(relay), message)
    return login


def _authenticate_user(relay: Relay) -> Login:
    login = relay.credentials.login_user(_authorization("bearer"))
    if login is None:
        message = "the proxy user's token is wrong"
        raise relay.policy.failed_login("user", "", _address(relay), message)
    return login


def _id_header(header: str) -> str:
    value = request.headers.get(header, "")
    if not _ID.fullmatch(value):
        raise Refused(Code.BAD_REQUEST, f"{header} must be 32 lower-case hex digits")
    return value


def _address(relay: Relay) -> str:
    """Return the address that the request comes from; a trusted proxy may name it."""
    return relay.policy.address(request.remote_addr, request.headers.get("X-Forwarded-For", ""))


def _refusal_response(relay: Relay, error: Refused) -> Response:
    code = Code(error.code)
    # Failed logins have a line of their own.
    if code not in (Code.UNAUTHORIZED, Code.TOO_MANY):
        # An operator can act on a full relay; the other refusals concern the peer alone.
        level = logging.WARNING if code is Code.BUSY else logging.INFO
        path, address = request.path, _address(relay)
        _log.log(level, "request refused code=%s path=%s address=%s", code, path, address)
    response: Response = jsonify(code=code, message=error.message)
    response.status_code = code.http_status
    if code.retry_after_s:
        response.headers["Retry-After"] = str(code.retry_after_s)
    if code is Code.UNAUTHORIZED:
        scheme = "Basic" if request.path == CLIENTS_PATH else "Bearer"
        response.headers["WWW-Authenticate"] = f'{scheme} realm="relay"'
    return response


def _http_error_response(error: HTTPException) -> Response:
    """Answer an error that Flask raises by itself: an unknown path or method, or our own bug."""
    status = error.code or 500
    code, message = _HTTP_ERRORS.get(status, (Code.BAD_REQUEST, error.name))
    response: Response = jsonify(code=code, message=message)
    response.status_code = status
    return response
