"""Distillation losses in pure jax: nats per token first, reduced last.

A divergence is a function of one chunk of tokens (`ChunkView`); `chunked` gives it chunking,
masking, float32 sums and gradients without ever holding the logits of a whole batch.
"""
