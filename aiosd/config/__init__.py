"""The configuration: aiosd.toml, agent.toml, [mcp.NAME], and the difference between two configurations. Pure.

May import host.
"""
