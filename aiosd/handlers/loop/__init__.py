"""The agent loop: a request to agents/NAME/syscall/llm whose tool calls the daemon runs."""
