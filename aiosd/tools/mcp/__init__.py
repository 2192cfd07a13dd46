"""The only modules that import the MCP SDK: a session's host, in its cage, and `aiosctl mcp serve`.

The daemon imports neither: what a server prints is parsed in the cage.
"""
