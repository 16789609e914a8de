"""Train Energy-Based World Models at scale."""

__version__ = "0.1.0"
