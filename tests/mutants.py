"""Break each rule of the design once, and see the test that guards it fail.

`make mutants` copies the project, applies one small patch at a time, runs the tests
named beside it, and expects them to fail. A patch that no longer applies, and a test
that passes with its rule broken, are both failures of this command.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("client", "server", "tests", "docs", "deploy", ".ci")
COPIED_FILES = ("ssh_proxy_command.py", "wsgi.py", "gunicorn.conf.py", "pyproject.toml")
# A mutant that hangs is caught as well; no test of these takes a tenth of it.
TEST_S = 60.0
# pytest's exit code for "some test failed"; others mean that no test has judged.
TESTS_FAILED = 1


class Mutant(NamedTuple):
    """`old` stands exactly once in `file` and becomes `new`; then `tests` must fail."""

    rule: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "1: nobody gets in without a secret",
        "server/credentials.py",
        "return digest if any(same) and not presented.startswith(HASH_PREFIX) else None",
        "return digest",
        (
            "tests/unit/server/test_credentials.py",
            "tests/integration/server/test_doors.py::test_refusal_is_the_same_when_name_or_secret_is_wrong",
        ),
    ),
    Mutant(
        "1: a head has ten seconds",
        "server/worker.py",
        "while self._pending and (head := next(iter(self._pending))).deadline <= now:",
        "while self._pending and (head := next(iter(self._pending))).deadline <= 0:",
        (
            "tests/integration/server/test_doors.py::test_head_is_dropped_when_it_takes_longer_than_ten_seconds",
        ),
    ),
    Mutant(
        "1: nothing lingers on the accept thread",
        "server/worker.py",
        "        sock.setblocking(False)\n        # The plain",
        "        sock.settimeout(2.0)\n        # The plain",
        (
            "tests/integration/server/test_doors.py::test_health_and_tunnels_answer_when_200_peers_stall",
        ),
    ),
    Mutant(
        "1: a slot comes back when its leg ends",
        "server/app.py",
        "            relay.release(slot)",
        "            pass",
        (
            "tests/integration/server/test_doors.py::test_relay_answers_503_and_health_when_all_slots_are_taken",
        ),
    ),
    Mutant(
        "1: at most three quarters go to clients",
        "server/registry.py",
        "if len(self._clients) >= self.clients_at_most:",
        "if False:",
        ("tests/unit/server/test_registry.py",),
    ),
    Mutant(
        "1: the newcomer takes the slot over",
        "server/registry.py",
        "                self._slots.discard(old)\n",
        "",
        ("tests/unit/server/test_registry.py",),
    ),
    Mutant(
        "2: the server never takes more than the window",
        "server/credit.py",
        "        if self.forwarded + size > self.limit:",
        "        if False:",
        (
            "tests/unit/server/test_credit.py",
            "tests/integration/server/test_tunnels.py::test_tunnel_is_reset_at_both_ends_when_a_rule_is_broken",
        ),
    ),
    Mutant(
        "2: an end never takes more than its window",
        "client/stream.py",
        "        if self.received + size > self.limit:",
        "        if False:",
        ("tests/unit/client/test_stream.py",),
    ),
    Mutant(
        "2: what is sent again is not kept twice",
        "client/stream.py",
        "whole = bytes(piece) if isinstance(piece, bytearray) else piece",
        "whole = bytes(memoryview(piece))",
        ("tests/unit/client/test_tunnel_end_resume.py",),
    ),
    Mutant(
        "10: a user who goes takes along what a resume left without credit",
        "ssh_proxy_command.py",
        "            end.wait_sent(GOODBYE_S)\n",
        "",
        ("tests/unit/script/test_pumps.py",),
    ),
    Mutant(
        "2: small pieces do not cost an entry each",
        "client/outbox.py",
        "if queue and len(queue[-1]) + len(data) <= max_bytes:",
        "if False:",
        ("tests/unit/client/test_outbox.py",),
    ),
    Mutant(
        "5: the window shrinks while trips are longer than the way",
        "client/window.py",
        "        elif self._trip_s > self._longest_s:\n            self._shrink()\n",
        "",
        ("tests/unit/client/test_window.py",),
    ),
    Mutant(
        "5: a queue that always stands is not taken for the way",
        "client/window.py",
        "        self._resize(self.size * way_s / self._trip_s / 2)",
        "        self._resize(self.size)",
        ("tests/unit/client/test_window.py",),
    ),
    Mutant(
        "5: long trips are not taken for a queue for ever",
        "client/window.py",
        "elif self.size * 2 <= size and",
        "elif False and",
        ("tests/unit/client/test_window.py",),
    ),
    Mutant(
        "5: the window does not grow for bytes that wait in our own hands",
        "client/window.py",
        "elif self._in_hand > self.size * _IN_HAND:",
        "elif False:",
        ("tests/unit/client/test_window.py",),
    ),
    Mutant(
        "5: a window that grew does not hold an ack back",
        "client/stream.py",
        "granted = min(self.window, self.limit - self._acked)",
        "granted = self.window",
        ("tests/unit/client/test_window.py",),
    ),
    Mutant(
        "5: a window is not kept when idle",
        "client/window.py",
        "if now - self._heard_at >= max(_IDLE_S, 4 * self._last_trip_s):",
        "if False:",
        ("tests/unit/client/test_window.py",),
    ),
    Mutant(
        "2: limits only grow",
        "client/stream.py",
        "self.limit = min(MAX_COUNT, max(before, self.delivered + self.window))",
        "self.limit = min(MAX_COUNT, self.delivered + self.window - self.window // 2)",
        ("tests/unit/client/test_stream.py",),
    ),
    Mutant(
        "3: the server's reader never writes",
        "server/transport.py",
        "        if self.outbox is None:\n",
        "        if True:\n",
        (
            "tests/unit/server/test_transport.py",
            "tests/integration/server/test_legs.py::test_frames_stay_whole_when_pings_come_while_a_send_is_stuck",
        ),
    ),
    Mutant(
        "3: a client that dials reads on",
        "client/tunnels.py",
        "            tunnel.thread.start()\n",
        "            tunnel.thread.start()\n            tunnel.thread.join(3)\n",
        ("tests/integration/client/test_leg.py",),
    ),
    Mutant(
        "4: frames are whole",
        "client/outlet.py",
        "            with self._send_lock:\n                self._send_rest()\n",
        "            if True:\n                self._send_rest()\n",
        ("tests/integration/client/test_outlet.py",),
    ),
    Mutant(
        "4: the one who sends looks again after the release",
        "client/outlet.py",
        "        while self._outbox.has_frames and self._rest is None:",
        "        if self._outbox.has_frames and self._rest is None:",
        (
            "tests/integration/client/test_outlet.py::test_nothing_is_lost_when_a_push_finds_the_lock_taken",
        ),
    ),
    Mutant(
        "4: the rest of a frame goes first, under a push",
        "client/outlet.py",
        "        while self._rest is None and not self._is_stopped:",
        "        while not self._is_stopped:",
        (
            "tests/integration/client/test_outlet.py::test_rest_of_a_frame_is_the_writers_and_goes_first",
        ),
    ),
    Mutant(
        "4: the rest of a frame goes first, under the writer",
        "client/outlet.py",
        "            with self._send_lock:\n                self._send_rest()\n",
        "            with self._send_lock:\n",
        (
            "tests/integration/client/test_outlet.py::test_rest_of_a_frame_is_the_writers_and_goes_first",
        ),
    ),
    Mutant(
        "4: nobody sends on a socket that is freed",
        "client/outlet.py",
        "        while self._rest is None and not self._is_stopped:",
        "        while self._rest is None:",
        ("tests/integration/client/test_outlet.py::test_nobody_sends_after_stop",),
    ),
    Mutant(
        "4: one thread inside a TLS object, reading",
        "client/duplex.py",
        "                with self._tls_lock:\n                    if isinstance(where, int):",
        "                if True:\n                    if isinstance(where, int):",
        (
            "tests/integration/client/test_duplex.py::test_no_two_threads_are_ever_inside_one_tls_object",
        ),
    ),
    Mutant(
        "4: one thread inside a TLS object, writing",
        "client/duplex.py",
        "                with self._tls_lock:\n                    sent =",
        "                if True:\n                    sent =",
        (
            "tests/integration/client/test_duplex.py::test_no_two_threads_are_ever_inside_one_tls_object",
        ),
    ),
    Mutant(
        "4: the same bytes again after WANT_WRITE",
        "client/duplex.py",
        "                wait_ready(self._sock, write=is_write, timeout_s=timeout_s)\n",
        "                wait_ready(self._sock, write=is_write, timeout_s=timeout_s)\n                view = view[1:]\n",
        (
            "tests/integration/client/test_duplex.py::test_same_bytes_are_offered_again_after_want_write",
        ),
    ),
    Mutant(
        "4: the client's reader never writes a pong",
        "client/transport.py",
        'self.outbox.put_leg("pong", Frame(OP_PONG, b"", payload))',
        "self._duplex.send_now(bytes((0x8A, 0x80 | len(payload))) + bytes(4), payload)",
        (
            "tests/integration/client/test_transport.py::test_pings_are_answered_while_a_large_send_is_stuck_and_no_frame_breaks",
        ),
    ),
    Mutant(
        "wire: a fragment is no message",
        "client/framing.py",
        "if first not in _WHOLE or",
        "if first | _FIN not in _WHOLE or",
        ("tests/unit/client/test_framing.py",),
    ),
    Mutant(
        "wire: behind a fragment all is the library's",
        "client/framing.py",
        "            # From what is not a whole message on, the stream is the library's.\n            self._others = sys.maxsize\n",
        "            self._others = 2 + size % _MASK\n",
        ("tests/unit/client/test_framing.py",),
    ),
    Mutant(
        "wire: no zero key without agreement",
        "client/transport.py",
        "_zero_key if asks_for_zero and answered == MASK_ZERO else _random_key",
        "_zero_key if asks_for_zero else _random_key",
        (
            "tests/integration/client/test_transport.py::test_mask_of_every_frame_is_new_when_the_server_does_not_agree",
        ),
    ),
    Mutant(
        "wire: no zero key is asked for in clear to another machine",
        "client/transport.py",
        "asks_for_zero = endpoint.is_tls or is_here",
        "asks_for_zero = True",
        (
            "tests/integration/client/test_transport.py::test_mask_of_every_frame_is_new_in_clear_to_another_machine",
        ),
    ),
    Mutant(
        "wire: the server agrees to a zero key only when it is asked",
        "server/transport.py",
        "agrees_to_zero=asked == MASK_ZERO",
        "agrees_to_zero=True",
        ("tests/unit/server/test_transport.py",),
    ),
    Mutant(
        "wire: what is handed on at once never overtakes what is queued",
        "client/tunnel_end.py",
        "is_busy = self._consumer_hands_on or self._reader_hands_on or self._inbound",
        "is_busy = self._consumer_hands_on or self._reader_hands_on",
        ("tests/unit/client/test_tunnel_end.py",),
    ),
    Mutant(
        "wire: nor what the consumer has in its hands",
        "client/tunnel_end.py",
        "is_busy = self._consumer_hands_on or self._reader_hands_on or self._inbound",
        "is_busy = self._reader_hands_on or self._inbound",
        (
            "tests/unit/client/test_tunnel_end.py::test_reader_waits_its_turn_while_the_consumer_is_in_a_chunk",
        ),
    ),
    Mutant(
        "5: channels take turns",
        "client/outbox.py",
        "            self._turns.append(channel)\n        else:\n            del self._channels[channel]\n        return frame",
        "            self._turns.appendleft(channel)\n        else:\n            del self._channels[channel]\n        return frame",
        ("tests/unit/client/test_outbox.py",),
    ),
    Mutant(
        "5: acks overtake data",
        "client/outbox.py",
        "        if self._fast:\n            key",
        "        if self._fast and not self._turns:\n            key",
        ("tests/unit/client/test_outbox.py",),
    ),
    Mutant(
        "6: only that very leg is released",
        "server/registry.py",
        "            if self._clients.get(slot.name) is slot:",
        "            if slot.name in self._clients:",
        ("tests/unit/server/test_registry.py",),
    ),
    Mutant(
        "6: a closed leg cannot be attached",
        "server/registry.py",
        "if slot not in self._slots or self._is_draining:",
        "if self._is_draining:",
        ("tests/unit/server/test_registry.py",),
    ),
    Mutant(
        "6: another instance closes with 4409",
        "server/registry.py",
        "CLOSE_REPLACED_BY_SELF if same else CLOSE_REPLACED_BY_OTHER",
        "CLOSE_REPLACED_BY_SELF",
        ("tests/unit/server/test_registry.py", "tests/integration/server/test_legs.py"),
    ),
    Mutant(
        "7: the server gives a silent leg up",
        "server/leg.py",
        "abort_at = min(silent_at, self._abort_at)",
        "abort_at = self._abort_at",
        ("tests/integration/server/test_legs.py::test_leg_is_given_up_when_it_is_silent",),
    ),
    Mutant(
        "7: an end gives a silent leg up",
        "client/transport.py",
        "        if now >= silent_at:\n",
        "        if False:\n",
        (
            "tests/integration/client/test_transport.py::test_silence_gives_the_leg_up_after_two_and_a_half_intervals",
        ),
    ),
    Mutant(
        "7: the timer never waits for a lock",
        "client/outbox.py",
        "if not self._ready.acquire(blocking=False):",
        "if not self._ready.acquire():",
        ("tests/unit/client/test_outbox.py::test_try_put_leg_never_waits_while_the_lock_is_held",),
    ),
    Mutant(
        "8: a dial ends by its deadline",
        "client/dial.py",
        "    if time.monotonic() >= deadline:\n        raise DialError",
        "    if False:\n        raise DialError",
        ("tests/integration/client/test_dial.py::test_deadline_holds_when_nothing_answers",),
    ),
    Mutant(
        "8: a stuck name lookup ends by the deadline",
        "client/dial.py",
        "while not is_done.wait(_slice_s(deadline)):",
        "while not is_done.wait():",
        ("tests/integration/client/test_dial.py::test_stuck_lookup_ends_by_the_deadline",),
    ),
    Mutant(
        "8: a target that does not read ends its tunnel",
        "client/tunnel.py",
        "                if self.end.must_stop():\n",
        "                if False:\n",
        (
            "tests/integration/client/test_tunnel.py::test_target_that_does_not_read_delays_the_end_by_a_second",
        ),
    ),
    Mutant(
        "9: legs close with 1012",
        "server/relay.py",
        'leg.end(CLOSE_RESTART, "server_restart")\n\n    def stop',
        'leg.abort("server_restart")\n\n    def stop',
        (
            "tests/integration/server/test_lifecycle.py::test_every_leg_closes_with_1012_when_the_server_is_told_to_stop",
        ),
    ),
    Mutant(
        "9: every stop signal leads to the one drain",
        "server/worker.py",
        "        self.handle_exit(sig, frame)",
        "        super().handle_quit(sig, frame)",
        ("tests/integration/server/test_lifecycle.py",),
    ),
    Mutant(
        "10: no secret in a repr",
        "client/config.py",
        "    secret: str = field(repr=False)",
        "    secret: str = field()",
        ("tests/unit/client/test_config.py",),
    ),
    Mutant(
        "10: each error has its exit code",
        "client/errors.py",
        '"unauthorized": (EXIT_UNAUTHORIZED, False)',
        '"unauthorized": (EXIT_SERVER, False)',
        ("tests/e2e/test_exit_codes.py::test_one_line_and_a_code_when_no_tunnel_comes_about",),
    ),
    Mutant(
        "wire: the final ack",
        "client/tunnel_end.py",
        "            self._link.put_ack(ack)\n            # Only now",
        "            # Only now",
        (
            "tests/integration/client/test_tunnel.py::test_bytes_go_both_ways_and_both_eofs_end_the_tunnel",
        ),
    ),
    Mutant(
        "wire: any other end is a reset at the target",
        "client/tunnel.py",
        'if ended is not None and ended.code != "user_gone":\n            linger_0',
        "if False:\n            linger_0",
        ("tests/integration/client/test_tunnel.py::test_any_other_end_is_a_reset_at_the_target",),
    ),
    Mutant(
        "wire: no FIN before that reset",
        "client/tunnel.py",
        "sock.shutdown(socket.SHUT_RD)",
        "sock.shutdown(socket.SHUT_RDWR)",
        ("tests/integration/client/test_tunnel.py::test_any_other_end_is_a_reset_at_the_target",),
    ),
    Mutant(
        "wire: user_gone takes its turn",
        "client/tunnel_end.py",
        '_IN_TURN = ("user_gone", "target_reset")',
        '_IN_TURN = ("target_reset",)',
        (
            "tests/unit/script",
            "tests/e2e/test_ssh.py::test_no_tunnel_is_left_when_fifty_short_sessions_ended",
        ),
    ),
    Mutant(
        "wire: redirects are not followed",
        "client/transport.py",
        "redirect_limit=0",
        "redirect_limit=3",
        ("tests/integration/client/test_transport.py::test_redirect_is_named_and_never_followed",),
    ),
    Mutant(
        "access: a hash is never a password",
        "server/credentials.py",
        " and not presented.startswith(HASH_PREFIX)",
        "",
        ("tests/unit/server/test_credentials.py::test_hash_is_never_a_password",),
    ),
    Mutant(
        "access: an unknown name costs as many comparisons",
        "server/credentials.py",
        "candidates = (*known, *[_NO_DIGEST] * (self._most - len(known)))",
        "candidates = known",
        (
            "tests/unit/server/test_credentials.py::test_comparisons_are_as_many_when_the_name_is_unknown",
        ),
    ),
    Mutant(
        "access: what only looks like an address is refused",
        "client/rules.py",
        "    if matches(_NUMBER, labels[-1]):",
        "    if labels[-1].isdecimal():",
        ("tests/unit/client/test_rules.py",),
    ),
    Mutant(
        "access: IPv4 comes out of its mapped form",
        "client/rules.py",
        "return address.ipv4_mapped or IPv6Address(int(address))",
        "return IPv6Address(int(address))",
        ("tests/unit/client/test_rules.py",),
    ),
    Mutant(
        "access: a star stays within its label",
        "client/rules.py",
        "return len(labels) == len(patterns) and all(map(_is_glob_match, patterns, labels))",
        "return _is_glob_match(self.what, host)",
        ("tests/unit/client/test_rules.py",),
    ),
    Mutant(
        "access: a rule that names no client is an error",
        "server/credentials_form.py",
        'if rule.client != "*" and not self._client_names.has_match(rule):',
        "if False:",
        ("tests/unit/server/test_credentials_form.py",),
    ),
    Mutant(
        "access: a rule that has no effect beside another one is an error",
        "server/credentials_form.py",
        "if found is not None:\n            covered",
        "if False:\n            covered",
        ("tests/unit/server/test_credentials_form.py",),
    ),
    Mutant(
        "access: a name covers another one label by label",
        "client/rules.py",
        "return len(patterns) == len(others) and all(map(covers_names, patterns, others))",
        "return covers_names(what, other)",
        ("tests/unit/client/test_covering.py",),
    ),
    Mutant(
        "access: edits wait for each other",
        "server/credentials_write.py",
        "while not _try_lock(descriptor):",
        "while False:",
        (
            "tests/unit/server/test_credentials_command.py::test_no_edit_is_lost_when_many_run_at_once",
        ),
    ),
    Mutant(
        "access: a version is read twice",
        "server/watch.py",
        "if is_same and not self._is_fresh and not self._vain_looks:",
        "if is_same and not self._vain_looks:",
        ("tests/unit/server/test_watch.py",),
    ),
    Mutant(
        "access: a version that could not be read is not settled",
        "server/watch.py",
        "if is_same and not self._is_fresh and not self._vain_looks:",
        "if is_same and not self._is_fresh:",
        ("tests/unit/server/test_watch.py",),
    ),
    Mutant(
        "5: a slow source is no thin link",
        "client/stream.py",
        "window < MIN_WINDOW_BYTES and self.sent >= self.limit",
        "window < MIN_WINDOW_BYTES",
        ("tests/unit/client/test_stream.py",),
    ),
    Mutant(
        "4: a call is the writer's once there is one",
        "server/leg.py",
        "        if self._writer is not None:\n            return  # The call was for it.\n",
        "",
        ("tests/integration/server/test_leg_writer.py",),
    ),
    Mutant(
        "9: a leg without a writer sends its close",
        "server/leg.py",
        "            else:\n                self._write()\n",
        "",
        ("tests/integration/server/test_leg_writer.py",),
    ),
    Mutant(
        "9: the sender ends the direction behind the close",
        "server/leg.py",
        "            self._transport.finish_sending()\n\n    def _call_sender",
        "            pass\n\n    def _call_sender",
        ("tests/integration/server/test_leg_writer.py",),
    ),
    Mutant(
        "4: what the sender could not send begins a writer",
        "server/leg.py",
        "            self._start_writer()\n",
        "            pass\n",
        ("tests/integration/server/test_leg_writer.py",),
    ),
    Mutant(
        "7: the timer keeps no leg that is over",
        "server/timer.py",
        "            del self._legs[number]\n",
        "            pass\n",
        ("tests/unit/server/test_timer.py",),
    ),
    Mutant(
        "7: a machine that slept knows it",
        "client/timer.py",
        "            slept = time.time() - planned > _SLEPT_S\n",
        "            slept = False\n",
        ("tests/unit/client/test_timer.py",),
    ),
    Mutant(
        "7: and knows it soon",
        "client/timer.py",
        "_LONGEST_WAIT_S = 2.0\n",
        "_LONGEST_WAIT_S = 3600.0\n",
        ("tests/unit/client/test_timer.py",),
    ),
    Mutant(
        "resume: only the newest channel is heard",
        "client/tunnel_end.py",
        "if link is not self._link or self._ended is not None:",
        "if self._ended is not None:",
        (
            "tests/unit/client/test_tunnel_end_resume.py::test_message_of_an_old_channel_changes_nothing",
        ),
    ),
    Mutant(
        "resume: replay begins at received, not at delivered",
        "client/stream.py",
        "skipped = max(0, peer.received - at)",
        "skipped = max(0, peer.delivered - at)",
        ("tests/unit/client/test_stream_resume.py",),
    ),
    Mutant(
        "resume: what is not delivered is kept",
        "client/stream.py",
        "self._kept_from + len(self._kept[0]) <= delivered:",
        "self._kept_from + len(self._kept[0]) <= self.sent:",
        ("tests/unit/client/test_stream_resume.py",),
    ),
    Mutant(
        "resume: an eof is acked on the channel by which it came",
        "client/stream.py",
        "return Ack(self.delivered, self.limit, self.eof_delivered and self._eof_came)",
        "return Ack(self.delivered, self.limit, self.eof_delivered)",
        ("tests/unit/client/test_stream_resume.py",),
    ),
    Mutant(
        "resume: the token is compared",
        "client/tunnel.py",
        "return has_token and has_target",
        "return has_target",
        (
            "tests/integration/client/test_resume.py::test_whatever_does_not_fit_is_refused_in_the_same_words",
        ),
    ),
    Mutant(
        "resume: an old attempt is refused",
        "client/tunnel_end.py",
        "if attempt <= self._attempt:",
        "if attempt < self._attempt:",
        (
            "tests/unit/client/test_tunnel_end_resume.py::test_attempt_that_is_not_newer_is_refused_and_changes_nothing",
        ),
    ),
    Mutant(
        "resume: a tunnel does not wait for ever",
        "client/tunnel_end.py",
        "if self._resume_left_locked() == 0.0 and self._lost is not None:",
        "if False and self._lost is not None:",
        (
            "tests/unit/client/test_tunnel_end_resume.py::test_consumer_and_producer_are_told_when_the_grace_is_over",
        ),
    ),
    Mutant(
        "resume: detached tunnels are limited",
        "client/tunnels.py",
        "while len(waits) > MAX_DETACHED or kept > MAX_DETACHED_BYTES:",
        "while False:",
        (
            "tests/integration/client/test_resume.py::test_too_many_detached_tunnels_end_the_one_that_has_waited_longest",
        ),
    ),
    Mutant(
        "resume: the loss of the client's own leg ends no tunnel",
        "client/tunnels.py",
        "MAX_DETACHED = 256\n",
        "MAX_DETACHED = 128\n",
        (
            "tests/integration/client/test_resume.py::test_all_of_200_tunnels_go_on_when_the_leg_of_the_client_is_lost",
        ),
    ),
    Mutant(
        "resume: nobody without the token ends a tunnel",
        "server/tunnel.py",
        '        self._is_unproven = self._kind == "resume"',
        "        self._is_unproven = False",
        (
            "tests/integration/server/test_resume.py::test_tunnel_lives_on_when_somebody_resumes_it_and_breaks_a_rule",
        ),
    ),
    Mutant(
        "resume: the server counts from where the ends stand",
        "server/credit.py",
        "        self.forwarded = received\n",
        "        self.forwarded = 0\n",
        (
            "tests/integration/server/test_resume.py::test_overrun_is_found_when_a_resumed_end_sends_beyond_its_limit",
        ),
    ),
    Mutant(
        "resume: a resume waits for its client",
        "server/relay.py",
        "                self._held.open_for(slot.name)",
        "                pass",
        (
            "tests/integration/server/test_resume.py::test_resume_is_held_when_the_client_is_not_there_yet",
        ),
    ),
    Mutant(
        "resume: many restarts in a row are each the first",
        "client/agent.py",
        "            self._note_leg(run)\n            return self._draw",
        "            return self._draw",
        ("tests/integration/client/test_agent.py",),
    ),
    Mutant(
        "resume: the next leg is up before the old one is ended",
        "server/relay.py",
        "SPREAD_MS_PER_LEG = 3\n",
        "SPREAD_MS_PER_LEG = 10\n",
        ("tests/unit/server/test_relay.py",),
    ),
    Mutant(
        "resume: it takes its old leg's slot over",
        "server/registry.py",
        "            if not olds:\n                self._check_room_locked()",
        "            self._check_room_locked()",
        (
            "tests/integration/server/test_resume.py::test_resume_takes_its_old_legs_slot_when_the_server_is_full",
        ),
    ),
    Mutant(
        "10: what a peer presents is not written",
        "server/app.py",
        '    return value.strip() if given.lower() == scheme else ""',
        '    print(value, flush=True)\n    return value.strip() if given.lower() == scheme else ""',
        ("tests/integration/server/test_access.py",),
    ),
    Mutant(
        "access: what is revoked opens nothing that was on its way",
        "server/user_leg.py",
        "            if not self._is_expecting:\n",
        "            if False:\n",
        ("tests/unit/server/test_held.py",),
    ),
    Mutant(
        "limits: a forged address does not count",
        "server/addresses.py",
        'for text in reversed(forwarded.split(",")):',
        'for text in forwarded.split(","):',
        ("tests/unit/server/test_addresses.py",),
    ),
    Mutant(
        "limits: only a trusted proxy names an address",
        "server/addresses.py",
        "hop = _parse(text.strip()) if is_trusted else None",
        "hop = _parse(text.strip())",
        ("tests/unit/server/test_addresses.py",),
    ),
    Mutant(
        "limits: the table of failed logins is bounded",
        "server/logins.py",
        "while len(self._levels) > self._max_entries:",
        "while False:",
        ("tests/unit/server/test_logins.py",),
    ),
    Mutant(
        "limits: IPv6 is counted by its 64 bits",
        "server/logins.py",
        "block = block_of(address)",
        "block = address",
        ("tests/unit/server/test_logins.py",),
    ),
    Mutant(
        "limits: resumes have a bucket of their own",
        "server/limits.py",
        "key, now = (user, kind), self._clock()",
        'key, now = (user, ""), self._clock()',
        ("tests/unit/server/test_limits.py",),
    ),
    Mutant(
        "limits: an id in use makes no room",
        "server/limits.py",
        "tunnel.place if tunnel.is_resume else None",
        "tunnel.place",
        ("tests/unit/server/test_limits.py",),
    ),
    Mutant(
        "limits: a held resume is counted once",
        "server/relay.py",
        "                is_spent = True\n",
        "",
        ("tests/integration/server/test_limits.py::test_held_resume_is_counted_once",),
    ),
    Mutant(
        "limits: credit leaves in order",
        "server/tunnel.py",
        """        with self._ack_order:
            with self._channels.lock:
                if self._is_over or not self._is_opened:
