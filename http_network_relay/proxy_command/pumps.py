"""Pumps: stdin to the leg and the leg to stdout, one thread each."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import Any

from http_network_relay.end.read_coalescer import ReadCoalescer
from http_network_relay.end.user_end import UserEnd
from http_network_relay.proxy_command.stdio import (
    CAN_POLL,
    STDIN,
    STDOUT,
    QuickStdout,
    close_stdout,
    enlarge_pipe,
    write_stdout,
)
from http_network_relay.proxy_command.wakeup import Wakeup
from http_network_relay.wire.codes import EXIT_SIGPIPE
from http_network_relay.wire.constants import FLUSH_S, MESSAGE_BYTES
from http_network_relay.wire.errors import RelayError

# Two messages: one read of two costs less than two reads of one.
STDIN_READ_BYTES = 2 * MESSAGE_BYTES

# The wait for credit of bytes resent after a resume; the whole exit takes at most 1 s.
GOODBYE_S = 0.5


class Pumps:
    """stdin -> leg and leg -> stdout, one thread each."""

    def __init__(
        self, end: UserEnd, wakeup: Wakeup, stdin: int = STDIN, stdout: int = STDOUT
    ) -> None:
        self._end = end
        self._wakeup = wakeup
        self._stdin = stdin
        self._stdout = stdout
        self._watches_stdout = CAN_POLL
        self._quick_stdout: QuickStdout | None = None
        with contextlib.suppress(OSError):
            self._quick_stdout = QuickStdout(stdout)
        self._coalescer = ReadCoalescer(STDIN_READ_BYTES)
        self._is_stdin_enlarged = False
        # The poll object and its interests. Used only by pump-up.
        self._poll: Any = None
        self._polled: tuple[bool, bool] | None = None
        # Daemon: a blocked write to stdout cannot be woken, nor on Windows a read of stdin.
        self._up = threading.Thread(target=self._pump_up, name="pump-up", daemon=True)
        self._down = threading.Thread(target=self._pump_down, name="pump-down", daemon=True)
        # Without poll, pump-up may block in a read that cannot be woken.
        self._leave = threading.Thread(target=self._leave_unpolled, name="pump-leave", daemon=True)

    def start(self) -> None:
        """Start both threads. The caller MUST call join()."""
        if self._quick_stdout is not None:
            self._end.inbound.deliver_directly(self._quick_stdout.write)
        self._up.start()
        self._down.start()
        if not CAN_POLL:
            self._leave.start()

    def join(self, timeout_s: float) -> None:
        """Join both threads; the exit of the process ends a thread blocked in stdin or stdout."""
        deadline = time.monotonic() + timeout_s
        for thread in (self._down, self._up):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _leave_unpolled(self) -> None:
        self._wakeup.left.wait()
        if not self._end.is_over:
            self._say_goodbye()

    # stdin -> leg; polls for signals and the close of stdout too, even after stdin's eof.

    def _pump_up(self) -> None:
        end = self._end
        try:
            while not end.is_over and self._wakeup.exit_code is None:
                size = min(end.outbound.credit(), STDIN_READ_BYTES)
                if self._wait(want_stdin=size > 0):
                    self._carry(size)
            if not end.is_over:
                self._say_goodbye()
        except OSError as exc:
            end.reset(RelayError("internal_error", f"reading stdin failed: {exc.strerror}"))

    def _carry(self, size: int) -> bool:
        data = os.read(self._stdin, size)
        # More than one message: the pipe, of 64 KiB by default, was full or nearly full.
        if len(data) > MESSAGE_BYTES and not self._is_stdin_enlarged:
            self._is_stdin_enlarged = True
            enlarge_pipe(self._stdin)
        if data:
            self._end.outbound.send(data)
            if wait_s := self._coalescer.wait_s(len(data), size, time.monotonic()):
                time.sleep(wait_s)
        else:
            self._end.outbound.send_eof()
        return bool(data)

    def _wait(self, *, want_stdin: bool) -> bool:
        """Wait for an event of pump-up; return whether stdin can be read."""
        if not CAN_POLL:
            if not want_stdin:
                self._wakeup.woken.wait()
                self._wakeup.woken.clear()
            return want_stdin
        wanted = (want_stdin, self._watches_stdout)
        if wanted != self._polled:
            self._polled, self._poll = wanted, self._make_poll(*wanted)
        ready = dict(self._poll.poll())
        if self._wakeup.reader in ready:
            os.read(self._wakeup.reader, 4096)
        if ready.get(self._stdout, 0) & select.POLLNVAL:
            self._watches_stdout = False
        elif self._stdout in ready and self._watches_stdout:
            self._wakeup.leave(EXIT_SIGPIPE)
        return self._stdin in ready

    def _make_poll(self, want_stdin: bool, watches_stdout: bool) -> Any:
        poll = select.poll()
        poll.register(self._wakeup.reader, select.POLLIN)
        if want_stdin:
            poll.register(self._stdin, select.POLLIN)
        if watches_stdout:
            poll.register(self._stdout, 0)  # 0: POLLERR and POLLHUP are always reported.
        return poll

    def _say_goodbye(self) -> None:
        """Send the bytes ready on stdin, then reset with `user_gone`."""
        end = self._end
        if end.has_both_eofs:
            end.wait_over(FLUSH_S)
        else:
            # Bytes taken before a resume may still wait for credit.
            end.outbound.wait_sent(GOODBYE_S)
            self._take_the_rest()
        end.reset(RelayError("user_gone", "the proxy user has gone"))

    def _take_the_rest(self) -> None:
        if CAN_POLL:
            poll = select.poll()
            poll.register(self._stdin, select.POLLIN)
            while (size := self._end.outbound.credit()) and poll.poll(0) and self._carry(size):
                pass

    # leg -> stdout

    def _pump_down(self) -> None:
        end = self._end
        try:
            while chunk := end.inbound.next_chunk():
                write_stdout(self._stdout, chunk)
                end.inbound.delivered(len(chunk))
            if chunk == b"":
                self._watches_stdout = False
                self._wakeup.wake()
                self._close_quick_stdout()
                close_stdout(self._stdout)
                end.inbound.delivered_eof()
        except BrokenPipeError:
            self._wakeup.leave(EXIT_SIGPIPE)
        except OSError as exc:
            end.reset(RelayError("internal_error", f"writing stdout failed: {exc.strerror}"))
        finally:
            self._close_quick_stdout()

    def _close_quick_stdout(self) -> None:
        self._end.inbound.deliver_directly(None)
        if self._quick_stdout is not None:
            self._quick_stdout.close()
