"""Health questions by publisher through an owner's trunk; answers about studies, and tones of financial news."""
