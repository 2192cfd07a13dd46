"""The agent scheduler: requests are admitted, wait in the queue, run as the policy says, and end exactly
once.

Owns the queue, its lock, quotas and the order of requests. FUSE threads admit and cancel; the pool's
listening threads bring answers; the runner's thread brings ends of tool calls. May import what is below:
context, privilege, tools, agents, cores, access, database, syscall, config, host. It knows no kind of
request: aiosd.handlers does.
"""
