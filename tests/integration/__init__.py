"""Some parts together over real sockets: under a second each."""
