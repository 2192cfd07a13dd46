"""MCP servers as tools: which tools they have, their sessions, and the program that speaks MCP inside the
sandbox.

Sessions and listings live on the runner's thread, and never import the SDK: only the program in the sandbox
does, which starts in `bridge`, and `aiosctl mcp serve`.
"""
