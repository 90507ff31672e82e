"""Rows that came from different hands to begin with: annotators, and the speakers of plays."""
