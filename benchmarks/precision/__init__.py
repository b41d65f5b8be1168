"""What rounded products do: to trained SAEs, to window decisions, to the search for pairs."""
