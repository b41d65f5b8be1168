"""What a latent means, in words: questions to a chat endpoint, its answers, and scores of them.

It reads the files of `latents` and adds explanations.parquet to them. It loads neither JAX nor the
model.
"""
