"""The context manager: conversations, and where their KV is (worker, host memory, disk, nowhere).

Owns the table of contexts, the swap and one thread that moves KV. Any thread may call. May import tools,
agents, cores, access, database, syscall, config, host.
"""
