"""The state that survives: /var/lib/aios/aios.db. May import syscall, config, host."""
