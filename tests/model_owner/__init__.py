"""Tests of the owner's parts, alone and together."""
