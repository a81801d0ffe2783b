"""Reports and other ways to look at what a model decided."""
