"""Requests (syscalls): parse and check the text, hold state and answer. Pure: no files, no store, no workers.

Any thread may use it. May import config and host.
"""
