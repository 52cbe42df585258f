"""Metrics as pure functions, and flags that say when an evaluation cannot be trusted."""
