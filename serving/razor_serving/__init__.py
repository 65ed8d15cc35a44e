"""The `razor` command and what it serves."""
