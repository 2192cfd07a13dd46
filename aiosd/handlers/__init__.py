"""The kinds of syscall. Each kind has a folder with its handler, which checks, starts and ends its requests.

table.py lists the kinds. aiosd.scheduler.handler says which threads call. May import everything below the
kernel.
"""
