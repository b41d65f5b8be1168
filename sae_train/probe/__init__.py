"""`sae probe`: what the latents of an SAE tell of labelled text, by k-sparse logistic probes.

The protocol is sae-probes' (Kantamneni et al. 2025, arXiv 2502.16681). Imports the runs and models
of `sae_train.evaluate`, and from `sae_train.latents` which latents are active.
"""
