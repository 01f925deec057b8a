"""Is the evidence in the right place: data with known regions, and metrics on maps."""
