"""From documents to a table of tokens: sources, packing, tokenising.

The room owns what a sequence is and which tokens make a row. It imports `language_model` for the
tokenizer, and knows nothing of activations.
"""
