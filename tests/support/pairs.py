"""Connected pairs of sockets, plain and with TLS, and what is read from them."""

from __future__ import annotations

import socket
import ssl
import threading

from tests.support.certs import Certs

Pair = tuple[socket.socket, socket.socket]


def tcp_pair() -> Pair:
    """Two ends of one TCP connection with the smallest buffers that the kernel gives."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        near = socket.socket()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def tls_pair(certs: Certs, near: socket.socket, far: socket.socket) -> Pair:
    """Both ends after a real handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs.cert, certs.key)
    tls_far = context.wrap_socket(far, server_side=True, do_handshake_on_connect=False)
    shaker = threading.Thread(target=tls_far.do_handshake)
    shaker.start()
    trusting = ssl.create_default_context(cafile=str(certs.ca))
    tls_near = trusting.wrap_socket(near, server_hostname="127.0.0.1")
    shaker.join()
    return tls_near, tls_far


def exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(min(65536, size - len(data)))
        if not piece:
            raise AssertionError(f"the end after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)


def read_frame(sock: socket.socket) -> tuple[int, bytes]:
    """The next frame: opcode, payload."""
    head = exactly(sock, 2)
    assert head[0] & 0xF0 == 0x80
    size = head[1] & 0x7F
    if size >= 126:
        size = int.from_bytes(exactly(sock, {126: 2, 127: 8}[size]), "big")
    key = exactly(sock, 4) if head[1] & 0x80 else b"\0\0\0\0"
    data = exactly(sock, size)
    return head[0] & 0xF, bytes(byte ^ key[at % 4] for at, byte in enumerate(data))
