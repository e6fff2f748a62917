"""One WebSocket, at either side: its socket, its reader, its send queue."""
