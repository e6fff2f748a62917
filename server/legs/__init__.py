"""The WebSockets into the server: one leg for each client, one for each tunnel of a user."""
