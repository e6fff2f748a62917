"""One tunnel of the client: dials the target, which one thread reads and one writes.

The reader thread owns the target's socket, starts and joins the writer, and closes the socket.
Both threads outlive the leg; the writer ends the tunnel when the grace period is over.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from http_network_relay.dial.connect import dial_tcp
from http_network_relay.dial.deadline import Deadline
from http_network_relay.end.channel import Channel
from http_network_relay.end.client_end import ClientEnd
from http_network_relay.end.read_coalescer import ReadCoalescer
from http_network_relay.leg.duplex_socket import DONT_WAIT, wait_ready
from http_network_relay.rules.target import Host, RuleError, TargetRule, canonical_host
from http_network_relay.wire.constants import MESSAGE_BYTES
from http_network_relay.wire.controls import Open, Opened, OpenRefused, Resume
from http_network_relay.wire.errors import DialError, RelayError

# The limit for dialling a target, name lookup included. Shorter than the proxy command's
# 15 s, so that the proxy user reads the client's reason.
DIAL_TARGET_S = 10.0
# Two messages: one read of two costs less than two reads, and a target's socket buffers both.
# A larger buffer would exceed glibc's threshold, and each allocation would be an mmap().
_READ_BYTES = 2 * MESSAGE_BYTES
# The interval at which a blocked write checks whether the tunnel has ended.
_STUCK_WRITE_S = 0.25
# The interval at which a target is checked for an RST after its eof.
_WATCH_S = 0.5
_REFUSED_CODES = {
    "refused": "target_refused",
    "timeout": "target_timeout",
    "unknown": "target_unknown",
    "unreachable": "target_unreachable",
    "denied": "denied_by_client",
}

log = logging.getLogger("http_network_relay.client")


class Forwarder:
    """A tunnel from `open` to its end. The leg's reader calls `end.on_...`, which never wait."""

    def __init__(
        self,
        opening: Open,
        channel: Channel,
        max_window_bytes: int,
        grace_s: int,
        allow: tuple[TargetRule, ...],
        on_closed: Callable[[Forwarder], None],
    ) -> None:
        self.key = (opening.user, opening.tunnel_id)
        self.end = ClientEnd(channel, max_window_bytes)
        self._opening = opening
        # Only for `opened` and `refused`: a resume moves the tunnel to another channel.
        self._first_channel = channel
        self._grace_s = grace_s
        # Empty: every target is allowed.
        self._allow = allow
        self._on_closed = on_closed
        self._sock: socket.socket | None = None
        self._target_is_read = threading.Event()
        self._begun = time.monotonic()
        short_id = opening.tunnel_id[:8]
        self.about = f"tunnel={short_id} user={opening.user}"
        self.thread = threading.Thread(target=self._run, name=f"tunnel-reader:{short_id}")
        self._writer = threading.Thread(target=self._write, name=f"tunnel-writer:{short_id}")

    def is_opened_by(self, control: Resume) -> bool:
        """Whether a `resume` has the token and the target of the `open`. In constant time."""
        opening = self._opening
        asked = (control.host, control.port, control.protocol)
        has_target = asked == (opening.host, opening.port, opening.protocol)
        has_token = hmac.compare_digest(control.resume_token, opening.resume_token)
        return has_token and has_target

    def _run(self) -> None:
        try:
            self._sock = self._dial()
            if self._sock is not None:
                self._writer.start()
                self._read(self._sock)
                self._watch(self._sock)
                self._writer.join()
                self._close(self._sock)
        except Exception:
            log.exception("tunnel failed %s", self.about)
            self.end.reset(RelayError("internal_error", "the client failed; its log says why"))
            if self._sock is not None and self._writer.ident is None:
                self._close(self._sock)  # The writer did not start: no other thread uses it.
        finally:
            self.end.forget()
            self._on_closed(self)

    def _dial(self) -> socket.socket | None:
        host, port = self._opening.host, self._opening.port
        deadline = Deadline(DIAL_TARGET_S, lambda: self.end.is_over)
        try:
            # Refuse a host that the resolver reads as an address and the rules as a name.
            asked = canonical_host(host)
        except RuleError as exc:
            log.info("tunnel refused %s reason=target_invalid: %s", self.about, exc)
            self._refuse(RelayError("target_invalid", str(exc)))
            return None
        try:
            sock = dial_tcp(host, port, deadline, self._filter(asked))
        except DialError as exc:
            if exc.kind in _REFUSED_CODES:
                log.info("tunnel refused %s reason=%s: %s", self.about, exc.kind, exc)
                self._refuse(RelayError(_REFUSED_CODES[exc.kind], str(exc)))
            return None
        if DONT_WAIT:
            self.end.inbound.deliver_directly(functools.partial(_send_now, sock))
        if not self.end.on_open(self._opening.limit, min(self._grace_s, self._opening.grace_s)):
            self.end.inbound.deliver_directly(None)
            sock.close()  # The tunnel ended during the dial.
            return None
        # Log before `opened` is sent: afterwards another thread may log the end first.
        log.info("tunnel opened %s target=%s:%d", self.about, host, port)
        self._first_channel.put_first(Opened(self.end.first_limit, self._grace_s))
        self._first_channel.push()
        return sock

    def _filter(self, asked: Host) -> Callable[[str], bool]:
        """Return the predicate that allows or denies an address of `asked`."""
        rules, port = self._allow, self._opening.port
        if not rules or any(rule.allows_asked(asked, port) for rule in rules):
            return lambda _: True
        return lambda address: any(rule.allows_address(address, port) for rule in rules)

    def _refuse(self, error: RelayError) -> None:
        self.end.on_end(error)
        refuse(self._first_channel, error)

    # Target to leg.

    def _read(self, sock: socket.socket) -> None:
        end, gather = self.end, ReadCoalescer(_READ_BYTES)
        try:
            while size := min(end.outbound.wait_credit(), _READ_BYTES):
                data = sock.recv(size)
                if data:
                    end.outbound.send(data)
                    if wait_s := gather.wait_s(len(data), size, time.monotonic()):
                        time.sleep(wait_s)
                elif end.outbound.send_eof():
                    break
                else:
                    end.reset(RelayError("target_reset", "the target closed the connection"))
                    break
            if end.ended is not None and end.ended.code == "user_gone":
                # Read to eof: close() with unread bytes would send RST instead of FIN. Until
                # must_stop(), as some targets never end and SHUT_RD does not stop their sending.
                while not end.must_stop() and sock.recv(65536):
                    pass
        except OSError as exc:
            end.reset(_target_error(exc))
        finally:
            self._target_is_read.set()

    def _watch(self, sock: socket.socket) -> None:
        """Wait for the end; poll SO_ERROR, as no read reports an RST after the target's eof."""
        end = self.end
        while not end.is_over:
            end.wait_over(_WATCH_S)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                end.reset(_target_error(OSError(code, os.strerror(code))))

    # Leg to target.

    def _write(self) -> None:
        sock, end = self._sock, self.end
        assert sock is not None  # Started by _run() after the dial.
        try:
            while chunk := end.inbound.next_chunk():
                if not self._write_chunk(sock, chunk):
                    break
                end.inbound.delivered(len(chunk))
            if chunk == b"":
                sock.shutdown(socket.SHUT_WR)
                end.inbound.delivered_eof()
        except OSError as exc:
            # No reset yet: the reader first sends the target's last bytes to the user.
            end.fail_consumer(_target_error(exc))
        except Exception:
            log.exception("tunnel failed %s", self.about)
            end.reset(RelayError("internal_error", "the client failed; its log says why"))
        end.wait_over()
        if end.ended is not None:
            self._wake_reader(sock, is_clean=end.ended.code == "user_gone")

    def _write_chunk(self, sock: socket.socket, chunk: Any) -> bool:
        """Write all; return False if the tunnel ended and the time to deliver has passed."""
        view = memoryview(chunk)
        while view:
            try:
                view = view[sock.send(view, DONT_WAIT) :]
            except BlockingIOError:
                if self.end.must_stop():
                    return False
                wait_ready(sock, write=True, timeout_s=_STUCK_WRITE_S)
        return True

    def _wake_reader(self, sock: socket.socket, *, is_clean: bool) -> None:
        """Make the reader's recv() return; after a clean end, first wait for the target's eof."""
        with contextlib.suppress(OSError):
            if is_clean:
                sock.shutdown(socket.SHUT_WR)
                self._target_is_read.wait(self.end.deliver_left_s())
            # Not SHUT_RDWR: a FIN would signal a clean eof to the target.
            sock.shutdown(socket.SHUT_RD)

    def _close(self, sock: socket.socket) -> None:
        """Close with FIN after a clean end or `user_gone`, with RST after any other end."""
        ended = self.end.ended
        if ended is not None and ended.code != "user_gone":
            linger_0 = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_0)
        self.end.inbound.deliver_directly(None)
        sock.close()
        down, up = self.end.counts
        reason = ended.code if ended is not None else "eof"
        log.info(
            "tunnel closed %s reason=%s up=%d down=%d secs=%.1f",
            self.about,
            reason,
            up,
            down,
            time.monotonic() - self._begun,
        )


def _send_now(sock: socket.socket, data: Any) -> int:
    return sock.send(data, DONT_WAIT)


def refuse(channel: Channel, error: RelayError) -> None:
    """Answer an `open` or `resume` with `refused`."""
    channel.put_first(OpenRefused(error.code, str(error)))


def _target_error(exc: OSError) -> RelayError:
    if isinstance(exc, (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)):
        return RelayError("target_reset", "the target reset the connection")
    return RelayError(
        "target_lost", f"the connection to the target was lost: {exc.strerror or exc}"
    )
