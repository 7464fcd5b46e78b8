"""What is wrong with a composed configuration, the run built from it, where each value came from."""
