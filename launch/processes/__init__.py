"""This process and the others of its stage: signals, restarts, memory, compiled programs.

It imports `launch.config`, and of the other packages configs and `activation_cache.runtime`.
"""
