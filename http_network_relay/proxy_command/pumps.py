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
from http_network_relay.wire.codes import EXIT_SIGPIPE
from http_network_relay.wire.constants import FLUSH_S, MESSAGE_BYTES
from http_network_relay.wire.errors import RelayError

# Two messages, which cost less than twice one.
STDIN_READ_BYTES = 2 * MESSAGE_BYTES

# For the credit of bytes that are sent again; all of a user's leaving takes a second at most.
GOODBYE_S = 0.5


class Pumps:
    """stdin -> leg and leg -> stdout, one thread each."""

    def __init__(self) -> None:
        # 128+n once the user has gone. Written by the timer or a pump, the first wins.
        self.exit_code: int | None = None
        self._watches_stdout = CAN_POLL
        self._quick_stdout: QuickStdout | None = None
        self._gather = ReadCoalescer(STDIN_READ_BYTES)
        self._is_stdin_enlarged = False
        # Where there is no poll.
        self._woken = threading.Event()
        self._left = threading.Event()
        if CAN_POLL:
            self._wake_r, self._wake_w = os.pipe()
            os.set_blocking(self._wake_r, False)
            os.set_blocking(self._wake_w, False)
        # What pump-up waits with, and for what it was made. Its own.
        self._poll: Any = None
        self._polled: tuple[bool, bool] | None = None

    def start(self, end: UserEnd) -> None:
        """Start both threads; join() joins them."""
        self._end = end
        with contextlib.suppress(OSError):
            self._quick_stdout = QuickStdout()
            end.inbound.deliver_directly(self._quick_stdout.write)
        # Daemon: a write to stdout cannot be woken, nor on Windows a read of stdin.
        self._up = threading.Thread(target=self._pump_up, name="pump-up", daemon=True)
        self._down = threading.Thread(target=self._pump_down, name="pump-down", daemon=True)
        self._up.start()
        self._down.start()
        if not CAN_POLL:  # Pump-up may be inside a read that nothing wakes.
            threading.Thread(target=self._leave_unpolled, name="pump-leave", daemon=True).start()

    def join(self, timeout_s: float) -> None:
        """Join both; a pump that is stuck in stdin or stdout is left to the exit."""
        deadline = time.monotonic() + timeout_s
        for thread in (self._down, self._up):
            thread.join(max(0.0, deadline - time.monotonic()))

    def leave(self, exit_code: int) -> None:
        """Note that the user has gone; pump-up sees to it. Never waits."""
        if self.exit_code is None:
            self.exit_code = exit_code
        self.wake()
        self._left.set()

    def wake(self) -> None:
        """Let pump-up look: credit came, the user has gone, or the tunnel is over."""
        if CAN_POLL:
            with contextlib.suppress(BlockingIOError):  # Full: it is awake.
                os.write(self._wake_w, b"w")
        else:
            self._woken.set()

    def _leave_unpolled(self) -> None:
        self._left.wait()
        if not self._end.is_over:
            self._say_goodbye()

    # stdin -> leg; watches signals and stdout meanwhile, and on after stdin's end.

    def _pump_up(self) -> None:
        end = self._end
        try:
            while not end.is_over and self.exit_code is None:
                size = min(end.outbound.credit(), STDIN_READ_BYTES)
                if self._wait(want_stdin=size > 0):
                    self._carry(size)
            if not end.is_over:
                self._say_goodbye()
        except OSError as exc:
            end.reset(RelayError("internal_error", f"reading stdin failed: {exc.strerror}"))

    def _carry(self, size: int) -> bool:
        data = os.read(STDIN, size)
        # All that a pipe holds, or nearly.
        if len(data) > MESSAGE_BYTES and not self._is_stdin_enlarged:
            self._is_stdin_enlarged = True
            enlarge_pipe(STDIN)
        if data:
            self._end.outbound.send(data)
            if wait_s := self._gather.wait_s(len(data), size, time.monotonic()):
                time.sleep(wait_s)
        else:
            self._end.outbound.send_eof()
        return bool(data)

    def _wait(self, *, want_stdin: bool) -> bool:
        """Wait for what pump-up must act on; True if stdin can be read."""
        if not CAN_POLL:
            if not want_stdin:
                self._woken.wait()
                self._woken.clear()
            return want_stdin
        wanted = (want_stdin, self._watches_stdout)
        if wanted != self._polled:
            self._polled, self._poll = wanted, self._make_poll(*wanted)
        ready = dict(self._poll.poll())
        if self._wake_r in ready:
            os.read(self._wake_r, 4096)
        if ready.get(STDOUT, 0) & select.POLLNVAL:
            self._watches_stdout = False
        elif STDOUT in ready and self._watches_stdout:
            self.leave(EXIT_SIGPIPE)
        return STDIN in ready

    def _make_poll(self, want_stdin: bool, watches_stdout: bool) -> Any:
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        if want_stdin:
            poll.register(STDIN, select.POLLIN)
        if watches_stdout:
            poll.register(STDOUT, 0)  # POLLERR and POLLHUP are told unasked.
        return poll

    def _say_goodbye(self) -> None:
        """Take what stdin still holds without waiting, then tell the client."""
        end = self._end
        if end.has_both_eofs:
            end.wait_over(FLUSH_S)
        else:
            # What was taken before a resume may still wait for its credit.
            end.outbound.wait_sent(GOODBYE_S)
            self._take_the_rest()
        end.reset(RelayError("user_gone", "the proxy user has gone"))

    def _take_the_rest(self) -> None:
        if CAN_POLL:
            poll = select.poll()
            poll.register(STDIN, select.POLLIN)
            while (size := self._end.outbound.credit()) and poll.poll(0) and self._carry(size):
                pass

    # leg -> stdout

    def _pump_down(self) -> None:
        end = self._end
        try:
            while chunk := end.inbound.next_chunk():
                write_stdout(chunk)
                end.inbound.delivered(len(chunk))
            if chunk == b"":
                self._watches_stdout = False
                self.wake()
                self._close_quick_stdout()
                close_stdout()
                end.inbound.delivered_eof()
        except BrokenPipeError:
            self.leave(EXIT_SIGPIPE)
        except OSError as exc:
            end.reset(RelayError("internal_error", f"writing stdout failed: {exc.strerror}"))
        finally:
            self._close_quick_stdout()

    def _close_quick_stdout(self) -> None:
        self._end.inbound.deliver_directly(None)
        if self._quick_stdout is not None:
            self._quick_stdout.close()
