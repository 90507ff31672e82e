"""What may happen when in a round between parties: records and tables, no I/O."""
