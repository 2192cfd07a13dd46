"""The objects that users make and end: agents, contexts, models, tools, privilege groups, and their commands.

A module for each kind of object. FUSE threads call; objects are made and ended one at a time
(Permissions.making). May import everything below the kernel.
"""
