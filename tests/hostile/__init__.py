"""Admitted parties that do what they may not, against a real owner that serves an honest party at the same time."""
