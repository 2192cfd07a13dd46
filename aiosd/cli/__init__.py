"""aiosctl and its verbs: a client of the files below /aios, which imports nothing of the daemon.

May import client, syscall, config, host.
"""
