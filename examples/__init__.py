"""Whole runs on real data, each with its configuration and what to expect."""
