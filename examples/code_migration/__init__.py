"""Edits of old Java, proposed by a model that three parties tuned together, checked and reviewed at each of them."""
