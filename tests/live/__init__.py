"""Tests of the party's side against a real owner: real processes, real sockets, real keys."""
