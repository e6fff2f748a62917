"""The real server under gunicorn, driven by peers that speak the wire by hand."""
