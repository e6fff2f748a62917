"""The checking TLS socket ends a process that shares a TLS object, and no other."""

import sys
from pathlib import Path

import pytest

from tests.support.certs import Certs
from tests.support.processes import Proc, child_environment

pytestmark = pytest.mark.debian("openssl")

# A handshake over a socketpair; `near` and `far` are its two ends, of the given kind.
PREAMBLE = """
import socket, ssl, sys, threading
sys.setswitchinterval(1e-6)
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.load_cert_chain({cert!r}, {key!r})
client = ssl.create_default_context(cafile={ca!r})
left, right = socket.socketpair()
far = server.wrap_socket(right, server_side=True, do_handshake_on_connect=False)
shaker = threading.Thread(target=far.do_handshake)
shaker.start()
near = client.wrap_socket(left, server_hostname="127.0.0.1")
shaker.join()
"""

# The reader is inside for as long as nothing comes.
BLOCKED_READER = """
def read():
    near.recv(1)
reader = threading.Thread(target=read, name="the-reader", daemon=True)
reader.start()
# Once the owner is set, the reader is inside for good: nobody sends.
while near._checking_tls_inside.owner != reader.ident:
    pass
{entry}
print("not noticed", flush=True)
"""

# Two threads in short, non-blocking calls: they meet only by a switch at the wrong moment.
RACE = """
near.setblocking(False)
far.setblocking(False)
lock = threading.Lock()
stop = threading.Event()
def far_end():
    while not stop.is_set():
        try:
            far.send(far.recv(4096) or b"x")
        except ssl.SSLError:
            pass
def reader():
    for _ in range({rounds}):
        with {guard}:
            try:
                near.recv(4096)
            except ssl.SSLError:
                pass
def writer():
    for _ in range({rounds}):
        with {guard}:
            try:
                near.send(b"x" * 100)
            except ssl.SSLError:
                pass
threads = [threading.Thread(target=each) for each in (reader, writer)]
third = threading.Thread(target=far_end)
for thread in [third, *threads]:
    thread.start()
for thread in threads:
    thread.join()
stop.set()
third.join()
near.setblocking(True)
near.sendall(b"")  # calls send: one thread two deep is no sharing
print("finished", flush=True)
"""

# The server's name callback runs inside its handshake, and stays there.
OBJECT = """
inside = threading.Event()
def stay(*_):
    inside.set()
    threading.Event().wait()
server.sni_callback = stay
to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
asking = client.wrap_bio(to_client, to_server, server_hostname="localhost")
try:
    asking.do_handshake()
except ssl.SSLWantReadError:
    pass
answering = server.wrap_bio(to_server, to_client, server_side=True)
threading.Thread(target=answering.do_handshake, name="the-shaker", daemon=True).start()
inside.wait()
answering.pending()
print("not noticed", flush=True)
"""


def run(certs: Certs, tmp_path: Path, code: str) -> tuple[int, str, str]:
    """Run `code` after the preamble under the check: exit status, the file's text, output."""
    preamble = PREAMBLE.format(cert=str(certs.cert), key=str(certs.key), ca=str(certs.ca))
    check_file = tmp_path / "shared"
    env = child_environment(checking_tls_file=check_file)
    with Proc([sys.executable, "-c", preamble + code], env=env) as proc:
        status = proc.wait(20)
        return status, check_file.read_text() if check_file.exists() else "", proc.text


@pytest.mark.parametrize(
    "entry",
    [
        "near.pending()",
        "near.send(b'x')",
        "near.sendall(b'x')",
        "near.recv_into(bytearray(1))",
        "near.do_handshake()",
        "near.unwrap()",
        "near.shutdown(socket.SHUT_RDWR)",
        "near.close()",
    ],
)
def test_process_ends_when_a_second_thread_enters(certs: Certs, tmp_path: Path, entry: str) -> None:
    """One thread sits in recv; any other entry, shutdown and close too, is caught."""
    status, shared, output = run(certs, tmp_path, BLOCKED_READER.format(entry=entry))
    assert status == 99, output
    assert shared.startswith("TLS OBJECT SHARED by threads the-reader (in recv) and MainThread")
    assert "not noticed" not in output


def test_process_ends_when_two_threads_meet_in_an_ssl_object(certs: Certs, tmp_path: Path) -> None:
    """The same for ssl.SSLObject, seen from inside a real handshake."""
    status, shared, output = run(certs, tmp_path, OBJECT)
    assert status == 99, output
    assert shared.startswith("TLS OBJECT SHARED by threads the-shaker (in do_handshake)")


def test_process_ends_when_short_calls_race(certs: Certs, tmp_path: Path) -> None:
    """Reader and writer without a lock: their first meeting is caught."""
    code = RACE.format(guard="threading.Lock()", rounds=200_000)
    status, shared, output = run(certs, tmp_path, code)
    assert status == 99, output
    assert shared.startswith("TLS OBJECT SHARED by threads")


def test_process_goes_on_when_a_lock_keeps_them_apart(certs: Certs, tmp_path: Path) -> None:
    """The same under one lock is not called sharing, however often the threads switch."""
    status, shared, output = run(certs, tmp_path, RACE.format(guard="lock", rounds=3_000))
    assert (status, shared) == (0, ""), output
    assert "finished" in output
