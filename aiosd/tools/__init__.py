"""The tool manager: which tools exist, and what runs their calls.

`run` has sandboxes and the thread that starts them, `mcp` the tools of MCP servers, `toolbox` the programs of
the built-in tools. May import cores, access, database, syscall, config, host.
"""
