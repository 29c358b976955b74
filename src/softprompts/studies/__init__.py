"""Studies: the papers' ablations as data, cells that can be killed and resumed, and reports with verdicts on claims."""
