"""What a request is: its text judged, its state, its answer. Pure: no files, no store, no workers.

Any thread may use it. May import config and host.
"""
