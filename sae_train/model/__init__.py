"""The maths of each SAE architecture, and the table of its parameters and their shardings.

Pure functions of arrays: no optimiser, no file.
"""
