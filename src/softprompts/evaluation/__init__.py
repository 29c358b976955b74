"""How good a prompt is: predictions, metrics with standard errors, reports."""
