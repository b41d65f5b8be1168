"""A released model on this machine: where it lies, its checkpoint, its tokenizer.

It turns files of others (safetensors, GGUF, tokenizer.json) into `gemma`'s parameters.
"""
