"""The inference engine inside a worker: model.load() reads a folder, Engine.add() takes requests,
Engine.step() runs them.

Imports torch, so only worker processes may import it. One thread.
"""

import os

# OpenMP's threads spin while they wait, and take CPU time from the threads that they wait for. On two cores
# that other processes use too, that gave 12 tokens/s instead of 120. torch reads this once, at its import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
