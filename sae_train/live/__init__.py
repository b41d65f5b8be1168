"""A reader's text in a model with an SAE: which latents fire (`explore`), what they do (`steer`).

It imports `latents` for what was kept of each latent and `evaluate` for a latent's effect, never
the trainer.
"""
