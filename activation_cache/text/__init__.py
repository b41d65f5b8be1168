"""From documents to a table of tokens: sources, packing, tokenising.

It imports `language_model` for the tokenizer, and no array of activations.
"""
