"""Who may connect, and which targets a user may open."""
