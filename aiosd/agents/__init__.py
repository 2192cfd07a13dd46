"""Agents: named settings that requests start from. An agent may end with a process.

Owns the table of agents and one thread that waits for processes. Any thread may call. May import access,
database, syscall, config, host.
"""
