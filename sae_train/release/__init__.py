"""From trained runs to a published tree: weights, cards, index, folder names.

It writes the formats of `inference` and quotes the numbers of `evaluate`.
"""
