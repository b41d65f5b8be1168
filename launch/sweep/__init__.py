"""One config to many runs: expansion, cohorts, suites, and going through all stages."""
