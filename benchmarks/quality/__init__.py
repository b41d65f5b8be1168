"""SAEs of several libraries' trainers beside ours, at equal L0."""
