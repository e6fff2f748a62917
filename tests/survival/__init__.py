"""What a tunnel has to survive: a link that breaks at every byte, and restarts under real ssh."""
