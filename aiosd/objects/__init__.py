"""The objects that users make and end: agents, contexts, models, tools, privilege groups; and their commands.

Each kind of object has a module. FUSE threads call. Permissions.making lets one object be made or ended at a
time. May import everything below the kernel.
"""
