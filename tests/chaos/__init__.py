"""Runs that are broken on purpose, by seeded schedules, and must come out as if nothing had happened."""
