"""A run that recycles workers under load and counts what clients notice."""
