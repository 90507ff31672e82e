"""The coordinator of a federation: it runs rounds between parties, and keeps what it has acknowledged."""
