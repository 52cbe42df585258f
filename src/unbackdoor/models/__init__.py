"""Networks: the zoo, safe loading of what users have, how a network wants its input, and surgery by structure."""