""",
        """        if True:
            with self._channels.lock:
                if self._is_over or not self._is_opened:
""",
        (
            "tests/unit/server/test_pacer.py::test_limits_leave_in_order_when_two_threads_raise_them",
        ),
    ),
    Mutant(
        "limits: paced credit rises without an ack",
        "server/pacer.py",
        "                if used and hunger:\n                    meter.waiting.append(entry)\n",
        "",
        ("tests/unit/server/test_pacer.py",),
    ),
    Mutant(
        "limits: the first credit is paid for",
        "server/purses.py",
        "            purse.tokens -= size\n",
        "",
        ("tests/unit/server/test_purses.py", "tests/unit/server/test_pacer.py"),
    ),
    Mutant(
        "limits: the first credit is no more than may be owed",
        "server/purses.py",
        "max(0, min(wanted, int(purse.tokens + self._burst)))",
        "wanted",
        ("tests/unit/server/test_pacer.py::test_new_tunnels_are_no_way_around_the_rate",),
    ),
    Mutant(
        "limits: the age of a tunnel outlives its leg",
        "server/pacer.py",
        "entry.begun_at = self._ages.setdefault(key, entry.begun_at)",
        "self._ages.setdefault(key, entry.begun_at)",
        ("tests/unit/server/test_pacer.py",),
    ),
    Mutant(
        "limits: a tunnel that is never answered is idle",
        "server/guard.py",
        "        self._guard.pacer.started(self._user, tunnel)\n\n",
        "        pass\n\n",
        ("tests/unit/server/test_pacer.py",),
    ),
    Mutant(
        "audit: no more lines wait than stated",
        "server/audit.py",
        "        if self._queue.qsize() >= self._max_waiting:\n            next(self._losses)\n",
        "        if False:\n            next(self._losses)\n",
        ("tests/unit/server/test_audit.py",),
    ),
    Mutant(
        "audit: a FIFO that nobody reads is no wait",
        "server/audit.py",
        "os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC",
        "os.O_APPEND | os.O_CREAT | os.O_CLOEXEC",
        (
            "tests/integration/server/test_audit.py::test_tunnel_works_and_the_server_stops_in_time_when_nothing_can_be_written",
        ),
    ),
    Mutant(
        "audit: lost lines are counted",
        "server/audit.py",
        "            self._told += lost\n",
        "",
        ("tests/unit/server/test_audit.py",),
    ),
    Mutant(
        "audit: lines stand in the order of what happened",
        "server/tunnel.py",
        """                self._record.accepted(self)
            fields = {name: control[name] for name in control if name not in ("type", "channel")}
            frame = _text(kind, **{**fields, "limit": limit})
            self._user_leg.outbox.put_first(USER_CHANNEL, frame)
