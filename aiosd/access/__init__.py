"""The access manager: permissions, the rules for tool calls, and the audit log.

The only place where uids, groups and modes are compared. Any thread may call. May import database, syscall,
config, host.
"""
