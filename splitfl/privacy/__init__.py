"""What may leave, under which bound."""
