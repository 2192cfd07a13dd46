"""The inference engine inside a worker: model.load() a folder, Engine.add() requests, Engine.step() them.

Imports torch, so only worker processes may import it. One thread.
"""

import os

# OpenMP's threads spin while they wait. On a machine that the daemon, tools and agents use too, they wait for
# each other's time slices: 12 tokens/s instead of 120 on two busy cores. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
