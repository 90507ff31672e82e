"""Combining the adapter updates of several parties: the rules, and the ways of summing."""
