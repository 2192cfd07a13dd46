"""The configuration: aiosd.toml, agent.toml, [mcp.NAME], and what changed between two of them. Pure.

May import host.
"""
