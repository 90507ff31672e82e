"""Every decoder of bytes that a peer can choose, in messages and files: with hypothesis, and guided for hours."""
