"""aios-gateway(8): HTTP programs use aiosd, each as its own Unix user.

The front (`front`, `openai` and the other dialects) speaks HTTP and has no right on anybody's files. A
session (`session`) is a process of the user and does the calls on the tree. They exchange messages of `wire`.
Nothing here imports the daemon: the gateway is a client of the files.
"""
