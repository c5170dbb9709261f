"""Recording of a training: statistics of every parameter over the steps, and their analysis."""
