"""The agent loop: a request to agents/NAME/syscall/llm whose tool calls are run."""
