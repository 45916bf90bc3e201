"""The compressed file."""
