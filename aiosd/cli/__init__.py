"""aiosctl and its commands: a client that uses the files below /aios and imports nothing of the daemon.

May import client, syscall, config, host.
"""
