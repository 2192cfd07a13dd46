"""MCP servers as tools: which tools they have, their sessions, and the program that speaks MCP inside the
sandbox.

Sessions and listings live on the runner's thread. The bridge is a process of its own and imports nothing of
the daemon.
"""
