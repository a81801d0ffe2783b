"""The systems of the survey, by its own order; each a constructor that composes parts."""
