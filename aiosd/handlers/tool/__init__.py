"""Calls of tools: agents/NAME/syscall/tool and tools/NAME/call."""
