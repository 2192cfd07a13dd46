"""The inference engine: load() a model folder, add() requests to an Engine, step() it.

Imports torch: only worker processes may import this package, never the daemon.
"""

from __future__ import annotations

import os

# OpenMP's threads spin while they wait. On a machine that the daemon, tools and agents use too, they wait for
# each other's time slices: 12 tokens/s instead of 120 on two busy cores. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.model import Model, load
from aiosd.cores.engine.sampler import TokenLogprob
from aiosd.cores.engine.sequence import Output

__all__ = ["Engine", "Model", "Output", "TokenLogprob", "load"]
