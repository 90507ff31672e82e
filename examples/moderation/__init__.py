"""Servers that moderate the same language with other shares of labels, without a server in the middle."""
