"""Tests of `splitfl.wire`."""