""",
        """            fields = {name: control[name] for name in control if name not in ("type", "channel")}
            frame = _text(kind, **{**fields, "limit": limit})
            self._user_leg.outbox.put_first(USER_CHANNEL, frame)
            self._record.accepted(self)
""",
        ("tests/unit/server/test_tunnel.py",),
    ),
)


def apply(folder: Path, mutant: Mutant) -> str | None:
    """Patch the copy; return why that is not possible."""
    path = folder / mutant.file
    text = path.read_text("utf-8")
    if text.count(mutant.old) != 1:
        return f"the patch matches {text.count(mutant.old)} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    # The server's copies and the script's block carry the same fault.
    subprocess.run([sys.executable, ".ci/sync.py"], cwd=folder, check=True)
    return None


def judge(folder: Path, mutant: Mutant) -> str | None:
    """Run the tests in the patched copy; return what is wrong with them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
    try:
        result = subprocess.run(
            command, cwd=folder, timeout=TEST_S, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if result.returncode == TESTS_FAILED:
        return None
    return f"pytest ended with {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-500:]}"


def copy_project(folder: Path) -> None:
    """Make a clean copy, without caches."""
    for name in COPIED:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in COPIED_FILES:
        shutil.copy2(ROOT / name, folder / name)


def main(argv: list[str]) -> int:
    """Try all mutants, or those whose rule contains the first argument."""
    chosen = [m for m in MUTANTS if not argv or argv[0] in m.rule]
    survivors = 0
    for mutant in chosen:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-") as name:
            folder = Path(name)
            copy_project(folder)
            wrong = apply(folder, mutant) or judge(folder, mutant)
        verdict = "SURVIVED" if wrong else "killed"
        print(f"{verdict:8} {time.monotonic() - begun:5.1f} s  {mutant.rule}", flush=True)
        if wrong:
            survivors += 1
            print(f"         {wrong}", flush=True)
    print(f"{len(chosen) - survivors} passed, {survivors} failed")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
