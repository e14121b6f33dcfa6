"""The one place where the version stands; setup.py reads it without importing torch."""

__version__ = "0.1.0"
