"""Sharded training, evaluation and release of JumpReLU sparse autoencoders."""
