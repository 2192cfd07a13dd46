"""Programs run as their callers: sandbox, control group, network, work folder, and the one thread that starts
them.

Orders come from any thread and are carried out on the runner's. May import access, syscall, config, host.
"""
