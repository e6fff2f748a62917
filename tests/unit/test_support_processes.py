"""The harness's processes, programs and raw peers work, before the product is asked to."""

import base64
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support import debian, raw
from tests.support.certs import Certs
from tests.support.flows import run
from tests.support.processes import Pipes, Proc, child_environment
from tests.support.secrecy import (
    AUDIT_LOG,
    check_no_secret,
    note_credentials,
    note_secrets,
    secret_of,
)
from tests.support.targets import EchoTarget, RecordingTarget
from tests.support.waiting import eventually

PYTHON = [sys.executable, "-S", "-c"]
CAT = "import sys\nwhile d := sys.stdin.buffer.raw.read(65536): sys.stdout.buffer.write(d)"


def test_proc_finds_a_line_when_it_comes() -> None:
    """Both streams are collected, and the exit status is returned."""
    with Proc(
        [*PYTHON, "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"]
    ) as proc:
        assert proc.wait_for_line("^tw.$") == "two"
        assert proc.wait() == 3
        assert sorted(proc.lines) == ["one", "two"]
        with pytest.raises(AssertionError, match="the process ended"):
            proc.wait_for_line("three")


def test_proc_ends_its_group_when_left() -> None:
    """A stopped child with a child of its own does not survive the block."""
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid); p.wait()"
    with Proc([*PYTHON, code]) as proc:
        grandchild = int(proc.wait_for_line(r"\d+"))
        proc.stop()
    assert proc.returncode == -signal.SIGKILL

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{grandchild}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    eventually(is_gone)


SECRET = secret_of("of-this-test")


def basic(name: str) -> str:
    """What HTTP Basic makes of it; how long the name is shifts all that follows."""
    return base64.b64encode(f"{name}:{SECRET}".encode()).decode()


SHOWN = {
    "plain": f"token={SECRET}.",
    **{f"Basic, {name}": f"Authorization: Basic {basic(name)}" for name in ("a", "ab", "abc")},
}


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN)
def test_proc_fails_its_test_when_it_has_written_a_secret(text: str, tmp_path: Path) -> None:
    """What a program was given is looked for in all that it wrote, and in its audit log."""
    note_secrets(SECRET)
    audit_log = tmp_path / "audit.jsonl"
    env = child_environment({AUDIT_LOG: str(audit_log)})
    proc = Proc([*PYTHON, f"print({text!r})"], env=env)
    assert proc.wait() == 0
    with pytest.raises(AssertionError, match="has written secrets"):
        proc.close()

    proc = Proc([*PYTHON, ""], env=env)
    assert proc.wait() == 0
    # One that was rotated away counts, too.
    (tmp_path / "audit.jsonl.1").write_text(text)
    with pytest.raises(AssertionError, match=r"audit.jsonl.1 of .* has written secrets"):
        proc.close()

    with pytest.raises(AssertionError, match="has written secrets"):
        run([*PYTHON, f"import sys; print({text!r}, file=sys.stderr)"], env=child_environment())


def test_secret_is_not_found_where_it_does_not_stand() -> None:
    """Neither in a part of it, nor in another one's Basic form, nor in an URL that a peer chose."""
    note_secrets(SECRET)
    other = base64.b64encode(f"name:{SECRET[:-4]}".encode()).decode()
    check_no_secret("nobody", SECRET[:-1], other, f"GET /?secret={SECRET} HTTP/1.1")


def test_secret_that_is_short_is_refused() -> None:
    """Looking for it would tell nothing: a test that uses one is blind."""
    with pytest.raises(AssertionError, match="too short"):
        note_secrets("pu-ops")
    with pytest.raises(AssertionError, match="too short"):
        note_credentials({"clients": {"gw": {"secrets": ["cs-gw"]}}, "proxy_users": []})
    note_secrets(None, "", "sha256:0")


def test_pipes_carry_bytes_both_ways_when_open() -> None:
    """More than the pipes hold goes through `finish` without a deadlock."""
    with Pipes([*PYTHON, CAT]) as cat:
        data = os.urandom(1_000_000)
        finished = cat.finish(data)
        assert (finished.status, finished.stdout, finished.lines) == (0, data, [])


def test_pipes_fail_in_time_when_the_process_is_stuck() -> None:
    """Nothing that a test does with a process can hang it."""
    with Pipes([*PYTHON, "import signal; signal.pause()"]) as stuck:
        with pytest.raises(AssertionError, match="stdout"):
            stuck.receive(1, timeout_s=0.02)
        with pytest.raises(AssertionError, match="stdin"):
            stuck.send(bytes(1_000_000), timeout_s=0.02)
        assert stuck.send_some(bytes(1_000_000), stuck_after_s=0.02) == 0


