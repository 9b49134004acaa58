"""stage_worker computes: it hosts a span of a model's layers and the KV caches for it.

The only room that may import mlx and mlx_lm. `partition` and the manifest half of `weights` are
pure; `model_source` resolves directories without mlx, so that a coordinator may call it too.
"""
