"""moe_jax: Mixture-of-Experts language models in JAX and Flax."""

__version__ = "0.1.0"
