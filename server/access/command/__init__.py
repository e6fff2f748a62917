"""`server credentials`: the command that edits the credentials file."""
