"""The kinds of syscall: a folder for each, with the handler that judges, starts, answers and ends its
requests.

table.py lists them. Threads: those of aiosd.scheduler.handler. May import everything below the kernel.
"""
