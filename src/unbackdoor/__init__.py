"""Remove backdoors from neural networks with a few clean samples."""
