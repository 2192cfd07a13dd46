"""The access manager: who may do what, which calls wait for a person, and the log of what was done.

The only place where uids, groups and modes are compared. Any thread may call. May import database, syscall,
config, host.
"""
