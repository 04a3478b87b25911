"""What a run gives: scores and curves, the page, comparisons."""
