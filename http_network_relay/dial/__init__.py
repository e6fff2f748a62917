"""The way to the server: names, addresses, HTTP proxies, TLS, WebSocket, retries."""
