"""A released Gemma on this machine: found, checked, loaded and run, with its tokenizer.

The room turns other people's files (safetensors, GGUF, tokenizer.json) into the parameters that
`gemma` computes with. It imports `gemma` and the rooms before it.
"""
