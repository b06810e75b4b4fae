"""Pre-training of language models that keep learning: growth, replay and domain prompts on sharded models."""

__version__ = "0.1.0"
