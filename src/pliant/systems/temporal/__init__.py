"""Section 4: dynamic along time."""
