"""Studies: many small runs of the real system side by side, and what they say."""
