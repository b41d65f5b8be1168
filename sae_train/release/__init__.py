"""From trained runs to a published tree: folders, cards, index.

It writes through `inference`'s formats.
"""
