"""Holds many idle connections and answers pings, in the place of idle clients.

Reads one JSON object from standard input: `port`, `count`, `request` (sent on each connection;
{n} is the connection's number, {login} the login) and `answer` (the start of the reply).
`login` is the Basic pair and may contain {n}. Prints "ready", then the number of open
connections for each line of input. A standalone program.
"""

import base64
import contextlib
import json
import selectors
import socket
import sys
from collections.abc import Iterable

PING = 0x89
CLOSE = 0x88
# A pong with a mask of zeros.
PONG_HEAD = b"\x8a"


def connect(port: int, request: str, login: str, answer: str, number: int) -> socket.socket:
    """Return one connection after the handshake."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=60)
    basic = base64.b64encode(login.replace("{n}", str(number)).encode()).decode()
    text = request.replace("{n}", f"{number:032x}").replace("{login}", basic)
    sock.sendall(text.encode())
    end = b"\r\n\r\n" if text.endswith("\r\n\r\n") else b"\n"
    head = b""
    while not head.endswith(end):
        more = sock.recv(1)
        if not more:
            break
        head += more
    if not head.startswith(answer.encode()):
        raise SystemExit(f"connection {number} was refused: {head[:200]!r}")
    sock.setblocking(False)
    return sock


def answer_pings(sock: socket.socket, rest: bytes) -> bytes | None:
    """Read, answer all pings, and return the partial frame that remains; None after eof."""
    try:
        data = sock.recv(65536)
    except BlockingIOError:
        return rest
    except OSError:
        return None
    if not data:
        return None
    data = rest + data
    while len(data) >= 2 and len(data) >= 2 + data[1]:  # all payloads are below 126 bytes
        size = data[1]
        payload = data[2 : 2 + size]
        if data[0] == CLOSE:
            return None
        if data[0] == PING:
            with contextlib.suppress(OSError):
                sock.send(PONG_HEAD + bytes([0x80 | size]) + bytes(4) + payload)
        data = data[2 + size :]
    return data


def answer_those(keys: Iterable[selectors.SelectorKey], selector: selectors.BaseSelector) -> None:
    """Answer the pings on readable connections; drop closed connections."""
    for key in keys:
        assert isinstance(key.fileobj, socket.socket)
        rest = answer_pings(key.fileobj, key.data)
        if rest is None:
            selector.unregister(key.fileobj)
            key.fileobj.close()
        else:
            selector.modify(key.fileobj, selectors.EVENT_READ, rest)


def main() -> None:
    order = json.loads(sys.stdin.readline())
    # epoll, since select() ends at 1,024 descriptors. A key's data is the partial frame.
    selector = selectors.EpollSelector()
    for number in range(order.pop("count")):
        sock = connect(number=number, **order)
        selector.register(sock, selectors.EVENT_READ, b"")
        # The server pings the first connections before the last connections are open.
        answer_those([key for key, _ in selector.select(0)], selector)
    print("ready", flush=True)
    selector.register(0, selectors.EVENT_READ)
    while True:
        ready = [key for key, _ in selector.select()]
        answer_those([key for key in ready if key.fileobj != 0], selector)
        if any(key.fileobj == 0 for key in ready):
            if not sys.stdin.readline():
                return
            print(len(selector.get_map()) - 1, flush=True)


if __name__ == "__main__":
    main()
