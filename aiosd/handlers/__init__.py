"""The kinds of syscall, a folder for each. A handler judges, starts, answers and ends the requests of its
kind.

table.py lists the kinds. aiosd.scheduler.handler says which threads call a handler. May import everything
below the kernel.
"""
