"""A small story model, tuned through the split."""
