"""Names and numbers of the wire, version 1 (docs/protocol.md, normative), each with its reason."""

from __future__ import annotations

SUBPROTOCOL = "http-network-relay.v1"
CLIENTS_PATH = "/ws_for_clients"
USERS_PATH = "/ws_for_ssh_proxy_command"
# Every HTTP answer of the relay has this header; the answer of a proxy does not.
RELAY_HEADER = "HTTP-Network-Relay"
RELAY_HEADER_VALUE = "v1"
INSTANCE_HEADER = "HTTP-Network-Relay-Instance"
# A user leg that will resume a tunnel names the tunnel in its request.
TUNNEL_HEADER = "HTTP-Network-Relay-Tunnel"
# A client or proxy command asks to send frames with a masking key of zero; the server agrees.
MASK_HEADER = "HTTP-Network-Relay-Mask"
MASK_ZERO = "zero"

OP_CONTINUATION = 0x0
OP_TEXT = 0x1
OP_BINARY = 0x2
OP_CLOSE = 0x8
OP_PING = 0x9
OP_PONG = 0xA
# Of a ping or pong (RFC 6455, 5.5).
MAX_PING_BYTES = 125

# A data message: large enough to spread the cost of a frame, and small enough that a
# keystroke of another tunnel waits only some milliseconds for one message.
MAX_DATA_BYTES = 64 * 1024
# Senders put this much into one message. With its header the message crosses loopback as one
# segment of 65,483 bytes, so the receiver wakes up once; the size is whole pages of a pipe.
MESSAGE_BYTES = 60 * 1024
# A control: the longest legal `open` is under 2 KiB.
MAX_CONTROL_BYTES = 4 * 1024
CHANNEL_BYTES = 4
MAX_CHANNEL = 2**32 - 1
# The longest binary message of either leg.
MAX_MESSAGE_BYTES = CHANNEL_BYTES + MAX_DATA_BYTES
# Counts travel as JSON numbers, exact up to here in every language.
MAX_COUNT = 2**53
# The first window: enough for a fast LAN. The server grants no less.
MIN_WINDOW_BYTES = 256 * 1024
# The smallest window of a receiver on a thin link: 130 ms at 1 Mbit/s.
LEAST_WINDOW_BYTES = 16 * 1024
# 4 MiB carry 320 Mbit/s over 100 ms.
DEFAULT_MAX_WINDOW_BYTES = 4 * 1024 * 1024
# The largest window that may be set, and the sum of all windows of a client leg.
MAX_WINDOW_BYTES = 64 * 1024 * 1024
# nginx cuts an idle connection after 60 s, mobile NAT after 30 s.
DEFAULT_PING_INTERVAL_S = 20.0
# A leg is given up after a silence of this many of the own ping intervals.
SILENCE_INTERVALS = 2.5
# Frames that are sent after an end (a flush, bytes before a reset) have this long.
FLUSH_S = 1.0
# A control's sentence for a person.
MAX_MESSAGE_CHARS = 500
NAME_PATTERN = r"[!-9;-~]{1,128}"  # printable ASCII without space and colon (HTTP Basic)
HOST_PATTERN = r"[!-~]{1,255}"
