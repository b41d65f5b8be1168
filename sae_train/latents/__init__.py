"""What each latent of an SAE is: contexts, statistics and directions, computed and read back.

One walk of the model over text serves all SAEs of a model; the files stand beside each run
(docs/latents.md). Reading them (`reader`) loads no JAX. It imports `evaluate` for the text and the
jobs, never the trainer.
"""
