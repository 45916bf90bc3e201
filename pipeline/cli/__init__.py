"""The `illm` command. Imports nothing heavy at start, and everything a command needs within it."""
