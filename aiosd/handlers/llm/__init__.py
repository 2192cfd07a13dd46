"""A model's answer: agents/NAME/syscall/llm and models/NAME/llm."""
