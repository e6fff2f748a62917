"""The client: keeps one leg to the server and dials targets for its tunnels."""
