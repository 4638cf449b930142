"""Albor: a 398.5M-parameter code model as a literate program. The book is the source."""

__version__ = "0.1.0"
