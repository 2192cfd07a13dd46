"""What the daemon asks of Linux: journal, service manager, mounts, identity, the use of memory and disk.

Imports nothing of aiosd but errors.
"""
