"""This process and its siblings: signals, restarts, memory, compiled programs."""
