"""The target of the tunnels: prints a port, and runs the command of each connection.

A standalone program. The first line of a connection is one of

    echo                       sends back all bytes
    source BYTES CHUNK RATE    sends BYTES (0: endless), CHUNK at a time, at RATE bytes a second
                               (0: unlimited), and then FIN
    sink BYTES NAME            reads BYTES (0: until eof), and then sends "done"
    count NAME                 sends the number of bytes that the sinks NAME have read

The target first answers "ok" to the first three commands.
"""

import contextlib
import os
import socket
import threading
import time

OK = b"ok\n"
DONE = b"done\n"

_BLOCK = memoryview(os.urandom(1 << 20))

_lock = threading.Lock()  # Guards _sunk.
_sunk: dict[str, int] = {}  # by name


def serve(sock: socket.socket) -> None:
    """Serve one connection until the close."""
    with sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = b""
        while not line.endswith(b"\n"):
            more = sock.recv(1)
            if not more:
                return
            line += more
        word, *args = line.decode().split()
        if word == "count":
            with _lock:
                sock.sendall(b"%d\n" % _sunk.get(args[0], 0))
            return
        sock.sendall(OK)
        if word == "echo":
            echo(sock)
        elif word == "source":
            size, chunk, rate = (int(number) for number in args)
            source(sock, size, chunk, rate)
        else:
            sink(sock, int(args[0]), args[1])


def echo(sock: socket.socket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)


def source(sock: socket.socket, size: int, chunk: int, rate: int) -> None:
    begun = time.monotonic()
    sent = 0
    while not size or sent < size:
        if rate:
            time.sleep(max(0.0, begun + sent / rate - time.monotonic()))
        piece = _BLOCK[: min(chunk, size - sent) if size else chunk]
        sock.sendall(piece)
        sent += len(piece)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(65536):
        pass


def sink(sock: socket.socket, size: int, name: str) -> None:
    buffer = bytearray(1 << 18)
    received = 0
    while not size or received < size:
        count = sock.recv_into(buffer)
        if not count:
            break
        received += count
        with _lock:
            _sunk[name] = _sunk.get(name, 0) + count
    sock.sendall(DONE)
    while sock.recv(65536):
        pass


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print("listening", listener.getsockname()[1], flush=True)
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    main()
