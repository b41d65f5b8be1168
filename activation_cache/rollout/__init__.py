"""A model's own continuations of prompts, written as text that can be harvested or evaluated on.

Imports the rooms of text and of the language model.
"""
