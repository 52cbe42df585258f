"""Records and reports."""
