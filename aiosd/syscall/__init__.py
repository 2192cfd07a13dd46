"""A request: its parsed text, its state and its answer. Pure: no files, no store, no workers.

Any thread may call. May import config and host.
"""
