"""From documents to host batches: sources, token shards, rows, and the mixture pipeline.

Pure numpy on the host: nothing here imports jax or a model.
"""
