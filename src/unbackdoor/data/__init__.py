"""Samples from what users have: folders, .npz files, named data sets."""
