"""The LLM cores: models, the devices they run on, worker processes, and the engine inside a worker.

The pool has one listening thread for each worker. Only `engine` and `worker` import torch. Both run in the
worker's process. May import access, database, syscall, config, host.
"""
