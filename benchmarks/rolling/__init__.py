"""Rolling stores: how well a window mixes, what it does to an SAE, how the two sides overlap."""
