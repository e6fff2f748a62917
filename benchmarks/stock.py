"""A WebSocket hop as in the libraries' own documentation: the baseline for the relay.

    gunicorn --threads N 'stock:app'          the server: dials 127.0.0.1:PORT for /tcp/PORT
    python stock.py URL [CA_FILE]             standard input and output <-> that WebSocket

One hop, not the relay's two; no window, no fairness, no limits. A standalone program.
"""

import contextlib
import os
import socket
import sys
import threading

CHUNK_BYTES = 65536


def make_app():  # type: ignore[no-untyped-def]  # Flask only in the server's process
    """Return a Flask app with flask-sock (simple-websocket), with the defaults and a ping."""
    import flask
    import flask_sock

    app = flask.Flask(__name__)
    app.config["SOCK_SERVER_OPTIONS"] = {"ping_interval": 20}
    sock = flask_sock.Sock(app)

    @app.get("/healthz")
    def healthz() -> str:
        return "ok"

    @sock.route("/idle")  # type: ignore[untyped-decorator]  # as below
    def idle(ws) -> None:  # type: ignore[no-untyped-def]
        ws.receive()

    @sock.route("/tcp/<int:port>")  # type: ignore[untyped-decorator]  # not annotated
    def tcp(ws, port: int) -> None:  # type: ignore[no-untyped-def]
        with socket.create_connection(("127.0.0.1", port)) as target:
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            down = threading.Thread(target=copy_down, args=(target, ws), daemon=True)
            down.start()
            with contextlib.suppress(Exception):  # any error ends the hop
                while True:
                    target.sendall(ws.receive())
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)
            down.join()

    def copy_down(target: socket.socket, ws) -> None:  # type: ignore[no-untyped-def]
        with contextlib.suppress(Exception):
            while data := target.recv(CHUNK_BYTES):
                ws.send(data)
            ws.close()

    return app


def pipe(url: str, ca_file: str | None) -> None:
    """Run the user's end with websocket-client."""
    import websocket

    ws = websocket.create_connection(
        url,
        sslopt={"ca_certs": ca_file} if ca_file else {},
        sockopt=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        enable_multithread=True,
    )

    def copy_up() -> None:
        with contextlib.suppress(Exception):
            while data := os.read(0, CHUNK_BYTES):
                ws.send_binary(data)

    threading.Thread(target=copy_up, daemon=True).start()
    with contextlib.suppress(Exception):
        while data := ws.recv():
            view = memoryview(data if isinstance(data, bytes) else data.encode())
            while view:
                view = view[os.write(1, view) :]
    # Without exit: the driver reads this process's CPU time before closing stdin.
    os.close(1)
    threading.Event().wait()


if __name__ == "__main__":
    pipe(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
else:
    app = make_app()  # type: ignore[no-untyped-call]
