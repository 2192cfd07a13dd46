"""The split daemon: the orders that aiosd gives, and the root process that carries them out.

Without systemd one root process does all itself (system.py). May import tools, cores, access, syscall,
config, host.
"""