def test_child_environment_is_clean_when_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the relay and proxies do not leak into what a test starts."""
    monkeypatch.setenv("HTTP_NETWORK_RELAY_SECRET_KEY", "x")
    monkeypatch.setenv("https_proxy", "http://nowhere.invalid")
    env = child_environment({"ADDED": "1"})
    assert "HTTP_NETWORK_RELAY_SECRET_KEY" not in env
    assert "https_proxy" not in env
    assert env["ADDED"] == "1"


def test_raw_frames_are_well_formed_when_any_size() -> None:
    """RFC 6455, 5.2: the three forms of the length."""
    assert raw.encode_frame(1, b"hi") == b"\x81\x82\0\0\0\0hi"
    assert raw.encode_frame(2, bytes(126))[:4] == b"\x82\xfe\x00\x7e"
    assert raw.encode_frame(2, bytes(65536))[:4] == b"\x82\xff\x00\x00"
    assert raw.encode_frame(9, fin=False, rsv=4, mask=False) == b"\x49\x00"


def test_handshake_status_returns_the_refusal_when_refused() -> None:
    """Status, headers and body of what is not a 101."""
    answer = b'HTTP/1.1 401 No\r\nX-Why: that\r\nContent-Length: 12\r\n\r\n{"code":"a"}'
    with RecordingTarget() as target:
        result: list[raw.Handshake] = []
        url = f"ws://127.0.0.1:{target.port}/here"
        headers = {"X-Mine": "1", "Upgrade": ""}
        asker = threading.Thread(target=lambda: result.append(raw.handshake_status(url, headers)))
        asker.start()
        conversation = target.conversation()
        conversation.wait(lambda me: b"\r\n\r\n" in me.received)
        conversation.send(answer)
        asker.join()
    assert conversation.received.startswith(b"GET /here HTTP/1.1\r\n")
    assert b"X-Mine: 1\r\n" in conversation.received
    assert b"Upgrade: websocket" not in conversation.received
    assert (result[0].status, result[0].headers["x-why"]) == (401, "that")
    assert result[0].json == {"code": "a"}


@pytest.mark.debian("openssl")
def test_certs_are_trusted_when_the_name_fits(certs: Certs) -> None:
    """The CA vouches for 127.0.0.1; the other certificate is for another name."""
    client = ssl.create_default_context(cafile=str(certs.ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    for cert, key, fits in (
        (certs.cert, certs.key, True),
        (certs.wrong_host_cert, certs.wrong_host_key, False),
    ):
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(cert, key)
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        ours = client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
        theirs = server.wrap_bio(to_server, to_client, server_side=True)
        problem = None
        for end in (ours, theirs, ours, theirs):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as exc:
                problem = exc
                break
        assert (problem is None) == fits


@pytest.mark.debian("openssh-server", "openssh-client", "netcat-openbsd")
def test_sshd_lets_us_in_when_through_a_proxy_command(tmp_path: Path) -> None:
    """Own keys, own configuration, and a ProxyCommand with a % in it."""
    with debian.run_sshd(tmp_path / "sshd") as sshd:
        proxy = ["env", "NAME=100% of %h", debian.program("nc"), "127.0.0.1", str(sshd.port)]
        argv = sshd.ssh_argv(proxy, "echo $((6*7))")
        env = child_environment()
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=10)
        assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
        # Either: ssh's SIGHUP may end nc before it has written on the goodbye.
        sshd.process.wait_for_line("^(Disconnected from user|Closing connection to)")


@pytest.mark.debian("nginx", "openssl")
def test_nginx_hands_on_an_upgrade_when_over_tls(tmp_path: Path, certs: Certs) -> None:
    """The project's own example, with the headers that an upgrade needs."""
    with (
        RecordingTarget() as target,
        debian.run_nginx_tls(tmp_path / "nginx", target.port, certs.cert, certs.key) as nginx,
        raw.connect(nginx.url, ca_file=str(certs.ca)) as sock,
    ):
        sock.sendall(raw.upgrade_request(f"{nginx.url}/ws_for_clients", {}))
        conversation = target.conversation()
        conversation.wait(lambda me: b"\r\n\r\n" in me.received)
        head = conversation.received
        assert head.startswith(b"GET /ws_for_clients HTTP/1.1\r\n")
        for line in (b"Connection: upgrade", b"Upgrade: websocket", b"X-Forwarded-For: 127.0.0.1"):
            assert line + b"\r\n" in head
        conversation.send(b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
        assert raw.read_handshake(sock).status == 101
        sock.sendall(b"up")
        conversation.wait(lambda me: me.received.endswith(b"up"))
        conversation.send(b"down")
        assert sock.recv(4) == b"down"


@pytest.mark.debian("tinyproxy")
def test_tinyproxy_connects_when_it_knows_the_user(tmp_path: Path) -> None:
    """CONNECT with the right password only."""
    with (
        EchoTarget() as target,
        debian.run_tinyproxy(tmp_path, user="me", password="pw") as proxy,
    ):
        head = f"CONNECT 127.0.0.1:{target.port} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        for login, status in (("", b"407"), ("Proxy-Authorization: Basic bWU6cHc=\r\n", b"200")):
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as sock:
                sock.sendall(f"{head}{login}\r\n".encode())
                assert sock.recv(4096).split()[1] == status
    assert urlsplit(proxy.url).password == "pw"
