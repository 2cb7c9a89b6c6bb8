"""Published checkpoints in and out, without PyTorch: `moe_jax.load` and `moe_jax.save`. See docs/checkpoints.md."""
