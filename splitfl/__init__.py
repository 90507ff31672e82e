"""splitfl: tune a language model that its owner will not hand out, on data that its holder will not hand out."""

__version__ = "0.1.0"
