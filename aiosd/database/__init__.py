"""The state that survives a restart: /var/lib/aios/aios.db. May import syscall, config, host."""
