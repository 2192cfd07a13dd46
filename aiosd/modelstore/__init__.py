"""The model store: models that were pulled, as files named by their content, and the pulls that bring them.

The daemon has no network. aiosd.modelstore.puller, a process of its own, downloads; the daemon gives it open
files, judges what came, and alone decides what stands in the store.
"""
