"""aiosd: the language model as a device of the Linux machine."""

__version__ = "0.1.0"
