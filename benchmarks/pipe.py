"""Standard input and output <-> a plain TCP connection: `pipe.py PORT`.

The least work of any stdio tunnel, so the baseline for bulk. The driver uses the same kind of
pipes as for the proxy command. A standalone program.
"""

import contextlib
import os
import socket
import sys
import threading

CHUNK_BYTES = 65536


def main() -> None:
    sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def copy_up() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(0, CHUNK_BYTES):
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

    threading.Thread(target=copy_up, daemon=True).start()
    with contextlib.suppress(OSError):
        while data := sock.recv(CHUNK_BYTES):
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]
    # Without exit: the driver reads this process's CPU time before closing stdin.
    os.close(1)
    threading.Event().wait()


if __name__ == "__main__":
    main()
