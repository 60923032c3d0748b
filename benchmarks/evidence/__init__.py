"""Published results, run again with this library: one script per question, results as JSON, plots from the JSON."""
